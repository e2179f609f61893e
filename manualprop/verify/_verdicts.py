"""From the probes' outcomes to the report: one finding for one cause; then what is declared and accepted."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

from manualprop.verify._probe import FEATURES
from manualprop.verify._report import Outcome

KNOWN = "known: it stands in the baseline"  # the reason of an acceptance

# Cause -> consequences.  A finding of the first may explain findings of the others: they call the same backward, in the
# same state.  The order counts: the first cause that was found explains.  A finding stays if its probe, or a cure
# (_cures), shows that it is independent of the cause.
STATE = ("retain_graph", "repeat", "interleaving", "checkpointing", "grad_modes")
_KEPT = ("saved_tensors", "inplace_edit", "leaks")
_NUMBERS = (
    "first_order", "second_order", "third_order", "forward_over_reverse", "linearity", "sizes", "zero_size", "ranks",
    "indices", "dtypes", "mixed_dtypes", "autocast", "extremes", "ties",
)  # fmt: skip
_FORWARD = ("forward_mode", "forward_over_reverse", "nested_forward_mode", "jacfwd")
_TRANSFORMS = ("func_grad", "jacrev", "vmap", "vmap_grad", "compile", "poisoned_backward")
ARGUMENTS = (
    "grad_output_layout", "input_layout", "requires_grad_subsets", "partial_outputs", "same_input", "aliasing",
)  # fmt: skip
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "mutation": (*_NUMBERS, *ARGUMENTS, *STATE, *_TRANSFORMS, "inplace_edit", "random_state", "module_copy", "leaks"),
    "random_state": (*_NUMBERS, *ARGUMENTS, *STATE, *_TRANSFORMS),
    "grad_modes": ("second_order", "third_order", "forward_over_reverse", "checkpointing", "ranks"),
    "retain_graph": (
        "second_order", "linearity", "repeat", "interleaving", "checkpointing", "grad_modes", "ranks", *ARGUMENTS,
    ),
    "interleaving": (
        "second_order", "input_layout", "repeat", *_KEPT, "checkpointing", "vmap", "sizes", "ranks", "grad_modes",
        "poisoned_backward",
    ),
    "repeat": (*_NUMBERS, *ARGUMENTS, "checkpointing", "grad_modes", "vmap"),
    "first_order": (
        *_NUMBERS, *_FORWARD, "reference", "grad_modes", "func_grad", "grad_output_layout",
        "poisoned_backward",
    ),
    "output_requires_grad": ("first_order", *_FORWARD, "second_order", "partial_outputs"),
    "requires_grad_subsets": (*_FORWARD, *_TRANSFORMS),
    "partial_outputs": ("second_order", "extremes", "ties", "sizes", *_TRANSFORMS),
    "grad_output_layout": ("second_order", "jacrev", "vmap", "ranks"),
    "input_layout": ("second_order", "vmap", "ranks", "vmap_grad"),
    "aliasing": ("compile",),
    "reference": ("extremes", "ties"),
    "second_order": ("third_order", "forward_over_reverse", "saved_tensors", "sizes", "dtypes", "extremes"),
    "linearity": ("second_order", "partial_outputs", "zero_size", "sizes", "dtypes", "autocast", "extremes", "ranks"),
    "saved_tensors": ("inplace_edit", "leaks"),
    "inplace_edit": ("leaks",),
    "indices": ("sizes", "ranks"),
    "sizes": ("zero_size", "ranks"),
    "ranks": ("sizes", "zero_size", "vmap", "vmap_grad"),
    "dtypes": ("mixed_dtypes", "autocast", "extremes", "ranks"),
    "output_dtype": ("dtypes", "mixed_dtypes", "autocast", "extremes"),
    "extremes": ("ties",),
    "ties": ("sizes", "ranks", "vmap", "vmap_grad"),
    "forward_mode": ("forward_over_reverse", "nested_forward_mode", "jacfwd", "vmap", "ties"),
    "vmap": ("vmap_grad", "jacrev"),
    "func_grad": ("jacrev", "vmap_grad", "compile", "poisoned_backward"),
    "jacrev": ("vmap_grad",),
    "checkpointing": ("saved_tensor_hooks",),
    "compile": ("poisoned_backward",),
}  # fmt: skip


VALUE_DEPENDS = "the value depends on who requires grad"


def linked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same outcomes.  A finding that another one explains is skipped, with "see" and the name of that one."""
    by_name = {o.probe: o for o in outcomes}
    explained: dict[str, str] = {}
    crash = next((o for o in outcomes if o.evidence.startswith("crashes the process")), None)
    for o in outcomes:
        if crash is not None and o.evidence == crash.evidence and o is not crash:
            explained[o.probe] = crash.probe
    subsets = by_name.get("requires_grad_subsets")
    if subsets and subsets.verdict == "finding" and subsets.diagnosis == VALUE_DEPENDS:
        for name in _NUMBERS:  # without requires_grad, differences are those of another function
            explained.setdefault(name, "requires_grad_subsets")
    grad_modes = by_name.get("grad_modes")
    if grad_modes and grad_modes.verdict == "finding" and grad_modes.diagnosis.startswith("stale"):
        for name in _KEPT:
            explained.setdefault(name, "grad_modes")
    for cause, consequences in CONSEQUENCES.items():
        if cause not in by_name or by_name[cause].verdict != "finding":
            continue
        if cause in explained and cause != "func_grad":
            continue
        root = explained.get(cause, cause)  # what other transforms find, the cause of func_grad explains, too
        for name in consequences:
            if name in by_name and cause in by_name[name].details.get("apart_from", ()):
                continue
            if name != cause and name != (crash.probe if crash else ""):
                explained.setdefault(name, root)
    return [
        dataclasses.replace(
            o, verdict="skipped", evidence=f"see {explained[o.probe]}: {o.evidence}", diagnosis=""
        )
        if o.probe in explained and o.verdict == "finding"
        else o
        for o in outcomes
    ]


