"""At extreme values: the gradient is finite where the value is, and it is the slope."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._budget import affordable
from manualprop.verify._compare import wrong_in_first_order
from manualprop.verify._difference import sizes
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify.probes._apart import multiples
from manualprop.verify.probes._runs import copies, reference_of
from manualprop.verify.probes._slopes import slope
from manualprop.verify.probes.dtypes import LOST, lowered, short

EXTREMES = (0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 800.0, -800.0, 1e4, -1e4, 1e30, -1e30)


ROW = "[0] = 0"


class Extreme(NamedTuple):
    """The points, with one entry or one row of one input at an extreme value."""

    where: str
    which: int  # of the inputs
    entry: int  # of it, flat: the one that is extreme, or the first of the row
    value: float
    points: list[Tensor]


@probe()
def extremes(s: Subject) -> Outcome:
    """At 0, 1e-30, 20, 90, 800, 1e4, 1e30 and negative: where the value is finite, the gradient is, and is the slope."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    wrong = wrong_in_first_order(s)
    if wrong and not _is_finite(s):
        return skipped("not finite at the inputs given: see first_order")
    seen, measured = 0, dict.fromkeys(s.names, 0)
    everywhere = list(_with_extremes(s))
    visited = affordable(s, everywhere, evaluations=40)
    rows = [at for at in everywhere if at.where.endswith(ROW)]
    if rows and not any(at.where.endswith(ROW) for at in visited):
        visited = [*visited, rows[0]]  # a row of zeros is the point where most goes wrong
    low = lowered(s, torch.float32).low if s.dtype == torch.float64 else None
    for at in visited:
        try:
            points = s.allowed(at.points)
            bad, known = _at_extreme(s, at, points, wrong)
        except Exception:  # not defined there, and it says so
            continue
        seen += 1
        measured[s.names[at.which]] += known
        if bad:
            return apart(
                finding(f"{bad} at {at.where}", "only at extreme values"),
                *_apart_from_first_order(s), "dtypes", "output_dtype", *([] if "reference" in bad else ["reference"]),
            )  # fmt: skip
    for at in visited if low is not None else []:
        assert low is not None
        try:
            points = [p.to(q.dtype) for p, q in zip(s.allowed(at.points), low.points, strict=True)]
            bad = _in_float32(s, low, points, at.value)
        except Exception:  # not defined there, and it says so
            continue
        if bad:
            diagnosis = f"wrong only in dtype {short(torch.float32)}, only at extreme values"
            found = finding(f"{bad} at {at.where}", diagnosis)
            same = "in float64" in bad and "finite" not in bad
            return found if same else apart(found, *_apart_from_first_order(s))
    left = len(everywhere) - len(visited)
    if wrong:
        return passed(f"finite at {seen} points where the value is; for the slope see first_order")
    unknown = [f"{name}: not measured here" for name, count in measured.items() if not count]
    notes = [*unknown, *([f"{left} more points were left out"] if left else [])]
    known_points = sum(measured.values())
    return passed(
        "; ".join([f"finite at {seen} points where the value is, the slope right at {known_points}", *notes])
    )


def _apart_from_first_order(s: Subject) -> list[str]:
    """A multiple of the right gradient is finite where that is.  A wrong formula may well overflow elsewhere."""
    return ["first_order"] if multiples(s) is not None else []


def _is_finite(s: Subject) -> bool:
    return all(g is None or bool(torch.isfinite(g).all()) for g in s.plain)


def _with_extremes(s: Subject) -> Iterator[Extreme]:
    for i, p in enumerate(s.points):
        if not p.numel():
            continue
        for value in EXTREMES:
            one, entry = p.clone(), p.numel() // 2
            one.view(-1)[entry] = value
            points = [one if j == i else q for j, q in enumerate(s.points)]
            yield Extreme(f"{s.names[i]} with an entry {value:g}", i, entry, value, points)
        if p.dim():
            row = p.clone()
            row[0] = 0.0
            points = [row if j == i else q for j, q in enumerate(s.points)]
            yield Extreme(f"{s.names[i]}{ROW}", i, 0, 0.0, points)


def _weights(s: Subject, y: Sequence[Tensor]) -> list[Tensor | None]:
    return [c if t.requires_grad else None for t, c in zip(y, s.cotangents_for(y), strict=True)]


