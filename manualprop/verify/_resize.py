"""The same call with other sizes, of a function of which nothing is known but that it runs.

Dimensions of equal length, over all tensors of the call, are taken to belong together, and change together.  Values
are drawn from the user's own: mixtures of two slices for what is differentiated, so that probabilities stay so and
nothing is equal by accident; whole slices for the rest, so that indices stay in range.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify._subject import Subject


class Axis(NamedTuple):
    """Dimensions that have one length and change it together."""

    length: int
    points: tuple[tuple[int, int], ...]  # (which point, which of its dimensions)
    others: tuple[tuple[int, int], ...]  # (which other argument, which of its dimensions)
    numbers: tuple[int, ...]  # arguments that are this length themselves: a normalized_shape

    @property
    def batch(self) -> bool:
        """Whether it is the first dimension wherever it is one."""
        return all(d == 0 for _, d in (*self.points, *self.others))


def aside(s: Subject, seed: int) -> Subject:
    """A little away from where it stands, so that no entry lies at a kink and no two are equal by accident."""
    scale = [0.01 * float(p.abs().max()) if p.numel() else 0.0 for p in s.points]
    noise = s.random_like(s.points, 900 + seed)
    return s.with_points([p + (k or 0.01) * d for p, k, d in zip(s.points, scale, noise, strict=True)])


def resized(s: Subject, axis: Axis, n: int, seed: int = 0) -> Subject:
    """The function with length ``n`` along ``axis``."""
    generator = torch.Generator().manual_seed(1000 * s.case.seed + seed)
    first, step = (torch.randint(k, (n,), generator=generator) for k in (axis.length, axis.length - 1 or 1))
    second = (first + step + 1) % axis.length  # another one, so that no two mixtures are equal
    weight = torch.rand(n, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    points, others = list(s.points), s.others()
    for i, d in axis.points:
        w = weight.to(points[i].dtype).view(-1, *[1] * (points[i].dim() - d - 1))
        other = points[i].index_select(d, second) * (1 - w) if axis.length > 1 else 0.0
        points[i] = points[i].index_select(d, first) * w + other
    for i, d in axis.others:
        t = others[i].index_select(d, first)
        is_index = t.dim() == 1 and not t.is_floating_point() and bool((others[i].diff() >= 0).all())
        others[i] = t.sort().values if is_index else t  # offsets ascend
    changed = {i: others[i] for i, _ in axis.others}
    result = s.with_points(points, others=changed)
    if axis.numbers:
        result._leaves = [n if i in axis.numbers else leaf for i, leaf in enumerate(result._leaves)]
    return result


def axes(s: Subject) -> Iterator[Axis]:
    """The axes along which the function runs with another length, the batch first."""
    found = []
    lengths = dict.fromkeys(k for t in [*s.points, *s.others().values()] for k in _shape(s, t) if k > 0)
    for length in lengths:
        for axis in _candidates(s, length):
            if (axis.points or axis.others) and runs(s, axis, length + 3):
                found.append(axis)
                break
    yield from sorted(found, key=lambda axis: not axis.batch)


def _shape(s: Subject, t: Tensor) -> list[int]:
    """Without the pairs of real and imaginary parts."""
    is_complex = any(p.complex and p.tensor is t for p in s._points)
    return list(t.shape)[: t.dim() - is_complex]


def _candidates(s: Subject, length: int) -> Iterator[Axis]:
    """All of a length; with the arguments that are it; the first dimensions only."""
    points = [(i, d) for i, p in enumerate(s.points) for d, k in enumerate(_shape(s, p)) if k == length]
    others = [(i, d) for i, t in s.others().items() for d, k in enumerate(t.shape) if k == length]
    numbers = [i for i, leaf in enumerate(s._leaves) if type(leaf) is int and leaf == length and length > 2]
    # A module's own parameters have the sizes that it was made with.
    given = [(i, d) for i, d in points if not isinstance(s._points[i].slot, str)]
    yield Axis(length, tuple(given), tuple(others), ())
    if numbers:
        yield Axis(length, tuple(given), tuple(others), tuple(numbers))
    yield Axis(
        length,
        tuple((i, d) for i, d in given if d == 0),
        tuple((i, d) for i, d in others if d == 0),
        (),
    )


def runs(s: Subject, axis: Axis, n: int) -> bool:
    """Whether forward accepts the length."""
    return refusal(s, axis, n) is None


def refusal(s: Subject, axis: Axis, n: int) -> Exception | None:
    """What forward raises at the length."""
    try:
        other = resized(s, axis, n)
        with torch.no_grad():
            other(*other.points)
    except Exception as error:  # whatever the checked code raises
        return error
    return None


class Cost(NamedTuple):
    """Of one evaluation."""

    bytes: int  # of the largest tensor that is kept or returned
    seconds: float


def cost(s: Subject) -> Cost:
    """What one forward takes."""
    sizes = [0]

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = s(*s.at())
    seconds = time.perf_counter() - start
    return Cost(max([*sizes, *(y.numel() * y.element_size() for y in outputs)]), seconds)
