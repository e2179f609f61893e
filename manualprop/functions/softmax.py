r"""Hand-derived rules of softmax and log-softmax.

Symbols
    x   logits; i, j, k run along the axis ``dim``, all other axes are batch axes
    y   output            g   dL/dy, the gradient that arrives
    p   probabilities     t   tangent of x
    <a, b> = sum_k a_k b_k, kept as an axis of length 1
Shape legend
    N   all axes before ``dim``, flattened      C   the classes, along ``dim``      L   all axes after it, flattened
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import decay, formula
from manualprop.functions._rule import Rule

__all__ = ["LogSoftmax", "Softmax"]


def dot(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """<a, b> along ``dim``."""
    return (a * b).sum(dim, keepdim=True)


def along(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a formula ``function(g, y)`` along the second axis into ``f(g, y, dim)`` along any axis."""
    rows = formula("g (N, C), y (N, C) -> dx like y")(function)
    planes = formula("g (N, C, L), y (N, C, L) -> dx like y")(function)

    def run(g: Tensor, y: Tensor, dim: int) -> Tensor:
        if y.dim() == 0:
            return run(g.reshape(1), y.reshape(1), 0).reshape(())
        dim %= y.dim()
        N, C, L = y.shape[:dim].numel(), y.shape[dim], y.shape[dim + 1 :].numel()
        shape, along_it = ((N, C), rows) if L == 1 else ((N, C, L), planes)
        dx: Tensor = along_it(g.reshape(shape), y.reshape(shape))
        return dx.reshape(y.shape)

    return run


class Softmax(Rule):
    r"""$y_i = e^{x_i} / \sum_k e^{x_k}$

    Derivation
        dy_i/dx_j = y_i (1[i = j] - y_j)                           quotient rule
        dL/dx_j   = sum_i g_i y_i (1[i = j] - y_j)                 chain rule
                  = y_j g_j - y_j <g, y>
        dy = y t - y <t, y>                                        forward mode: the Jacobian is symmetric
    Second order
        dx is a product and a sum of g and y = softmax(x): autograd differentiates it as written.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        g_j - <g, y> cancels where y_j -> 1; the absolute error stays within eps |g|.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return softmax_slope(g, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return softmax_slope(t, y, ctx.dim)


@along
def softmax_slope(g: Tensor, y: Tensor) -> Tensor:
    """y g - y <g, y>"""
    gy = g * y
    return gy - y * gy.sum(1, keepdim=True)


class LogSoftmax(Rule):
    r"""$y_i = x_i - \log \sum_k e^{x_k}$

    Derivation, with p = softmax(x) = e^y
        dy_i/dx_j = 1[i = j] - p_j                                 chain rule: d(log-sum-exp)/dx_j = p_j
        dL/dx_j   = sum_i g_i (1[i = j] - p_j)                     chain rule
                  = g_j - p_j sum_i g_i
        dy_i = t_i - <p, t>                                        forward mode
    Second order
        dx is a product and a sum of g and e^y, y = log-softmax(x): autograd differentiates it as written.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        y is never -inf for finite x: ATen subtracts the largest logit first.  The rounding of y gives p a
        relative error of eps |y| / 2.  2^(y log2 e), which is faster, adds as much again.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return log_softmax_slope(g, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return log_softmax_tangent(t, y, ctx.dim)


@along
def log_softmax_slope(g: Tensor, y: Tensor) -> Tensor:
    """g - p sum g"""
    return g - decay(y) * g.sum(1, keepdim=True)


@along
def log_softmax_tangent(t: Tensor, y: Tensor) -> Tensor:
    """t - <p, t>"""
    return t - dot(torch.exp(y), t, 1)
