"""Keeps model, loss and descent in a checkpoint: `DescentModule.load_from_checkpoint(path)` needs no more.

They are kept beside the weights, as bytes; the weights are not stored twice. Only `load_from_checkpoint`
reads these bytes, with torch's safe reader, which makes only allowed classes. Allowed are the layers of torch
and of this package, the descents, and torch's optimizers and schedules. The user must pass an instance of any
other class, or allow it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import pickle
import re
from typing import Any

import torch
from torch import Tensor, nn

from manualprop import descent as descents
from manualprop import nn as hand
from manualprop.training import networks
from manualprop.training._errors import InputValueError
from manualprop.training._trainable import Trainable

KEPT = ("model", "loss", "descent", "seed", "engine")


def stored(module: Trainable) -> dict[str, Tensor]:
    """Return what is needed to make a module again, without the weights; what cannot be pickled is left out.

    Args:
        module: the module whose `state_dict` the checkpoint holds.
    """
    weights = set(map(id, module.state_dict(keep_vars=True).values()))
    tensors = (*module.parameters(), *module.buffers())
    empty: dict[int, Any] = {id(t): _without_data(t) for t in tensors if id(t) in weights}
    found = {}
    for name in KEPT:
        buffer = io.BytesIO()
        try:
            # In the copy each tensor of the state is replaced by an empty one.
            torch.save(copy.deepcopy(getattr(module, name), dict(empty)), buffer)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
            continue  # such as a local function
        found[name] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    return found


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def made(kept: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments that make a module again.

    Args:
        kept: the result of `stored`.
        given: the caller's arguments, which have priority.

    Raises:
        ValueError: if an argument must be given because the checkpoint cannot make it; the text names it.
    """
    return {name: given[name] if name in given else _made(name, kept.get(name)) for name in KEPT}


def _made(name: str, data: Tensor | None) -> Any:
    if data is None:
        raise _to_be_given(name, "it holds a function, which a checkpoint cannot")
    try:
        with torch.serialization.safe_globals(_known()):
            thing = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, AttributeError, RuntimeError) as error:
        owner = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = owner[1] if owner else "a class"
        raise _to_be_given(name, f"it is made of {what}, which is not one of torch's or ours") from error
    if isinstance(thing, nn.Module):
        for part in thing.modules():
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        tensors[key] = _filled(tensor)
    return thing


def _filled(tensor: Tensor) -> Any:
    data = torch.zeros_like(tensor, device="cpu")
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _to_be_given(name: str, why: str) -> InputValueError:
    return InputValueError(
        f"DescentModule.load_from_checkpoint: {name} must be given, because {why}. Call "
        f"load_from_checkpoint(path, {name}=...) with what it was trained with."
    )


@functools.cache
def _known() -> list[Any]:
    """The classes that a checkpoint may make: they only hold numbers and compute."""
    homes = [hand, networks, descents, torch.optim, torch.optim.lr_scheduler]
    classes = {thing for home in homes for thing in vars(home).values() if inspect.isclass(thing)}
    layers = {thing for thing in vars(nn.modules).values() if inspect.isclass(thing)}
    ours = {part for thing in classes for part in thing.__mro__ if part.__module__.startswith("manualprop.")}
    return [*itertools.chain(classes, layers, ours), functools.partial, set]
