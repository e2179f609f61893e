r"""Hand-derived rules of a linear layer and the cross-entropy of its logits in one: the logits are never whole in memory.

Shape legend
    N   rows, the batch        D   in_features        C   classes
    n   the rows of a chunk    K   positions with a loss of their own; without the axis, one
Symbols
    z   x W^T + b, the logits                     g, ga   dL/dl and dL/da, the gradients that arrive
    p   softmax(z), over the classes              v, h    gradients of gradients, named where they arise
    a   log sum_c exp z_c, in float64             u       a tangent of z
    t   class indices, or a probability of each   w       class weights, may be None
    m   the mass that the target puts on a class, and M = sum_c m_c, as in cross_entropy.py:
        m_c = (1 - e) w_t 1[c = t] + (e / C) w_c  for indices, with label smoothing e; all 0 for an ignored one
        m_c = ((1 - e) t_c + e / C) w_c           for probabilities
    Of a chunk, what belongs to a row is (n, 1) or (n, 1, K).
Half precision
    Logits are rounded as the linear layer's output would be, unless the gradient is made in the forward pass; all that
    follows is in float32, sums over chunks too.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._execution import formula, full, recorded, watched
from manualprop.functions._execution._chunks import logits_in_chunks, without_autocast
from manualprop.functions._execution._classes import classwise, counting, weights, where_counted
from manualprop.functions._execution._once import once
from manualprop.functions._execution._products import add_weight_gradient
from manualprop.functions._rule import Rule
from manualprop.functions.cross_entropy import (
    Mass,
    any_mass,
    mass_of_index,
    mass_of_probabilities,
    mass_tangent,
    spread,
    target_gradient,
)
from manualprop.functions.linear import Linear
from manualprop.functions.softmax import dot

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyOnce"]

Tangent = Tensor | None


def of_mass(legend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function of z, of the mass of a target t (M) with weights w and smoothing e, and of others as a formula."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def by(mass: Callable[..., Mass]) -> Callable[..., Any]:
            def of_target(z: Tensor, t: Tensor, w: Tensor | None, *others: Any) -> Any:
                *tensors, e, a = others
                return function(z, mass(t, w, e, a), *tensors)

            return of_target

        of_index = classwise(legend.replace("(M)", "(T)"))(by(mass_of_index))
        of_probabilities = classwise(legend.replace("(M)", "(X)"))(by(mass_of_probabilities))

        def run(z: Tensor, t: Tensor, w: Tensor | None, *others: Any, **options: Any) -> Any:
            either = of_probabilities if t.is_floating_point() else of_index
            return either(z, t, weights(w, z), *others, **options)

        return run

    return marked


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
        ignored: int,
        e: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        t, counted = targets(t, ignored)
        losses, logs = [], []
        for n, z in chunks(x, W, b, rows, t):
            l, top, S = loss(z, t[n], w, e, spread(e, z), over=0)
            losses.append(l)
            logs.append(top.double() + S.double().log())
        l, a = torch.cat(losses), torch.cat(logs)
        return where_counted(l, counted).squeeze(1), a.squeeze(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignored, ctx.e, ctx.rows = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, ga: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, b, t, w, a = ctx.saved_tensors
        t, counted = targets(t, ctx.ignored)
        g, ga = (None if d is None else d.unsqueeze(1) for d in (g, ga))
        g = torch.zeros_like(ga, dtype=full(x[:0]).dtype) if g is None and ga is not None else g
        assert g is not None  # autograd calls this only with a gradient
        g = where_counted(g, counted)  # infinite where a mean is over ignored targets alone
        *needs, needs_t = ctx.needs_input_grad[:4]
        found: list[Tangent] = [None] * 8
        if any(needs):
            inputs = g, ga, x, W, b, t, w, a.unsqueeze(1), ctx.e, ctx.rows, *needs
            distribute(gradients(*inputs), needs, found)
        if needs_t:
            parts = [
                target_gradient(z, g[n], t[n], weights(w, z), ctx.e)
                for n, z in chunks(x, W, b, ctx.rows, t, g)
            ]
            found[3] = torch.cat(parts)
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, dx: Tangent, dW: Tangent, db: Tangent, dt: Tangent, *_: None) -> tuple[Tensor, Tensor]:
        x, W, b, t, w, a = ctx.saved_tensors
        t, counted = targets(t, ctx.ignored)
        moves = any(d is not None for d in (dx, dW, db))
        dl, da = [], []
        for n, z in chunks(x, W, b, ctx.rows, t):
            u = logits_tangent(z, x[n], W, None if dx is None else dx[n], dW, db) if moves else None
            change, pu = tangents(z, t[n], w, u, ctx.e, spread(ctx.e, z))
            if dt is not None:
                change = change - dot(
                    torch.log_softmax(z, 1), mass_tangent(full(dt[n]), weights(w, z), ctx.e), 1
                )
            dl.append(change)
            da.append(pu)
        l = torch.cat(dl)
        l = where_counted(l, counted)
        return l.squeeze(1), torch.cat(da).to(a.dtype).squeeze(1)


@of_mass("z (X), t (M), w (W) -> l (T), top (T), S (T)")
def loss(z: Tensor, mass: Mass) -> tuple[Tensor, Tensor, Tensor]:
    """l, the largest logit, and S = sum_c exp y_c, where y = z less the largest."""
    top = z.amax(1, keepdim=True)
    y = z - top
    if mass.t is None:  # -<m, log p>, as M log S - <m, y> may be infinity less infinity
        S = torch.exp(y).sum(1, keepdim=True)
        return -mass.along(y - S.log()), top, S
    my = mass.along(y)
    S = torch.exp(y).sum(1, keepdim=True)
    return mass.M * S.log() - my, top, S


@of_mass("z (X), t (M), w (W), u (X) -> dl (T), da (T)")
def tangents(z: Tensor, mass: Mass, u: Tangent) -> tuple[Tensor, Tensor]:
    """<M p - m, u> and <p, u>"""
    p = torch.softmax(z, 1)
    if u is None:
        return (torch.zeros_like(p[:, :1]),) * 2
    return dot(mass.excess(p), u, 1), dot(p, u, 1)


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
        e: float,
        rows: int,
        *needs: bool,
    ) -> tuple[Tensor, ...]:
        sums = Sums(W, needs)
        ga, rounded = like(ga, g), like(a, g)
        correction = like((rounded - a).exp(), g)  # exp(z - a) = exp(z - rounded) exp(rounded - a)
        for n, z in chunks(x, W, b, rows, g, ga, t):
            others = g[n], None if ga is None else ga[n], rounded[n], correction[n]
            s = logits_gradient(z, t[n], w, *others, e, spread(e, z), over=0)
            sums.add(s, x[n])
        return sums.found(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.e, ctx.rows = inputs[:10]
        ctx.needs = inputs[10:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *v: Tangent) -> tuple[Tangent, ...]:
        g, ga, x, W, b, t, w = ctx.saved_tensors
        vx, vW, vb = distribute(v, ctx.needs, [None] * 3)
        needs_g, needs_ga, *needs, needs_t = ctx.needs_input_grad[:6]
        through_z, through_u = Sums(W, needs), Sums(vW, (needs[0], needs[1], False))
        full_ga = like(ga, g)
        dg, dga, dt = [], [], []
        for n, z in chunks(x, W, b, ctx.rows, g, ga, t, *v):
            vx_n = None if vx is None else vx[n]
            u = logits_tangent(z, x[n], W, vx_n, vW, vb)
            others = g[n], None if full_ga is None else full_ga[n], u, ctx.e, spread(ctx.e, z)
            dg_n, pu, h, s = curvatures(z, t[n], w, *others)
            dg.append(dg_n)
            dga.append(pu)
            through_z.add(h, x[n])
            through_u.add(s, vx_n)
            if needs_t:
                dt.append(mass_tangent(g[n] * (pu - u), weights(w, z), ctx.e))
        found: list[Tangent] = [None] * 13
        found[0] = torch.cat(dg) if needs_g else None
        found[1] = like(torch.cat(dga), ga) if needs_ga and ga is not None else None
        found[2:5] = [plus(c, d) for c, d in zip(through_z.all(x.dtype), through_u.all(x.dtype), strict=True)]
        found[5] = like(torch.cat(dt), t) if needs_t else None
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *d: Tangent) -> tuple[Tensor, ...]:
        g, ga, x, W, b, t, w = ctx.saved_tensors
        dg, dga, dx, dW, db, dt = d[:6]
        along_s, along_factors = Sums(W, ctx.needs), Sums(dW, (*ctx.needs[:2], False))
        ga, dga = like(ga, g), like(dga, g)
        for n, z in chunks(x, W, b, ctx.rows, t):
            dx_n = None if dx is None else dx[n]
            u = logits_tangent(z, x[n], W, dx_n, dW, db)
            dm = None if dt is None else mass_tangent(full(dt[n]), weights(w, z), ctx.e)
            others = (None if d is None else d[n] for d in (g, ga, dg, dga))
            ds, s = gradient_tangents(z, t[n], w, *others, u, dm, ctx.e, spread(ctx.e, z))
            along_s.add(ds, x[n])
            along_factors.add(s, dx_n)
        sides = zip(along_s.all(x.dtype), along_factors.all(x.dtype), strict=True)
        return tuple(d for d in (plus(c, d) for c, d in sides) if d is not None)


gradients = recorded(LinearCrossEntropyGradient.apply, LinearCrossEntropyGradient.forward)


@of_mass("z (X), t (M), w (W), g (T), ga (T), top (T), correction (T) -> s like z")
def logits_gradient(
    z: Tensor, mass: Mass, g: Tensor, ga: Tensor | None, top: Tensor, correction: Tensor
) -> Tensor:
    """s = q p - g m with q = g M + ga, and p = exp(z - a)"""
    return mass.scaled(g, ga).excess(torch.exp(z - top) * correction)


@of_mass("z (X), t (M), w (W), g (T), ga (T), u (X) -> dg (T), dga (T), h like z, s like z")
def curvatures(
    z: Tensor, mass: Mass, g: Tensor, ga: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dg = <M p - m, u>, dL/dga = <p, u>, h = q p (u - <p, u>) and s"""
    p, scaled = torch.softmax(z, 1), mass.scaled(g, ga)
    pu = dot(p, u, 1)
    return dot(mass.excess(p), u, 1), pu, scaled.M * p * (u - pu), scaled.excess(p)


