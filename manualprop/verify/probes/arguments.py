"""Which inputs require grad, which outputs are used, which tensors share memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._difference import Difference, difference, listed, sizes, tolerance
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, limit, message, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify._watch import watched
from manualprop.verify.probes._runs import moved, nothing_requires_grad, recorded_outputs

# ----- which inputs require grad -----


@probe()
def requires_grad_subsets(s: Subject) -> Outcome:
    """The same gradients whichever of the inputs require grad."""
    if not recorded_outputs(s):
        return nothing_requires_grad()
    scales = sizes(s.plain)
    for subset in _subsets(len(s.points)):
        who = _who(s, subset)
        leaves = s.at(subset=subset)
        outputs = s(*leaves)
        off = difference(outputs, s.outputs, tolerance(s), sizes(s.outputs))
        if off is not None and not s.random:
            return finding(f"{who}: output {off.which}: {off}", "the value depends on who requires grad")
        if not any(subset):
            if any(_made_to_require_grad(y) for y in outputs):
                return finding("an output requires grad though no input does", "no simple explanation")
            continue
        try:
            found = s.pull_back(outputs, leaves, s.cotangents)
        except Exception as error:  # whatever the checked code raises
            return finding(f"{who}: backward raises {message(error)}", f"raises {who}")
        expected = [g if r else None for g, r in zip(s.plain, subset, strict=True)]
        off = difference(found, expected, tolerance(s), scales, s.roughness)
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
    """Every subset of few inputs; of more, each input alone, all but each, and none."""
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


# ----- which outputs are used -----


@probe()
def partial_outputs(s: Subject) -> Outcome:
    """Gradients when only some of several outputs are used: those of a zero grad_output for the others."""
    live = recorded_outputs(s)
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
        off = difference(found, expected, tolerance(s), scales, s.roughness)
        if off is not None:
            return finding(f"{who}: gradient of {s.names[off.which]}: {off}", f"one path: wrong {who}")
    parts = [
        s.gradients(cotangents=[v if j == k else None for j, v in enumerate(s.cotangents)]) for k in live
    ]
    off = None if s.nonlinear else difference(_sum(parts), s.plain, tolerance(s), scales, s.roughness)
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
            twice = moved(s, [s.points[k] if m in (i, j) else p for m, p in enumerate(s.points)])
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
            return finding(
                f"{who}: output {off.which}: {off}",
                "overwritten: the value is another one if two inputs are the same tensor",
            )
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


# ----- which tensors share memory -----


@probe()
def aliasing(s: Subject) -> Outcome:
    """Writing into an output, or adding to a gradient, changes no other tensor."""
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
    """Whether two tensors share a storage, and autograd takes neither for a view of the other."""
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
    if not recorded_outputs(s):
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
        off = difference([leaf.grad for leaf in leaves], expected, tolerance(s), scales, s.roughness)
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


# ----- which outputs depend on the inputs -----


@probe()
def output_requires_grad(s: Subject) -> Outcome:
    """An output that depends on the inputs requires grad."""
    outcome = _depends_but_lost(s)
    if outcome.verdict != "passed" or s.module is None:
        return outcome
    was = s.module.training
    try:
        s.module.train(not was)
        other = moved(s, s.points)
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
                formula = ", and backward has a formula for it" if _has_formula_for_what_is_lost(s) else ""
                return finding(
                    f"{evidence}{formula}: what is trained on it loses a term in silence",
                    "zero: one path is lost. If the output is not meant to be trained on, accept this finding",
                )
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
