"""Reports as JUnit XML, for a CI server, and as an HTML page with heat maps of the error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

from manualprop.verify._report import MARK, Outcome, Report, together


def junit(reports: Sequence[Report]) -> str:
    """One test suite for each report, one test case for each probe.  A limit counts as skipped."""
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
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """The text without control characters, which XML cannot hold."""
    return "".join(c for c in text if c >= " " or c in "\n\t")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } ul { columns: 28rem 2; overflow-wrap: anywhere; } details { margin: .4rem 0; } details[open] { margin: 1.5rem 0; }
summary { cursor: pointer; font-weight: 600; }
details details summary { font-weight: 400; color: #555; }
table { border-collapse: collapse; width: 100%; overflow-wrap: anywhere; } td, th { text-align: left; padding: .25rem .7rem; vertical-align: top; }
tr { border-bottom: 1px solid #e5e5e5; } td:first-child { font-family: monospace; width: 14rem; } td:nth-child(2) { width: 5rem; }
.finding td:nth-child(2) { color: #b00020; font-weight: 600; } .limit td:nth-child(2) { color: #8a6100; }
.accepted td:nth-child(2) { color: #5a4fb0; } .passed td:nth-child(2) { color: #12742c; } .skipped { color: #777; }
code { background: #f4f4f4; padding: .1rem .3rem; } figure { margin: 1rem 0; } figcaption { color: #555; }
svg { max-width: 100%; height: auto; max-height: 24rem; border: 1px solid #ccc; }
@media (max-width: 40rem) { th { display: none; } td, td:first-child { display: block; width: auto; padding: .1rem 0; } }
"""


def html(reports: Sequence[Report]) -> str:
    """A page without other files: findings first, each with a heat map of |hand - numerical|; the rest is folded."""
    body = [
        f"<h1>Gradient verification: {sum(not r.passed for r in reports)} of {len(reports)} with findings</h1>"
    ]
    if len(reports) > 1:
        body.append("<ul>" + "".join(_entry(i, r) for i, r in enumerate(reports) if not r.passed) + "</ul>")
    for i, report in enumerate(reports):
        shown = "" if report.passed and len(reports) > 1 else " open"
        body.append(f'<details id="r{i}"{shown}><summary>{escape(report.summary())}</summary>')
        body += [f"<p>{escape(note)}</p>" for note in report.notes]
        body += _table(report.findings + report.accepted)
        for o in report.findings:
            body += [_heat_map(o.probe, name, m) for name, m in o.details.get("heat_maps", {}).items()]
        body += _rest(report)
        body.append("</details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Gradient verification</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    head = "<table><tr><th>probe<th>verdict<th>evidence</tr>"
    return [head, *map(_row, outcomes), "</table>"] if outcomes else []


def _rest(report: Report) -> list[str]:
    """What is no finding, folded away: a row for each kind of limit, and one for each other probe."""
    limits = [Outcome(names, "limit", text) for names, text in together(report.limits)]
    others = [o for verdict in ("passed", "skipped") for o in report.outcomes if o.verdict == verdict]
    count = len(report.limits) + len(others)
    summary = f"<details><summary>{count} probes without a finding</summary>"
    return [summary, *_table([*limits, *others]), "</details>"] if count else []


def _entry(i: int, report: Report) -> str:
    """A line of the list of those with findings."""
    probes = ", ".join(o.probe for o in report.findings)
    return f'<li><a href="#r{i}">{escape(report.name)}</a>: {escape(probes)}</li>'


def _row(o: Outcome) -> str:
    parts = [escape(o.evidence)]
    if o.diagnosis:
        parts.append(f"<b>{escape(o.diagnosis)}</b>")
    if o.verdict == "finding":
        parts.append(f"<code>{escape(o.reproduction)}</code>")
    return f'<tr class="{o.verdict}"><td>{o.probe}<td>{MARK[o.verdict]}<td>{"<br>".join(parts)}</tr>'


def _heat_map(probe: str, name: str, heat: dict[str, Any]) -> str:
    error: list[list[float | None]] = heat["error"]
    if not error or not error[0]:
        return ""
    rows, columns = len(error), len(error[0])
    size = max(4, min(24, 900 // max(rows, columns)))
    top = max((e for row in error for e in row if e is not None), default=0.0)
    cells = "".join(
        f'<rect x="{j * size}" y="{i * size}" width="{size}" height="{size}" fill="{_colour(e, top)}">'
        f"<title>row {i}, column {j}: {'not finite' if e is None else f'{e:.3g}'}</title></rect>"
        for i, row in enumerate(error)
        for j, e in enumerate(row)
    )
    width, height = columns * size, rows * size
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{cells}</svg><figcaption>'
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
