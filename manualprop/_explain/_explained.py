"""What an explanation holds; its views read this, and :mod:`._explanation` calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from manualprop._explain._diagnosis import Finding
from manualprop._explain._numbers import Links
from manualprop._explain._observe import Observation
from manualprop._explain._steps import Step
from manualprop._explain._training import Recording, Slice
from manualprop.descent import Descent


@dataclass(frozen=True, repr=False)
class Explained:
    """An update of a model, step by step.

    Args:
        title: what is explained.
        loss: of the model.
        descent: that makes the update.
        examples: how many there are in all.
        rows: those that the update sees.
        steps: the ten of them.
        findings: what is wrong, with evidence.
        notes: what to know about these numbers.
        numbers: all tensors by key, before the update.
        links: whose output each layer is given.
        recording: the updates that follow.
        descents: the three descents on a slice of the loss, or why they are not there.
        image: height and width of an input, where it is one.
        history: rows of the run's history, for the page.
    """

    title: str
    loss: Module
    descent: Descent
    examples: int
    rows: Tensor
    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    numbers: Mapping[str, Tensor]
    links: Links
    recording: Recording
    descents: Slice | str
    image: tuple[int, int] | None = None
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def observation(self) -> Observation:
        """The explained update, as it was observed."""
        return self.recording.frames[0]

    @property
    def by_hand(self) -> bool:
        """Whether every gradient is one of this package's formulas."""
        return all(block.by_hand for step in self.steps for block in step.blocks)
