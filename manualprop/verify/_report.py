"""What the probes found."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

Verdict = Literal["passed", "finding", "accepted", "limit", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one probe.

    Args:
        probe: name of the probe.
        verdict: ``passed``; ``finding``, a defect; ``accepted``, a finding or limit that the author accepts;
            ``limit``, unsupported, with an error that says so; ``skipped``, not applicable, or the consequence of
            another finding.
        evidence: what was seen, with figures.
        diagnosis: how a gradient is wrong.
        details: figures for programs, in JSON's types: worst element, matrices of a heat map, seed.
        reproduction: one line that runs this probe again.
        seconds: the time it took.
        notes: on the whole check, such as the dtype that it uses.
    """

    probe: str
    verdict: Verdict
    evidence: str = ""
    diagnosis: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    reproduction: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def passed(evidence: str = "", **details: Any) -> Outcome:
    return Outcome("", "passed", evidence, details=details)


def finding(evidence: str, diagnosis: str = "", **details: Any) -> Outcome:
    return Outcome("", "finding", evidence, diagnosis, details)


def apart(outcome: Outcome, *causes: str) -> Outcome:
    """The same finding, marked as independent of what the probes ``causes`` find."""
    known = outcome.details.get("apart_from", [])
    return replace(outcome, details={**outcome.details, "apart_from": [*known, *causes]})


def limit(evidence: str, **details: Any) -> Outcome:
    return Outcome("", "limit", evidence, details=details)


def skipped(why: str) -> Outcome:
    return Outcome("", "skipped", why)


def message(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


MARK = {"passed": "ok", "finding": "FINDING", "accepted": "accepted", "limit": "limit", "skipped": "-"}


@dataclass(frozen=True)
class Report:
    """The outcomes of all probes on one callable.  ``print(report)`` shows what was found; :meth:`table` all of it."""

    name: str
    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0

    @property
    def findings(self) -> list[Outcome]:
        """The defects."""
        return self._of("finding")

    @property
    def limits(self) -> list[Outcome]:
        """What is unsupported, with an error that says so."""
        return self._of("limit")

    @property
    def accepted(self) -> list[Outcome]:
        """The findings and limits that the author accepts, with the reason."""
        return self._of("accepted")

    def _of(self, verdict: Verdict) -> list[Outcome]:
        return [o for o in self.outcomes if o.verdict == verdict]

    @property
    def passed(self) -> bool:
        """Whether no probe found a defect."""
        return not self.findings

    @property
    def notes(self) -> list[str]:
        """Notes on the whole check, such as the dtype that it uses."""
        return list(dict.fromkeys(note for o in self.outcomes for note in o.notes))

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
        count = {v: len(self._of(v)) for v in get_args(Verdict)}
        found = (
            f"{count['finding']} finding{'s' * (count['finding'] != 1)}" if count["finding"] else "no finding"
        )
        accepted = f", {count['accepted']} accepted" if count["accepted"] else ""
        return (
            f"{self.name}: {found}{accepted}; {count['passed']} passed, {count['limit']} "
            f"limit{'s' * (count['limit'] != 1)}, {count['skipped']} not applicable ({self.seconds:.1f} s)"
        )

    def __str__(self) -> str:
        """The summary, what was found, and a line for each kind of limit."""
        lines = [self.summary(), *self.notes]
        if self.findings:
            lines.append(described(self.findings))
        lines += [f"accepted {o.probe}: {o.evidence}" for o in self.accepted]
        lines += [f"limit    {names}: {shortened(text)}" for names, text in together(self.limits)]
        return "\n".join(lines)

    def table(self) -> str:
        """One row for each probe, the findings in full below, and the summary."""
        lines = [*table(self.outcomes), "", *self.notes]
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


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def together(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """Outcomes grouped by reason: the seven limits of an old-style Function make one line."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(reason(o.evidence), []).append(o)
    return [
        (", ".join(o.probe for o in group), group[0].evidence if len(group) == 1 else text)
        for text, group in groups.items()
    ]


# Patterns in torch's refusals -> the reason in a user's words.
REASONS = (
    (
        re.compile(r"setup_context"),
        "an old-style Function (forward takes ctx): no transform of torch.func takes it",
    ),
    (re.compile(r"once_differentiable"), "backward is marked @once_differentiable: no second derivative"),
    (
        re.compile(r"forward (mode )?AD|jvp.*not implemented|implement.*jvp", re.I),
        "no jvp: forward mode is not supported",
    ),
    (
        re.compile(r"vmap.*(staticmethod|generate_vmap_rule)|generate_vmap_rule", re.I),
        "no vmap rule: batching is not supported",
    ),
)


def reason(evidence: str) -> str:
    """The reason for a limit, in one line."""
    return next((words for pattern, words in REASONS if pattern.search(evidence)), evidence)


def table(outcomes: Sequence[Outcome], width: int = 110) -> list[str]:
    """One row for each outcome: probe, verdict, evidence."""
    left = max((len(o.probe) for o in outcomes), default=5) + 2
    lines = [f"{'probe':<{left}}{'verdict':<10}evidence", "-" * width]
    for o in outcomes:
        text = textwrap.wrap(o.evidence, width - left - 10, max_lines=2, placeholder=" ...") or [""]
        lines.append(f"{o.probe:<{left}}{MARK[o.verdict]:<10}{text[0]}")
        lines += [" " * (left + 10) + more for more in text[1:]]
    return lines


def described(findings: Sequence[Outcome]) -> str:
    """Each finding in full."""
    return "\n".join(
        f"FINDING  {o.probe}: {o.evidence}"
        + (f"\n    diagnosis: {o.diagnosis}" if o.diagnosis else "")
        + (f"\n    again:     {o.reproduction}" if o.reproduction else "")
        for o in findings
    )
