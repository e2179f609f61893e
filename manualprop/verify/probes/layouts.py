"""How the arguments, and the gradient that arrives, are laid out in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify._compare import compare, wrong_in_first_order
from manualprop.verify._difference import difference, listed, sizes, tolerance
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import moved, nothing_requires_grad, recorded_outputs, replaced

MOST_WRONG = 400  # entries of an input of which each is looked at

# ----- layouts -----


class Layout(NamedTuple):
    """A tensor's values, laid out in another way inside ``buffer``, whose other entries are NaN."""

    name: str
    view: Tensor
    buffer: Tensor
    own: Tensor  # of bool: which entries of the buffer belong to the view


def layouts(t: Tensor) -> Iterator[Layout]:
    """``t`` in every layout that a contiguous tensor of its shape does not have."""
    n, shape = t.dim(), tuple(t.shape)
    orders = {"transposed": [*range(n - 2), n - 1, n - 2], "permuted": list(reversed(range(n)))}
    if n in (4, 5):
        orders["channels-last"] = [0, *range(2, n), 1]
    for name, order in orders.items():
        if n >= 2 and (name != "permuted" or n >= 3):
            buffer = _unset([shape[d] for d in order], t)
            view = buffer.permute([order.index(d) for d in range(n)])
            if not view.is_contiguous():
                yield _filled(name, view, buffer, t)
    if n:
        buffer = _unset([*shape[:-1], 2 * shape[-1]], t)
        yield _filled("strided", buffer[..., ::2], buffer, t)
        buffer = _unset([k + 2 for k in shape], t)
        yield _filled("sliced", buffer[tuple(slice(1, k + 1) for k in shape)], buffer, t)
    buffer = _unset([t.numel() + 3], t)
    yield _filled("sliced", buffer[2 : t.numel() + 2].view(shape), buffer, t)


def expansions(t: Tensor) -> Iterator[Tensor]:
    """Tensors of the shape of ``t`` that repeat one entry, as after ``sum()``, or one row, along each axis."""
    if t.dim():
        yield torch.ones((), dtype=t.dtype, device=t.device).expand(t.shape)
    if t.numel() > 1:
        yield t.flatten()[0].clone().expand(t.shape)
        for d in range(t.dim()):
            if t.shape[d] > 1 and t.dim() > 1:
                yield t.narrow(d, 0, 1).clone().expand(t.shape)


def _unset(shape: Sequence[int], like: Tensor) -> Tensor:
    buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return buffer.fill_(torch.nan) if like.is_floating_point() or like.is_complex() else buffer


def _filled(name: str, view: Tensor, buffer: Tensor, values: Tensor) -> Layout:
    view.copy_(values)
    own = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
    own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return Layout(name, view, buffer, own)


# ----- of grad_output -----


@probe()
def grad_output_layout(s: Subject) -> Outcome:
    """Transposed, strided, sliced, expanded grad_output against a contiguous one of equal values."""
    live = recorded_outputs(s)
    if not live:
        return nothing_requires_grad()
    seen: list[str] = []
    wrong: list[tuple[str, str]] = []
    views: list[tuple[int, Tensor]] = []
    for k in live:
        for layout in layouts(s.cotangents[k]):
            seen.append(layout.name)
            evidence = _with_grad_output(s, k, layout.view, s.plain)
            written = (layout.buffer == layout.buffer) & ~layout.own
            if evidence is None and written.any():
                evidence = f"backward writes {int(written.sum())} entries outside of grad_output, into the rest of its memory"
            if evidence is not None:
                wrong.append((layout.name, evidence))
                views.append((k, layout.view))
        for expanded in expansions(s.cotangents[k]):
            seen.append("expanded")
            try:
                expected = s.gradients(cotangents=replaced(s.cotangents, k, expanded.contiguous()))
            except Exception:  # whatever the checked code raises; another probe's business
                continue
            evidence = _with_grad_output(s, k, expanded, expected)
            if evidence is not None:
                wrong.append(("expanded", evidence))
    outcome = _layout_outcome(wrong, seen, "grad_output")
    return outcome if _overwrites(s, views) else apart(outcome, "first_order")


def _overwrites(s: Subject, views: Sequence[tuple[int, Tensor]]) -> bool:
    """Whether the layout changes only entries that are wrong in first order, some of all.

    As where several numbers are written to one place, and not added: the layout decides which is the last.
    """
    if not views or not wrong_in_first_order(s) or any(p.numel() > MOST_WRONG for p in s.points):
        return False
    whole = s.with_points(s.points)
    whole.whole = MOST_WRONG
    bad = [c.wrong.any(0).reshape(s.points[c.point].shape) for c in compare(whole)]
    if all(b.double().mean() > 0.7 for b in bad if b.any()):
        return False
    for k, view in views:
        try:
            found = s.gradients(cotangents=replaced(s.cotangents, k, view))
        except Exception:  # whatever the checked code raises
            return False
        rest = [None if g is None else g.masked_fill(b, 0) for g, b in zip(found, bad, strict=True)]
        plain = [None if g is None else g.masked_fill(b, 0) for g, b in zip(s.plain, bad, strict=True)]
        if difference(rest, plain, tolerance(s), sizes(s.plain), s.roughness) is not None:
            return False
    return True


