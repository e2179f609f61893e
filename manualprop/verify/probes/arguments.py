"""What stands in the arguments: their layout, who requires grad, who is used, who shares memory with whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._difference import Difference, difference, listed, sizes, tolerance
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, limit, message, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify._watch import watched

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
    live = _live(s)
    if not live:
        return _nothing_requires_grad()
    seen: list[str] = []
    wrong: list[tuple[str, str]] = []
    for k in live:
        for layout in layouts(s.cotangents[k]):
            seen.append(layout.name)
            evidence = _with_grad_output(s, k, layout.view, s.plain)
            written = (layout.buffer == layout.buffer) & ~layout.own
            if evidence is None and written.any():
                evidence = f"backward writes {int(written.sum())} entries beside a view that is grad_output"
            if evidence is not None:
                wrong.append((layout.name, evidence))
        for expanded in expansions(s.cotangents[k]):
            seen.append("expanded")
            try:
                expected = s.gradients(cotangents=_replaced(s.cotangents, k, expanded.contiguous()))
            except Exception:  # whatever the checked code raises; another probe's business
                continue
            evidence = _with_grad_output(s, k, expanded, expected)
            if evidence is not None:
                wrong.append(("expanded", evidence))
    return _layout_outcome(wrong, seen, "grad_output")


def _with_grad_output(s: Subject, k: int, v: Tensor, expected: Sequence[Tensor | None]) -> str | None:
    """What is wrong with the gradients for ``v`` at output ``k``, or None."""
    try:
        found = s.gradients(cotangents=_replaced(s.cotangents, k, v))
    except Exception as error:  # whatever the checked code raises
        return f"backward raises {message(error)}"
    off = difference(found, expected, tolerance(s), sizes(s.plain))
    return None if off is None else f"gradient of {s.names[off.which]}: {off}"


def _layout_outcome(wrong: Sequence[tuple[str, str]], seen: Sequence[str], what: str) -> Outcome:
    if wrong:
        name, evidence = wrong[0]
        kinds = listed([name for name, _ in wrong])
        return finding(
            f"a {name} {what}, against a contiguous one of equal values: {evidence}",
            f"only for a {kinds} {what}",
            layouts=[name for name, _ in wrong],
        )
    return passed(f"the same for a {listed(seen)} {what} as for a contiguous one")


def _replaced(items: Sequence[Tensor], k: int, item: Tensor) -> list[Tensor]:
    return [item if i == k else t for i, t in enumerate(items)]


def _live(s: Subject) -> list[int]:
    """The outputs that require grad in the plain run."""
    return [k for k, y in enumerate(s(*s.at())) if y.requires_grad]


def _nothing_requires_grad() -> Outcome:
    return skipped("no output requires grad: see output_requires_grad")


# ----- of inputs -----


@probe()
def input_layout(s: Subject) -> Outcome:
    """Value and gradient with transposed, strided, sliced, expanded inputs against contiguous ones."""
    if not _live(s):
        return _nothing_requires_grad()
    wrong: list[tuple[str, str]] = []
    seen: list[str] = []
    refused: list[str] = []
    for name, variant, points, plain in _laid_out_inputs(s):
        seen.append(name)
        try:
            leaves = _leaves(points)
            outputs = variant(*leaves)
        except Exception as error:  # whatever the checked code raises
            refused.append(f"{name}: {message(error)}")
            continue
        evidence = _as_plain(plain, outputs, leaves, max(sizes(s.plain)))
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
            yield layout.name, s, _replaced(s.points, i, layout.view), s
        for expanded in () if parameter or s._points[i].complex else list(expansions(point))[1:]:
            points = _replaced(s.points, i, expanded.contiguous())
            if (plain := _elsewhere(s, points)) is not None:
                yield "expanded", s, _replaced(s.points, i, expanded), plain
    for slot, other in s.others().items():
        for layout in layouts(other):
            yield layout.name, s.with_points(s.points, others={slot: layout.view}, as_is=True), s.points, s


def _real_layouts(point: Tensor, is_complex: bool) -> Iterator[Layout]:
    if not is_complex:
        yield from layouts(point)
        return
    for layout in layouts(torch.view_as_complex(point)):
        yield layout._replace(view=torch.view_as_real(layout.view))


def _elsewhere(s: Subject, points: Sequence[Tensor]) -> Subject | None:
    """The function at other points, if it works there."""
    other = s.with_points(points)
    try:
        finite = all(torch.isfinite(y).all() for y in other.outputs)
        return other if finite and other.plain else None
    except Exception:  # whatever the checked code raises: outside its domain
        return None


def _leaves(points: Sequence[Tensor]) -> list[Tensor]:
    """The very tensors, in their layout, as leaves that require grad."""
    return [p.detach().requires_grad_() for p in points]


def _as_plain(
    plain: Subject, outputs: Sequence[Tensor], leaves: Sequence[Tensor], scale: float
) -> str | None:
    """How values and gradients differ from those of the plain run, or None."""
    if plain.random:  # the layout may decide which entry gets which random number
        expected_outputs = list(outputs)
    else:
        expected_outputs = list(plain.outputs)
    off = difference(outputs, expected_outputs, tolerance(plain), sizes(plain.outputs))
    if off is not None:
        return f"output {off.which}: {off}"
    try:
        found = plain.pull_back(outputs, leaves, plain.cotangents)
    except Exception as error:  # whatever the checked code raises
        return f"accepted in forward, then backward raises {message(error)}"
    scales = [max(scale, *sizes(plain.plain))] * len(plain.points)
    off = None if plain.random else difference(found, plain.plain, tolerance(plain), scales)
    return None if off is None else f"gradient of {plain.names[off.which]}: {off}"


# ----- who requires grad -----


@probe()
def requires_grad_subsets(s: Subject) -> Outcome:
    """The same gradients whichever of the inputs require grad."""
    if not _live(s):
        return _nothing_requires_grad()
    scales = sizes(s.plain)
    for subset in _subsets(len(s.points)):
        who = _who(s, subset)
        leaves = s.at(subset=subset)
        outputs = s(*leaves)
        if not any(subset):
            if any(_made_to_require_grad(y) for y in outputs):
                return finding("an output requires grad though no input does", "no simple explanation")
            continue
        try:
            found = s.pull_back(outputs, leaves, s.cotangents)
        except Exception as error:  # whatever the checked code raises
            return finding(f"{who}: backward raises {message(error)}", f"raises {who}")
        expected = [g if r else None for g, r in zip(s.plain, subset, strict=True)]
        off = difference(found, expected, tolerance(s), scales)
        if off is not None:
            return finding(f"{who}: gradient of {s.names[off.which]}: {off}", _how(off, found, s, who))
    return passed(f"the same gradients for every subset of {', '.join(s.names)}")


def _how(off: Difference, found: Sequence[Tensor | None], s: Subject, who: str) -> str:
    g = found[off.which]
    if g is None or not g.any():
        return f"zero: {s.names[off.which]} is not trained {who}"
    for j, other in enumerate(s.plain):
        if j != off.which and difference([g], [other], 1e-6) is None:
            return f"exchanged: {s.names[off.which]} gets the gradient of {s.names[j]} {who}"
    return f"no simple explanation, {who}"


def _subsets(n: int) -> Iterator[tuple[bool, ...]]:
    """Every one for few inputs; else each alone, all but each, and none."""
    if n <= 4:
        yield from itertools.product((False, True), repeat=n)
        return
    for i in range(n):
        yield tuple(j == i for j in range(n))
        yield tuple(j != i for j in range(n))
    yield (False,) * n


def _who(s: Subject, subset: Sequence[bool]) -> str:
    names = [name for name, r in zip(s.names, subset, strict=True) if r]
    return f"only when {' and '.join(names) or 'nothing'} {'require' if len(names) > 1 else 'requires'} grad"


def _made_to_require_grad(y: Tensor) -> bool:
    """Whether it requires grad of its own making, not because of a tensor that the callable closes over."""
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):
            return False
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return y.requires_grad


# ----- who is used -----


@probe()
def partial_outputs(s: Subject) -> Outcome:
    """Gradients when only some of several outputs are used: those of a zero grad_output for the others."""
    live = _live(s)
    if len(live) < 2:
        return skipped("there is one differentiable output")
    scales = sizes(s.plain)
    for used in [*([k] for k in live), *([j for j in live if j != k] for k in live)]:
        who = f"only when output {' and '.join(map(str, used))} {'are' if len(used) > 1 else 'is'} used"
        zeros = [v if k in used else torch.zeros_like(v) for k, v in enumerate(s.cotangents)]
        some = [v if k in used else None for k, v in enumerate(s.cotangents)]
        expected = s.gradients(cotangents=zeros)
        try:
            found = s.gradients(cotangents=some)
        except Exception as error:  # whatever the checked code raises
            return finding(f"{who}: backward raises {message(error)}", f"raises {who}")
        off = difference(found, expected, tolerance(s), scales)
        if off is not None:
            return finding(f"{who}: gradient of {s.names[off.which]}: {off}", f"one path: wrong {who}")
    parts = [
        s.gradients(cotangents=[v if j == k else None for j, v in enumerate(s.cotangents)]) for k in live
    ]
    off = difference(_sum(parts), s.plain, tolerance(s), scales)
    if off is not None:
        return finding(
            f"the gradients through each output alone do not add up: {s.names[off.which]}: {off}",
            "one path: right only when all outputs are used, or only when one is",
        )
    return passed(f"{len(live)} outputs, each alone, all but each, and together")


def _sum(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    total: list[Tensor | None] = []
    for column in zip(*parts, strict=True):
        some = [g for g in column if g is not None]
        total.append(torch.stack(some).sum(0) if some else None)
    return total


@probe()
def same_input(s: Subject) -> Outcome:
    """f(x, x): the gradient is the sum of those of the two arguments."""
    pairs = [
        (i, j)
        for (i, p), (j, q) in itertools.combinations(enumerate(s._points), 2)
        if isinstance(p.slot, int) and isinstance(q.slot, int)
        if p.tensor.shape == q.tensor.shape and (p.complex, p.tensor.dtype) == (q.complex, q.tensor.dtype)
    ]
    if not pairs:
        return skipped("no two inputs have the same shape")
    done = []
    for i, j in pairs[:6]:
        who = f"the same tensor as {s.names[i]} and {s.names[j]}"
        for k in (i, j):
            twice = _elsewhere(s, [s.points[k] if m in (i, j) else p for m, p in enumerate(s.points)])
            if twice is None or not any(y.requires_grad for y in twice(*twice.at())):
                continue
            outcome = _one_for_two(twice, i, j, who)
            if outcome is not None:
                return outcome
            done.append(who)
            break
    return passed(f"right for {listed(done)}") if done else skipped("no two inputs may be equal")


def _one_for_two(s: Subject, i: int, j: int, who: str) -> Outcome | None:
    leaves = s.at()
    leaves[j] = leaves[i]
    try:
        outputs = s(*leaves)
        off = difference(outputs, s.outputs, tolerance(s), sizes(s.outputs))
        if off is not None:
            return finding(f"{who}: output {off.which}: {off}", "overwritten: the value depends on identity")
        found = s.pull_back(outputs, leaves, s.cotangents)[i]
    except Exception as error:  # whatever the checked code raises
        return finding(f"{who}: raises {message(error)}", "raises only for the same tensor twice")
    parts = [s.plain[i], s.plain[j]]
    expected = _sum([[parts[0]], [parts[1]]])
    off = difference([found], expected, tolerance(s), [max(sizes(parts))])
    if off is None:
        return None
    alone = any(difference([found], [part], 1e-6) is None for part in parts)
    how = "one path: the gradient of one of the two is missing" if alone else "no simple explanation"
    return finding(f"{who}: gradient {off}, against copies of it", how)


# ----- who shares memory -----


@probe()
def aliasing(s: Subject) -> Outcome:
    """Shared memory that makes numbers wrong: an output written to, a gradient added to, something else changes."""
    for check in (_outputs_share, _gradients_share):
        if (outcome := check(s)) is not None:
            return outcome
    return passed("writing into outputs and adding to gradients changes nothing else")


def _outputs_share(s: Subject) -> Outcome | None:
    outputs = s(*(leaves := s.at()))
    for k, y in enumerate(outputs):
        others = [(f"input {name}", leaf) for name, leaf in zip(s.names, leaves, strict=True)]
        others += [(f"output {m}", outputs[m]) for m in range(k)]
        for name, other in others:
            if _silently_shared(y, other) and _writing_changes(y, other):
                return finding(
                    f"writing into output {k} changes {name}, and autograd does not know: it is no view",
                    f"overwritten: output {k} shares memory with {name}",
                )
    return None


def _silently_shared(y: Tensor, other: Tensor) -> bool:
    """Whether two tensors stand on one storage though autograd takes neither for the other's view."""
    if y is other or y._is_view() or other._is_view():
        return False
    return y.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and y.numel() > 0


