"""Train one network on the handwritten digits by batch, stochastic and mini-batch descent, and compare them.

Verifies every layer's gradient first, and refuses to train if one is wrong. Then trains from the three recipes beside
this file, each without a tape and once more through autograd, and refuses to report if the two do not end at the same
weights. Measures what an update costs by each engine, the two in turn. Prints one table, and leaves in runs/NAME:
descents.png (loss and accuracy over updates and over time), history.csv and curves.csv (the metrics of every epoch, and
within them, by both engines), checkpoints (the best network of each descent, and the best of all).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    from torch import Tensor, nn

    from manualprop.training.cli import DescentCLI
    from manualprop.training.run_directory import RunDirectory

RECIPES = {"batch": "all (batch)", "stochastic": "1 (stochastic)", "minibatch": "32 (mini-batch)"}
ENGINES = ("tape-free", "autograd")
ROUNDS, SLICE = 9, 0.05  # of timing: rounds, and seconds by each engine in a round
WARM = 10  # updates before
HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status: 0, 1 for a failure, 2 for a mistake, 130 after an interruption."""
    options = _parse(arguments)
    from manualprop.training import UserError
    from manualprop.training.run_directory import RunDirectory

    try:
        run = RunDirectory(options.name)
        run.claim(overwrite=options.overwrite, resumable=False)
        try:
            return compare(run, options.seed, options.epochs)
        finally:
            run.release()
    except UserError as error:
        print(f"descents: {error}", file=sys.stderr)
        return error.status
    except (KeyboardInterrupt, SystemExit) as stop:
        if not isinstance(stop.__context__ or stop, KeyboardInterrupt):  # Lightning turns one into the other
            raise
        print("descents: interrupted. Start again with --overwrite.", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="descents", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial weights and the order (default: 0)"
    )
    parser.add_argument("--name", default="digits", help="results lie in runs/NAME (default: digits)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train N epochs with every descent, instead of its recipe's number",
    )
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs must be at least 1. Got {options.epochs}.")
    return options


def compare(run: RunDirectory, seed: int, epochs: int | None) -> int:
    """Verify the network's gradients, train by each descent and engine, compare, report."""
    overrides = [f"--seed={seed}"] + ([f"--trainer.max_epochs={epochs}"] if epochs else [])
    trained: dict[str, dict[str, Any]] = {}
    for recipe in RECIPES:
        words = [*overrides, f"--name={recipe}"]
        if not trained and not _gradients_are_right(_job(recipe, "autograd", words)):
            return 1
        if not trained:
            _warm_up(words)
            run.begin()
        trained[recipe] = _train_by_both(run, recipe, words)
    if not _engines_agree(trained):
        return 1
    for recipe, result in trained.items():
        with _showing(f"timing the updates of {recipe}"):
            result |= time_updates(result["job"])
    _report(run, trained)
    return 0


def _report(run: RunDirectory, trained: dict[str, dict[str, Any]]) -> None:
    from manualprop._invocation import console_command, shown
    from manualprop.training.plots import plot_descents

    picture = run.path / "descents.png"
    curves, compared = (
        {RECIPES[recipe]: result["curve"][engine] for recipe, result in trained.items()} for engine in ENGINES
    )
    plot_descents(curves, picture, "Three descents on the UCI handwritten digits", compared)
    _print_table(trained)
    _keep_best(run, trained)
    for title, path in (
        ("picture", picture),
        ("curves", run.path / "curves.csv"),
        ("metrics", run.history),
        ("best network", run.best),
    ):
        print(f"{title + ':':<14}{shown(path)}")
    print(f"to test it:   {console_command()} test --name {run.name}")


# --- verification ---------------------------------------------------------------------------------------------------


def _gradients_are_right(job: DescentCLI) -> bool:
    start = time.perf_counter()
    module: Any = job.model
    data: Any = job.datamodule
    rows = slice(0, 2)
    try:
        worst = verify(module.model, module.loss, data.train[0][rows], data.train[1][rows])
    except GradientError as error:
        print(f"descents: refusing to train. {error}", file=sys.stderr)
        return False
    print(
        f"gradients right, first and second order ({time.perf_counter() - start:.0f} s):\n"
        f"  {', '.join(worst)}\n"
        f"  largest deviation from finite differences in float64: {max(worst.values()):.0e}",
        flush=True,
    )
    return True


