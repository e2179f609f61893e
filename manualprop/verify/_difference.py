"""Compare the tensors of two runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify._subject import Subject


class Difference(NamedTuple):
    """Where two runs differ most."""

    which: int  # of the tensors
    place: tuple[int, ...]
    found: float
    expected: float
    relative: float  # to the largest expected entry

    def __str__(self) -> str:
        at = f" at {list(self.place)}" if self.place else ""
        return f"{self.found:.6g} instead of {self.expected:.6g}{at}"


def tolerance(s: Subject) -> float:
    """By how much two runs may differ, relative to the largest entry, if they only sum in another order."""
    largest = max((_largest(y) for y in s.outputs), default=0.0)
    eps = max(torch.finfo(p.dtype).eps for p in s.points)
    return max(1e-9, 100 * eps, 100 * s.noise / largest if largest > 0 else 0.0)


def difference(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    rtol: float,
    scales: Sequence[float] | None = None,
    rough: Sequence[float] = (),
) -> Difference | None:
    """The largest difference beyond ``rtol`` times the larger of the largest entry and ``scales``, or None.

    ``rough`` allows each tensor an absolute error besides.  None counts as a gradient of zeros.  NaN agrees with NaN,
    and infinity with itself.
    """
    worst: Difference | None = None
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        like = b if b is not None else a
        if like is None or not like.numel():
            continue
        a, b = (torch.zeros_like(like) if t is None else t for t in (a, b))
        a, b = a.detach().double(), b.detach().double()
        if a.shape != b.shape:
            return Difference(i, (), float(a.numel()), float(b.numel()), torch.inf)
        scale = max(_largest(b), scales[i] if scales is not None else 0.0)
        off = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
        off = off.nan_to_num(torch.inf, torch.inf)
        at = int(off.argmax())
        relative = float(off.flatten()[at]) / scale if scale > 0 else torch.inf * float(off.flatten()[at] > 0)
        allowed = rough[i] if i < len(rough) else 0.0
        if (
            relative > rtol
            and float(off.flatten()[at]) > allowed
            and (worst is None or relative > worst.relative)
        ):
            place = tuple(int(k) for k in torch.unravel_index(torch.tensor(at), off.shape))
            worst = Difference(i, place, float(a.flatten()[at]), float(b.flatten()[at]), relative)
    return worst


def sizes(tensors: Sequence[Tensor | None]) -> list[float]:
    """The largest finite entry of each, 0 for a missing one."""
    return [0.0 if t is None else _largest(t) for t in tensors]


def _largest(t: Tensor) -> float:
    if not t.numel():
        return 0.0
    largest = float(t.detach().abs().max())
    if math.isfinite(largest):  # the usual case, kept quick
        return largest
    finite = t.detach()[torch.isfinite(t)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def listed(words: Sequence[str]) -> str:
    """Each once, in order: "a", "a or b", "a, b or c"."""
    unique = list(dict.fromkeys(words))
    return " or ".join([", ".join(unique[:-1]), unique[-1]]) if len(unique) > 1 else "".join(unique)