def _writing_changes(y: Tensor, other: Tensor) -> bool:
    before, kept, version = other.detach().clone(), y.detach().clone(), other._version
    try:
        with torch.no_grad():
            y.add_(1)
    except RuntimeError:  # refused, so not silent
        return False
    changed = not torch.equal(other.detach().nan_to_num(), before.nan_to_num()) and other._version == version
    y.data.copy_(kept)
    return changed


def _gradients_share(s: Subject) -> Outcome | None:
    """Accumulate as training does: ``.grad`` is added to in place, and set to zero in place."""
    if not _live(s):
        return None
    scales = sizes(s.plain)
    leaves = s.at()
    for step, factor in (("first", 1), ("second, added to it", 2), ("after grad.zero_()", 1)):
        if step.startswith("after"):
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad.zero_()
        outputs = s(*leaves)
        live = [(y, v.clone()) for y, v in zip(outputs, s.cotangents, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in live], [v for _, v in live])
        expected = [None if g is None else factor * g for g in s.plain]
        off = difference([leaf.grad for leaf in leaves], expected, tolerance(s), scales)
        if off is not None:
            shared = (
                f"the gradient of {s.names[off.which]} shares memory with {_shared(s, leaves, off.which)}"
            )
            evidence = f"accumulated in .grad, {step} backward: gradient of {s.names[off.which]}: {off}"
            if not s.functions:  # torch's own views do so: a.view(-1) + b.view(-1)
                return limit(f"{evidence}. {shared}")
            return finding(evidence, f"overwritten: {shared}")
        moved = difference(leaves, s.points, 0.0)
        if moved is not None:
            return finding(
                f"accumulating in .grad, {step} backward, changes the input {s.names[moved.which]}: {moved}",
                f"overwritten: a gradient shares memory with {s.names[moved.which]}",
            )
    return None


