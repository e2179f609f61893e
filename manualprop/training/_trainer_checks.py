"""Checks of the Trainer before the first update: settings that would silently train wrong, or never stop as meant."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from manualprop._splitting import check_splittable
from manualprop.descent import Descent, Stochastic
from manualprop.training._errors import InputValueError


def check_trainer(trainer: Trainer, descent: Descent, loss: nn.Module, model: nn.Module) -> None:
    """Refuse a limit on gradients that are scaled, and several devices where the mean would be another."""
    clips = descent.clip_gradient_norm or descent.clip_gradient_value
    if clips and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise InputValueError(
            "DescentModule: a limit on the gradient needs gradients in their own scale. Got "
            f"precision={trainer.precision!r}, which scales them, and clipping by {clips}; use precision='bf16-mixed'."
        )
    if trainer.world_size == 1:
        return
    if isinstance(descent, Stochastic):
        raise InputValueError(
            f"Stochastic: an update sees one example, so one device trains. Got {trainer.world_size} devices; set "
            "Trainer(devices=1), or use MiniBatch."
        )
    check_splittable(loss, model)


def check_monitors(trainer: Trainer, module: type, classifies: bool) -> None:
    """Refuse a callback that monitors a value which is never logged, if everything that logs is known."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    homes = [module.__module__, *(type(callback).__module__ for callback in callbacks)]
    if not all(home.startswith(("lightning.", "manualprop.")) for home in homes):
        return
    stages = ["train_", *(["val_"] if sum(trainer.num_val_batches) else [])]
    known = [stage + name for stage in stages for name in ["loss", *(["accuracy"] if classifies else [])]]
    for callback in callbacks:
        name, value = type(callback).__name__, getattr(callback, "monitor", None)
        if value is not None and value not in known:
            raise InputValueError(
                f"{name} must watch a value that is logged in every epoch. Got monitor={value!r}; choose one of "
                f"{', '.join(sorted(known))}."
            )
