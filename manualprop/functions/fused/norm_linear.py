r"""Hand-derived rules of a normalisation followed by a linear layer.

Symbols
    x   input                        g        dL/dy, the gradient that arrives
    m   mean over a row              gm, gr   dL/dm and dL/dr: None, unless a second derivative is taken
    r   1 / sqrt(variance + eps)     dn       dL/dn
    z   r (x - m), normalised
    n   w z + c, weighted            W, b     weight and bias of the linear layer; b may be None
    y   output                       w, c     weight and bias of the normalisation, each may be None
Shape legend
    N   batch: any number of leading axes            I   in_features, over which m is the mean
    O   out_features
The statistics are outputs of the rules, with their own derivatives, as in :mod:`manualprop.functions.norm`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._execution import _normalisation as aten
from manualprop.functions._execution import formula
from manualprop.functions._rule import Rule
from manualprop.functions.fused.mlp import moves
from manualprop.functions.linear import Linear, linear_tangent, rows
from manualprop.functions.norm import affine, rows_backwards, rows_forwards, shaped

__all__ = ["LayerNormLinear", "RMSNormLinear"]


class LayerNormLinear(Rule):
    r"""$y = n W^\top + b$ with $n = w z + c$ and $z = r (x - m)$; $x$, $m$ and $r$ are kept

    Derivation
        dL/db = sum_n g_n,  dL/dW = g^T n,  dn = g W               :class:`Linear`, with n for x
        dx, dL/dw, dL/dc                                           :class:`LayerNorm`, with dn for g
        dm, dr, dn = w dz + z dw + dc                              forward mode of :class:`LayerNorm`
        dy = dn W^T + n dW^T + db                                  and of :class:`Linear`
    Second order
        m and r are outputs with their own derivatives: autograd differentiates the formulas as written.
    Shape
        x (N, I), w and c (I,), W (O, I), b (O,) -> y (N, O), m and r (N, 1)
    Memory
        x, m and r: 4 bytes per element of x in float32.  The two separate layers keep n too: 8 bytes.
    Accuracy
        Backward computes n from x, without a division by w: w may be 0.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, c: Tensor | None, W: Tensor, b: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m, r = aten.layer_norm(x, x.shape[-1:], w, c, eps)
        return F.linear(n.to(W.dtype), W, b), m, r  # (N, I) (I, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w, c, W, *_ = inputs
        ctx.save_for_backward(x, w, c, W, *output[1:])
        ctx.save_for_forward(x, w, c, W, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, gm: Tensor | None, gr: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w, c, W, m, r = ctx.saved_tensors
        needs_x, needs_w, needs_c, needs_W, needs_b, _ = ctx.needs_input_grad
        I, N = x.shape[-1], r.numel()
        x_rows, (m, r, gm, gr) = shaped(x, (N, I)), (shaped(t, (N, 1)) for t in (m, r, gm, gr))
        g = x.new_zeros(N, W.shape[0], dtype=W.dtype) if g is None else rows(g)
        dW = Linear.weight_gradient(g, remade(x_rows, m, r, w, c).to(W.dtype)) if needs_W else None
        db = Linear.bias_gradient(g) if needs_b else None
        dn = Linear.input_gradient(g, W).to(x.dtype)  # (N, O) (O, I) -> (N, I)
        needs = (needs_x, needs_w, needs_c)
        dx, dw, dc = rows_backwards(dn, x_rows, m, r, w, gm, gr, I or 1, needs=needs)
        dw, dc = (None if d is None else shaped(d, t.shape).to(t.dtype) for d, t in ((dw, w), (dc, c)))
        return shaped(dx, x.shape), dw, dc, dW, db, None

    @staticmethod
    def jvp(
        ctx: Any,
        dx: Tensor | None,
        dw: Tensor | None,
        dc: Tensor | None,
        dW: Tensor | None,
        db: Tensor | None,
        _: None,
    ) -> tuple[Tensor, ...]:
        x, w, c, W, m, r = ctx.saved_tensors
        I, N = x.shape[-1], r.numel()
        dx, x_rows = shaped(dx, (N, I)), shaped(x, (N, I))
        m_rows, r_rows = shaped(m, (N, 1)), shaped(r, (N, 1))
        dn, dm, dr = rows_forwards(dx, x_rows, m_rows, r_rows, w, dw, dc, I or 1)
        n = remade(x_rows, m_rows, r_rows, w, c)
        n, dn = (t.to(W.dtype).view(x.shape) for t in (n, dn))
        dy = linear_tangent(n, W, dn if moves(dx, dw, dc) else None, dW, db)
        return dy, dm.view(m.shape), dr.view(r.shape)


class RMSNormLinear(Rule):
    r"""$y = n W^\top + b$ with $n = w z$ and $z = r x$; $x$ and $r$ are kept

    Derivation
        As :class:`LayerNormLinear`, with :class:`RMSNorm` instead of :class:`LayerNorm`.
    Second order
        r is an output with its own derivative: autograd differentiates the formulas as written.
    Shape
        x (N, I), w (I,), W (O, I), b (O,) -> y (N, O), r (N, 1)
    Memory
        x and r: 4 bytes per element of x in float32.  The two separate layers keep n too: 8 bytes;
        torch 12 on the CPU.
    Accuracy
        As :class:`LayerNormLinear`.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, W: Tensor, b: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        n, r = aten.rms_norm(x, 1, w, eps)
        return F.linear(n.to(W.dtype), W, b), r  # (N, I) (I, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, W, *_ = inputs
        ctx.save_for_backward(x, w, W, output[1])
        ctx.save_for_forward(x, w, W, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gr: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, W, r = ctx.saved_tensors
        needs_x, needs_w, needs_W, needs_b, _ = ctx.needs_input_grad
        I, N = x.shape[-1], r.numel()
        x_rows, r, gr = shaped(x, (N, I)), shaped(r, (N, 1)), shaped(gr, (N, 1))
        g = x.new_zeros(N, W.shape[0], dtype=W.dtype) if g is None else rows(g)
        dW = Linear.weight_gradient(g, remade(x_rows, None, r, w, None).to(W.dtype)) if needs_W else None
        db = Linear.bias_gradient(g) if needs_b else None
        dn = Linear.input_gradient(g, W).to(x.dtype)  # (N, O) (O, I) -> (N, I)
        needs = (needs_x, needs_w, False)
        dx, dw, _ = rows_backwards(dn, x_rows, None, r, w, None, gr, I or 1, needs=needs)
        return shaped(dx, x.shape), None if dw is None else shaped(dw, w.shape).to(w.dtype), dW, db, None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, dW: Tensor | None, db: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor]:
        x, w, W, r = ctx.saved_tensors
        I, N = x.shape[-1], r.numel()
        dx, x_rows, r_rows = shaped(dx, (N, I)), shaped(x, (N, I)), shaped(r, (N, 1))
        dn, _, dr = rows_forwards(dx, x_rows, None, r_rows, w, dw, None, I or 1)
        n = remade(x_rows, None, r_rows, w, None)
        n, dn = (t.to(W.dtype).view(x.shape) for t in (n, dn))
        return linear_tangent(n, W, dn if moves(dx, dw) else None, dW, db), dr.view(r.shape)


remade = formula("x (N, D), m (N, 1), r (N, 1), w (D), c (D) -> n like x")(affine)
