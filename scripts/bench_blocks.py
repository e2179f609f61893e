#!/usr/bin/env python3
"""Forward and backward of the fused blocks against torch.nn: eager, with compiled kernels, and torch.compile.

Run it as `python3 scripts/run.py bench blocks`. A cell that misses its target is marked with !.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from typing import NamedTuple

import benchmarking
import torch
from benchmarking import Ratio, paired
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import manualprop
from manualprop import nn as ours
from manualprop.nn.fusing import ACTIVATIONS

# ----- the blocks -----


class Size(NamedTuple):
    """Rows, width and hidden width; the highest ratios to eager torch promised there, without and with a compiler."""

    rows: int
    width: int
    hidden: int
    eager: float | None = None
    kernels: float | None = None

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.hidden}"


SIZES = (Size(32, 64, 256), Size(512, 256, 1024, 1.3, 1.15), Size(2048, 768, 3072, 1.15, 1.03))


class Gated(nn.Module):
    """A gated feed-forward layer of torch's layers."""

    def __init__(self, width: int, hidden: int, f: nn.Module) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down, self.f = nn.Linear(hidden, width, bias=False), f

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.f(self.gate(x)) * self.up(x))
        return y


class Block(NamedTuple):
    """How to make our block and torch's composition for a width and a hidden width."""

    ours: Callable[[int, int], nn.Module]
    torchs: Callable[[int, int], nn.Module]
    wide: bool = False  # whether the input has the hidden width
    timed: bool = True  # whether the targets for the time hold: keep="input" pays for more products
    halves: bool = False  # whether at most half of eager torch's bytes are promised


# Every activation that blocks take and torch has.
F: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, layer.__name__) for layer, name in ACTIVATIONS.items() if hasattr(nn, layer.__name__)
} | {"gelu_tanh": lambda: nn.GELU("tanh")}


def mlp(f: str, p: float = 0.0, keep: str = "pre-activation") -> Block:
    def torchs(i: int, h: int) -> nn.Module:
        dropout = [nn.Dropout(p)] if p else []
        return nn.Sequential(nn.Linear(i, h), F[f](), *dropout, nn.Linear(h, i))

    # ReLU's and Tanh's gradients need the output alone, in torch too: there is no second tensor to save.
    halves = p > 0 or keep == "input" or f not in ("relu", "tanh")
    return Block(
        lambda i, h: ours.MLP(i, h, i, f, p, keep=keep), torchs, timed=keep != "input", halves=halves
    )


def gated(f: str, keep: str = "pre-activation") -> Block:
    return Block(
        lambda i, h: ours.GatedMLP(i, h, i, f, keep=keep),
        lambda i, h: Gated(i, h, F[f]()),
        timed=keep != "input",
        halves=True,
    )


# fmt: off
BLOCKS: dict[str, Block] = {
    "Linear + GELU, keep input": Block(lambda i, h: ours.LinearActivation(i, h, keep="input"), lambda i, h: nn.Sequential(nn.Linear(i, h), nn.GELU()), timed=False),
    "GELU + Linear": Block(lambda i, h: ours.ActivationLinear(h, i), lambda i, h: nn.Sequential(nn.GELU(), nn.Linear(h, i)), wide=True),
    **{f"MLP, {f}": mlp(f) for f in F},
    "MLP, gelu, keep input": mlp("gelu", keep="input"),
    "MLP, gelu, dropout": mlp("gelu", 0.1),
    "MLP, relu, dropout": mlp("relu", 0.1),
    **{f"GatedMLP, {f}": gated(f) for f in ("silu", "gelu", "relu")},
    "GatedMLP, silu, keep input": gated("silu", "input"),
    "ReLU + Dropout": Block(lambda i, h: ours.ReLUDropout(0.1), lambda i, h: nn.Sequential(nn.ReLU(), nn.Dropout(0.1)), wide=True),
    "Dropout": Block(lambda i, h: ours.Dropout(0.1), lambda i, h: nn.Dropout(0.1), wide=True),
    "PackedReLU": Block(lambda i, h: ours.PackedReLU(), lambda i, h: nn.ReLU(), wide=True),
    "LayerNorm + Linear": Block(lambda i, h: ours.LayerNormLinear(i, h), lambda i, h: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, h))),
    "RMSNorm + Linear": Block(lambda i, h: ours.RMSNormLinear(i, h), lambda i, h: nn.Sequential(nn.RMSNorm(i), nn.Linear(i, h))),
}
# fmt: on


# ----- measuring -----


class Row(NamedTuple):
    """What was measured of one block at one size: times over eager torch's, bytes of activations kept."""

    eager: Ratio
    kernels: Ratio | None
    compiled: Ratio | None  # torch's composition, compiled
    bytes: tuple[int, int, int | None]  # ours, torch's, torch's compiled
    targets: tuple[float | None, float | None]
    halves: bool

    @property
    def misses(self) -> tuple[bool, bool, bool]:
        """In the time of eager and of kernels, in the bytes."""
        mine, torchs, compiled = self.bytes
        most = torchs // 2 if self.halves else torchs
        return (
            self.targets[0] is not None and self.eager.median > self.targets[0],
            self.targets[1] is not None
            and self.kernels is not None
            and self.kernels.median > self.targets[1],
            mine > most or (compiled is not None and mine > compiled),
        )


