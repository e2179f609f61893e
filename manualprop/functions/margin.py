r"""Hand-derived rules of the margin losses, which are 0 where a prediction is right by a margin.

One value for each element or each example; reductions are in :mod:`manualprop.functional`.

Symbols
    x   prediction                    m   margin
    t   target, label or class        g   dL/dl, the gradient that arrives
    l   loss, before reduction        z   by how much the margin is missed
    i, j run over the C classes       1[...]   1 where the condition holds, else 0
"""

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise_loss import Curvature, ElementwiseLoss
from manualprop.functions._execution import (
    chosen,
    formula,
    indicator,
    of_class,
    weight_of,
)
from manualprop.functions._execution._classes import in_rows, kernel, lifted, longest
from manualprop.functions._rule import Rule, flat
from manualprop.functions.norm import shaped
from manualprop.functions.softmax import dot

__all__ = [
    "CosineEmbedding",
    "HingeEmbedding",
    "MarginRanking",
    "MultiLabelMargin",
    "MultiMargin",
    "PairwiseDistance",
    "SoftMargin",
    "TripletMargin",
]


class HingeEmbedding(ElementwiseLoss):
    r"""$l = x$ for a label $t = 1$, and $\max(m - x, 0)$ for $t = -1$

    Derivation
        dl/dx = 1                    for t = 1                     linear
              = -1[x <= m]           for t = -1                    piecewise linear
              = 1[t /= -1] - 1[t /= 1] 1[x <= m]                   the two in one; any other label is both
    Kinks
        -1 at x = m for t = -1, as in PyTorch.
    Second order
        By hand: 0.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        Exact.
    """

    partials = ("output_gradient", None)
    chooses = True

    @staticmethod
    def f(x: Tensor, t: Tensor, m: float) -> Tensor:
        return F.hinge_embedding_loss(x, t, margin=m, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, m: float) -> Tensor:
        t = t.to(x.dtype)
        missed = indicator(x <= m, x) * indicator(t != 1, t)
        return indicator(t != -1, t) - missed

    @staticmethod
    def curvature(x: Tensor, t: Tensor, m: float) -> Curvature:
        return ((0,),)


