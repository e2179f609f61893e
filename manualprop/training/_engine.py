"""The two engines of a `DescentModule`: they run forward pass, backward pass and update.

Both train the same weights with the same torch optimizer and its state, and both count every update where Lightning
counts `optimizer.step()`. So a run may change engines whenever it is resumed.
"""

from __future__ import annotations

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from manualprop._backprop import WAY_OUT, Backprop, NotFinite, has_compiler
from manualprop._splitting import sum_and_denominator
from manualprop.descent import Stochastic
from manualprop.training._checks import untouched
from manualprop.training._trainable import Trainable
from manualprop.training.datamodules import TrainingRows

Finite = Callable[[float, Tensor, Tensor], float]

# When a program pays, in seconds, as `scripts/run.py bench epoch` measures it on a network 64-64-10: what it saves in
# an update of one example, what it costs to trace and load it, and to compile it, with a margin.
SAVED, LOADING, COMPILING = 12e-6, 0.2, 20.0

# Hooks that Lightning calls around autograd and optimizer.step(); a folded update calls neither.
_CALLBACK_HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
_MODULE_HOOKS = (*_CALLBACK_HOOKS, "backward", "optimizer_step", "optimizer_zero_grad")


class Engine(ABC):
    """Makes the updates of a module in training.

    Args:
        module: the module in training; its optimizer has the state to continue from.
        finite: returns the loss of some inputs and targets, and raises if it is not finite.
    """

    def __init__(self, module: Trainable, finite: Finite) -> None:
        self.module, self.finite = module, finite

    @abstractmethod
    def update(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Make one update from all its examples; return the loss before it and the output."""

    def updates(self, x: Tensor, target: Tensor, size: int, most: int | None) -> tuple[list[float], Tensor]:
        """Make updates of `size` examples each, `most` at most; return their losses and outputs, see `update`."""
        pairs = zip(x.split(size), target.split(size), strict=True)
        losses, outputs = zip(*self._made_from(itertools.islice(pairs, most)), strict=True)
        return list(losses), torch.cat(outputs)

    def _made_from(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[float, Tensor]]:
        return [self.update(x, target) for x, target in pairs]

    @abstractmethod
    def add(self, x: Tensor, target: Tensor) -> tuple[float, float, Tensor]:
        """Add the gradient of a piece's summed loss to every .grad; return that sum, its divisor and the output."""

    def step(self) -> None:
        """Make the update from the gradients in .grad."""
        self.module.descent.clip_gradients(self.module.parameters())
        self.optimizer().step()

    def optimizer(self) -> LightningOptimizer:
        """Return the optimizer in Lightning's wrapper, which counts its steps."""
        optimizer = self.module.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer


class Autograd(Engine):
    """torch's way, for every model, loss, precision and strategy: a tape, `.grad`, `optimizer.step()`."""

    def update(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Make one update; see `Engine.update`."""
        self.optimizer().zero_grad()
        output: Tensor = self.module(x)
        loss = self.module.loss(output, target)
        value = self.finite(loss.item(), x, target)
        self.module.manual_backward(loss)
        self.step()
        return value, output.detach()

    def add(self, x: Tensor, target: Tensor) -> tuple[float, float, Tensor]:
        """Add the gradient of a piece; see `Engine.add`."""
        output: Tensor = self.module(x)
        total, divisor = sum_and_denominator(self.module.loss, output, target)
        value = self.finite(total.item(), x, target)
        self.module.manual_backward(total)
        return value, divisor, output.detach()


class TapeFree(Engine):
    """The tape-free step of :class:`manualprop.Backprop`; if possible, the update is folded into it."""

    def __init__(self, module: Trainable, finite: Finite) -> None:
        super().__init__(module, finite)
        self.backprop = self._backprop(module.loss)
        self._summed: Backprop | None = None
        self._programs: Backprop | None = None
        self._made = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress

    def _backprop(self, loss: torch.nn.Module, compile: bool | Literal["epoch"] = False) -> Backprop:
        optimizer: Any = self.module.optimizers(use_pl_optimizer=False)
        return Backprop(self.module.model, loss, self.module.descent, optimizer=optimizer, compile=compile)

    def choose_program(self, x: Tensor, target: Tensor, again: bool) -> bool:
        """Decide whether the updates of a portion are one program, where a portion has many; say so.

        Args:
            x: the inputs of an update.
            target: their targets.
            again: whether the run that this one continues did so: then its updates are the same to the last bit.

        Returns:
            Whether they are.
        """
        saved = self._updates_to_come() * SAVED
        if not isinstance(self.module.descent, Stochastic) or not (again or saved > LOADING):
            return False
        try:
            programs = self._backprop(self.module.loss, compile="epoch")
            kept = programs.has_program(x, target)
        except (TypeError, ValueError, RuntimeError, IndexError):  # no program can be made; a step says why
            return False
        if not kept and not (has_compiler() and (again or saved > COMPILING)):
            return False
        source = "from disk" if kept else "compiled now, in about ten seconds, and kept on disk"
        rank_zero_info(f"engine: tape-free, the updates of a portion as one program ({source})")
        try:
            programs.prepare_program(x, target)
        except RuntimeError as error:  # a compiler that fails must not end a run that can do without
            rank_zero_info(f"engine: tape-free, the updates one by one, because {shortened(error)}.")
            return False
        self._programs = programs
        return True

    def _updates_to_come(self) -> float:
        """The number of updates that the run has left, at most."""
        trainer = self.module.trainer
        limits = [math.inf]
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps - trainer.global_step)
        if trainer.max_epochs not in (None, -1) and isinstance(trainer.train_dataloader, TrainingRows):
            limits.append((trainer.max_epochs - trainer.current_epoch) * len(trainer.train_dataloader.x))
        return min(limits)

    def updates(self, x: Tensor, target: Tensor, size: int, most: int | None) -> tuple[list[float], Tensor]:
        """Make many updates and count them together; see `Engine.updates`."""
        if self._programs is None:
            return super().updates(x, target, size, most)
        order = [(rows,) for rows in torch.arange(len(x)).split(size)[:most]]
        try:
            losses, outputs = self._programs.epoch(x, target, order)
        except NotFinite as error:
            self._made.increment_by(error.made)
            (rows,) = order[error.made]
            self.finite(error.loss, x[rows], target[rows])
            raise
        self._made.increment_by(len(losses))
        return losses.tolist(), outputs

    def update(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Make one update; see `Engine.update`."""
        try:
            loss = self.backprop(x, target)
        except NotFinite as error:
            self.finite(error.loss, x, target)
            raise
        # LightningOptimizer.step does this too, but a folded update does not call it.
        self._made.increment_by(1)
        return loss, self.backprop.output

    def _made_from(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[float, Tensor]]:
        made: list[tuple[float, Tensor]] = []
        backprop = self.backprop
        for x, target in pairs:
            try:
                made.append((backprop(x, target), backprop.output))
            except NotFinite as error:
                self._made.increment_by(len(made))
                self.finite(error.loss, x, target)
                raise
        self._made.increment_by(len(made))
        return made

    def add(self, x: Tensor, target: Tensor) -> tuple[float, float, Tensor]:
        """Add the gradient of a piece; see `Engine.add`."""
        if self._summed is None:
            loss: Any = copy.copy(self.module.loss)
            loss.reduction = "sum"
            self._summed = self._backprop(loss)
        try:
            gradients = self._summed.gradients(x, target)
        except NotFinite as error:
            self.finite(error.loss, x, target)
            raise
        for name, gradient in gradients.items():
            parameter = self.module.model.get_parameter(name)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        output = self._summed.output
        with torch.no_grad():
            total, divisor = sum_and_denominator(self.module.loss, output, target)
        return total.item(), divisor, output

    def rehearse(self, x: Tensor, target: Tensor) -> None:
        """Run forwards and backwards without a trace: some layers raise only when they get an input.

        Args:
            x: the inputs of an update.
            target: their targets.

        Raises:
            TypeError: if the engine refuses a layer.
        """
        try:
            with untouched(self.module.model, x):
                self.backprop.gradients(x, target)
        except (ValueError, RuntimeError, ArithmeticError):
            pass  # the data are wrong, not the engine: the update itself will say so


def obstacle(module: Trainable) -> str | None:
    """Return why a module cannot be trained without a tape; None if it can.

    Args:
        module: with a trainer and an optimizer.
    """
    trainer: Any = module.trainer
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        strategy = type(trainer.strategy).__name__
        return f"one device trains without a tape. Got {trainer.world_size} with {strategy}"
    if trainer.precision not in ("32-true", "64-true"):
        return f"without a tape the precision is the model's own. Got precision={trainer.precision!r}"
    if trainer._detect_anomaly:
        return "detect_anomaly=True looks at autograd's tape"
    found = _overridden(module)
    if found:
        return f"{found}, which is not called without a tape"
    try:
        TapeFree(module, lambda loss, x, target: loss)
    except (TypeError, ValueError) as error:
        return shortened(error)
    return None


def shortened(refusal: Exception) -> str:
    """Return an error text of Backprop without its name, and without the advice to use autograd.

    Args:
        refusal: the error that Backprop raised.
    """
    return str(refusal).removeprefix("Backprop: ").removesuffix(".").removesuffix(WAY_OUT).rstrip(". ")


def _overridden(module: Trainable) -> str | None:
    """Name the first overridden method that the tape-free engine would not call."""
    if is_overridden("forward", module, Trainable):
        return f"{type(module).__name__} has its own forward"
    owners: list[tuple[Any, type, tuple[str, ...]]] = [(module, LightningModule, _MODULE_HOOKS)]
    trainer: Any = module.trainer
    owners += [(callback, Callback, _CALLBACK_HOOKS) for callback in trainer.callbacks]
    for owner, base, hooks in owners:
        for hook in hooks:
            if is_overridden(hook, owner, base):
                return f"{type(owner).__name__} has its own {hook}"
    return None
