"""What one update of stochastic descent costs under Lightning: automatic optimisation, and the two engines.

Four ways to make the same 1,297 single-example updates of an epoch on the handwritten digits (64-64-10, tanh), in turn,
several times over. Lightning's automatic optimisation trains torch.nn, without progress bar or checkpoints, from examples
cut beforehand: once with nothing logged at all, and once with the mean loss and accuracy of the epoch, which both engines
log. "bare" is the tape-free step in a plain loop, without Lightning. Start-up and validation are left out everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import manualprop
from manualprop.descent import Stochastic
from manualprop.training import DescentModule, DigitsDataModule, MultilayerPerceptron, TensorDataModule
from manualprop.training.cli import quieten
from manualprop.training.datamodules import Rows

LEARNING_RATE = 0.02


class Automatic(LightningModule):
    """The same network of torch.nn, trained as Lightning's introduction does it, with nothing logged."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one example."""
        x, target = batch
        loss: Tensor = self.loss(self.model(x), target)
        return loss

    def configure_optimizers(self) -> Any:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class AutomaticLogged(Automatic):
    """The same, with the mean loss and accuracy of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one example, and log."""
        x, target = batch
        output = self.model(x)
        loss: Tensor = self.loss(output, target)
        self.accuracy(output, target)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss


class Clock(Callback):
    """Times an epoch from its first batch to its last."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start


def measure(rounds: int = 5) -> list[dict[str, float]]:
    """Return the microseconds of an update, by way, in each round: all ways take turns, one thread.

    Args:
        rounds: epochs by each way, at least 1; one more, which is not counted, goes ahead.
    """
    quieten()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, target = DigitsDataModule().train
    ways: dict[str, Callable[[], float]] = {
        "automatic": lambda: _fit(Automatic(), Rows((x, target), 1)),
        "logged": lambda: _fit(AutomaticLogged(), Rows((x, target), 1)),
        "autograd": lambda: _fit(_module("autograd"), TensorDataModule((x, target))),
        "tape-free": lambda: _fit(_module("tape-free"), TensorDataModule((x, target))),
        "bare": lambda: _bare(x, target),
    }
    found = [{name: 1e6 * way() / len(x) for name, way in ways.items()} for _ in range(rounds + 1)][1:]
    torch.set_num_threads(threads)
    return found


def ratio(found: list[dict[str, float]], way: str, other: str) -> float:
    """Return the median over the rounds of what one way takes, relative to another in the same round.

    Args:
        found: by `measure`.
        way: of which the ratio is.
        other: to which it is.
    """
    return statistics.median(times[way] / times[other] for times in found)


def _module(engine: Any) -> DescentModule:
    descent = Stochastic(learning_rate=LEARNING_RATE)
    return DescentModule(MultilayerPerceptron(), manualprop.nn.CrossEntropyLoss(), descent, engine=engine)


def _fit(module: LightningModule, data: Any) -> float:
    clock = Clock()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: Any = quiet | {"enable_checkpointing": False, "accelerator": "cpu", "limit_val_batches": 0}
    Trainer(max_epochs=1, callbacks=[clock], **options).fit(module, data)
    return clock.seconds


def _bare(x: Tensor, target: Tensor) -> float:
    descent = Stochastic(learning_rate=LEARNING_RATE)
    step = manualprop.Backprop(MultilayerPerceptron(), manualprop.nn.CrossEntropyLoss(), descent)
    order = torch.cat([rows for pieces in descent.updates(len(x)) for rows in pieces])
    start = time.perf_counter()
    pairs = zip(torch.split(x[order], 1), torch.split(target[order], 1), strict=True)
    for one, its_target in pairs:
        step(one, its_target)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="overhead", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=5, help="epochs by each way, at least 1 (default: 5); the median counts"
    )
    rounds = parser.parse_args(arguments).rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1. Got {rounds}.")
    found = measure(rounds)
    labels = {
        "automatic": "Lightning, automatic, torch.nn, nothing logged",
        "logged": "Lightning, automatic, torch.nn, metrics logged",
        "autograd": "Lightning, DescentModule(engine='autograd')",
        "tape-free": "Lightning, DescentModule(engine='tape-free')",
        "bare": "Backprop in a plain loop",
    }
    print(f"{'medians of ' + str(rounds) + ' rounds':<47}{'us an update':>14}{'x bare':>9}")
    for name, label in labels.items():
        microseconds = statistics.median(times[name] for times in found)
        print(f"{label:<47}{microseconds:14.1f}{ratio(found, name, 'bare'):9.2f}")
    lean, logged = (ratio(found, name, "tape-free") for name in ("automatic", "logged"))
    print(f"automatic / tape-free: {lean:.1f} with nothing logged, {logged:.1f} with metrics")
    return 0


if __name__ == "__main__":
    sys.exit(main())