def kept_bytes(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> int:
    """Bytes that backward keeps, each storage counted once, without the parameters and the input."""
    known = {t.untyped_storage().data_ptr() for t in (*parameters, x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(kept.values())


def step(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Callable[[], object]:
    """A function that runs forward and backward."""
    g = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), [x, *parameters], g)


def measure(block: Block, size: Size, rounds: int, seconds: float, compiler: bool) -> Row:
    torch.manual_seed(0)
    mine, torchs = (make(size.width, size.hidden) for make in (block.ours, block.torchs))
    x = torch.randn(size.rows, size.hidden if block.wide else size.width, requires_grad=True)
    parameters: list[list[Tensor]] = [list(m.parameters()) for m in (mine, torchs)]
    reference = step(torchs, parameters[1], x)
    eager = paired(step(mine, parameters[0], x), reference, rounds, seconds)
    kernels = compiled = compiled_bytes = None
    if compiler:
        with manualprop.kernels("inductor"):
            kernels = paired(step(mine, parameters[0], x), reference, rounds, seconds)
        torch._dynamo.reset()
        fast = torch.compile(torchs, fullgraph=True)
        compiled = paired(step(fast, parameters[1], x), reference, rounds, seconds)
        compiled_bytes = kept_bytes(fast, parameters[1], x)
    kept = (kept_bytes(mine, parameters[0], x), kept_bytes(torchs, parameters[1], x), compiled_bytes)
    targets = (size.eager, size.kernels) if block.timed else (None, None)
    return Row(eager, kernels, compiled, kept, targets, block.halves)


# ----- showing -----

HEADER = ["block", "eager", 'kernels("inductor")', "torch.compile", "kB kept: ours", "torch", "torch.compile"]
Results = dict[str, Row]


def cells(name: str, row: Row) -> list[str]:
    misses = row.misses
    kilo = ["" if b is None else f"{b / 1e3:.1f}" for b in row.bytes]
    return [
        name,
        _time(row.eager, row.targets[0], misses[0]),
        _time(row.kernels, row.targets[1], misses[1]),
        _time(row.compiled, None, False),
        f"{kilo[0]} !" if misses[2] else kilo[0],
        *kilo[1:],
    ]


def _time(ratio: Ratio | None, target: float | None, missed: bool) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.2f}{'' if target is None else f' ({target:g})'}{' !' if missed else ''}"


def show(size: Size, results: Results) -> None:
    title = f"time / eager torch.nn's, forward + backward (target), at {size}"
    benchmarking.show_table(HEADER, [cells(name, row) for name, row in results.items()], title)


def section(size: Size, results: Results, command: str) -> str:
    flags = [miss for row in results.values() for miss in row.misses]
    return "\n\n".join(
        [
            f"## Fused blocks at {size}: {benchmarking.processor()}",
            "Rows x width x hidden width. Time of forward and backward, float32, over that of the same layers of "
            "torch.nn in eager mode; in brackets the target, where there is one; `!` marks a miss. `eager` and "
            "`kernels` are ours, `torch.compile` is torch's composition, compiled. Freed memory stays mapped for all "
            "(`mallopt`), so no page faults are counted. Memory is what backward keeps beside "
            "the parameters and the input; a `!` marks more than torch.compile keeps or, for an MLP, more than half of "
            "what eager torch keeps (MLPs of ReLU or Tanh without dropout excepted: torch keeps one tensor there).",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table(HEADER, [cells(name, row) for name, row in results.items()]),
            f"{len(flags) - sum(flags)} of {len(flags)} promises are kept.",
        ]
    )


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench blocks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="paired measurements for each cell (default: 9)"
    )
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="blocks whose name it finds, as in '^MLP|Norm'"
    )
    parser.add_argument("--size", choices=[str(s) for s in SIZES], help="one size alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="two rounds at the smallest size, no compiler")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    names = [name for name in BLOCKS if re.search(arguments.only, name)]
    if not names:
        print(f"bench_blocks.py: --only {arguments.only!r} finds no block. There are: {', '.join(BLOCKS)}")
        return 2
    torch.set_num_threads(arguments.threads)
    benchmarking.keep_freed_memory()
    quick = arguments.quick
    sizes = SIZES[:1] if quick else [s for s in SIZES if arguments.size in (None, str(s))]
    for size in sizes:
        results: Results = {}
        for i, name in enumerate(names):
            benchmarking.progress(i, len(names), f"{size}: {name}")
            rounds, seconds = (2, 0.001) if quick else (arguments.rounds, 0.02)
            results[name] = measure(BLOCKS[name], size, rounds, seconds, compiler=not quick)
        benchmarking.progress(len(names), len(names), "done")
        show(size, results)
        if arguments.write:
            command = shlex.join(["python3", "scripts/run.py", "bench", "blocks", *argv])
            benchmarking.write_section(f"blocks {size}", section(size, results, command))
            print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