@of_mass("z (X), t (M), w (W), g (T), ga (T), dg (T), dga (T), u (X), dm (X) -> ds like z, s like z")
def gradient_tangents(
    z: Tensor, mass: Mass, g: Tensor, ga: Tangent, dg: Tangent, dga: Tangent, u: Tensor, dm: Tangent
) -> tuple[Tensor, Tensor]:
    """ds = q p (u - <p, u>) + dg (M p - m) + dga p + g (dM p - dm), and s"""
    p, scaled = torch.softmax(z, 1), mass.scaled(g, ga)
    ds = scaled.M * p * (u - dot(p, u, 1))
    ds = ds if dg is None else ds + dg * mass.excess(p)
    ds = ds if dga is None else ds + dga * p
    return ds if dm is None else ds + g * any_mass(dm).excess(p), scaled.excess(p)


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
        ignored: int,
        e: float,
        rows: int,
        T: Tensor | None,
        *needs: bool,
    ) -> tuple[Tensor, ...]:
        dtype = x.dtype
        x, W, b = full(x), full(W), None if b is None else full(b)
        t, counted = targets(t, ignored)
        g = x.new_ones(len(t), 1, *t.shape[2:])
        g = where_counted(g, counted)
        sums, losses = Sums(W, needs), []
        for n, z in chunks(x, W, b, rows, t):
            l, s = loss_and_gradient(z, t[n], w, g[n], e, spread(e, z), over=0)
            losses.append(l)
            sums.add(s, x[n])
        l = torch.cat(losses)
        y = where_counted(l, counted).sum()
        return y if T is None else y / like(T, y), *sums.found(dtype, y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.needs = inputs[0].dtype, inputs[9:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[8], *output[1:])

    @staticmethod
    @once(
        "linear_cross_entropy: a gradient that is made in the forward pass serves one backward pass, of the first "
        "order. Got {}. Leave out options, or give LinearCrossEntropyOptions(allow_retain_graph=True): the logits "
        "are then computed again in backward.".format
    )
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        T, *found = ctx.saved_tensors
        if T is not None:
            g = (g / T).where(T != 0, 0)  # 0 where all targets are ignored, and so are the gradients
        scaled = tuple(product(d, g, over=0).to(ctx.dtype) for d in found)
        return tuple(distribute(scaled, ctx.needs, [None] * 12))


@of_mass("z (X), t (M), w (W), g (T) -> l (T), s like z")
def loss_and_gradient(z: Tensor, mass: Mass, g: Tensor) -> tuple[Tensor, Tensor]:
    """l and g (M p - m)"""
    y = z - z.amax(1, keepdim=True)
    if mass.t is None:
        log_p = y - torch.exp(y).sum(1, keepdim=True).log()
        return -mass.along(log_p), mass.scaled(g).excess(torch.exp(log_p))
    my, exp_y = mass.along(y), torch.exp(y)
    S = exp_y.sum(1, keepdim=True)
    return mass.M * S.log() - my, mass.scaled(g).excess(exp_y / S)


@formula("d (N, D), g () -> p like d")
def product(d: Tensor, g: Tensor) -> Tensor:
    """d g"""
    return d * g


# ----- a chunk of rows -----


def targets(t: Tensor, ignored: int) -> tuple[Tensor, Tensor | None]:
    """The target, class indices with an axis for the classes and 0 for an ignored one; and which count, None for all."""
    return (t, None) if t.is_floating_point() else counting(t.unsqueeze(1), ignored)


def chunks(
    x: Tensor, W: Tensor, b: Tensor | None, rows: int, *others: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows and its logits z (n, C) or (n, C, K)."""
    for n, z in logits_in_chunks(x, flat_weight(W), None if b is None else b.reshape(-1), rows, *others):
        yield n, z if W.dim() == 2 else z.unflatten(1, W.shape[:2])


def logits_tangent(z: Tensor, x: Tensor, W: Tensor, dx: Tangent, dW: Tangent, db: Tangent) -> Tensor:
    """u = dx W^T + x dW^T + db, shaped as z (n, C)."""
    terms = (
        None if dx is None else full(F.linear(dx, flat_weight(W))),
        None if dW is None else full(F.linear(x, flat_weight(dW))),
        None if db is None else full(db.reshape(-1)),
    )
    total: Tangent = functools.reduce(plus, terms)
    return torch.zeros_like(z) if total is None else total.expand(z.shape[0], -1).reshape(z.shape)


def flat_weight(W: Tensor) -> Tensor:
    """One row for each logit: (C, K, D) -> (C K, D)."""
    return W if W.dim() == 2 else W.reshape(-1, W.shape[-1])


def like(a: Any, b: Tensor) -> Any:
    """``a`` in the precision of ``b``, if there is an a."""
    return None if a is None else a.to(b.dtype)


# ----- over all chunks -----


class Sums:
    """dx = s W, dW = s^T x and db = sum_n s_n, gathered chunk by chunk; dW and db in full precision."""

    def __init__(self, W: Tensor | None, needs: Any) -> None:
        self._W, (self._needs_x, self._needs_W, self._needs_b) = W, needs
        self._dx: list[Tensor] = []
        self._dW: Tangent = None
        self._db: Tangent = None
        self._shape = torch.Size()

    def add(self, s: Tensor, x: Tensor | None) -> None:
        """One more chunk: s (n, C) or (n, C, K), and x (n, D), without which nothing is added to dW."""
        shape = s.shape[1:]
        s = s.reshape(s.shape[0], shape.numel())
        with without_autocast(s):
            if self._needs_x and self._W is not None:
                W = flat_weight(self._W)
                self._dx.append(like(s, W).matmul(W))  # (n, C) (C, D) -> (n, D)
            if self._needs_W and x is not None:
                self._shape = torch.Size((*shape, x.shape[-1]))
                self._add_to_dW(s, full(x))
            if self._needs_b:
                self._db = plus(self._db, Linear.bias_gradient(s).reshape(shape))  # (n, C) -> (C,)

    def _add_to_dW(self, s: Tensor, x: Tensor) -> None:
        if self._dW is None or watched((self._dW, s, x)):
            self._dW = plus(self._dW, Linear.weight_gradient(s, x))
        else:
            add_weight_gradient(self._dW, s.t(), x, 1.0)  # (C, n) (n, D) -> (C, D)

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
