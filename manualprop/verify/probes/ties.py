"""At ties and kinks: the gradient is one of those nearby, or between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from manualprop.verify import _numeric
from manualprop.verify._budget import LEAST, affordable, budget, work
from manualprop.verify._compare import wrong_in_first_order
from manualprop.verify._difference import sizes
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, passed, skipped
from manualprop.verify._subject import OutsideDomain, Subject
from manualprop.verify.probes._apart import multiples
from manualprop.verify.probes._runs import reference_of
from manualprop.verify.probes.dtypes import LOST

KINKS = (0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0)
NEAR = 1e-6
MANY = 40  # directions in which a point is looked at again: one of five equal entries is the middle one in each fifth
GIVEN = "the inputs given"


@probe()
def ties(s: Subject) -> Outcome:
    """At ties and kinks the gradient is one of those nearby, or between them: output by output, and as the reference's."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    if s.random:
        return skipped("it draws random numbers, and may draw others nearby")
    wrong = wrong_in_first_order(s)
    if wrong and not all(g is None or bool(torch.isfinite(g).all()) for g in s.plain):
        return skipped("not finite at the inputs given: see first_order")
    seen = met = 0
    everywhere = list(_tied(s))
    visited = affordable(s, everywhere, evaluations=60)
    spent = 0.0
    for where, tied in visited:
        if spent > budget(s) and seen >= LEAST:
            break
        try:
            points = s.allowed(tied)
            if not all(torch.isfinite(y).all() for y in s(*s.at(points))):
                continue
            around = _around(s, points)
            here = s.gradients(points)
            pole = max(sizes([g for near in around for g in near])) > 1e4 * (1 + max(sizes(s.plain)))
        except OutsideDomain:
            bad = _at_border(s, tied)
            if bad:
                return apart(
                    finding(f"at {where}: {bad}", "wrong only at the border of the domain"), "reference"
                )
            continue
        except Exception:  # not defined there, and it says so
            continue
        if pole:  # as of the inverse of a matrix with two equal rows, which the probe itself has made
            bad = _not_as_reference(s, points) if where == GIVEN and not wrong else ""
            kinked = False
        else:
            kinked = any(_spread(near) > 1e-3 for near in zip(*around, strict=True))
            bad = _beyond(s, points, here, around, kinked)
            if not wrong:
                bad = bad or _modes_differ(s, points, kinked) or _not_as_reference(s, points)
        seen += 1
        met += kinked
        hot = min(24, sum(y.numel() for y in s.outputs)) if kinked else 0
        spent += (20 + 40 * hot) * work(s)
        if bad:
            found = finding(f"at {where}: {bad}", "wrong only at ties and kinks")
            # Only of a multiple of the right gradient it is known what it should be here.
            independent = ["first_order"] if multiples(s) is not None else []
            return apart(found, *independent, *_apart_from(bad))
    left = len(everywhere) - (seen if spent > budget(s) and seen >= LEAST else len(visited))
    more = f"; {left} more points were left out" if left else ""
    return passed(f"{seen} points with ties, {met} of them at kinks: gradients as nearby{more}")


def _apart_from(bad: str) -> Iterator[str]:
    """The probes that would have found something else."""
    if "NaN" not in bad and "infinite" not in bad:
        yield "extremes"
    if "reference" not in bad:
        yield "reference"
    if "forward mode" not in bad:
        yield "forward_mode"


def _tied(s: Subject) -> Iterator[tuple[str, list[Tensor]]]:
    """The points with equal entries, with two inputs or their first rows equal, or with an entry at a usual kink."""

    def replaced(i: int, value: Tensor) -> list[Tensor]:
        return [value if j == i else q for j, q in enumerate(s.points)]

    yield GIVEN, list(s.points)
    for i, p in enumerate(s.points):
        for d in range(p.dim()):
            if p.shape[d] > 1:
                tied = p.clone()
                tied.select(d, 1).copy_(p.select(d, 0))
                yield f"ties along dim {d} of {s.names[i]}", replaced(i, tied)
            if p.shape[d] > 2:  # an index may group entries that are no neighbours
                equal = p.narrow(d, 0, 1).expand_as(p).clone()
                yield f"{s.names[i]} equal along all of dim {d}", replaced(i, equal)
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
            other = s.points[j]
            if other.shape == p.shape and p.numel():
                yield f"{s.names[i]} = {s.names[j]}", replaced(i, other.clone())
            elif p.numel() and other.numel() and p.shape[-1:] == other.shape[-1:] != ():
                value = p.clone()
                value.view(-1)[: p.shape[-1]] = other.reshape(-1)[: p.shape[-1]]
                yield f"the first row of {s.names[i]} that of {s.names[j]}", replaced(i, value)


