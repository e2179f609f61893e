"""Train one network on the handwritten digits by batch, stochastic and mini-batch descent, and compare them.

Verifies every layer's gradient first, and refuses to train if one is wrong. Then trains from the three recipes beside
this file, prints one table, and leaves in runs/NAME: descents.png (loss and accuracy over updates and over time),
history.csv and curves.csv (the metrics of every epoch, and within them), checkpoints (the best network of each descent, and the best of all).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    from torch import Tensor, nn

    from manualprop.training.cli import DescentCLI
    from manualprop.training.run_directory import RunDirectory

RECIPES = {"batch": "all (batch)", "stochastic": "1 (stochastic)", "minibatch": "32 (mini-batch)"}
HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status: 0, 1 for a failure, 2 for a mistake, 130 after an interruption."""
    options = _parse(arguments)
    from manualprop.training import UserError
    from manualprop.training.run_directory import RunDirectory

    try:
        run = RunDirectory(options.name)
        run.claim(overwrite=options.overwrite)
        return compare(run, options.seed, options.epochs)
    except UserError as error:
        print(f"descents: {error}", file=sys.stderr)
        return 2
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
    """Verify the network's gradients, train by each descent, report."""
    from manualprop.training.cli import load_recipe
    from manualprop.training.plots import plot_descents

    overrides = [f"--seed={seed}"] + ([f"--trainer.max_epochs={epochs}"] if epochs else [])
    trained: dict[str, dict[str, Any]] = {}
    for recipe in RECIPES:
        job = load_recipe(HERE / f"{recipe}.yaml", [*overrides, f"--name={recipe}"])
        if not trained and not _gradients_are_right(job):
            return 1
        trained[recipe] = _train(job, run.checkpoints / f"{recipe}.ckpt") | {"job": job}
    picture = run.path / "descents.png"
    curves = {RECIPES[recipe]: result["curve"] for recipe, result in trained.items()}
    plot_descents(curves, picture, "Three descents on the UCI handwritten digits")
    _print_table(trained)
    _keep_best(run, trained)
    print(f"curves:       {picture} (numbers: {run.path / 'curves.csv'})\nmetrics:      {run.history}")
    print(f"best network: {run.best} (manualprop test --name {run.name})")
    return 0


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
    checked = ", ".join(worst)
    print(
        f"gradients right against finite differences in float64, first and second order: {checked}; "
        f"worst deviation {max(worst.values()):.0e} ({time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    return True


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
    import copy

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


def _train(job: DescentCLI, checkpoint: Path) -> dict[str, Any]:
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    model, data, trainer = job.model, job.datamodule, cast(Any, job.trainer)
    curve: list[dict[str, float]] = []
    keeper = ModelCheckpoint(
        checkpoint.parent,
        filename=checkpoint.stem,
        monitor="val_loss",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    trainer.callbacks += [keeper, _curve_callback(curve)]
    trainer.fit(model, data)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    rows, last = job.history.rows, job.history.rows[-1]
    return {
        "rows": rows,
        "curve": [*curve, {name: last[name] for name in curve[0]}],
        "updates": last["update"],
        "epochs": last["epoch"],
        "seconds": last["seconds"],
        "train loss": _train_loss(model, data),
        "test accuracy": trainer.test(model, data, verbose=False)[0]["test_accuracy"],
        "checkpoint": checkpoint,
        "val loss": min(row["val_loss"] for row in rows),
    }


def _curve_callback(curve: list[dict[str, float]]) -> Any:
    """Evaluate the network after 0, 1, 2, 3, ... updates, ever more apart: epochs are too coarse for a curve."""
    import torch
    from lightning.pytorch import Callback

    class Curve(Callback):
        due, start = 0, 0.0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            made = trainer.global_step
            if made < self.due:
                return
            self.due = max(made + 1, round(made * 1.15))
            self.start = self.start or time.perf_counter()
            seconds = time.perf_counter() - self.start
            x, target = trainer.datamodule.val
            with torch.no_grad():
                output = pl_module.model.eval()(x)
                loss = float(pl_module.loss(output, target))
            pl_module.model.train()
            accuracy = float((output.argmax(dim=1) == target).float().mean())
            curve.append({"update": made, "seconds": seconds, "val_loss": loss, "val_accuracy": accuracy})

    return Curve()


def _train_loss(model: Any, data: Any) -> float:
    import torch

    x, target = data.train
    with torch.no_grad():
        return float(model.loss(model.eval()(x), target))


def _keep_best(run: RunDirectory, trained: dict[str, dict[str, Any]]) -> None:
    """Keep the metrics of all, and the best network with the configuration that `manualprop test` needs."""
    from manualprop.training.callbacks import write_csv

    for path, kind in ((run.history, "rows"), (run.path / "curves.csv", "curve")):
        write_csv(path, [{"descent": r} | row for r, result in trained.items() for row in result[kind]])
    best = min(trained.values(), key=lambda result: float(result["val loss"]))
    shutil.copyfile(best["checkpoint"], run.best)
    config = best["job"].config.clone()
    config.pop("config", None)
    best["job"].parser.save(config, run.config, overwrite=True, skip_validation=True, skip_unset=False)


def _print_table(trained: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {
        "updates": ",.0f",
        "epochs": ".0f",
        "seconds": ".1f",
        "train loss": ".4f",
        "test accuracy": ".2%",
    }
    table = Table(
        caption="Loss and accuracy of the weights with the lowest validation loss.", caption_justify="left"
    )
    table.add_column("descent")
    for column in columns:
        table.add_column(column, justify="right")
    for recipe, result in trained.items():
        table.add_row(recipe, *(format(result[column], form) for column, form in columns.items()))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
