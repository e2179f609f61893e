"""What the page holds beside its text: tables of numbers, packed, and the functions that it computes with."""

from __future__ import annotations

import base64
import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from manualprop._explain import _javascript as javascript
from manualprop._explain._anew import not_computed
from manualprop._explain._explained import Explained
from manualprop._explain._numbers import as_table, numbers, statistics
from manualprop._explain._observe import ACTIVATION, Layer, Observation

ROOM = 230_000  # numbers that a page holds; at 16 characters for 3 of them, 1.2 MB
FRAME = 100_000  # of one recorded update
WHOLE = 130_000  # that the loss is computed anew from, where the tables hold a part of them


@dataclass(frozen=True)
class Limits:
    """How much of each tensor a page holds: rows of examples, units of a layer, inputs of the network."""

    rows: int
    units: int
    inputs: int

    def of(self, key: str, first: frozenset[str]) -> tuple[int, int]:
        """Rows and columns of the table of a key; ``first`` are the weights that multiply the network's input."""
        if key[:2] in ("p:", "d:", "u:"):
            return self.units, self.inputs if key[2:] in first else self.units
        return self.rows, self.inputs if key.partition(":")[0] == "x" else self.units


SIZES = (
    Limits(64, 10**6, 4096),
    Limits(32, 256, 1024),
    Limits(32, 64, 1024),
    Limits(32, 32, 1024),
    Limits(32, 32, 256),
    Limits(16, 16, 256),
    Limits(8, 8, 64),
)

# Of a network of images rather few examples than pieces of images: a sum over a window needs the window.
SIZES_OF_IMAGES = (SIZES[0], *(Limits(rows, 10**6, 4096) for rows in (32, 16, 8, 4, 2, 1)), *SIZES[1:])

Cut = Callable[[str, Tensor], Tensor]


