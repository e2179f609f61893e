"""`DescentModule`: any model, any loss and one of the three descents, under Lightning.

Optimisation is manual in Lightning's sense, because one `training_step` is not one update: stochastic descent makes
an update for each example of the portion it is handed, and batch descent one for all the portions of an epoch. How
an update comes about is the engine's business; either counts it, so that `trainer.global_step` is their number.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from manualprop.descent import (
    Batch,
    Descent,
    Stochastic,
    check_splittable,
    finish_gradient,
    is_sum,
    sum_and_denominator,
)
from manualprop.training._engine import Autograd, Engine, EngineName, TapeFree, obstacle, shortened
from manualprop.training._errors import InputTypeError, InputValueError, NonFiniteLossError
from manualprop.training.datamodules import TrainingRows

Examples = tuple[Tensor, Tensor]


class DescentModule(LightningModule):
    """Train a model on a loss by batch, stochastic or mini-batch descent.

    A training step is handed (inputs, targets): with `MiniBatch` the examples of one update, with `Stochastic` any
    number of examples, with `Batch` one piece of the training set. `TensorDataModule` hands them out so.

    Args:
        model: called on the inputs.
        loss: called on (output, target); returns one number.
        descent: which examples an update sees, and the update.
        seed: of the order of the examples.
        engine: "tape-free" makes every update by :class:`manualprop.Backprop`, "autograd" by torch's tape; "auto" is
            tape-free where that can be (a model and a loss of manualprop.nn, one device, full precision), and says
            which it took. The weights are the same to rounding.

    Attributes:
        engine_taken: "tape-free" or "autograd", from when training starts.
        observers: called without arguments before every update, by either engine.

    Raises:
        TypeError: when the descent must split the loss and it cannot be split exactly.
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
        super().__init__()
        self.automatic_optimization = False
        self.model, self.loss, self.descent, self.seed = model, loss, descent, seed
        self.engine, self.engine_taken = _engine_name(engine), ""
        self.observers: list[Callable[[], object]] = []
        _check_loss(model, loss, descent)
        self._features = _features(model)
        self._sum = self._divisor = 0.0
        self._restored_random_state: dict[str, Any] | None = None
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

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        output = self.model(x)
        assert isinstance(output, Tensor)
        return output

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make the updates that a portion of the training set is good for."""
        x, target = _examples(batch)
        if len(x) == 0 and self.trainer.world_size == 1:
            return  # made before a resumed run was interrupted
        self._check_inputs(x)
        if self._rehearsal_due:
            self._rehearse(x, target)
        outputs = self._train_on(x, target)
        if self._updates_left() == 0:
            self.trainer.should_stop = (
                True  # Lightning looks at max_steps between portions, and must still validate
            )
        self._update_metrics("train_", outputs, target[: len(outputs)])
        if self.trainer.is_last_batch or self.trainer.should_stop:
            self._log_metrics("train_")  # once per epoch: a call costs more than an update

    def _train_on(self, x: Tensor, target: Tensor) -> Tensor:
        whole = not self._divisor and self.trainer.is_last_batch
        if self.trainer.world_size > 1 or (isinstance(self.descent, Batch) and not whole):
            return self._piece(x, target)
        size = 1 if isinstance(self.descent, Stochastic) else len(x)
        left = self._updates_left()
        pairs = zip(x.split(size), target.split(size), strict=True)
        wanted = itertools.islice(pairs, left if left >= 0 else None)
        watched = self.observers or self._schedule_of_updates is not None
        made = [self._update(*pair) for pair in wanted] if watched else self._engine.updates(wanted)
        self.last_loss = made[-1][0]  # not in every update: a module's attributes are dear to set
        return torch.cat([output for _, output in made])

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
            self._finish_pieces()
        return output

    def _finish_pieces(self) -> None:
        sums = torch.tensor([self._sum, self._divisor], dtype=torch.float64, device=self.device)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        devices = self.trainer.world_size
        for parameter in self.parameters() if devices > 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(devices)  # the strategy averaged where the pieces must add up
        loss = finish_gradient(self.parameters(), self.loss, *sums.tolist())
        self.last_loss = self._finite(loss)
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
        """Settle which engine trains, and say so where it was left open."""
        why = None if self.engine == "autograd" else obstacle(self)
        if self.engine == "tape-free" and why is not None:
            raise _no_tape_free(why)
        self._take(Autograd if self.engine == "autograd" or why is not None else TapeFree, why)

    def _take(self, engine: type[Engine], why: str | None = None) -> None:
        self._engine = engine(self, self._finite)
        self.engine_taken = "autograd" if engine is Autograd else "tape-free"
        if self.engine == "auto":
            rank_zero_info(f"engine: {self.engine_taken}" + (f", because {why}." if why else ""))

    def _rehearse(self, x: Tensor, target: Tensor) -> None:
        """Find out, before the first update, whether the tape-free engine refuses a layer at the sight of data."""
        self._rehearsal_due = False
        rows = slice(0, 1 if isinstance(self.descent, Stochastic) else None)
        assert isinstance(self._engine, TapeFree)
        try:
            self._engine.rehearse(x[rows], target[rows])
        except TypeError as error:
            if self.engine == "tape-free":
                raise _no_tape_free(shortened(error)) from error
            self._take(Autograd, shortened(error))

    def _updates_left(self) -> int:
        limit = self.trainer.max_steps
        return -1 if limit == -1 else max(0, limit - self.trainer.global_step)

    def _finite(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        keeper: Any = self.trainer.checkpoint_callback
        checkpoint = (keeper and (keeper.last_model_path or keeper.best_model_path)) or "none was written yet"
        raise NonFiniteLossError(
            f"The loss must stay finite. Got loss={loss} at update {self.trainer.global_step + 1} (epoch "
            f"{self.trainer.current_epoch + 1}) with learning rate {rate:g}; this update was not made. Try a learning "
            f"rate of {rate / 10:g} or clip_gradient_norm=1.0, and look for nan or huge values in the data. Last good "
            f"checkpoint: {checkpoint}."
        )

    def on_train_epoch_start(self) -> None:
        """Start every epoch without what an interrupted one may have left."""
        self._forget_pieces()

    def on_train_epoch_end(self) -> None:
        """Move the learning rate schedule on where it counts epochs."""
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

    def on_fit_end(self) -> None:
        """Let go of the engine, which need not be copied or pickled with the module."""
        del self._engine

    def configure_optimizers(self) -> Any:
        """Return the descent's optimizer, and its learning rate schedule if it has one."""
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
        x = _examples(batch)[0] if isinstance(batch, list | tuple) else batch
        self._check_inputs(x)
        output = self(x)
        if isinstance(self.loss, nn.NLLLoss):
            return torch.exp(output)
        return torch.softmax(output, dim=1) if self.classifies else output

    def _evaluate(self, stage: str, batch: Any) -> None:
        x, target = _examples(batch)
        self._check_inputs(x)
        self._update_metrics(stage, self(x), target)
        self._log_metrics(stage)

    def _update_metrics(self, stage: str, output: Tensor, target: Tensor) -> None:
        if not len(output):  # this device's share of a small piece
            return
        metrics: Any = self.metrics[stage]
        metrics["loss"].update(*self._mean_and_weight(output, target))
        if self.classifies:
            metrics["accuracy"].update(output, target.argmax(dim=1) if target.is_floating_point() else target)

    def _log_metrics(self, stage: str) -> None:
        # Lightning reads the metrics at the end of the epoch and resets them.
        metrics: Any = self.metrics[stage]
        values = {stage + name: metric for name, metric in metrics.items()}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def _mean_and_weight(self, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
        """Return the loss per example and its weight in the mean over all examples."""
        with torch.no_grad():
            try:
                total, divisor = sum_and_denominator(self.loss, output, target)
            except TypeError:  # an unknown loss, which is taken as a mean over examples
                return self.loss(output, target), float(len(output))
        return (total / divisor, divisor) if divisor else (total, 0.0)

    # --- checks, and what a checkpoint holds ----------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse what would train silently wrong: on several devices, or with scaled gradients."""
        for metric in self.metrics.modules():
            if isinstance(metric, Metric):
                metric.reset()  # after Trainer.validate its state is an inference tensor, which training cannot change
        clips = self.descent.clip_gradient_norm or self.descent.clip_gradient_value
        if clips and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise InputValueError(
                f"DescentModule: a limit on the gradient needs gradients in their own scale. Got precision="
                f"{self.trainer.precision!r}, which scales them, and clipping by {clips}; use precision='bf16-mixed'."
            )
        self._check_devices(self.trainer.world_size)
        self._choose_engine()

    def _check_devices(self, devices: int) -> None:
        if devices == 1:
            return
        if isinstance(self.descent, Stochastic):
            raise InputValueError(
                f"Stochastic: an update sees one example, so one device trains. Got {devices} devices; set "
                "Trainer(devices=1), or use MiniBatch."
            )
        check_splittable(self.loss, self.model)

    def _check_inputs(self, x: Tensor) -> None:
        if self._features is None:
            return
        if not x.is_floating_point():
            raise InputTypeError(
                f"DescentModule: the inputs of a Linear layer must be floating point. Got dtype={x.dtype}; convert "
                "them, for example with x.float()."
            )
        if x.shape[-1] != self._features:
            raise InputValueError(
                f"DescentModule: the model takes {self._features} features per example. Got inputs of "
                f"shape {tuple(x.shape)}; change the first size of the model to {x.shape[-1]}, or the data."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the random number generators, so that dropout goes on as it would have."""
        checkpoint["random_state"] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state_all()
        checkpoint["epoch_unfinished"] = self._epoch_unfinished()

    def _epoch_unfinished(self) -> bool:
        loader = self.trainer.train_dataloader
        return isinstance(loader, TrainingRows) and self.trainer.global_step % loader.updates_per_epoch() != 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the random number generators, and an epoch that max_steps cut short."""
        check_architecture(checkpoint["state_dict"], self)
        self._restored_random_state = checkpoint.get("random_state")
        if checkpoint.get("epoch_unfinished"):  # Lightning counted it as whole
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                for name in counts:
                    counts[name] -= name != "completed"

    def on_train_start(self) -> None:
        """Take up the optimizer that a checkpoint has filled, and the random numbers after all that draws some."""
        self._engine = type(self._engine)(self, self._finite)
        self._rehearsal_due = isinstance(self._engine, TapeFree)
        per_update = self.descent.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update"
        self._schedule_of_updates: Any = self.lr_schedulers() if per_update else None
        state, self._restored_random_state = self._restored_random_state, None
        if state is None:
            return
        torch.set_rng_state(state["torch"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


def _engine_name(engine: str) -> str:
    if engine not in get_args(EngineName):
        raise ValueError(
            f"DescentModule: engine must be one of {', '.join(map(repr, get_args(EngineName)))}. Got engine={engine!r}."
        )
    return engine


def _no_tape_free(why: str) -> InputTypeError:
    return InputTypeError(
        f"DescentModule: engine='tape-free' must be able to train the model as it is. It cannot: {why}. Set "
        "engine='auto' or 'autograd', where the same modules work."
    )


def check_architecture(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse the weights of another network, naming the layers that differ.

    Args:
        state: weights of a checkpoint.
        module: that is to take them.

    Raises:
        ValueError: for a name or a shape that differs.
    """
    saved = {name: str(tuple(tensor.shape)) for name, tensor in state.items()}
    own = {name: str(tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
    differing = [name for name in dict.fromkeys([*saved, *own]) if saved.get(name) != own.get(name)]
    if not differing:
        return
    listed = [
        f"{name} {saved.get(name, 'absent')} there, {own.get(name, 'absent')} here" for name in differing
    ]
    more = f"; and {len(listed) - 4} more" if len(listed) > 4 else ""
    raise InputValueError(
        f"The checkpoint must be of the same architecture. Got {'; '.join(listed[:4])}{more}. Give the configuration "
        "that it was trained with (config.yaml in its run directory), or another checkpoint."
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


def _features(model: nn.Module) -> int | None:
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    return model.in_features if isinstance(model, nn.Linear) else None


def _examples(batch: Any) -> Examples:
    if (
        isinstance(batch, list | tuple)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        return batch[0], batch[1]
    raise InputTypeError(
        f"DescentModule: a batch must be a pair of tensors (inputs, targets). Got {type(batch).__name__}; hand your "
        "data over through TensorDataModule, or make your data loader return such pairs."
    )