def _with_grad_output(s: Subject, k: int, v: Tensor, expected: Sequence[Tensor | None]) -> str | None:
    """What is wrong with the gradients for ``v`` at output ``k``, or None."""
    try:
        leaves = s.at()
        found = s.pull_back(s(*leaves), leaves, replaced(s.cotangents, k, v))
    except Exception as error:  # whatever the checked code raises
        return f"backward raises {message(error)}"
    off = difference(found, expected, tolerance(s), sizes(s.plain), s.roughness)
    return None if off is None else f"gradient of {s.names[off.which]}: {off}"


def _layout_outcome(wrong: Sequence[tuple[str, str]], seen: Sequence[str], what: str) -> Outcome:
    if wrong:
        name, evidence = wrong[0]
        kinds = listed([name for name, _ in wrong])
        return finding(
            f"{_with_article(name)} {what}, against a contiguous one of equal values: {evidence}",
            f"only for {_with_article(kinds)} {what}",
            layouts=[name for name, _ in wrong],
        )
    return passed(f"the same for {_with_article(listed(seen))} {what} as for a contiguous one")


def _with_article(words: str) -> str:
    return f"{'an' if words.startswith('expanded') else 'a'} {words}"


# ----- of inputs -----


@probe()
def input_layout(s: Subject) -> Outcome:
    """Value and gradient with transposed, strided, sliced, expanded inputs against contiguous ones."""
    if not recorded_outputs(s):
        return nothing_requires_grad()
    wrong: list[tuple[str, str]] = []
    seen: list[str] = []
    refused: list[str] = []
    steepest = max(sizes(s.plain))  # raises where the plain backward does
    for name, variant, points, plain in _laid_out_inputs(s):
        seen.append(name)
        try:
            leaves = _leaves(points)
            outputs = variant(*leaves)
        except Exception as error:  # whatever the checked code raises
            refused.append(f"{name}: {message(error)}")
            continue
        evidence = _as_plain(s, plain, outputs, leaves, steepest)
        if evidence is not None:
            wrong.append((name, evidence))
    if refused and not wrong:
        return limit(f"not every layout of the inputs is accepted. {refused[0]}")
    return _layout_outcome(wrong, seen, "input")


def _laid_out_inputs(s: Subject) -> Iterator[tuple[str, Subject, list[Tensor], Subject]]:
    """Name of the layout, what to call, the points to call it at, and the same with contiguous ones."""
    for i, point in enumerate(s.points):
        parameter = isinstance(s._points[i].slot, str)
        for layout in _real_layouts(point, s._points[i].complex):
            if parameter and layout.name == "strided":
                # Parameters come transposed, or as parts of one buffer.
                continue
            yield layout.name, s, replaced(s.points, i, layout.view), s
        for expanded in () if parameter or s._points[i].complex else list(expansions(point))[1:]:
            points = replaced(s.points, i, expanded.contiguous())
            if (plain := moved(s, points)) is not None:
                plain.noise = s.noise
                yield "expanded", s, replaced(s.points, i, expanded), plain
    for slot, other in s.others().items():
        for layout in layouts(other):
            yield (
                layout.name,
                s.with_points(s.points, others={slot: layout.view}, as_is=True),
                [p.clone() for p in s.points],
                s,
            )


def _real_layouts(point: Tensor, is_complex: bool) -> Iterator[Layout]:
    if not is_complex:
        yield from layouts(point)
        return
    for layout in layouts(torch.view_as_complex(point)):
        yield layout._replace(view=torch.view_as_real(layout.view))


def _leaves(points: Sequence[Tensor]) -> list[Tensor]:
    """The very tensors, in their layout, as leaves that require grad."""
    return [p.detach().requires_grad_() for p in points]


def _as_plain(
    s: Subject, plain: Subject, outputs: Sequence[Tensor], leaves: Sequence[Tensor], steepest: float
) -> str | None:
    """How values and gradients differ from those of the plain run, or None.

    Against the numbers at the inputs given, too: of equal rows a variance is 0, and in another order rounding.
    """
    if plain.random:  # the layout may decide which entry gets which random number
        expected_outputs = list(outputs)
    else:
        expected_outputs = list(plain.outputs)
    off = difference(outputs, expected_outputs, tolerance(s), sizes(s.outputs))
    if off is not None:
        return f"output {off.which}: {off}"
    try:
        found = plain.pull_back(outputs, leaves, plain.cotangents)
    except Exception as error:  # whatever the checked code raises
        return f"accepted in forward, then backward raises {message(error)}"
    scales = [max(steepest, *sizes(plain.plain))] * len(plain.points)
    off = None if plain.random else difference(found, plain.plain, tolerance(s), scales, plain.roughness)
    if off is None:
        return None
    rounded = not all(torch.equal(a, b) for a, b in zip(outputs, plain.outputs, strict=True))
    if rounded and _unsettled(plain, tolerance(s), scales):
        return None
    return f"gradient of {plain.names[off.which]}: {off}"


def _unsettled(plain: Subject, rtol: float, scales: Sequence[float]) -> bool:
    """Whether rounding of the inputs decides the gradient, as that of a standard deviation of equal entries."""
    noise = plain.random_like(plain.points, 71)
    shaken = [p * (1 + torch.finfo(p.dtype).eps * n) for p, n in zip(plain.points, noise, strict=True)]
    try:
        moved_by_rounding = plain.gradients(plain.allowed(shaken), plain.cotangents)
    except Exception:  # whatever the checked code raises: not defined there
        return False
    return difference(moved_by_rounding, plain.plain, rtol, scales, plain.roughness) is not None