def tables(e: Explained) -> tuple[dict[str, Any], list[int]]:
    """Every tensor that a step shows, packed, and the recorded updates that the page has room for."""
    keys = list(dict.fromkeys(_keys(e)))
    first = frozenset(
        w.name
        for layer, x in zip(e.observation.layers, e.links.inputs, strict=True)
        for w in layer.weights
        if x == "x" and w.value.dim() > 1
    )

    def cut_to(limits: Limits) -> Cut:
        def cut(key: str, t: Tensor) -> Tensor:
            rows, columns = limits.of(key, first)
            return as_table(key, t)[:rows, :columns]

        return cut

    for limits in SIZES_OF_IMAGES if any(layer.x.dim() > 3 for layer in e.observation.layers) else SIZES:
        cut = cut_to(limits)
        size = sum(cut(key, e.numbers[key]).numel() for key in keys)
        if size <= FRAME:
            break
    room = ROOM if limits is SIZES[0] else ROOM - WHOLE // 2  # which the whole network may come on top of
    count = max(1, min(len(e.recording.frames), room // max(1, size)))
    chosen = _evenly(len(e.recording.frames), count)
    frames = [numbers(e.recording.frames[k], e.links) for k in chosen]
    return {key: _table(key, frames, cut) for key in keys}, chosen


def _keys(e: Explained) -> Iterator[str]:
    for step in e.steps:
        for block in step.blocks:
            for shown in block.shown:
                yield shown.key
                yield from (v for v in shown.made.values() if isinstance(v, str) and v in e.numbers)
    yield from (key for key in e.numbers if key.startswith("m:"))


def _evenly(length: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    return sorted({round(k * (length - 1) / (count - 1)) for k in range(count)})


def _table(key: str, frames: list[dict[str, Tensor]], cut: Cut) -> dict[str, Any]:
    whole = as_table(key, frames[0][key])
    small = [cut(key, frame[key]) for frame in frames]
    constant = all(torch.equal(small[0], other) for other in small[1:])
    found = [statistics(frame[key]) for frame in frames]
    return {
        "rows": len(small[0]),
        "cols": small[0].shape[1],
        "of": list(whole.shape),
        "shape": list(frames[0][key].shape),
        "frames": [packed(t) for t in (small[:1] if constant else small)],
        "norm": [_short(one.norm) for one in found],
        "spread": [_short(one.spread) for one in found],
    }


def packed(t: Tensor) -> str:
    """The numbers of a tensor in float32, row after row, in base 64."""
    t = t.detach().to("cpu", torch.float32).contiguous()
    return base64.b64encode(ctypes.string_at(t.data_ptr(), t.numel() * 4)).decode() if t.numel() else ""


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if abs(value) < float("inf") else None


# ----- what the page computes with -----


@dataclass(frozen=True)
class Functions:
    """JavaScript printed from the rules.

    Args:
        activations: for the place of each activation, (f, df, which of "input" and "output" df takes).
        loss: of one example; "" where it has none.
        refused: why the page cannot compute the loss anew; "" where it can.
    """

    activations: Mapping[int, tuple[str, str, str]]
    loss: str
    refused: str

    def script(self) -> str:
        """The statements that define ``ACTIVATIONS`` and ``LOSS``."""
        rows = [
            f"  {place}: {{ f: {f}, df: {df}, saves: {saves!r} }},"
            for place, (f, df, saves) in self.activations.items()
        ]
        loss = f"const LOSS = {self.loss or 'null'};"
        return "\n".join(["const ACTIVATIONS = {", *rows, "};", loss])


def functions(e: Explained, packed_tables: Mapping[str, Any]) -> Functions:
    """Print what the page needs to compute the loss anew."""
    seen = e.observation
    activations: dict[int, tuple[str, str, str]] = {}
    refused = not_computed(seen, e.links)
    for i, layer in enumerate(seen.layers):
        if layer.kind == ACTIVATION:
            try:
                activations[i] = _activation(layer)
            except javascript.NotPrintable as error:
                refused = (
                    refused
                    or f"{layer.path} ({layer.name}) has a step without a word in JavaScript: {error}."
                )
    loss = ""
    try:
        loss = _loss(e.loss, seen)
    except javascript.NotPrintable as error:
        refused = refused or f"The loss cannot be printed as JavaScript: {error}."
    size = sum(e.numbers[key].numel() for key in _needed(e))
    if not refused and cropped(packed_tables) and size > WHOLE:
        refused = f"The loss depends on {size:,} numbers, and a page has room for {WHOLE:,}."
    return Functions(activations, loss, refused)


def cropped(packed_tables: Mapping[str, Any]) -> bool:
    """Whether the page holds a part of some tensors only."""
    return any([t["rows"], t["cols"]] != t["of"] for t in packed_tables.values())


def whole_tables(e: Explained) -> dict[str, Any]:
    """All that the loss depends on, before the explained update."""
    return {key: _table(key, [dict(e.numbers)], as_table) for key in _needed(e)}


def _needed(e: Explained) -> list[str]:
    return ["x", "target", *(key for key in e.numbers if key.startswith(("p:", "m:")))]


def _activation(layer: Layer) -> tuple[str, str, str]:
    rule: Any = layer.rule
    f = javascript.of_numbers(lambda x: rule.f(x, *layer.p))
    return f, javascript.of_numbers(lambda s: rule.df(s, *layer.p)), rule.saves


def _loss(loss: Module, seen: Observation) -> str:
    if seen.losses is None or seen.divisor is None:
        raise javascript.NotPrintable("it does not tell the loss of a single example")
    if seen.output.dim() != 2:
        raise javascript.NotPrintable("the output has more than one row for an example")
    return javascript.of_loss_rows(loss_of_each(loss), seen.output, seen.target)


def loss_of_each(loss: Module) -> Module:
    """The loss without its reduction."""
    single = copy.copy(loss)
    single.reduction = "none"  # type: ignore[assignment]
    return single
