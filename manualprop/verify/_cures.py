"""Take a defect away and ask again: what is still found has another cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manualprop.verify._case import Around, Case
from manualprop.verify._probe import PROBES, Probe
from manualprop.verify._report import Outcome, apart
from manualprop.verify._subject import is_float
from manualprop.verify._verdicts import ARGUMENTS, CONSEQUENCES, STATE


class Copies:
    """The function gets and gives copies, and so does its backward; all are contiguous."""

    def inward(self, given: Any) -> Any:
        return tree_map(_copied, given)

    def outward(self, result: Any, reseed: Callable[[], None]) -> Any:
        return tree_map(_copied, result)


def _copied(t: Any) -> Any:
    """A contiguous copy, whose gradient is one too."""
    return (t.reshape(-1) * 1).reshape(t.shape) if is_float(t) else t


class Seeded:
    """Backward starts where the random generator stood when forward did."""

    def inward(self, given: Any) -> Any:
        return given

    def outward(self, result: Any, reseed: Callable[[], None]) -> Any:
        if not torch._C._are_functorch_transforms_active():
            for y in tree_leaves(result):
                if isinstance(y, Tensor) and y.requires_grad:
                    y.register_hook(lambda g: reseed())
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class Cured(Case):
    """A case from which a defect is taken away."""

    around: Around | None = None  # type: ignore[misc]


# A backward that is not linear in grad_output is accepted as one: None.
CURES: dict[str, Around | None] = {
    "mutation": Copies(),
    "aliasing": Copies(),
    "grad_output_layout": Copies(),
    "input_layout": Copies(),
    "random_state": Seeded(),
    "linearity": None,
}
# What a cure does not reach: a saved tensor that is written into is found in the copies too, and random numbers
# fall on other entries in another layout, from whatever seed.
OUT_OF_REACH = {"random_state": (*STATE, *ARGUMENTS)}
COMPILED = "compiled"  # the family of probes that take seconds each

Ask = Callable[[Case, Sequence[Probe]], Iterable[Outcome]]


def asked_again(case: Case, outcomes: Sequence[Outcome], ask: Ask) -> list[Outcome]:
    """The outcomes, of which findings that outlive the cure of their cause say so."""
    found = {o.probe: o for o in outcomes if o.verdict == "finding"}
    for cause in CURES:
        if cause in found:
            for name in _outlive(case, cause, found, ask):
                found[name] = apart(found[name], cause)
    return [found.get(o.probe, o) for o in outcomes]


def _outlive(case: Case, cause: str, found: dict[str, Outcome], ask: Ask) -> list[str]:
    """The probes that find the same where the cause is cured; none, if it cannot be."""
    asked = [
        PROBES[name]
        for name in CONSEQUENCES.get(cause, ())
        if name in found and _in_reach(cause, found[name])
    ]
    if not asked or (CURES[cause] is None and found[cause].evidence.startswith("raises")):
        return []
    # The cure must cure, and not break what was right: a backward that ignores grad_output is not linear for a small one.
    # Whoever reseeds touches the generator, so that random_state cannot see its own cure.
    right = [PROBES[name] for name in (cause, "first_order") if name == cause or name not in found]
    right = [p for p in right if p.name not in ("random_state", "linearity")]
    again = {o.probe: o for o in ask(_cured(case, cause), [*right, *asked])}
    if any(again[p.name].verdict == "finding" for p in right if p.name in again):
        return []
    return [p.name for p in asked if p.name in again and again[p.name].verdict == "finding"]


def _in_reach(cause: str, outcome: Outcome) -> bool:
    """Whether a cure would take the finding away, if that followed from the cause."""
    name = outcome.probe
    if PROBES[name].family == COMPILED or name in OUT_OF_REACH.get(cause, STATE):
        return False
    if cause == "random_state" and "raises" in outcome.evidence:
        return False  # what draws may be what raises
    # Copies are written into too, and autograd may have saved them: only a missing graph has another cause.
    return (
        cause != "mutation"
        or name != "second_order"
        or outcome.diagnosis.startswith("zero: no gradient at all")
    )


def _cured(case: Case, cause: str) -> Case:
    around = CURES[cause]
    if around is None:
        return dataclasses.replace(case, accept={**case.accept, cause: "cured"})
    given = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
    return Cured(**given, around=around)
