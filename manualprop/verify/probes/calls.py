"""A second call, a second backward, a copy of the module: the same numbers each time."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable

import torch
from torch import Tensor

from manualprop.verify._compare import right_instead
from manualprop.verify._module import exchange
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import (
    Call,
    Found,
    copies,
    differentiable,
    differs,
    elsewhere,
    exactness,
    gradients_named,
    in_words,
    outputs_named,
    repeatable,
    run,
)

# ----- once more -----


@probe()
@differentiable
def retain_graph(s: Subject) -> Outcome:
    """A second backward through the same graph gives the same."""
    call = run(s)
    s.reseed()  # before each: what backward draws is the business of random_state
    first = call.backward(s.cotangents, retain_graph=True)
    kept = copies(first)
    other = s.random_like(s.outputs, 3)
    try:
        s.reseed()
        second = copies(call.backward(s.cotangents, retain_graph=True))
        s.reseed()
        third = call.backward(other)
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(f"the second backward raises {message(error)}")
    fresh = run(s)
    s.reseed()
    expected = fresh.backward(other)
    names, exact = gradients_named(s), exactness(s)
    for found, want, what in (
        (second, kept, "in the second backward"),
        (third, expected, "in the third backward, of another grad_output,"),
    ):
        text = differs(found, want, names, exact)
        if text:
            return finding(
                f"{what} {text}",
                in_words(
                    found,
                    want,
                    "backward changes what it reads: a saved tensor is overwritten, or something kept goes stale",
                ),
            )
    text = differs(first, kept, names, 0.0)
    if text:
        return finding(
            f"a later backward overwrites the gradients that were returned: {text}",
            "overwritten: the same buffer is returned each time",
        )
    return passed("three backwards agree")


@probe()
@differentiable
def repeat(s: Subject) -> Outcome:
    """Forward and backward once more give the same, and .grad adds up."""
    names, exact = gradients_named(s), exactness(s)
    first = run(s)
    outputs = copies(first.outputs)
    gradients = first.backward(s.cotangents)
    kept = copies(gradients)
    again = run(s)
    text = differs(again.outputs, outputs, outputs_named(s), exact)
    if text:
        return finding(f"in the second call {text}", in_words(again.outputs, outputs, "stale state"))
    found = again.backward(s.cotangents)
    text = differs(found, kept, names, exact)
    if text:
        return finding(
            f"in the second call {text}",
            in_words(found, kept, "stale or overwritten: backward depends on the calls before"),
        )
    outputs = copies(first.outputs)
    run(s, elsewhere(s)).backward(s.random_like(s.outputs, 3))
    text = differs(gradients, kept, names, 0.0) or differs(first.outputs, outputs, outputs_named(s), 0.0)
    if text:
        return finding(
            f"a later call overwrites what an earlier one returned: {text}",
            "overwritten: the same buffer is returned each time",
        )
    with torch.no_grad():
        run(s)
    found = run(s).backward(s.cotangents)
    text = differs(found, kept, names, exact)
    if text:
        return finding(f"after a call without gradient {text}", in_words(found, kept, "stale state"))
    wrong = _accumulated(s, kept)
    return finding(*wrong) if wrong else passed("two calls agree, and .grad adds up")


def _accumulated(s: Subject, once: Found) -> tuple[str, str] | None:
    """What is wrong with .grad after two backwards into it."""
    leaves = s.at()
    for _ in range(2):
        outputs = s(*leaves)
        pairs = [(y, c.clone()) for y, c in zip(outputs, s.cotangents, strict=True) if y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [c for _, c in pairs])
    found = [leaf.grad for leaf in leaves]
    expected = [None if g is None else 2 * g for g in once]
    text = differs(found, expected, [f"{n}.grad" for n in s.names], exactness(s))
    if not text:
        return None
    return f"after two backwards {text}", in_words(found, expected, "stale or overwritten")


# ----- by other ways through the same backward -----


@probe()
@differentiable
def grad_modes(s: Subject) -> Outcome:
    """The gradient with create_graph, under no_grad, in .backward() and after an in-place change of the input: the same."""
    names = gradients_named(s)
    for what, ask in _MODES.items():
        try:
            found = ask(s)
        except Exception:  # refused, as by once_differentiable: the business of second_order
            continue
        text = differs(found, s.plain, names, exactness(s), s.roughness)
        if text:
            bad = finding(f"{what}, {text}", in_words(found, s.plain, f"only {what}"))
            return bad if right_instead(s, found) else apart(bad, "first_order")
    text = _after_a_change(s)
    if text:
        return finding(
            f"after an in-place change of the input, {text}",
            "stale: something is kept by the identity or the address of the input, and a change of its values goes unseen",
        )
    return passed(f"{', '.join(_MODES)}, after an in-place change of the input: the same numbers")


def _by_create_graph(s: Subject) -> Found:
    return copies(run(s).backward(s.cotangents, create_graph=True))


def _twice(s: Subject) -> Found:
    call = run(s)
    call.backward(s.cotangents, create_graph=True)
    return copies(call.backward(s.cotangents))


def _under_no_grad(s: Subject) -> Found:
    call = run(s)
    with torch.no_grad():
        return copies(call.backward(s.cotangents))


def _by_backward(s: Subject) -> Found:
    call = run(s)
    live = [(y, c) for y, c in zip(call.outputs, s.cotangents, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in live], [c for _, c in live])
    return copies([leaf.grad for leaf in call.leaves])


_MODES: dict[str, Callable[[Subject], Found]] = {
    "under create_graph=True": _by_create_graph,
    "after a backward with create_graph=True": _twice,
    "under torch.no_grad()": _under_no_grad,
    "by .backward()": _by_backward,
}


def _after_a_change(s: Subject) -> str:
    """How the gradient at other values differs if they are written into the tensors of the call before."""
    there = s.with_points(elsewhere(s))
    # Memory that was never an input of it: else it might have kept something by the address already.
    held = [
        [torch.empty_like(p) for p in s.points] for _ in range(64) if sum(p.numel() for p in s.points) < 1e5
    ]
    expected, values = there.plain, there.outputs
    held += [[torch.empty_like(p) for p in s.points] for _ in held]
    leaves = s.at()
    s.pull_back(s(*leaves), leaves, s.cotangents)
    with torch.no_grad():
        for leaf, p in zip(leaves, there.points, strict=True):
            leaf.copy_(p)
    outputs = s(*leaves)
    found = s.pull_back(outputs, leaves, there.cotangents)
    text = differs(outputs, values, outputs_named(s), exactness(s))
    return text or differs(found, expected, gradients_named(s), exactness(s), s.roughness)


# ----- several calls at a time -----


def _buffers(s: Subject) -> dict[str, Tensor]:
    """A module's buffers, copied: what successive calls share."""
    _, _, state = s.arguments(*s.points)
    own = s.own_buffers()
    return {name: t for name, t in state.items() if name in own}


