r"""Hand-derived rules of a linear layer and the cross-entropy of its logits in one: the logits are never whole in memory.

Shape legend
    N   rows, the batch        D   in_features        C   classes
    n   the rows of a chunk    K   positions with a loss of their own; without the axis, one
Symbols
    z   x W^T + b, the logits                     g, ga   dL/dl and dL/da, the gradients that arrive
    p   softmax(z), over the classes              v, h    gradients of gradients, named where they arise
    a   log sum_c exp z_c, in float64             u       a tangent of z
    t   class indices, or a probability of each   w       class weights, may be None
    m   the mass that the target puts on a class, and M = sum_c m_c:
        m_c = (1 - e) w_t 1[c = t] + (e / C) w_c  for indices, with label smoothing e; all 0 for an ignored one
        m_c = ((1 - e) t_c + e / C) w_c           for probabilities
Half precision
    Logits are rounded as the linear layer's output would be, unless the gradient is made in the forward pass; all that
    follows is in float32, sums over chunks too.
"""

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from manualprop.functions._kernels import class_and_weight, target_mass
from manualprop.functions._rule import (
    Rule,
    full_dtype,
    in_full_precision,
    plain_eager,
    times,
    transforms_active,
)
from manualprop.functions.linear import Linear

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyOnce"]

CACHED = 2**18  # float32 numbers that an elementwise step finds in the cache again when it is done with them

Tangent = Tensor | None


