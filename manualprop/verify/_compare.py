"""Compare the derivative by hand with the numerical one, of a subject and of its gradient and tangent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp

from manualprop.verify import _numeric
from manualprop.verify._random import generator, normal
from manualprop.verify._subject import Subject


class Comparison(NamedTuple):
    """One input's Jacobian, seen through cotangents (V rows) and directions (D columns)."""

    point: int
    hand: Tensor  # (V, D)
    numeric: Tensor  # (V, D)
    tolerance: Tensor  # (V, D) the error of the numerical derivative, and the case's tolerances
    kinks: Tensor  # (V, D) of bool: an output with a weight in the cotangent has two slopes in this direction
    cotangents: Tensor  # (V, M)
    directions: Tensor  # (D, N)

    @property
    def wrong(self) -> Tensor:
        """(V, D) of bool."""
        off = ~((self.hand - self.numeric).abs() <= self.tolerance)  # so that NaN by hand is wrong
        return off & self.measured

    @property
    def measured(self) -> Tensor:
        """(V, D) of bool: where differences give the derivative to better than a tenth."""
        sure = torch.isfinite(self.numeric) & (self.tolerance <= 0.1 * (1 + self.numeric.abs()))
        return sure & ~self.kinks

    @property
    def whole(self) -> bool:
        """Whether the matrices are the whole Jacobian: unit vectors on both sides."""
        return _is_basis(self.cotangents, of_ones=False) and _is_basis(self.directions)


def ratio_of(found: Tensor, expected: Tensor) -> float | None:
    """The c for which found - c expected is smallest; None if expected is zero."""
    norm = (expected * expected).sum().item()
    return (found * expected).sum().item() / norm if norm else None


def _is_basis(rows: Tensor, of_ones: bool = True) -> bool:
    """Whether the rows are all unit vectors, in order.  Without ``of_ones`` some rows may be zero."""
    n, m = rows.shape
    if n != m:
        return False
    diagonal = rows.diagonal()
    if of_ones and not bool((diagonal == 1).all()):
        return False
    return bool(((diagonal == 1) | (diagonal == 0)).all()) and int(rows.count_nonzero()) == int(
        diagonal.count_nonzero()
    )


Hand = Callable[[Subject, Tensor, Sequence[Tensor]], list[Tensor]]


def basis(entries: int, s: Subject, seed: int) -> Tensor:
    """(K, entries): every unit vector.  For many entries: some dense random vectors and a sample of unit vectors."""
    if entries <= s.whole:
        return torch.eye(entries, dtype=torch.float64)
    units = s.whole // 4
    source = generator("basis", seed)
    dense = normal((4, entries), source)
    chosen = torch.zeros(units, entries, dtype=torch.float64)
    chosen[torch.arange(units), torch.randperm(entries, generator=source)[:units]] = 1
    return torch.cat([dense, chosen])


def compare(s: Subject, hand: Hand | None = None, only: int | None = None) -> list[Comparison]:
    """The first derivative of a subject by hand, by default in reverse mode, and by differences.

    With respect to every point, or to the point ``only``.
    """
    v = basis(sum(y.numel() for y in s.outputs), s, s.case.seed) * _flags(s)
    d = [_allowed_directions(s, i, basis(p.numel(), s, s.case.seed + i)) for i, p in enumerate(s.points)]
    hand = hand or by_backward
    found = hand(s, v, d)
    return [_one(s, i, v, d, found[i], hand) for i in range(len(s.points)) if only in (None, i)]


def first_order_of(s: Subject) -> list[Comparison]:
    """:func:`compare` in reverse mode.  Several probes ask for it, so the result is kept."""
    if "first order" not in s._shared:
        s._shared["first order"] = compare(s)
    found: list[Comparison] = s._shared["first order"]
    return found


def wrong_in_first_order(s: Subject) -> bool:
    """Whether the plain gradient is wrong, as first_order reports.  It is then wrong elsewhere too."""
    try:
        return any(bool(c.wrong.any()) for c in first_order_of(s))
    except Exception:  # whatever the checked code raises
        return True


def right_instead(s: Subject, found: Sequence[Tensor | None]) -> bool:
    """Whether gradients for the plain cotangents are right, where first_order calls those of a plain backward wrong."""
    if not wrong_in_first_order(s):
        return False
    v = _numeric.flat(s.cotangents)
    for c, g in zip(first_order_of(s), found, strict=True):
        if not c.whole or bool(c.kinks.any()):
            return False
        want = v @ c.numeric  # (M) (M, D) -> (D,)
        allowed = v.abs() @ c.tolerance + 1e-6 * want.abs().max()
        if not bool(((_flat_or_zeros(g, s.points[c.point]) - want).abs() <= allowed).all()):
            return False
    return True


