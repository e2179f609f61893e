r"""Hand-derived rule of the local response norm.

Symbols
    x   input, channels c on axis 1     d   k + alpha times the mean of x^2 over a window of channels
    y   output                          S   that mean, a linear map;  S^T its adjoint
    g   dL/dy, the gradient that arrives
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manualprop.functions._execution import full
from manualprop.functions._execution._axes import Like
from manualprop.functions._rule import Rule
from manualprop.functions.linear_map import LinearMap, mapped

__all__ = ["ChannelMean", "LocalResponseNorm"]


class ChannelMean(LinearMap):
    r"""$y_c = \frac1s \sum_{j=c-a}^{c+b} x_j$ over the channels, $s = a + b + 1$, where $x_j = 0$ outside

    Derivation
        dL/dx_j = 1/s sum_c g_c 1[c - a <= j <= c + b]
                = 1/s sum_{c=j-b}^{j+a} g_c                        so dx is this mean with a and b exchanged
    Second order
        dx is linear in g; its adjoint is this mean.
    Shape
        x (N, C, ...) -> y alike
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of s terms.
    """

    @staticmethod
    def f(x: Tensor, a: int, b: int) -> Tensor:
        C, s = x.shape[1], a + b + 1
        z = F.pad(x, [*[0, 0] * (x.dim() - 2), a, b])
        total = z.narrow(1, 0, C)
        for k in range(1, s):
            total = total + z.narrow(1, k, C)
        return total / s

    @staticmethod
    def transposed(g: Tensor, like: Like, a: int, b: int) -> Tensor:
        return ChannelMean.f(g, b, a)


class LocalResponseNorm(Rule):
    r"""$y = x d^{-\beta}$ with $d = k + \alpha S x^2$, the mean of $x^2$ over ``size`` neighbouring channels

    Derivation
        dy_c/dx_j = 1[c = j] d_c^{-beta} - beta x_c d_c^{-beta-1} dd_c/dx_j
        dd_c/dx_j = 2 alpha S_cj x_j
        dL/dx_j = g_j d_j^{-beta} - 2 alpha beta x_j sum_c S_cj g_c x_c d_c^{-beta-1}
        so dx = g d^{-beta} - 2 alpha beta x S^T (g x d^{-beta-1})
        dy = t d^{-beta} - 2 alpha beta x d^{-beta-1} S (x t)      forward mode
    Second order
        dx is made of products, powers and the linear map S^T: autograd differentiates these as written.
    Shape
        x (N, C, ...) -> y alike
    Memory
        x.  torch keeps x and three tensors more: the padded squares, d and its power.
    Accuracy
        That of the power.  d is computed again in backward, in float32 for half precision.
    Reference
        Krizhevsky et al., 2012: ImageNet classification with deep convolutional neural networks
    """

    @staticmethod
    def forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return F.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.p = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.p
        dtype, x, g = g.dtype, full(x), full(g)
        d = normaliser(x, size, alpha, k)
        r = d.pow(-beta)
        back = mapped(ChannelMean, g * x * (r / d), (size - 1) // 2, size // 2)  # S^T
        dx = g * r - (2 * alpha * beta) * x * back
        return dx.to(dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.p
        dtype, x, t = t.dtype, full(x), full(t)
        d = normaliser(x, size, alpha, k)
        r = d.pow(-beta)
        along = mapped(ChannelMean, x * t, size // 2, (size - 1) // 2)  # S
        dy: Tensor = t * r - (2 * alpha * beta) * x * (r / d) * along
        return dy.to(dtype)


def normaliser(x: Tensor, size: int, alpha: float, k: float) -> Tensor:
    """d = k + alpha S x^2."""
    return torch.add(mapped(ChannelMean, x * x, size // 2, (size - 1) // 2) * alpha, k)
