"""Where a Function may keep tensors, save_for_backward apart: on ctx, on its class, in globals, in closures."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def storage_of(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else id(t)


def tensors_in(value: Any, path: str = "", depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """The tensors in containers, closures and plain objects, with the way to each."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth == 0 or isinstance(value, type | types.ModuleType | torch.nn.Module):
        return
    inner: Iterator[tuple[str, Any]]
    if isinstance(value, dict):
        inner = (
            (f".{k}" if not path and isinstance(k, str) else f"[{k!r}]", v) for k, v in list(value.items())
        )
    elif isinstance(value, list | tuple | set | frozenset):
        inner = ((f"[{i}]", v) for i, v in enumerate(list(value)))
    elif isinstance(value, functools.partial):
        inner = ((f".args[{i}]", v) for i, v in enumerate((*value.args, *value.keywords.values())))
    elif isinstance(value, types.FunctionType):
        inner = ((f".{name}", v) for name, v in inspect.getclosurevars(value).nonlocals.items())
    elif hasattr(value, "__dict__") and not callable(value):
        inner = ((f".{name}", v) for name, v in list(vars(value).items()))
    else:
        return
    for step, v in inner:
        yield from tensors_in(v, path + step, depth - 1)


def held_by(functions: Sequence[type[Function]]) -> list[tuple[str, Tensor]]:
    """The tensors on these classes, and in the globals and closures that their methods name."""
    found: dict[str, Tensor] = {}
    for cls in functions:
        own = {
            k: v
            for c in cls.__mro__[:-1]
            if c.__module__ != "torch.autograd.function"
            for k, v in vars(c).items()
        }
        methods = [m for m in map(_plain_function, own.values()) if m is not None]
        plain = {k: v for k, v in own.items() if not k.startswith("__") and _plain_function(v) is None}
        found |= {f"{cls.__name__}{path}": t for path, t in tensors_in(plain)}
        for method in methods:
            for name, value in _named_by(method).items():
                held = vars(value) if isinstance(value, type) else value
                if isinstance(held, types.FunctionType):
                    continue
                found |= {
                    f"{name}{path}": t
                    for path, t in tensors_in(dict(held) if isinstance(value, type) else held)
                }
    return list(found.items())


def _plain_function(member: Any) -> types.FunctionType | None:
    member = getattr(member, "__func__", member)
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, types.FunctionType) else None


def _named_by(method: types.FunctionType) -> dict[str, Any]:
    """Globals and closed-over variables of a function, classes and containers among them."""
    code = method.__code__
    globals_ = {n: method.__globals__[n] for n in code.co_names if n in method.__globals__}
    cells = {}
    for name, cell in zip(code.co_freevars, method.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return {
        n: v
        for n, v in {**globals_, **cells}.items()
        if isinstance(v, Tensor | dict | list | tuple | set | type) or type(v).__module__ == method.__module__
    }
