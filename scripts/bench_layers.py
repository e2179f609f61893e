#!/usr/bin/env python3
"""Forward and backward of every layer against its torch twin: eager, with compiled kernels, and under torch.compile.

Run it as `python3 scripts/run.py bench layers`. A cell that misses its target is marked with !.
"""

import argparse
import copy
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import benchmarking
import torch
from benchmarking import Ratio, paired, saved_bytes
from torch import Tensor, nn

import manualprop
from manualprop import functions
from manualprop._swap import TWINS

SMALL, MIDDLE, BIG = (32, 64), (512, 1024), (2048, 3072)


class Targets(NamedTuple):
    """The highest ratios that a family promises."""

    small: float | None = None  # at 32x64, eager
    middle: float | None = None  # at 512x1024, eager
    big: float | None = None  # at 2048x3072, eager
    kernels: float | None = None  # at both of these, with manualprop.kernels("inductor"); None: not measured


PIECEWISE = Targets(1.6, 1.45, 1.3, 1.2)
SMOOTH = Targets(1.6, 1.4, 2.0, 1.2)
CHEAP = SMOOTH._replace(big=1.3)  # of a slope without an exponential
GELU = Targets(1.6, 2.2, 2.5, 1.5)
SOFTMAX = Targets(1.6, 1.3, 1.3, 1.2)
NORM = Targets(2.1, 2.0, None, 1.2)
LOSS = Targets(big=1.3)
MASS = Targets(big=1.3, kernels=1.2)  # the cross-entropies
AVERAGE = Targets(big=0.7)
INTERPOLATION = Targets(big=1.3)
POOL = Targets(middle=1.0, big=1.0)  # whose forward takes nearly all of the time
UNTOLD = Targets()


class Layer(NamedTuple):
    """How to make a layer and its inputs for a number of rows and columns, and what its family promises."""

    make: Callable[[int, int], nn.Module]
    inputs: Callable[[int, int], tuple[Any, ...]]
    targets: Targets = UNTOLD


def x(n: int, c: int) -> tuple[Tensor]:
    return (torch.randn(n, c).requires_grad_(),)


# What a constructor must be given, and families that the formula alone does not tell.
ARGUMENTS = {"Threshold": (0.1, 2.0)}
FAMILIES = {"GELU": GELU, "Sigmoid": CHEAP, "Softsign": CHEAP, "Tanh": CHEAP}


def activations() -> dict[str, Layer]:
    """An entry for every elementwise rule that has a layer of torch's."""
    found = {}
    for name, rule in vars(functions).items():
        if isinstance(rule, type) and issubclass(rule, functions.Elementwise) and hasattr(nn, name):
            of_the_module = PIECEWISE if rule.__module__ == functions.piecewise.__name__ else SMOOTH
            found[name] = elementwise(
                getattr(nn, name), FAMILIES.get(name, of_the_module), *ARGUMENTS.get(name, ())
            )
    return found


def elementwise(make: Callable[..., nn.Module], targets: Targets, *arguments: Any) -> Layer:
    return Layer(lambda n, c: make(*arguments), x, targets)


def loss(
    make: Callable[[], nn.Module],
    target: Callable[[int, int], tuple[Any, ...]],
    targets: Targets = LOSS,
) -> Layer:
    return Layer(lambda n, c: make(), lambda n, c: (*x(n, c), *target(n, c)), targets)


def probability(n: int, c: int) -> tuple[Tensor]:
    return (torch.rand(n, c).clamp(0.01, 0.99).requires_grad_(),)


