"""What the numbers are: dtypes, autocast, extreme values, ties and kinks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from manualprop.verify import _numeric
from manualprop.verify._compare import compare
from manualprop.verify._difference import listed, sizes
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, limit, message, passed, skipped
from manualprop.verify._subject import Subject, is_float

LOST = "no output requires grad: see output_requires_grad"
LOW = (torch.float32, torch.bfloat16, torch.float16)

# How many roundings of the working dtype, relative to a tensor's largest entry, a right gradient may be off by.
# In half precision a formula spelled in it rounds at each of a dozen steps; in float32 sums over many rows do.
ROUNDINGS = {torch.float32: 1000.0, torch.bfloat16: 16.0, torch.float16: 32.0}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor rounded to ``dtype``, in its own; anything else as it is."""
    if not is_float(value) or value.is_complex():
        return value
    return value.detach().to(dtype).to(value.dtype).requires_grad_(value.requires_grad)


# ----- dtypes -----


class Lowered(NamedTuple):
    """The function in a lower dtype, and in float64 at the very same numbers."""

    low: Subject
    high: Subject


def _lowered(s: Subject, dtype: torch.dtype) -> Lowered:
    args, kwargs = tree_map(lambda t: _cast(t, dtype), (tuple(s.case.args), dict(s.case.kwargs)))
    case = dataclasses.replace(s.case, args=args, kwargs=kwargs)
    low, high = Subject(case, dtype), Subject(case, s.dtype)
    low._not_leaf = high._not_leaf = s._not_leaf
    return Lowered(
        low, high.with_points([p.to(q.dtype) for p, q in zip(low.points, high.points, strict=True)])
    )


def _allowed(
    high: Subject, v: Sequence[Tensor | None], plain: Sequence[Tensor | None], eps: float
) -> list[Tensor]:
    """How far each gradient moves, at most, when every number that goes in is rounded once: entry by entry."""
    moved = [torch.zeros_like(p) for p in high.points]
    for seed in (31, 32, 33, 34):
        noise = high.random_like([*high.points, *[t for t in v if t is not None]], seed)
        shaken = [p * (1 + eps * n.clamp(-2, 2)) for p, n in zip(high.points, noise, strict=False)]
        rest = iter(noise[len(shaken) :])
        w = [None if t is None else t * (1 + eps * next(rest).clamp(-2, 2)) for t in v]
        for i, (a, b) in enumerate(zip(high.gradients(shaken, w), plain, strict=True)):
            if a is not None and b is not None:
                moved[i] = torch.maximum(moved[i], (a - b).abs().nan_to_num(torch.inf))
    return moved


@probe()
def dtypes(s: Subject) -> Outcome:
    """Gradients in float32, bfloat16 and float16 against float64 at the same numbers; and whether float64 is float64."""
    if s.dtype != torch.float64:
        return limit("float64 is refused, so there is nothing to hold lower dtypes against")
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    wrong, refused, seen = [], [], []
    rough = _float32_inside(s)
    if rough:
        wrong.append(("float64", rough))
    for dtype in LOW:
        name = _short(dtype)
        lowered = _lowered(s, dtype)
        try:
            y = lowered.low(*lowered.low.at())
        except Exception as error:  # whatever the checked code refuses with
            refused.append(f"{name}: {message(error)}")
            continue
        evidence = _in_dtype(lowered, y, dtype)
        seen.append(name)
        if evidence:
            wrong.append((name, evidence))
    if wrong:
        name, evidence = wrong[0]
        return finding(f"{name}: {evidence}", f"wrong only in dtype {listed([n for n, _ in wrong])}")
    if refused and not seen:
        return limit("; ".join(refused))
    return passed(
        f"{', '.join(seen)} agree with float64" + (f"; refused: {'; '.join(refused)}" if refused else "")
    )


