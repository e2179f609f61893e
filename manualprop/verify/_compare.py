"""The derivative by hand beside the numerical one, and the functions derived from a subject that have one too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp

from manualprop.verify import _numeric
from manualprop.verify._subject import Subject


class Comparison(NamedTuple):
    """One input's Jacobian, seen through cotangents (V rows) and directions (D columns)."""

    point: int
    hand: Tensor  # (V, D)
    numeric: Tensor  # (V, D)
    tolerance: Tensor  # (V, D) what the numerical derivative may be off by, and the case's tolerances
    kinks: Tensor  # (D,) whether the slopes from the two sides differ
    cotangents: Tensor  # (V, M)
    directions: Tensor  # (D, N)

    @property
    def wrong(self) -> Tensor:
        """(V, D) of bool."""
        off = ~((self.hand - self.numeric).abs() <= self.tolerance)  # so that NaN by hand is wrong
        return off & self.measured

    @property
    def measured(self) -> Tensor:
        """(V, D) of bool: where differences tell the derivative to better than a tenth."""
        sure = torch.isfinite(self.numeric) & (self.tolerance <= 0.1 * (1 + self.numeric.abs()))
        return sure & ~self.kinks

    @property
    def whole(self) -> bool:
        """Whether the matrices are the very Jacobian: unit vectors on both sides."""
        return (
            len(self.cotangents) == self.cotangents.shape[1]
            and len(self.directions) == self.directions.shape[1]
        )


Hand = Callable[[Subject, Tensor, Sequence[Tensor]], list[Tensor]]


def basis(entries: int, s: Subject, seed: int) -> Tensor:
    """(K, entries): every unit vector; of many entries, some dense random vectors and a sample of unit vectors."""
    if entries <= s.whole:
        return torch.eye(entries, dtype=torch.float64)
    units = s.whole // 4
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(4, entries, generator=generator, dtype=torch.float64)
    chosen = torch.zeros(units, entries, dtype=torch.float64)
    chosen[torch.arange(units), torch.randperm(entries, generator=generator)[:units]] = 1
    return torch.cat([dense, chosen])


def compare(s: Subject, hand: Hand | None = None, only: int | None = None) -> list[Comparison]:
    """The first derivative of a subject by hand, in reverse mode by default, and by differences.

    In every point, or in ``only`` that one.
    """
    v = basis(sum(y.numel() for y in s.outputs), s, s.case.seed) * _flags(s)
    d = [basis(p.numel(), s, s.case.seed + i) for i, p in enumerate(s.points)]
    found = (hand or by_backward)(s, v, d)
    return [_one(s, i, v, d[i], found[i]) for i in range(len(s.points)) if only in (None, i)]


def _flags(s: Subject) -> Tensor:
    """(M,): 1 for the entries of outputs that have a gradient, 0 for those that say they have none."""
    flags = zip(s.outputs, s.recorded, strict=True)
    return _numeric.flat([torch.full(y.shape, float(used)) for y, used in flags])


def by_backward(s: Subject, v: Tensor, d: Sequence[Tensor]) -> list[Tensor]:
    """Rows by backward, one for each cotangent; a gradient that is None counts as zeros."""
    rows = [
        [
            _flat_or_zeros(g, p)
            for g, p in zip(s.gradients(cotangents=_parts(r, s.outputs)), s.points, strict=True)
        ]
        for r in v
    ]
    return [_seen_along(torch.stack([row[i] for row in rows]), d[i]) for i in range(len(d))]


def _seen_along(rows: Tensor, d: Tensor) -> Tensor:
    """(V, N) (N, D) -> (V, D).  All unit vectors are no product: one NaN times 0 would be NaN in every direction."""
    return rows if len(d) == d.shape[1] else rows @ d.T


def by_forward(s: Subject, v: Tensor, d: Sequence[Tensor]) -> list[Tensor]:
    """Columns by forward mode, one for each direction; a tangent that is None counts as zeros."""
    return [v @ torch.stack([_tangent(s, i, row) for row in d[i]], 1) for i in range(len(d))]  # (V, M) (M, D)


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

    return [v @ torch.stack([column(i, row) for row in d[i]], 1) for i in range(len(d))]