def _around(
    s: Subject,
    points: Sequence[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    toward: Sequence[tuple[int, int]] = (),
    count: int = 8,
    border: bool = False,
) -> list[list[Tensor]]:
    """Gradients at points close by, in opposite pairs, so that each tie is broken both ways.

    At the ``border`` of the domain, those that are inside.  Besides random directions, those in which one entry
    ``toward`` (of which point, which entry) goes up or down.
    """
    found: list[list[Tensor]] = []
    for k in range(count + len(toward)):
        aside = [(d.abs() + 0.1) * d.sign() for d in s.random_like(points, 41 + k)]
        if k >= count:
            i, entry = toward[k - count]
            aside = [0.01 * d for d in aside]
            aside[i].view(-1)[entry] = 1.0
        for side in (NEAR, -NEAR):
            near = [p + side * d for p, d in zip(points, aside, strict=True)]
            try:
                found.append(_dense(s, s.gradients(s.allowed(near), cotangents)))
            except OutsideDomain:
                if not border:
                    raise
    return found


def _at_border(s: Subject, tied: Sequence[Tensor]) -> str:
    """Which gradient is NaN at a point of the domain with some points nearby outside, or nothing.

    The slopes inside do not bound the gradient there.
    """
    try:
        points = s.allowed(tied)
        if not all(torch.isfinite(y).all() for y in s(*s.at(points))):
            return ""
        bad = _not_finite(s, _dense(s, s.gradients(points)), _around(s, points, border=True))
        return bad if "NaN" in bad else ""  # infinite it may be, as of a square root at 0
    except Exception:  # outside of the domain itself, or not defined there
        return ""


def _not_finite(s: Subject, gradients: Sequence[Tensor], around: Sequence[Sequence[Tensor]]) -> str:
    """Which gradient is not finite where all those nearby are, or nothing."""
    for i, (name, g) in enumerate(zip(s.names, gradients, strict=True)):
        near = [grads[i] for grads in around]
        if near and not torch.isfinite(g).all() and all(torch.isfinite(n).all() for n in near):
            return f"the gradient of {name} is {'NaN' if bool(g.isnan().any()) else 'infinite'}, nearby it is finite"
    return ""


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
    bad = _not_finite(s, gradients, around)
    if bad:
        return bad
    if not kinked:
        return _outside(s, gradients, around)
    # Each output breaks its ties for itself: only one by one must a gradient lie between those nearby.
    outputs = s(*s.at(points))
    for v in _one_hot(s, outputs):
        close = _around(s, points, v)
        if all(_spread(n) <= 1e-3 for n in zip(*close, strict=True)):
            continue
        here_v = _dense(s, s.gradients(points, v))
        if _outside(s, here_v, close):
            # Look at more points nearby, also toward the entries that move, before it is called outside.
            bad = _outside(s, here_v, [*close, *_around(s, points, v, _moving(s, [*close, here_v]), MANY)])
            if bad:
                return bad
    return ""


def _moving(s: Subject, around: Sequence[Sequence[Tensor]], most: int = 16) -> list[tuple[int, int]]:
    """The entries whose gradients differ nearby: which point, which entry of it."""
    found = []
    for i in range(len(s.points)):
        stack = torch.stack([grads[i].reshape(-1) for grads in around])
        spread = (stack.amax(0) - stack.amin(0)).nan_to_num(0, 0, 0)
        scale = stack.abs().nan_to_num(0, 0, 0).max().item() if stack.numel() else 0.0
        found += [(i, int(k)) for k in (spread > 1e-3 * scale).nonzero().flatten()]
    return found[:most]


def _one_hot(s: Subject, outputs: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Cotangents for one entry of the outputs at a time."""
    most = 8 if s.quick else 24
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
    low, high, slack = _range(near)
    bad = (flat < low - slack) | (flat > high + slack)
    if bool(bad.any()):
        at = int(bad.to(torch.int8).argmax())
        return f"the gradient of {_which(s, at)} is {flat[at]:.4g}, nearby it is from {low[at]:.4g} to {high[at]:.4g}"
    least, most, spare = (t.item() for t in _range(near.sum(1, keepdim=True)))
    spare += 1e-6 * near.abs().sum(1).max().item()  # a sum may cancel to rounding, as of differences
    total = flat.sum().item()
    if not least - spare <= total <= most + spare:
        return f"the gradient's entries sum to {total:.4g}, nearby to {least:.4g} up to {most:.4g}"
    return ""


def _range(near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column the least, the largest, and by how much more a gradient may lie outside of them.

    Nothing where there are two slopes, as of a ReLU or a maximum.  A quarter of the range where there are more, as where
    several ties meet: some dozens of points nearby do not show all of it.
    """
    low, high = near.amin(0), near.amax(0)
    scale = near.abs().max().item() + 1e-12
    close = 1e-3 * scale
    two = ((near - low).abs() <= close) | ((near - high).abs() <= close)
    return low, high, close + torch.where(two.all(0), 0.0, 0.25 * (high - low))


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
    directions = [s.tangent(i, d, points) for i, d in enumerate(s.random_like(points, 51))]
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
    other = reference_of(s)
    if other is None:
        return ""
    theirs = _dense(other, other.gradients(points, s.cotangents))
    for name, a, b in zip(s.names, _dense(s, s.gradients(points)), theirs, strict=True):
        if not b.numel() or not bool(torch.isfinite(b).all()):
            continue
        if not bool(((a - b).abs() <= 1e-6 * b.abs().max().item() + 1e-9).all()):
            at = int((a - b).abs().nan_to_num(torch.inf).argmax())
            return f"the gradient of {name} is {a.flatten()[at]:.5g}, the reference's {b.flatten()[at]:.5g}"
    return ""
