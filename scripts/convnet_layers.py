"""The layers of convolutional networks by kind, forward and backward, against their torch twins, for `bench models`."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import benchmarking
import torch
from bench_layers import Cell, Refused, compare, compare_compiled, kept, with_target
from bench_layers import Settings as LayerSettings
from torch import nn

import manualprop


class Layer(NamedTuple):
    """How to make a layer, the shape of its input, and the highest ratios promised; None: not measured."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    eager: float
    compiled: float | None = None  # a row of each kind: two compilations take many seconds
    half: float = 2.0  # eager in bfloat16, against torch's in bfloat16


ORDINARY, POINTWISE, DEPTHWISE = 1.15, 1.2, 1.6
MAXIMUM, AVERAGE, GLOBAL, INTERPOLATION = 1.0, 0.7, 0.5, 1.3
COMPILED, DEPTHWISE_COMPILED = 1.05, 1.75
IMAGE = (8, 64, 28, 28)

# fmt: off
LAYERS: dict[str, Layer] = {
    "convolution 3 x 3":                Layer(lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), IMAGE, ORDINARY, COMPILED),
    "convolution 3 x 3, stride 2":      Layer(lambda: nn.Conv2d(64, 128, 3, 2, 1, bias=False), IMAGE, ORDINARY),
    "convolution 3 x 3, dilation 2":    Layer(lambda: nn.Conv2d(64, 64, 3, 1, 2, 2), IMAGE, ORDINARY),
    "convolution 7 x 7, stride 2":      Layer(lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False), (4, 3, 112, 112), ORDINARY),
    "convolution 3, one axis":          Layer(lambda: nn.Conv1d(64, 64, 3, padding=1), (8, 64, 784), ORDINARY),
    "convolution 3 x 3 x 3":            Layer(lambda: nn.Conv3d(16, 32, 3, padding=1), (2, 16, 8, 28, 28), ORDINARY),
    "transposed 2 x 2, stride 2":       Layer(lambda: nn.ConvTranspose2d(64, 32, 2, 2), IMAGE, ORDINARY, COMPILED),
    "convolution 1 x 1":                Layer(lambda: nn.Conv2d(64, 128, 1, bias=False), IMAGE, POINTWISE, COMPILED),
    "convolution 1 x 1, stride 2":      Layer(lambda: nn.Conv2d(64, 128, 1, 2, bias=False), IMAGE, POINTWISE),
    "depthwise 3 x 3":                  Layer(lambda: nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False), IMAGE, DEPTHWISE, DEPTHWISE_COMPILED),
    "depthwise 3 x 3, stride 2":        Layer(lambda: nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False), IMAGE, DEPTHWISE),
    "depthwise 7 x 7":                  Layer(lambda: nn.Conv2d(64, 64, 7, 1, 3, groups=64), IMAGE, DEPTHWISE),
    "max pool 2":                       Layer(lambda: nn.MaxPool2d(2), IMAGE, MAXIMUM, COMPILED),
    "max pool 3, stride 2":             Layer(lambda: nn.MaxPool2d(3, 2, 1), IMAGE, MAXIMUM),
    "average pool 2":                   Layer(lambda: nn.AvgPool2d(2), IMAGE, AVERAGE, COMPILED),
    "average pool 3, stride 2":         Layer(lambda: nn.AvgPool2d(3, 2, 1), IMAGE, AVERAGE),
    "adaptive average pool to 1 x 1":   Layer(lambda: nn.AdaptiveAvgPool2d(1), IMAGE, GLOBAL),
    "nearest, twice the size":          Layer(lambda: nn.Upsample(scale_factor=2), IMAGE, INTERPOLATION),
    "bilinear, twice the size":         Layer(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE, INTERPOLATION, COMPILED),
}
# fmt: on

# ----- measuring -----

Results = dict[str, dict[str, Cell | Refused]]
COLUMNS = {"eager": "eager", "half": "eager, bfloat16", "compiled": "torch.compile, both"}
HEADER = ["layer", "input", *COLUMNS.values(), "MB kept"]


def measure(layer: Layer, rounds: int, seconds: float, compiler: bool) -> dict[str, Cell | Refused]:
    settings = LayerSettings(rounds, seconds, (), (), compiler)
    torch.manual_seed(0)
    torchs = layer.make()
    ours = manualprop.swap(copy.deepcopy(torchs)).model
    x = torch.randn(layer.shape).requires_grad_()
    cells: dict[str, Cell | Refused] = {"eager": compare(ours, torchs, (x,), layer.eager, settings)}
    if compiler and layer.compiled is not None:
        cells["compiled"] = compare_compiled(ours, torchs, (x,), settings, layer.compiled)
    half = [copy.deepcopy(m).bfloat16() for m in (ours, torchs)]
    x = x.detach().bfloat16().requires_grad_()
    cells["half"] = compare(*half, (x,), layer.half, settings)
    return cells


# ----- showing -----


def rows(results: Results) -> list[list[str]]:
    table = []
    for name, cells in results.items():
        shape = " x ".join(map(str, LAYERS[name].shape))
        times = (with_target(cells.get(column)) for column in COLUMNS)
        table.append([name, shape, *times, kept(cells["eager"])])
    return table


def show(results: Results) -> None:
    title = "our time / torch.nn's, forward + backward (target)"
    benchmarking.show_table(HEADER, rows(results), title)


def section(results: Results, command: str) -> str:
    found = [cell.missed for cells in results.values() for cell in cells.values()]
    return "\n\n".join(
        [
            f"## Layers of convolutional networks: {benchmarking.processor()}",
            "Our time / torch.nn's, forward and backward, in float32 and in bfloat16; in brackets the target; `!` marks a "
            "miss. One row of each kind is compiled, on both sides. Memory is what backward keeps, inputs and parameters "
            "included, ours / torch's; freed memory stays mapped for both (`mallopt`).",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table(HEADER, rows(results)),
            f"{len(found) - sum(found)} of {len(found)} measurements are within their targets.",
        ]
    )