def _at_extreme(s: Subject, at: Extreme, points: Sequence[Tensor], wrong: bool) -> tuple[str, bool]:
    """What is wrong at the point, or nothing; and whether the slope could be measured.

    A gradient that is ``wrong`` at the inputs given is only asked to be finite.
    """
    leaves = s.at(points)
    y = s(*leaves)
    if not all(torch.isfinite(t).all() for t in y):
        return "", False
    v = _weights(s, y)
    first = s.pull_back(y, leaves, copies(v))
    theirs = _reference_gradients(s, points, v)
    for i, g in enumerate(first):
        if g is None or torch.isfinite(g).all():
            continue
        right = None if theirs is None else theirs[i]
        if right is not None and bool(torch.isfinite(right).all()):
            return f"the gradient of {s.names[i]} is {_not_finite(g)}, the reference's is finite", True
        if _has_slope(s, points, i, g):
            return (
                f"the gradient of {s.names[i]} is {_not_finite(g)}, the value is finite and has a slope",
                True,
            )
    if wrong or not all(g is None or torch.isfinite(g).all() for g in first):
        return "", False
    direction = torch.zeros_like(s.points[at.which])
    direction.view(-1)[at.entry] = max(1.0, abs(at.value))
    found = slope(s, points, at.which, direction, v)
    if found.wrong:
        reach = max(1.0, abs(at.value))
        return (
            f"the slope in {s.names[at.which]} is {found.numeric / reach:.6g}, by backward {found.hand / reach:.6g}",
            True,
        )
    if not found.measured and theirs is not None:
        return _not_as(s, first, theirs), True
    return "", found.measured


