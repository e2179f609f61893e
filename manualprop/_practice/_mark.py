"""A mark: what a learner, a teacher's table and a test read of it."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Literal

from manualprop._practice._exercises import EXERCISES

Verdict = Literal["right", "first order only", "wrong", "not finished", "not started", "error", "gave up"]


@dataclass(frozen=True)
class Mark:
    """What came of an attempt.

    Args:
        exercise: its name.
        verdict: ``right``; ``first order only``; ``wrong``; ``not finished``, dots are left; ``not started``, the file is
            as it was written; ``error``, it does not run; ``gave up``, it ran too long or took the process down.
        how: in a few words, how it is wrong.
        text: for the learner, without the first line.
        printed: what the attempt itself has printed.
    """

    exercise: str
    verdict: Verdict
    how: str = ""
    text: str = ""
    printed: str = ""

    @property
    def right(self) -> bool:
        """Whether nothing is left to do."""
        return self.verdict == "right"

    def assert_right(self) -> None:
        """Raise AssertionError with the mark as its text, unless it is right."""
        __tracebackhide__ = True  # pytest shows the line of the learner's file
        if not self.right:
            raise AssertionError(str(self))

    def hint(self, step: int) -> str:
        """The hint of a step, 1 to 3, each nearer to the answer.

        Raises:
            ValueError: for another step.
        """
        hints = EXERCISES[self.exercise].hints
        if not 1 <= step <= len(hints):
            raise ValueError(f"hint: step must be from 1 to {len(hints)}. Got {step}.")
        return hints[step - 1]

    def __str__(self) -> str:
        """The mark, and what helps."""
        lines = [f"{self.exercise}: {self.verdict}", textwrap.indent(self.text.rstrip(), "    ")]
        if self.printed.strip():
            lines.append(textwrap.indent(f"It printed:\n{self.printed.rstrip()}", "    "))
        return "\n".join(line for line in lines if line)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Mark:
        return Mark(**json.loads(text))
