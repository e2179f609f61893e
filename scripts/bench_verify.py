#!/usr/bin/env python3
"""What `manualprop.verify` costs: processor time of a check, children included, over the planted table of the tests.

The first check in a process imports what torch keeps for later; the others are what a test suite pays."""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import benchmarking

from manualprop.verify import check

ROOT = Path(__file__).resolve().parent.parent
PROMISED = {"quick": 1.0, "full": 4.0}  # seconds, the median from the second check on
INTERCEPTED = 3.0  # times the suite's own time
PAIRS = 5  # of runs of that suite, without and with the interception


def processor_time() -> float:
    """Of this process and its ended children."""
    return sum(os.times()[:4])


def rows() -> list[Any]:
    """The planted table: right functions and wrong ones."""
    sys.path.insert(0, str(ROOT / "tests"))
    from planted import CONTROLS, DEFECTS

    return [row for row in (*CONTROLS, *DEFECTS) if "time_limit" not in row.options]


def seconds(row: Any, level: Any) -> float:
    """Of one check."""
    call = row.make()
    args = () if "inputs" in row.options else call.args
    began = processor_time()
    check(call.fn, *args, kwargs=call.kwargs, level=level, **row.options)
    return processor_time() - began


FIRST = """
import os, torch
from manualprop.verify import check
x = torch.randn(4, 3, requires_grad=True)
began = sum(os.times()[:4])
check(torch.tanh, x, level={level!r})
print(sum(os.times()[:4]) - began)
"""


def first(level: str) -> float:
    """Of the first check in a process, without the imports of torch and of the checker."""
    code = FIRST.format(level=level)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


class Measured(NamedTuple):
    """Of one level: seconds of processor time."""

    first: float
    others: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.others)


SUITE = """
import pytest
from planted import CONTROLS

HOMES = ("planted.library", "planted.twins_library", "planted.twins_sequences")
ROWS = [row for row in CONTROLS if getattr(getattr(row.make().fn, "__self__", None), "__module__", "").startswith(HOMES)][:20]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_trains(row):
    call = row.make()
    for _ in range(20):
        sum(y.sum() for y in call() if y.requires_grad).backward()
"""


def suite(folder: Path, *options: str) -> float:
    """Processor time of a suite of 20 tests of Functions in the manner of real libraries."""
    (folder / "test_library.py").write_text(textwrap.dedent(SUITE))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    installed = any(e.value == "manualprop._pytest_plugin" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "manualprop._pytest_plugin"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *plugin,
        *options,
    ]
    began = processor_time()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):  # one of them is outside of its domain at extreme values, and fails
        raise RuntimeError(f"the suite fails:\n{done.stdout[-3000:]}")
    return processor_time() - began


def section(found: dict[str, Measured], pairs: Sequence[tuple[float, float]], command: str) -> str:
    header = ["level", "checks", "first check", "median", "9 of 10 below", "longest", "promised median"]
    table = [
        [
            level,
            str(len(m.others)),
            f"{m.first:.2f}",
            f"{m.median:.2f}{' !' if m.median > PROMISED[level] else ''}",
            f"{sorted(m.others)[int(0.9 * (len(m.others) - 1))]:.2f}",
            f"{max(m.others):.2f}",
            f"{PROMISED[level]:.1f}",
        ]
        for level, m in found.items()
    ]
    parts = [
        f"## Verify: {benchmarking.processor()}",
        "Processor time of one check in seconds, its child processes included, imports of torch excluded. "
        "`!` marks a broken promise.",
        f"`{command}`  \n{benchmarking.machine()}",
        benchmarking.markdown_table(header, table),
    ]
    if pairs:
        own, watched = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        ratio = statistics.median(ratios)
        parts.append(
            f"A suite of 20 tests takes {own:.1f} s of processor time, imports included, and {watched:.1f} s under "
            f"`--manualprop-intercept` at `quick`: {ratio:.1f} times{' !' if ratio > INTERCEPTED else ''} (median of "
            f"{len(ratios)} pairs, {ratios[0]:.1f} to {ratios[-1]:.1f}; promised: {INTERCEPTED:.0f})."
        )
    return "\n\n".join(parts)


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench verify",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--every", type=int, default=1, help="each so-manieth row of the table (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a few rows, at the level quick alone")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    table = rows()[:: max(arguments.every, 40 if arguments.quick else 1)]
    levels = ["quick"] if arguments.quick else ["quick", "full"]
    found = {}
    for level in levels:
        seconds(table[0], level)  # imports
        others = []
        for i, row in enumerate(table):
            benchmarking.progress(i, len(table), f"{level} {row.name}")
            others.append(seconds(row, level))
        found[level] = Measured(first(level), others)
    benchmarking.progress(len(table), len(table), "done")
    pairs = []
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(PAIRS):
                own = suite(Path(folder))
                pairs.append((own, suite(Path(folder), "--manualprop-intercept=planted")))
    text = section(found, pairs, shlex.join(["python3", "scripts/run.py", "bench", "verify", *argv]))
    print(text)
    if arguments.write:
        benchmarking.write_section("verify", text)
        print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