def _reference_gradients(
    s: Subject, points: Sequence[Tensor], v: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Those of the reference, where it has the same values; None without one."""
    other = reference_of(s)
    if other is None:
        return None
    leaves = other.at(points)
    y = other(*leaves)
    mine = s(*s.at(points))
    if any(
        a.shape != b.shape or not torch.allclose(a, b, rtol=1e-6, atol=1e-9)
        for a, b in zip(y, mine, strict=True)
    ):
        return None
    return other.pull_back(y, leaves, copies(v))


def _not_as(s: Subject, found: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> str:
    """How gradients differ from the reference's by more than a thousandth, or nothing."""
    largest = max(sizes(theirs))
    for name, a, b in zip(s.names, found, theirs, strict=True):
        if a is None or b is None or not torch.isfinite(b).all() or not b.numel():
            continue
        off = (a - b).abs()
        if float(off.max()) > 1e-3 * largest + 1e-9:
            k = int(off.argmax())
            return f"the gradient of {name} is {a.flatten()[k]:.5g}, the reference's {b.flatten()[k]:.5g}"
    return ""


def _in_float32(s: Subject, low: Subject, points: Sequence[Tensor], value: float) -> str:
    """What is not finite in float32, or far from float64, of the gradient and of the second derivative."""
    leaves = low.at(points)
    y = low(*leaves)
    if not all(torch.isfinite(t).all() for t in y):
        return ""
    v = _weights(low, y)
    first = low.pull_back(y, leaves, copies(v))
    exact = [p.to(q.dtype) for p, q in zip(points, s.points, strict=True)]
    for i, g in enumerate(first):
        if g is not None and not torch.isfinite(g).all() and _has_slope(s, exact, i, g):
            return f"the gradient of {low.names[i]} is {_not_finite(g)}, the value is finite and has a slope"
    if value != 0 and not 1 <= abs(value) <= 1e4:  # of 1e-30 the squares are 0 in float32
        return ""
    bad = _far_from_float64(s, exact, y, v, first, at_zero=value == 0)
    if bad:
        return bad
    try:
        leaves = low.at(points)
        again = low.pull_back(low(*leaves), leaves, copies(v), create_graph=True)
        live = [g for g in again if g is not None and g.requires_grad and torch.isfinite(g).all()]
        if not live:
            return ""
        curvature = torch.autograd.grad([g.sum() for g in live], leaves, allow_unused=True)
    except Exception:  # refused: the business of second_order
        return ""
    for i, h in enumerate(curvature):
        if h is None or torch.isfinite(h).all():
            continue
        right = (_second_in_float64(s, exact) or [None] * len(points))[i]
        if right is not None and bool((right.abs() < torch.finfo(h.dtype).max).all()):
            return f"the second derivative in {low.names[i]} is {_not_finite(h)}, in float64 it is finite"
    return ""


def _far_from_float64(
    s: Subject,
    points: Sequence[Tensor],
    y: Sequence[Tensor],
    v: Sequence[Tensor | None],
    first: Sequence[Tensor | None],
    at_zero: bool,
) -> str:
    """How a gradient in float32 is off by a twentieth where the value is as in float64, or nothing.

    At zero there may be a kink, as of a singular value: each dtype may take another slope of those close by.
    """
    exact = s(*s.at(points))
    off = [
        (a.double() - b).abs().max().item() / (1e-30 + b.abs().max().item())
        for a, b in zip(y, exact, strict=True)
    ]
    if max(off, default=0.0) > 1e-5:
        return ""
    w = [None if c is None else c.to(b.dtype) for c, b in zip(v, exact, strict=True)]
    right = s.gradients(points, w)
    largest = max([*sizes(right), *sizes(w)])
    if not largest < 1e6 * (1 + max(sizes(w))):
        return ""  # a pole nearby: rounding of the input decides
    for i, (name, a, b) in enumerate(zip(s.names, first, right, strict=True)):
        if (
            a is None
            or b is None
            or not torch.isfinite(a).all()
            or not torch.isfinite(b).all()
            or not b.numel()
        ):
            continue
        error = (a.double() - b).abs()
        if at_zero and float(error.max()) > 0.05 * largest:
            least, most = _range_nearby(s, points, w, i)
            error = torch.maximum(torch.minimum(b, least) - a, a - torch.maximum(b, most))
        if float(error.max()) > 0.05 * largest:
            k = int(error.argmax())
            return f"the gradient of {name} is {a.flatten()[k]:.5g}, in float64 {b.flatten()[k]:.5g}"
    return ""


def _range_nearby(
    s: Subject, points: Sequence[Tensor], v: Sequence[Tensor | None], i: int
) -> tuple[Tensor, Tensor]:
    """The least and the largest gradient of point ``i`` where float32 can hardly tell the points from these."""
    found = []
    for seed in (81, 82, 83, 84):
        for side in (8, -8):
            reach = [side * torch.finfo(torch.float32).eps * p.abs().max() for p in points]
            noise = s.random_like(points, seed)
            near = s.allowed([p + h * n for p, h, n in zip(points, reach, noise, strict=True)])
            g = s.gradients(near, v)[i]
            found.append(torch.zeros_like(points[i]) if g is None else g)
    return torch.stack(found).amin(0), torch.stack(found).amax(0)


def _not_finite(t: Tensor) -> str:
    return "NaN" if bool(t.isnan().any()) else "infinite"


def _has_slope(s: Subject, points: Sequence[Tensor], i: int, g: Tensor) -> bool:
    """Whether differences in float64 find finite slopes, from both sides, where the gradient is not finite.

    At 0 a slope may show for tiny steps only, as of x / max(|x|, 1e-12).
    """
    at = int((~torch.isfinite(g)).reshape(-1).to(torch.int8).argmax())
    value = abs(points[i].reshape(-1)[at].item())
    scales = (1.0, 1e-8, 1e-16, 1e-24) if value == 0 else (max(1.0, value),)
    return any(_has_slope_within(s, points, i, at, scale, g.dtype) for scale in scales)


def _has_slope_within(
    s: Subject, points: Sequence[Tensor], i: int, at: int, scale: float, dtype: torch.dtype
) -> bool:
    direction = torch.zeros_like(points[i])
    direction.view(-1)[at] = scale
    direction = s.tangent(i, direction, points)
    if not bool(direction.any()):
        return False
    evaluate = s.along([direction if j == i else None for j in range(len(points))], points)
    if not bool(torch.isfinite(evaluate(0.0)).all()):
        return False
    noise = _numeric.noise(evaluate)
    for side in (1, -1):
        found = _numeric.one_sided(evaluate, side, noise, s.points[i].dtype)
        size = found.value.abs().nan_to_num(torch.inf)
        if (
            not bool((found.error <= 1e-3 * (scale + size)).all())
            or size.max() / scale > torch.finfo(dtype).max
        ):
            return False
    return True


def _second_in_float64(s: Subject, points: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
    leaves = s.at(points)
    y = s(*leaves)
    v = _weights(s, y)
    live = [
        g for g in s.pull_back(y, leaves, copies(v), create_graph=True) if g is not None and g.requires_grad
    ]
    return torch.autograd.grad([g.sum() for g in live], leaves, allow_unused=True) if live else None
