"""Pictures of training: loss and accuracy over updates and over time.

Colours are Okabe and Ito's, which people with any of the common colour deficiencies can tell apart; line styles differ
too, so that the pictures also work in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter

Row = Mapping[str, float]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))


def plot_history(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw training and validation loss (and accuracy where there is one) over the updates of one run.

    Args:
        rows: of the history, one per epoch, at least one.
        path: of the PNG file.
        title: above the picture.
    """
    quantities = [name for name in ("loss", "accuracy") if f"train_{name}" in rows[-1]]
    figure = Figure(figsize=(5.2 * len(quantities), 3.9), layout="constrained")
    axes = figure.subplots(1, len(quantities), squeeze=False)[0]
    for quantity, ax in zip(quantities, axes, strict=True):
        for stage, label, (colour, line) in (
            ("train", "training (while it learns)", _STYLES[0]),
            ("val", "validation", _STYLES[1]),
        ):
            _curve(ax, rows, "update", f"{stage}_{quantity}", color=colour, linestyle=line, label=label)
        _label(ax, "updates", quantity)
        ax.legend(frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def plot_descents(histories: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw the validation loss and accuracy of several descents over updates and over time.

    Args:
        histories: rows by the name of the descent; the first row may be update 0.
        path: of the PNG file.
    """
    figure = Figure(figsize=(10.4, 7.2), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    for (name, rows), (colour, line) in zip(histories.items(), _STYLES, strict=False):
        for column, x in enumerate(("update", "seconds")):
            for row, quantity in enumerate(("loss", "accuracy")):
                _curve(
                    grid[row][column], rows, x, f"val_{quantity}", color=colour, linestyle=line, label=name
                )
    for row, quantity in enumerate(("loss", "accuracy")):
        _label(grid[row][0], "updates (logarithmic)", quantity, "validation ")
        _label(grid[row][1], "training time (s)", quantity, "validation ")
        _updates_axis(grid[row][0], max(rows[-1]["update"] for rows in histories.values()))
        grid[row][1].set_ylabel("")
    grid[0][0].legend(frameon=False, loc="lower left")
    figure.suptitle("Three descents on the UCI handwritten digits")
    _save(figure, path)


def _curve(ax: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    points = [(row[x], row[y]) for row in rows if y in row]
    if len(points) < 40:
        style |= {"marker": "o", "markersize": 3}
    ax.plot(*zip(*points, strict=True), linewidth=1.6, **style)


def _label(ax: Axes, x: str, quantity: str, prefix: str = "") -> None:
    ax.set_xlabel(x)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if quantity == "loss":
        ax.set_yscale("log")
        ax.set_ylabel(f"{prefix}loss (logarithmic)")
    else:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylabel(f"{prefix}accuracy")


def _updates_axis(ax: Axes, last: float) -> None:
    # Symmetric-logarithmic and linear below 1, so that update 0, the untrained network, has a place.
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.3)
    powers = [0.0] + [10.0**k for k in range(7) if 10.0**k <= 1.2 * last]
    ax.xaxis.set_major_locator(FixedLocator(powers))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": "manualprop"})
