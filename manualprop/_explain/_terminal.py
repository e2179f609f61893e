"""An explanation in the terminal: the ten steps in order, layer by layer, from 80 columns upwards."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from manualprop._explain import _formulas as formulas
from manualprop._explain._explained import Explained
from manualprop._explain._numbers import statistics
from manualprop._explain._steps import Block, Shown, Step
from manualprop._explain._worked import worked

ACCENT = "bold cyan"


def text(explanation: Explained, width: int = 80) -> str:
    """The explanation as plain text."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None, force_terminal=False).print(
        rendered(explanation, None, 0, False)
    )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def rendered(explanation: Explained, layer: str | None, example: int, verbose: bool) -> RenderableType:
    """What rich prints; see :meth:`Explanation.render`."""
    paths = list(dict.fromkeys(block.layer for step in explanation.steps for block in step.blocks))
    if layer is not None and layer not in paths:
        raise ValueError(f"explain: layer must be one of {', '.join(paths)}. Got {layer!r}.")
    count = len(explanation.rows)
    if not 0 <= example < count:
        raise ValueError(f"explain: example must be from 0 to {count - 1}, one of the update. Got {example}.")
    return Group(*_parts(explanation, layer, example, verbose))


def _parts(e: Explained, layer: str | None, example: int, verbose: bool) -> Iterator[RenderableType]:
    count = len(e.rows)
    seen = (
        f"{count} of {e.examples} examples" if count < e.examples else f"{count} example{'s' * (count != 1)}"
    )
    yield Text(e.title, ACCENT)
    yield Text(f"{type(e.loss).__name__}, {type(e.descent).__name__}; the update sees {seen}.")
    yield Text(
        f"Numbers: the first units of example {example} of the update; of a weight, those of its first unit.",
        "dim",
    )
    yield from (Text(note, "yellow") for note in e.notes)
    for step in e.steps:
        blocks = [block for block in step.blocks if layer is None or block.layer == layer]
        if blocks:
            yield from _step(e, step, blocks, example, verbose)
    yield from _findings(e)
    if layer is None:
        yield from _updates(e)


def _step(
    e: Explained, step: Step, blocks: list[Block], example: int, verbose: bool
) -> Iterator[RenderableType]:
    yield Text()
    yield Text.assemble((f"{step.number:>2}  {step.title}", ACCENT), (f"   {step.direction}", "dim"))
    yield Padding(Text(step.text), (0, 0, 0, 4), expand=False)
    for block in blocks:
        yield Padding(Group(*_block(e, block, example, verbose)), (0, 0, 0, 4), expand=False)


def _block(e: Explained, block: Block, example: int, verbose: bool) -> Iterator[RenderableType]:
    head = Text.assemble((block.layer, "bold"), f" {block.kind}" if block.kind.lower() != block.layer else "")
    if not block.by_hand:
        head.append("  not by hand", "yellow")
    yield head
    if block.line:
        yield Padding(Text(block.line, "italic"), (0, 0, 0, 2), expand=False)
    yield Padding(Text(f"by {block.source}", "dim"), (0, 0, 0, 2), expand=False)
    if verbose and block.derivation:
        yield Padding(Text(block.derivation, "dim"), (0, 0, 0, 4), expand=False)
    yield Padding(
        _Numbers(e, block.shown if verbose else block.shown[:2], example, verbose), (0, 0, 0, 2), expand=False
    )
    for found in (worked(shown, e.numbers, example) for shown in block.shown):
        if found:
            yield Padding(Text(found.text()), (0, 0, 0, 2), expand=False)
    if block.why:
        yield Padding(Text(formulas.plain(block.why)), (0, 0, 0, 2), expand=False)
    for remark in block.remarks:
        yield Padding(Text(remark), (0, 0, 0, 2), expand=False)


class _Numbers:
    """The table of a block's tensors, with as many numbers as the width has room for."""

    def __init__(self, e: Explained, shown: tuple[Shown, ...], example: int, verbose: bool) -> None:
        self.e, self.shown, self.example, self.verbose = e, shown, example, verbose

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = max(2, (options.max_width - 38) // 9)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "shape", "norm", "spread"):
            table.add_column(name, justify="left" if name in ("", "shape") else "right", no_wrap=True)
        for k in range(room):
            table.add_column(str(k), justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for shown in self.shown:
            tensor = self.e.numbers[shown.key]
            found = statistics(tensor)
            has_size = tensor.is_floating_point()  # which classes and places have not
            shape = "×".join(map(str, tensor.shape)) or "1"
            for number, row in enumerate(self._rows(shown, tensor)):
                cells = [figures(value) for value in row[:room]]
                cells += [""] * (room - len(cells)) + ["…"] * (len(row) > room)
                head = (
                    (
                        shown.symbol,
                        shape,
                        *((figures(found.norm), figures(found.spread)) if has_size else ("", "")),
                    )
                    if not number
                    else ("",) * 4
                )
                table.add_row(*head, *cells)
        yield table

    def _rows(self, shown: Shown, tensor: Tensor) -> list[list[float]]:
        """The rows that are shown: that of the example, or of a weight's first unit; with ``verbose`` two more."""
        if tensor.dim() < 2 and shown.key[:2] in ("p:", "d:", "u:"):
            return [tensor.reshape(-1).tolist()]
        first = 0 if shown.key[:2] in ("p:", "d:", "u:") else self.example
        rows = tensor.reshape(len(tensor), -1)[first : first + (3 if self.verbose else 1)]
        return [row.tolist() for row in rows]


def figures(value: float) -> str:
    """A number in at most eight characters."""
    if isinstance(value, bool | int):
        return str(int(value))
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _findings(e: Explained) -> Iterator[RenderableType]:
    yield Text()
    yield Text("Diagnosis", ACCENT)
    if not e.findings:
        yield Padding(Text("Nothing conspicuous in this update."), (0, 0, 0, 4), expand=False)
    for finding in e.findings:
        told = Text.assemble((finding.name, "bold red"), f" ({finding.where}): {finding.evidence}.")
        yield Padding(Group(told, Text(f"What usually helps: {finding.helps}.")), (0, 0, 0, 4), expand=False)


def _updates(e: Explained) -> Iterator[RenderableType]:
    yield Text()
    yield Text("The updates that follow", ACCENT)
    at, frames = e.recording.at, e.recording.frames
    told = f"Loss of these examples: {frames[0].loss:.4g} now, {frames[-1].loss:.4g} after {at[-1]} updates."
    yield Padding(Text(told), (0, 0, 0, 4), expand=False)
    if e.recording.stopped:
        yield Padding(Text(e.recording.stopped, "yellow"), (0, 0, 0, 4), expand=False)
    if isinstance(e.descents, str):
        yield Padding(Text(e.descents), (0, 0, 0, 4), expand=False)
        return
    found = e.descents
    told = f"The three descents, {found.updates} updates with learning rate {found.rate:g} on {found.examples} examples. "
    told += "Noise: the scatter of single gradients, against the gradient of all examples."
    yield Padding(Text(told), (0, 0, 0, 4), expand=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("descent", "examples of an update", "noise"):
        table.add_column(name, justify="left" if name == "descent" else "right")
    for path in found.paths:
        table.add_row(path.name, str(path.examples), path.refused or f"{path.noise:.2f}")
    yield Padding(table, (0, 0, 0, 4), expand=False)