def _allowed_directions(s: Subject, i: int, d: Tensor) -> Tensor:
    """The directions in which a point may move, if the case has ``project``."""
    if not s.projects or not len(d):
        return d
    shape, dtype = s.points[i].shape, s.points[i].dtype
    return torch.stack([_numeric.flat([s.tangent(i, row.reshape(shape).to(dtype))]) for row in d])


def _flags(s: Subject) -> Tensor:
    """(M,): 1 for the entries of outputs that require grad, 0 for the others."""
    flags = zip(s.outputs, s.recorded, strict=True)
    return _numeric.flat([torch.full(y.shape, float(used)) for y, used in flags])


def by_backward(s: Subject, v: Tensor, d: Sequence[Tensor]) -> list[Tensor]:
    """Rows by backward, one for each cotangent.  None counts as a gradient of zeros."""
    rows = [
        [_flat_or_zeros(g, p) for g, p in zip(s.linear_part(_parts(r, s.outputs)), s.points, strict=True)]
        for r in v
    ]
    if not rows:  # nothing comes out
        return [v.new_zeros(0, len(directions)) for directions in d]
    return [_seen_along(torch.stack([row[i] for row in rows]), d[i]) for i in range(len(d))]


def _seen_along(rows: Tensor, d: Tensor) -> Tensor:
    """(V, N) (N, D) -> (V, D).  Unit vectors need no product, where NaN times 0 would spread NaN to every direction."""
    return rows if _is_basis(d) else rows @ d.T


def by_forward(s: Subject, v: Tensor, d: Sequence[Tensor]) -> list[Tensor]:
    """Columns by forward mode, one for each direction.  None counts as a tangent of zeros."""
    return [_columns(v, [_tangent(s, i, row) for row in d[i]]) for i in range(len(d))]


