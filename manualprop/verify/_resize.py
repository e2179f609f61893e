"""Call a function with other sizes, when only one working call is known.

All dimensions of equal length in the call change together.  New values come from the user's own.  For differentiated
tensors they are mixtures of two slices: probabilities stay probabilities, and no two entries are equal by accident.  For
other tensors they are whole slices, so indices stay in range.  If the case has ``inputs``, it makes the values.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify._budget import work
from manualprop.verify._random import generator
from manualprop.verify._subject import OutsideDomain, Subject


class Axis(NamedTuple):
    """Dimensions of one length, which change together."""

    length: int
    points: tuple[tuple[int, int], ...]  # (which point, which of its dimensions)
    others: tuple[tuple[int, int], ...]  # (which other argument, which of its dimensions)
    numbers: tuple[int, ...]  # integer arguments equal to the length, as a normalized_shape
    size: str = ""  # if the case has ``inputs``: the name of the size

    @property
    def batch(self) -> bool:
        """Whether it is the first dimension of every tensor that has it."""
        return not self.size and all(d == 0 for _, d in (*self.points, *self.others))


def aside(s: Subject, seed: int) -> Subject:
    """The function at points close by: no entry lies at a kink, and no two are equal by accident."""
    scale = [0.01 * float(p.abs().max()) if p.numel() else 0.0 for p in s.points]
    noise = s.random_like(s.points, 900 + seed)
    return s.with_points(
        s.allowed([p + (k or 0.01) * d for p, k, d in zip(s.points, scale, noise, strict=True)])
    )


def resized(s: Subject, axis: Axis, n: int, seed: int = 0) -> Subject:
    """The function with length ``n`` along ``axis``.

    Raises:
        OutsideDomain: if unique integers would have to repeat, or if the case's domain says no.
    """
    if axis.size:
        return _made(s, axis, n, seed)
    source = generator("resized", s.case.seed, seed)
    first, step = (torch.randint(k, (n,), generator=source) for k in (axis.length, axis.length - 1 or 1))
    second = (first + step + 1) % axis.length  # a different slice: no two mixtures are equal
    weight = torch.rand(n, generator=source, dtype=torch.float64) * 0.8 + 0.1
    points, others = list(s.points), s.others()
    for i, d in axis.points:
        w = weight.to(points[i].dtype).view(-1, *[1] * (points[i].dim() - d - 1))
        other = points[i].index_select(d, second) * (1 - w) if axis.length > 1 else 0.0
        points[i] = points[i].index_select(d, first) * w + other
    for i, d in axis.others:
        if never_repeats(s, i, others[i]):
            others[i] = _unique(others[i], n, source)
            continue
        t = others[i].index_select(d, first)
        is_index = t.dim() == 1 and not t.is_floating_point() and bool((others[i].diff() >= 0).all())
        others[i] = t.sort().values if is_index else t  # offsets ascend
    return _with_axis(s, axis, n, points, {i: others[i] for i, _ in axis.others})


def repeated_rows(s: Subject, axis: Axis, n: int) -> tuple[Subject, Tensor]:
    """The function with its own slices along ``axis``, in order and repeated up to length ``n``; and which they are.

    Raises:
        OutsideDomain: as :func:`resized`, and where the case's ``inputs`` makes the values.
    """
    if axis.size or any(never_repeats(s, i, s.others()[i]) for i, _ in axis.others):
        raise OutsideDomain("its rows cannot be repeated")
    place = torch.arange(n) % axis.length
    points, others = list(s.points), s.others()
    for i, d in axis.points:
        points[i] = points[i].index_select(d, place)
    for i, d in axis.others:
        others[i] = others[i].index_select(d, place)
    return _with_axis(s, axis, n, points, {i: others[i] for i, _ in axis.others}), place


def _with_axis(
    s: Subject, axis: Axis, n: int, points: Sequence[Tensor], changed: dict[int, Tensor]
) -> Subject:
    """The function with these values, of length ``n`` along ``axis``."""
    result = s.with_points(points, others=changed)
    if axis.numbers:
        result._leaves = [n if i in axis.numbers else leaf for i, leaf in enumerate(result._leaves)]
    near = result.allowed(result.points)
    return (
        result if all(a is b for a, b in zip(near, result.points, strict=True)) else result.with_points(near)
    )


def _made(s: Subject, axis: Axis, n: int, seed: int) -> Subject:
    """The function at inputs of that size, made by the case."""
    case = dataclasses.replace(s.case, seed=s.case.seed + seed)
    other = Subject(dataclasses.replace(case, args=case.made(**{axis.size: n})), s.dtype)
    other._not_leaf, other._relative_noise, other._multiples = s._not_leaf, s._relative_noise, s._multiples
    other.allowed(other.points)
    return other


def has_repeats(t: Tensor) -> bool:
    """Whether some value occurs twice."""
    return bool(t.unique().numel() < t.numel())


def never_repeats(s: Subject, i: int, t: Tensor) -> bool:
    """Whether an argument must hold no integer twice, as its author says or as was found."""
    if not is_integer(t):
        return False
    return i in s._unique or s.name_of_leaf(i) in s.case.unique


def repeated(t: Tensor) -> Tensor:
    """The first half of the integers, twice."""
    flat = t.flatten().clone()
    flat[len(flat) // 2 :] = flat[: len(flat) - len(flat) // 2].clone()
    return flat.reshape(t.shape)


def is_integer(t: Tensor) -> bool:
    return not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool


def _unique(t: Tensor, n: int, source: torch.Generator) -> Tensor:
    """``n`` different integers in the range of ``t``.  A permutation stays one."""
    if t.dim() != 1:
        raise OutsideDomain("no other size can be made up for a table of different integers")
    high = n if bool((t.sort().values == torch.arange(len(t), device=t.device)).all()) else int(t.max()) + 1
    if n > high:
        raise OutsideDomain(f"there are no {n} different integers below {high}")
    drawn = torch.randperm(high, generator=source)[:n]
    drawn = drawn.sort().values if bool((t.diff() > 0).all()) and len(t) > 1 else drawn
    return drawn.to(t.device, t.dtype)


def axes(s: Subject) -> Iterator[Axis]:
    """The axes along which the function accepts another length, the batch first."""
    if s.case.inputs is not None and s.case.args:
        sizes = inspect.signature(s.case.inputs).parameters
        yield from (Axis(p.default, (), (), (), p.name) for p in sizes.values() if isinstance(p.default, int))
        return
    found = []
    lengths = dict.fromkeys(k for t in [*s.points, *s.others().values()] for k in _shape(s, t) if k > 0)
    for length in lengths:
        for axis in _candidates(s, length):
            if (axis.points or axis.others) and runs(s, axis, length + 3):
                found.append(axis)
                break
    yield from sorted(found, key=lambda axis: not axis.batch)


def _shape(s: Subject, t: Tensor) -> list[int]:
    """The shape, without the last axis that holds real and imaginary parts."""
    is_complex = any(p.complex and p.tensor is t for p in s._points)
    return list(t.shape)[: t.dim() - is_complex]


def _candidates(s: Subject, length: int) -> Iterator[Axis]:
    """All dimensions of a length; the same with integer arguments equal to it; first dimensions only."""
    points = [(i, d) for i, p in enumerate(s.points) for d, k in enumerate(_shape(s, p)) if k == length]
    others = [(i, d) for i, t in s.others().items() for d, k in enumerate(t.shape) if k == length]
    numbers = [i for i, leaf in enumerate(s._leaves) if type(leaf) is int and leaf == length and length > 2]
    # A module's own parameters keep their sizes.
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
    """The cost of one evaluation."""

    bytes: int  # of the largest tensor kept or returned
    units: float  # of work


def cost(s: Subject) -> Cost:
    """The cost of one forward."""
    sizes = [0]

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = s(*s.at())
    return Cost(max([*sizes, *(y.numel() * y.element_size() for y in outputs)]), work(s))
