"""Resuming from a checkpoint with other settings: which of them may change, and which are refused.

A checkpoint holds its settings beside the state of the optimizer and of the schedule. A new setting is either
put into that state before Lightning restores it, or refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualprop.descent import Descent
from manualprop.training._errors import InputValueError
from manualprop.training._trainable import Trainable

KEY, VERSION = "manualprop", 1

# The keys of every checkpoint of a Trainable in training.
_NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", KEY)

_START_ANEW = "start a run of its own with another --name"


def settings(module: Trainable) -> dict[str, Any]:
    """Return the settings of a module, in the form of its checkpoints.

    Args:
        module: its descent makes an optimizer for its parameters.
    """
    optimizer, schedule = _made(module)
    return {
        "version": VERSION,
        "descent": type(module.descent).__name__,
        "options": _options(module.descent),
        "optimizer": _class(optimizer),
        "groups": _hyperparameters(module.descent.make_optimizer(module.parameters())),
        "schedule": _text(module.descent, schedule),
        "engine": module.engine,
        "seed": module.seed,
        "model": _model_text(module.model),
        "loss": _loss_text(module.loss),
    }


def check_foreign(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not one of a `DescentModule`.

    Args:
        checkpoint: the content of the file.

    Raises:
        ValueError: if it is another checkpoint; the text names what is missing.
    """
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        raise InputValueError(
            "The checkpoint to resume from must be one that a training run of manualprop has written. Got one without "
            f"{', '.join(missing)}; {_START_ANEW}."
        )
    version = checkpoint[KEY].get("version")
    if version != VERSION:
        raise InputValueError(
            f"The checkpoint to resume from must be of version {VERSION}. Got version {version}; go on with the "
            f"version of manualprop that wrote it, or {_START_ANEW}."
        )


def take_up(module: Trainable, checkpoint: dict[str, Any]) -> list[str]:
    """Replace the settings of a checkpoint by those of a module, and return what has changed.

    Args:
        module: the module, with a trainer, that continues from the checkpoint.
        checkpoint: changed in place.

    Raises:
        ValueError: for a setting that cannot change; the text names it.
    """
    check_foreign(checkpoint)
    before, now = checkpoint[KEY], settings(module)
    _refuse_others(before, now)
    _refuse_past(module, checkpoint)
    changes = _optimizer_changes(module, checkpoint, before, now)
    changes += _differences(before["options"], now["options"], "descent.")
    changes += _differences(before, now, "model.", ["engine"])
    _callbacks(module, checkpoint)
    return changes