class LinearCrossEntropy(Rule):
    r"""$l = -\sum_c m_c \log p_c$ with $p = \operatorname{softmax}(z)$ and $z = x W^\top + b$, a chunk of rows at a time

    Derivation
        l = M a - <m, z>                                           since log p_c = z_c - a
        da/dz_k = exp(z_k) / sum_c exp(z_c) = p_k                  logarithm and chain rule
        dl/dz_k = M p_k - m_k                                      as in :class:`CrossEntropy`
        dL/dz = g (M p - m) + ga p = q p - g m                     with q = g M + ga
        dL/dx = dL/dz W,  dL/dW = (dL/dz)^T x,  dL/db = sum_n dL/dz_n,  as in :class:`Linear`
        dL/dt_c = -g log p_c (1 - e) w_c                           for probabilities
        dz = dx W^T + x dW^T + db                                  forward mode: product rule
        dl = <M p - m, dz> - <log p, dm>,  da = <p, dz>
        A row of z depends on no other row of x: a chunk is computed forth, and again, and back, and forgotten.
        From a, p = exp(z - a) at once.
    Second order
        :class:`LinearCrossEntropyGradient`, by hand, a chunk at a time too.
    Shape
        x (N, D), W (C, D), b (C,) or None, t (N,) or (N, C), w (C,) or None -> l and a (N,)
        x (N, D), W (C, K, D), b (C, K) or None, t (N, K) or (N, C, K), w (C,) or None -> l and a (N, K)
    Memory
        x, W, b, t, w and a: N float64 of its own. While it runs a chunk of n C logits, and in backward dW.
    Accuracy
        That of the composition: the largest logit is taken off before exp, in forward; in backward a, which float64
        holds to the last digit of z.  dW and db are summed over the chunks in float32 or wider.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        t: Tensor,
        w: Tensor | None,
        ignore_index: int,
        e: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        in_place = may_overwrite(x, W, t)
        losses, logs = [], []
        for chunk, z in chunks(x, W, b, rows, in_place):
            for n, y in blocks(chunk, z, in_place):
                l, top, S = loss_of(y, t[n], w, ignore_index, e, in_place)[:3]
                losses.append(l)
                logs.append(top.double() + S.double().log())
        return torch.cat(losses), torch.cat(logs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignore_index, ctx.e, ctx.rows = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, ga: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, b, t, w, a = ctx.saved_tensors
        g = ga.new_zeros(a.shape, dtype=full_dtype(x)) if g is None and ga is not None else g
        assert g is not None  # autograd calls this only with a gradient
        *needs, needs_t = ctx.needs_input_grad[:4]
        found: list[Tensor | None] = [None] * 8
        if not t.is_floating_point():
            g = g.where(t.ne(ctx.ignore_index), 0)  # infinite where a mean is over ignored targets alone
        if any(needs):
            recorded = torch.is_grad_enabled() or transforms_active()
            gradient = LinearCrossEntropyGradient.apply if recorded else LinearCrossEntropyGradient.forward
            inputs = g, ga, x, W, b, t, w, a, ctx.ignore_index, ctx.e, ctx.rows, *needs
            distribute(gradient(*inputs), needs, found)
        if needs_t:
            found[3] = LinearCrossEntropy.target_gradient(g, x, W, b, t, w, ctx.e, ctx.rows)
        return tuple(found)

    @staticmethod
    def target_gradient(
        g: Tensor, x: Tensor, W: Tensor, b: Tensor | None, t: Tensor, w: Tensor | None, e: float, rows: int
    ) -> Tensor:
        """dL/dt of class probabilities: as large as t itself, hence as the logits."""
        parts = [
            of_probability(-g[n].unsqueeze(1) * torch.log_softmax(z, 1), w, e)
            for n, z in chunks(x, W, b, rows)
        ]
        return torch.cat(parts).to(t.dtype)

    @staticmethod
    def jvp(ctx: Any, dx: Tangent, dW: Tangent, db: Tangent, dt: Tangent, *_: None) -> tuple[Tensor, Tensor]:
        x, W, b, t, w, a = ctx.saved_tensors
        dl, da = [], []
        for n, z in chunks(x, W, b, ctx.rows):
            p, m, M = distributions(z, t[n], w, ctx.ignore_index, ctx.e)
            u = logits_tangent(z, x[n], W, None if dx is None else dx[n], dW, db)
            pu = (p * u).sum(1)
            moves = any(d is not None for d in (dx, dW, db))
            change = M * pu - (m * u).sum(1) if moves else torch.zeros_like(pu)
            if dt is not None:
                dm = of_probability(in_full_precision(dt[n]), w, ctx.e)
                change = change - (torch.log_softmax(z, 1) * dm).sum(1)
            dl.append(change)
            da.append(pu)
        return torch.cat(dl), torch.cat(da).to(a.dtype)


class LinearCrossEntropyGradient(Rule):
    r"""$(dx, dW, db)$ of :class:`LinearCrossEntropy`, those of them that are needed, themselves differentiated

    With s = q p - g m and q = g M + ga, it is dx = s W, dW = s^T x and db = sum_n s_n.

    Derivation, for the gradients vx, vW and vb that arrive
        <vx, dx> + <vW, dW> + <vb, db> = <s, u>  with  u = vx W^T + x vW^T + vb
        dL/dq = <p, u>,  hence  dL/dg = M <p, u> - <m, u>  and  dL/dga = <p, u>
        dL/dz_j = sum_k u_k q p_k (1[j = k] - p_j) = q p_j (u_j - <p, u>) = h_j        the Jacobian of softmax
        dL/dx = h W + s vW                                         through z, and through u
        dL/dW = h^T x + s^T vx,  dL/db = sum_n h_n
        dL/dm_c = g (<p, u> - u_c),  dL/dt_c = (1 - e) w_c dL/dm_c for probabilities
        ds = dq p + q p (dz - <p, dz>) - dg m - g dm               forward mode, dq = dg M + g dM + dga
        d(dx) = ds W + s dW,  d(dW) = ds^T x + s^T dx,  d(db) = sum_n ds_n
    Memory
        g, ga, x, W, b, t and w.  Each chunk is forgotten before the next, unless a third derivative is recorded:
        that keeps the logits of them all.
    """

    @staticmethod
    def forward(
        g: Tensor,
        ga: Tensor | None,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        t: Tensor,
        w: Tensor | None,
        a: Tensor,
        ignore_index: int,
        e: float,
        rows: int,
        *needs: bool,
    ) -> tuple[Tensor, ...]:
        in_place = may_overwrite(g, x, W, t) and (ga is None or may_overwrite(ga))
        sums = Sums(W, needs, in_place)
        rounded = a.to(full_dtype(x))
        correction = (rounded - a).exp().to(rounded.dtype)  # exp(z - a) = exp(z - rounded) exp(rounded - a)
        for chunk, z in chunks(x, W, b, rows, in_place):
            for n, y in blocks(chunk, z, in_place):
                top, M = rounded[n].unsqueeze(1), total_mass(y, t[n], w, ignore_index, e)
                p = (y.sub_(top) if in_place else y - top).exp_()
                q = mass_of_softmax(g, ga, M, n)
                s = times(p, (q * correction[n]).unsqueeze(1))
                s = less_mass(s, g[n], t[n], w, ignore_index, e, in_place)
            sums.add(z if in_place else s, x[chunk])
        return sums.found(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.ignore_index, ctx.e, ctx.rows = inputs[:11]
        ctx.needs = inputs[11:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *v: Tangent) -> tuple[Tensor | None, ...]:
        g, ga, x, W, b, t, w = ctx.saved_tensors
        vx, vW, vb = distribute(v, ctx.needs, [None] * 3)
        needs_g, needs_ga, *needs, needs_t = ctx.needs_input_grad[:6]
        through_z = Sums(W, needs)
        through_u = Sums(vW, (needs[0], needs[1], False))
        dg, dga, dt = [], [], []
        for n, z in chunks(x, W, b, ctx.rows):
            p, m, M = distributions(z, t[n], w, ctx.ignore_index, ctx.e)
            q = mass_of_softmax(g, ga, M, n)
            vx_n = None if vx is None else vx[n]
            u = logits_tangent(z, x[n], W, vx_n, vW, vb)
            pu = (p * u).sum(1)
            dg.append(M * pu - (m * u).sum(1))
            dga.append(pu)
            through_z.add(q.unsqueeze(1) * p * (u - pu.unsqueeze(1)), x[n])
            through_u.add(q.unsqueeze(1) * p - g[n].unsqueeze(1) * m, vx_n)
            if needs_t:
                dt.append(of_probability(g[n].unsqueeze(1) * (pu.unsqueeze(1) - u), w, ctx.e))
        found: list[Tensor | None] = [None] * 14
        found[0] = torch.cat(dg).to(g.dtype) if needs_g else None
        found[1] = torch.cat(dga).to(ga.dtype) if needs_ga and ga is not None else None
        found[2:5] = [plus(c, d) for c, d in zip(through_z.all(x.dtype), through_u.all(x.dtype), strict=True)]
        found[5] = torch.cat(dt).to(t.dtype) if needs_t else None
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tangent) -> tuple[Tensor, ...]:
        g, ga, x, W, b, t, w = ctx.saved_tensors
        dg, dga, dx, dW, db, dt = tangents[:6]
        along_s = Sums(W, ctx.needs)
        along_factors = Sums(dW, (*ctx.needs[:2], False))
        for n, z in chunks(x, W, b, ctx.rows):
            p, m, M = distributions(z, t[n], w, ctx.ignore_index, ctx.e)
            q = mass_of_softmax(g, ga, M, n)
            dx_n = None if dx is None else dx[n]
            u = logits_tangent(z, x[n], W, dx_n, dW, db)
            ds = q.unsqueeze(1) * p * (u - (p * u).sum(1, keepdim=True))
            if dg is not None:
                ds = ds + dg[n].unsqueeze(1) * (M.unsqueeze(1) * p - m)
            if dga is not None:
                ds = ds + dga[n].unsqueeze(1).to(p.dtype) * p
            if dt is not None:
                dm = of_probability(in_full_precision(dt[n]), w, ctx.e)
                ds = ds + g[n].unsqueeze(1) * (dm.sum(1, keepdim=True) * p - dm)
            along_s.add(ds, x[n])
            along_factors.add(q.unsqueeze(1) * p - g[n].unsqueeze(1) * m, dx_n)
        sides = zip(along_s.all(x.dtype), along_factors.all(x.dtype), strict=True)
        return tuple(d for d in (plus(c, d) for c, d in sides) if d is not None)


class LinearCrossEntropyOnce(Rule):
    r"""$y = \frac1T \sum_n l_n$ with $l$ of :class:`LinearCrossEntropy`, its gradient made in the forward pass

    Derivation, with g = dL/dy
        dL/dl_n = g / T is the same for all rows: but for this factor, what the logits of a chunk give is known at once,
        s = M p - m,  dx = s W,  dW = s^T x,  db = sum_n s_n       as in :class:`LinearCrossEntropy`
        Backward multiplies these by g / T, in place: three products of matrices where it takes four, and one use.
    Second order
        None: it raises, and so does a second backward pass.
    Shape
        As :class:`LinearCrossEntropy`; T () or None for 1 -> y (), dx (N, D), dW (C, D), db (C,)
    Memory
        dx, and dW and db in float32 or wider; while it runs, x and W in float32.
    Accuracy
        As :class:`LinearCrossEntropy`, but that half precision is lifted before the products, as torch does with options:
        logits and their gradients are never rounded to it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        t: Tensor,
        w: Tensor | None,
        ignore_index: int,
        e: float,
        rows: int,
        T: Tensor | None,
        *needs: bool,
    ) -> tuple[Tensor, ...]:
        in_place, dtype = may_overwrite(x, W, t), x.dtype
        x, W, b = in_full_precision(x), in_full_precision(W), None if b is None else in_full_precision(b)
        sums, losses = Sums(W, needs, in_place), []
        for chunk, z in chunks(x, W, b, rows, in_place):
            for n, y in blocks(chunk, z, in_place):
                l, _, S, exp_y, M = loss_of(y, t[n], w, ignore_index, e, in_place)
                losses.append(l)
                s = times(exp_y, (M / S).unsqueeze(1))
                s = less_mass(s, counted(M, t[n], ignore_index), t[n], w, ignore_index, e, in_place)
            sums.add(z if in_place else s, x[chunk])
        y = torch.cat(losses).sum()
        return y if T is None else y / T.to(y.dtype), *sums.found(dtype, y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.needs, ctx.used = inputs[0].dtype, inputs[9:], False
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[8], *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.used or torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy: a gradient that is made in the forward pass serves one backward pass, of the first "
                f"order. Got {'a second pass' if ctx.used else 'create_graph=True'}. Leave out options, or give "
                "LinearCrossEntropyOptions(allow_retain_graph=True): the logits are then computed again in backward."
            )
        ctx.used = True
        T, *found = ctx.saved_tensors
        if T is not None:
            g = (g / T).where(T != 0, 0)  # 0 where all targets are ignored, and so are the gradients
        scaled = tuple(times(d, g).to(ctx.dtype) for d in found)
        return tuple(distribute(scaled, ctx.needs, [None] * 12))


