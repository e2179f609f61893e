r"""Hand-derived rules of the gated feed-forward layers: SwiGLU, GEGLU, ReGLU.

Each is the exact composition of the rules of its parts, and keeps no product of its branches.

Symbols
    x   input                        g   dL/dy, the gradient that arrives
    a   the branch that is the gate  f   one of ``ACTIVATIONS``, f' its slope
    c   the other branch             h   f(a)
    d   h c, their product           dd, da, dc   dL/dd, dL/da, dL/dc
    y   output
Shape legend
    N   batch: any number of leading axes            H   hidden features
    I   in_features                                  O   out_features
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule
from manualprop.functions.fused.mlp import (
    activated,
    activated_and_through,
    moves,
    pre_activation,
    tangent,
    through,
)
from manualprop.functions.linear import Linear, linear_tangent

__all__ = ["GatedLinear", "GatedMLP"]


class GatedLinear(Rule):
    r"""$y = (f(a) \, c) V^\top + e$; the branches $a$ and $c$ are kept

    Derivation, with h = f(a) and d = h c
        dL/dV = g^T d,  dL/de = sum_n g_n,  dd = g V               :class:`Linear`, with d for x
        dc = dd h                                                  product rule
        da = dd c f'(a)                                            product and chain rule; f is elementwise
        dy = (f'(a) da c + h dc) V^T + d dV^T + de                 forward mode; da, dc, ... are tangents here
    Second order
        The rule of f computes h again, and its derivative rule f'; the rest are products and sums.
    Shape
        a and c (N, H), V (O, H), e (O,) or None -> y (N, O)
    Memory
        a and c, 8 bytes per hidden element in float32.  torch keeps h and d too, 16 bytes; torch.compile 12.
    Accuracy
        That of its parts.  Only the last bits of h may differ: backward computes h together with f'(a).
    Reference
        Shazeer, 2020, https://arxiv.org/abs/2002.05202
    """

    @staticmethod
    def forward(a: Tensor, c: Tensor, V: Tensor, e: Tensor | None, activation: str) -> Tensor:
        d = activated(activation, a) * c
        return F.linear(d.to(V.dtype), V, e)  # (N, H) (H, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, c, V, _, ctx.activation = inputs
        needs_a, needs_c, needs_V, *_ = ctx.needs_input_grad
        save(ctx, (a, needs_a or needs_c or needs_V), (c, needs_a or needs_V), (V, needs_a or needs_c))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, c, V = ctx.saved_tensors
        needs_a, needs_c, needs_V, needs_e, _ = ctx.needs_input_grad
        da, dc, dV = branch_gradients(ctx.activation, g, a, c, V, needs_a, needs_c, needs_V)
        de = Linear.bias_gradient(g) if needs_e else None
        return da, dc, dV, de, None

    @staticmethod
    def jvp(
        ctx: Any, da: Tensor | None, dc: Tensor | None, dV: Tensor | None, de: Tensor | None, _: None
    ) -> Tensor:
        a, c, V = ctx.saved_tensors
        h = activated(ctx.activation, a)
        dd = product_tangent(ctx.activation, a, c, h, da, dc)
        return linear_tangent((h * c).to(V.dtype), V, None if dd is None else dd.to(V.dtype), dV, de)


class GatedMLP(Rule):
    r"""$y = (f(a) \, c) V^\top + e$ with $a = x W^\top + p$ and $c = x U^\top + s$; only the input is kept

    Derivation
        da, dc, dL/dV, dL/de as :class:`GatedLinear`
        dL/dW = da^T x,  dL/dp = sum_n da_n                        :class:`Linear`, with da for g
        dL/dU = dc^T x,  dL/ds = sum_n dc_n                        and with dc
        dx = da W + dc U                                           x goes into both
        dy as :class:`GatedLinear`, da = dx W^T + x dW^T + dp      forward mode; da, dx, ... are tangents here
    Second order
        :class:`Linear` computes a and c again; the rest is as in :class:`GatedLinear`.
    Shape
        x (N, I), W and U (H, I), p and s (H,) or None, V (O, H), e (O,) or None -> y (N, O)
    Memory
        x and the parameters: nothing per hidden element.  Backward costs two more products.
    Accuracy
        That of its parts: backward computes the same a and c as forward.
    Reference
        Shazeer, 2020, https://arxiv.org/abs/2002.05202
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        p: Tensor | None,
        U: Tensor,
        s: Tensor | None,
        V: Tensor,
        e: Tensor | None,
        activation: str,
    ) -> Tensor:
        return GatedLinear.forward(F.linear(x, W, p), F.linear(x, U, s), V, e, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.activation = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, p, U, s, V = ctx.saved_tensors
        needs_x, needs_W, needs_p, needs_U, needs_s, needs_V, needs_e, _ = ctx.needs_input_grad
        a, c = pre_activation(x, W, p), pre_activation(x, U, s)
        needs_a, needs_c = needs_x or needs_W or needs_p, needs_x or needs_U or needs_s
        da, dc, dV = branch_gradients(ctx.activation, g, a, c, V, needs_a, needs_c, needs_V)
        dx = None
        if needs_x:
            dx = Linear.input_gradient(da, W) + Linear.input_gradient(dc, U)  # (N, H) (H, I) -> (N, I)
        dW = Linear.weight_gradient(da, x) if needs_W else None
        dp = Linear.bias_gradient(da) if needs_p else None
        dU = Linear.weight_gradient(dc, x) if needs_U else None
        ds = Linear.bias_gradient(dc) if needs_s else None
        de = Linear.bias_gradient(g) if needs_e else None
        return dx, dW, dp, dU, ds, dV, de, None

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dW: Tensor | None,
        dp: Tensor | None,
        dU: Tensor | None,
        ds: Tensor | None,
        dV: Tensor | None,
        de: Tensor | None,
        _: None,
    ) -> Tensor:
        x, W, p, U, s, V = ctx.saved_tensors
        a, c = F.linear(x, W, p), F.linear(x, U, s)
        h = activated(ctx.activation, a)
        da = linear_tangent(x, W, dx, dW, dp) if moves(dx, dW, dp) else None
        dc = linear_tangent(x, U, dx, dU, ds) if moves(dx, dU, ds) else None
        return linear_tangent(h * c, V, product_tangent(ctx.activation, a, c, h, da, dc), dV, de)


