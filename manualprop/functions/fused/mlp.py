r"""Hand-derived rules of a linear layer with the activation before or after it, and of two layers in a row.

Each is the exact composition of the rules of its parts.  It keeps only its arguments.  What the parts would
also have kept is computed again in backward, by the formulas of the parts.

Symbols
    x   input                        g   dL/dy, the gradient that arrives
    u   pre-activation               du  dL/du
    h   f(u), the activation         f   one of ``ACTIVATIONS``, f' its slope
    d   k h / q, after dropout       k   1 where h is kept, else 0;  q   probability that it is
    y   output
Shape legend
    N   batch: any number of leading axes            H   hidden features
    I   in_features                                  O   out_features
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions import activation as activations
from manualprop.functions import piecewise
from manualprop.functions._elementwise import Elementwise
from manualprop.functions._execution import recorded
from manualprop.functions._execution._bits import keep_bits, kept_bytes
from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule
from manualprop.functions.linear import Linear, linear_tangent

__all__ = ["MLP", "ActivationLinear", "LinearActivation"]


class ActivationFormulas(NamedTuple):
    """An activation's functions for blocks: compiled autograd cannot read the attributes of a rule."""

    f: Callable[[Tensor], Tensor]  # u -> h
    gradient: Callable[[Tensor, Tensor], Tensor]  # g f', from g and from u or h, whichever f' is written in
    value_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # h and g f', from g and u
    tangent: Callable[[Tensor, Tensor], Tensor]  # f' du, from du and u or h
    from_output: bool  # whether f' is written in h; otherwise in u


# The key is the name that the rule declares in ``fuses``.
FUSES: dict[str, type[Elementwise]] = {
    rule.fuses: rule
    for rule in (*vars(activations).values(), *vars(piecewise).values())
    if isinstance(rule, type) and issubclass(rule, Elementwise) and rule.fuses
}
ACTIVATIONS = {
    name: ActivationFormulas(
        recorded(rule.apply, rule.f),
        rule.chain.gradient,
        rule.chain.value_and_gradient,
        rule.chain.apply,
        rule.saves == "output",
    )
    for name, rule in sorted(FUSES.items())
}


def activated(activation: str, u: Tensor) -> Tensor:
    """h = f(u)."""
    return ACTIVATIONS[activation].f(u)


def through(activation: str, g: Tensor, u: Tensor) -> Tensor:
    """g f'(u), where g = dL/dh."""
    a = ACTIVATIONS[activation]
    return a.gradient(g, a.f(u) if a.from_output else u)