# ----- a chunk of rows -----


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether ordinary tensors are computed with, and nobody records or batches it: chunks may share their memory."""
    return (
        plain_eager()
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and all(type(t) in (Tensor, torch.nn.Parameter) and not is_legacy_batchedtensor(t) for t in tensors)
    )


def chunks(
    x: Tensor, W: Tensor, b: Tensor | None, rows: int, in_place: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows and its logits z (n, C) or (n, C, K), in full precision; in place, the next overwrites them."""
    N, W2, b2 = x.shape[0], flat_weight(W), None if b is None else b.reshape(-1)
    room = None
    if in_place:  # fresh memory costs a page fault every 4 KB, a tenth of the time
        room = x.new_empty(min(rows, N), W2.shape[0], dtype=full_dtype(x))
    for begin in range(0, max(N, 1), rows):
        n = slice(begin, min(begin + rows, N))
        z = logits(x[n], W2, b2, None if room is None else room[: n.stop - n.start])
        yield n, z if W.dim() == 2 else z.unflatten(1, W.shape[:2])


def logits(x: Tensor, W: Tensor, b: Tensor | None, room: Tensor | None) -> Tensor:
    """x W^T + b, (n, D) (D, C) + (C,) -> (n, C)."""
    if room is None or room.dtype != x.dtype:
        z = F.linear(x, W, b)
        return in_full_precision(z) if room is None else room.copy_(z)
    return torch.mm(x, W.t(), out=room) if b is None else torch.addmm(b, x, W.t(), out=room)


