"""An epoch as one program against our step, the step of an earlier commit, and JAX's scan; and a whole run.

Each candidate has a process of its own, and they take turns.  A time is processor time of the process.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CLASSES, LEARNING_RATE = 10, 0.01
BEFORE = "d648236"  # the commit whose step is the measure of the targets


class Cell(NamedTuple):
    """A network, the rows of an update, the updates of a call; how many times as fast as which candidate it should be.

    ``beside_jax`` is how many times JAX's time it may take.
    """

    sizes: tuple[int, ...]
    rows: int
    updates: int
    before: float
    beside_jax: float | None = None

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))}, {self.rows} row{'s' * (self.rows > 1)}"


CELLS = [
    Cell((64, 64, CLASSES), 1, 1297, 3.5, 5),
    Cell((64, 64, CLASSES), 32, 200, 3.5, 2.5),
    Cell((64, 64, CLASSES), 1797, 20, 1.3, 1.4),
    Cell((784, 512, 512, CLASSES), 1, 100, 1.0),
    Cell((784, 512, 512, CLASSES), 32, 40, 1.0),
]


# ----- the candidates, each in its own process -----


def data(cell: Cell) -> tuple[Any, Any, Any, Any]:
    """The same weights, inputs, targets and order for all: numpy arrays."""
    import numpy

    draw = numpy.random.default_rng(0)
    weights = [
        (
            (draw.uniform(-1, 1, (o, i)) / numpy.sqrt(i)).astype(numpy.float32),
            (draw.uniform(-1, 1, o) / numpy.sqrt(i)).astype(numpy.float32),
        )
        for i, o in itertools.pairwise(cell.sizes)
    ]
    x = draw.standard_normal((cell.updates * cell.rows, cell.sizes[0])).astype(numpy.float32)
    return weights, x, draw.integers(0, CLASSES, len(x)), draw.permutation(len(x))


def ours(cell: Cell, how: str) -> Callable[[], list[float]]:
    import torch

    import manualprop
    from manualprop import descent, nn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    weights, *examples = data(cell)
    x, t, shuffled = map(torch.from_numpy, examples)
    layers = [(nn.Linear(i, o), nn.Tanh()) for i, o in itertools.pairwise(cell.sizes)]
    model = nn.Sequential(*[layer for each in layers for layer in each][:-1])

    def reset() -> None:
        with torch.no_grad():
            for layer, (W, b) in zip(model[::2], weights, strict=True):
                layer.weight.copy_(torch.from_numpy(W))
                layer.bias.copy_(torch.from_numpy(b))

    plan = descent.MiniBatch(learning_rate=LEARNING_RATE)
    options = {"compile": "epoch"} if how == "epoch" else {}
    step = manualprop.Backprop(model, nn.CrossEntropyLoss(), plan, **options)
    order = [(rows,) for rows in shuffled.split(cell.rows)]

    def run() -> list[float]:
        reset()
        if how == "epoch":
            found: list[float] = step.epoch(x, t, order).losses.tolist()
            return found
        return [step(x[rows], t[rows]) for (rows,) in order]

    return run


def jax_scan(cell: Cell) -> Callable[[], list[float]]:
    import jax
    import jax.numpy as jnp

    weights, x, t, order = data(cell)
    order = order.reshape(cell.updates, cell.rows)

    def loss(layers: Any, x: Any, t: Any) -> Any:
        for W, b in layers[:-1]:
            x = jnp.tanh(x @ W.T + b)
        log_p = jax.nn.log_softmax(x @ layers[-1][0].T + layers[-1][1])
        return -jnp.take_along_axis(log_p, t[:, None], 1).mean()

    def update(layers: Any, rows: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(layers, x[rows], t[rows])
        return jax.tree.map(lambda p, d: p - LEARNING_RATE * d, layers, gradient), value

    x, t = jnp.asarray(x), jnp.asarray(t)
    epoch = jax.jit(lambda layers: jax.lax.scan(update, layers, order)[1])
    return lambda: epoch(weights).tolist()


def work(name: str) -> None:
    """Read a cell or a number of repeats from each line; answer with losses or with a time."""
    run: Callable[[], list[float]] = list
    updates = 1
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            began = time.process_time()
            for _ in range(asked):
                run()
            answer: Any = (time.process_time() - began) / asked / updates
        else:
            cell = Cell(tuple(asked[0]), *asked[1:])
            updates = cell.updates
            began = time.perf_counter()
            run = jax_scan(cell) if name == "jax" else ours(cell, name)
            losses = run()
            answer = [time.perf_counter() - began, losses[0], losses[-1]]
        print(json.dumps(answer), flush=True)


class Worker:
    """A candidate in its own process."""

    def __init__(self, name: str, python: str, home: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(home)}
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        command = [python, __file__, "--work", "step" if name == "before" else name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def workers(jax: str | None, threads: int) -> Iterator[dict[str, Worker]]:
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "before"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(home), BEFORE], check=True)
        try:
            found = {name: Worker(name, sys.executable, ROOT, threads) for name in ("step", "epoch")}
            found["before"] = Worker("before", sys.executable, home, threads)
            if jax:
                found["jax"] = Worker("jax", jax, ROOT, threads)
            yield found
            for worker in found.values():
                worker.process.terminate()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(home)], check=True)


# ----- measuring -----


class Found(NamedTuple):
    """Seconds of an update by candidate in each round, and of making the program."""

    times: dict[str, list[float]]
    made: float

    def ratio(self, of: str, to: str) -> list[float]:
        """Quartiles of the paired ratios."""
        pairs = zip(self.times[of], self.times[to], strict=True)
        ratios = [a / b for a, b in pairs]
        return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def measure(cell: Cell, candidates: dict[str, Worker], rounds: int, seconds: float) -> Found:
    answers = {name: worker.ask(cell) for name, worker in candidates.items()}
    losses = {name: answer[1:] for name, answer in answers.items()}
    for name, found in losses.items():
        if any(abs(a - b) > 1e-3 * abs(b) for a, b in zip(found, losses["step"], strict=True)):
            raise RuntimeError(f"{cell}: {name} has the losses {found}, the step {losses['step']}")
    repeats = {
        name: max(1, round(seconds / max(1e-9, worker.ask(1) * cell.updates)))
        for name, worker in candidates.items()
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in candidates if turn % 2 else reversed(candidates):
            times[name].append(candidates[name].ask(repeats[name]))
    return Found(times, answers["epoch"][0])


# ----- a whole run of the recipe -----


def whole_run(way: str) -> float:
    """Seconds of processor time of a fit with validation and checkpoints: 15 epochs, 19,455 updates."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    sys.path.insert(0, str(ROOT / "recipes" / "digits"))
    from overhead import AutomaticLogged

    import manualprop
    from manualprop.descent import Stochastic
    from manualprop.training import DescentModule, DigitsDataModule, MultilayerPerceptron
    from manualprop.training.cli import quieten

    quieten()
    torch.set_num_threads(1)
    examples = DigitsDataModule()

    class Validated(AutomaticLogged):
        """Lightning's automatic optimisation, which validates as the recipe does."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, target = batch
            self.log("val_loss", self.loss(self.model(x), target))

    module: LightningModule = Validated()
    given: dict[str, Any] = {
        "train_dataloaders": DataLoader(TensorDataset(*examples.train), batch_size=1, shuffle=True),
        "val_dataloaders": DataLoader(TensorDataset(*examples.val), batch_size=200),
    }
    if way == "ours":
        loss, plan = manualprop.nn.CrossEntropyLoss(), Stochastic(learning_rate=0.02)
        module = DescentModule(MultilayerPerceptron(), loss, plan, engine="tape-free")
        given = {"datamodule": examples}
        step = manualprop.Backprop(MultilayerPerceptron(), loss, plan, compile="epoch")
        step.epoch(*examples.train, itertools.islice(plan.updates(1297), 2))  # now its program is on disk
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=15,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(folder, monitor="val_loss", save_last=True)],
        )
        began = time.process_time()
        trainer.fit(module, **given)
        return time.process_time() - began


def measure_whole(rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"automatic": [], "ours": []}
    for _ in range(rounds):
        for way, found in times.items():
            command = [sys.executable, __file__, "--whole", way]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return times


# ----- showing -----

HEADER = ["network", "before, us", "step, us", "program, us", "before / program", "step / program", "target"]


def quartiles(found: list[float]) -> str:
    low, median, high = found
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def row(cell: Cell, found: Found) -> list[str]:
    micro = [f"{1e6 * statistics.median(found.times[name]):.1f}" for name in ("before", "step", "epoch")]
    against = found.ratio("before", "epoch")
    target = f"{cell.before:g}{' !' * (against[1] < cell.before)}"
    cells = [str(cell), *micro, quartiles(against), quartiles(found.ratio("step", "epoch")), target]
    if "jax" not in found.times:
        return [*cells, "", "", ""]
    beside = found.ratio("epoch", "jax")
    allowed = cell.beside_jax
    told = "" if allowed is None else f"{allowed:g}{' !' * (beside[1] > allowed)}"
    return [*cells, f"{1e6 * statistics.median(found.times['jax']):.1f}", quartiles(beside), told]


def whole_text(times: dict[str, list[float]]) -> str:
    ratios = [a / b for a, b in zip(times["automatic"], times["ours"], strict=True)]
    automatic, ours_ = (statistics.median(times[way]) for way in ("automatic", "ours"))
    ratio = statistics.median(ratios)
    return (
        "A whole run of stochastic descent on the digits, 15 epochs with validation and checkpoints, the program on disk: "
        f"{automatic:.1f} s of processor time by Lightning's automatic optimisation, {ours_:.2f} s by the tape-free engine; "
        f"{ratio:.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}), of 25 asked{' !' * (ratio < 25)}."
    )


def section(threads: int, rows: list[list[str]], made: float, whole: str, command: str) -> str:
    import benchmarking

    return "\n\n".join(
        [
            f"## An epoch as one program: {benchmarking.processor()}",
            '`Backprop.epoch` with `compile="epoch"` (program) against today\'s step, against the step of commit '
            f"{BEFORE} (before), and against JAX's `lax.scan`; float32, tanh, cross-entropy and plain gradient descent, examples "
            "in a shuffled order. "
            "Processor time of an update; median and quartiles of paired ratios; each candidate in a process of its own, "
            "in turns. `!` marks a missed target. A network of more than 131,072 weights goes by steps with one row. Making the first "
            f"program took {made:.0f} s with all imports, on this machine.",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table([*HEADER, "JAX, us", "program / JAX", "target"], rows),
            whole,
        ]
    )


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench epoch",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds for each cell (default: 15)")
    parser.add_argument("--jax", metavar="PYTHON", help="a Python with jax and numpy, for its column")
    parser.add_argument("--quick", action="store_true", help="three short rounds, no whole run")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--whole", choices=["automatic", "ours"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    if arguments.work:
        work(arguments.work)
        return 0
    if arguments.whole:
        print(json.dumps(whole_run(arguments.whole)))
        return 0
    import benchmarking
    import torch

    torch.set_num_threads(arguments.threads)
    rounds, seconds = (3, 0.05) if arguments.quick else (arguments.rounds, 0.2)
    rows, made = [], 0.0
    with workers(arguments.jax, arguments.threads) as candidates:
        for i, cell in enumerate(CELLS):
            benchmarking.progress(i, len(CELLS), str(cell))
            found = measure(cell, candidates, rounds, seconds)
            made = made or found.made
            rows.append(row(cell, found))
    benchmarking.progress(len(CELLS), len(CELLS), "whole runs")
    whole = "" if arguments.quick else whole_text(measure_whole(3))
    command = shlex.join(["python3", "scripts/run.py", "bench", "epoch", *argv])
    text = section(arguments.threads, rows, made, whole, command)
    print(text)
    if arguments.write:
        benchmarking.write_section(f"epoch, {arguments.threads} thread{'s' * (arguments.threads > 1)}", text)
        print(f"written to {benchmarking.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