def _shared(s: Subject, leaves: Sequence[Tensor], i: int) -> str:
    mine = leaves[i].grad
    for j, leaf in enumerate(leaves):
        theirs = leaf.grad
        if j != i and mine is not None and theirs is not None:
            if mine.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr():
                return f"that of {s.names[j]}"
    return "another tensor"


# ----- who depends on whom -----


@probe()
def output_requires_grad(s: Subject) -> Outcome:
    """An output that depends on the inputs requires grad."""
    outcome = _depends_but_lost(s)
    if outcome.verdict != "passed" or s.module is None:
        return outcome
    was = s.module.training
    try:
        s.module.train(not was)
        other = _elsewhere(s, s.points)
        outcome_other = outcome if other is None else _depends_but_lost(other)
    finally:
        s.module.train(was)
    if outcome_other.verdict == "finding":
        mode = "eval" if was else "train"
        return finding(f"in {mode} mode, {outcome_other.evidence}", outcome_other.diagnosis)
    return outcome


def _depends_but_lost(s: Subject) -> Outcome:
    requires = [y.requires_grad for y in s(*s.at())]
    lost = [k for k, r in enumerate(requires) if not r]
    if not lost:
        return passed("every output requires grad" if len(requires) > 1 else "the output requires grad")
    parts = [y.numel() for y in s.outputs]
    for i, name in enumerate(s.names):
        directions: list[Tensor | None] = [None] * len(s.points)
        directions[i] = s.random_like([s.points[i]], seed=7)[0]
        slope = _numeric.derivative(s.along(directions), s.noise, s.points[i].dtype)
        values, errors = slope.value.split(parts), slope.error.split(parts)
        for k in lost:
            if not (values[k].abs() > 1e-6 + 8 * errors[k]).any():
                continue
            evidence = (
                f"output {k} does not require grad, but its slope along a direction of {name} is "
                f"{values[k][int(values[k].abs().argmax())]:.4g}"
            )
            if any(requires):
                if _has_formula_for_what_is_lost(s):
                    return finding(f"{evidence}, and backward has a formula for it", "zero: one path is lost")
                return limit(f"{evidence}: meant as non-differentiable?")
            return finding(evidence, "zero: the output is cut off from the graph")
    return passed(f"outputs {', '.join(map(str, lost))} do not require grad, and do not depend on the inputs")


def _has_formula_for_what_is_lost(s: Subject) -> bool:
    """Whether a backward would use the grad_output of an output that is marked as non-differentiable."""
    used = []

    def see(backward: Callable[..., Any], arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        ctx, *grads = arguments
        lost = [isinstance(g, Tensor) and not g.any() for g in grads]
        other = [torch.ones_like(g) if k else g for g, k in zip(grads, lost, strict=True)]
        again = backward(ctx, *other)
        again = again if isinstance(again, tuple | list) else (again,)
        found, expected = ([r if isinstance(r, Tensor) else None for r in some] for some in (again, results))
        used.append(difference(found, expected, 1e-9) is not None)

    with watched(s.functions, see):
        s.gradients()
    return any(used)
