"""One leading axis more or fewer, and other integers: where forward says the same of each row, so must backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from manualprop.verify._difference import difference, listed, sizes, tolerance
from manualprop.verify._probe import probe
from manualprop.verify._random import generator
from manualprop.verify._report import Outcome, finding, limit, message, passed, skipped
from manualprop.verify._resize import has_repeats, is_integer, repeated
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import elsewhere
from manualprop.verify.probes.sizes import wrong_slope

BATCH = 2


# ----- leading axes -----


@probe()
def ranks(s: Subject) -> Outcome:
    """One more and one fewer leading axis, and one of length 1: where the rows' values stay, so do their gradients."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped("no output requires grad: see output_requires_grad")
    if s.random:
        return skipped("it draws random numbers, other ones for another shape")
    done: list[str] = []
    refused: list[str] = []
    for what, ask in (("one more leading axis", _with_more), ("one fewer leading axis", _with_fewer)):
        for group in _groups(s):
            try:
                said = ask(s, group)
            except _DoesNotApply:
                continue
            except _Refused as refusal:
                refused.append(f"{what}: {refusal}")
                continue
            if said:
                who = listed([s.names[i] for i in group[0]])
                return finding(f"with {what} of {who}: {said}", f"only for {what}")
            done.append(what)
    if refused:
        return limit(refused[0])
    if not done:
        return skipped("forward takes no other rank, or gives other rows")
    return passed(f"right with {listed(done)}")


class _DoesNotApply(Exception):
    """Forward refuses the shape, or says something else of the rows."""


class _Refused(Exception):
    """Backward raises for a shape that forward accepts.  This is loud, so it is a limit."""


Group = tuple[list[int], list[int]]  # which points, and which other arguments, have the axis


def _groups(s: Subject) -> Iterator[Group]:
    """Which arguments may get the axis: all that are no parameters; those with as many rows as the first; the first."""
    given = [i for i, p in enumerate(s._points) if not isinstance(p.slot, str)]
    others = s.others()
    if not given:
        return
    first = s.points[given[0]]
    rows = [i for i in given if s.points[i].dim() and first.dim() and s.points[i].shape[0] == first.shape[0]]
    whose = [i for i, t in others.items() if t.dim() and first.dim() and t.shape[0] == first.shape[0]]
    seen: list[Group] = []
    for group in ((given, list(others)), (rows, whose), ([given[0]], [])):
        if group[0] and group not in seen:
            seen.append(group)
            yield group


def _with_more(s: Subject, group: Group) -> str:
    """Two samples, and one, behind a new first axis."""
    rows = [s.points, elsewhere(s, 44)]
    for count in (BATCH, 1):
        stacked = [
            torch.stack([row[i] for row in rows[:count]]) if i in group[0] else p.clone()
            for i, p in enumerate(s.points)
        ]
        each = [[row[i] if i in group[0] else p for i, p in enumerate(s.points)] for row in rows[:count]]
        there = s.others()
        more = s.with_points(stacked, others={i: torch.stack([there[i]] * count) for i in group[1]})
        said = _as_each(s, more, each, group, lambda t, k: t[k])
        if said:
            return said
    return ""


def _with_fewer(s: Subject, group: Group) -> str:
    """The first row and the last one alone, against the same rows of the whole."""
    tensors = [s.points[i] for i in group[0]]
    if any(p.dim() < 1 or len(p) != len(tensors[0]) for p in tensors) or not len(tensors[0]):
        raise _DoesNotApply
    there = s.others()
    if any(there[i].dim() < 1 or len(there[i]) != len(tensors[0]) for i in group[1]):
        raise _DoesNotApply
    if any(s._points[i].complex and s.points[i].dim() < 2 for i in group[0]):
        raise _DoesNotApply
    for k in {0, len(tensors[0]) - 1}:
        row = [p[k].clone() if i in group[0] else p.clone() for i, p in enumerate(s.points)]
        fewer = s.with_points(row, others={i: there[i][k].clone() for i in group[1]})
        said = _row_of(s, fewer, k, group)
        if said:
            return said
    return ""


