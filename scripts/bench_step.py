"""The tape-free step against torch.nn + autograd + SGD(fused=True), eager and compiled.

Every cell lets all its candidates take turns; a number is the median of the paired ratios, with its quartiles.
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import benchmarking
import torch
from torch import Tensor

import manualprop
from manualprop import descent, nn

Step = Callable[[], object]

CLASSES, LEARNING_RATE = 10, 0.01


class Cell(NamedTuple):
    """A network, the rows of a step, and how many times as fast as torch, eager and compiled, the step should be."""

    sizes: tuple[int, ...]
    rows: int
    target: float | None = None
    compiled_target: float | None = None

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, {self.rows} row{'s' * (self.rows > 1)}"


TARGETS = [
    Cell((64, 64, CLASSES), 1, 6, 8),
    Cell((64, 64, CLASSES), 32, 4),
    Cell((64, 64, CLASSES), 1797, 1.05),
    Cell((784, 512, 512, CLASSES), 1, 2.7),
    Cell((784, 512, 512, CLASSES), 32, 1.3),
    Cell((784, 512, 512, CLASSES), 128, 1.15),
    Cell((784, 2048, 2048, CLASSES), 512, 1.0),
]
GROWTH = {
    "width": [Cell((w, w, CLASSES), 32) for w in (32, 64, 128, 256, 512, 1024)],
    "depth": [Cell((*[64] * (d + 1), CLASSES), 32) for d in (1, 2, 4, 8, 16)],
    "rows": [Cell((64, 64, CLASSES), n) for n in (1, 8, 64, 512, 4096)],
}
BIG = (784, 2048, 2048, CLASSES)  # whose memory is measured


# ----- the candidates -----


def network(sizes: Sequence[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def examples(cell: Cell) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(cell.rows, cell.sizes[0]), torch.randint(CLASSES, (cell.rows,))


def tape_free(cell: Cell, compile: bool = False) -> Step:
    plan = descent.MiniBatch(learning_rate=LEARNING_RATE)
    step = manualprop.Backprop(network(cell.sizes), nn.CrossEntropyLoss(), plan, compile=compile)
    x, t = examples(cell)
    return lambda: step(x, t)


def autograd(cell: Cell, compile: bool = False, compile_update: bool = False) -> Step:
    model = manualprop.unswap(network(cell.sizes)).model
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, fused=True)
    criterion = torch.nn.CrossEntropyLoss()
    x, t = examples(cell)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = criterion(model(x), t)
        return value

    evaluate = torch.compile(loss) if compile else loss
    update = torch.compile(optimizer.step) if compile_update else optimizer.step

    def step() -> float:
        optimizer.zero_grad()
        value = evaluate(x, t)
        value.backward()
        update()
        return value.item()

    return step


def products(cell: Cell) -> Step:
    """The matrix products of a step, and nothing else: no step can be faster."""
    rows = [torch.randn(cell.rows, size) for size in cell.sizes]
    weights = [torch.randn(o, i) for i, o in itertools.pairwise(cell.sizes)]
    layers = list(zip(rows[:-1], weights, rows[1:], strict=True))

    @torch.inference_mode()
    def step() -> None:
        for x, W, _ in layers:
            torch.mm(x, W.t())
        for k, (x, W, g) in enumerate(layers):
            if k > 0:
                torch.mm(g, W)
            W.addmm_(g.t(), x, alpha=1e-9)

    return step


CANDIDATES: dict[str, Callable[[Cell], Step]] = {
    "torch": autograd,
    "step": tape_free,
    "step, compiled": lambda cell: tape_free(cell, compile=True),
    "torch, compiled": lambda cell: autograd(cell, compile=True),
    "torch, update compiled": lambda cell: autograd(cell, compile=True, compile_update=True),
    "products": products,
}


# ----- measuring -----


class Speed(NamedTuple):
    """Microseconds of a step, and how many times as fast as torch it is: median and quartiles of the pairs."""

    time: float
    low: float
    median: float
    high: float


def measure(cell: Cell, names: Sequence[str], rounds: int, seconds: float) -> dict[str, Speed]:
    if any("compiled" in name for name in names):
        torch._dynamo.reset()  # it compiles one code a few times only, and all cells have the same
    steps = {name: CANDIDATES[name](cell) for name in names}
    clock = benchmarking.timer()
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):  # compilers and buffers
            step()
        repeats[name] = max(1, round(seconds / max(timed(step, 2, clock), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            times[name].append(timed(steps[name], repeats[name], clock))
    return {name: speed(times["torch"], times[name]) for name in names}


def timed(step: Step, repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(repeats):
        step()
    return (clock() - began) / repeats


def speed(torchs: list[float], ours: list[float]) -> Speed:
    ratios = [a / b for a, b in zip(torchs, ours, strict=True)]
    return Speed(statistics.median(ours) * 1e6, *statistics.quantiles(ratios, n=4))


# ----- memory -----


def peak_memory(name: str, rows: int) -> float:
    """Megabytes that a step of `BIG` takes at its peak, above weights and data, in a process of its own.

    The system's own count of the process: Python's tracemalloc does not see what torch allocates.
    """
    command = [sys.executable, __file__, "--memory", name, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout)
    return found


def measure_memory(name: str, rows: int) -> float:
    small, step = (CANDIDATES[name](Cell(sizes, rows)) for sizes in ((8, 8, CLASSES), BIG))
    small()  # what the libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    step()
    step()
    return (resident("VmHWM") - before) / 1e3


def resident(field: str) -> float:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def memory_text() -> str:
    if not Path("/proc/self/clear_refs").exists():
        return "Peak memory is measured on Linux only."
    weights = sum(i * o + o for i, o in itertools.pairwise(BIG)) * 4 / 1e6
    table = []
    for rows in (32, 512, 4096):
        hidden = sum(BIG[1:-1]) * rows * 4 / 1e6
        found = [f"{peak_memory(name, rows):.0f}" for name in ("torch", "step")]
        table.append([str(Cell(BIG, rows)), *found, f"{weights:.0f}", f"{hidden:.0f}"])
    header = ["network", "torch", "step", "all gradients would be", "hidden activations"]
    return "\n\n".join(
        [
            "Peak memory of a step above weights and data, in MB. With few rows it is the gradients, which the step does "
            "not store; with many it is the activations, and the gradient that arrives, which an activation writes over.",
            benchmarking.markdown_table(header, table),
        ]
    )


# ----- showing -----

HEADER = [
    "network",
    "torch, us",
    "step, us",
    "step",
    "compiled step",
    "torch compiled",
    "update too",
    "products alone",
    "target",
]


def row(cell: Cell, found: dict[str, Speed]) -> list[str]:
    target = "" if cell.target is None else f"{cell.target:g}{' !' * (found['step'].median < cell.target)}"
    if cell.compiled_target is not None and "torch, compiled" in found:
        against = found["step"].median / found["torch, compiled"].median
        target += f"; {against:.1f} of {cell.compiled_target:g} against compiled"
    ratios = [ratio(found.get(name)) for name in list(CANDIDATES)[1:]]
    return [str(cell), f"{found['torch'].time:.0f}", f"{found['step'].time:.0f}", *ratios, target]


def ratio(found: Speed | None) -> str:
    return "" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def growth_row(cell: Cell, found: dict[str, Speed]) -> list[str]:
    times = [f"{found[name].time:.0f}" for name in ("torch", "step", "products")]
    return [str(cell), *times, ratio(found["step"])]


def section(threads: int, table: str, growth: str, memory: str, command: str) -> str:
    return "\n\n".join(
        [
            f"## The tape-free step, {threads} thread{'s' * (threads > 1)}: {benchmarking.processor()}",
            "How many times as fast as torch.nn + autograd + SGD(fused=True), float32, tanh and cross-entropy: median "
            "and quartiles of paired ratios. `compiled step` is `Backprop(..., compile=True)`; `torch compiled` has "
            "forward, loss and backward compiled and the same optimizer, `update too` has the optimizer's step compiled "
            "as well; `products alone` are the matrix products of the step, the limit. `!` marks a missed target.",
            f"`{command}`  \n{benchmarking.machine()}",
            table,
            "How the cost of a step grows, in microseconds:",
            growth,
            memory,
        ]
    )


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench step",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=21, help="paired measurements for each cell (default: 21)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, no compiler, no growth")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)  # a process of its own: name, rows
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory[0], int(arguments.memory[1]))))
        return 0
    quick = arguments.quick
    names = [name for name in CANDIDATES if not (quick and "compiled" in name)]
    rounds, seconds = (5, 0.01) if quick else (arguments.rounds, 0.05)
    cells = [] if quick else [cell for cells in GROWTH.values() for cell in cells]
    total, rows, growth = len(TARGETS) + len(cells), [], []
    for i, cell in enumerate(TARGETS):
        benchmarking.progress(i, total, str(cell))
        rows.append(row(cell, measure(cell, names, rounds, seconds)))
    for i, cell in enumerate(cells, len(TARGETS)):
        benchmarking.progress(i, total, str(cell))
        growth.append(growth_row(cell, measure(cell, ("torch", "step", "products"), rounds, seconds / 2)))
    benchmarking.progress(total, total, "done")
    grown = benchmarking.markdown_table(["network", "torch", "step", "products", "step / torch"], growth)
    table = benchmarking.markdown_table(HEADER, rows)
    command = shlex.join(["python3", "scripts/run.py", "bench", "step", *argv])
    text = section(arguments.threads, table, grown, memory_text(), command)
    print(text)
    if arguments.write:
        benchmarking.write_section(f"step, {arguments.threads} thread{'s' * (arguments.threads > 1)}", text)
        print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
