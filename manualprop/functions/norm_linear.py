r"""Hand-derived rules of a normalisation followed by a linear layer.

Symbols
    x   input                        g        dL/dy, the gradient that arrives
    m   mean over a row              gm, gr   dL/dm and dL/dr: None, unless a second derivative is taken
    r   1 / sqrt(variance + eps)     P, v     g^T z and g W
    z   r (x - m), normalised        u        dL/dz
    n   w z + c, weighted            W, b     weight and bias of the linear layer; b may be None
    y   output                       w, c     weight and bias of the normalisation, each may be None
Shape legend
    N   batch: any number of leading axes            I   in_features, over which m is the mean
    O   out_features
The statistics are outputs of the rules, with derivatives of their own, as in :mod:`manualprop.functions.norm`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._rule import HALF, Rule, in_full_precision, plain_eager, times
from manualprop.functions.fused import linear_tangent
from manualprop.functions.linear import Linear, rows
from manualprop.functions.norm import (
    affine_tangent,
    input_slope,
    like,
    minus,
    plus,
    statistics,
    tangents,
    through_statistics,
)


class LayerNormLinear(Rule):
    r"""$y = n W^\top + b$ with $n = w z + c$ and $z = r (x - m)$, of which $x$, $m$ and $r$ are kept

    Derivation, with P = g^T z and v = g W
        dL/db_o  = sum_n g_no                                      :class:`Linear`, with n for x
        dL/dW_oi = sum_n g_no n_ni = P_oi w_i + db_o c_i           n = w z + c
        dL/dw_i  = sum_no g_no W_oi z_ni = sum_n v_ni z_ni         :class:`LayerNorm`, with v for g
        dL/dc_i  = sum_no g_no W_oi = sum_o db_o W_oi
        dL/dx_i  = r (u_i - c1 - z_i c2) + gm / I - gr r^2 z_i / I with u = v w
        c1 = sum_i v_i w_i / I,  c2 = sum_i v_i z_i w_i / I        so v z serves c2 and dw
        dz, dm, dr as :class:`LayerNorm`,  dn = w dz + z dw + dc   forward mode
        dy = dn W^T + n dW^T + db
    Second order
        m and r are outputs with derivatives of their own: autograd differentiates the formulas as written.
    Shape
        x (N, I), w and c (I,), W (O, I), b (O,) -> y (N, O), m and r (N, 1)
    Memory
        x, m and r: 4 bytes per element of x in float32.  The two layers one after the other keep n too: 8 bytes.
    Accuracy
        z is made of x, not of n: nothing is divided by w, which may be 0.  z enters both products in the precision
        of W.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, c: Tensor | None, W: Tensor, b: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m, r = torch.native_layer_norm(x, x.shape[-1:], w, c, eps)
        if m.dtype in HALF:
            m, r = statistics(x, (-1,), eps)
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
        z, column = normalised(x, m, r), r.reshape(-1, 1)
        g = arriving(g, z, W)
        dc, dW, db = linear_gradients(g, z, w, c, W, needs_c, needs_W, needs_b)
        dx = dw = None
        if needs_x or needs_w:
            v, vz = slopes(g, z, W)
            dw = None if w is None or not needs_w else vz.sum(0).to(w.dtype)  # (N, I) -> (I,)
        if needs_x:
            full_w = None if w is None else in_full_precision(w)
            c1, c2 = weighted_mean(v, full_w), weighted_mean(vz, full_w)  # (N, I) -> (N, 1)
            rest = through_statistics(gm, gr, z, column, z.shape[1])
            dx = times(minus(input_slope(v, full_w, z, c2), c1), column)
            dx = plus(dx, rest).to(x.dtype).view(x.shape)
        return dx, dw, dc, dW, db, None

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
        z = normalised(x, m, r)
        dz, dm, dr = tangents(like(z, dx), z, r.reshape(-1, 1), (1,))
        dy = weighted_tangent(x, z, None if dx is None else dz, w, c, W, dw, dc, dW, db)
        return dy, dm.view(m.shape), dr.view(r.shape)


