"""The two tables: functions with one known defect each, and right ones of the same kinds."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Inputs:
    """A source of inputs: the same ones each time it is made."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).requires_grad_(grad)

    def positive(self, *shape: int, grad: bool = True) -> Tensor:
        """Uniform in [0.5, 1.5)."""
        value = torch.rand(shape, dtype=torch.float64, generator=self.generator) + 0.5
        return value.requires_grad_(grad)

    def index(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class Call:
    """What is given to ``check``, and beside it the same function without a defect."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    truth: Callable[..., Any] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return tensors(self.fn(*self.args, **self.kwargs))

    def wanted(self) -> list[Tensor]:
        """The inputs to be differentiated: arguments, and the parameters of a module."""
        parameters = list(self.fn.parameters()) if isinstance(self.fn, nn.Module) else []
        given = tensors((*self.args, *self.kwargs.values()))
        return [t for t in given if t.requires_grad] + [p for p in parameters if p.requires_grad]

    def gradients(self, seed: int = 1) -> list[Tensor]:
        """The gradient of a random weighting of the outputs, zeros where there is none."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for y in self():
            if y.is_floating_point() and y.requires_grad:
                weights = torch.randn(y.shape, dtype=torch.float64, generator=generator)
                total = total + (y.double() * weights).sum()
        return list(torch.autograd.grad(total, self.wanted(), allow_unused=True, materialize_grads=True))


def tensors(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, dict):
        value = tuple(value.values())
    return sum((tensors(v) for v in value), ()) if isinstance(value, tuple | list) else ()


def raises(attempt: Callable[[], Any]) -> bool:
    """Does it raise anything?"""
    try:
        attempt()
    except Exception:
        return True
    return False


@dataclass(frozen=True)
class Defect:
    """A function with one known defect.

    Attributes:
        name: What is wrong, in snake case.
        make: Gives the call, afresh.
        probes: The probes that may report it, the right one first.
        says: What the diagnosis must say, a regular expression; None where nothing is asked.
        options: Further arguments of ``check``.
        truth: The same function without the defect.  Alone: the gradients must differ from its.  Beside ``shows``:
            they must agree, because the defect is elsewhere.
        shows: Is the defect seen by hand?
        also: The probes that find a second defect in it, which would be there without the first.
    """

    name: str
    make: Callable[[], Call]
    probes: tuple[str, ...]
    says: str | None
    options: dict[str, Any]
    truth: Callable[..., Any] | None
    shows: Callable[[Call], bool] | None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """A right function, and the probes that it is likeliest to set off falsely."""

    name: str
    make: Callable[[], Call]
    tempts: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Fresh:
    """A module that is made anew for each call; a class of modules does without it."""

    make: Callable[[], nn.Module]


DEFECTS: list[Defect] = []
CONTROLS: list[Control] = []


def _name(thing: Any) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", thing.__name__).lower()


def _maker(
    thing: Any,
    args: Callable[[Inputs], tuple[Any, ...]],
    kwargs: dict[str, Any],
    truth: Callable[..., Any] | None = None,
) -> Callable[[], Call]:
    def make() -> Call:
        fn = thing
        if isinstance(thing, type) and issubclass(thing, Function):
            fn = thing.apply
        elif isinstance(thing, Fresh) or (isinstance(thing, type) and issubclass(thing, nn.Module)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                fn = (thing.make if isinstance(thing, Fresh) else thing)().double()
        return Call(fn, args(Inputs()), kwargs, truth)

    return make


def defect(
    *probes: str,
    args: Callable[[Inputs], tuple[Any, ...]],
    kwargs: dict[str, Any] | None = None,
    says: str | None = None,
    truth: Callable[..., Any] | None = None,
    shows: Callable[[Call], bool] | None = None,
    also: tuple[str, ...] = (),
    **options: Any,
) -> Callable[[Any], Any]:
    """Enter a Function, a module class or a callable into the table of defects."""

    def enter(thing: Any) -> Any:
        make = _maker(thing, args, kwargs or {}, truth)
        DEFECTS.append(Defect(_name(thing), make, probes, says, options, truth, shows, also))
        return thing

    return enter


def control(
    *tempts: str,
    args: Callable[[Inputs], tuple[Any, ...]],
    kwargs: dict[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> Callable[[Any], Any]:
    """Enter a Function, a module class or a callable into the table of controls."""

    def enter(thing: Any) -> Any:
        CONTROLS.append(Control(name or _name(thing), _maker(thing, args, kwargs or {}), tempts, options))
        return thing

    return enter
