"""Which of our classes is the twin of which torch class, and why a layer has none."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from manualprop import functional
from manualprop import nn as layers
from manualprop._swap._functions import own_forward
from manualprop.nn.foreign import foreign_original, foreign_twin

# {torch class: ours}: a twin is a subclass with the name of its base, so no table can disagree with the classes.
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    ours.__bases__[0]: ours
    for name, ours in vars(layers).items()
    if isinstance(ours, type)
    and ours.__module__.startswith("manualprop.")
    and ours.__bases__[0].__name__ == name
}
TORCHS = {ours: torchs for torchs, ours in TWINS.items()}


def twin(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Our class for a class of torch or of another library."""
    return TWINS.get(cls) or foreign_twin(cls)


def original(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The torch or foreign class whose twin ``cls`` is."""
    return TORCHS.get(cls) or foreign_original(cls)


# They hold layers but are not layers, even if they are empty (such as the shortcut of a residual block).
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def no_twin(module: nn.Module) -> str | None:
    """The reason why ``module`` stays as it is, for the report; None for a module that only holds layers."""
    bases = [c for c in type(module).__mro__ if twin(c) or original(c)]
    if type(module).__module__.startswith("manualprop.nn") and not isinstance(module, CONTAINERS):
        return "already manualprop's"
    if bases and is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        return f"parametrized: {', '.join(module.parametrizations)}"
    if bases:
        return f"a subclass of {title(bases[0])}, which may compute something else"
    holds_layers = isinstance(module, CONTAINERS) or next(module.children(), None) is not None
    if holds_layers and not module._parameters:
        return None
    return "no hand-derived twin"


def is_rebound(module: nn.Module) -> bool:
    """Whether the instance has its own ``forward`` (from accelerate, or a monkey patch)."""
    return "forward" in vars(module) and own_forward(module) is None


def bare_functions(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Attributes such as ``activation=F.relu`` of a TransformerEncoderLayer: functions, not layers."""
    for name, value in vars(module).items():
        if not isinstance(value, nn.Module) and callable(value):
            called = getattr(value, "__name__", "")
            homes = (getattr(torch.nn.functional, called, None), getattr(torch, called, None))
            if any(value is home for home in homes) and hasattr(functional, called):
                yield name, value


def title(cls: type) -> str:
    """The public name: ``torch.nn.Linear``, not ``torch.nn.modules.linear.Linear``."""
    if foreign_original(cls) is not None:
        return f"manualprop's {cls.__qualname__}"  # not in manualprop.nn: the class is made on demand
    if getattr(nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    if cls in TORCHS or cls.__module__.startswith("manualprop.nn"):
        return f"manualprop.nn.{cls.__name__}"
    return cls.__qualname__