# ----- what the rules share -----


def branch_gradients(
    activation: str,
    g: Tensor,
    a: Tensor,
    c: Tensor,
    V: Tensor,
    needs_a: bool,
    needs_c: bool,
    needs_V: bool,
) -> tuple[Any, Any, Any]:
    """da, dc and dV of y = (f(a) c) V^T; None if not needed.  a and c may have a higher precision than V."""
    h = da = dc = dV = None
    if needs_a or needs_c:
        dd = Linear.input_gradient(g, V).to(a.dtype)  # (N, O) (O, H) -> (N, H)
        if not needs_a:
            h = activated(activation, a)
        elif needs_c or needs_V:
            h, da = activated_and_through(activation, dd * c, a)
        else:
            da = through(activation, dd * c, a)
        if needs_c and h is not None:
            dc = dd * h
    if needs_V:
        h = activated(activation, a) if h is None else h
        d = h * c
        dV = Linear.weight_gradient(g, d.to(g.dtype))  # (O, N) (N, H) -> (O, H)
    return da, dc, dV


def product_tangent(
    activation: str, a: Tensor, c: Tensor, h: Tensor, da: Tensor | None, dc: Tensor | None
) -> Tensor | None:
    """The tangent of f(a) c; None if no branch has a tangent."""
    by_a = None if da is None else tangent(activation, da, a, h) * c
    by_c = None if dc is None else h * dc
    return by_c if by_a is None else by_a if by_c is None else by_a + by_c