def image(channels: int, axes: int) -> Callable[[int, int], tuple[Tensor]]:
    """n x c numbers as a batch of images."""
    side = {1: (16,), 2: (4, 4), 3: (4, 2, 2)}[axes]
    return lambda n, c: (torch.randn(n * c // (16 * channels), channels, *side).requires_grad_(),)


def chosen(channels: int, axes: int) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """The largest numbers of windows of two along each axis of images, and their places."""
    pool = getattr(nn.functional, f"max_pool{axes}d")

    def made(n: int, c: int) -> tuple[Tensor, Tensor]:
        y, places = pool(*image(channels, axes)(n, c), 2, return_indices=True)
        return y.detach().requires_grad_(), places

    return made


def norm(make: Callable[[int], nn.Module], axes: int) -> Layer:
    return Layer(lambda n, c: make(16), image(16, axes), NORM)


def convolution(make: Callable[..., nn.Module], axes: int) -> Layer:
    return Layer(lambda n, c: make(16, 16, 3, padding=1), image(16, axes))


def signs(n: int, *c: int) -> Tensor:
    return torch.randint(2, (n, *c)) * 2.0 - 1


def labels(n: int, c: int) -> Tensor:
    """Three labels a row, then the end mark."""
    return torch.randint(c, (n, c)).index_fill(1, torch.tensor([3]), -1)


def pixels(n: int, c: int) -> tuple[Tensor, ...]:
    """Images of sixteen channels, and a class for each of their pixels."""
    return (*image(16, 2)(n, c), torch.randint(16, (n * c // 256, 4, 4)))


def three(n: int, c: int) -> tuple[Tensor, ...]:
    return (*x(n, c), *x(n, c), *x(n, c))


def photographs(axes: int) -> Callable[[int, int], tuple[Tensor]]:
    """n x c numbers as images of 256 elements in eight channels."""
    side = {1: (256,), 2: (16, 16), 3: (16, 4, 4)}[axes]
    return lambda n, c: (torch.randn(n * c // 2048, 8, *side).requires_grad_(),)


def over_images(
    make: Callable[..., nn.Module], axes: int, *arguments: Any, targets: Targets = UNTOLD
) -> Layer:
    return Layer(lambda n, c: make(*arguments), photographs(axes), targets)


def linear_maps() -> dict[str, Layer]:
    """Padding and average pooling of every number of axes, interpolation and the shuffles."""
    found = {
        "Upsample": over_images(nn.Upsample, 2, None, 2.0, "bilinear", targets=INTERPOLATION),
        "UpsamplingNearest2d": over_images(nn.UpsamplingNearest2d, 2, None, 2, targets=INTERPOLATION),
        "UpsamplingBilinear2d": over_images(nn.UpsamplingBilinear2d, 2, None, 2, targets=INTERPOLATION),
        "PixelShuffle": over_images(nn.PixelShuffle, 2, 2),
        "PixelUnshuffle": over_images(nn.PixelUnshuffle, 2, 2),
        "LocalResponseNorm": over_images(nn.LocalResponseNorm, 2, 5),
        "Flatten": over_images(nn.Flatten, 2),
        "Unflatten": Layer(lambda n, c: nn.Unflatten(1, (2, c // 2)), x),
    }
    for d in (1, 2, 3):
        for kind in ("Circular", "Reflection", "Replication", "Zero"):
            found[f"{kind}Pad{d}d"] = over_images(getattr(nn, f"{kind}Pad{d}d"), d, 1)
        found[f"ConstantPad{d}d"] = over_images(getattr(nn, f"ConstantPad{d}d"), d, 1, 0.5)
        found[f"AvgPool{d}d"] = over_images(getattr(nn, f"AvgPool{d}d"), d, 2, targets=AVERAGE)
        found[f"AdaptiveAvgPool{d}d"] = over_images(
            getattr(nn, f"AdaptiveAvgPool{d}d"), d, 1, targets=AVERAGE._replace(big=0.5)
        )
    return found


# fmt: off
LAYERS: dict[str, Layer] = activations() | linear_maps() | {
    "Identity":     elementwise(nn.Identity, PIECEWISE),
    "GELU(tanh)":   elementwise(nn.GELU, GELU._replace(big=2.0, kernels=1.2), "tanh"),
    "PReLU":        elementwise(nn.PReLU, PIECEWISE),
    "RReLU":        elementwise(nn.RReLU, PIECEWISE),
    "GLU":          elementwise(nn.GLU, SMOOTH),
    "Softmax":      elementwise(nn.Softmax, SOFTMAX, -1),
    "Softmin":      elementwise(nn.Softmin, SOFTMAX, -1),
    "LogSoftmax":   elementwise(nn.LogSoftmax, SOFTMAX, -1),
    "Softmax2d":    Layer(lambda n, c: nn.Softmax2d(), image(16, 2), SOFTMAX),
    "Linear":       Layer(lambda n, c: nn.Linear(c, min(c, 256)), x, Targets(1.1)),
    "Bilinear":     Layer(lambda n, c: nn.Bilinear(16, 16, 16), lambda n, c: (*x(n, 16), *x(n, 16))),
    "Embedding":    Layer(lambda n, c: nn.Embedding(100, c), lambda n, c: (torch.randint(100, (n,)),)),
    **{f"Conv{d}d": convolution(getattr(nn, f"Conv{d}d"), d) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": convolution(getattr(nn, f"ConvTranspose{d}d"), d) for d in (1, 2, 3)},
    "Dropout":      Layer(lambda n, c: nn.Dropout(), x),
    "Dropout1d":    Layer(lambda n, c: nn.Dropout1d(), image(16, 1)),
    "Dropout2d":    Layer(lambda n, c: nn.Dropout2d(), image(16, 2)),
    "Dropout3d":    Layer(lambda n, c: nn.Dropout3d(), image(16, 3)),
    "AlphaDropout": Layer(lambda n, c: nn.AlphaDropout(), x),
    "FeatureAlphaDropout": Layer(lambda n, c: nn.FeatureAlphaDropout(), image(16, 2)),
    **{f"MaxPool{d}d": Layer(lambda n, c, d=d: getattr(nn, f"MaxPool{d}d")(2), image(16, d), POOL) for d in (1, 2, 3)},
    **{f"AdaptiveMaxPool{d}d": Layer(lambda n, c, d=d: getattr(nn, f"AdaptiveMaxPool{d}d")(2), image(16, d)) for d in (1, 2, 3)},
    **{f"FractionalMaxPool{d}d": Layer(lambda n, c, d=d: getattr(nn, f"FractionalMaxPool{d}d")((2, 1, 1)[:d], output_ratio=0.5), image(16, d)) for d in (2, 3)},
    **{f"MaxUnpool{d}d": Layer(lambda n, c, d=d: getattr(nn, f"MaxUnpool{d}d")(2), chosen(16, d)) for d in (1, 2, 3)},
    **{f"LPPool{d}d": Layer(lambda n, c, d=d: getattr(nn, f"LPPool{d}d")(2, 2), image(16, d)) for d in (1, 2, 3)},
    "LayerNorm":    Layer(lambda n, c: nn.LayerNorm(c), x, NORM),
    "RMSNorm":      Layer(lambda n, c: nn.RMSNorm(c), x, NORM),
    "GroupNorm":    norm(lambda c: nn.GroupNorm(4, c), 2),
    "BatchNorm1d":  norm(nn.BatchNorm1d, 1),
    "BatchNorm2d":  norm(nn.BatchNorm2d, 2),
    "BatchNorm3d":  norm(nn.BatchNorm3d, 3),
    "InstanceNorm1d": norm(nn.InstanceNorm1d, 1),
    "InstanceNorm2d": norm(nn.InstanceNorm2d, 2),
    "InstanceNorm3d": norm(nn.InstanceNorm3d, 3),
    "MSELoss":      loss(nn.MSELoss, lambda n, c: (torch.randn(n, c),)),
    "L1Loss":       loss(nn.L1Loss, lambda n, c: (torch.randn(n, c),)),
    "SmoothL1Loss": loss(nn.SmoothL1Loss, lambda n, c: (torch.randn(n, c),)),
    "HuberLoss":    loss(nn.HuberLoss, lambda n, c: (torch.randn(n, c),)),
    "PoissonNLLLoss": loss(nn.PoissonNLLLoss, lambda n, c: (torch.rand(n, c),)),
    "GaussianNLLLoss": loss(nn.GaussianNLLLoss, lambda n, c: (torch.randn(n, c), torch.rand(n, c) + 0.1)),
    "KLDivLoss":    loss(lambda: nn.KLDivLoss(reduction="sum"), lambda n, c: (torch.rand(n, c),)),
    "BCEWithLogitsLoss": loss(nn.BCEWithLogitsLoss, lambda n, c: (torch.rand(n, c),)),
    "BCELoss":      Layer(lambda n, c: nn.BCELoss(), lambda n, c: (*probability(n, c), torch.rand(n, c)), LOSS),
    "CrossEntropyLoss": loss(nn.CrossEntropyLoss, lambda n, c: (torch.randint(c, (n,)),), MASS._replace(small=1.7)),
    "CrossEntropyLoss(weights)": Layer(lambda n, c: nn.CrossEntropyLoss(torch.rand(c)), lambda n, c: (*x(n, c), torch.randint(c, (n,))), MASS),
    "CrossEntropyLoss(smoothing)": loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), lambda n, c: (torch.randint(c, (n,)),), MASS),
    "CrossEntropyLoss(probabilities)": loss(nn.CrossEntropyLoss, lambda n, c: (torch.rand(n, c).softmax(1),), MASS),
    "CrossEntropyLoss2d": Layer(lambda n, c: nn.CrossEntropyLoss(), pixels, MASS),
    "CrossEntropyLoss2d(weights)": Layer(lambda n, c: nn.CrossEntropyLoss(torch.rand(16)), pixels, MASS),
    # Its time and its memory are `bench head`'s.
    "LinearCrossEntropyLoss": Layer(lambda n, c: nn.LinearCrossEntropyLoss(c, 1000), lambda n, c: (*x(n, c), torch.randint(1000, (n,)))),
    "NLLLoss":      loss(nn.NLLLoss, lambda n, c: (torch.randint(c, (n,)),), MASS._replace(small=1.7)),
    "NLLLoss2d":    Layer(lambda n, c: nn.NLLLoss(), pixels, MASS),
    "HingeEmbeddingLoss": loss(nn.HingeEmbeddingLoss, lambda n, c: (signs(n, c),)),
    "SoftMarginLoss": loss(nn.SoftMarginLoss, lambda n, c: (signs(n, c),)),
    "MultiLabelSoftMarginLoss": loss(nn.MultiLabelSoftMarginLoss, lambda n, c: (torch.randint(2, (n, c)).float(),)),
    # 128 columns at most: compiled, torch's takes rows x columns x columns numbers (77 GB at 2048x3072).
    "MultiLabelMarginLoss": Layer(lambda n, c: nn.MultiLabelMarginLoss(), lambda n, c: (*x(n, min(c, 128)), labels(n, min(c, 128))), LOSS),
    "MultiMarginLoss": loss(nn.MultiMarginLoss, lambda n, c: (torch.randint(c, (n,)),)),
    "CosineEmbeddingLoss": loss(nn.CosineEmbeddingLoss, lambda n, c: (*x(n, c), signs(n))),
    "MarginRankingLoss": loss(nn.MarginRankingLoss, lambda n, c: (*x(n, c), signs(n, c))),
    "TripletMarginLoss": Layer(lambda n, c: nn.TripletMarginLoss(), three, LOSS),
    "TripletMarginWithDistanceLoss": Layer(lambda n, c: nn.TripletMarginWithDistanceLoss(), three, LOSS),
}
# fmt: on
NOT_TIMED = {
    "LazyLinear": "becomes Linear on its first input",
    **{f"LazyConv{d}d": f"becomes Conv{d}d" for d in (1, 2, 3)},
    **{f"LazyConvTranspose{d}d": f"becomes ConvTranspose{d}d" for d in (1, 2, 3)},
    "LazyBatchNorm1d": "becomes BatchNorm1d",
    "LazyBatchNorm2d": "becomes BatchNorm2d",
    "LazyBatchNorm3d": "becomes BatchNorm3d",
}


def without_an_entry() -> list[str]:
    names = {name.partition("(")[0] for name in LAYERS} | set(NOT_TIMED)
    return sorted(c.__name__ for c in TWINS if c.__name__ not in names)


# ----- measuring -----


class Cell(NamedTuple):
    """One measurement of one layer."""

    ratio: Ratio
    bytes: tuple[int, int]  # saved for backward: ours, torch's
    target: float | None

    @property
    def missed(self) -> bool:
        over = self.target is not None and self.ratio.median > self.target
        return over or self.bytes[0] > self.bytes[1]


class Refused(NamedTuple):
    """A layer that the compiler refuses, on our side or on torch's."""

    ours: bool
    torchs: bool

    @property
    def missed(self) -> bool:
        return self.ours and not self.torchs


class Settings(NamedTuple):
    rounds: int
    seconds: float
    middle: tuple[int, int]
    big: tuple[int, int]
    compiled: bool


def pair(layer: Layer, n: int, c: int) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    torchs = layer.make(n, c)
    return manualprop.swap(copy.deepcopy(torchs)).model, torchs, layer.inputs(n, c)


def step(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """A function that runs forward and backward."""
    wanted = [t for t in (*inputs, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    g = torch.randn_like(module(*inputs))
    return lambda: torch.autograd.grad(module(*inputs), wanted, g, allow_unused=True)


def compare(
    ours: nn.Module, torchs: nn.Module, inputs: tuple[Any, ...], target: float | None, s: Settings
) -> Cell:
    ratio = paired(step(ours, inputs), step(torchs, inputs), s.rounds, s.seconds)
    kept = saved_bytes(lambda: ours(*inputs)), saved_bytes(lambda: torchs(*inputs))
    return Cell(ratio, kept, target)


def compare_compiled(
    ours: nn.Module, torchs: nn.Module, inputs: tuple[Any, ...], s: Settings, target: float = 1.05
) -> Cell | Refused:
    torch._dynamo.reset()
    compiled = [torch.compile(m, fullgraph=True) for m in (ours, torchs)]
    fails = [not _runs(m, inputs) for m in compiled]
    return Refused(*fails) if any(fails) else compare(*compiled, inputs, target, s)


def _runs(module: Callable[..., Any], inputs: tuple[Any, ...]) -> bool:
    try:
        module(*inputs)
    except Exception:  # whatever the compiler raises: torch.compile(fullgraph=True) refuses this layer
        return False
    return True


def measure(name: str, s: Settings) -> dict[str, Cell | Refused]:
    layer, targets = LAYERS[name], LAYERS[name].targets
    cells: dict[str, Cell | Refused] = {}
    ours, torchs, inputs = pair(layer, *SMALL)
    cells["small"] = compare(ours, torchs, inputs, targets.small, s)
    for size, shape, target in (("middle", s.middle, targets.middle), ("big", s.big, targets.big)):
        ours, torchs, inputs = pair(layer, *shape)
        cells[size] = compare(ours, torchs, inputs, target, s)
        if targets.kernels is not None and s.compiled:
            with manualprop.kernels("inductor"):
                cells[f"{size} kernels"] = compare(ours, torchs, inputs, targets.kernels, s)
    if s.compiled:
        cells["compiled"] = compare_compiled(ours, torchs, inputs, s)
    return cells


# ----- showing -----

COLUMNS = {
    "small": "eager 32x64",
    "middle": "eager 512x1024",
    "big": "eager 2048x3072",
    "middle kernels": 'kernels("inductor") 512x1024',
    "big kernels": 'kernels("inductor") 2048x3072',
    "compiled": "torch.compile, both",
}


Results = dict[str, dict[str, Cell | Refused]]


def kept(cell: Cell | Refused | None) -> str:
    """Bytes saved for backward, ours / torch's."""
    if not isinstance(cell, Cell):
        return ""
    ours, torchs = cell.bytes
    return f"{_mega(ours)} / {_mega(torchs)}{' !' if ours > torchs else ''}"


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f}"


def rows(results: Results) -> list[list[str]]:
    table = []
    for name, cells in results.items():
        row = [name, *(with_target(cells.get(column)) for column in COLUMNS)]
        table.append([*row, kept(cells.get("big")), kept(cells.get("compiled"))])
    return table


def with_target(cell: Cell | Refused | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Refused):
        return "does not compile !" if cell.missed else "torch's does not compile"
    over = cell.target is not None and cell.ratio.median > cell.target
    target = "" if cell.target is None else f" ({cell.target:g})"
    return f"{cell.ratio.median:.2f}{target}{' !' if over else ''}"


HEADER = ["layer", *COLUMNS.values(), "MB kept, eager", "MB kept, compiled"]


def show(results: Results) -> None:
    title = "our time / torch.nn's, forward + backward (target)"
    benchmarking.show_table(HEADER, rows(results), title)


def section(results: Results, command: str) -> str:
    missed = sum(cell.missed for cells in results.values() for cell in cells.values())
    count = sum(len(cells) for cells in results.values())
    return "\n\n".join(
        [
            f"## Layers: {benchmarking.processor()}",
            "Our time / torch.nn's, forward and backward, float32; in brackets the target, where there is one; "
            '`!` marks a miss. `kernels` is eager training with `manualprop.kernels("inductor")`; `torch.compile` is measured at 2048x3072. '
            "Freed memory stays mapped for both (`mallopt`), so no page faults are counted. "
            "Memory is what backward keeps at 2048x3072, inputs and parameters included, ours / torch's.",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table(HEADER, rows(results)),
            f"{count - missed} of {count} measurements are within their targets.",
        ]
    )


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench layers",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="paired measurements for each cell (default: 15)"
    )
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="layers whose name it finds, as in 'ELU|Soft'"
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds, smaller sizes, no compiler")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    missing = without_an_entry()
    if missing:
        print(f"bench_layers.py: twins without an entry in LAYERS: {', '.join(missing)}", file=sys.stderr)
        return 1
    names = [name for name in LAYERS if re.search(arguments.only, name)]
    if not names:
        print(f"bench_layers.py: --only {arguments.only!r} finds no layer. There are: {', '.join(LAYERS)}")
        return 2
    torch.set_num_threads(arguments.threads)
    benchmarking.keep_freed_memory()
    quick = arguments.quick
    settings = (
        Settings(3, 0.002, (256, 512), (512, 512), False)
        if quick
        else Settings(arguments.rounds, 0.02, MIDDLE, BIG, True)
    )
    results: Results = {}
    for i, name in enumerate(names):
        benchmarking.progress(i, len(names), name)
        results[name] = measure(name, settings)
    benchmarking.progress(len(names), len(names), "done")
    show(results)
    if arguments.write:
        command = shlex.join(["python3", "scripts/run.py", "bench", "layers", *argv])
        benchmarking.write_section("layers", section(results, command))
        print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