@contextmanager
def _showing(what: str) -> Iterator[None]:
    """Say on stderr what is being done: on a terminal with a clock that runs, elsewhere in a line."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what)
        yield


class GradientError(Exception):
    """A layer's gradient differs from finite differences; the text names the layer."""


def verify(network: nn.Module, loss: nn.Module, x: Tensor, target: Tensor) -> dict[str, float]:
    """Check each layer of a sequential network, and the loss, on the data as they arrive there.

    Args:
        network: whose children run one after the other; a float64 copy is checked.
        loss: called on (output, target).
        x: a few inputs.
        target: theirs.

    Returns:
        The largest relative deviation of a directional derivative, by layer.
    """
    import torch

    network, h = copy.deepcopy(network).double().eval(), x.double()
    worst = {}
    for name, layer in network.named_children():
        parameters = {key: value.detach() for key, value in layer.named_parameters()}
        names = list(parameters)

        def apply(h: Tensor, *values: Tensor, layer: nn.Module = layer, names: list[str] = names) -> Tensor:
            output = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (h,))
            assert isinstance(output, torch.Tensor)
            return output

        label = f"{name} {type(layer).__name__}"
        worst[label] = check(label, apply, [h, *parameters.values()])
        h = layer(h).detach()
    loss = copy.deepcopy(loss).double()
    label = f"loss {type(loss).__name__}"
    worst[label] = check(label, lambda output: loss(output, target), [h])
    return worst


def check(label: str, function: Callable[..., Tensor], at: list[Tensor]) -> float:
    """Refuse a function whose gradient, or gradient of the gradient, is not that of its values.

    Args:
        label: names it in the error.
        function: of the tensors.
        at: float64 tensors.

    Returns:
        The relative deviation along a random direction.
    """
    from torch.autograd import gradcheck, gradgradcheck

    inputs = [value.clone().requires_grad_() for value in at]
    for order, checker in (("gradient", gradcheck), ("second derivative", gradgradcheck)):
        try:
            with _showing(f"checking the {order} of {label} against finite differences"):
                checker(function, inputs, rtol=1e-6, atol=1e-7)
        except RuntimeError as error:
            raise GradientError(f"The {order} of {label} is not that of its values. {error}") from error
    return _directional_deviation(function, inputs)


def _directional_deviation(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs]
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    gradients = torch.autograd.grad(output, inputs, weights)
    exact = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def along(step: float) -> Tensor:
        moved = [t.detach() + step * d for t, d in zip(inputs, directions, strict=True)]
        return (function(*moved) * weights).sum()

    def slope(step: float) -> Tensor:
        return (along(step) - along(-step)) / (2 * step)

    numeric = (
        4 * slope(1e-3) - slope(2e-3)
    ) / 3  # Richardson: the error falls with the fourth power of the step
    return float((exact - numeric).abs() / max(1.0, float(numeric.abs())))


# --- training -------------------------------------------------------------------------------------------------------


def _job(recipe: str, engine: str, words: Sequence[str]) -> DescentCLI:
    from manualprop.training.cli import load_recipe

    return load_recipe(HERE / f"{recipe}.yaml", [*words, f"--model.engine={engine}"])


def _warm_up(words: Sequence[str]) -> None:
    """Load, outside of what is timed, everything that torch and Lightning load when they first train."""
    for engine in ("tape-free", "autograd"):
        short = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
        job = _job("minibatch", engine, [*words, *short])
        job.trainer.fit(job.model, job.datamodule)


def _train_by_both(run: RunDirectory, recipe: str, words: Sequence[str]) -> dict[str, Any]:
    """Train without a tape, then again through autograd with everything else the same, and keep the former."""
    job, checkpoint = _job(recipe, "tape-free", words), run.checkpoints / f"{recipe}.ckpt"
    ours = _train(job, checkpoint)
    with tempfile.TemporaryDirectory(dir=run.path) as folder:
        job_by_autograd = _job(recipe, "autograd", [*words, f"--name={recipe}-autograd"])
        theirs = _train(job_by_autograd, Path(folder) / checkpoint.name)
    return {
        **ours,
        **_evaluate(job, checkpoint),
        **{kind: dict(zip(ENGINES, (ours[kind], theirs[kind]), strict=True)) for kind in ("rows", "curve")},
        "job": job,
        "checkpoint": checkpoint,
        "difference": _largest_difference(ours["weights"], theirs["weights"]),
    }