def held(
    outcomes: Iterable[Outcome], declare: Mapping[str, bool], accept: Mapping[str, str], known: Sequence[str]
) -> list[Outcome]:
    """The outcomes after the author's ``declare`` and ``accept`` are applied.

    Args:
        outcomes: of the probes that ran.
        declare: what must be supported.
        accept: the reason for each accepted finding or limit.
        known: names of all probes.
    """
    required = {p for name in declare for p in members([name], known, "declare")}
    reasons = {p: reason for name, reason in accept.items() for p in members([name], known, "accept")}
    found = linked([_required(o) if o.probe in required else o for o in outcomes])
    found = [_accepted(o, reasons[o.probe]) if o.probe in reasons else o for o in found]
    for name, reason in accept.items():
        found = _still_needed(found, name, reason)
    return found


def _required(o: Outcome) -> Outcome:
    if o.verdict != "limit":
        return o
    return dataclasses.replace(
        o, verdict="finding", evidence=f"declared as supported, but it is not: {o.evidence}"
    )


def _accepted(o: Outcome, reason: str) -> Outcome:
    if o.verdict not in ("finding", "limit"):
        return o
    return dataclasses.replace(o, verdict="accepted", evidence=f"{reason} ({o.evidence})")


def _still_needed(outcomes: Sequence[Outcome], name: str, reason: str) -> list[Outcome]:
    """Strict: accepting what passes is a finding, at the first probe named."""
    group = FEATURES.get(name, (name,))
    ran = [o for o in outcomes if o.probe in group]
    whole = name not in FEATURES or {o.probe for o in ran} >= set(group) - {"third_order"}
    if not ran or not whole or any(o.verdict != "passed" for o in ran):
        return list(outcomes)
    evidence = f"accepted because of {reason!r}, but it passes: take {name!r} out of accept"
    if reason == KNOWN:
        evidence = "known in the baseline, but it passes: --update-baseline takes it out"
    return [
        dataclasses.replace(o, verdict="finding", evidence=evidence) if o is ran[0] else o for o in outcomes
    ]


def members(names: Iterable[str], known: Sequence[str], where: str) -> list[str]:
    """The probes behind names of probes and groups.

    Raises:
        ValueError: for an unknown name.
    """
    found: list[str] = []
    for name in names:
        if name not in known and name not in FEATURES:
            similar = difflib.get_close_matches(name, [*known, *FEATURES], n=1)
            hint = (
                f"Did you mean {similar[0]!r}?"
                if similar
                else f"There are: {', '.join([*known, *FEATURES])}."
            )
            raise ValueError(f"check: {where} must name probes. Got {name!r}. {hint}")
        found += FEATURES.get(name, (name,))
    return found