def _value(s: Subject) -> list[Tensor]:
    try:
        s.allowed(s.points)
        outputs = [y.detach() for y in s(*s.at())]
    except Exception as error:  # whatever the checked code raises: refused
        raise _DoesNotApply from error
    return outputs


def _same(found: Sequence[Tensor], expected: Sequence[Tensor], s: Subject) -> bool:
    return [t.shape for t in found] == [t.shape for t in expected] and (
        difference(found, expected, tolerance(s), sizes(s.outputs)) is None
    )


def _as_each(
    s: Subject,
    more: Subject,
    each: Sequence[Sequence[Tensor]],
    group: Group,
    pick: Callable[[Tensor, int], Tensor],
) -> str:
    """How the gradients of ``more`` differ from those of its samples, or nothing."""
    samples = [s.with_points([p.clone() for p in row]) for row in each]
    outputs = _value(more)
    for k, sample in enumerate(samples):
        if any(y.dim() < 1 or len(y) != len(samples) for y in outputs):
            raise _DoesNotApply
        if not _same([pick(y, k) for y in outputs], _value(sample), s):
            raise _DoesNotApply
    v = [sample.random_like(sample.outputs, 70 + k) for k, sample in enumerate(samples)]
    leaves = more.at()
    y = more(*leaves)
    try:
        found = more.pull_back(y, leaves, [torch.stack(c) for c in zip(*v, strict=True)])
    except Exception as error:  # whatever the checked code raises
        raise _Refused(f"forward accepts it, backward raises {message(error)}") from error
    rows = [sample.gradients(cotangents=w) for sample, w in zip(samples, v, strict=True)]
    for i, column in enumerate(zip(*rows, strict=True)):
        if any(g is None for g in column):
            continue
        stack = torch.stack([g for g in column if g is not None])
        want = stack if i in group[0] else stack.sum(0)
        if found[i] is None or found[i].shape != want.shape:  # type: ignore[union-attr]
            return f"the gradient of {s.names[i]} is lost"
        off = difference([found[i]], [want], 10 * tolerance(s), [max(sizes(s.plain))], [100 * s.roughness[i]])
        if off is not None and not _as_surrogate(more):
            return f"gradient of {s.names[i]}: {off}"
    return ""


def _row_of(s: Subject, fewer: Subject, k: int, group: Group) -> str:
    """How the gradients of one row alone differ from what that row gets in the whole, or nothing."""
    alone, whole = _value(fewer), s.outputs
    if any(y.dim() < 1 or k >= len(y) for y in whole) or not _same([y[k] for y in whole], alone, s):
        raise _DoesNotApply
    w = fewer.random_like(alone, 80 + k)
    v = [torch.zeros_like(y) for y in whole]
    for full, part in zip(v, w, strict=True):
        full[k] = part
    want = s.gradients(cotangents=v)
    # In the whole, the other rows get nothing: otherwise rows depend on each other.
    for i in group[0]:
        g = want[i]
        if g is not None:
            others = g.clone()
            others[k] = 0
            if float(others.abs().max()) > 1e-9 * float(g.abs().max()):
                raise _DoesNotApply
    leaves = fewer.at()
    try:
        found = fewer.pull_back(fewer(*leaves), leaves, w)
    except Exception as error:  # whatever the checked code raises
        raise _Refused(f"forward accepts it, backward raises {message(error)}") from error
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        if b is None:
            continue
        expected = b[k] if i in group[0] else b
        off = difference([a], [expected], 10 * tolerance(s), [max(sizes(s.plain))], [100 * s.roughness[i]])
        if off is not None and not _as_surrogate(fewer):
            return f"gradient of {s.names[i]}: {off}"
    return ""


def _as_surrogate(there: Subject) -> bool:
    """Whether the gradient is the surrogate's, which may depend on the number of rows where the value does not."""
    return there.case.surrogate is not None and wrong_slope(lambda seed: there, None) is None