class RMSNormLinear(Rule):
    r"""$y = n W^\top + b$ with $n = w z$ and $z = r x$, of which $x$ and $r$ are kept

    Derivation, as :class:`LayerNormLinear` without the mean
        dL/db_o  = sum_n g_no
        dL/dW_oi = P_oi w_i,  dL/dw_i = sum_n v_ni z_ni            P = g^T z,  v = g W
        dL/dx_i  = r (v_i w_i - z_i c2) - gr r^2 z_i / I           :class:`RMSNorm`, with v for g
        c2 = sum_i v_i z_i w_i / I
        dr = -r^2 mean(z dx),  dz = r (dx - z mean(z dx))          forward mode
        dn = w dz + z dw,  dy = dn W^T + n dW^T + db
    Second order
        r is an output with a derivative of its own: autograd differentiates the formulas as written.
    Shape
        x (N, I), w (I,), W (O, I), b (O,) -> y (N, O), r (N, 1)
    Memory
        x and r: 4 bytes per element of x in float32.  The two layers one after the other keep n too: 8 bytes;
        torch 12 on the CPU.
    Accuracy
        As :class:`LayerNormLinear`.
    """

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, W: Tensor, b: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        full_x = in_full_precision(x)
        r = (full_x.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = full_x * r
        n = n if w is None else times(n, in_full_precision(w))
        return F.linear(n.to(x.dtype).to(W.dtype), W, b), r  # (N, I) (I, O) + (O,) -> (N, O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, W, *_ = inputs
        ctx.save_for_backward(x, w, W, output[1])
        ctx.save_for_forward(x, w, W, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gr: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, W, r = ctx.saved_tensors
        needs_x, needs_w, needs_W, needs_b, _ = ctx.needs_input_grad
        z, column = normalised(x, None, r), r.reshape(-1, 1)
        g = arriving(g, z, W)
        _, dW, db = linear_gradients(g, z, w, None, W, False, needs_W, needs_b)
        dx = dw = None
        if needs_x or needs_w:
            v, vz = slopes(g, z, W)
            dw = None if w is None or not needs_w else vz.sum(0).to(w.dtype)  # (N, I) -> (I,)
        if needs_x:
            full_w = None if w is None else in_full_precision(w)
            c2 = weighted_mean(vz, full_w)  # (N, I) -> (N, 1)
            rest = through_statistics(None, gr, z, column, z.shape[1])
            dx = plus(times(input_slope(v, full_w, z, c2), column), rest).to(x.dtype).view(x.shape)
        return dx, dw, dW, db, None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dw: Tensor | None, dW: Tensor | None, db: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor]:
        x, w, W, r = ctx.saved_tensors
        z, column = normalised(x, None, r), r.reshape(-1, 1)
        full_dx = like(z, dx)
        mean_zdx = (z * full_dx).mean(1, keepdim=True)
        dz = None if dx is None else column * (full_dx - z * mean_zdx)
        dy = weighted_tangent(x, z, dz, w, None, W, dw, None, dW, db)
        return dy, (-column * column * mean_zdx).view(r.shape)


# ----- what the rules share -----


def normalised(x: Tensor, m: Tensor | None, r: Tensor) -> Tensor:
    """z (N, I), a fresh tensor in full precision."""
    x, column = rows(in_full_precision(x)), r.reshape(-1, 1)
    return x * column if m is None else times(x - m.reshape(-1, 1), column)


def arriving(g: Tensor | None, z: Tensor, W: Tensor) -> Tensor:
    """g (N, O) in the precision of W; absent, it is 0."""
    return z.new_zeros(z.shape[0], W.shape[0], dtype=W.dtype) if g is None else rows(g)


def slopes(g: Tensor, z: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """v = g W and v z, fresh tensors in full precision."""
    v = in_full_precision(Linear.input_gradient(g, W))  # (N, O) (O, I) -> (N, I)
    return v, v * z


def weighted_mean(a: Tensor, w: Tensor | None) -> Tensor:
    """sum_i a_ni w_i / I, (N, I) -> (N, 1)."""
    return a.mean(1, keepdim=True) if w is None else (a.matmul(w) / a.shape[1]).unsqueeze(1)


def linear_gradients(
    g: Tensor,
    z: Tensor,
    w: Tensor | None,
    c: Tensor | None,
    W: Tensor,
    needs_c: bool,
    needs_W: bool,
    needs_b: bool,
) -> tuple[Tensor | None, ...]:
    """dc, dW and db; None where they are not needed."""
    dc = dW = db = None
    if needs_b or needs_c or (needs_W and c is not None):
        db = Linear.bias_gradient(in_full_precision(g))  # (N, O) -> (O,)
    if db is not None and c is not None and needs_c:
        dc = db.matmul(in_full_precision(W)).to(c.dtype)  # (O,) (O, I) -> (I,)
    if needs_W:
        P = in_full_precision(Linear.weight_gradient(g, z.to(W.dtype)))  # (O, N) (N, I) -> (O, I)
        dW = P if w is None else times(P, in_full_precision(w))
        if db is not None and c is not None:
            recorded = torch.is_grad_enabled() or not plain_eager()
            add = torch.addcmul if recorded or is_legacy_batchedtensor(db) else Tensor.addcmul_
            dW = add(dW, db.unsqueeze(1), in_full_precision(c))  # (O, 1) (I,) -> (O, I)
        dW = dW.to(W.dtype)
    return dc, dW, None if db is None or not needs_b else db.to(W.dtype)


def weighted_tangent(
    x: Tensor,
    z: Tensor,
    dz: Tensor | None,
    w: Tensor | None,
    c: Tensor | None,
    W: Tensor,
    dw: Tensor | None,
    dc: Tensor | None,
    dW: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    """dy = dn W^T + n dW^T + db with n = w z + c and dn = w dz + z dw + dc."""
    w, c, dw, dc = (None if t is None else in_full_precision(t) for t in (w, c, dw, dc))
    n = z if w is None else z * w
    n = n if c is None else n + c
    dn = affine_tangent(z, dz, w, dw, dc)
    n = n.to(W.dtype).view(x.shape)
    return linear_tangent(n, W, None if dn is None else dn.to(W.dtype).view(x.shape), dW, db)
