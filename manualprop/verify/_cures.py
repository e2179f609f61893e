"""Take a defect away and run the probes again: what they still find has another cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manualprop.verify._case import Around, Case
from manualprop.verify._explanations import MISSING
from manualprop.verify._probe import PROBES, Probe
from manualprop.verify._report import Outcome, apart
from manualprop.verify._subject import is_float
from manualprop.verify._verdicts import ARGUMENTS, CONSEQUENCES, STATE


class Copies:
    """Forward and backward take and return contiguous copies."""

    def inward(self, given: Any) -> Any:
        return tree_map(_copied, given)

    def outward(self, result: Any, reseed: Callable[[], None]) -> Any:
        return tree_map(_copied, result)


def _copied(t: Any) -> Any:
    """A contiguous copy, with a contiguous gradient.

    Under vmap, too: there a product keeps the order of the axes in memory, that of the batch among them.
    """
    return (t.reshape(-1) * 1).contiguous().reshape(t.shape) if is_float(t) else t


class Seeded:
    """Backward starts with the random generator in the state in which forward started."""

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
    """A case without one of its defects."""

    around: Around | None = None  # type: ignore[misc]


# None: instead of a wrapper, the acceptance of a backward that is not linear in grad_output.
CURES: dict[str, Around | None] = {
    "mutation": Copies(),
    "aliasing": Copies(),
    "grad_output_layout": Copies(),
    "input_layout": Copies(),
    "random_state": Seeded(),
    "linearity": None,
}
# What a cure cannot take away.  A saved tensor is written into in the copies too.  In another layout random numbers
# go to other entries, with any seed.
OUT_OF_REACH = {"random_state": (*STATE, *ARGUMENTS)}
COMPILED = "compiled"  # a family of probes that take seconds each

Ask = Callable[[Case, Sequence[Probe]], Iterable[Outcome]]


def asked_again(case: Case, outcomes: Sequence[Outcome], ask: Ask) -> list[Outcome]:
    """The outcomes.  A finding that remains when its cause is cured is marked as independent."""
    found = {o.probe: o for o in outcomes if o.verdict == "finding"}
    for cause in CURES:
        if cause in found:
            for name in _outlive(case, cause, found, ask):
                found[name] = apart(found[name], cause)
    return [found.get(o.probe, o) for o in outcomes]


def _outlive(case: Case, cause: str, found: dict[str, Outcome], ask: Ask) -> list[str]:
    """The probes that still find something when the cause is cured; none if it cannot be cured."""
    asked = [
        PROBES[name]
        for name in CONSEQUENCES.get(cause, ())
        if name in found and _in_reach(cause, found[name])
    ]
    if not asked or (CURES[cause] is None and found[cause].evidence.startswith("raises")):
        return []
    if cause == "mutation" and _saved_after_it_was_written(found):
        return []
    # The cure must work, and must not break what was right: a backward that ignores grad_output fails for a small one.
    # Reseeding touches the generator, so random_state cannot see its own cure.
    right = [PROBES[name] for name in (cause, "first_order") if name == cause or name not in found]
    right = [p for p in right if p.name not in ("random_state", "linearity")]
    again = {o.probe: o for o in ask(_cured(case, cause), [*right, *asked])}
    if any(again[p.name].verdict == "finding" for p in right if p.name in again):
        return []
    return [p.name for p in asked if p.name in again and again[p.name].verdict == "finding"]


def _saved_after_it_was_written(found: dict[str, Outcome]) -> bool:
    """Whether forward writes into its input and saves it then, a copy as well as the caller's."""
    first = found.get("first_order")
    writes = found["mutation"].evidence.startswith("forward writes")
    return writes and first is not None and first.diagnosis.startswith("this is the right gradient for")


def _in_reach(cause: str, outcome: Outcome) -> bool:
    """Whether the cure would take the finding away if the cause explained it."""
    name = outcome.probe
    if PROBES[name].family == COMPILED or name in OUT_OF_REACH.get(cause, STATE):
        return False
    if cause == "random_state" and "raises" in outcome.evidence:
        return False  # the call that draws may be the one that raises
    if cause == "mutation" and name == "leaks" and "create_graph" in outcome.evidence:
        return False  # what a recorded backward writes into may keep itself alive, a copy too
    # Backward writes into the copies too, and autograd may have saved them.  Only a missing graph has another cause.
    return cause != "mutation" or name != "second_order" or outcome.diagnosis.startswith(MISSING)


def _cured(case: Case, cause: str) -> Case:
    around = CURES[cause]
    if around is None:
        return dataclasses.replace(case, accept={**case.accept, cause: "cured"})
    given = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
    return Cured(**given, around=around)
