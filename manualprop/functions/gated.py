r"""Hand-derived rules of the activations that have a second argument: a slope, a random slope, a gate.

Symbols
    x   input                 g   dL/dy, the gradient that arrives
    y   output                1[...]   1 where the condition holds, else 0
    W   slopes of PReLU       n   random slopes of RReLU
    a, b   the halves of a GLU's input; s = sigmoid(b)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._execution import chosen, formula
from manualprop.functions._rule import Rule, flat

__all__ = ["GLU", "PReLU", "RReLU"]


class PReLU(Rule):
    r"""$y = x$ for $x > 0$, else $W_c x$, with a slope $W_c$ for each channel or one for all

    Derivation
        dy/dx = 1 for x > 0, else W                                piecewise linear
              = W + (1 - W) 1[x > 0]
        dL/dx = g dy/dx
        dy/dW = 0 for x > 0, else x,  that is min(x, 0)
        dL/dW_c = sum g min(x, 0)                                  over every element of channel c
        dy = dy/dx dx + min(x, 0) dW                               forward mode
    Kinks
        dy/dx = W at x = 0, in reverse and in forward mode.  torch has W in reverse and 1 in forward mode.
    Second order
        dx and dW are products and sums of g, W and min(x, 0): autograd differentiates those as written.  1[x > 0]
        is constant.  d/dx min(x, 0) = 1[x <= 0] equals d/dW of dy/dx, so the mixed terms agree at 0.
    Shape
        x (N, C, ...), W (C,), (1,) or () -> y like x
    Memory
        x, as in torch.
    Accuracy
        Exact.
    Reference
        He et al., 2015, https://arxiv.org/abs/1502.01852
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor) -> Tensor:
        return torch.prelu(x, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, W = ctx.saved_tensors
        others = tuple(d for d in range(x.dim()) if d != 1 or W.numel() == 1)
        dx, part = prelu_gradients(g, x, channelwise(W, x), needs=tuple(ctx.needs_input_grad))
        dx = None if dx is None else flat(dx, x)
        dW = None if part is None else part.sum(others).to(W.dtype).view(W.shape)  # (N, C, ...) -> (C,)
        return dx, dW

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        dW = None if dW is None else channelwise(dW, x)
        dy: Tensor = prelu_tangent(dx, x, channelwise(W, x), dW)
        return dy


def slope(x: Tensor, w: Tensor) -> Tensor:
    """dy/dx: 1 for x > 0, else w."""
    return torch.where(x.detach() > 0, torch.ones_like(w), w)


@formula("g (N), x (N), w (N) -> dx like x, dW (N)")
def prelu_gradients(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx, and dL/dW before the sum: 0 where x > 0, for every g."""
    return g * slope(x, w), chosen(x.clamp(max=0), g)


@formula("dx (N), x (N), w (N), dW (N) -> dy like x")
def prelu_tangent(dx: Tensor | None, x: Tensor, w: Tensor, dW: Tensor | None) -> Tensor:
    """dy/dx dx + min(x, 0) dW"""
    dy = torch.zeros_like(x) if dx is None else slope(x, w) * dx
    return dy if dW is None else dy + x.clamp(max=0) * dW


class RReLU(Rule):
    r"""$y = n x$ with $n = 1$ for $x > 0$, else $n$ drawn uniformly from an interval: training

    Derivation
        dL/dx = n g                                                n is constant on each side of 0
        dy = n dx                                                  forward mode
    Kinks
        y'(0) = n, the random slope, as in PyTorch.
    Second order
        dx is the product of g and a constant: autograd differentiates it as written.
    Shape
        x, n and y alike
    Memory
        n, 4 bytes per element in float32, and y, which the next layer keeps anyway.  torch keeps n and x.
    Accuracy
        Exact.  In evaluation the layer is :class:`LeakyReLU` with the mean slope.
    Reference
        Xu et al., 2015, https://arxiv.org/abs/1505.00853
    """

    @staticmethod
    def forward(x: Tensor, n: Tensor) -> Tensor:
        return x * n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)  # under vmap both save calls must list the same tensors

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        n, y = ctx.saved_tensors
        return flat(g * n, y), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        n, _ = ctx.saved_tensors
        dy: Tensor = dx * n
        return dy


class GLU(Rule):
    r"""$y = a \sigma(b)$, where $a$ and $b$ are the halves of $x$ along an axis

    Derivation, with s = sigmoid(b) and s' = s (1 - s)
        dL/da = g s                                                product rule
        dL/db = g a s (1 - s)
        dL/dx = dL/da and dL/db, joined along the axis
        dy = s da + a s (1 - s) db                                 forward mode
    Second order
        dx is made of products of g, a and s = sigmoid(b): autograd differentiates those as written.
    Shape
        x (..., 2 K, ...), a, b and y (..., K, ...)
    Memory
        x, as in torch.
    Accuracy
        The relative error of 1 - s grows as eps / (1 - s): 0 for b > 17 in float32, where s rounds to 1.
    Reference
        Dauphin et al., 2016, https://arxiv.org/abs/1612.08083
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return F.glu(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, ctx.dim)
        return torch.cat(glu_gradients(g, a, b), ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        dy: Tensor = glu_tangent(*dx.chunk(2, ctx.dim), *x.chunk(2, ctx.dim))
        return dy


@formula("g (N), a (N), b (N) -> da like a, db like b")
def glu_gradients(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """g s and g a s (1 - s)"""
    s = torch.sigmoid(b)
    da = g * s
    return da, a * (1 - s) * da


@formula("da (N), db (N), a (N), b (N) -> dy like a")
def glu_tangent(da: Tensor, db: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """s da + a s (1 - s) db"""
    s = torch.sigmoid(b)
    return s * da + a * s * (1 - s) * db


def channelwise(W: Tensor, x: Tensor) -> Tensor:
    """W expanded to ``x`` (N, C, ...): each element gets the slope of its channel."""
    w = W.reshape(()) if W.numel() == 1 else W.view(-1, *(1,) * (x.dim() - 2))
    return w.expand_as(x)
