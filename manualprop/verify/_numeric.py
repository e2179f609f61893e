"""Derivatives by finite differences, with an estimate of their error.

    D(h) = (f(x + h d) - f(x - h d)) / 2h = f' + c2 h^2 + c4 h^4 + ...

Richardson: with h smaller by q each time, T[i][j] = (q^2j T[i][j-1] - T[i-1][j-1]) / (q^2j - 1) has no term h^2j left.
For each element the table's entry with the smallest error estimate is taken (Ridders 1982, "Accurate computation of
F'(x) and F'(x) F''(x)"): large h for rough functions, small h beside a kink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Evaluate = Callable[[float], Tensor]  # t -> f(x + t d), flat
RATIO = 4.0


class Estimate(NamedTuple):
    """A derivative and how far off it may be, elementwise."""

    value: Tensor
    error: Tensor


def steps(dtype: torch.dtype, levels: int) -> list[float]:
    """Step sizes for values of order one: from 1e-2 in float64, larger for fewer digits."""
    first = 1e-2 if dtype == torch.float64 else 0.25
    return [first / RATIO**i for i in range(levels)]


def derivative(
    evaluate: Evaluate,
    noise: float | Tensor,
    dtype: torch.dtype = torch.float64,
    first: float | None = None,
) -> Estimate:
    """d/dt of ``evaluate`` at 0, by extrapolated central differences.  Its values are uncertain by ``noise``.

    The largest step is ``first``, if given.
    """
    h = steps(dtype, 7) if first is None else [first / RATIO**k for k in range(4)]
    differences = ((_safe(evaluate, s) - _safe(evaluate, -s)) / (2 * s) for s in h)
    return _extrapolated(differences, 2, [noise / s for s in h])


def one_sided(
    evaluate: Evaluate, side: int, noise: float | Tensor, dtype: torch.dtype = torch.float64
) -> Estimate:
    """d/dt at 0 from above (``side`` = 1) or from below (-1)."""
    here = evaluate(0.0).detach()
    h = steps(dtype, 8)
    differences = ((_safe(evaluate, side * s) - here) / (side * s) for s in h)
    return _extrapolated(differences, 1, [2 * noise / s for s in h])


def staircase(evaluate: Evaluate, noise: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Where small steps find another slope than large ones, as bools.  Seen in large steps, a staircase is a ramp."""
    far = derivative(evaluate, noise, dtype)
    near = derivative(evaluate, noise, dtype, first=1e-5)
    return (far.value - near.value).abs() > 1e-3 + 10 * (far.error + near.error)


def noise(evaluate: Evaluate) -> float:
    """How far values of ``evaluate`` scatter about a smooth curve: its rounding, in any dtype that it uses inside."""
    each = noises(evaluate)
    each = each[torch.isfinite(each)]
    return float(each.max()) if each.numel() else 0.0


def noises(evaluate: Evaluate) -> Tensor:
    """The same for each entry of ``evaluate``; NaN for those that are not finite."""
    t = torch.arange(-4, 5, dtype=torch.float64)
    y = torch.stack([_safe(evaluate, 3e-8 * k) for k in t.tolist()])
    # Orthonormal polynomials of degree 0 to 2 on these points.  What they do not fit is noise.
    curve = torch.stack([torch.ones_like(t), t, t * t - (t * t).mean()], 1)
    curve = curve / curve.norm(dim=0)
    residual = (y - curve @ (curve.T @ y)).abs().amax(0) if y.numel() else y.sum(0)
    smallest = torch.finfo(torch.float64).eps * y.abs().amax(0)
    return torch.maximum(residual, smallest)


def _extrapolated(differences: Iterable[Tensor], power: int, floors: Sequence[float | Tensor]) -> Estimate:
    """The best entry of Richardson's table; the error has powers ``power``, 2 ``power``, ... of h.

    Noise limits each entry: ``floors`` are its errors for each step.  They grow as the step shrinks.  Once the next
    floor is above every error, no more ``differences`` are computed.
    """
    best: Estimate | None = None
    above: list[Tensor] = []
    for i, difference in enumerate(differences):
        if best is None:
            best, above = Estimate(difference, torch.full_like(difference, torch.inf)), [difference]
            continue
        row = [difference]
        for j in range(1, i + 1):
            factor = RATIO ** (power * j)
            row.append((factor * row[j - 1] - above[j - 1]) / (factor - 1))
        for j in range(i + 1):
            error = (row[j] - above[min(j, i - 1)]).abs()
            if j:
                error = torch.maximum(error, (row[j] - row[j - 1]).abs())
            error = error + floors[i]
            better = error < best.error  # False for NaN
            best = Estimate(torch.where(better, row[j], best.value), torch.where(better, error, best.error))
        above = row
        if i + 1 < len(floors) and bool((best.error <= floors[i + 1]).all()):
            break
    assert best is not None
    return best


def _safe(evaluate: Evaluate, t: float) -> Tensor:
    """NaN where the function is not defined: a logarithm's argument stepped below zero."""
    try:
        return evaluate(t).detach()
    except Exception:  # whatever the checked code raises: not defined there
        return torch.full_like(evaluate(0.0).detach(), torch.nan)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector of float64."""
    parts = [t.detach().reshape(-1).double() for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
