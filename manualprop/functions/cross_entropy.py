r"""Hand-derived rules of the cross-entropies of C classes: with logits or log-probabilities as predictions.

Symbols
    x   prediction or logits          g   dL/dl, the gradient that arrives
    t   target                        v   dL/d(dx), the gradient of the gradient
    l   loss, before reduction        c, k run over the C classes
    p   softmax(x), over the classes  1[...]   1 where the condition holds, else 0
    w   class weights, may be None
    m   the mass that the target puts on a class, and M = sum_c m_c
    D   what a mean divides by: the sum of w_t over the targets that count, the number of examples for probabilities
Shape legend
    N   examples        C   classes        L   all further axes, flattened; without them, none
    Inside of a formula x is (N, C, L), what belongs to an example (N, 1, L), w (C, 1).
Reduction
    A rule makes the sum or the mean of its losses itself: a mean is one function, not three.
Half precision
    The losses of half-precision predictions are computed and returned in float32: the reduction rounds once.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop.functions._execution import _classes as aten
from manualprop.functions._execution import formula, less_on_class, of_class, on_class, recorded, weight_of
from manualprop.functions._execution._classes import classwise, in_rows, shape_of_targets, weights
from manualprop.functions._rule import Rule, flat
from manualprop.functions.norm import shaped, weighted
from manualprop.functions.softmax import dot

__all__ = ["NLL", "CrossEntropy", "SoftCrossEntropy"]


class Mass(NamedTuple):
    """The mass m that a target puts on the classes, m_c = r 1[c = t] + b_c, and M = sum_c m_c: of every cross-entropy.

    M and r are (N, 1, L), or a number; t is a class index (N, 1, L), or None where b, (N, C, L), is all of m; b is
    (C, 1) or a number for class indices, or None for 0.
    """

    M: Tensor | float
    r: Tensor | float
    t: Tensor | None
    b: Tensor | float | None

    def excess(self, p: Tensor) -> Tensor:
        """M p - m, which is dl/dx."""
        rest = self.M * p if self.b is None else self.M * p - self.b
        return rest if self.t is None else less_on_class(rest, self.r, self.t)

    def scaled(self, g: Tensor, ga: Tensor | None = None) -> "Mass":
        """g m, with g M + ga in the place of g M."""
        q = g * self.M if ga is None else g * self.M + ga
        return Mass(q, g * self.r, self.t, None if self.b is None else g * self.b)

    def along(self, y: Tensor) -> Tensor:
        """<m, y>"""
        terms = [] if self.t is None else [self.r * of_class(y, self.t)]
        terms += [] if self.b is None else [(self.b * y).sum(1, keepdim=True)]
        return functools.reduce(torch.add, terms)

    def dense(self, like: Tensor) -> Tensor:
        """m, as wide as ``like``."""
        m = torch.zeros_like(like) if self.t is None else on_class(self.r, self.t, like)
        return m if self.b is None else m + self.b


def mass_of_index(t: Tensor, w: Tensor | None, e: float, a: float) -> Mass:
    """m_c = (1 - e) w_t 1[c = t] + a w_c with label smoothing e and a = e / C."""
    w_t = weight_of(w, t)
    if e == 0:
        return Mass(w_t, w_t, t, None)
    if w is None:
        return Mass(1.0, 1 - e, t, a)
    return Mass((1 - e) * w_t + a * w.sum(), (1 - e) * w_t, t, a * w)


def mass_of_probabilities(t: Tensor, w: Tensor | None, e: float, a: float) -> Mass:
    """m_c = ((1 - e) t_c + a) w_c with label smoothing e and a = e / C."""
    m = t if e == 0 else (1 - e) * t + a
    return any_mass(weighted(m, w))


def any_mass(m: Tensor) -> Mass:
    """m itself."""
    return Mass(m.sum(1, keepdim=True), 0.0, None, m)


def share(g: Tensor, t: Tensor, w: Tensor | None, ignored: int, reduction: str) -> tuple[Tensor, Tensor]:
    """dL/dl of each loss, and the target, 0 for an ignored one: g, over D for a mean, and 0 for an ignored target,
    whatever g is: over targets that are all ignored, D = 0.
    """
    t, counted = aten.counting(t, ignored)
    if reduction == "mean":
        g = aten.over(g, aten.divisor(t, w, counted, g.dtype))
    return aten.where_counted(g, counted), t


def spread(e: float, x: Tensor) -> float:
    """a = e / C."""
    return e and e / x.shape[min(1, x.dim() - 1)]


# ----- the rules -----


class ClassLoss(Rule):
    """Base of the rules of a prediction x, a target t and class weights w, then numbers: it keeps the three."""

    abstract = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, w, *ctx.options = inputs
        ctx.save_for_backward(x, t, w)
        ctx.save_for_forward(x, t, w)


class CrossEntropy(ClassLoss):
    r"""$l = -\sum_c m_c \log p_c$ with $p = \operatorname{softmax}(x)$ and class indices $t$ as targets

    The mass on class c, with class weights w (1 without), label smoothing e and t /= ignore_index:
        m_c = (1 - e) w_t 1[c = t] + (e / C) w_c                   all 0 for an ignored target

    Derivation, with M = sum_c m_c
        d(log p_c)/dx_k = 1[c = k] - p_k                           log-softmax
        dl/dx_k = -sum_c m_c (1[c = k] - p_k)                      chain rule
                = M p_k - m_k                                      without weights and smoothing: p - onehot(t)
        dL/dx = g (M p - m)                                        of a mean, g / D in the place of g
        dl = <M p - m, dx>                                         forward mode
    Second order
        :class:`CrossEntropyGradient`, by hand.
    Shape
        x (N, C, ...) and t (N, ...) -> l (N, ...), or its sum or mean ();  x (C,) and t () -> l ()
    Memory
        x, t and w.
    Accuracy
        M p - m cancels for a confident, right prediction; the absolute error stays within eps M.
    """

    @staticmethod
    def forward(
        x: Tensor,
        t: Tensor,
        w: Tensor | None = None,
        ignored: int = -100,
        e: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        return aten.cross_entropy(x, t, w, ignored, e, reduction)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        ignored, e, reduction = ctx.options
        z, g, t = in_rows(x, g, t)
        g, t = share(g, t, w, ignored, reduction)
        dx = index_gradient(z, g, t, weights(w, z), e, spread(e, x))
        return shaped(dx, x.shape), None, None, None, None, None

    @staticmethod
    def output_gradient(
        x: Tensor, t: Tensor, w: Tensor | None = None, ignored: int = -100, e: float = 0.0
    ) -> Tensor:
        """dl/dx = M p - m: the gradient of the loss with respect to the network's output, for each example."""
        z, g, t = in_rows(x, x.new_ones(t.shape), t)
        g, t = share(g, t, w, ignored, "none")
        dx: Tensor = index_gradient(z, g, t, weights(w, z), e, spread(e, x))
        return shaped(dx, x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        ignored, e, reduction = ctx.options
        dx = torch.zeros_like(x) if dx is None else dx  # class weights are constants, as in PyTorch
        index, counted = aten.counting(t, ignored)
        (z, index), (dx,) = in_rows(x, index), in_rows(dx)
        dl = index_tangent(z, dx, index, weights(w, z), e, spread(e, x)).reshape(t.shape)
        return aten.reduced(aten.where_counted(dl, counted), t, w, ignored, reduction)


def index_gradient_by_rule(x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, e: float, a: float) -> Tensor:
    """g (M p - m), to be differentiated."""
    b: Tensor = CrossEntropyGradient.apply(g.expand(t.shape), x, dense_mass(x, t, w, e, a))
    return b


@classwise("x (X), g (G), t (T), w (W) -> dx like x")
def index_gradient_by_formula(
    x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, e: float, a: float
) -> Tensor:
    """g (M p - m)"""
    return g * mass_of_index(t, w, e, a).excess(torch.softmax(x, 1))


index_gradient = recorded(index_gradient_by_rule, index_gradient_by_formula)


@classwise("log_p (X), g (G), t (T), w (W) -> dx like log_p")
def gradient_of_log(log_p: Tensor, g: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """g (M p - m), where log p is known."""
    return g * mass_of_index(t, w, 0.0, 0.0).excess(torch.exp(log_p))


@formula("log_p (N, C), g (), t (N, 1), minus_one (N, 1) -> dx like log_p")
def gradient_of_all(log_p: Tensor, g: Tensor | None, t: Tensor, minus_one: Tensor) -> Tensor:
    """g (M p - m), where log p is known and every target counts: M = 1, and 1 on the class of each row."""
    dx = Mass(1.0, -minus_one, t, None).excess(torch.exp(log_p))
    return dx if g is None else g * dx


@classwise("x (X), dx (X), t (T), w (W) -> dl (T)")
def index_tangent(x: Tensor, dx: Tensor, t: Tensor, w: Tensor | None, e: float, a: float) -> Tensor:
    """<M p - m, dx>"""
    return dot(mass_of_index(t, w, e, a).excess(torch.softmax(x, 1)), dx, 1)


@classwise("x (X), t (T), w (W) -> m (X)")
def dense_mass(x: Tensor, t: Tensor, w: Tensor | None, e: float, a: float) -> Tensor:
    """m"""
    return mass_of_index(t, w, e, a).dense(x)


class SoftCrossEntropy(ClassLoss):
    r"""$l = -\sum_c m_c \log p_c$ with $p = \operatorname{softmax}(x)$ and the probability $t$ of each class as target

    The mass on class c, with class weights w (1 without) and label smoothing e:
        m_c = ((1 - e) t_c + e / C) w_c

    Derivation, with M = sum_c m_c
        dl/dx_k = -sum_c m_c (1[c = k] - p_k) = M p_k - m_k        as in :class:`CrossEntropy`
        dL/dx = g (M p - m)                                        of a mean, g / D in the place of g
        dL/dt_c = -g log p_c dm_c/dt_c = -g (1 - e) w_c log p_c    chain rule
        dl = <M p - m, dx> - <log p, (1 - e) w dt>                 forward mode
    Second order
        :class:`CrossEntropyGradient`, by hand; dL/dt is a product of g and log-softmax: autograd differentiates it.
    Shape
        x and t (N, C, ...) -> l (N, ...), or its sum or mean ();  (C,) -> ()
    Memory
        x, t and w.
    Accuracy
        As :class:`CrossEntropy`.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, e: float, reduction: str) -> Tensor:
        return aten.cross_entropy(x, t, w, -100, e, reduction)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        e, reduction = ctx.options
        if reduction == "mean":
            g = g / aten.examples(x)
        (z, g), (t_rows,), a = in_rows(x, g), in_rows(t), spread(e, x)
        w = weights(w, z)
        dx = dt = None
        if ctx.needs_input_grad[0]:
            dx = shaped(probability_gradient(z, g, t_rows, w, e, a), x.shape)
        if ctx.needs_input_grad[1]:
            dt = shaped(target_gradient(z, g, t_rows, w, e), t.shape)
        return dx, dt, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        e, reduction = ctx.options
        (z,), (t_rows,), a = in_rows(x), in_rows(t), spread(e, x)
        dx, dt = (None if d is None else in_rows(d)[0] for d in (dx, dt))
        dl = probability_tangent(z, t_rows, dx, dt, weights(w, z), e, a)
        return aten.reduced(dl.reshape(shape_of_targets(x)), t, w, -100, reduction)


def probability_gradient_by_rule(
    x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, e: float, a: float
) -> Tensor:
    """g (M p - m), to be differentiated."""
    m = probability_mass(t, w, e, a)
    b: Tensor = CrossEntropyGradient.apply(g.expand_as(m[:, :1]), x, m)
    return b


@classwise("x (X), g (G), t (X), w (W) -> dx like x")
def probability_gradient_by_formula(
    x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, e: float, a: float
) -> Tensor:
    """g (M p - m)"""
    return g * mass_of_probabilities(t, w, e, a).excess(torch.softmax(x, 1))


probability_gradient = recorded(probability_gradient_by_rule, probability_gradient_by_formula)


@classwise("x (X), g (G), t (X), w (W) -> dt like t")
def target_gradient(x: Tensor, g: Tensor, t: Tensor, w: Tensor | None, e: float) -> Tensor:
    """-g (1 - e) w log p"""
    return -g * mass_tangent(torch.log_softmax(x, 1), w, e)


@classwise("x (X), t (X), dx (X), dt (X), w (W) -> dl (T)")
def probability_tangent(
    x: Tensor, t: Tensor, dx: Tensor | None, dt: Tensor | None, w: Tensor | None, e: float, a: float
) -> Tensor:
    """<M p - m, dx> - <log p, dm>"""
    log_p = torch.log_softmax(x, 1)
    dl = 0 if dx is None else dot(mass_of_probabilities(t, w, e, a).excess(log_p.exp()), dx, 1)
    dl = dl if dt is None else dl - dot(log_p, mass_tangent(dt, w, e), 1)
    assert isinstance(dl, Tensor)  # autograd calls this only with a tangent
    return dl


@classwise("t (X), w (W) -> m (X)")
def probability_mass(t: Tensor, w: Tensor | None, e: float, a: float) -> Tensor:
    """m"""
    return mass_of_probabilities(t, w, e, a).dense(t)


def weighted_probabilities(t: Tensor, w: Tensor, e: float) -> Tensor:
    """m of probabilities (N, C, ...), a function of the weights, too, which the rules take for constants."""
    (m,) = in_rows(t)
    m = probability_mass(m, weights(w, m), e, spread(e, t))
    return shaped(m, t.shape)  # type: ignore[no-any-return]


def mass_tangent(dt: Tensor, w: Tensor | None, e: float) -> Tensor:
    """dm = (1 - e) w dt of probabilities."""
    return weighted(dt if e == 0 else (1 - e) * dt, w)


class CrossEntropyGradient(Rule):
    r"""$b = g (M p - m)$, the gradient of both cross-entropies, itself differentiated

    Derivation, with dp_k/dx_j = p_k (1[j = k] - p_j), the Jacobian of softmax
        dL/dg   = <v, M p - m>                                     b is linear in g
        dL/dx_j = sum_k v_k g M dp_k/dx_j = g M p_j (v_j - <v, p>)
        dL/dm_c = sum_k v_k g (p_k - 1[k = c]) = g (<v, p> - v_c)
        db = dg (M p - m) + g (dM p - dm) + g M p (dx - <p, dx>)   forward mode, dM = sum_c dm_c
    Shape
        g (N, 1, L), x and m (N, C, L) -> b (N, C, L)
    Memory
        g, x and m.
    """

    @staticmethod
    def forward(g: Tensor, x: Tensor, m: Tensor) -> Tensor:
        b: Tensor = gradient_of_mass(x, g, m)
        return b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, x, m = ctx.saved_tensors
        gradients: tuple[Tensor | None, ...] = curvature(x, v, g, m, needs=tuple(ctx.needs_input_grad))
        return gradients

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, dm: Tensor | None) -> Tensor:
        g, x, m = ctx.saved_tensors
        db: Tensor = gradient_tangent(x, g, m, dg, dx, dm)
        return db


@classwise("x (X), g (T), m (X) -> b like x")
def gradient_of_mass(x: Tensor, g: Tensor, m: Tensor) -> Tensor:
    """g (M p - m)"""
    return g * any_mass(m).excess(torch.softmax(x, 1))


@classwise("x (X), v (X), g (T), m (X) -> dg like g, dx like x, dm like m")
def curvature(x: Tensor, v: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dg, dL/dx and dL/dm"""
    p, mass = torch.softmax(x, 1), any_mass(m)
    vp = dot(v, p, 1)
    return dot(v, mass.excess(p), 1), g * mass.M * p * (v - vp), g * (vp - v)


@classwise("x (X), g (T), m (X), dg (T), dx (X), dm (X) -> db like x")
def gradient_tangent(
    x: Tensor, g: Tensor, m: Tensor, dg: Tensor | None, dx: Tensor | None, dm: Tensor | None
) -> Tensor:
    """dg (M p - m) + g (dM p - dm) + g M p (dx - <p, dx>)"""
    p, mass = torch.softmax(x, 1), any_mass(m)
    db = torch.zeros_like(p) if dg is None else dg * mass.excess(p)
    db = db if dm is None else db + g * any_mass(dm).excess(p)
    return db if dx is None else db + g * mass.M * p * (dx - dot(p, dx, 1))


class NLL(ClassLoss):
    r"""$l = -w_t x_t$, the log-probability of the class $t$, with class weights $w$ (1 without)

    Derivation
        dl/dx_c = -w_t 1[c = t]                                    linear in x;  0 for an ignored target
        dL/dx_c = -g w_t 1[c = t]                                  chain rule; of a mean, g / D in the place of g
        dl = -w_t dx_t                                             forward mode
    Second order
        dL/dx is linear in g and constant in x: autograd differentiates the scattering as written.
    Shape
        x (N, C, ...) and t (N, ...) -> l (N, ...), or its sum or mean ();  x (C,) and t () -> l ()
    Memory
        x for its shape, t and w.
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, ignored: int, reduction: str) -> Tensor:
        return aten.nll(x, t, w, ignored, reduction)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        z, g, t = in_rows(x, g, t)
        g, t = share(g, t, w, *ctx.options)
        dx = shaped(log_probability_gradient(z, g, t, weights(w, z)), x.shape)
        return flat(dx, x), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        ignored, reduction = ctx.options
        dx = torch.zeros_like(x) if dx is None else dx  # class weights are constants, as in PyTorch
        index, counted = aten.counting(t, ignored)
        z, index = in_rows(dx, index)
        dl = log_probability_tangent(z, index, weights(w, z)).reshape(t.shape)
        return aten.reduced(aten.where_counted(dl, counted), t, w, ignored, reduction)


@classwise("x (X), g (G), t (T), w (W) -> dx like x", lift=False)
def log_probability_gradient(x: Tensor, g: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """-g w_t 1[c = t]"""
    return on_class(-g * weight_of(w, t), t, x)


@classwise("dx (X), t (T), w (W) -> dl (T)")
def log_probability_tangent(dx: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """-w_t dx_t"""
    return -weight_of(w, t) * of_class(dx, t)
