"""How many points a probe visits.  It counts operations, not seconds, so a loaded machine visits the same points."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manualprop.verify._subject import Subject

# A unit is the cost of one operation: about 5 microseconds, and as much again for each 4000 numbers.
UNITS = 400_000.0
QUICK = 40_000.0  # at the level quick
LEAST = 8

T = TypeVar("T")


def affordable(s: Subject, points: Sequence[T], evaluations: int) -> list[T]:
    """As many of ``points`` as the budget allows, evenly spread; each costs ``evaluations`` runs of the function."""
    most = max(LEAST, int(budget(s) / (evaluations * work(s))))
    if len(points) <= most:
        return list(points)
    return [points[(k * len(points)) // most] for k in range(most)]


def budget(s: Subject) -> float:
    """Units for one probe."""
    return QUICK if s.quick else UNITS


def work(s: Subject) -> float:
    """The cost of one forward and one backward, in units.  A backward with loops may cost much more than its forward."""
    if "work" not in s._shared:
        with _Counting() as forward:
            leaves = s.at()
            outputs = s(*leaves)
        v = s.cotangents_for(outputs)  # drawn or remembered: that must not count
        with _Counting() as backward, contextlib.suppress(Exception):  # another probe's business
            s.pull_back(outputs, leaves, v)
        s._shared["work"] = max(1.0, forward.units + backward.units)
    found: float = s._shared["work"]
    return found


class _Counting(TorchDispatchMode):
    """Counts operations, and the entries of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        made = [t.numel() for t in _tensors((result,))]
        entries = sum(made) + sum(t.numel() for t in tensors)
        self.units += 1.0 + (entries + _product(func, tensors, max(made, default=0))) / 4000.0
        return result


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among what an operation takes or returns: alone or in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _product(func: Any, tensors: Sequence[Tensor], made: int) -> float:
    """The multiplications of a matrix product, at a tenth of their number, or of a convolution; else 0."""
    name: str = func.__name__
    if "conv" in name:
        weight = next((t for t in tensors[1:] if t.dim() > 2), None)
        most = max([made, *(t.numel() for t in tensors)])
        return 0.0 if weight is None else float(most * weight.numel() // max(1, weight.shape[0]))
    if any(word in name for word in ("mm", "matmul", "attention")) and tensors and tensors[-1].dim() > 1:
        return 0.1 * made * tensors[-1].shape[-2]
    return 0.0
