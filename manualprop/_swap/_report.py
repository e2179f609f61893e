"""What a swap did, as a table."""

import re
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import nn

from manualprop._receipt import ROOT, Comparison, _size

Model = TypeVar("Model", bound=nn.Module)


class Row(NamedTuple):
    """One layer: its path, its class before and after (None: unchanged), and the reason if it is unchanged.

    A layer with several paths has one row, under the first path.
    """

    path: str
    before: str
    after: str | None
    reason: str


class Check(NamedTuple):
    """The result of the comparison: how many tensors, the one closest to its limit, and the bytes kept."""

    tensors: int
    closest: str
    ratio: float  # its difference divided by its limit: above 1 the swap is refused
    kept: Comparison  # what one forward pass keeps for backward, before and after
    not_compared: tuple[str, ...] = ()  # paths of layers that draw other random numbers than in torch

    @property
    def keeps_more(self) -> dict[str, int]:
        """{path: bytes} of the layers that keep more than before; empty unless the whole model keeps more."""
        if self.kept.after.kept <= self.kept.before.kept:
            return {}
        grown = {path: after.kept - before.kept for path, (before, after) in self.kept.pairs().items()}
        return {path: size for path, size in grown.items() if size > 0}

    def __str__(self) -> str:
        said = (
            f"Checked {self.tensors} tensors: {self.closest} came closest, at {self.ratio:.2g} of its limit."
        )
        said += (
            f" Kept for backward: {_size(self.kept.before.kept)} before, {_size(self.kept.after.kept)} after."
        )
        if self.keeps_more:
            more = ", ".join(f"{path or ROOT} +{_size(size)}" for path, size in self.keeps_more.items())
            said += (
                f" More is kept at {more}: each keeps its output, and something else keeps its input anyway."
            )
        if self.not_compared:
            said += f" Not compared, since they draw other random numbers: {', '.join(self.not_compared)}."
        return said


@dataclass(frozen=True, repr=False)
class Report(Generic[Model]):
    """What :func:`manualprop.swap` or :func:`manualprop.unswap` did; prints as a table.

    Attributes:
        model: the model, changed in place.
        rows: every layer, in the order of ``model.named_modules()``.
        check: the result of the comparison, if ``check`` was given.
        calls: functions that a ``forward`` calls directly, such as "relu in Net": they run torch's rules.
        functions: the same, of those that run our rules.
        without_rule: the same, of functions of ``torch.nn.functional`` that have no rule here.
    """

    model: Model
    rows: tuple[Row, ...]
    check: Check | None = None
    calls: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    without_rule: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The rows of the layers that now have another class."""
        return tuple(row for row in self.rows if row.after is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of the unchanged layers, with the reason."""
        return tuple(row for row in self.rows if row.after is None)

    def __str__(self) -> str:
        """The table. Layers whose rows differ only in the numbers of their paths share a line."""
        lines = _aligned([("layers", "path", "from", "to", "why not"), *_grouped(self.rows)])
        lines.append(f"{len(self.swapped)} of {len(self.rows)} layers swapped.")
        if self.functions:
            lines.append(f"Called in forward, where our rules run: {', '.join(self.functions)}.")
        if self.calls:
            other = "" if self.functions else ", or swap(model, functions=True)"
            lines.append(
                f"Called in forward, where torch's rules still run: {', '.join(self.calls)}. "
                f"Use manualprop.functional there{other}."
            )
        if self.without_rule:
            lines.append(f"Called in forward, without a rule here: {', '.join(self.without_rule)}.")
        if self.check is not None:
            lines.append(str(self.check))
        return "\n".join(lines)

    __repr__ = __str__


def _grouped(rows: tuple[Row, ...]) -> list[tuple[str, ...]]:
    alike: dict[Row, list[str]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.path)
        alike.setdefault(row._replace(path=pattern), []).append(row.path)
    cells: list[tuple[str, ...]] = []
    for row, paths in alike.items():
        path = row.path if len(paths) > 1 else paths[0]
        cells.append((str(len(paths)), path or "(the model)", row.before, row.after or "-", row.reason))
    return cells


def _aligned(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
