"""`DescentModule`: any model, any loss and one of the three descents, under Lightning.

Optimisation is manual in Lightning's sense, because one `training_step` is not one update: stochastic descent makes
an update for each example of its portion, and batch descent makes one update from all portions of an epoch.
The engine makes the updates; both engines count them, so `trainer.global_step` is their number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any, Self

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch.core.saving import _load_from_checkpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from manualprop._backprop import data_at_fault, not_finite
from manualprop._splitting import check_splittable, finish_gradient, is_sum, sum_and_denominator
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic
from manualprop.training import _objects, _resume, _trainer_checks
from manualprop.training._checks import (
    Fit,
    attempt,
    check_architecture,
    examples_of,
    features,
    highest_loss,
    one_number,
    untouched,
)
from manualprop.training._engine import Autograd, Engine, TapeFree, obstacle, shortened
from manualprop.training._errors import DivergedError, InputTypeError, InputValueError, NonFiniteLossError
from manualprop.training._trainable import EngineName, Trainable
from manualprop.training.datamodules import CHUNK, Rows, TensorDataModule, TrainingRows, searches_rate


class DescentModule(Trainable):
    """Train a model on a loss by batch, stochastic or mini-batch descent.

    A training step gets (inputs, targets): with `MiniBatch` the examples of one update, with `Stochastic` any
    number of examples, with `Batch` one piece of the training set. `TensorDataModule` provides these.

    Args:
        model: called on the inputs.
        loss: called on (output, target); returns one number.
        descent: decides which examples an update sees, and makes the update.
        seed: seed of the order of the examples.
        engine: "tape-free" makes every update by :class:`manualprop.Backprop`, "autograd" by torch's tape; "auto" is
            tape-free if possible (a model and a loss of manualprop.nn, one device, full precision), and says
            which it took. The weights are the same within rounding.

    Attributes:
        engine_taken: "tape-free" or "autograd", once training has started.
        has_program: whether the updates of stochastic descent run as one program for each portion: in long runs of
            small networks, where compiling it pays, or where it was compiled before.
        observers: functions called without arguments before every update, by either engine.
        changes: the settings that a resumed run has changed, as text.

    Raises:
        TypeError: if model, loss or descent has the wrong type, or if the descent must split a loss that
            cannot be split exactly.
        ValueError: for a model or a loss that the descent cannot train as its formula says.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        descent: Descent,
        seed: int = 0,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__(model, loss, descent, seed, engine)
        self.automatic_optimization = False
        self.engine_taken = ""
        self.observers: list[Callable[[], object]] = []
        self.has_program = self._had_program = False
        self.changes: list[str] = []
        self._sum = self._divisor = 0.0
        self._restored: dict[str, Any] | None = None
        self._description: dict[str, Any] = {}  # for checkpoints; made when training starts
        self._said = ""
        self._highest: float | None = None
        self._left_at = 0
        self._stopped = self._check_due = self._searching = False
        self.last_loss = math.nan
        self.classifies = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
        self.metrics = nn.ModuleDict({stage: self._make_metrics() for stage in ("train_", "val_", "test_")})

    def _make_metrics(self) -> nn.ModuleDict:
        metrics: dict[str, Metric] = {"loss": MeanMetric()}
        if self.classifies:
            metrics["accuracy"] = MulticlassAccuracy(average="micro", ignore_index=self._ignored())
        return nn.ModuleDict(metrics)

    def _ignored(self) -> int:
        ignored = self.loss.ignore_index
        assert isinstance(ignored, int)
        return ignored

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Make the updates of a portion of the training set; return the loss of the last."""
        x, target = examples_of(batch)
        if len(x) == 0 and self.trainer.world_size == 1:
            return None  # the run made these updates before it was interrupted
        self._fit.check_inputs(x)
        if self._check_due:
            self._check(x, target)
        try:
            outputs = self._train_on(x, target)
        except NonFiniteLossError:
            if not self._searching:
                raise
            self.trainer.should_stop = True  # higher learning rates are useless
            return None
        if (
            self._updates_left() == 0
        ):  # Lightning checks max_steps only between portions, and must still validate
            self.trainer.should_stop = self._stopped = True
        if not self._searching:
            self._update_metrics("train_", outputs, target[: len(outputs)])
            if self.trainer.is_last_batch or self.trainer.should_stop:
                self._log_metrics("train_")  # once per epoch: one call costs more than an update
        return {"loss": torch.tensor(self.last_loss)} if not self._divisor else None

    def _train_on(self, x: Tensor, target: Tensor) -> Tensor:
        made_before = self.trainer.global_step
        if self.trainer.world_size > 1 or self._comes_in_pieces():
            return self._piece(x, target)
        size = 1 if isinstance(self.descent, Stochastic) else len(x)
        left = self._updates_left()
        most = left if left >= 0 else None
        watched = self.observers or self._schedule_of_updates is not None
        losses, outputs = (self._watched if watched else self._engine.updates)(x, target, size, most)
        self.last_loss = losses[-1]  # not in every update: it is slow to set an attribute of a module
        self._watch(losses, size, made_before)
        return outputs

    def _watched(self, x: Tensor, target: Tensor, size: int, most: int | None) -> tuple[list[float], Tensor]:
        """Make updates one by one, for the observers and for a schedule that counts updates."""
        pairs = itertools.islice(zip(x.split(size), target.split(size), strict=True), most)
        losses, outputs = zip(*[self._update(*pair) for pair in pairs], strict=True)
        return list(losses), torch.cat(outputs)

    def _comes_in_pieces(self) -> bool:
        return isinstance(self.descent, Batch) and bool(self._divisor or not self.trainer.is_last_batch)

    def _update(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Forward pass, loss, backward pass, update; return the loss and the output."""
        for observe in self.observers:
            observe()
        made = self._engine.update(x, target)
        if self._schedule_of_updates is not None:
            self._schedule_of_updates.step()
        return made

    def _piece(self, x: Tensor, target: Tensor) -> Tensor:
        """Add the gradient of a piece; with the last piece of the update, divide and step."""
        total, divisor, output = self._engine.add(x, target)
        self._sum, self._divisor = self._sum + total, self._divisor + divisor
        if not isinstance(self.descent, Batch) or self.trainer.is_last_batch:
            self._finish_pieces(x, target)
        return output

    def _finish_pieces(self, x: Tensor, target: Tensor) -> None:
        sums = torch.tensor([self._sum, self._divisor], dtype=torch.float64, device=self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        devices = self.trainer.world_size
        for parameter in self.parameters() if devices > 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(devices)  # the strategy averaged, but the pieces must add up
        total, divisor = sums.tolist()
        loss = finish_gradient(self.parameters(), self.loss, total, divisor)
        self.last_loss = self._finite(loss, x, target)
        self._watch([loss], int(divisor), self.trainer.global_step)
        for observe in self.observers:
            observe()
        self._engine.step()
        if self._schedule_of_updates is not None:
            self._schedule_of_updates.step()
        self._forget_pieces()

    def _forget_pieces(self) -> None:
        self._sum = self._divisor = 0.0
        self._engine.optimizer().zero_grad()

    # --- engine -------------------------------------------------------------------------------------------------

    def _choose_engine(self) -> None:
        """Choose the engine; for "auto", say which."""
        why = None if self.engine == "autograd" else obstacle(self)
        if self.engine == "tape-free" and why is not None:
            raise _no_tape_free(why)
        self._take(Autograd if self.engine == "autograd" or why is not None else TapeFree, why)

    def _take(self, engine: type[Engine], why: str | None = None) -> None:
        self._engine = engine(self, self._finite)
        self.engine_taken = "autograd" if engine is Autograd else "tape-free"
        said = f"engine: {self.engine_taken}" + (f", because {why}." if why else "")
        if self.engine == "auto" and said != self._said:  # Lightning's Tuner trains again and again
            rank_zero_info(said)
        self._said = said

    def _check(self, x: Tensor, target: Tensor) -> None:
        """Before the first update: check that all fits together, and find out how high the loss may rise."""
        self._check_due = False
        rows = slice(0, 1 if isinstance(self.descent, Stochastic) else None)
        if len(x):  # if several devices share a small update, one may have no example
            whole = self.trainer.world_size == 1 and not self._comes_in_pieces()
            output = self._fit.check(x[rows], target[rows], whole)
            loaders = [self.trainer.train_dataloader, self.trainer.val_dataloaders]
            for loader in (each for each in loaders if isinstance(each, Rows)):
                self._fit.check_inputs(loader.x)
                self._fit.check_targets(output, loader.target)
        if isinstance(self._engine, TapeFree):
            self._rehearse(x[rows], target[rows])
            watched = self.observers or self._schedule_of_updates is not None or self._searching
            if isinstance(self._engine, TapeFree) and not watched:
                self.has_program = self._engine.choose_program(x[rows], target[rows], self._had_program)
        if self._highest is None and not self._searching:
            highest = self._highest_loss(x[:CHUNK], target[:CHUNK]) if len(x) else None
            agreed = self.trainer.strategy.reduce(
                torch.tensor(highest or 0.0, device=self.device), reduce_op="max"
            )
            self._highest = float(agreed) or None

    def _highest_loss(self, x: Tensor, target: Tensor) -> float | None:
        with untouched(self.model, x), torch.no_grad():
            return highest_loss(self.loss, self(x), target)

    def _rehearse(self, x: Tensor, target: Tensor) -> None:
        """Find out, before the first update, whether the tape-free engine refuses a layer on these data."""
        assert isinstance(self._engine, TapeFree)
        try:
            self._engine.rehearse(x, target)
        except TypeError as error:
            if self.engine == "tape-free":
                raise _no_tape_free(shortened(error)) from error
            self._take(Autograd, shortened(error))

    def _updates_left(self) -> int:
        limit = self.trainer.max_steps
        return -1 if limit == -1 else max(0, limit - self.trainer.global_step)

    # --- divergence -----------------------------------------------------------------------------------------------

    def _finite(self, loss: float, x: Tensor, target: Tensor) -> float:
        if math.isfinite(loss):
            return loss
        rate = self._rate()
        advice = data_at_fault(x, target, self.loss)
        raise NonFiniteLossError(
            f"The loss must stay finite. Got loss={loss} at update {self.trainer.global_step + 1} (epoch "
            f"{self.trainer.current_epoch + 1}), which was not made, with learning rate {rate:g}. "
            f"{advice or f'Try a learning rate of {min(rate / 10, 0.1):g} or clip_gradient_norm=1.0'}. Last good checkpoint: "
            f"{self._checkpoint()}."
        )

    def _rate(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def _checkpoint(self) -> str:
        keeper: Any = self.trainer.checkpoint_callback
        return (keeper and (keeper.last_model_path or keeper.best_model_path)) or "none was written yet"

    def _watch(self, losses: list[float], examples: int, made_before: int) -> None:
        """Remember the first update whose loss left the range.

        Args:
            losses: the losses of updates.
            examples: the number of examples of each, for a loss that is a sum.
            made_before: the number of updates before the first of these.
        """
        if self._highest is None or self._left_at:
            return
        limit = self._highest * (examples if is_sum(self.loss) else 1)
        if max(losses) > limit:
            self._left_at = made_before + next(i for i, loss in enumerate(losses, start=1) if loss > limit)

    def _refuse_divergence(self) -> None:
        """Stop a run that ends an epoch outside the range in which a network learns."""
        metrics = self.trainer.callback_metrics
        loss, left_at = metrics.get("train_loss"), self._left_at
        if loss is None or self._highest is None or not left_at:
            return
        if loss <= self._highest:
            self._left_at = 0  # the loss came back
            return
        rate = self._rate()
        raise DivergedError(
            f"The loss must stay between 0 and {self._highest:.3g}, a hundred times that of a network that has learnt "
            f"nothing. It left that range at update {left_at}, and epoch {self.trainer.current_epoch + 1} ends with "
            f"train_loss={float(loss):.3g} and learning rate {rate:g}. Try a learning rate of {min(rate / 10, 0.1):g} or "
            f"clip_gradient_norm=1.0. Last good checkpoint: {self._checkpoint()}."
        )

    def on_train_epoch_start(self) -> None:
        """Start every epoch without leftovers of an interrupted one."""
        self._forget_pieces()

    def on_train_epoch_end(self) -> None:
        """Stop a run that has diverged; step the learning rate schedule if it counts epochs."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainingRows) and loader.rows_done() == loader.rows_per_epoch():
            self.epochs_made += 1
        if self._searching:
            return
        self._refuse_divergence()
        per_update = self.descent.lr_scheduler_interval == "update"
        if self.descent.lr_scheduler is None or per_update or self._epoch_unfinished():
            return
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]
            return
        known, watched = self.trainer.callback_metrics, self.descent.lr_scheduler_monitor
        if watched not in known:
            raise InputValueError(
                "DescentModule: ReduceLROnPlateau watches a value logged in every epoch. Got lr_scheduler_monitor="
                f"{watched!r}; choose one of {', '.join(sorted(known))}."
            )
        scheduler.step(known[watched])

    def on_train_end(self) -> None:
        """Drop the engine, so that it is not copied or pickled with the module."""
        del self._engine
        if self._stopped:  # by max_steps: the user may continue with this trainer
            self.trainer.should_stop = self._stopped = False

    def configure_optimizers(self) -> Any:
        """Return the descent's optimizer, and its learning rate schedule if it has one."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputValueError(
                "DescentModule: the model must have a parameter that requires a gradient. Got none; set requires_grad."
            )
        optimizer: Optimizer = self.descent.make_optimizer(self.parameters())
        scheduler = self.descent.make_lr_scheduler(optimizer)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    # --- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add examples to the validation metrics."""
        self._evaluate("val_", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add examples to the test metrics."""
        self._evaluate("test_", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the model's output: for a cross-entropy loss, the probability of every class."""
        x = examples_of(batch)[0] if isinstance(batch, list | tuple) else batch
        output: Tensor = self._output(x)
        if isinstance(self.loss, nn.NLLLoss):
            return torch.exp(output)
        return torch.softmax(output, dim=1) if self.classifies else output

    def _evaluate(self, stage: str, batch: Any) -> None:
        x, target = examples_of(batch)
        output = self._output(x)
        if len(x):
            self._fit.check_targets(output, target, whole=False)
        what = f"the loss must take an output of shape {tuple(output.shape)} and targets of shape {tuple(target.shape)}"
        attempt(lambda: self._update_metrics(stage, output, target), what)
        self._log_metrics(stage)

    def _output(self, x: Tensor) -> Tensor:
        self._fit.check_inputs(x)
        output: Tensor = attempt(lambda: self(x), f"the model must take inputs of shape {tuple(x.shape)}")
        return output

    def _update_metrics(self, stage: str, output: Tensor, target: Tensor) -> None:
        if not len(output):  # this device has no share of a small piece
            return
        metrics: Any = self.metrics[stage]
        mean, weight = self._mean_and_weight(output, target)
        if stage != "train_" and not bool(mean.isfinite()):
            raise self._not_finite_in_evaluation(stage, mean.item(), output, target)
        metrics["loss"].update(mean, weight)
        if self.classifies:
            metrics["accuracy"].update(output, target.argmax(dim=1) if target.is_floating_point() else target)

    def _not_finite_in_evaluation(
        self, stage: str, loss: float, output: Tensor, target: Tensor
    ) -> NonFiniteLossError:
        place = not_finite(target)
        where = (
            f"{place} of the targets" if place else f"{not_finite(output) or 'finite outputs'} of the outputs"
        )
        return NonFiniteLossError(
            f"{stage}loss must be finite. Got {loss} after {self.trainer.global_step} updates, and {where} of a batch; "
            "look for nan, infinite or huge values in those rows of the data, or train anew with a smaller learning rate."
        )

    def _log_metrics(self, stage: str) -> None:
        # Lightning reads the metrics at the end of the epoch and resets them.
        metrics: Any = self.metrics[stage]
        values = {stage + name: metric for name, metric in metrics.items()}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def _mean_and_weight(self, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
        """Return the loss per example and its weight in the mean over all examples."""
        with torch.no_grad():
            try:
                check_splittable(self.loss)
            except TypeError:  # an unknown loss counts as a mean over examples
                return one_number(self.loss(output, target)), float(len(output))
            total, divisor = sum_and_denominator(self.loss, output, target)
        return (total / divisor, divisor) if divisor else (total, 0.0)

    # --- checks, and what a checkpoint holds ----------------------------------------------------------------------

    @property
    def _fit(self) -> Fit:
        return Fit(self.model, self.loss, self.descent, features(self.model))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings, the position in the epoch, the module's description, and the random states."""
        checkpoint["random_state"] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state_all()
        loader = self.trainer.train_dataloader
        checkpoint["epoch_unfinished"] = self._epoch_unfinished()
        if not self._description:
            self._description = _resume.settings(self) | {"objects": _objects.stored(self)}
        checkpoint[_resume.KEY] = self._description | {
            "examples": len(loader.x) if isinstance(loader, TrainingRows) else None,
            "rows": loader.rows_done()
            if isinstance(loader, TrainingRows) and self._epoch_unfinished()
            else 0,
            "epochs": self.epochs_made,
            "highest_loss": self._highest,
            "has_program": self.has_program,
        }

    def _epoch_unfinished(self) -> bool:
        loader = self.trainer.train_dataloader
        return isinstance(loader, TrainingRows) and 0 < loader.rows_done() < loader.rows_per_epoch()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint with the settings of this module; see `_resume`."""
        goes_on = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if goes_on:
            _resume.check_foreign(checkpoint)
        check_architecture(checkpoint["state_dict"], self)
        if not goes_on:
            return
        self.changes = _resume.take_up(self, checkpoint)
        self._restored = checkpoint[_resume.KEY] | {"random_state": checkpoint.get("random_state")}
        self._highest = self._restored["highest_loss"]
        for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            if checkpoint["epoch_unfinished"]:  # Lightning counted it as complete
                for name in counts:
                    counts[name] -= name != "completed"
            counts["completed"] = counts["processed"]  # Lightning does this only if max_epochs is a limit

    def on_train_start(self) -> None:
        """Take the optimizer that a checkpoint has filled; restore the random states last."""
        for metric in self.metrics.modules():
            if isinstance(metric, Metric):
                metric.reset()  # Trainer.validate leaves inference tensors, which training cannot change
        self._searching = searches_rate(self.trainer)
        _trainer_checks.check_trainer(self.trainer, self.descent, self.loss, self.model)
        _trainer_checks.check_monitors(self.trainer, type(self), self.classifies)
        self._choose_engine()
        self._check_due, self._left_at, self._description = True, 0, {}
        per_update = self.descent.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update"
        self._schedule_of_updates: Any = self.lr_schedulers() if per_update or self._searching else None
        restored, self._restored = self._restored, None
        if restored is None:
            self._highest, self.rows_before, self.epochs_made, self.changes = None, 0, 0, []
            self._had_program = False
            return
        loader = self.trainer.train_dataloader
        if isinstance(loader, TrainingRows):
            _resume.check_same_examples(restored["examples"], len(loader.x))
            # With a limit on steps, Lightning would continue a complete epoch and count it again, and take of an
            # unfinished one as many portions less as were made: TrainingRows yields these again, without rows.
            restarting: Any = _Loop.restarting
            restarting.fset(self.trainer.fit_loop, False)
        self.rows_before, self.epochs_made = restored["rows"], restored["epochs"]
        self._had_program = restored.get("has_program", False)
        if self.changes and self.trainer.global_step:  # Lightning's Tuner returns to update 0
            rank_zero_info(f"resumed at update {self.trainer.global_step} with {'; '.join(self.changes)}")
        self._restore_random_numbers(restored["random_state"])

    def _restore_random_numbers(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the module of a checkpoint; see `LightningModule.load_from_checkpoint`.

        Args:
            checkpoint_path: the file.
            map_location: where to put the tensors.
            hparams_file: not needed.
            strict: whether the names of the weights must agree.
            weights_only: as in `torch.load`.
            kwargs: arguments of the constructor that replace those of the checkpoint. A model or a loss of
                your own class must be given.

        Raises:
            ValueError: for another kind of checkpoint, and for a missing argument that must be given.
        """
        checkpoint = _load(checkpoint_path, map_location=map_location, weights_only=weights_only)
        _resume.check_foreign(checkpoint)
        arguments = _objects.made(checkpoint[_resume.KEY]["objects"], kwargs)
        found = _load_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs | arguments
        )
        assert isinstance(found, cls)
        return found

    # --- what Lightning's Tuner reads and sets --------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """The examples in one update of mini-batch descent; `Tuner.scale_batch_size` sets it."""
        return self._mini_batch().batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.descent = dataclasses.replace(self._mini_batch(), batch_size=min(size, self._examples() or size))

    def _mini_batch(self) -> MiniBatch:
        if isinstance(self.descent, MiniBatch):
            return self.descent
        other = "micro_batch_size bounds its memory" if isinstance(self.descent, Batch) else "its size is one"
        raise InputTypeError(
            f"DescentModule: batch_size is a number of MiniBatch alone. Got the descent {type(self.descent).__name__}: "
            f"{other}; use MiniBatch, or do not scale the batch size."
        )

    def _examples(self) -> int | None:
        data = getattr(self._trainer, "datamodule", None)
        return len(data.train[0]) if isinstance(data, TensorDataModule) else None


def _no_tape_free(why: str) -> InputTypeError:
    return InputTypeError(
        f"DescentModule: engine='tape-free' must be able to train the model as it is. It cannot: {why}. Set "
        "engine='auto' or 'autograd', where the same modules work."
    )
