r"""Hand-derived rules of softmax and log-softmax.

Symbols
    x   logits; i, j, k run along the dimension ``dim``, every other axis is a batch axis
    y   output            g   dL/dy, the gradient that arrives
    p   probabilities     v   dL/d(dx), the gradient of the gradient
    <a, b> = sum_k a_k b_k, kept as an axis of length 1
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._elementwise import LOG2_E
from manualprop.functions._kernels import in_rows
from manualprop.functions._rule import HALF, Rule, in_full_precision, plain_eager


def dot(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """<a, b> along ``dim``."""
    return (a * b).sum(dim, keepdim=True)


class Softmax(Rule):
    r"""$y_i = e^{x_i} / \sum_k e^{x_k}$

    Derivation
        dy_i/dx_j = y_i (1[i = j] - y_j)                           quotient rule
        dL/dx_j   = sum_i g_i y_i (1[i = j] - y_j)                 chain rule
                  = y_j (g_j - <g, y>)
    Second order
        :class:`SoftmaxGradient`, by hand.  The Jacobian is symmetric: forward mode is the same formula.
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
        # Only when somebody will differentiate this gradient is it recorded.
        gradient = SoftmaxGradient.apply if torch.is_grad_enabled() else softmax_gradient
        return gradient(g, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        tangent: Tensor = SoftmaxGradient.apply(t, y, ctx.dim)
        return tangent


class SoftmaxGradient(Rule):
    r"""$b_i = y_i (g_i - \langle g, y \rangle)$, the gradient of :class:`Softmax`, itself differentiated

    Derivation
        b is linear in g, and symmetric:  dL/dg = y (v - <v, y>)
        db_i/dy_k = 1[i = k] (g_i - <g, y>) - y_i g_k              product rule
        dL/dy_k   = sum_i v_i db_i/dy_k = v_k (g_k - <g, y>) - <v, y> g_k
        db = y (dg - <dg, y>) + dy (g - <g, y>) - y <g, dy>        forward mode
    Memory
        g and y.
    """

    @staticmethod
    def forward(g: Tensor, y: Tensor, dim: int) -> Tensor:
        return softmax_gradient(g, y, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        g, y, ctx.dim = inputs
        ctx.save_for_backward(g, y)
        ctx.save_for_forward(g, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, y = ctx.saved_tensors
        needs_g, needs_y, _ = ctx.needs_input_grad
        dg = SoftmaxGradient.apply(v, y, ctx.dim) if needs_g else None
        dy = v * (g - dot(g, y, ctx.dim)) - dot(v, y, ctx.dim) * g if needs_y else None
        return dg, dy, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dy: Tensor | None, _: None) -> Tensor:
        g, y = ctx.saved_tensors
        db: Tensor = torch.zeros_like(y) if dg is None else SoftmaxGradient.apply(dg, y, ctx.dim)
        if dy is not None:
            db = db + dy * (g - dot(g, y, ctx.dim)) - y * dot(g, dy, ctx.dim)
        return db


def softmax_gradient(g: Tensor, y: Tensor, dim: int) -> Tensor:
    return in_rows(_softmax_gradient, dim, g, y)


def _softmax_gradient(g: Tensor, y: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    if y.dtype not in HALF and plain_eager() and not is_legacy_batchedtensor(g):
        gy = torch.mul(g, y, out=out)
        return gy.addcmul_(y, gy.sum(dim, True), value=-1)  # y g - y <g, y>: a pass fewer
    full_g, full_y = in_full_precision(g), in_full_precision(y)
    b = (full_y * (full_g - dot(full_g, full_y, dim))).to(y.dtype)
    return b if out is None else out.copy_(b)


class LogSoftmax(Rule):
    r"""$y_i = x_i - \log \sum_k e^{x_k}$

    Derivation, with p = softmax(x) = e^y
        dy_i/dx_j = 1[i = j] - p_j                                 chain rule: d(log-sum-exp)/dx_j = p_j
        dL/dx_j   = sum_i g_i (1[i = j] - p_j)                     chain rule
                  = g_j - p_j sum_i g_i
        dy_i = t_i - <p, t>                                        forward mode
    Second order
        :class:`LogSoftmaxGradient`, by hand.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        y is never -inf for finite x: the largest logit is subtracted first, in ATen.  Rounding y makes p wrong by
        a relative eps |y| / 2; to take p as 2^(y log2 e), which is quicker, makes it as much again.
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
        # Only when somebody will differentiate this gradient is it recorded.
        gradient = LogSoftmaxGradient.apply if torch.is_grad_enabled() else log_softmax_gradient
        return gradient(g, y, ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        (y,) = ctx.saved_tensors
        full_y, t = in_full_precision(y), in_full_precision(t)
        tangent: Tensor = (t - dot(full_y.exp(), t, ctx.dim)).to(y.dtype)
        return tangent


class LogSoftmaxGradient(Rule):
    r"""$b_j = g_j - e^{y_j} \sum_i g_i$, the gradient of :class:`LogSoftmax`, itself differentiated

    Derivation, with p = e^y
        dL/dg_i = v_i - <v, p>                                     every b_j holds g_i once, through the sum
        dL/dy_j = -v_j p_j sum_i g_i                               exponential rule
        db = dg - p sum dg - p dy sum g                            forward mode
    Memory
        g and y.
    """

    @staticmethod
    def forward(g: Tensor, y: Tensor, dim: int) -> Tensor:
        return log_softmax_gradient(g, y, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        g, y, ctx.dim = inputs
        ctx.save_for_backward(g, y)
        ctx.save_for_forward(g, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, y = ctx.saved_tensors
        needs_g, needs_y, _ = ctx.needs_input_grad
        p = y.exp()
        dg = v - dot(v, p, ctx.dim) if needs_g else None
        dy = -v * p * g.sum(ctx.dim, keepdim=True) if needs_y else None
        return dg, dy, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dy: Tensor | None, _: None) -> Tensor:
        g, y = ctx.saved_tensors
        db = torch.zeros_like(y) if dg is None else LogSoftmaxGradient.apply(dg, y, ctx.dim)
        return db if dy is None else db - y.exp() * dy * g.sum(ctx.dim, keepdim=True)


def log_softmax_gradient(g: Tensor, y: Tensor, dim: int) -> Tensor:
    return in_rows(_log_softmax_gradient, dim, g, y)


def _log_softmax_gradient(g: Tensor, y: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    if y.dtype not in HALF and plain_eager() and not is_legacy_batchedtensor(g):
        p = torch.mul(y, LOG2_E, out=out).exp2_()  # e^y
        return torch.addcmul(g, p, g.sum(dim, True), value=-1, out=p)
    full_g, p = in_full_precision(g), in_full_precision(y).exp()
    b = (full_g - p * full_g.sum(dim, True)).to(y.dtype)
    return b if out is None else out.copy_(b)
