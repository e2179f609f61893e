"""Under the compiler: the right gradients, and by the hand rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, func
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import (
    Found,
    copies,
    differs,
    gradients_named,
    outputs_named,
    repeatable,
    scale_of,
)
from manualprop.verify.probes.routes import closeness, first_sentence, lost, recorded, weighed, what_is_wrong

FACTOR = 3


def _compiled(s: Subject, f: Callable[..., Any]) -> Callable[..., Any]:
    """Traced whole and run by AOTAutograd, without a code generator."""
    s.restore()  # the compiler reads the module's own parameters
    torch._dynamo.reset()
    traced: Callable[..., Any] = torch.compile(f, fullgraph=True, backend="aot_eager")
    return traced


@probe("full")
@repeatable
def compile(s: Subject) -> Outcome:
    """torch.compile(fullgraph=True) of the function, forward and backward."""
    was_recorded = recorded(s)
    leaves = s.at()
    try:
        s.reseed()
        outputs = _compiled(s, s.function)(*leaves)
        found = s.pull_back(outputs, leaves, [c.clone() for c in s.cotangents])
    except Exception as error:  # whatever the compiler refuses with
        return limit(first_sentence(error))
    finally:
        torch._dynamo.reset()
    values = closeness(s, outputs, s.outputs, outputs_named(s))
    if values and s.random:
        return limit("random numbers are drawn in another order, so that values cannot be compared")
    text = values or lost(outputs, was_recorded) or closeness(s, found, s.plain, gradients_named(s))
    if text:
        return finding(f"compiled, {text}", what_is_wrong(found, s.plain, "torch.compile"))
    return passed("traced whole, with the plain gradients")


# ----- the poisoned backward -----


@contextmanager
def poisoned(classes: Sequence[type[Function]]) -> Iterator[None]:
    """Every derivative that these Functions state is three times too large."""
    stated = [(cls, name, vars(cls).get(name)) for cls in classes for name in ("backward", "vjp", "jvp")]
    try:
        for cls, name, _ in stated:
            rule = getattr(cls, name)
            if rule is not getattr(Function, name):
                setattr(cls, name, staticmethod(_tripled(rule)))
        yield
    finally:
        for cls, name, own in stated:
            if own is not None:
                setattr(cls, name, own)
            elif name in vars(cls):
                delattr(cls, name)


def _tripled(rule: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(ctx: Any, *given: Any) -> Any:
        found = rule(ctx, *given)
        if isinstance(found, tuple | list):
            return tuple(_three(d) for d in found)
        return _three(found)

    return wrong


def _three(d: Any) -> Any:
    return FACTOR * d if isinstance(d, Tensor) else d


Route = Callable[[Subject], Found]


def _create_graph(s: Subject) -> Found:
    leaves = s.at()
    return s.pull_back(s(*leaves), leaves, [c.clone() for c in s.cotangents], create_graph=True)


def _checkpointed(s: Subject) -> Found:
    leaves = s.at()
    s.reseed()
    outputs = checkpoint(s.function, *leaves, use_reentrant=False)
    return s.pull_back(outputs, leaves, [c.clone() for c in s.cotangents])


def _autocast(s: Subject) -> Found:
    single = Subject(s.case, torch.float32)
    single._not_leaf = s._not_leaf
    with torch.autocast(s.points[0].device.type, torch.bfloat16):
        leaves = single.at()
        outputs = single(*leaves)
    return single.pull_back(outputs, leaves, single.cotangents_for(outputs))


def _all(s: Subject) -> tuple[int, ...]:
    return tuple(range(len(s.points)))


def _points(s: Subject) -> tuple[Tensor, ...]:
    s.reseed()
    return tuple(p.clone() for p in s.points)


def _grad_of(s: Subject) -> Callable[..., Any]:
    return func.grad(lambda *p: weighed(s, p, s.cotangents), argnums=_all(s))


def _grad(s: Subject) -> Found:
    return list(_grad_of(s)(*_points(s)))


def _vjp(s: Subject) -> Found:
    pull = func.vjp(s.function, *_points(s))[1]
    return list(pull(tuple(c.clone() for c in s.cotangents)))


def _jacrev(s: Subject) -> Found:
    return list(func.jacrev(lambda *p: weighed(s, p, s.cotangents), argnums=_all(s))(*_points(s)))


def _vmap_of(s: Subject) -> Callable[..., Any]:
    return func.vmap(_grad_of(s), randomness="same")


def _vmap_grad(s: Subject) -> Found:
    return [g[0] for g in _vmap_of(s)(*[torch.stack([p, p]) for p in _points(s)])]


def _directions(s: Subject) -> tuple[Tensor, ...]:
    return tuple(s.random_like(s.points, 30))


def _jvp(s: Subject) -> Found:
    return list(func.jvp(s.function, _points(s), _directions(s))[1])


def _jacfwd(s: Subject) -> Found:
    points, directions = _points(s), _directions(s)

    def along(t: Tensor) -> tuple[Tensor, ...]:
        return s.function(*[p + t * d for p, d in zip(points, directions, strict=True)])

    return list(func.jacfwd(along, randomness="same")(torch.zeros((), dtype=points[0].dtype)))


def _compile(s: Subject) -> Found:
    leaves = s.at()
    s.reseed()
    outputs = _compiled(s, s.function)(*leaves)
    return s.pull_back(outputs, leaves, [c.clone() for c in s.cotangents])


def _compile_grad(s: Subject) -> Found:
    return list(_compiled(s, _grad_of(s))(*_points(s)))


def _compile_vmap_grad(s: Subject) -> Found:
    return [g[0] for g in _compiled(s, _vmap_of(s))(*[torch.stack([p, p]) for p in _points(s)])]


class _Exportable(torch.nn.Module):
    def __init__(self, s: Subject) -> None:
        super().__init__()
        self.s = s

    def forward(self, *points: Tensor) -> tuple[Tensor, ...]:
        return self.s.function(*points)


def _exported(s: Subject) -> Found:
    s.restore()
    program = torch.export.export(_Exportable(s), _points(s), strict=False)
    leaves = s.at()
    return s.pull_back(program.module()(*leaves), leaves, [c.clone() for c in s.cotangents])


ROUTES: dict[str, Route] = {
    "backward with create_graph": _create_graph,
    "func.grad": _grad,
    "func.vjp": _vjp,
    "jacrev": _jacrev,
    "vmap(grad)": _vmap_grad,
    "checkpoint": _checkpointed,
    "autocast": _autocast,
    "compile": _compile,
    "compile(func.grad)": _compile_grad,
    "compile(vmap(grad))": _compile_vmap_grad,
    "training of an exported module": _exported,
    "func.jvp": _jvp,
    "jacfwd": _jacfwd,
}
FORWARD = ("func.jvp", "jacfwd")
# Held against their own values without the poison: tangents, or bfloat16's.
OF_THEIR_OWN = (
    *FORWARD,
    "autocast",
)
# What must work in eager mode for a bypass to count.
EAGER = {"compile(func.grad)": "func.grad", "compile(vmap(grad))": "vmap(grad)"}
FOR_EVERY_FUNCTION = "training of an exported module"  # torch differentiates what it exported: the forward


@probe("full")
@repeatable
def poisoned_backward(s: Subject) -> Outcome:
    """Is it the hand rule that runs?  Made three times too large, it must show on every route."""
    classes = s.functions
    if not classes:
        return skipped("no custom Function")
    with poisoned(classes):
        wrong = copies(s.gradients())
    if not differs(wrong, s.plain, gradients_named(s), 1e-3):
        return skipped(f"no gradient depends on {', '.join(cls.__name__ for cls in classes)}")
    try:
        outcome = _judged(_routes(s, classes, wrong))
    finally:
        torch._dynamo.reset()
    on_purpose = s.case.surrogate is not None or "first_order" in s.case.accept
    return apart(outcome, "first_order") if on_purpose else outcome


class _Seen:
    """What the routes gave: bypassed with the same values, bypassed with others, refused."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.same: list[str] = []
        self.other: dict[str, str] = {}
        self.refused: dict[str, str] = {}


