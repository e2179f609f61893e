"""What is checked: a callable, its inputs, and what its author says of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Project = Callable[[Tensor], Tensor]


class Around(Protocol):
    """A wrapper around the function: it takes a defect away, to see which findings remain."""

    def inward(self, given: Any) -> Any:
        """The arguments that the function gets instead of ``given``."""

    def outward(self, result: Any, reseed: Callable[[], None]) -> Any:
        """The result that the caller gets instead of ``result``."""


@dataclass(frozen=True, eq=False)
class Case:
    """A differentiable callable, its inputs, and what its author declares.

    Args:
        fn: ``MyFunction.apply``, a module, or any callable of tensors.
        args: positional arguments.  Tensors that require grad are differentiated.  If none does and ``fn`` is a
            module, every floating one is differentiated.  A module's parameters always are.
        kwargs: keyword arguments, likewise.
        reference: a callable of the same arguments that is right by definition.  Autograd differentiates it.
        declare: name of a probe or group -> True: it must be supported.  A limit there is a finding.
        accept: name of a probe or group -> the reason why its finding or limit stays.  Strict: an acceptance that
            nothing needs is a finding.
        surrogate: the function whose gradient backward returns, if that is not ``fn``: ``lambda x: x`` for a
            rounding with a straight-through gradient.  It takes the same arguments and returns the same shapes, and may
            detach: ``lambda x: x + (x.round() - x).detach()``.
        domain: a predicate of the arguments: whether ``fn`` is defined there.
        unique: names of integer arguments that never hold a value twice.
        project: maps a tensor to the nearest one that is allowed: positive, symmetric, sorted, of unit rows.  One
            function for every differentiated argument, or a mapping from argument names to functions.
        inputs: makes the positional arguments from sizes with defaults:
            ``lambda rows=4, columns=5: (torch.randn(rows, columns, requires_grad=True),)``.
        rtol: largest error of a gradient, relative to the gradient's largest entry, in float64.
        atol: largest absolute error.
        saved_bytes: the most bytes that may be kept for backward, parameters and inputs included, or None.
        name: in the report; by default the name of ``fn``.
        seed: of all random numbers.
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
    accept: Mapping[str, str] = field(default_factory=dict)
    surrogate: Callable[..., Any] | None = None
    domain: Callable[..., bool] | None = None
    unique: Sequence[str] = ()
    project: Project | Mapping[str, Project] | None = None
    inputs: Callable[..., Any] | None = None

    around: ClassVar[Around | None] = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            hint = " Give MyFunction.apply." if isinstance(self.fn, type) else ""
            raise TypeError(f"check: fn must be callable. Got {type(self.fn).__name__}.{hint}")
        if isinstance(self.fn, type) and issubclass(self.fn, torch.autograd.Function):
            raise TypeError(f"check: a Function is called by its apply. Give {self.fn.__name__}.apply.")
        if not self.name:
            object.__setattr__(self, "name", name_of(self.fn))
        if isinstance(self.unique, str):
            object.__setattr__(self, "unique", (self.unique,))
        for name, reason in self.accept.items():
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(
                    f"check: accept must say why. Got {name!r}: {reason!r}. Give accept={{{name!r}: 'the reason'}}."
                )
        if not all(self.declare.values()):
            name = next(name for name, value in self.declare.items() if not value)
            raise ValueError(
                f"check: declare says what must be supported. Got {name!r}: False. "
                f"Give accept={{{name!r}: 'the reason'}}."
            )
        if self.inputs is not None and not self.args:
            object.__setattr__(self, "args", self.made())

    def made(self, **sizes: int) -> tuple[Any, ...]:
        """The arguments that ``inputs`` makes for these sizes: the same ones each time."""
        assert self.inputs is not None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            made = self.inputs(**sizes)
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


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
