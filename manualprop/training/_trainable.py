"""The base of `DescentModule`: all that the engines, the data modules and the checkpoints need from it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from manualprop._splitting import check_splittable, is_sum
from manualprop.descent import Batch, Descent, Stochastic
from manualprop.training._errors import InputTypeError

EngineName = Literal["tape-free", "autograd", "auto"]


class Trainable(LightningModule):
    """A model, a loss and a descent, and the progress of their training.

    Args:
        model: called on the inputs.
        loss: called on (output, target); returns one number.
        descent: decides which examples an update sees, and makes the update.
        seed: the seed of the order of the examples.
        engine: what makes an update: "tape-free", "autograd" or "auto".

    Attributes:
        epochs_made: the number of complete epochs trained.
        rows_before: rows of the current epoch that an interrupted run has already used.

    Raises:
        TypeError: if model, loss or descent has the wrong type, or if the descent must split a loss that
            cannot be split exactly.
        ValueError: for a model or a loss that the descent cannot train as its formula says.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, descent: Descent, seed: int, engine: EngineName
    ) -> None:
        super().__init__()
        _check_types(model, loss, descent)
        self.model, self.loss, self.descent, self.seed = model, loss, descent, int(seed)
        self.engine = _engine_name(engine)
        _check_loss(model, loss, descent)
        self.rows_before = self.epochs_made = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        output = self.model(x)
        if not isinstance(output, Tensor):
            raise InputTypeError(
                f"DescentModule: the model must return one tensor. Got {type(output).__name__}; wrap it in a module that "
                "returns the tensor to compare with the target."
            )
        return output

    @property
    def learning_rate(self) -> float:
        """The step size; `Tuner.lr_find` sets it."""
        if self.descent.learning_rate is not None:
            return self.descent.learning_rate
        return float(self.descent.make_optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        if self.descent.optimizer is None:
            self.descent = dataclasses.replace(self.descent, learning_rate=rate)
        else:
            optimizer: Any = self.descent.optimizer
            self.descent = dataclasses.replace(self.descent, optimizer=functools.partial(optimizer, lr=rate))


def _engine_name(engine: str) -> str:
    if engine not in get_args(EngineName):
        raise ValueError(
            f"DescentModule: engine must be one of {', '.join(map(repr, get_args(EngineName)))}. Got engine={engine!r}."
        )
    return engine


def _check_types(model: Any, loss: Any, descent: Any) -> None:
    wanted: dict[str, tuple[Any, type, str]] = {
        "model": (model, nn.Module, "a module"),
        "loss": (loss, nn.Module, "a module"),
        "descent": (descent, Descent, "a descent of manualprop.descent"),
    }
    for name, (value, kind, what) in wanted.items():
        if not isinstance(value, kind):
            got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
            example = (
                "MiniBatch(learning_rate=0.1)" if name == "descent" else "manualprop.nn.CrossEntropyLoss()"
            )
            raise InputTypeError(
                f"DescentModule: {name} must be {what}. Got {got}; give one, such as {example}."
            )


def _check_loss(model: nn.Module, loss: nn.Module, descent: Descent) -> None:
    if isinstance(descent, Batch) and descent.micro_batch_size is not None:
        check_splittable(loss, model)
    if getattr(loss, "reduction", None) == "none":
        raise ValueError(
            "DescentModule: the loss must be one number. Got reduction='none'; use 'mean' or 'sum'."
        )
    weighted = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and loss.weight is not None
    if isinstance(descent, Stochastic) and weighted and not is_sum(loss):
        raise ValueError(
            "Stochastic: class weights cancel in the mean over one example, so they would have no effect. Got a loss "
            "with weight and reduction='mean'; use reduction='sum', which is the weighted loss of that example."
        )