# ----- integers -----


@probe()
def indices(s: Subject) -> Outcome:
    """Repeated, unsorted and negative indices, where forward takes them."""
    integers = {i: t for i, t in s.others().items() if is_integer(t) and t.numel() > 1}
    if not integers:
        return skipped("no argument holds several integers")
    if not any(y.requires_grad for y in s(*s.at())) or s.random:
        return skipped("it draws random numbers" if s.random else "no output requires grad")
    if wrong_slope(lambda seed: s, None) is not None:
        return skipped("wrong with the integers given: see first_order")
    done, refused = [], []
    for i, t in integers.items():
        name = s.name_of_leaf(i)
        for kind, other in _variants(s, name, t):
            there = s.with_points([p.clone() for p in s.points], others={i: other})
            try:
                there.allowed(there.points)
                outputs = there(*there.at())
                if not all(torch.isfinite(y).all() for y in outputs) or not _still_in_order(
                    s, i, kind, there
                ):
                    continue
            except Exception:  # whatever the checked code raises: refused
                continue
            try:
                said = _with_integers(s, there, kind)
            except _Refused as refusal:
                refused.append(f"{kind} integers in {name}: {refusal}")
                continue
            if said:
                hint = f". If they never repeat: unique=[{name!r}]" if kind == "repeated" else ""
                return finding(f"with {kind} integers in {name}: {said}", f"only for {kind} indices{hint}")
            done.append(kind)
    return (
        passed(f"right with {listed(done)} integers") if done else skipped("no other integers are accepted")
    )


def _variants(s: Subject, name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The integers with each value twice, in another order, counted from the end."""
    if name not in s.case.unique and not has_repeats(t) and not _is_offsets(t):
        yield "repeated", repeated(t)
    elif name not in s.case.unique and not _is_offsets(t):
        yield "repeated", t.flatten()[0].expand(t.shape).clone()
    along = (
        max(range(t.dim()), key=lambda d: t.shape[d]) if t.dim() > 1 else 0
    )  # different integers in a row stay different
    order = torch.randperm(t.shape[along], generator=generator("order", s.case.seed))
    order = order if bool((t.index_select(along, order) != t).any()) else order.flip(0)
    yield "unsorted", t.index_select(along, order)
    if bool((t >= 0).all()):
        for n in dict.fromkeys(k for p in s.points for k in p.shape):
            if n > int(t.max()):
                yield "negative", t - n


def _is_offsets(t: Tensor) -> bool:
    """Whether the integers may be where rows begin: they ascend from 0."""
    return t.dim() == 1 and int(t[0]) == 0 and bool((t.diff() >= 0).all())


def _still_in_order(s: Subject, i: int, kind: str, there: Subject) -> bool:
    """Whether what may be offsets are indices: in another order they give the same values in another order."""
    if kind != "unsorted" or not _is_offsets(s.others()[i]):
        return True
    mine, theirs = ([y.double().sum().item() for y in a(*a.at())] for a in (s, there))
    return all(abs(a - b) <= 1e-6 * (abs(a) + abs(b)) for a, b in zip(mine, theirs, strict=True))


def _with_integers(s: Subject, there: Subject, kind: str) -> str:
    """What is wrong with other integers, or nothing.  Negative ones must give what the positive ones gave."""
    if kind != "negative":
        said = wrong_slope(lambda seed: there, None)
        return said or ""
    outputs = there(*there.at())
    if not _same([y.detach() for y in outputs], s.outputs, s):
        return ""
    leaves = there.at()
    try:
        found = there.pull_back(there(*leaves), leaves, s.cotangents)
    except Exception as error:  # whatever the checked code raises
        raise _Refused(f"forward accepts them, backward raises {message(error)}") from error
    off = difference(found, s.plain, tolerance(s), sizes(s.plain), s.roughness)
    return "" if off is None else f"gradient of {s.names[off.which]}: {off}"