def _columns(v: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    """(V, M) (M, D) -> (V, D)"""
    return v @ torch.stack(list(tangents), 1) if tangents else v.new_zeros(len(v), 0)


def _tangent(s: Subject, i: int, row: Tensor) -> Tensor:
    with forward_ad.dual_level():
        duals = s.at()
        duals[i] = forward_ad.make_dual(duals[i], row.reshape(duals[i].shape).to(duals[i].dtype))
        return _numeric.flat(
            [torch.zeros_like(y) if t is None else t for y, t in map(forward_ad.unpack_dual, s(*duals))]
        )


def by_jvp(s: Subject, v: Tensor, d: Sequence[Tensor]) -> list[Tensor]:
    """Columns by ``torch.func.jvp``, which nests."""

    def column(i: int, row: Tensor) -> Tensor:
        tangents = [torch.zeros_like(p) for p in s.points]
        tangents[i] = row.reshape(s.points[i].shape).to(s.points[i].dtype)
        s.reseed()
        return _numeric.flat(jvp(s.function, tuple(p.clone() for p in s.points), tuple(tangents))[1])

    return [_columns(v, [column(i, row) for row in d[i]]) for i in range(len(d))]


def _flat_or_zeros(g: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros(p.numel(), dtype=torch.float64) if g is None else _numeric.flat([g])


def _parts(row: Tensor, like: Sequence[Tensor]) -> list[Tensor | None]:
    parts = row.split([y.numel() for y in like])
    return [part.reshape(y.shape).to(y.dtype) for part, y in zip(parts, like, strict=True)]


def _one(s: Subject, i: int, v: Tensor, directions: Sequence[Tensor], hand: Tensor, by: Hand) -> Comparison:
    d = directions[i]
    dtype = s.points[i].dtype
    evaluates = [_only(s, i, row) for row in d]
    empty = torch.zeros(v.shape[1], 0, dtype=torch.float64)
    columns = [_numeric.derivative(e, s.noise, dtype) for e in evaluates]
    # (V, M) (M, D) -> (V, D)
    values = torch.stack([c.value for c in columns], 1) if columns else empty
    errors = torch.stack([c.error for c in columns], 1) if columns else empty
    c = Comparison(
        i,
        hand.clone(),
        _weighed(v, values),
        _tolerance(s, v, values, errors),
        torch.zeros_like(hand).bool(),
        v,
        d,
    )
    for j in c.wrong.any(0).nonzero().flatten().tolist():
        kinks = _kinks(s, i, d[j], evaluates[j])  # (M,)
        if not bool(kinks.any()):
            continue
        c.kinks[:, j] = ((v != 0) & kinks).any(1)
        mixed = c.kinks[:, j] & ((v != 0) & ~kinks).any(1)
        if bool(mixed.any()):  # a cotangent of many outputs: ask again without those at the kink
            w = v[mixed] * ~kinks
            only = [d[j : j + 1] if k == i else directions[k][:0] for k in range(len(directions))]
            c.hand[mixed, j] = by(s, w, only)[i][:, 0]
            c.numeric[mixed, j] = _weighed(w, values[:, j : j + 1])[:, 0]
            c.tolerance[mixed, j] = _tolerance(s, w, values[:, j : j + 1], errors[:, j : j + 1])[:, 0]
            c.kinks[mixed, j] = False
        if isinstance(s, Derived):
            c.kinks[:, j] |= c.hand[:, j].isnan()  # in reverse mode 0 times what does not exist is NaN too
    return c


def _weighed(v: Tensor, values: Tensor) -> Tensor:
    """(V, M) (M, D) -> (V, D).  An output that is not finite counts only where its weight is not 0."""
    if bool(torch.isfinite(values).all()):
        return v @ values
    return torch.stack([(row.unsqueeze(1) * values).where(row.unsqueeze(1) != 0, 0).sum(0) for row in v])


def _tolerance(s: Subject, v: Tensor, values: Tensor, errors: Tensor) -> Tensor:
    """(V, D): the case's tolerances, and the error of the numerical derivative."""
    numeric = _weighed(v, values)
    finite = numeric[torch.isfinite(numeric)].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    doubt = _weighed(v.abs(), errors)
    return s.case.atol + s.case.rtol * scale + 4 * doubt.nan_to_num(torch.inf, torch.inf)


def _kinks(s: Subject, i: int, row: Tensor, evaluate: _numeric.Evaluate) -> Tensor:
    """(M,) of bool: which outputs have two slopes in a direction of point ``i``, or follow an output that has."""
    dtype = s.points[i].dtype
    kinks = _at_kink(evaluate, s.noise, dtype) | _numeric.staircase(evaluate, s.noise, dtype)
    return kinks | s.kinks_of_base(i, row) if isinstance(s, Derived) else kinks


def _at_kink(evaluate: _numeric.Evaluate, noise: float, dtype: torch.dtype) -> Tensor:
    """(M,) of bool: where the slopes from above and from below differ."""
    above, below = (_numeric.one_sided(evaluate, side, noise, dtype) for side in (1, -1))
    jump = (above.value - below.value).abs()
    return jump > 1e-6 + 4 * (above.error + below.error)


def _only(s: Subject, i: int, row: Tensor) -> _numeric.Evaluate:
    directions: list[Tensor | None] = [None] * len(s.points)
    directions[i] = row.reshape(s.points[i].shape).to(s.points[i].dtype)
    return s.along(directions)


# ----- functions derived from the one under test -----


class Derived(Subject):
    """A function made from a subject: of the same points, and perhaps more."""

    def __init__(self, base: Subject, points: Sequence[Tensor], names: Sequence[str], whole: int) -> None:
        self.base, self.case, self.dtype = base, base.case, base.dtype
        self.points, self.names, self.whole = list(points), list(names), whole
        self._exchange = base._exchange
        self._shared = {}

    @functools.cached_property
    def recorded(self) -> list[bool]:
        return [True] * len(
            self.outputs
        )  # a gradient that does not require grad is a defect, not a declaration

    @property
    def nonlinear(self) -> bool:
        """False: autograd derives it, by rules that are linear."""
        return False

    def meant(self, *points: Tensor) -> tuple[Tensor, ...]:
        """The function itself: a surrogate replaces the base only."""
        return self(*points)

    @property
    def detaches(self) -> bool:
        """False: it is held against differences."""
        return False

    def allowed(self, points: Sequence[Tensor]) -> list[Tensor]:
        """The points of the base as the case allows them; the rest as they are."""
        count = len(self.base.points)
        return [*self.base.allowed(points[:count]), *points[count:]]

    def tangent(self, i: int, direction: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        """As the base's; grad_output goes anywhere."""
        return self.base.tangent(i, direction, points) if i < len(self.base.points) else direction

    def kinks_of_base(self, i: int, row: Tensor) -> Tensor:
        """(M,) of bool: which outputs follow an output of the base that has a kink here.  They have no derivative.

        At a kink the author chooses one of two slopes.  The choice may differ between orders and modes.
        """
        base = self.base
        if i < len(base.points):
            at = base.points[i]
            kinks = _at_kink(_only(base, i, row), base.noise, at.dtype)
            if isinstance(base, Derived):
                kinks = kinks | base.kinks_of_base(i, row)
        else:
            everywhere = [d.sign() for d in base.random_like(base.points, 6)]
            kinks = _at_kink(base.along(everywhere), base.noise, base.points[0].dtype)
        return self.follow(kinks)

    def follow(self, kinks: Tensor) -> Tensor:
        """(M,) of bool: which outputs depend on outputs of the base marked by ``kinks``.  Here: all, if any is marked."""
        return torch.full((sum(y.numel() for y in self.outputs),), bool(kinks.any()))


class Gradient(Derived):
    """The gradients by backward, as a function of the points and of grad_output.  Its derivative is the second order."""

    def __init__(self, base: Subject) -> None:
        used = [y.requires_grad for y in base(*base.at())]
        v = [c for c, u in zip(base.cotangents, used, strict=True) if u]
        names = ["grad_output"] if len(v) == 1 else [f"grad_output[{i}]" for i in range(len(v))]
        super().__init__(base, [*base.points, *v], [*base.names, *names], max(base.whole // 4, 8))

    @property
    def output_names(self) -> list[str]:
        """Each output is the gradient of a point."""
        return [f"the gradient of {name}" for name in self.base.names]

    def function(self, *points: Tensor) -> tuple[Tensor, ...]:
        count = len(self.base.points)
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            x = [p if p.requires_grad else p.detach().requires_grad_() for p in points[:count]]
            outputs = [y for y in self.base.function(*x) if y.requires_grad]
            found = torch.autograd.grad(outputs, x, points[count:], create_graph=True, allow_unused=True)
        if wanted and any(g is not None and type(g.grad_fn).__name__ == "Error" for g in found):
            # torch's node raises in a .backward() alone: torch.autograd.grad would step around it.
            raise RuntimeError(
                "trying to differentiate twice a function that was marked with @once_differentiable"
            )
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, x, strict=True))

    @property
    def detaches(self) -> bool:
        """As the base: it is then held against the surrogate's second derivative."""
        return self.base.detaches

    def meant(self, *points: Tensor) -> tuple[Tensor, ...]:
        """The gradients themselves; those of a surrogate that detaches."""
        if not self.detaches:
            return self(*points)
        count = len(self.base.points)
        with torch.enable_grad():
            x = [p if p.requires_grad else p.detach().requires_grad_() for p in points[:count]]
            used = (y for y, u in zip(self.base.meant(*x), self.base.recorded, strict=True) if u)
            live = [(y, v) for y, v in zip(used, points[count:], strict=True) if y.requires_grad]
            ys, vs = [y for y, _ in live], [v for _, v in live]
            found = (
                torch.autograd.grad(ys, x, vs, create_graph=True, allow_unused=True)
                if live
                else [None] * count
            )
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, x, strict=True))

    def follow(self, kinks: Tensor) -> Tensor:
        """The entries of the gradients to which outputs at a kink contribute, at points close by."""
        if not bool(kinks.any()):
            return super().follow(kinks)
        base = self.base
        parts = kinks.split([y.numel() for y in base.outputs])
        v = [(c * m.reshape(c.shape).to(c.dtype)) for c, m in zip(base.cotangents, parts, strict=True)]
        hit = torch.zeros(sum(p.numel() for p in base.points), dtype=torch.bool)
        for seed in (61, 62, 63):
            for side in (1e-6, -1e-6):
                aside = [
                    p + side * n
                    for p, n in zip(base.points, base.random_like(base.points, seed), strict=True)
                ]
                found = base.gradients(aside, v)
                hit |= (
                    _numeric.flat(
                        [
                            torch.zeros_like(p) if g is None else g
                            for g, p in zip(found, base.points, strict=True)
                        ]
                    )
                    != 0
                )
        return hit


class Tangent(Derived):
    """The tangents by ``torch.func.jvp`` in one fixed direction, as a function of the points."""

    def __init__(self, base: Subject) -> None:
        super().__init__(base, base.points, base.names, max(base.whole // 4, 8))

    @functools.cached_property
    def direction(self) -> tuple[Tensor, ...]:
        return tuple(self.random_like(self.points, 5))

    def function(self, *points: Tensor) -> tuple[Tensor, ...]:
        tangents: tuple[Tensor, ...] = jvp(self.base.function, points, self.direction)[1]
        return tangents
