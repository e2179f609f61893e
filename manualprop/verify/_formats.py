"""Reports as JUnit XML, for a CI server, and as an HTML page with heat maps of the error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

from manualprop.verify._report import MARK, Outcome, Report, together


def junit(reports: Sequence[Report], unverified: Sequence[tuple[str, str]] = ()) -> str:
    """One test suite for each report, one test case for each probe.  A limit counts as skipped.

    What could not be verified, as (name, why), is a suite with one case, skipped.
    """
    root = ElementTree.Element("testsuites")
    for report in reports:
        verdicts = [o.verdict for o in report.outcomes]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=report.name,
            tests=str(len(verdicts)),
            failures=str(verdicts.count("finding")),
            skipped=str(sum(verdicts.count(v) for v in ("accepted", "limit", "skipped"))),
            errors="0",
            time=f"{report.seconds:.3f}",
        )
        for o in report.outcomes:
            case = ElementTree.SubElement(
                suite, "testcase", classname=report.name, name=o.probe, time=f"{o.seconds:.3f}"
            )
            if o.verdict == "finding":
                failure = ElementTree.SubElement(case, "failure", message=_clean(o.evidence))
                failure.text = _clean(f"{o.evidence}\n{o.diagnosis}\nagain: {o.reproduction}")
            elif o.verdict != "passed":
                ElementTree.SubElement(case, "skipped", message=_clean(f"{o.verdict}: {o.evidence}"))
    for name, why in unverified:
        suite = ElementTree.SubElement(
            root, "testsuite", name=name, tests="1", failures="0", skipped="1", errors="0", time="0.000"
        )
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="not verified", time="0.000")
        ElementTree.SubElement(case, "skipped", message=_clean(f"not verified: {why}"))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """The text without control characters, which XML cannot hold."""
    return "".join(c for c in text if c >= " " or c in "\n\t")


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --quiet: #5c5c5c; --line: #e2e2e2; --code: #f3f3f3;
  --link: #0b57d0; --finding: #b00020; --limit: #7d5700; --accepted: #5a4fb0; --passed: #12742c; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e6e6e6; --quiet: #a0a4a8; --line: #34383d;
  --code: #24282c; --link: #8ab4f8; --finding: #ff8a8a; --limit: #e5b95c; --accepted: #b3a8ff; --passed: #7bd08f; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  background: var(--ground); color: var(--ink); overflow-wrap: anywhere; }
a { color: var(--link); } h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { display: inline; font-size: 1rem; } summary span, figcaption, details details summary { color: var(--quiet); }
details { margin: .4rem 0; } details[open] { margin: 1rem 0 1.5rem; } summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; } tr { border-bottom: 1px solid var(--line); }
td, th { text-align: left; padding: .3rem .7rem; vertical-align: top; }
.probes td:first-child { font-family: ui-monospace, monospace; width: 13rem; } .probes td:nth-child(2) { width: 7.5rem; }
.probes b, .probes code { display: block; margin-top: .2rem; } code { background: var(--code); padding: .1rem .4rem; }
.finding td:nth-child(2) { color: var(--finding); font-weight: 600; } .limit td:nth-child(2) { color: var(--limit); }
.accepted td:nth-child(2) { color: var(--accepted); } .passed td:nth-child(2) { color: var(--passed); }
.skipped { color: var(--quiet); } figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; border: 1px solid var(--line); }
@media (max-width: 40rem) { th { display: none; } td, .probes td:first-child, .probes td:nth-child(2) { display: block; width: auto; padding: .1rem 0; } }
"""
WORDS = {**MARK, "skipped": "not applicable"}


