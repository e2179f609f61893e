"""Pictures of training: loss and accuracy over updates and over time.

The colours are Okabe and Ito's: people with any common colour deficiency can tell them apart. Line styles
differ too, so the pictures also work in grey.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from manualprop.training._files import write_whole

Row = Mapping[str, float]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_HIGHEST = 0.999
_WIDTH = 1.7
_THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6}
_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."))


def plot_history(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw training and validation loss (and accuracy if there is one) over the updates of one run.

    Args:
        rows: the history, one row per epoch, at least one.
        path: the PNG file.
        title: the title above the picture.
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


def plot_descents(
    curves: Mapping[str, Sequence[Row]],
    path: Path,
    title: str,
    compared: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Draw the validation loss and accuracy of several descents over updates and over time.

    Args:
        curves: rows with update, seconds, val_loss and val_accuracy, by the label of the descent; the first row of
            each is update 0, the untrained network.
        path: the PNG file.
        title: the title above the picture.
        compared: the same descents through autograd, drawn as thin lines over time.
    """
    figure = Figure(figsize=(10.4, 7.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for (label, rows), (colour, line) in zip(curves.items(), _STYLES, strict=False):
        style = {"color": colour, "linestyle": line, "label": label}
        for axes, quantity in zip(grid, ("loss", "accuracy"), strict=True):
            _curve(axes[0], rows, "update", f"val_{quantity}", **style)
            _curve(axes[1], rows[1:], "seconds", f"val_{quantity}", **style)
            if compared:
                _curve(axes[1], compared[label][1:], "seconds", f"val_{quantity}", **style, **_THIN)
    for axes, quantity in zip(grid, ("loss", "accuracy"), strict=True):
        _label(axes[0], "", quantity, "validation ")
        _label(axes[1], "", quantity, "validation ")
        axes[1].set_ylabel("")
    _updates_axis(grid[1][0], max(rows[-1]["update"] for rows in curves.values()))
    _seconds_axis(grid[1][1])
    grid[0][0].legend(frameon=False, loc="lower left", title="examples per update")
    if compared:
        kinds = [Line2D([], [], color="black", label="without a tape", linewidth=_WIDTH)]
        kinds.append(Line2D([], [], color="black", label="through autograd", **_THIN))
        grid[0][1].legend(handles=kinds, frameon=False, loc="lower left")
    figure.suptitle(title)
    _save(figure, path)


def _curve(ax: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    # 0 and 100 % are infinitely far away on a logit scale: they are drawn at its ends.
    lowest, highest = (0.001, _HIGHEST) if y.endswith("accuracy") else (-math.inf, math.inf)
    points = [(row[x], min(max(row[y], lowest), highest)) for row in rows if y in row]
    ax.plot(*zip(*points, strict=True), **{"linewidth": _WIDTH, **style})


def _label(ax: Axes, x: str, quantity: str, prefix: str = "") -> None:
    ax.set_xlabel(x)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if quantity == "loss":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:  # logit: 90, 99 and 99.9 % have equal distances, like errors of 10, 1 and 0.1 % on a log axis
        ax.set_yscale("logit")
        ax.yaxis.set_major_locator(
            FixedLocator([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, _HIGHEST])
        )
        ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(f"{prefix}{quantity} ({'logarithmic' if quantity == 'loss' else 'logit scale'})")


def _percent(value: float, _: int | None) -> str:
    return f"{'≥ ' if value == _HIGHEST else ''}{100 * value:g} %"


def _updates_axis(ax: Axes, last: float) -> None:
    # Symmetric-logarithmic: linear below 1, so that update 0, the untrained network, has a place.
    ax.set_xscale("symlog", linthresh=1.0, linscale=0.3)
    ax.set_xlim(left=0.0)
    ax.xaxis.set_major_locator(FixedLocator([0.0] + [10.0**k for k in range(10) if 10.0**k <= 1.2 * last]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xlabel("updates (logarithmic)")


def _seconds_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training time in s (logarithmic)")


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={"Software": "manualprop"})
    write_whole(path, picture.getbuffer())
