"""Is it the derivative: first, second and third order, backward and forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._diagnosis import explain
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, passed, skipped
from manualprop.verify._subject import Subject

WHOLE = 96  # entries of a tensor up to which each is taken for itself; beyond, random directions and a sample


class Comparison(NamedTuple):
    """One input's Jacobian, seen through cotangents (rows) and directions (columns), by hand and by differences."""

    point: int
    hand: Tensor  # (V, D)
    numeric: Tensor
    error: Tensor  # of the numeric one, and the tolerance: what exceeds it is wrong
    kinks: Tensor  # (D,) whether the slopes from the two sides differ
    cotangents: Tensor  # (V, M)
    directions: Tensor  # (D, N)

    @property
    def wrong(self) -> Tensor:
        """(V, D) of bool."""
        off = ~((self.hand - self.numeric).abs() <= self.error)  # NaN is wrong
        return off & ~self.kinks


def basis(entries: int, seed: int) -> Tensor:
    """(K, entries): every unit vector; for many entries some dense random ones and a sample of unit vectors."""
    if entries <= WHOLE:
        return torch.eye(entries, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(4, entries, generator=generator, dtype=torch.float64)
    units = torch.zeros(24, entries, dtype=torch.float64)
    units[torch.arange(24), torch.randperm(entries, generator=generator)[:24]] = 1
    return torch.cat([dense, units])


def compare(s: Subject) -> list[Comparison]:
    """The first derivative by hand beside the numerical one, for each differentiated input."""
    m = sum(y.numel() for y in s.outputs)
    v = basis(m, s.case.seed)
    hand = [_pulled_back(s, row) for row in v]
    return [_compare(s, i, v, torch.stack([h[i] for h in hand])) for i in range(len(s.points))]


def _pulled_back(s: Subject, row: Tensor) -> list[Tensor]:
    """The gradients for one cotangent, flat; zeros for None."""
    grads = s.gradients(cotangents=_shaped(row, s.outputs))
    return [
        torch.zeros(p.numel(), dtype=torch.float64) if g is None else _numeric.flat([g])
        for g, p in zip(grads, s.points, strict=True)
    ]


def _shaped(row: Tensor, like: list[Tensor]) -> list[Tensor | None]:
    parts = row.split([y.numel() for y in like])
    return [part.reshape(y.shape).to(y.dtype) for part, y in zip(parts, like, strict=True)]


def _compare(s: Subject, i: int, v: Tensor, pulled: Tensor) -> Comparison:
    point = s.points[i]
    d = basis(point.numel(), s.case.seed + i)
    evaluates = [_only(s, i, row) for row in d]
    columns = [_numeric.derivative(e, s.noise, s.dtype or point.dtype) for e in evaluates]
    numeric = v @ torch.stack([c.value for c in columns], 1)  # (V, M) (M, D) -> (V, D)
    doubt = v.abs() @ torch.stack([c.error for c in columns], 1)
    scale = numeric[torch.isfinite(numeric)].abs().amax() if torch.isfinite(numeric).any() else 0.0
    c = Comparison(
        i,
        hand=pulled @ d.T,
        numeric=numeric,
        error=s.case.atol + s.case.rtol * scale + 4 * doubt.nan_to_num(torch.inf),
        kinks=torch.zeros(len(d), dtype=torch.bool),
        cotangents=v,
        directions=d,
    )
    kinks = c.kinks.clone()
    for j in c.wrong.any(0).nonzero().flatten().tolist():
        above, below = (
            _numeric.one_sided(evaluates[j], side, s.noise, s.dtype or point.dtype) for side in (1, -1)
        )
        jump = (above.value - below.value).abs()
        kinks[j] = bool((jump > 1e-6 + 4 * (above.error + below.error)).any())
    return c._replace(kinks=kinks)


def _only(s: Subject, i: int, row: Tensor) -> _numeric.Evaluate:
    directions: list[Tensor | None] = [None] * len(s.points)
    directions[i] = row.reshape(s.points[i].shape).to(s.points[i].dtype)
    return s.along(directions)


@probe()
def first_order(s: Subject) -> Outcome:
    """backward against numerical differentiation."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped("no output requires grad: see output_requires_grad")
    comparisons = compare(s)
    wrong = [c for c in comparisons if c.wrong.any()]
    if wrong:
        evidence, diagnosis, details = explain(s, comparisons)
        return finding(evidence, diagnosis, **details)
    worst = max(
        ((c.hand - c.numeric).abs().where(~c.kinks, 0).amax().item() for c in comparisons if c.hand.numel()),
        default=0.0,
    )
    kinks = sum(int(c.kinks.sum()) for c in comparisons)
    at = f"; {kinks} directions lie at kinks, see ties" if kinks else ""
    return passed(f"largest error {worst:.1g} over {', '.join(s.names)}{at}", error=worst)