def _train(job: DescentCLI, checkpoint: Path) -> dict[str, Any]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    model, trainer = cast(Any, job.model), cast(Any, job.trainer)
    keeper = ModelCheckpoint(
        checkpoint.parent,
        filename=checkpoint.stem,
        monitor="val_loss",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer.callbacks.append(keeper)
    curve = Curve(job)
    model.observers.append(curve)
    trainer.fit(model, job.datamodule)
    last = job.history.rows[-1]
    return {
        "rows": job.history.rows,
        "curve": [*curve.rows, {name: last[name] for name in curve.rows[0]}],
        "updates": last["update"],
        "epochs": last["epoch"],
        "seconds": last["seconds"],
        "weights": {name: value.detach().clone() for name, value in model.model.named_parameters()},
    }


def _evaluate(job: DescentCLI, checkpoint: Path) -> dict[str, float]:
    """Evaluate the weights with the lowest validation loss."""
    import torch

    model, data, trainer = job.model, job.datamodule, cast(Any, job.trainer)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    return {
        "train loss": _train_loss(model, data),
        "test accuracy": trainer.test(model, data, verbose=False)[0]["test_accuracy"],
        "val loss": min(row["val_loss"] for row in job.history.rows),
    }


class Curve:
    """Evaluates the network after 0, 1, 2, 3, ... updates, ever more apart: epochs are too coarse for a curve.

    Args:
        job: whose network, data and trainer; called before every update.
    """

    def __init__(self, job: DescentCLI) -> None:
        self.trainer, self.module, self.data = cast(tuple[Any, ...], (job.trainer, job.model, job.datamodule))
        self.rows: list[dict[str, float]] = []
        self.due, self.start = 0, 0.0

    def __call__(self) -> None:
        """Evaluate, where that is due."""
        made = self.trainer.global_step
        if made < self.due:
            return
        self.due = max(made + 1, round(made * 1.15))
        self.start = self.start or time.perf_counter()
        seconds = time.perf_counter() - self.start
        self.rows.append({"update": made, "seconds": seconds} | self._evaluate())

    def _evaluate(self) -> dict[str, float]:
        import torch

        x, target = self.data.val
        with torch.no_grad():
            output = self.module.model.eval()(x)
            loss = float(self.module.loss(output, target))
        self.module.model.train()
        return {"val_loss": loss, "val_accuracy": float((output.argmax(dim=1) == target).float().mean())}


# --- the two engines --------------------------------------------------------------------------------------------------


def _largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of two weights, relative to the largest weight of the layer."""
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def rounding(updates: float) -> float:
    """Return the relative difference that float32 explains between two runs that compute the same.

    Each update rounds every weight to one part in 2^23. Over N updates the roundings of both runs, independent of each
    other, add up like the 2 N steps of a random walk: sqrt(2 N) roundings. Four times that is far out for a random walk,
    and far below what a wrong step does: a learning rate that is 0.1 % off is found after one epoch of any descent.

    Args:
        updates: N.
    """
    return float(4 * math.sqrt(2 * updates) * 2.0**-23)


def _engines_agree(trained: dict[str, dict[str, Any]]) -> bool:
    for recipe, result in trained.items():
        limit = rounding(result["updates"])
        if not result["difference"] <= limit:
            print(
                f"descents: refusing to report. After {result['updates']:,.0f} updates of {recipe}, the weights trained "
                f"without a tape differ from those by autograd by {result['difference']:.1e}, relative to the largest of "
                f"their layer; rounding explains {limit:.1e}.",
                file=sys.stderr,
            )
            return False
    recipe, worst = max(trained.items(), key=lambda item: float(item[1]["difference"]))
    print(
        "same final weights without a tape and by autograd, to float32 rounding:\n"
        f"  largest relative difference {worst['difference']:.0e} ({recipe}, {worst['updates']:,.0f} updates;\n"
        f"  rounding explains {rounding(worst['updates']):.0e})"
    )
    return True


# --- the cost of an update --------------------------------------------------------------------------------------------


def time_updates(job: DescentCLI) -> dict[str, float]:
    """Time the updates of a recipe by both engines, in turn, without Lightning, validation and checkpoints.

    Args:
        job: of the recipe.

    Returns:
        The median over the rounds, in microseconds, by each engine, and of their ratio within a round.
    """
    module, data = cast(tuple[Any, ...], (job.model, job.datamodule))
    x, target = data.train
    pieces = [[(x[rows], target[rows]) for rows in update] for update in module.descent.updates(len(x))]
    updates = [_updates(module, pieces, engine) for engine in ENGINES]
    for made in updates:
        _microseconds(made, WARM)
    counts = [max(1, round(SLICE / (1e-6 * _microseconds(made, WARM)))) for made in updates]
    rounds = []
    for turn in range(ROUNDS):
        times = {k: _microseconds(updates[k], counts[k]) for k in ((0, 1) if turn % 2 else (1, 0))}
        rounds.append((times[0], times[1]))
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "tape-free (us)": ours,
        "autograd (us)": theirs,
        "ratio": statistics.median(b / a for a, b in rounds),
    }


def _updates(module: Any, pieces: list[list[tuple[Tensor, Tensor]]], engine: str) -> Iterator[float]:
    """One update after the other, on a copy of the network, over and over the same epoch."""
    import torch

    from manualprop import Backprop
    from manualprop.descent import gradient

    model, loss, descent = copy.deepcopy(module.model), module.loss, module.descent
    if engine == "tape-free":
        step = Backprop(model, loss, descent)
        whole = [tuple(torch.cat(column) for column in zip(*update, strict=True)) for update in pieces]
        for x, target in itertools.cycle(whole):
            yield step(x, target)
    optimizer = descent.make_optimizer(model.parameters())
    for update in itertools.cycle(pieces):
        optimizer.zero_grad()
        value = gradient(model, loss, update)
        descent.clip_gradients(model.parameters())
        optimizer.step()
        yield value


def _microseconds(updates: Iterator[float], count: int) -> float:
    import torch

    # With one thread its own processor time, which other programs disturb less than the time on the wall.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in itertools.islice(updates, count):
        pass
    return 1e6 * (clock() - start) / count


# --- the report -------------------------------------------------------------------------------------------------------


def _train_loss(model: Any, data: Any) -> float:
    import torch

    x, target = data.train
    with torch.no_grad():
        return float(model.loss(model.eval()(x), target))


def _keep_best(run: RunDirectory, trained: dict[str, dict[str, Any]]) -> None:
    """Keep the metrics of all, and the best network with the configuration that `manualprop test` needs."""
    from manualprop.training._files import write_whole
    from manualprop.training.callbacks import write_csv

    for path, kind in ((run.history, "rows"), (run.path / "curves.csv", "curve")):
        write_csv(
            path,
            [
                {"descent": recipe, "engine": engine} | row
                for recipe, result in trained.items()
                for engine, rows in result[kind].items()
                for row in rows
            ],
        )
    best = min(trained.values(), key=lambda result: float(result["val loss"]))
    write_whole(run.best, best["checkpoint"].read_bytes())
    config = best["job"].config.clone()
    config.pop("config", None)
    best["job"].parser.save(config, run.config, overwrite=True, skip_validation=True, skip_unset=False)


def _print_table(trained: dict[str, dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAVY
    from rich.console import Console
    from rich.table import Table

    columns = {
        "updates": ",.0f",
        "seconds": ".1f",
        "train loss": ".4f",
        "test accuracy": ".2%",
        "tape-free (us)": ",.0f",
        "autograd (us)": ",.0f",
        "ratio": ".1f",
    }
    caption = (
        "Seconds of the whole run without a tape, with validation and a\n"
        "checkpoint after every epoch. Loss and accuracy of the weights with\n"
        "the lowest validation loss. Microseconds of one update by itself: the\n"
        f"two take turns; median of {ROUNDS} rounds, and of their ratio."
    )
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAVY, collapse_padding=True)
    table.add_column("descent")
    for column in columns:
        table.add_column(column.replace(" ", "\n"), justify="right")
    for recipe, result in trained.items():
        table.add_row(recipe, *(format(result[column], form) for column, form in columns.items()))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