def html(reports: Sequence[Report], unverified: Sequence[tuple[str, str]] = ()) -> str:
    """A page without other files: findings first, each with a heat map of |hand - numerical|; the rest is folded.

    What could not be verified, as (name, why), has a section of its own.
    """
    wrong, right = ([r for r in reports if r.passed is passed] for passed in (False, True))
    title = f"Gradient verification: {len(wrong)} of {len(reports)} with findings"
    title += f", {len(unverified)} not verified" if unverified else ""
    body = [f"<h1>{title}</h1>"]
    if len(reports) > 1 and wrong:
        rows = [_entry(i, report) for i, report in enumerate(wrong)]
        body += ["<table><thead><tr><th>with findings<th>found by</thead>", *rows, "</table>"]
    if wrong:
        body.append("<h2>Findings</h2>")
    for i, report in enumerate(wrong):
        body += _section(report, f' id="r{i}" open')
    if unverified:
        rows = [f"<tr><td>{_name(name)}<td>{escape(why)}</tr>" for name, why in unverified]
        body += ["<h2>Not verified</h2>", "<table><thead><tr><th>name<th>why</thead>", *rows, "</table>"]
    if right:
        body.append("<h2>Without findings</h2>")
    for report in right:
        body += _section(report, " open" if len(reports) == 1 else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _section(report: Report, attributes: str) -> list[str]:
    """All about one function, to fold and unfold."""
    counts = report.summary().removeprefix(f"{report.name}: ")
    summary = f"<summary><h3>{_name(report.name)}</h3> <span>{escape(counts)}</span></summary>"
    maps = [(o.probe, *m) for o in report.findings for m in o.details.get("heat_maps", {}).items()]
    return [
        f"<details{attributes}>{summary}",
        *[f"<p>{escape(note)}</p>" for note in report.notes],
        *_table(report.findings + report.accepted),
        *[_heat_map(*of_one) for of_one in maps],
        *_rest(report),
        "</details>",
    ]


def _name(name: str) -> str:
    """A name that breaks at its points and underscores first."""
    return re.sub(r"([._:])", r"\1<wbr>", escape(name))


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    head = '<table class="probes"><thead><tr><th>probe<th>verdict<th>evidence</thead>'
    return [head, *map(_row, outcomes), "</table>"] if outcomes else []


def _rest(report: Report) -> list[str]:
    """What is no finding, folded away: a row for each kind of limit, and one for each other probe."""
    limits = [Outcome(names, "limit", text) for names, text in together(report.limits)]
    others = [o for verdict in ("passed", "skipped") for o in report.outcomes if o.verdict == verdict]
    count = len(report.limits) + len(others)
    summary = f"<details><summary>{count} probes without a finding</summary>"
    return [summary, *_table([*limits, *others]), "</details>"] if count else []


def _entry(i: int, report: Report) -> str:
    """A row of the table of those with findings."""
    probes = ", ".join(o.probe for o in report.findings)
    return f'<tr><td><a href="#r{i}">{_name(report.name)}</a><td>{escape(probes)}</tr>'


def _row(o: Outcome) -> str:
    parts = [escape(o.evidence)]
    if o.diagnosis:
        parts.append(f"<b>{escape(o.diagnosis)}</b>")
    if o.verdict == "finding":
        parts.append(f"<code>{escape(o.reproduction)}</code>")
    return f'<tr class="{o.verdict}"><td>{escape(o.probe)}<td>{WORDS[o.verdict]}<td>{"".join(parts)}</tr>'


def _heat_map(probe: str, name: str, heat: dict[str, Any]) -> str:
    error: list[list[float | None]] = heat["error"]
    if not error or not error[0]:
        return ""
    rows, columns = len(error), len(error[0])
    size = max(4, min(24, 900 // max(rows, columns)))
    shrunk = min(1.0, 384 / (rows * size))
    top = max((e for row in error for e in row if e is not None), default=0.0)
    cells = "".join(
        f'<rect x="{j * size}" y="{i * size}" width="{size}" height="{size}" fill="{_colour(e, top)}">'
        f"<title>row {i}, column {j}: {'not finite' if e is None else f'{e:.3g}'}</title></rect>"
        for i, row in enumerate(error)
        for j, e in enumerate(row)
    )
    width, height = columns * size, rows * size
    label = escape(f"error of {probe} for {name}")
    return (
        f'<figure><svg role="img" aria-label="{label}" shape-rendering="crispEdges" viewBox="0 0 {width} {height}" '
        f'width="{width * shrunk:.0f}" height="{height * shrunk:.0f}">{cells}</svg><figcaption>'
        f"{probe}: |by hand - numerical| for {escape(name)}; rows: {heat['rows']}, columns: {escape(heat['columns'])}. "
        f"White is 0, dark red {top:.3g}, black not finite; logarithmic.</figcaption></figure>"
    )


def _colour(error: float | None, top: float) -> str:
    """White for a millionth of the largest error or less, then orange, then dark red."""
    if error is None:
        return "#000000"
    if not error or not top:
        return "#ffffff"
    t = max(0.0, 1 + math.log10(error / top) / 6)
    low, middle, high = (255, 255, 255), (253, 174, 97), (165, 0, 38)
    a, b, u = (low, middle, 2 * t) if t < 0.5 else (middle, high, 2 * t - 1)
    return "#" + "".join(f"{round(p + (q - p) * u):02x}" for p, q in zip(a, b, strict=True))
