"""What is checked: a callable, where it is checked, and what is promised of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Case:
    """A differentiable callable at given inputs, and what its author declares of it.

    Args:
        fn: ``MyFunction.apply``, a module, or any callable of tensors.
        args: positional arguments.  Tensors that require grad are differentiated.  If none does and ``fn`` is a
            module, every floating one is.  A module's parameters always are.
        kwargs: keyword arguments, likewise.
        reference: a callable with the same arguments, differentiated by autograd, that is right by definition.
        declare: name of a probe or feature -> whether it is supported.  A limit that is declared is held against
            what is observed: unsupported and loud is then no finding, and supported after all is one.
        rtol: largest error of a gradient, relative to the gradient's largest entry, in float64.
        atol: largest absolute error.
        saved_bytes: the most bytes that may be kept for backward, parameters and inputs included, or None.
        name: what to call it in a report; by default the name of ``fn``.
        seed: of everything random.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    declare: Mapping[str, bool] = field(default_factory=dict)
    rtol: float = 1e-6
    atol: float = 1e-7
    saved_bytes: int | None = None
    name: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.fn):
            hint = " Give MyFunction.apply." if isinstance(self.fn, type) else ""
            raise TypeError(f"check: fn must be callable. Got {type(self.fn).__name__}.{hint}")
        if isinstance(self.fn, type) and issubclass(self.fn, torch.autograd.Function):
            raise TypeError(f"check: a Function is called by its apply. Give {self.fn.__name__}.apply.")
        if not self.name:
            object.__setattr__(self, "name", name_of(self.fn))


def name_of(fn: Callable[..., Any]) -> str:
    """A readable name: the Function's for ``MyFunction.apply``, the class of a module, else the callable's own."""
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner.__name__
    if isinstance(fn, torch.nn.Module):
        return type(fn).__name__
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return getattr(fn, "__qualname__", None) or type(fn).__name__