class SoftMargin(ElementwiseLoss):
    r"""$l = \log(1 + e^{-t x})$, with a label $t$ of 1 or -1

    Derivation, with s = 1 / (1 + e^{t x})
        dl/dx = -t e^{-t x} / (1 + e^{-t x}) = -t s                chain rule
        dl/dt = -x s                                               by symmetry
        d2l/dx2 = t^2 s (1 - s)                                    since ds/d(t x) = -s (1 - s)
        d2l/dxdt = t x s (1 - s) - s                               product rule
        d2l/dt2 = x^2 s (1 - s)
    Second order
        By hand, as above.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        l = -log sigmoid(t x) never overflows; torch's is inf, and its derivative NaN, for -t x > 88 in float32.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return 0 - F.logsigmoid(x * t)  # 0, and not -0, where it vanishes

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return -t * torch.sigmoid(-x * t)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return SoftMargin.output_gradient(t, x)

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        s = torch.sigmoid(-x * t)
        bend = s * (1 - s)
        xt = t * x * bend - s
        return (t**2 * bend, xt), (xt, x**2 * bend)


class MarginRanking(ElementwiseLoss):
    r"""$l = \max(z, 0)$ with $z = m + t (b - a)$: for $t = 1$, $a$ should exceed $b$ by the margin

    Derivation
        dl/da = -t 1[z >= 0]                                       piecewise linear
        dl/db =  t 1[z >= 0]
        dl/dt = (b - a) 1[z >= 0]
    Kinks
        1[z >= 0] = 1 at z = 0, as in PyTorch.
    Second order
        By hand: d2l/dadt = -1[z >= 0] = -d2l/dbdt, all else 0.
    Shape
        a, b, t and l alike
    Memory
        a, b and t, alive outside anyway.
    Accuracy
        Exact.
    """

    partials = ("output_gradient", "other_gradient", "target_gradient")
    chooses = True

    @staticmethod
    def f(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        return (m + t * (b - a)).clamp_min(0)

    @staticmethod
    def output_gradient(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        return -t * MarginRanking.missed(a, b, t, m)

    @staticmethod
    def other_gradient(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        """dl/db."""
        return t * MarginRanking.missed(a, b, t, m)

    @staticmethod
    def target_gradient(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        return (b - a) * MarginRanking.missed(a, b, t, m)

    @staticmethod
    def curvature(a: Tensor, b: Tensor, t: Tensor, m: float) -> Curvature:
        k = MarginRanking.missed(a, b, t, m)
        return (0, 0, -k), (0, 0, k), (-k, k, 0)

    @staticmethod
    def missed(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        """1[z >= 0]."""
        z = m + t * (b - a)
        return indicator(z >= 0, z)


class TripletMargin(ElementwiseLoss):
    r"""$l = \max(z, 0)$ with $z = m + p - \min(n, n')$, from the distances between anchor, positive and negative

    p is the distance from the anchor to the positive example, n that to the negative one, n' that between the
    two examples; the loss without n' (``swap=False``) is that of n' = n.

    Derivation
        dl/dp = 1[z >= 0]                                          piecewise linear
        dl/dn = -1[z >= 0] (1[n < n'] + 1[n = n'] / 2)
        dl/dn' by exchange of n and n'
    Kinks
        1[z >= 0] = 1 at z = 0, and equal distances share the slope, as in PyTorch.
    Second order
        By hand: 0.
    Shape
        p, n, n' and l alike
    Memory
        The distances, one number for each example.
    Accuracy
        Exact.
    Reference
        Balntas et al., 2016, http://www.bmva.org/bmvc/2016/papers/paper119/index.html
    """

    partials = ("positive_gradient", "negative_gradient", "swapped_gradient")
    chooses = True

    @staticmethod
    def f(p: Tensor, n: Tensor, n2: Tensor, m: float) -> Tensor:
        return (m + p - torch.minimum(n, n2)).clamp_min(0)

    @staticmethod
    def positive_gradient(p: Tensor, n: Tensor, n2: Tensor, m: float) -> Tensor:
        """dl/dp."""
        z = m + p - torch.minimum(n, n2)
        return indicator(z >= 0, z)

    @staticmethod
    def negative_gradient(p: Tensor, n: Tensor, n2: Tensor, m: float) -> Tensor:
        """dl/dn."""
        nearer = (indicator(n < n2, n) + indicator(n <= n2, n)) / 2
        return -nearer * TripletMargin.positive_gradient(p, n, n2, m)

    @staticmethod
    def swapped_gradient(p: Tensor, n: Tensor, n2: Tensor, m: float) -> Tensor:
        """dl/dn'."""
        return TripletMargin.negative_gradient(p, n2, n, m)

    @staticmethod
    def curvature(p: Tensor, n: Tensor, n2: Tensor, m: float) -> Curvature:
        return (0, 0, 0), (0, 0, 0), (0, 0, 0)


class PairwiseDistance(Rule):
    r"""$y = \lVert d \rVert_p = (\sum_k |d_k|^p)^{1/p}$ with $d = a - b + \epsilon$

    Derivation
        dy/dd_k = sign(d_k) (|d_k| / y)^{p - 1}                    chain and power rule
                = d_k / y                    for p = 2
                = sign(d_k) 1[|d_k| = y] / (their number)   for p = inf, the limit
                = 0                          for p = 0, a count
        dL/da = g dy/dd = -dL/db                                   chain rule
        dy = <dy/dd, da - db>                                      forward mode
    Kinks
        0 where d_k = 0, and everywhere where d = 0, as in PyTorch.
    Second order
        dL/da is a product of powers of d and of y, whose derivative is this rule again: autograd differentiates
        it as written.
    Shape
        a, b (..., D) -> y (...)
    Memory
        a, b and y; torch keeps d as well.
    Accuracy
        That of the sum over D.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, p: float, eps: float) -> Tensor:
        return distance(a, b, p, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: Tensor) -> None:
        a, b, *ctx.p = inputs
        ctx.save_for_backward(a, b, output)
        ctx.save_for_forward(a, b, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, y = ctx.saved_tensors
        whole, each = (y.numel(), a.shape[-1:].numel()), (y.numel(), 1)
        da, db = distance_gradients(
            shaped(a, whole),
            shaped(b, whole),
            y.reshape(each),
            g.reshape(each),
            *ctx.p,
            needs=ctx.needs_input_grad[:2],
        )
        return shaped(da, a.shape), shaped(db, b.shape), None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor:
        a, b, y = ctx.saved_tensors
        whole, each = (y.numel(), a.shape[-1:].numel()), (y.numel(), 1)
        a, b, da, db = (shaped(v, whole) for v in (a, b, da, db))
        dy: Tensor = distance_tangent(a, b, y.reshape(each), da, db, *ctx.p)
        return dy.reshape(y.shape)


distance = lifted(F.pairwise_distance)


def distance_slope(d: Tensor, y: Tensor, p: float) -> Tensor:
    """dy/dd"""
    if p == 0:
        return flat(torch.zeros_like(d), d)
    if p == inf:
        largest = indicator(d.abs() == y, d)
        return d.sign() * largest / largest.sum(1, keepdim=True)
    y = y.where(y != 0, 1)  # d is 0 there
    if p == 2:
        return d / y
    r = d.abs().where(d != 0, 1)  # sign(d) is 0 there, and r ** (p - 1) must not be infinite
    return d.sign() * (r / y) ** (p - 1)


@formula("a (N, D), b (N, D), y (N, 1), g (N, 1) -> da like a, db like b")
def distance_gradients(
    a: Tensor, b: Tensor, y: Tensor, g: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """g dy/dd and -g dy/dd"""
    gd = g * distance_slope(a - b + eps, y, p)
    return gd, -gd


@formula("a (N, D), b (N, D), y (N, 1), da (N, D), db (N, D) -> dy (N, 1)")
def distance_tangent(
    a: Tensor, b: Tensor, y: Tensor, da: Tensor | None, db: Tensor | None, p: float, eps: float
) -> Tensor:
    """<dy/dd, da - db>"""
    slope = distance_slope(a - b + eps, y, p)
    dy = torch.zeros_like(y) if da is None else dot(slope, da, 1)
    return dy if db is None else dy - dot(slope, db, 1)


COSINE_EPS = 1e-12


class CosineEmbedding(Rule):
    r"""$l = 1 - c$ for a label $t = 1$, and $\max(c - m, 0)$ for $t = -1$, with $c = \cos(a, b)$

    c = <a, b> / sqrt(A B) with A = <a, a> + eps, B = <b, b> + eps, eps = 1e-12.

    Derivation
        dc/da = b / sqrt(A B) - <a, b> a / (A sqrt(A B))           quotient rule: dA/da = 2 a
              = b / sqrt(A B) - c a / A
        dl/dc = -1[t = 1] + 1[t = -1] 1[c >= m]                    piecewise linear
        dl/da = p b - q a,  dl/db = p a - q' b                     chain rule; dl/db by exchange of a and b
        p = dl/dc / sqrt(A B),  q = c dl/dc / A,  q' = c dl/dc / B
        dL/da = g dl/da,  dL/db = g dl/db
        dl = dl/dc (<dc/da, da> + <dc/db, db>)                     forward mode
    Kinks
        dl/dc = 1 at c = m for t = -1, as in PyTorch.
    Second order
        dL/da is a product of g and plain functions of a and b: autograd differentiates it as written.
    Shape
        a, b (N, D) and t (N,) -> l (N,);  a, b (D,) and t () -> l ()
    Memory
        a, b and t; torch keeps the norms and the cosine too.
    Accuracy
        dc/da cancels where a and b are parallel; the absolute error stays within eps / |a|.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
        return cosine_loss(a, b, t, m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        a, b, t, ctx.m = inputs
        ctx.save_for_backward(a, b, t)
        ctx.save_for_forward(a, b, t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, t = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:2])
        if a.dim() == 2:
            return *cosine_gradients(a, b, g, t, ctx.m, needs=needs), None, None
        one = (v.unsqueeze(0) for v in (a, b, g, t))
        da, db = cosine_gradients(*one, ctx.m, needs=needs)
        return shaped(da, a.shape), shaped(db, b.shape), None, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: None) -> Tensor:
        a, b, t = ctx.saved_tensors
        one = (None if v is None else v.reshape(-1, a.shape[-1]) for v in (a, b, da, db))
        dl: Tensor = cosine_tangent(*one, t.reshape(-1), ctx.m)
        return dl.reshape(t.shape)