class _Two:
    """Two calls with the same buffers, one after the other; their parts in any order."""

    def __init__(self, s: Subject, other: Subject, shared: bool = True) -> None:
        self.subjects = (s, other)
        self.buffers = _buffers(s) if shared else None
        self.calls: list[Call] = []
        self.outputs: list[list[Tensor | None]] = []
        self.gradients: list[list[Tensor | None]] = [[], []]

    def forward(self, i: int, recorded: bool = True) -> None:
        call = Call(self.subjects[i], buffers=self.buffers)
        with torch.set_grad_enabled(recorded):
            call.forward()
        if self.buffers is not None:
            self.buffers = {name: call.state[name] for name in self.buffers}
        self.calls.append(call)
        self.outputs.append(copies(call.outputs))

    def backward(self, i: int) -> None:
        s = self.subjects[i]
        cotangents = s.random_like(self.calls[i].outputs, 1 + 2 * i)
        s.reseed()
        self.gradients[i] = copies(self.calls[i].backward(cotangents))


@probe()
@differentiable
def interleaving(s: Subject) -> Outcome:
    """Two forwards before their backwards, in either order, give what they give one after the other."""
    there = s.with_points(_other_arguments(s))
    for other, what in ((there, "of other values"), (_larger(s), "of another size")):
        if other is None:
            continue
        outcome = _interleaved(s, other, what)
        if outcome is not None:
            return outcome
    return passed("two calls at a time do not disturb one another")


def _other_arguments(s: Subject) -> list[Tensor]:
    """Other values of the arguments; a module has the same parameters in both calls."""
    moved = elsewhere(s)
    return [
        p.clone() if isinstance(known.slot, str) else q
        for known, p, q in zip(s._points, s.points, moved, strict=True)
    ]


