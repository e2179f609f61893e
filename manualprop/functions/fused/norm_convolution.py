r"""Hand-derived rules of a batch norm, an activation and the convolution after it.

Symbols
    x   input                        g    dL/dy, the gradient that arrives
    m   mean over the batch          gh   dL/dh: None, unless something else uses h
    r   1 / sqrt(variance + eps)     gm, gr   dL/dm and dL/dr: None, unless a second derivative is taken
    z   r (x - m), normalised        dn, dh   dL/dn and dL/dh
    n   w z + c, weighted            W, b     kernel and bias of the convolution; b may be None
    h   f(n), the activation         w, c     weight and bias of the batch norm, each may be None
    y   output                       f        one of ``ACTIVATIONS``, f' its slope
Shape legend
    N   batch            C   channels of x           X   the sizes of all axes of x, y and W: X, Q, K
    O   channels of y    G   groups                  s, p, d   stride, padding and dilation
h is an output too, so that a skip connection may use it.  The statistics are outputs with their own derivatives,
as in :mod:`manualprop.functions.norm`.
"""

from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import _convolution as run
from manualprop.functions._execution import _normalisation as aten
from manualprop.functions._execution import formula, full
from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule
from manualprop.functions.convolution import (
    Convolution,
    bias_gradient,
    bias_tangent,
    correlation,
    sum_of,
    transposed,
)
from manualprop.functions.fused.mlp import activated, activated_and_through, moves, tangent
from manualprop.functions.norm import (
    affine,
    channels_backwards,
    channels_forwards,
    evaluation_gradients,
    evaluation_tangent,
    of_channels,
    shaped,
)

__all__ = ["BatchNormActivationConvolution", "BatchNormEvaluationActivationConvolution"]


class BatchNormActivationConvolution(Rule):
    r"""$y = W * h + b$ with $h = f(n)$, $n = w z + c$, $z = r (x - m)$, over the batch; $x$, $m$, $r$ are kept

    Derivation
        dL/db = sum g,  dL/dW = correlation(g, h)                  :class:`Convolution`, with h for x
        dh = transposed(g, W) + gh                                 h is used by the convolution, and outside
        dn = f'(n) dh                                              f is elementwise
        dx, dL/dw, dL/dc                                           :class:`BatchNorm`, with dn for g
        dm, dr, dn = w dz + z dw + dc                              forward mode of :class:`BatchNorm`,
        dh = f'(n) dn                                              of f,
        dy = convolution(dh, W) + convolution(h, dW) + db          and of :class:`Convolution`
    Second order
        m and r are outputs with their own derivatives, the convolutions and f' are rules: autograd differentiates
        the formulas as written.
    Running statistics
        As :class:`BatchNorm`: updated in place, once, in forward.
    Shape
        x (N, C, X), w and c (C,), W (O, C / G, K), b (O,) -> y (N, O, Q), h (N, C, X), m and r (C,)
    Memory
        x, m and r: 4 bytes per element of x in float32.  The three separate layers keep h too: 8 bytes.
    Accuracy
        Backward computes n from x, not from y: w may be 0, and f need not be invertible.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor | None,
        c: Tensor | None,
        W: Tensor,
        b: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        activation: str,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, m, r = aten.batch_norm(x, w, c, running_mean, running_var, momentum, eps)
        h = activated(activation, n)
        y = run.convolution(h.to(W.dtype), W, b, *options)  # (N, C, X), (O, C / G, K) -> (N, O, Q)
        return y, h, m, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, c, W, _, _, _, _, _, ctx.activation, *ctx.options, _ = inputs
        y, _, m, r = output
        keep_sizes(ctx, x, W, y)
        inner = any(ctx.needs_input_grad[:4])
        save(
            ctx, *[(t, inner) for t in (x, w, c)], (W, any(ctx.needs_input_grad[:3])), (m, inner), (r, inner)
        )

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, gh: Tensor | None, gm: Tensor | None, gr: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w, c, W, m, r = ctx.saved_tensors
        needs, others = ctx.needs_input_grad, len(ctx.needs_input_grad) - 5
        n = None if x is None else remade(x, m, r, w, c)
        dn, dW, db = convolution_gradients(ctx, g, gh, n, W)
        if dn is None:
            return None, None, None, dW, db, *[None] * others
        to = of_channels(x)
        rows, (m, r, gm, gr) = (
            (shaped(t, to.x) for t in (dn, x)),
            (shaped(t, to.stats) for t in (m, r, gm, gr)),
        )
        dx, dw, dc = channels_backwards(*rows, m, r, shaped(w, to.W), gm, gr, to.n, over=0, needs=needs[:3])
        dw, dc = (None if d is None else shaped(d, t.shape).to(t.dtype) for d, t in ((dw, w), (dc, c)))
        return shaped(dx, x.shape), dw, dc, dW, db, *[None] * others

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dw: Tensor | None,
        dc: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, ...]:
        x, w, c, W, m, r = ctx.saved_tensors
        to = of_channels(x)
        rows, stats = (shaped(t, to.x) for t in (dx, x)), (shaped(t, to.stats) for t in (m, r))
        moved = channels_forwards(*rows, *stats, *(shaped(t, to.W) for t in (w, dw, dc)), to.n)
        dn, dm, dr = (t.reshape(like.shape) for t, like in zip(moved, (x, m, r), strict=True))
        n = remade(x, m, r, w, c)
        dy, dh = convolution_tangent(ctx, n, dn if moves(dx, dw, dc) else None, W, dW, db)
        return dy, dh, dm, dr


class BatchNormEvaluationActivationConvolution(Rule):
    r"""$y = W * h + b$ with $h = f(n)$ and $n = w r (x - m) + c$; constant $m$, $r = (v + \epsilon)^{-1/2}$: evaluation

    Derivation
        As :class:`BatchNormActivationConvolution`, with :class:`BatchNormEvaluation` instead of :class:`BatchNorm`.
    Second order
        The convolutions and f' are rules, the rest is products and sums: autograd differentiates those as written.
    Shape
        x (N, C, X), w, c, m and v (C,), W (O, C / G, K), b (O,) -> y (N, O, Q), h (N, C, X)
    Memory
        x: 4 bytes per element in float32.  The three separate layers keep h too, and x if w needs a gradient.
    Accuracy
        As :class:`BatchNormActivationConvolution`.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor | None,
        c: Tensor | None,
        W: Tensor,
        b: Tensor | None,
        m: Tensor,
        v: Tensor,
        eps: float,
        activation: str,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        h = activated(activation, aten.evaluated(x, w, c, m, v, eps))
        return run.convolution(h.to(W.dtype), W, b, *options), h  # (N, C, X), (O, C / G, K) -> (N, O, Q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, c, W, _, m, v, ctx.eps, ctx.activation, *ctx.options, _ = inputs
        keep_sizes(ctx, x, W, output[0])
        inner = any(ctx.needs_input_grad[:4])
        save(
            ctx, *[(t, inner) for t in (x, w, c)], (W, any(ctx.needs_input_grad[:3])), (m, inner), (v, inner)
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, c, W, m, v = ctx.saved_tensors
        needs, others = ctx.needs_input_grad, len(ctx.needs_input_grad) - 5
        n = None if x is None else remade(x, m, scale(v, ctx.eps), w, c)
        dn, dW, db = convolution_gradients(ctx, g, gh, n, W)
        if dn is None:
            return None, None, None, dW, db, *[None] * others
        to = of_channels(x)
        rows, columns = (shaped(t, to.x) for t in (dn, x)), (shaped(t, to.W) for t in (w, m, v))
        dx, dw, dc = evaluation_gradients(*rows, *columns, ctx.eps, over=0, needs=needs[:3])
        dw, dc = (None if d is None else shaped(d, t.shape).to(t.dtype) for d, t in ((dw, w), (dc, c)))
        return shaped(dx, x.shape), dw, dc, dW, db, *[None] * others

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dw: Tensor | None,
        dc: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        *_: None,
    ) -> tuple[Tensor, Tensor]:
        x, w, c, W, m, v = ctx.saved_tensors
        to = of_channels(x)
        n, dn = remade(x, m, scale(v, ctx.eps), w, c), None
        if moves(dx, dw, dc):
            rows, columns = (shaped(t, to.x) for t in (dx, x)), (shaped(t, to.W) for t in (w, m, v, dw, dc))
            dn = evaluation_tangent(*rows, *columns, ctx.eps).reshape(x.shape)
        return convolution_tangent(ctx, n, dn, W, dW, db)