def _routes(s: Subject, classes: Sequence[type[Function]], wrong: Found) -> _Seen:
    """Each route with the poison in place; ``wrong`` is what a plain backward then gives."""
    seen = _Seen()
    for name, route in ROUTES.items():
        try:
            right = copies(route(s)) if name in OF_THEIR_OWN else s.plain
            with poisoned(classes):
                found = copies(route(s))
        except Exception as error:  # whatever torch refuses with
            seen.refused[name] = first_sentence(error)
            continue
        names = outputs_named(s) if name in FORWARD else gradients_named(s)
        if name in OF_THEIR_OWN:
            if scale_of(right):  # else there is nothing to scale
                (seen.ran if differs(found, right, names, 1e-2) else seen.same).append(name)
        elif not closeness(s, found, wrong, names):
            seen.ran.append(name)
        elif not closeness(s, found, s.plain, names):
            seen.same.append(name)
        elif name in (*EAGER, FOR_EVERY_FUNCTION) or not closeness(s, copies(route(s)), s.plain, names):
            seen.other[name] = differs(found, s.plain, names, 1e-6)
        # else the route is wrong without the poison too, which its own probe tells
    return seen


def _judged(seen: _Seen) -> Outcome:
    details = {"ran": seen.ran, "bypassed": [*seen.same, *seen.other], "refused": seen.refused}
    counted = {
        name: text
        for name, text in seen.other.items()
        if name != FOR_EVERY_FUNCTION and EAGER.get(name) not in seen.refused
    }
    if counted:
        (name, text), *_ = counted.items()
        return finding(
            f"{', '.join(counted)}: the hand rule is bypassed and the forward differentiated instead: under {name} {text}",
            f"hand rule bypassed by {', '.join(counted)}",
            **details,
        )
    parts = [f"ran by {', '.join(seen.ran)}"] if seen.ran else []
    bypassed = [name for name in seen.same if name != FOR_EVERY_FUNCTION]
    bypassed += [name for name in seen.other if name != FOR_EVERY_FUNCTION]
    if bypassed:
        parts.insert(
            0, f"bypassed: {', '.join(bypassed)} differentiate the forward, here with the same values"
        )
    if FOR_EVERY_FUNCTION in (*seen.same, *seen.other):
        how = "the same" if FOR_EVERY_FUNCTION in seen.same else "other"
        parts.append(
            f"{FOR_EVERY_FUNCTION} differentiates the forward, as of every Function, with {how} values"
        )
    if seen.refused:
        parts.append(f"refused: {', '.join(seen.refused)}")
    return limit("; ".join(parts), **details) if bypassed else passed("; ".join(parts), **details)
