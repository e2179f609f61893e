#!/usr/bin/env python3
"""The head of a language model, linear layer and cross-entropy: torch's two functions, torch's chunks, and ours.

Run it as `python3 scripts/run.py bench head`. A number that misses its target is marked with !.
"""

import argparse
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
import torch.nn.functional as torch_F
from bench_step import resident, timed
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions as Options

from manualprop import functional as F


class Cell(NamedTuple):
    """Rows, features and classes."""

    rows: int
    features: int
    classes: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.features} x {self.classes}"


class Candidate(NamedTuple):
    """A way to the loss of x, W and targets; and the highest ratios to torch's two functions, in time and in memory."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    time: float | None = None
    memory: float | None = None


PROMISED = Cell(2048, 256, 32000)  # where the targets hold
CELLS = [PROMISED, Cell(2048, 768, 3072), Cell(2048, 64, 1000)]
CANDIDATES = {
    "torch": Candidate(lambda x, W, t: torch_F.cross_entropy(torch_F.linear(x, W), t)),
    "torch, chunked": Candidate(lambda x, W, t: torch_F.linear_cross_entropy(x, W, t, options=Options())),
    "ours": Candidate(F.linear_cross_entropy, 1.25, 1 / 6),
    "ours, gradient in forward": Candidate(
        lambda x, W, t: F.linear_cross_entropy(x, W, t, options=Options()), 0.95, 1 / 6
    ),
}


def inputs(cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(cell.rows, cell.features).requires_grad_()
    W = (torch.randn(cell.classes, cell.features) * cell.features**-0.5).requires_grad_()
    return x, W, torch.randint(cell.classes, (cell.rows,))


def step(name: str, cell: Cell) -> Callable[[], object]:
    """A function that runs forward and backward."""
    x, W, t = inputs(cell)
    return lambda: torch.autograd.grad(CANDIDATES[name].loss(x, W, t), (x, W))


# ----- measuring -----


class Measured(NamedTuple):
    """Milliseconds and its median ratio to torch's; megabytes at the peak, None where it cannot be told."""

    time: float
    ratio: float
    peak: float | None


def measure(cell: Cell, rounds: int) -> dict[str, Measured]:
    steps, clock = {name: step(name, cell) for name in CANDIDATES}, benchmarking.timer()
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for turn in range(rounds):
        for name in CANDIDATES if turn % 2 else reversed(CANDIDATES):
            times[name].append(timed(steps[name], 1, clock))
    return {name: _measured(name, cell, times) for name in CANDIDATES}


def _measured(name: str, cell: Cell, times: dict[str, list[float]]) -> Measured:
    ratio = statistics.median(a / b for a, b in zip(times[name], times["torch"], strict=True))
    return Measured(statistics.median(times[name]) * 1e3, ratio, peak_memory(name, cell))


def peak_memory(name: str, cell: Cell) -> float | None:
    """Megabytes that a step takes at its peak, above x, W and the targets, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--memory", name, *map(str, cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout)
    return found


def measure_memory(name: str, cell: Cell) -> float:
    for other in CANDIDATES:  # what the libraries allocate once
        step(other, Cell(8, 8, 8))()
    run = step(name, cell)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    run()
    run()
    return (resident("VmHWM") - before) / 1e3


# ----- showing -----

HEADER = ["rows x features x classes", "", "ms", "time / torch", "peak, MB", "peak / torch"]


def table_rows(cell: Cell, found: dict[str, Measured]) -> list[list[str]]:
    table, torchs = [], found["torch"]
    for name, m in found.items():
        candidate = CANDIDATES[name] if cell == PROMISED else Candidate(CANDIDATES[name].loss)
        memory = None if m.peak is None or torchs.peak is None else m.peak / torchs.peak
        peak = "" if m.peak is None else f"{m.peak:.0f}"
        numbers = [f"{m.time:.0f}", against(m.ratio, candidate.time), peak, against(memory, candidate.memory)]
        table.append([str(cell), name, *numbers])
    return table


def against(value: float | None, target: float | None) -> str:
    """A ratio and its target, with a mark if it misses it."""
    if value is None or target is None:
        return "" if value is None else f"{value:.2f}"
    return f"{value:.2f} ({target:.2f}){' !' * (value > target)}"


def section(found: dict[Cell, dict[str, Measured]], command: str) -> str:
    rows = [row for cell, measured in found.items() for row in table_rows(cell, measured)]
    return "\n\n".join(
        [
            f"## Linear layer and cross-entropy in one: {benchmarking.processor()}",
            "Forward and backward, float32, gradients of input and weight; the candidates take turns, a ratio is the "
            "median over the rounds. In brackets the target; `!` marks a miss. The peak is what a step adds to the "
            "process at most, the gradients included.",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table(HEADER, rows),
        ]
    )


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench head",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each candidate (default: 9)")
    parser.add_argument("--quick", action="store_true", help="three rounds, of the sizes with targets alone")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)  # a process of its own: name and sizes
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        name, *sizes = arguments.memory
        print(json.dumps(measure_memory(name, Cell(*map(int, sizes)))))
        return 0
    cells, rounds = (CELLS[:1], 3) if arguments.quick else (CELLS, arguments.rounds)
    found = {}
    for i, cell in enumerate(cells):
        benchmarking.progress(i, len(cells), str(cell))
        found[cell] = measure(cell, rounds)
    benchmarking.progress(len(cells), len(cells), "done")
    text = section(found, shlex.join(["python3", "scripts/run.py", "bench", "head", *argv]))
    print(text)
    if arguments.write:
        benchmarking.write_section("head", text)
        print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