def _refuse_others(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse changes of what has a state, or gives the numbers of the run their meaning."""
    why = {
        "model.model": ("model", "the network whose weights the checkpoint holds"),
        "model.loss": ("loss", "that of the run, by which its best checkpoint is chosen"),
        "descent": ("descent", "that of the run"),
        "descent.optimizer": ("optimizer", "the one whose state the checkpoint holds"),
        "seed": ("seed", "that of the run, whose weights and order come from it"),
    }
    for name, (key, what) in why.items():
        if before[key] != now[key]:
            there, here = _first_difference(str(before[key]), str(now[key]))
            raise InputValueError(
                f"Resuming: {name} must be {what}. Got {here}, and {there} in the checkpoint; set it back, or "
                f"{_START_ANEW}."
            )
    if len(before["groups"]) != len(now["groups"]):
        raise InputValueError(
            f"Resuming: descent.optimizer must have the groups of parameters that the checkpoint has. Got "
            f"{len(now['groups'])}, and {len(before['groups'])} in the checkpoint; set it back, or {_START_ANEW}."
        )


def check_same_examples(before: int | None, now: int) -> None:
    """Refuse a training set of another size: the order of the examples and the count of epochs would change.

    Args:
        before: number of training examples of the checkpoint; None if unknown.
        now: number of training examples of this run.

    Raises:
        ValueError: if they differ.
    """
    if before is not None and before != now:
        raise InputValueError(
            f"Resuming: data must hold as many training examples as the run has seen. Got {now} examples, and "
            f"{before} in the checkpoint; give the same data, or {_START_ANEW}."
        )


def _refuse_past(module: Trainable, checkpoint: Mapping[str, Any]) -> None:
    epochs = int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    limit = module.trainer.max_epochs
    if limit is not None and 0 <= limit < epochs:
        raise InputValueError(
            f"Resuming: trainer.max_epochs must be at least the epochs that have been made. Got {limit}, and {epochs} "
            f"in the checkpoint; raise it above {epochs} to go on."
        )


def _optimizer_changes(
    module: Trainable, checkpoint: dict[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    state = checkpoint["optimizer_states"][0]
    _refuse_without_state(module, state["state"], before["groups"], now["groups"])
    if before["schedule"] != now["schedule"]:
        optimizer, _ = _made(module)  # the start of the new schedule
        state["param_groups"] = [
            dict(_plain(group), params=saved["params"])
            for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        checkpoint["lr_schedulers"] = []
    else:
        for saved, old, new in zip(state["param_groups"], before["groups"], now["groups"], strict=True):
            _set_hyperparameters(saved, old, new)
        _set_base_rates(checkpoint["lr_schedulers"], before["groups"], now["groups"])
    names = {"lr": "learning_rate"} if module.descent.optimizer is None else {}
    prefix = "descent." if module.descent.optimizer is None else "descent.optimizer."
    changes = []
    for old, new in zip(before["groups"], now["groups"], strict=True):
        changes += [
            f"{prefix}{names.get(key, key)} {old.get(key)} -> {new[key]}"
            for key in new
            if old.get(key) != new[key]
        ]
    if before["schedule"] != now["schedule"]:
        changes.append(f"descent.lr_scheduler {before['schedule']} -> {now['schedule']}, from its start")
    return changes


def _set_hyperparameters(group: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key == "lr" and "initial_lr" in group:  # a schedule continues: its factor on the rate stays
            group["lr"] *= value / old["lr"] if old["lr"] else 1.0
            group["initial_lr"] = value
        else:
            group[key] = value


def _set_base_rates(states: list[dict[str, Any]], old: list[Any], new: list[Any]) -> None:
    rates = [group["lr"] for group in new]
    if [group["lr"] for group in old] == rates:
        return
    for state in states:
        for nested in [state, *state.get("_schedulers", [])]:
            if "base_lrs" in nested:
                nested["base_lrs"] = list(rates)
            if nested.get("_last_lr"):
                nested["_last_lr"] = [
                    last * after["lr"] / before["lr"] if before["lr"] else last
                    for last, before, after in zip(nested["_last_lr"], old, new, strict=True)
                ]


def _refuse_without_state(
    module: Trainable, state: Mapping[Any, Mapping[str, Any]], old: list[Any], new: list[Any]
) -> None:
    """Refuse options that need a state which the checkpoint does not have, such as Adam's amsgrad."""
    if not state or old == new:
        return
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    optimizer = module.descent.make_optimizer([probe])
    if isinstance(optimizer, SGD):  # its momentum can start from the gradient at any time
        return
    optimizer.step()
    missing = set(optimizer.state[probe]) - set(next(iter(state.values())))
    if missing:
        changed = [key for key in new[0] if old[0].get(key) != new[0][key]]
        raise InputValueError(
            f"Resuming: descent.optimizer.{changed[0]} must be as it was, because it asks for a state that the "
            f"checkpoint lacks ({', '.join(sorted(missing))}). Got {new[0][changed[0]]}, and {old[0].get(changed[0])} "
            f"in the checkpoint; set it back, or {_START_ANEW}."
        )


def _callbacks(module: Trainable, checkpoint: Mapping[str, Any]) -> None:
    """Keep the arguments of a callback in this run; its state would restore the earlier values."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint["callbacks"].get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state is not None:
            state["patience"] = callback.patience


# --- settings as text and numbers -------------------------------------------------------------------------------------


def _made(module: Trainable) -> tuple[Optimizer, LRScheduler | None]:
    optimizer = module.descent.make_optimizer(module.parameters())
    return optimizer, module.descent.make_lr_scheduler(optimizer)


def _options(descent: Descent) -> dict[str, Any]:
    """The options of a descent that neither the optimizer nor the schedule holds."""
    held = (
        "learning_rate",
        "momentum",
        "nesterov",
        "weight_decay",
        "optimizer",
        "lr_scheduler",
        "lr_scheduler_interval",
    )
    names = [field.name for field in dataclasses.fields(descent)]
    return {name: getattr(descent, name) for name in names if name not in held}


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in _plain(group).items() if key != "params"}
        for group in optimizer.param_groups
    ]


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _class(thing: object) -> str:
    return f"{type(thing).__module__.partition('.')[0]}.{type(thing).__name__}"


def _text(descent: Descent, schedule: LRScheduler | None) -> str:
    """A schedule at its start as text, without values that come from the learning rate."""
    if schedule is None:
        return "none"
    return (
        f"{_schedule_text(type(schedule).__name__, schedule.state_dict())} by {descent.lr_scheduler_interval}"
    )


def _schedule_text(name: str, state: Mapping[str, Any]) -> str:
    moving = ("base_lrs", "last_epoch", "best", "cooldown_counter", "num_bad_epochs", "mode_worse")
    given = [
        f"{key}={value!r}" for key, value in state.items() if key not in moving and not key.startswith("_")
    ]
    nested = [_schedule_text("", inner) for inner in state.get("_schedulers", [])]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{name}({', '.join(given + nested)})")


def _model_text(model: nn.Module) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(model))


def _loss_text(loss: nn.Module) -> str:
    public = {
        key: value for key, value in vars(loss).items() if not key.startswith("_") and key != "training"
    }
    held = {name: value.tolist() for name, value in loss.named_buffers()}
    given = ", ".join(f"{key}={value!r}" for key, value in sorted((public | held).items()))
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(loss).__name__}({given})")


def _first_difference(there: str, here: str) -> tuple[str, str]:
    """The first line in which two texts differ, from each text; if there is none, their numbers of lines."""
    a, b = there.splitlines(), here.splitlines()
    for first, second in zip(a, b, strict=False):
        if first != second:
            return first.strip(), second.strip()
    return f"{len(a)} lines", f"{len(b)} lines"


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str, keys: list[str] | None = None
) -> list[str]:
    return [
        f"{prefix}{key} {before.get(key)} -> {now[key]}"
        for key in (now if keys is None else keys)
        if before.get(key) != now[key]
    ]
