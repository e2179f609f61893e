"""An explanation as a matplotlib figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from manualprop._explain._explanation import Explanation
from manualprop._explain._numbers import as_table
from manualprop._explain._training import Slice

ROWS, COLUMNS = 32, 64  # of a tensor, at most


def figure(e: Explanation) -> Figure:
    """Activations above their gradients, layer by layer; the loss over the updates and the three descents below."""
    layers = e.observation.layers[:6]
    paths = e.descents.paths if isinstance(e.descents, Slice) else ()
    wide = max(len(layers) + 1, 1 + len(paths), 2)
    drawn = Figure(figsize=(2.6 * wide, 7.2), layout="constrained")
    drawn.suptitle(f"{e.title}: {type(e.loss).__name__} {e.observation.loss:.4g}")
    axes = drawn.subplots(3, wide, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _heat(axes[0, 0], e, "x", "input")
    for i, layer in enumerate(layers, start=1):
        _heat(axes[0, i], e, f"y:{i - 1}", f"{layer.path} ({layer.name})")
        _heat(axes[1, i], e, f"g:{i - 1}", f"gradient at {layer.path}")
    _losses(axes[2, 0], e)
    for k, _ in enumerate(paths):
        assert isinstance(e.descents, Slice)
        _path(axes[2, 1 + k], e.descents, k)
    return drawn


def _heat(axis: Any, e: Explanation, key: str, title: str) -> None:
    if key not in e.numbers:
        return
    table = as_table(key, e.numbers[key]).double()[:ROWS, :COLUMNS]
    top = table.abs().max().item() or 1.0
    axis.set_axis_on()
    axis.imshow(table.tolist(), cmap="PuOr_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"within ±{top:.3g}", fontsize=8)


def _losses(axis: Any, e: Explanation) -> None:
    axis.set_axis_on()
    axis.plot(list(e.recording.losses), linewidth=1, label="of each update")
    axis.plot(
        list(e.recording.at),
        [frame.loss for frame in e.recording.frames],
        "o",
        markersize=3,
        label="of these examples",
    )
    axis.set_title("loss over the updates", fontsize=9)
    axis.legend(fontsize=7)


def _path(axis: Any, found: Slice, k: int) -> None:
    path = found.paths[k]
    axis.set_axis_on()
    axis.contourf(list(found.across), list(found.down), found.grid.tolist(), levels=14, cmap="Blues")
    if path.points:
        axis.plot(*zip(*path.points, strict=True), color="#c44e00", linewidth=1, marker=".", markersize=3)
    noise = (path.refused and "not run") or f"noise {path.noise:.2f}"
    axis.set_title(f"{path.name}, {noise}", fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