# ----- what the two share -----


def keep_sizes(ctx: Any, x: Tensor, W: Tensor, y: Tensor) -> None:
    ctx.X, ctx.K, ctx.Q, ctx.shape = x.shape[2:], W.shape[2:], y.shape[2:], y.shape


def convolution_gradients(
    ctx: Any, g: Tensor | None, gh: Tensor | None, n: Any, W: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dn, dW and db of y = convolution(h, W) + b with h = f(n); dn is a new tensor, and n None if none needs it."""
    needs_n, (needs_W, needs_b) = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3:5]
    h = dn = dW = db = dh = None
    if needs_n:
        if g is not None:
            dh = transposed(g, W, None, *ctx.options, ctx.X).to(n.dtype)  # (N, O, Q) -> (N, C, X)
        arriving = [d for d in (dh, gh) if d is not None] or [torch.zeros_like(n)]
        h, dn = activated_and_through(ctx.activation, sum_of(*arriving), n)
    if needs_W and g is not None:
        h = activated(ctx.activation, n) if h is None else h
        dW = correlation(g, h.to(g.dtype), *ctx.options, ctx.K)  # (N, O, Q), (N, C, X) -> (O, C / G, K)
    if needs_b and g is not None:
        db = bias_gradient(g)
    return dn, dW, db


def convolution_tangent(
    ctx: Any, n: Tensor, dn: Tensor | None, W: Tensor, dW: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dy and dh of y = convolution(h, W) + b with h = f(n)."""
    h = activated(ctx.activation, n)
    dh = None if dn is None else tangent(ctx.activation, dn, n, h)
    h = h.to(W.dtype)
    dy = sum_of(
        None if dh is None else Convolution.apply(dh.to(W.dtype), W, None, *ctx.options, ctx.Q),
        None if dW is None else Convolution.apply(h, dW, None, *ctx.options, ctx.Q),
        None if db is None else bias_tangent(db, ctx.shape),
    )
    return dy, n.new_zeros(n.shape) if dh is None else dh


def scale(v: Tensor, eps: float) -> Tensor:
    """r, for half precision in float32."""
    return (full(v) + eps).rsqrt()


@aten.in_one_pass
def remade(x: Tensor, m: Tensor, r: Tensor, w: Tensor | None, c: Tensor | None) -> Tensor:
    """n = w r (x - m) + c"""
    to = of_channels(x)
    rows = (shaped(x, to.x), shaped(m, to.stats), shaped(r, to.stats), shaped(w, to.W), shaped(c, to.W))
    n: Tensor = shaped(remade_channels(*rows), x.shape)
    return n


remade_channels = formula("x (B, C, L), m (1, C, 1), r (1, C, 1), w (C, 1), c (C, 1) -> n like x")(affine)