def _flat_or_zeros(g: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros(p.numel(), dtype=torch.float64) if g is None else _numeric.flat([g])


def _parts(row: Tensor, like: Sequence[Tensor]) -> list[Tensor | None]:
    parts = row.split([y.numel() for y in like])
    return [part.reshape(y.shape).to(y.dtype) for part, y in zip(parts, like, strict=True)]


def _one(s: Subject, i: int, v: Tensor, d: Tensor, hand: Tensor) -> Comparison:
    dtype = s.points[i].dtype
    evaluates = [_only(s, i, row) for row in d]
    empty = torch.zeros(v.shape[1], 0, dtype=torch.float64)
    columns = [_numeric.derivative(e, s.noise, dtype) for e in evaluates]
    # (V, M) (M, D) -> (V, D)
    numeric = v @ (torch.stack([c.value for c in columns], 1) if columns else empty)
    doubt = v.abs() @ (torch.stack([c.error for c in columns], 1) if columns else empty)
    finite = numeric[torch.isfinite(numeric)].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    tolerance = s.case.atol + s.case.rtol * scale + 4 * doubt.nan_to_num(torch.inf, torch.inf)
    c = Comparison(i, hand, numeric, tolerance, torch.zeros(len(d), dtype=torch.bool), v, d)
    for j in c.wrong.any(0).nonzero().flatten().tolist():
        c.kinks[j] = _at_kink(evaluates[j], s.noise, dtype) or _base_at_kink(s, i, d[j])
    return c


def _at_kink(evaluate: _numeric.Evaluate, noise: float, dtype: torch.dtype) -> bool:
    """Whether the slopes from the two sides differ."""
    above, below = (_numeric.one_sided(evaluate, side, noise, dtype) for side in (1, -1))
    jump = (above.value - below.value).abs()
    return bool((jump > 1e-6 + 4 * (above.error + below.error)).any())


def _base_at_kink(s: Subject, i: int, row: Tensor) -> bool:
    """Whether a derived function is asked about where the one it derives from has a kink: it has no value there."""
    base = getattr(s, "base", None)
    if base is None:
        return False
    if i < len(base.points):
        return _at_kink(_only(base, i, row), base.noise, base.points[i].dtype) or _base_at_kink(base, i, row)
    everywhere = [d.sign() for d in base.random_like(base.points, 6)]
    return _at_kink(base.along(everywhere), base.noise, base.points[0].dtype)


def _only(s: Subject, i: int, row: Tensor) -> _numeric.Evaluate:
    directions: list[Tensor | None] = [None] * len(s.points)
    directions[i] = row.reshape(s.points[i].shape).to(s.points[i].dtype)
    return s.along(directions)


# ----- functions derived from the one under test -----


class _Derived(Subject):
    """Another function of more points, made from a subject."""

    def __init__(self, base: Subject, points: Sequence[Tensor], names: Sequence[str], whole: int) -> None:
        self.base, self.case, self.dtype = base, base.case, base.dtype
        self.points, self.names, self.whole = list(points), list(names), whole

    @functools.cached_property
    def recorded(self) -> list[bool]:
        return [True] * len(self.outputs)  # a gradient that does not require grad is a defect, no declaration


class Gradient(_Derived):
    """The gradients by backward, as a function of the points and of grad_output: its derivative is the second order."""

    def __init__(self, base: Subject) -> None:
        used = [y.requires_grad for y in base(*base.at())]
        v = [c for c, u in zip(base.cotangents, used, strict=True) if u]
        names = ["grad_output"] if len(v) == 1 else [f"grad_output[{i}]" for i in range(len(v))]
        super().__init__(base, [*base.points, *v], [*base.names, *names], max(base.whole // 4, 8))

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


class Tangent(_Derived):
    """The tangents by ``torch.func.jvp`` in one fixed direction, as a function of the points."""

    def __init__(self, base: Subject) -> None:
        super().__init__(base, base.points, base.names, max(base.whole // 4, 8))

    @functools.cached_property
    def direction(self) -> tuple[Tensor, ...]:
        return tuple(self.random_like(self.points, 5))

    def function(self, *points: Tensor) -> tuple[Tensor, ...]:
        tangents: tuple[Tensor, ...] = jvp(self.base.function, points, self.direction)[1]
        return tangents
