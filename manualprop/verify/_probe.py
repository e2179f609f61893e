"""The registry of probes: what each is called, when it runs, and what it takes for support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from manualprop.verify._report import Outcome
from manualprop.verify._subject import Subject

Run = Callable[[Subject], Outcome]
Level = Literal["quick", "full", "deep"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Probe(NamedTuple):
    """One question asked of a function.

    Args:
        name: of the probe, as reports, declarations and ``only`` call it.
        run: asks it.  May raise: what it raises becomes a finding.
        level: the first at which it runs: ``quick``, ``full`` or ``deep``.
        alone: whether it runs in a process of its own, since it changes what others would see or may crash.
        family: name of the module it stands in.
    """

    name: str
    run: Run
    level: Level
    alone: bool
    family: str


PROBES: dict[str, Probe] = {}

# What users call a feature -> the probes that show it.
FEATURES = {
    "double_backward": ("second_order", "third_order"),
    "transforms": ("vmap", "func_grad", "jacrev", "jacfwd", "vmap_grad"),
}


def probe(level: Level = "quick", *, alone: bool = False) -> Callable[[Run], Run]:
    """Register a function as the probe of its name."""

    def register(run: Run) -> Run:
        name = run.__name__
        PROBES[name] = Probe(name, run, level, alone, run.__module__.rpartition(".")[2])
        return run

    return register