def _interleaved(s: Subject, other: Subject, what: str) -> Outcome | None:
    apart = _Two(s, other)
    try:
        for i in (0, 1):
            apart.forward(i)
            apart.backward(i)
    except Exception:  # whatever the checked code raises: what varies here is the order only
        return None
    for order in ((0, 1), (1, 0)):
        both = _Two(s, other)
        both.forward(0)
        both.forward(1)
        text = differs(both.calls[0].outputs, both.outputs[0], outputs_named(s), 0.0)
        if text:
            return finding(
                f"a second call {what} overwrites the first one's result: {text}",
                "overwritten: the same buffer is returned each time",
            )
        try:
            for i in order:
                both.backward(i)
        except Exception as error:  # whatever torch or the checked code refuses with
            return limit(f"backward raises after another forward: {message(error)}")
        outcome = _undisturbed(both, apart, what)
        if outcome is not None:
            return outcome
    looked = _Two(s, other)
    looked.forward(0)
    looked.forward(1, recorded=False)
    try:
        looked.backward(0)
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(f"backward raises after another forward without gradient: {message(error)}")
    looked.gradients[1] = apart.gradients[1]
    s(*s.at())  # a recorded call overwrites what the one without gradient has left behind
    return _undisturbed(looked, apart, f"{what} and without gradient")


def _undisturbed(both: _Two, apart: _Two, what: str) -> Outcome | None:
    s = both.subjects[0]
    for i in (0, 1):
        text = differs(both.gradients[i], apart.gradients[i], gradients_named(s), exactness(s))
        if text:
            return finding(
                f"with a second call {what} between forward and backward, {text}",
                "stale or overwritten: what backward reads is kept outside of the graph, and the next call "
                "writes there",
            )
    return None


def _larger(s: Subject) -> Subject | None:
    """The function with twice the rows, if it takes them."""
    parameters = s.own_parameters()
    if any(p.dim() == 0 for n, p in zip(s.names, s.points, strict=True) if n not in parameters):
        return None
    rows = [p if n in parameters else torch.cat([p, 0.5 * p]) for n, p in zip(s.names, s.points, strict=True)]
    try:
        other = s.with_points(s.allowed(rows))
        other(*other.at())
    except Exception:  # whatever the checked code raises: not every argument has rows
        return None
    return other


# ----- copies of a module -----


@probe()
@repeatable
def module_copy(s: Subject) -> Outcome:
    """A module copied, pickled, or given its state_dict back computes the same."""
    if s.module is None:
        return skipped("not a module")
    notes, done = [], []
    for make, what in (
        (_deep_copy, "its deepcopy"),
        (_pickled, "saved and loaded"),
        (_reloaded, "its state_dict"),
    ):
        s.restore()
        try:
            twin = make(s.module)
        except Exception as error:  # whatever copying it refuses with
            notes.append(f"{what}: {message(error)}")
            continue
        outcome = _as_good(s, twin, what)
        if outcome is not None:
            return outcome
        done.append(what)
    if not notes:
        return passed(f"{', '.join(done)} computes the same")
    return limit("; ".join(notes))


def _deep_copy(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module)


def _pickled(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: torch.nn.Module = torch.load(file, weights_only=False)
    return loaded


def _reloaded(module: torch.nn.Module) -> torch.nn.Module:
    """A twin that has lost its values, and got them back from the state_dict."""
    twin = copy.deepcopy(module)
    state = {key: t.clone() if isinstance(t, Tensor) else t for key, t in module.state_dict().items()}
    with torch.no_grad():
        for t in twin.state_dict().values():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.mul_(0.5).add_(0.125)
    twin.load_state_dict(state)
    return twin


def _as_good(s: Subject, twin: torch.nn.Module, what: str) -> Outcome | None:
    exchange(twin, afresh=True)
    other = Subject(dataclasses.replace(s.case, fn=twin), s.dtype)
    other._not_leaf = s._not_leaf
    if other.names != s.names:
        return finding(f"{what} has other parameters: {', '.join(other.names)} for {', '.join(s.names)}")
    try:
        gradients = other.plain
    except Exception as error:  # whatever the checked code raises
        return finding(f"{what} raises {message(error)}")
    text = differs(other.outputs, s.outputs, outputs_named(s), exactness(s)) or differs(
        gradients, s.plain, gradients_named(s), exactness(s)
    )
    if not text:
        return None
    shares = any(g is None and e is not None for g, e in zip(gradients, s.plain, strict=True))
    return finding(
        f"in {what} {text}", "the copy uses the tensors of the original" if shares else "state is lost"
    )
