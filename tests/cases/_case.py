"""One row of the table that every test is derived from."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from manualprop import functional as F


@dataclass(frozen=True)
class Case:
    """One configuration of one function of :mod:`manualprop.functional`.

    - ``name``        the function's name, ours and torch's.
    - ``reference``   what torch does instead, if it has no function of that name: a composition of others.
    - ``arguments``   makes new positional arguments, in float64; a tensor to be differentiated requires a
                      gradient.  Use :func:`real`.
    - ``kwargs``      keyword arguments.
    - ``elementwise`` y = f(x) of one tensor: unlocks the tests of kinks, special values, sizes and layouts.
    - ``kinks``       {x: the derivative we choose there}.
    - ``keeps``       what backward may keep: indices of arguments, or ``"output"``.
    - ``keeps_new``   bytes (in float64) of more tensors that backward may keep.
    - ``label``       tells two rows of the same function apart, if ``kwargs`` do not.
    - ``by_name``     names of the last arguments, which are then given by keyword.
    - ``edges``       more arguments, like ``arguments``, where an input is infinite or at the edge of its
                      range but the value is finite.
    - ``another_form`` the reason why our value is computed in another way or order than torch's.  It then
                      equals torch's within some units in the last place, not to the bit.
    - ``exact``       f in as many digits as mpmath has, for the page of accuracy; or, in words, why there is
                      nothing to measure.
    - ``random``      whether it draws random numbers: the same seed is set before every call.
    - ``except_for``  {property: reason}: tests that cannot hold for this row, named by their function.
    """

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    elementwise: bool = False
    kinks: dict[float, float] = field(default_factory=dict)
    special: tuple[float, ...] = (0.0, -0.0, 1e-40, 1e-4, 20.0, -20.0, 89.0, -89.0, 1e4, -1e4)
    keeps: tuple[int | str, ...] = ()
    keeps_new: int = 0
    label: str = ""
    by_name: tuple[str, ...] = ()
    edges: tuple[Callable[[], tuple[Any, ...]], ...] = ()
    another_form: str = ""
    exact: Callable[[Any], Any] | str = ""
    random: bool = False
    reference: Callable[..., Any] | None = None
    except_for: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{k}={_short(v)}" for k, v in self.kwargs.items()]
        return "-".join([self.name, *([self.label] if self.label else []), *options])

    def __call__(self, *arguments: Any) -> Any:
        return self._seeded(getattr(F, self.name), arguments)

    def torchs(self, *arguments: Any) -> Any:
        """torch's own function, or the composition of its functions, on the same arguments."""
        return self._seeded(self.reference or getattr(torch_F, self.name), arguments)

    def _seeded(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self.random:
            torch.manual_seed(5)
        kwargs = {k: _like(v, arguments) for k, v in self.kwargs.items()}
        if kwargs.get("inplace"):  # a leaf cannot be overwritten
            arguments = (arguments[0].clone(), *arguments[1:])
        count = len(arguments) - len(self.by_name)
        return function(
            *arguments[:count], **dict(zip(self.by_name, arguments[count:], strict=True)), **kwargs
        )

    @property
    def can_be_in_place(self) -> bool:
        return "inplace" in inspect.signature(getattr(F, self.name)).parameters

    def made(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Any, ...]:
        """New arguments whose floating tensors have the given dtype."""
        return self.cast(self.arguments(), dtype, grad)

    def cast(self, arguments: tuple[Any, ...], dtype: torch.dtype, grad: bool = True) -> tuple[Any, ...]:
        """Arguments of the row whose floating tensors have the given dtype."""
        return tuple(_cast(a, dtype, grad) for a in arguments)

    def differentiable(self, arguments: tuple[Any, ...]) -> list[int]:
        """The positions of the arguments that require a gradient."""
        return [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]


def in_place(case: Case) -> Case:
    """The row of the in-place form; its reference is torch's ordinary form: its in-place one may raise."""
    torchs = case.reference or getattr(torch_F, case.name)
    (x, *_) = case.made()
    keeps_input = 0 in case.keeps  # the input is overwritten, so a copy is kept
    return replace(
        case,
        kwargs=case.kwargs | {"inplace": True},
        reference=lambda *arguments, inplace, **kwargs: torchs(*arguments, **kwargs),
        keeps=tuple(place for place in case.keeps if place != 0),
        keeps_new=case.keeps_new + (x.nbytes if keeps_input else 0),
    )


def real(
    *shape: int, low: float = -3.3, high: float = 3.7, grad: bool = True, seed: int = 0, distinct: bool = True
) -> Tensor:
    """A float64 tensor whose values are spread over [low, high] in a fixed, shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    values = torch.linspace(low, high, max(count, 2), dtype=torch.float64)[:count]
    if not distinct:
        values = values.round()
    return values[torch.randperm(count, generator=generator)].reshape(shape).requires_grad_(grad)


def _cast(a: Any, dtype: torch.dtype, grad: bool) -> Any:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    return a.detach().to(dtype).requires_grad_(a.requires_grad and grad)


def _like(value: Any, arguments: tuple[Any, ...]) -> Any:
    """A tensor option, such as class weights, in the dtype of the arguments; other options as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    dtypes = [a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    return value.to(dtypes[0]) if dtypes else value


def _short(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
