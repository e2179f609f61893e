"""An explanation as a matplotlib figure."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from manualprop._explain._explained import Explained
from manualprop._explain._numbers import as_table
from manualprop._explain._training import Slice

ROWS, COLUMNS = 32, 64  # of a tensor, at most


def figure(e: Explained) -> Figure:
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


def _heat(axis: Any, e: Explained, key: str, title: str) -> None:
    if key not in e.numbers:
        return
    tensor = e.numbers[key].double()
    is_image = tensor.dim() == 4
    table = _channels(tensor[0]) if is_image else as_table(key, tensor)[:ROWS, :COLUMNS]
    top = table.nan_to_num().abs().max().item() or 1.0
    axis.set_axis_on()
    shape = "equal" if is_image else "auto"
    axis.imshow(table.tolist(), cmap="PuOr_r", vmin=-top, vmax=top, aspect=shape, interpolation="nearest")
    if is_image:
        _dots(axis, e, key, tensor.shape[1:])
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"within ±{top:.3g}", fontsize=8)


def _across(channels: int) -> int:
    """How many channels stand side by side."""
    return math.ceil(math.sqrt(channels))


def _channels(image: Tensor) -> Tensor:
    """The channels of an image (C, H, W) as one table, with an empty line between them."""
    C, H, W = image.shape
    across = _across(C)
    table = image.new_full((-(-C // across) * (H + 1), across * (W + 1)), math.nan)
    for c in range(C):
        top, left = c // across * (H + 1), c % across * (W + 1)
        table[top : top + H, left : left + W] = image[c]
    return table[:-1, :-1]


def _dots(axis: Any, e: Explained, key: str, size: torch.Size) -> None:
    """A dot at each place that a max pool has chosen of these numbers."""
    C, H, W = size
    for i, x in enumerate(e.links.inputs):
        if x != key or f"i:{i}" not in e.numbers:
            continue
        at = [(c, int(place)) for c in range(C) for place in e.numbers[f"i:{i}"][0, c].flatten()]
        down = [c // _across(C) * (H + 1) + place // W for c, place in at]
        right = [c % _across(C) * (W + 1) + place % W for c, place in at]
        axis.plot(right, down, ".", color="black", markersize=2)


def _losses(axis: Any, e: Explained) -> None:
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
