"""A gradient that is wrong at the sizes given: does it have another defect at other sizes?

Its own error must be told from the other one.  Two laws say what it is elsewhere:

- The gradient is a multiple of the right one.  The multiple is taken out, and the rest must be right.
- Forward treats rows alike.  Then repeated rows must get the gradients of the rows that they repeat, right or
  wrong.  One factor for all is allowed: a mean's divisor changes with the size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify._compare import first_order_of, ratio_of
from manualprop.verify._difference import difference, sizes, tolerance
from manualprop.verify._report import message
from manualprop.verify._resize import Axis, repeated_rows
from manualprop.verify._subject import Subject


def multiples(s: Subject) -> list[float] | None:
    """For each point the c with which its gradient is c times the right one; None if one has no such c."""
    found = []
    for c in first_order_of(s):
        ratio = ratio_of(c.hand.where(c.measured, 0), c.numeric.where(c.measured, 0))
        if not c.wrong.any():
            found.append(1.0)
        elif ratio and bool(
            ((c.hand - ratio * c.numeric).abs() <= c.tolerance * (1 + abs(ratio)))[c.measured].all()
        ):
            found.append(ratio)
        else:
            return None
    return found


class _Repeated(NamedTuple):
    """A call with rows repeated along an axis."""

    subject: Subject
    place: Tensor  # which row each one repeats
    leaves: list[Tensor]
    outputs: tuple[Tensor, ...]
    grown: list[list[int]]  # the dimensions of each output that follow the axis


def otherwise_than_its_rows(s: Subject, axis: Axis, n: int) -> str | None:
    """How the gradient of repeated rows is no multiple of the rows' own, or None."""
    call = _called(s, axis, n)
    if s.nonlinear or call is None:
        return None
    if n % axis.length == 0 and _called(s, axis, n + 1) is None:
        return None  # a mean of whole repeats: such rows depend on each other
    v = list(zip(s.cotangents, call.grown, strict=True))
    repeated = [_repeated(c, dims, call.place) for c, dims in v]
    try:
        found = call.subject.pull_back(call.outputs, call.leaves, repeated)
    except Exception as error:  # whatever the checked code raises
        return f"accepted in forward, then backward raises {message(error)}"
    # A point without the axis gets a sum over all copies: each row's grad_output times their count.
    count = torch.bincount(call.place, minlength=axis.length)
    rows, sums = s.plain, s.gradients(cotangents=[_counted(c, dims, count) for c, dims in v])
    for i, g in enumerate(found):
        dims = [d for j, d in axis.points if j == i]
        want = rows[i] if dims else sums[i]
        if want is None:
            continue
        off = _no_multiple(g, _repeated(want, dims, call.place), s, i)
        if off:
            return f"repeated rows get other gradients of {s.names[i]} than the rows alone: {off}"
    return None


def _called(s: Subject, axis: Axis, n: int) -> _Repeated | None:
    """The call; None if forward refuses it, or does not treat rows alike."""
    try:
        there, place = repeated_rows(s, axis, n)
        leaves = there.at()
        outputs = there(*leaves)
    except Exception:  # whatever the checked code raises: refused
        return None
    grown = [_grown(y, mine, axis.length) for y, mine in zip(outputs, s.outputs, strict=True)]
    repeats = [_repeated(y, dims, place) for y, dims in zip(s.outputs, grown, strict=True)]
    if not all(grown) or [y.shape for y in outputs] != [y.shape for y in repeats]:
        return None
    if difference(outputs, repeats, 10 * tolerance(s), sizes(s.outputs)) is not None:
        return None
    return _Repeated(there, place, leaves, outputs, grown)


def _no_multiple(g: Tensor | None, want: Tensor, s: Subject, i: int) -> str:
    """How ``g`` is no multiple of ``want``, a gradient of point ``i``, or nothing."""
    g = torch.zeros_like(want) if g is None else g
    c = ratio_of(g, want) or 0.0
    if c == 0 and bool(want.any()):
        return "zero"
    off = difference([g], [c * want], 10 * tolerance(s), [max(sizes([g, want]))], [100 * s.roughness[i]])
    return "" if off is None else str(off)


def _grown(y: Tensor, mine: Tensor, length: int) -> list[int]:
    """The dimensions of an output that had ``length``, and have another one."""
    return [d for d, (a, b) in enumerate(zip(y.shape, mine.shape, strict=False)) if a != b == length]


def _repeated(t: Tensor, dims: list[int], place: Tensor) -> Tensor:
    for d in dims:
        t = t.index_select(d, place)
    return t


def _counted(t: Tensor, dims: list[int], count: Tensor) -> Tensor:
    for d in dims:
        t = t * count.to(t.dtype).view(-1, *[1] * (t.dim() - d - 1))
    return t
