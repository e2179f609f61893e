"""Finds functions that a ``forward`` calls directly (``F.relu(x)``, ``x.softmax(-1)``): no swap of layers reaches them.

They are read from the bytecode, without running the model: names that stand for a torch function, and names
of tensor methods. Methods of the same class and functions of the same module that ``forward`` calls are read
too.
"""

import dis
import types
from collections.abc import Container, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from manualprop._swap._functions import COUNTERPARTS, NAMES

# torch's differentiable functions for networks that have no rule here.
WITHOUT_RULE = {
    name
    for name, function in vars(torch.nn.functional).items()
    if name not in (*NAMES, "one_hot")
    and function in torch.overrides.get_overridable_functions()[torch.nn.functional]
    and function not in COUNTERPARTS
}
_FUNCTIONS = [
    (name, function)
    for home, without in ((torch.nn.functional, WITHOUT_RULE), (torch, set()))
    for name, function in sorted(vars(home).items())
    if isinstance(function, Hashable) and (name in (*NAMES, *without) or function in COUNTERPARTS)
]
_SELF, _COMPUTED, _OTHER = object(), object(), object()  # markers for names without a known value


def calls_in_forward(modules: Iterable[nn.Module]) -> dict[str, list[Any]]:
    """{"relu in Net": torch's functions} for such calls, for every module class that is not torch's or ours."""
    found: dict[str, list[Any]] = {}
    for cls, module in {type(module): module for module in modules}.items():
        if not cls.__module__.startswith(("torch.", "manualprop.")):
            for name, function in _called(cls.forward, module, set()):
                found.setdefault(f"{name} in {cls.__qualname__}", []).append(function)
    return found


def _called(function: Any, module: nn.Module | None, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Torch's functions that a function calls, with their names, directly or by methods and functions beside it."""
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return
    seen.add(code)
    itself = code.co_varnames[0] if module is not None and code.co_argcount else ""
    layers = module._modules if module is not None else {}
    for owner, name, value in _names(code, function.__globals__, itself, layers):
        method = getattr(type(module), name, None) if owner is _SELF else None
        ours = [known for known, torchs in _FUNCTIONS if value is torchs]
        if ours:
            yield ours[0], value
        elif isinstance(method, types.FunctionType):
            yield from _called(method, module, seen)
        elif owner is _COMPUTED and name.removesuffix("_") in NAMES and hasattr(Tensor, name):
            yield name, getattr(Tensor, name)
        elif isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            yield from _called(value, None, seen)


def _names(
    code: types.CodeType, known: dict[str, Any], itself: str, layers: Container[str]
) -> Iterator[tuple[Any, str, Any]]:
    """For every name that the code loads: its owner (if it is an attribute), the name, and its value."""
    value: Any = _COMPUTED
    for instruction in dis.get_instructions(code):
        name, kind = instruction.argval, instruction.opname
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            owner, value = value, _attribute(value, name, layers)
            yield owner, name, value
        elif kind == "LOAD_GLOBAL":
            value = known.get(name, _OTHER)
            yield None, name, value
        elif kind.startswith(("LOAD_FAST", "LOAD_DEREF")):
            last = name[-1] if isinstance(name, tuple) else name  # Python 3.13 loads two at once
            value = _SELF if last == itself else _COMPUTED
        elif kind not in ("CACHE", "PRECALL", "PUSH_NULL"):
            value = _COMPUTED
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a comprehension or an inner function
            yield from _names(constant, known, itself, layers)


def _attribute(owner: Any, name: str, layers: Container[str]) -> Any:
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, _OTHER)
    is_layer = owner is _SELF and name in layers
    return _COMPUTED if (owner is _SELF or owner is _COMPUTED) and not is_layer else _OTHER