def activated_and_through(activation: str, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """h = f(u) and g f'(u), where g = dL/dh."""
    return ACTIVATIONS[activation].value_and_gradient(g, u)


def tangent(activation: str, du: Tensor, u: Tensor, h: Tensor) -> Tensor:
    """f'(u) du."""
    a = ACTIVATIONS[activation]
    return a.tangent(du, h if a.from_output else u)


class LinearActivation(Rule):
    r"""$y = f(x W^\top + b)$; only the input is kept

    Derivation, with u = x W^T + b and du = dL/du
        du_no = g_no f'(u_no)                                      f is elementwise
        dx = du W,  dW = du^T x,  db = sum_n du_n                  :class:`Linear`, with du for g
        dy = f'(u) (dx W^T + x dW^T + db)                          forward mode: chain and product rule
    Second order
        :class:`Linear` computes u again, and the rule of f computes f'; both have derivatives of every order.
    Shape
        x (N, I), W (O, I), b (O,) or None -> y (N, O)
    Memory
        x and the parameters: nothing of the size of the output.  Backward costs one more product.
        The two separate rules keep u too (for ReLU and Tanh y, which the next layer keeps anyway).
    Accuracy
        That of its parts: backward computes the same u as forward.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None, activation: str) -> Tensor:
        return activated(activation, F.linear(x, W, b))  # (N, I) (I, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b = ctx.saved_tensors
        needs_x, needs_W, needs_b, _ = ctx.needs_input_grad
        du = through(ctx.activation, g, pre_activation(x, W, b))
        dx = Linear.input_gradient(du, W) if needs_x else None
        dW = Linear.weight_gradient(du, x) if needs_W else None
        db = Linear.bias_gradient(du) if needs_b else None
        return dx, dW, db, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, _: None) -> Tensor:
        x, W, b = ctx.saved_tensors
        u = F.linear(x, W, b)
        du = linear_tangent(x, W, dx, dW, db)
        return tangent(ctx.activation, du, u, activated(ctx.activation, u))


class ActivationLinear(Rule):
    r"""$y = d W^\top + b$ with $d = k f(u) / q$: activation, dropout and linear; $u$ is kept

    Derivation, with h = f(u)
        dL/dW = g^T d,  dL/db = sum_n g_n,  dd = g W               :class:`Linear`, with d for x
        dh = k dd / q                                              :class:`Dropout`
        du = f'(u) dh                                              f is elementwise
        dy = (k f'(u) du / q) W^T + d dW^T + db                    forward mode: chain and product rule
    Second order
        The rule of f computes h again, and its derivative rule f'; the rest are products and sums.
    Shape
        u (N, H), W (O, H), b (O,) or None, k (N, H), () or None for no dropout -> y (N, O)
    Memory
        u, 4 bytes per element in float32, and k as bits, 1/8 byte.  The separate rules keep u, d and k: 8 1/8
        bytes; torch 8 bytes, with dropout 12.
    Accuracy
        That of its parts.  Only the last bits of h may differ: backward computes h together with f'(u).
    """

    @staticmethod
    def forward(
        u: Tensor, W: Tensor, b: Tensor | None, k: Tensor | None, q: float, activation: str
    ) -> Tensor:
        d = activated(activation, u)
        if k is not None:
            d = d * (k.to(d.dtype) / q)
        return F.linear(d.to(W.dtype), W, b)  # (N, H) (H, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, W, _, k, ctx.q, ctx.activation = inputs
        needs_u, needs_W, *_ = ctx.needs_input_grad
        bits = None if k is None else keep_bits(ctx, k)
        save(ctx, (u, needs_u or needs_W), (W, needs_u), (bits, True))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, W, bits = ctx.saved_tensors
        needs_u, needs_W, needs_b, *_ = ctx.needs_input_grad
        mask = None if u is None else dropout_mask(ctx, bits, u.dtype)
        du, dW = block_gradients(ctx.activation, g, u, W, mask, needs_u, needs_W)
        db = Linear.bias_gradient(g) if needs_b else None
        return du, dW, db, None, None, None

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None) -> Tensor:
        u, W, bits = ctx.saved_tensors
        mask, h = dropout_mask(ctx, bits, u.dtype), activated(ctx.activation, u)
        dd = None if du is None else masked(tangent(ctx.activation, du, u, h), mask).to(W.dtype)
        return linear_tangent(masked(h, mask).to(W.dtype), W, dd, dW, db)


class MLP(Rule):
    r"""$y = d V^\top + c$ with $d = k f(u) / q$ and $u = x W^\top + b$; only the input is kept

    Derivation, with h = f(u)
        dL/dV = g^T d,  dL/dc = sum_n g_n                          :class:`ActivationLinear`
        du = f'(u) k (g V) / q
        dx = du W,  dL/dW = du^T x,  dL/db = sum_n du_n            :class:`Linear`, with du for g
        dy = (k f'(u) du / q) V^T + d dV^T + dc                    forward mode: chain and product rule,
        du = dx W^T + x dW^T + db                                  where du, dx, ... are tangents
    Second order
        :class:`Linear` computes u again, the rule of f h, and its derivative rule f'; the rest are products.
    Shape
        x (N, I), W (H, I), b (H,) or None, V (O, H), c (O,) or None, k (N, H), () or None -> y (N, O)
    Memory
        x, the parameters, and k as bits: 0 or 1/8 byte per hidden element.  Backward costs one more product.
        :class:`Linear` followed by :class:`ActivationLinear` keeps u too: 4 bytes in float32.
    Accuracy
        As :class:`ActivationLinear`: backward computes the same u as forward.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        V: Tensor,
        c: Tensor | None,
        k: Tensor | None,
        q: float,
        activation: str,
    ) -> Tensor:
        u = F.linear(x, W, b)  # (N, I) (I, H) + (H,) -> (N, H)
        return ActivationLinear.forward(u, V, c, k, q, activation)  # (N, H) (H, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, b, V, _, k, ctx.q, ctx.activation = inputs
        bits = None if k is None else keep_bits(ctx, k)
        ctx.save_for_backward(x, W, b, V, bits)
        ctx.save_for_forward(x, W, b, V, bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, V, bits = ctx.saved_tensors
        needs_x, needs_W, needs_b, needs_V, needs_c, *_ = ctx.needs_input_grad
        dx = dW = db = du = dV = None
        before = needs_x or needs_W or needs_b
        if before or needs_V:
            u, mask = pre_activation(x, W, b), dropout_mask(ctx, bits, x.dtype)
            du, dV = block_gradients(ctx.activation, g, u, V, mask, before, needs_V)
        dc = Linear.bias_gradient(g) if needs_c else None
        if du is not None:
            dx = Linear.input_gradient(du, W) if needs_x else None
            dW = Linear.weight_gradient(du, x) if needs_W else None
            db = Linear.bias_gradient(du) if needs_b else None
        return dx, dW, db, dV, dc, None, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        dV: Tensor | None,
        dc: Tensor | None,
        *_: None,
    ) -> Tensor:
        x, W, b, V, bits = ctx.saved_tensors
        u, mask = F.linear(x, W, b), dropout_mask(ctx, bits, x.dtype)
        h, dd = activated(ctx.activation, u), None
        if moves(dx, dW, db):
            du = linear_tangent(x, W, dx, dW, db)
            dd = masked(tangent(ctx.activation, du, u, h), mask)
        return linear_tangent(masked(h, mask), V, dd, dV, dc)


# ----- what the rules share -----


def pre_activation(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """u = x W^T + b."""
    u: Tensor = linear(x, W, b)
    return u


linear = recorded(Linear.apply, F.linear)


def block_gradients(
    activation: str, g: Tensor, u: Tensor, W: Tensor, mask: Tensor | None, needs_u: bool, needs_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """du and dW of y = d W^T with d = mask f(u); under autocast u may be in a higher precision than W."""
    h = du = dW = None
    if needs_u:
        dd = Linear.input_gradient(g, W).to(u.dtype)  # (N, O) (O, H) -> (N, H)
        dh = masked(dd, mask)
        if needs_W:
            h, du = activated_and_through(activation, dh, u)
        else:
            du = through(activation, dh, u)
    if needs_W:
        h = activated(activation, u) if h is None else h
        dW = Linear.weight_gradient(g, masked(h, mask).to(g.dtype))  # (O, N) (N, H) -> (O, H)
    return du, dW


def masked(h: Tensor, mask: Tensor | None) -> Tensor:
    return h if mask is None else h * mask


def dropout_mask(ctx: Any, bits: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """k / q; None without dropout."""
    return None if bits is None else kept_bytes(ctx, bits).to(dtype) / ctx.q


def moves(*tangents: Tensor | None) -> bool:
    """Whether any of these is a tangent, not None."""
    return any(t is not None for t in tangents)