def blocks(chunk: slice, z: Tensor, in_place: bool) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a chunk that fit the cache, so that the elementwise steps on each find it there; else the whole."""
    count = z.shape[0]
    size = max(1, CACHED // max(z.shape[1:].numel(), 1)) if in_place else max(count, 1)
    for begin in range(0, max(count, 1), size):
        end = min(begin + size, count)
        yield slice(chunk.start + begin, chunk.start + end), z[begin:end]


def loss_of(
    z: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float, in_place: bool
) -> tuple[Tensor, ...]:
    """l, the largest logit, S = sum_c exp y_c, exp y and M, where y = z less the largest; in place, z becomes exp y."""
    top = z.amax(1, keepdim=True)
    y = z.sub_(top) if in_place else z - top
    my, M = mass_along(y, t, w, ignore_index, e), total_mass(y, t, w, ignore_index, e)
    exp_y = y.exp_() if in_place else y.exp()
    S = exp_y.sum(1)
    l = M * S.log() - my
    if not t.is_floating_point():
        l = l.where(t.ne(ignore_index), 0)  # whatever its logits are
    return l, top.squeeze(1), S, exp_y, M


def mass_along(y: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
    """<m, y>: (n, C) -> (n,)"""
    if t.is_floating_point():
        return (probability_mass(t, w, e).to(y.dtype) * y).sum(1)
    on_target = -F.nll_loss(y, t, w if w is None else w.to(y.dtype), None, ignore_index, None, "none")
    if e == 0:
        return on_target
    spread = (y if w is None else y * along_classes(w, y)).sum(1)
    return (1 - e) * on_target + e / y.shape[1] * spread * counted(spread, t, ignore_index)


def total_mass(y: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
    """M = sum_c m_c: (n,)"""
    if t.is_floating_point():
        return probability_mass(t, w, e).to(y.dtype).sum(1)
    weight = class_and_weight(y, t, None if w is None else w.to(y.dtype), ignore_index)[1].squeeze(1)
    if e == 0:
        return weight
    spread: Tensor | int = y.shape[1] if w is None else w.to(y.dtype).sum()
    return (1 - e) * weight + e / y.shape[1] * spread * counted(weight, t, ignore_index)


def mass_of_softmax(g: Tensor, ga: Tensor | None, M: Tensor, n: slice) -> Tensor:
    """q = g M + ga of some rows."""
    return g[n] * M if ga is None else g[n] * M + ga[n].to(M.dtype)


def counted(like: Tensor, t: Tensor, ignore_index: int) -> Tensor:
    """1 for each row that counts, 0 for an ignored one."""
    return torch.ones_like(like) if t.is_floating_point() else t.ne(ignore_index).to(like.dtype)


def less_mass(
    qp: Tensor, g: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float, in_place: bool
) -> Tensor:
    """q p - g m, written into q p if ``in_place``; g is 0 for an ignored target."""
    if t.is_floating_point():
        m = probability_mass(t, w, e).to(qp.dtype)
        return qp.addcmul_(g.unsqueeze(1), m, value=-1) if in_place else qp - g.unsqueeze(1) * m
    index, weight = class_and_weight(qp, t, None if w is None else w.to(qp.dtype), ignore_index)
    gm = g.unsqueeze(1) * weight * (e - 1)  # (n, 1)
    if e != 0:
        share = e / qp.shape[1] * (qp.new_ones(qp.shape[1]) if w is None else w.to(qp.dtype))
        share = along_classes(share, qp)
        qp = qp.addcmul_(g.unsqueeze(1), share, value=-1) if in_place else qp - g.unsqueeze(1) * share
    return qp.scatter_add_(1, index, gm) if in_place else qp.scatter_add(1, index, gm)


def distributions(
    z: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float
) -> tuple[Tensor, Tensor, Tensor]:
    """p and m, (n, C), and M (n,), as functions of z and t that autograd may record."""
    if t.is_floating_point():
        m = probability_mass(t, w, e).to(z.dtype)
    else:
        m = target_mass(z, t, w, ignore_index, e)
    return torch.softmax(z, 1), m, m.sum(1)


def probability_mass(t: Tensor, w: Tensor | None, e: float) -> Tensor:
    """m of class probabilities t."""
    m = in_full_precision(t)
    if e != 0:
        m = m * (1 - e) + e / t.shape[1]
    return m if w is None else m * along_classes(in_full_precision(w), t)


def of_probability(dm: Tensor, w: Tensor | None, e: float) -> Tensor:
    """dm/dt applied: (1 - e) w_c to what belongs to class c."""
    dm = dm if e == 0 else dm * (1 - e)
    return dm if w is None else dm * along_classes(w.to(dm.dtype), dm)


def along_classes(w: Tensor, z: Tensor) -> Tensor:
    """``w`` (C,) so that it broadcasts over ``z`` (n, C) or (n, C, K)."""
    return w if z.dim() == 2 else w.unsqueeze(-1)


def logits_tangent(z: Tensor, x: Tensor, W: Tensor, dx: Tangent, dW: Tangent, db: Tangent) -> Tensor:
    """u = dx W^T + x dW^T + db, shaped as z (n, C)."""
    terms = (
        None if dx is None else F.linear(dx, flat_weight(W)),
        None if dW is None else F.linear(x, flat_weight(dW)),
        None if db is None else db.reshape(-1),
    )
    total: Tangent = functools.reduce(plus, (None if d is None else in_full_precision(d) for d in terms))
    if total is None:
        return torch.zeros_like(z)
    return total.expand(z.shape[0], -1).reshape(z.shape)


def flat_weight(W: Tensor) -> Tensor:
    """One row for each logit: (C, K, D) -> (C K, D)."""
    return W if W.dim() == 2 else W.reshape(-1, W.shape[-1])


# ----- over all chunks -----


class Sums:
    """dx = s W, dW = s^T x and db = sum_n s_n, gathered chunk by chunk; dW and db in full precision."""

    def __init__(self, W: Tensor | None, needs: Any, in_place: bool = False) -> None:
        self._W, (self._needs_x, self._needs_W, self._needs_b), self._in_place = W, needs, in_place
        self._dx: list[Tensor] = []
        self._dW: Tangent = None
        self._db: Tangent = None
        self._shape = torch.Size()

    def add(self, s: Tensor, x: Tensor | None) -> None:
        """One more chunk: s (n, C) or (n, C, K), and x (n, D), without which nothing is added to dW."""
        shape = s.shape[1:]
        s = s.reshape(s.shape[0], shape.numel())
        with _without_autocast(s):
            if self._needs_x and self._W is not None:
                W = flat_weight(self._W)
                self._dx.append(s.to(W.dtype).matmul(W))  # (n, C) (C, D) -> (n, D)
            if self._needs_W and x is not None:
                self._shape = torch.Size((*shape, x.shape[-1]))
                x = in_full_precision(x)
                if self._dW is not None and self._in_place:
                    Linear.add_weight_gradient(self._dW, s.t(), x, 1.0)  # (C, n) (n, D) -> (C, D)
                else:
                    self._dW = plus(self._dW, Linear.weight_gradient(s, x))
            if self._needs_b:
                self._db = plus(self._db, Linear.bias_gradient(s).reshape(shape))  # (n, C) -> (C,)

    def all(
        self, dtype: torch.dtype, sums_dtype: torch.dtype | None = None
    ) -> tuple[Tangent, Tangent, Tangent]:
        """dx, dW and db, None where not needed, or made of nothing; the sums over rows may have a dtype of their own."""
        dx = torch.cat(self._dx).to(dtype) if self._dx else None
        dW = None if self._dW is None else self._dW.reshape(self._shape).to(sums_dtype or dtype)
        return dx, dW, None if self._db is None else self._db.to(sums_dtype or dtype)

    def found(self, dtype: torch.dtype, sums_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Those of dx, dW and db that are needed."""
        return tuple(d for d in self.all(dtype, sums_dtype) if d is not None)


def plus(a: Tangent, b: Tangent) -> Tangent:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def distribute(found: tuple[Tangent, ...], needs: Any, into: list[Tangent]) -> list[Tangent]:
    """``into``, with those of ``found`` at the places that are needed."""
    rest = iter(found)
    for i, needed in enumerate(needs):
        if needed:
            into[i] = next(rest)
    return into


def _without_autocast(t: Tensor) -> Any:
    """Sums are in full precision, in an autocast region too."""
    device = t.device.type
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
