"""How many points a probe visits: counted in work and not in seconds, so that a loaded machine sees the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manualprop.verify._subject import Subject

# A unit is what an operation takes: about 5 microseconds, and as much again for each 4000 numbers.
UNITS = 400_000.0
LEAST = 8

T = TypeVar("T")


def affordable(s: Subject, points: Sequence[T], evaluations: int) -> list[T]:
    """As many of ``points`` as the budget has, spread over all of them; each takes so many ``evaluations``."""
    most = max(LEAST, int(UNITS / (evaluations * work(s))))
    if len(points) <= most:
        return list(points)
    return [points[(k * len(points)) // most] for k in range(most)]


def work(s: Subject) -> float:
    """What one forward and one backward take, in units: a backward in loops takes much more than its forward."""
    if "work" not in s._shared:
        with _Counting() as counted:
            leaves = s.at()
            outputs = s(*leaves)
            with contextlib.suppress(Exception):  # whatever the checked code raises: another probe's business
                s.pull_back(outputs, leaves, s.cotangents_for(outputs))
        s._shared["work"] = max(1.0, counted.units)
    found: float = s._shared["work"]
    return found


class _Counting(TorchDispatchMode):
    """Counts operations, and the entries of what they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        entries = [t.numel() for t in (*tensors, *tree_leaves(result)) if isinstance(t, Tensor)]
        self.units += 1.0 + (sum(entries) + _product(func, tensors, result)) / 4000.0
        return result


def _product(func: Any, tensors: Sequence[Tensor], result: Any) -> float:
    """Multiplications of a matrix product, at a tenth of what another operation takes, or of a convolution."""
    name = str(func)
    made = max((t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)), default=0)
    if "conv" in name:
        weight = next((t for t in tensors[1:] if t.dim() > 2), None)
        most = max([made, *(t.numel() for t in tensors)])
        return 0.0 if weight is None else float(most * weight.numel() // max(1, weight.shape[0]))
    if any(word in name for word in ("mm", "matmul", "attention")) and tensors and tensors[-1].dim() > 1:
        return 0.1 * made * tensors[-1].shape[-2]
    return 0.0