@lifted
def cosine_loss(a: Tensor, b: Tensor, t: Tensor, m: float) -> Tensor:
    """l"""
    return F.cosine_embedding_loss(a, b, t, m, reduction="none")


def cosine_weights(a: Tensor, b: Tensor, g: Tensor, t: Tensor, m: float) -> tuple[Tensor, Tensor, Tensor]:
    """g p, g q and g q', one number for each example: dl/da = p b - q a and dl/db = p a - q' b."""
    # Sums as in ATen's forward, so that a compiler takes them from there.
    A, B = ((v * v).sum(1) + COSINE_EPS for v in (a, b))
    root = (A * B).sqrt()
    c = (a * b).sum(1) / root
    # g dl/dc: 0 where dl/dc is, whatever g is
    dc = g.where((t == -1) & (c >= m), 0) - g.where(t == 1, 0)
    p, q, q2 = dc / root, dc * c / A, dc * c / B
    return p.unsqueeze(1), q.unsqueeze(1), q2.unsqueeze(1)


@formula("a (N, D), b (N, D), g (N), t (N) -> da like a, db like b")
def cosine_gradients(a: Tensor, b: Tensor, g: Tensor, t: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """g (p b - q a) and g (p a - q' b)"""
    p, q, q2 = cosine_weights(a, b, g, t, m)
    return p * b - q * a, p * a - q2 * b


@formula("a (N, D), b (N, D), da (N, D), db (N, D), t (N) -> dl (N, 1)")
def cosine_tangent(a: Tensor, b: Tensor, da: Tensor | None, db: Tensor | None, t: Tensor, m: float) -> Tensor:
    """<p b - q a, da> + <p a - q' b, db>"""
    p, q, q2 = cosine_weights(a, b, torch.ones_like(a[:, 0]), t, m)
    dl = torch.zeros_like(p) if da is None else dot(p * b - q * a, da, 1)
    return dl if db is None else dl + dot(p * a - q2 * b, db, 1)


class MultiMargin(Rule):
    r"""$l = \frac{w_t}{C} \sum_{i \ne t} \max(z_i, 0)^p$ with $z_i = m - x_t + x_i$ and $p$ = 1 or 2

    w are class weights (1 without).

    Derivation
        h_i = d max(z_i, 0)^p / dz_i = 1[z_i > 0]    for p = 1     piecewise linear
                                     = 2 max(z_i, 0) for p = 2     power and chain rule
        dl/dx_i = w_t h_i / C           for i /= t                 dz_i/dx_i = 1
        dl/dx_t = -w_t / C sum_{i /= t} h_i                        dz_i/dx_t = -1
        dl = <dl/dx, dx>                                           forward mode
    Kinks
        0 where z_i = 0, as in PyTorch.
    Second order
        dL/dx is a product of g and h(x): autograd differentiates it as written; torch has no second order here.
    Shape
        x (N, C) and t (N,) -> l (N,);  x (C,) and t () or (1,) -> l like t
    Memory
        x, t and w.
    Accuracy
        That of the sums over C.
    Reference
        Crammer and Singer, 2001, https://www.jmlr.org/papers/v2/crammer01a.html
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, p: int, m: float, w: Tensor | None) -> Tensor:
        return multi_margin(x, t, p, m, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, ctx.order, ctx.m, w = inputs
        ctx.save_for_backward(x, t, w)
        ctx.save_for_forward(x, t, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        z, g, t = in_rows(x, g, t)
        dx = multi_margin_gradient(z, g, t, w, ctx.order, ctx.m, z.shape[1])
        return shaped(dx, x.shape), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx  # class weights are constants, as in PyTorch
        (z, index), (dx,) = in_rows(x, t), in_rows(dx)
        dl: Tensor = multi_margin_tangent(z, dx, index, w, ctx.order, ctx.m, z.shape[1])
        return dl.reshape(t.shape)


@kernel(lambda x, t, p, m, w: F.multi_margin_loss(x, t, p, m, w, reduction="none"))
def multi_margin(x: Tensor, t: Tensor, p: int, m: float, w: Tensor | None) -> Tensor:
    """w_t / C sum_{i /= t} max(z_i, 0)^p"""
    x, index = in_rows(x, t)
    z = missed(x, index, m)
    h = chosen(indicator(z > 0, z), z) ** p
    l = h.scatter(1, index, 0).sum(1, keepdim=True) / x.shape[1]
    return (weight_of(w, index) * l).reshape(t.shape)


def missed(x: Tensor, t: Tensor, m: float) -> Tensor:
    """z"""
    return (m - of_class(x, t)) + x


def multi_margin_slope(x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, p: int, m: float, C: int) -> Tensor:
    """g dl/dx = g w_t / C (h - 1[i = t] sum_i h_i), with h_t = 0"""
    z = missed(x, t, m)
    k = indicator(z.detach() > 0, z)  # 0 for NaN, as in PyTorch
    h = flat(k, z) if p == 1 else 2 * chosen(k, z)
    h = h.scatter(1, t, 0)
    h = h.scatter(1, t, -h.sum(1, keepdim=True))
    return weight_of(w, t) * g / C * h


@formula("x (N, C), g (N, 1), t (N, 1), w (C) -> dx like x")
def multi_margin_gradient(
    x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, p: int, m: float, C: int
) -> Tensor:
    """g dl/dx"""
    return multi_margin_slope(x, g, t, w, p, m, C)


@formula("x (N, C), dx (N, C), t (N, 1), w (C) -> dl (N, 1)")
def multi_margin_tangent(
    x: Tensor, dx: Tensor, t: Tensor, w: Tensor | None, p: int, m: float, C: int
) -> Tensor:
    """<dl/dx, dx>"""
    return dot(multi_margin_slope(x, torch.ones_like(x[:, :1]), t, w, p, m, C), dx, 1)


class MultiLabelMargin(Rule):
    r"""$l = \frac1C \sum_{j \in T} \sum_{i \notin T} \max(z_{ij}, 0)$ with $z_{ij} = 1 - x_j + x_i$

    T holds the target classes of the example: the leading entries of t, up to the first -1.

    Derivation
        dl/dx_i =  1/C #{j in T:     z_ij > 0}      for i not in T  piecewise linear, dz_ij/dx_i = 1
        dl/dx_j = -1/C #{i not in T: z_ij > 0}      for j in T      dz_ij/dx_j = -1
        z_ij > 0 where x_i > b_j with b_j = x_j - 1: both numbers follow from the rank of x_i among the b
        dl = <dl/dx, dx>                                           forward mode
    Kinks
        0 where z_ij = 0, as in PyTorch.
    Second order
        dL/dx is linear in g and piecewise constant in x: autograd differentiates the product with g;
        torch has no second order here.
    Shape
        x and t (N, C) -> l (N,);  (C,) -> ()
    Memory
        x and t.
    Accuracy
        Exact.  The counts take C log C steps, the pairs of T and the rest up to C^2.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor) -> Tensor:
        return label_margin(x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, t = ctx.saved_tensors
        (z, g), (t,) = in_rows(x, g), in_rows(t)
        dx = label_margin_gradient(z, g, *target_classes(t), z.shape[1])
        return shaped(dx, x.shape), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        x, t = ctx.saved_tensors
        (z,), (dx,), (t,) = in_rows(x), in_rows(dx), in_rows(t)
        dl: Tensor = label_margin_tangent(z, dx, *target_classes(t), z.shape[1])
        return dl.reshape(x.shape[:-1])


@kernel(lambda x, t: F.multilabel_margin_loss(x, t, reduction="none"))
def label_margin(x: Tensor, t: Tensor) -> Tensor:
    """1 / C sum_{j in T} sum_{i not in T} max(z_ij, 0)"""
    index, leading = target_classes(t)
    z = 1 - x.gather(-1, index).unsqueeze(-1) + x.unsqueeze(-2)  # (N, j, i)
    counted = leading.unsqueeze(-1) & ~member(x, index, leading).unsqueeze(-2)
    return z.clamp(min=0).where(counted, 0).sum((-2, -1)) / x.shape[-1]


def target_classes(t: Tensor) -> tuple[Tensor, Tensor]:
    """t, 0 from its first -1 on; and whether an entry stands before that."""
    leading = (t >= 0).cumprod(-1).bool()
    K = longest(leading)  # most examples have a few of all classes
    leading = leading[..., :K]
    return t[..., :K].where(leading, 0), leading


def member(x: Tensor, index: Tensor, leading: Tensor) -> Tensor:
    """Whether a class is in T."""
    return torch.zeros_like(x).scatter_add(-1, index, indicator(leading, x)) > 0


def label_margin_slope(x: Tensor, index: Tensor, leading: Tensor, C: int) -> Tensor:
    """dl/dx"""
    # b_j of every target entry, else +inf: nothing exceeds it; x_i outside of T, else -inf: it exceeds nothing.
    # A NaN counts as neither, as in PyTorch.
    b = (x.gather(1, index) - 1).where(leading, inf).nan_to_num(inf, inf, -inf)
    outside = x.where(~member(x, index, leading), -inf).nan_to_num(-inf, inf, -inf)
    b, order = b.sort(1)
    below = torch.searchsorted(
        b, outside.contiguous()
    )  # #{j in T: b_j < x_i}, so x_i exceeds the first so many of b
    ranks = F.pad(torch.zeros_like(b), (0, 1)).scatter_add(1, below, torch.ones_like(x))
    above = ranks.flip(1).cumsum(1).flip(1)[:, 1:]  # #{i not in T: x_i > b_j}
    counts = torch.zeros_like(x).scatter_add(1, index.gather(1, order), -above) + below
    return flat(counts / C, x)


@formula("x (N, C), g (N, 1), index (N, K), leading (N, K) -> dx like x")
def label_margin_gradient(x: Tensor, g: Tensor, index: Tensor, leading: Tensor, C: int) -> Tensor:
    """g dl/dx"""
    return g * label_margin_slope(x, index, leading, C)


@formula("x (N, C), dx (N, C), index (N, K), leading (N, K) -> dl (N, 1)")
def label_margin_tangent(x: Tensor, dx: Tensor, index: Tensor, leading: Tensor, C: int) -> Tensor:
    """<dl/dx, dx>"""
    return dot(label_margin_slope(x, index, leading, C), dx, 1)
