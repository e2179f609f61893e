"""What the probes found."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["passed", "finding", "limit", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What one probe saw.

    Args:
        probe: name of the probe.
        verdict: ``passed``; ``finding``, a defect; ``limit``, unsupported and loudly so; ``skipped``, not applicable.
        evidence: what was seen, with figures.
        diagnosis: of a wrong gradient: how it is wrong.
        details: figures for programs, JSON's types only: worst element, matrices of a heat map, seed.
        reproduction: one line that runs this probe again.
        seconds: that it took.
    """

    probe: str
    verdict: Verdict
    evidence: str = ""
    diagnosis: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    reproduction: str = ""
    seconds: float = 0.0


def passed(evidence: str = "", **details: Any) -> Outcome:
    return Outcome("", "passed", evidence, details=details)


def finding(evidence: str, diagnosis: str = "", **details: Any) -> Outcome:
    return Outcome("", "finding", evidence, diagnosis, details)


def limit(evidence: str, **details: Any) -> Outcome:
    return Outcome("", "limit", evidence, details=details)


def skipped(why: str) -> Outcome:
    return Outcome("", "skipped", why)


def message(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Report:
    """The outcomes of all probes on one callable.  ``print(report)`` shows them as a table."""

    name: str
    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0

    @property
    def findings(self) -> list[Outcome]:
        """The defects."""
        return [o for o in self.outcomes if o.verdict == "finding"]

    @property
    def limits(self) -> list[Outcome]:
        """What is unsupported, and says so."""
        return [o for o in self.outcomes if o.verdict == "limit"]

    @property
    def passed(self) -> bool:
        """Whether no probe found a defect."""
        return not self.findings

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def __getitem__(self, probe: str) -> Outcome:
        """The outcome of a probe by its name.

        Raises:
            KeyError: if it did not run.
        """
        for outcome in self.outcomes:
            if outcome.probe == probe:
                return outcome
        raise KeyError(f"{probe!r} did not run. There are: {', '.join(o.probe for o in self.outcomes)}")

    def assert_passed(self) -> None:
        """Raise AssertionError, with the findings in its text, unless there is none."""
        __tracebackhide__ = True  # pytest shows the caller's line
        if not self.passed:
            raise AssertionError(f"{self.summary()}\n{described(self.findings)}")

    def summary(self) -> str:
        """One line: how many of each verdict."""
        counts = {
            v: sum(o.verdict == v for o in self.outcomes) for v in ("passed", "finding", "limit", "skipped")
        }
        found = (
            f"{counts['finding']} finding{'s' * (counts['finding'] != 1)}"
            if counts["finding"]
            else "no finding"
        )
        return (
            f"{self.name}: {found}; {counts['passed']} probes passed, {counts['limit']} limits, "
            f"{counts['skipped']} not applicable ({self.seconds:.1f} s)"
        )

    def __str__(self) -> str:
        """The table, the findings described below it, and the summary."""
        lines = [*table(self.outcomes), ""]
        if self.findings:
            lines += [described(self.findings), ""]
        return "\n".join([*lines, self.summary()])

    def to_json(self) -> str:
        """The report as JSON, one object with name, passed, seconds, outcomes."""
        return json.dumps(
            {
                "name": self.name,
                "passed": self.passed,
                "seconds": self.seconds,
                "outcomes": [asdict(o) for o in self.outcomes],
            },
            indent=2,
        )


MARK = {"passed": "ok", "finding": "FINDING", "limit": "limit", "skipped": "-"}


def table(outcomes: Sequence[Outcome], width: int = 110) -> list[str]:
    """One row for each outcome: probe, verdict, evidence."""
    left = max((len(o.probe) for o in outcomes), default=5) + 2
    lines = [f"{'probe':<{left}}{'verdict':<9}evidence", "-" * width]
    for o in outcomes:
        text = textwrap.wrap(o.evidence, width - left - 9, max_lines=2, placeholder=" ...") or [""]
        lines.append(f"{o.probe:<{left}}{MARK[o.verdict]:<9}{text[0]}")
        lines += [" " * (left + 9) + more for more in text[1:]]
    return lines


def described(findings: Sequence[Outcome]) -> str:
    """Each finding in full."""
    return "\n".join(
        f"{o.probe}: {o.evidence}"
        + (f"\n    diagnosis: {o.diagnosis}" if o.diagnosis else "")
        + (f"\n    again:     {o.reproduction}" if o.reproduction else "")
        for o in findings
    )