def _in_dtype(lowered: Lowered, y: Sequence[Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the gradients in ``dtype``, or nothing."""
    high = lowered.high
    expected_y = high(*high.at())
    if len(y) != len(expected_y) or any(a.shape != b.shape for a, b in zip(y, expected_y, strict=False)):
        return "the outputs have other shapes than in float64"
    if not all(torch.isfinite(a).all() for a in y):
        return ""  # beyond the range of the dtype already in forward: nothing is promised
    forward = max((_relative(a, b) for a, b in zip(y, expected_y, strict=True)), default=0.0)
    # Random ones, and ones: a sum of many of the same sign stands still where it is rounded at each addition.
    for steady in (False, True):
        cotangents = [torch.ones_like(t) for t in expected_y] if steady else high.cotangents_for(expected_y)
        v = [c.to(a.dtype) if a.requires_grad else None for a, c in zip(y, cotangents, strict=True)]
        evidence = _off(lowered, v, forward, dtype, steady)
        if evidence:
            return evidence
    return ""


def _off(
    lowered: Lowered, v: Sequence[Tensor | None], forward: float, dtype: torch.dtype, steady: bool
) -> str:
    """How far the gradients for ``v`` are off, or nothing; ``forward`` is the relative error of the outputs."""
    low, high = lowered
    eps = torch.finfo(dtype).eps
    exact = [None if c is None else c.double() for c in v]
    leaves = low.at()
    try:
        found = low.pull_back(low(*leaves), leaves, v)
    except NotImplementedError:  # an operation that torch does not have in this dtype
        return ""
    except Exception as error:  # whatever the checked code raises
        return f"forward accepts it, backward raises {message(error)}"
    expected = high.gradients(cotangents=exact)
    slack = _allowed(high, exact, expected, eps)
    # What cancels is as rough as its terms, and these are as large as what arrives.
    largest = max([*sizes(expected), *sizes(high.plain), *sizes(exact)])
    for name, a, b, moved in zip(low.names, found, expected, slack, strict=True):
        if a is None or b is None or not b.numel() or not torch.isfinite(b).all():
            continue
        scale = b.abs().max().item()
        if scale > torch.finfo(dtype).max:
            continue
        if not torch.isfinite(a).all():
            return f"the gradient of {name} is not finite, in float64 it is at most {scale:.4g}"
        scale = max(scale, largest if steady else 0.01 * largest)
        allowed = max(ROUNDINGS[dtype] * eps, 8 * forward) * scale + 8 * moved + torch.finfo(dtype).tiny
        off = (a.double() - b).abs()
        if bool((off > allowed).any()):
            at = int((off - allowed).argmax())
            got, want = a.flatten()[at].item(), b.flatten()[at].item()
            return f"the gradient of {name} is {got:.5g} instead of {want:.5g}, where its largest entry is {scale:.4g}"
    return ""


def _relative(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().item() if b.numel() else 0.0
    return (a.double() - b).abs().max().item() / scale if scale else 0.0


def _float32_inside(s: Subject) -> str:
    """Whether the value is exact in float64 and the gradient is not: a constant or a cast in float32."""
    if s.precision > 1e-8:
        return ""  # the whole function works in less: judged as that
    worst = ""
    for points in (
        s.points,
        [p + 1e-3 * n for p, n in zip(s.points, s.random_like(s.points, 35), strict=True)],
    ):
        worst = ""
        for c in compare(s.with_points(points)):
            if not c.numeric.numel() or c.wrong.any():
                continue  # wrong altogether: the business of first_order
            scale = c.numeric.abs().nan_to_num(0).max().item()
            doubt = (c.tolerance - s.case.atol - s.case.rtol * scale) / 4
            off = (c.hand - c.numeric).abs().where(c.measured & (doubt < 1e-11 * max(scale, 1e-3)), 0)
            if bool((off > 1e-9 * scale + 40 * doubt.nan_to_num(0, 0, 0)).any()):
                worst = f"the gradient of {s.names[c.point]} is off by {off.max().item():.2g}: float32 in backward?"
                break
        if not worst:
            return ""
    return worst


# ----- autocast -----


@probe()
def autocast(s: Subject) -> Outcome:
    """Forward under bfloat16 autocast and backward outside of it, as in training, against the plain run."""
    low, high = _lowered(s, torch.float32)
    device = low.points[0].device.type
    try:
        plain_y = low(*low.at())
    except Exception as error:  # whatever the checked code refuses with
        return limit(f"float32: {message(error)}")
    if not any(y.requires_grad for y in plain_y):
        return skipped(LOST)
    leaves = low.at()
    try:
        with torch.autocast(device, torch.bfloat16):
            y = low(*leaves)
    except Exception as error:  # whatever the checked code refuses with
        return limit(message(error))
    v = [
        c.to(a.dtype) if a.requires_grad else None
        for a, c in zip(y, low.cotangents_for(plain_y), strict=True)
    ]
    try:
        found = low.pull_back(y, leaves, v)
    except Exception as error:  # whatever the checked code raises
        return limit(f"forward accepts it, backward raises {message(error)}")
    exact = [None if c is None else c.to(high.points[0].dtype) for c in v]
    expected = high.gradients(cotangents=exact)
    eps = torch.finfo(torch.bfloat16).eps
    slack = _allowed(high, exact, expected, eps)
    forward = max((_relative(a, b) for a, b in zip(y, high.outputs, strict=True)), default=0.0)
    for name, a, b, moved in zip(low.names, found, expected, slack, strict=True):
        if (a is None) != (b is None):
            return finding(
                f"the gradient of {name} is {'lost' if a is None else 'found only'} under autocast"
            )
        if a is None or b is None or not b.numel() or not torch.isfinite(b).all():
            continue
        scale = b.abs().max().item()
        off = (a.double() - b.double()).abs()
        allowed = max(ROUNDINGS[torch.bfloat16] * eps, 8 * forward) * scale + 8 * moved + 1e-30
        if not bool((off <= allowed).all()):
            at = int((off - allowed).nan_to_num(torch.inf).argmax())
            got, want = a.flatten()[at].item(), b.flatten()[at].item()
            return finding(
                f"the gradient of {name} is {got:.5g} instead of {want:.5g}",
                "wrong only in dtype bfloat16 of autocast",
            )
    return passed("agrees with the plain run to the accuracy of bfloat16")


# ----- extreme values -----

BUDGET = 1.0  # seconds for the points of one probe; a large module takes long for each
EXTREMES = (0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 90.0, -90.0, 800.0, -800.0, 1e4, -1e4, 1e30, -1e30)


@probe()
def extremes(s: Subject) -> Outcome:
    """Where the value is finite and has a slope, so has the gradient: 0, 1e-30, 20, 90, 800, 1e4, 1e30 and negative."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    seen = left = 0
    start = time.perf_counter()
    for dtype in (s.points[0].dtype, torch.float32):
        subject = s if dtype == s.points[0].dtype else _lowered(s, dtype).low
        for where, value, points in _with_extremes(subject):
            if time.perf_counter() - start > BUDGET:
                left += 1
                continue
            try:
                bad = _at_extreme(s, subject, points, second=value == 0 or 1 <= abs(value) <= 1e4)
            except Exception:  # not defined there, and it says so
                continue
            seen += 1
            if bad:
                only = "" if subject is s else f"wrong only in dtype {_short(dtype)}, "
                return finding(f"{bad} at {where}", f"{only}only at extreme values")
    return passed(f"finite at {seen} points where the value is{_unseen(left)}")


def _unseen(left: int) -> str:
    return f"; {left} more were left out after {BUDGET:g} s" if left else ""


def _with_extremes(s: Subject) -> Iterator[tuple[str, float, list[Tensor]]]:
    """The points with one entry, or one row, of one input at an extreme value, which is given too."""
    for i, p in enumerate(s.points):
        if not p.numel():
            continue
        for value in EXTREMES:
            one = p.clone()
            one.view(-1)[p.numel() // 2] = value
            yield (
                f"{s.names[i]} with an entry {value:g}",
                value,
                [one if j == i else q for j, q in enumerate(s.points)],
            )
        if p.dim():
            row = p.clone()
            row[0] = 0.0
            yield f"{s.names[i]}[0] = 0", 0.0, [row if j == i else q for j, q in enumerate(s.points)]


def _at_extreme(s: Subject, subject: Subject, points: Sequence[Tensor], second: bool) -> str:
    """What is not finite though it should be, or nothing; in the ``second`` derivative too, if that is asked."""
    leaves = subject.at(points)
    y = subject(*leaves)
    if not all(torch.isfinite(t).all() for t in y):
        return ""
    v = [c if t.requires_grad else None for t, c in zip(y, subject.cotangents_for(y), strict=True)]
    try:
        first = subject.pull_back(y, leaves, v, create_graph=True)
    except Exception:  # no second order: the first alone
        leaves = subject.at(points)
        first = subject.pull_back(subject(*leaves), leaves, v)
    for i, g in enumerate(first):
        if g is not None and not torch.isfinite(g).all() and _has_slope(s, subject, points, i, g):
            return (
                f"the gradient of {subject.names[i]} is {_not_finite(g)}, the value is finite and has a slope"
            )
    live = [g for g in first if g is not None and g.requires_grad and torch.isfinite(g).all()]
    if not live or not second or subject is s:  # in float64 there is nothing to hold it against
        return ""
    try:
        curvature = torch.autograd.grad([g.sum() for g in live], leaves, allow_unused=True)
    except Exception:  # refused: the business of second_order
        return ""
    for i, h in enumerate(curvature):
        if h is None or torch.isfinite(h).all():
            continue
        exact = (_second_in_float64(s, points) or [None] * len(points))[i]
        if exact is not None and bool((exact.abs() < torch.finfo(h.dtype).max).all()):
            return f"the second derivative in {subject.names[i]} is {_not_finite(h)}, in float64 it is finite"
    return ""


def _not_finite(t: Tensor) -> str:
    return "NaN" if bool(t.isnan().any()) else "infinite"


def _has_slope(s: Subject, subject: Subject, points: Sequence[Tensor], i: int, g: Tensor) -> bool:
    """Whether differences in float64 find finite slopes, from both sides, where the gradient is not finite."""
    exact = [p.to(q.dtype) for p, q in zip(points, s.points, strict=True)]
    at = int((~torch.isfinite(g)).reshape(-1).to(torch.int8).argmax())
    scale = max(1.0, exact[i].reshape(-1)[at].abs().item())
    direction = torch.zeros_like(exact[i])
    direction.view(-1)[at] = scale
    evaluate = s.along([direction if j == i else None for j in range(len(exact))], exact)
    if not bool(torch.isfinite(evaluate(0.0)).all()):
        return False
    noise = _numeric.noise(evaluate)
    for side in (1, -1):
        slope = _numeric.one_sided(evaluate, side, noise, s.points[i].dtype)
        size = slope.value.abs().nan_to_num(torch.inf)
        if (
            not bool((slope.error <= 1e-3 * (1 + size)).all())
            or size.max() / scale > torch.finfo(g.dtype).max
        ):
            return False
    return True


def _second_in_float64(s: Subject, points: Sequence[Tensor]) -> Sequence[Tensor | None] | None:
    leaves = s.at([p.to(q.dtype) for p, q in zip(points, s.points, strict=True)])
    y = s(*leaves)
    v = [c if t.requires_grad else None for t, c in zip(y, s.cotangents_for(y), strict=True)]
    live = [g for g in s.pull_back(y, leaves, v, create_graph=True) if g is not None and g.requires_grad]
    return torch.autograd.grad([g.sum() for g in live], leaves, allow_unused=True) if live else None


# ----- ties and kinks -----

KINKS = (0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0)
NEAR = 1e-6


@probe()
def ties(s: Subject) -> Outcome:
    """At ties and kinks the gradient is one of those nearby, or between them: output by output, and as the reference's."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    if s.random:
        return skipped("it draws random numbers, and may draw others nearby")
    seen = met = left = 0
    start = time.perf_counter()
    for where, points in _tied(s):
        if time.perf_counter() - start > BUDGET:
            left += 1
            continue
        try:
            if not all(torch.isfinite(y).all() for y in s(*s.at(points))):
                continue
            around = _around(s, points)
            if max(sizes([g for near in around for g in near])) > 1e4 * (1 + max(sizes(s.plain))):
                continue  # a pole, as of the inverse of a matrix with two equal rows, or nearly one
            here = s.gradients(points)
        except Exception:  # not defined there, and it says so
            continue
        seen += 1
        kinked = any(_spread(near) > 1e-3 for near in zip(*around, strict=True))
        met += kinked
        bad = (
            _beyond(s, points, here, around, kinked)
            or _modes_differ(s, points, kinked)
            or _not_as_reference(s, points)
        )
        if bad:
            return finding(f"at {where}: {bad}", "wrong only at ties and kinks")
    return passed(f"{seen} points with ties, {met} of them at kinks: gradients as nearby{_unseen(left)}")


def _tied(s: Subject) -> Iterator[tuple[str, list[Tensor]]]:
    """The points with two entries equal, with two inputs equal, or with an entry at a usual kink."""

    def replaced(i: int, value: Tensor) -> list[Tensor]:
        return [value if j == i else q for j, q in enumerate(s.points)]

    yield "the inputs given", list(s.points)
    for i, p in enumerate(s.points):
        for d in range(p.dim()):
            if p.shape[d] > 1:
                tied = p.clone()
                tied.select(d, 1).copy_(p.select(d, 0))
                yield f"ties along dim {d} of {s.names[i]}", replaced(i, tied)
        if p.dim() and p.numel():
            value = p.clone()
            value[0] = 0.0
            yield f"{s.names[i]}[0] = 0", replaced(i, value)
        for kink in KINKS:
            if p.numel():
                value = p.clone()
                value.view(-1)[0] = kink
                yield f"an entry {kink:g} in {s.names[i]}", replaced(i, value)
        for j in range(i):
            if s.points[j].shape == p.shape and p.numel():
                yield f"{s.names[i]} = {s.names[j]}", replaced(i, s.points[j].clone())


def _around(
    s: Subject, points: Sequence[Tensor], cotangents: Sequence[Tensor | None] | None = None
) -> list[list[Tensor]]:
    """Gradients at points close by, in opposite pairs, so that each tie is broken both ways."""
    found = []
    for seed in range(41, 49):
        aside = s.random_like(points, seed)
        for side in (NEAR, -NEAR):
            near = [p + side * (d.abs() + 0.1) * d.sign() for p, d in zip(points, aside, strict=True)]
            found.append(_dense(s, s.gradients(near, cotangents)))
    return found


def _dense(s: Subject, grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, s.points, strict=True)]


def _spread(near: Sequence[Tensor]) -> float:
    """By how much gradients nearby differ, relative to the largest."""
    stack = torch.stack(list(near))
    if not stack.numel():
        return 0.0
    scale = stack.abs().nan_to_num(0, 0, 0).max().item()
    return float((stack.amax(0) - stack.amin(0)).nan_to_num(0, 0, 0).max()) / scale if scale else 0.0


def _beyond(
    s: Subject,
    points: Sequence[Tensor],
    here: Sequence[Tensor | None],
    around: Sequence[Sequence[Tensor]],
    kinked: bool,
) -> str:
    """How the gradient at a point lies outside of those nearby, or nothing."""
    gradients = _dense(s, here)
    for i, (name, g) in enumerate(zip(s.names, gradients, strict=True)):
        near = [grads[i] for grads in around]
        if not torch.isfinite(g).all() and all(torch.isfinite(n).all() for n in near):
            return f"the gradient of {name} is {_not_finite(g)}, nearby it is finite"
    if not kinked:
        return _outside(s, gradients, around)
    # Each output breaks its ties for itself: only one by one must a gradient lie between those nearby.
    outputs = s(*s.at(points))
    for v in _one_hot(s, outputs):
        close = _around(s, points, v)
        if all(_spread(n) <= 1e-3 for n in zip(*close, strict=True)):
            continue
        bad = _outside(s, _dense(s, s.gradients(points, v)), close)
        if bad:
            return bad
    return ""


def _one_hot(s: Subject, outputs: Sequence[Tensor], most: int = 24) -> Iterator[list[Tensor | None]]:
    """Cotangents for one entry of the outputs at a time."""
    for k, y in enumerate(outputs):
        if not y.requires_grad:
            continue
        step = max(1, y.numel() // most)
        for j in range(0, y.numel(), step):
            v = torch.zeros(y.numel(), dtype=y.dtype, device=y.device)
            v[j] = 1.0
            v = v.view(y.shape)
            yield [v if i == k else None for i in range(len(outputs))]


def _outside(s: Subject, here: Sequence[Tensor], around: Sequence[Sequence[Tensor]]) -> str:
    """Which entry, or which sum of entries, is above or below all of those nearby."""
    flat = _numeric.flat(here)
    near = torch.stack([_numeric.flat(n) for n in around])
    if not flat.numel() or not bool(torch.isfinite(near).all()):
        return ""
    scale = near.abs().max().item() + 1e-12
    # Beyond those seen by a quarter of their range: sixteen points nearby do not show the whole range.
    low, high = near.amin(0), near.amax(0)
    slack = 1e-3 * scale + 0.25 * (high - low)
    bad = (flat < low - slack) | (flat > high + slack)
    if bool(bad.any()):
        at = int(bad.to(torch.int8).argmax())
        return f"the gradient of {_which(s, at)} is {flat[at]:.4g}, nearby it is from {low[at]:.4g} to {high[at]:.4g}"
    total, least, most = flat.sum().item(), near.sum(1).min().item(), near.sum(1).max().item()
    spare = 1e-3 * scale + 0.25 * (most - least)
    if not least - spare <= total <= most + spare:
        return f"the gradient's entries sum to {total:.4g}, nearby to {least:.4g} up to {most:.4g}"
    return ""


def _which(s: Subject, at: int) -> str:
    for name, p in zip(s.names, s.points, strict=True):
        if at < p.numel():
            index = [int(k) for k in torch.unravel_index(torch.tensor(at), p.shape)] if p.dim() else []
            return f"{name}{index}" if index else name
        at -= p.numel()
    raise AssertionError("beyond the last entry")


def _modes_differ(s: Subject, points: Sequence[Tensor], kinked: bool) -> str:
    """Whether forward mode takes another slope than backward at the same kink."""
    if not kinked:
        return ""
    directions = s.random_like(points, 51)
    try:
        with forward_ad.dual_level():
            y = s(
                *(
                    forward_ad.make_dual(p.detach().clone(), d)
                    for p, d in zip(points, directions, strict=True)
                )
            )
            tangents = [forward_ad.unpack_dual(t).tangent for t in y]
    except Exception:  # refused: the business of forward_mode
        return ""
    for v in _one_hot(s, s(*s.at(points))):
        forward = sum(
            (
                (t * c).sum().item()
                for t, c in zip(tangents, v, strict=True)
                if t is not None and c is not None
            ),
            0.0,
        )
        terms = [
            (g * d).sum().item() for g, d in zip(_dense(s, s.gradients(points, v)), directions, strict=True)
        ]
        reverse, size = sum(terms), sum(map(abs, terms)) + abs(forward) + 1e-12
        if all(t is None for t in tangents):
            return ""
        if not abs(forward - reverse) <= 1e-3 * size:
            return f"forward mode gives a slope of {forward:.4g}, backward {reverse:.4g}"
    return ""


def _not_as_reference(s: Subject, points: Sequence[Tensor]) -> str:
    """How the gradient differs from the reference's at the same point, or nothing."""
    if s.case.reference is None:
        return ""
    other = Subject(dataclasses.replace(s.case, fn=s.case.reference), s.dtype)
    if [p.shape for p in other.points] != [p.shape for p in s.points]:
        return ""
    theirs = _dense(other, other.gradients(points, s.cotangents))
    for name, a, b in zip(s.names, _dense(s, s.gradients(points)), theirs, strict=True):
        scale = b.abs().max().item() if b.numel() else 0.0
        if b.numel() and not bool(((a - b).abs() <= 1e-6 * scale + 1e-9).all()):
            at = int((a - b).abs().argmax())
            return f"the gradient of {name} is {a.flatten()[at]:.5g}, the reference's {b.flatten()[at]:.5g}"
    return ""
