"""The page: an explanation as one file of HTML, which needs no network and no library."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from torch import nn

from manualprop._explain import _formulas as formulas
from manualprop._explain._anew import anew, multiplications, nudged
from manualprop._explain._explained import Explained
from manualprop._explain._numbers import Numbers, numbers, passes_on
from manualprop._explain._steps import Block, rule_of, steps
from manualprop._explain._tables import Functions, cropped, functions, tables, whole_tables
from manualprop._explain._training import Slice
from manualprop._explain._worked import worked

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("numbers.js", "sums.js", "windows.js", "grid.js", "network.js", "anew.js", "nudge.js", "play.js")
NO_NETWORK = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(e: Explained) -> str:
    """The whole page."""
    packed, chosen = tables(e)
    computed = functions(e, packed)
    grids: list[dict[str, Any]] = []
    story = "\n".join(_story(e, grids))
    remarks = _remarks(e, chosen)
    data = json.dumps(
        _data(e, packed, chosen, computed, grids) | {"remarks": remarks},
        separators=(",", ":"),
        allow_nan=False,
    )
    parts = {
        "title": html.escape(e.title),
        "csp": NO_NETWORK,
        "style": _read("page.css"),
        "head": _head(e),
        "examples": "".join(
            f'<option value="{k}">{k}{_class(e, k)}</option>' for k in range(_examples(e, packed))
        ),
        "last": str(len(chosen) - 1),
        "steps": "".join(
            f'<li><a href="#step-{s.number}">{s.number}<span class="sr"> {html.escape(s.title)}</span></a></li>'
            for s in e.steps
        ),
        "diagnosis": _diagnosis(e),
        "story": story,
        "descents": _descents(e),
        "nudge": f"<p>{html.escape(computed.refused)}</p>" if computed.refused else _read("nudge.html"),
        "data": data.replace("</", "<\\/"),
        "script": "\n".join(["'use strict';", computed.script(), *map(_read, SCRIPTS)]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _head(e: Explained) -> str:
    count = len(e.rows)
    told = [
        f"{type(e.loss).__name__} by {type(e.descent).__name__} ({rule_of(e.descent)}).",
        f"The explained update sees {count} of {e.examples} examples.",
    ]
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in e.notes)
    return f"<p>{html.escape(' '.join(told))}</p>{notes}"


def _examples(e: Explained, packed: dict[str, Any]) -> int:
    rows: int = packed["output"]["rows"]
    return min(len(e.rows), rows)


def _class(e: Explained, k: int) -> str:
    target = e.observation.target
    return f" (class {int(target[k])})" if target.dim() == 1 and not target.is_floating_point() else ""


# ----- the story -----


def _story(e: Explained, grids: list[dict[str, Any]]) -> Iterator[str]:
    count = 0  # of the blocks with remarks
    for step in e.steps:
        yield f'<section class="step {step.direction}" id="step-{step.number}" aria-labelledby="title-{step.number}">'
        yield f'<h2 id="title-{step.number}"><span class="number">{step.number}</span> {html.escape(step.title)}</h2>'
        yield f"<p>{html.escape(step.text)}</p>"
        if not step.blocks:
            yield "<p class='muted'>No layer of this network takes this step.</p>"
        for block in step.blocks:
            told = _told(block, e.numbers)
            yield from _block(block, grids, told, count)
            count += bool(told)
        yield "</section>"


def _told(block: Block, numbers: Numbers) -> list[str]:
    """The sums of a block that are worked out, and its remarks."""
    found = [worked(shown, numbers) for shown in block.shown]
    return [*(one.text() for one in found if one), *block.remarks]


def _block(block: Block, grids: list[dict[str, Any]], remarks: list[str], place: int) -> Iterator[str]:
    hand = "" if block.by_hand else ' <span class="tag">not by hand</span>'
    kind = (
        f' <span class="muted">{html.escape(block.kind)}</span>' if block.kind.lower() != block.layer else ""
    )
    yield f'<article class="block"><h3>{html.escape(block.layer)}{kind}{hand}</h3>'
    if block.formula:
        yield f'<p class="formula">{typeset(block.formula)}</p>'
    yield f'<p class="source">by <code>{html.escape(block.source)}</code></p>'
    if block.derivation:
        text = html.escape(block.derivation)
        yield f'<details><summary>Derivation</summary><pre tabindex="0">{text}</pre></details>'
    for shown in block.shown:
        grids.append({"key": shown.key, "symbol": shown.symbol, "what": shown.what, "made": shown.made,
                      "layer": block.place})  # fmt: skip
        yield f'<div class="grid" data-grid="{len(grids) - 1}"></div>'
    if block.why:
        yield f'<p class="remark">{typeset(block.why)}</p>'
    if remarks:
        told = "".join(f'<p class="remark">{html.escape(remark)}</p>' for remark in remarks)
        yield f'<div class="remarks" data-remarks="{place}">{told}</div>'
    yield "</article>"


def _remarks(e: Explained, chosen: list[int]) -> list[list[list[str]]]:
    """For each block that has remarks, those at each recorded update."""
    each = []
    for k in chosen:
        frame = e.recording.frames[k]
        found = numbers(frame, e.links)
        made = steps(frame, e.links, e.loss, e.descent)
        each.append([_told(block, found) for step in made for block in step.blocks])
    return [list(told) for told in zip(*each, strict=True) if told[0]]


def typeset(text: str) -> str:
    """A text with mathematics between dollar signs, as HTML with MathML."""
    return "".join(
        _mathml(piece) if is_math else html.escape(piece) for is_math, piece in formulas.pieces(text)
    )


def _mathml(latex: str) -> str:
    latex = latex.replace(r"\tfrac", r"\frac").replace(r"\operatorname{softmax}", r"\mathrm{softmax}")
    return convert(re.sub(r"\\operatorname\{(\w+)\}", r"\\mathrm{\1}", latex))


def _diagnosis(e: Explained) -> str:
    if not e.findings:
        return "<p>Nothing conspicuous in this update.</p>"
    rows = [
        f"<li><strong>{html.escape(f.name)}</strong> <span class='muted'>({html.escape(f.where)})</span>: "
        f"{html.escape(f.evidence)}. <em>What usually helps:</em> {html.escape(f.helps)}.</li>"
        for f in e.findings
    ]
    return f"<ul>{''.join(rows)}</ul>"


def _descents(e: Explained) -> str:
    found = e.descents
    if isinstance(found, str):
        return f"<p>{html.escape(found)}</p>"
    told = (
        f"From the same weights, {found.updates} updates each, with learning rate {found.rate:g} and without momentum. "
        f"The colour is the loss of {found.examples} examples, on the plane in which most of the paths lie "
        f"({100 * found.share:.0f} % of their movement): blue is high, {found.grid.max().item():.3g}; plain is low, "
        f"{found.grid.min().item():.3g}. A ring marks the start, a dot the end; a path that goes much further than the others leaves the picture. Noise is the scatter of single gradients at the start, "
        "against the gradient of all examples."
    )
    panels = [
        f'<figure><canvas class="path" data-path="{k}" role="img" aria-label="{html.escape(_described(found, k))}"></canvas>'
        f"<figcaption><strong>{path.name}</strong>: {path.examples} example{'s' * (path.examples != 1)} an update, "
        f"{html.escape(path.refused) or f'noise {path.noise:.2f}'}</figcaption></figure>"
        for k, path in enumerate(found.paths)
    ]
    return f"<p>{told}</p><div class='paths'>{''.join(panels)}</div>"


def _described(found: Slice, k: int) -> str:
    path = found.paths[k]
    if path.refused:
        return f"{path.name} descent was not run: {path.refused}"
    (a, b), low, high = path.points[-1], found.grid.min().item(), found.grid.max().item()
    return (
        f"Path of {path.name} descent on the loss, from (0, 0) to ({a:.2f}, {b:.2f}); the loss there goes from {low:.3g} "
        f"to {high:.3g}"
    )


# ----- the numbers -----


def _data(
    e: Explained,
    packed: dict[str, Any],
    chosen: list[int],
    computed: Functions,
    grids: list[dict[str, Any]],
) -> dict[str, Any]:
    seen = e.observation
    found: dict[str, Any] = {
        "tables": packed,
        "grids": grids,
        "examples": _examples(e, packed),
        "at": [e.recording.at[k] for k in chosen],
        "frameLosses": [_number(e.recording.frames[k].loss) for k in chosen],
        "losses": [_number(loss) for loss in e.recording.losses],
        "stopped": e.recording.stopped,
        "rate": e.descent.learning_rate,
        "divisor": seen.divisor,
        "loss": _loss_kind(e),
        "image": e.image,
        "nudge": not computed.refused,
        "whole": whole_tables(e) if cropped(packed) and not computed.refused else {},
        "layers": [
            {
                "path": layer.path,
                "name": layer.name,
                "kind": "same" if passes_on(layer) else layer.kind,
                "x": e.links.inputs[i],
                "dx": e.links.returns[i],
                "W": f"p:{layer.weights[0].name}" if layer.weights else "",
                "b": f"p:{layer.weights[1].name}" if len(layer.weights) > 1 else "",
                "anew": anew(i, layer) or {},
            }
            for i, layer in enumerate(seen.layers)
        ],
        "nudged": nudged(seen),
        "multiplications": multiplications(seen),
        "history": [dict(row) for row in e.history],
    }
    if isinstance(e.descents, Slice):
        found["slice"] = {
            "grid": [[_number(value) for value in row] for row in e.descents.grid.tolist()],
            "across": [e.descents.across[0], e.descents.across[-1]],
            "down": [e.descents.down[0], e.descents.down[-1]],
            "paths": [[[round(a, 5), round(b, 5)] for a, b in path.points] for path in e.descents.paths],
        }
    return found


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if abs(value) < float("inf") else None


def _loss_kind(e: Explained) -> dict[str, Any]:
    """What the page may say about the gradient of the loss, term by term."""
    loss, seen = e.loss, e.observation
    plain = seen.output.dim() == 2 and seen.divisor is not None
    indices = seen.target.dim() == 1 and not seen.target.is_floating_point()
    if isinstance(loss, nn.CrossEntropyLoss) and plain and indices and loss.weight is None:
        if not loss.label_smoothing and not bool((seen.target == loss.ignore_index).any()):
            return {"kind": "cross entropy"}
    if isinstance(loss, nn.MSELoss) and plain:
        return {"kind": "squared error"}
    return {"kind": type(loss).__name__}
