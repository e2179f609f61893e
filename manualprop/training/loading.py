"""Loads the trained objects of a run, or the digits recipe, for commands that show them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from manualprop.descent import Descent, MiniBatch
from manualprop.nn import CrossEntropyLoss
from manualprop.training import digits as data
from manualprop.training._errors import InputValueError
from manualprop.training.networks import MultilayerPerceptron

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


class Loaded(NamedTuple):
    """The trained objects.

    - ``model``    the model, with its ``loss`` and its ``descent``.
    - ``seed``     seed of the order of the examples.
    - ``x``        inputs of the training examples; ``target`` are their targets.
    - ``title``    a description in words.
    - ``history``  a row for each epoch; empty if nothing was trained.
    - ``image``    height and width if an input is an image, else None.
    """

    model: Module
    loss: Module
    descent: Descent
    seed: int
    x: Tensor
    target: Tensor
    title: str
    history: list[dict[str, float]]
    image: tuple[int, int] | None


def digits() -> Loaded:
    """Return the network of recipes/digits/minibatch.yaml before its first update."""
    torch.manual_seed(0)
    model = MultilayerPerceptron((64, 64, 10), "Tanh")
    descent = MiniBatch(batch_size=32, learning_rate=0.1, momentum=0.9)
    (x, label), *_ = data.parts()
    return Loaded(
        model, CrossEntropyLoss(), descent, 0, x, label, "The digits recipe, untrained", [], data.IMAGE
    )


def run(name: str, checkpoint: str = "best") -> Loaded:
    """Return the objects of a run, with the weights of a checkpoint.

    Args:
        name: the name of the run: its results are in runs/NAME.
        checkpoint: "best", "last", or a path.

    Raises:
        ValueError: if the run or the checkpoint does not exist, or the run did not train a `DescentModule`.
    """
    from manualprop.training.cli import load_recipe  # Lightning: only where a run is read
    from manualprop.training.module import DescentModule
    from manualprop.training.run_directory import RunDirectory

    folder = RunDirectory(name)
    path = {"best": folder.best, "last": folder.last}.get(checkpoint, Path(checkpoint))
    for file, what in ((folder.config, "the configuration of a run"), (path, "a checkpoint")):
        if not file.is_file():
            raise InputValueError(
                f"There must be {what}. {file} does not exist; give the --name of a run that has been trained, and "
                "best, last or the path of a checkpoint as --checkpoint."
            )
    objects = load_recipe(folder.config)
    module = objects.model
    if not isinstance(module, DescentModule):
        raise InputValueError(
            f"The run must be one of a DescentModule. {folder.config} names {type(module).__name__}; call "
            "manualprop.explain on its model in Python."
        )
    updates = objects.load(module, path).get("global_step", 0)
    x, target = _examples(objects.datamodule)
    title = f"Run {name}, {path.name} after {updates} updates"
    return Loaded(
        module.model, module.loss, module.descent, module.seed, x, target, title,
        list(_rows(folder.history)), getattr(objects.datamodule, "image", None),
    )  # fmt: skip


def _examples(module: LightningDataModule) -> tuple[Tensor, Tensor]:
    """The training examples; for a data module that is not ours, the first batch."""
    from manualprop.training.datamodules import TensorDataModule

    if isinstance(module, TensorDataModule):
        return module.train
    module.prepare_data()
    module.setup("fit")
    loader: Any = module.train_dataloader()
    x, target = next(iter(loader))
    return x, target


def _rows(path: Path) -> Iterator[dict[str, float]]:
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield {name: float(value) for name, value in row.items() if value}
