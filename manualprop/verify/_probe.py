"""The registry of probes: their names, levels and families."""

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
        name: in reports, in ``accept``, ``declare`` and ``only``.
        run: the probe.  What it raises becomes a finding.
        level: the first at which it runs: ``quick``, ``full`` or ``deep``.
        alone: whether it runs in a process of its own, because it may crash or disturb other probes.
        family: name of its module.
    """

    name: str
    run: Run
    level: Level
    alone: bool
    family: str


PROBES: dict[str, Probe] = {}

# A group, named as users call the feature -> its probes.
FEATURES = {
    "double_backward": ("second_order", "third_order"),
    "transforms": ("vmap", "func_grad", "jacrev", "jacfwd", "vmap_grad"),
}


def probe(level: Level = "quick", *, alone: bool = False) -> Callable[[Run], Run]:
    """Register a function as a probe.  Its name is the probe's."""

    def register(run: Run) -> Run:
        name = run.__name__
        PROBES[name] = Probe(name, run, level, alone, run.__module__.rpartition(".")[2])
        return run

    return register
