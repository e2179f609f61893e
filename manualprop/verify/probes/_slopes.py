"""The slope by backward against the slope by differences, at one point and in one direction, wherever a probe goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._subject import Subject


class Slope(NamedTuple):
    """What backward and differences say of a direction."""

    hand: float
    numeric: float
    measured: bool  # whether differences tell it to better than a tenth
    wrong: bool


def slope(
    s: Subject, points: Sequence[Tensor], i: int, direction: Tensor, v: Sequence[Tensor | None]
) -> Slope:
    """Along ``direction`` of point ``i``, of the outputs weighed by ``v``; those at a kink are left out.

    A difference is looked at a second time, with steps as large as the entry itself: far out, or close to 0,
    other steps may miss the slope.
    """
    direction = s.tangent(i, direction, points)
    if not bool(direction.any()):
        return Slope(0.0, 0.0, measured=False, wrong=False)
    found = _slope(s, points, i, direction, v)
    if not found.wrong:
        return found
    entry = float(points[i].reshape(-1)[int(direction.abs().argmax())].abs())
    local = entry if 0 < entry < 1 else 1.0
    again = _slope(s, points, i, direction * (0.37 * local / float(direction.abs().max())), v)
    return found if again.wrong else found._replace(wrong=False, measured=again.measured)


def _slope(
    s: Subject, points: Sequence[Tensor], i: int, direction: Tensor, v: Sequence[Tensor | None]
) -> Slope:
    dtype = s.points[i].dtype
    evaluate = s.along([direction if j == i else None for j in range(len(points))], points)
    noise = _numeric.noises(evaluate).nan_to_num(torch.inf)
    estimate = _numeric.derivative(evaluate, noise, dtype)
    weights = _flat(v, s.outputs)
    found = _judged(s, points, i, direction, v, weights, estimate)
    if not found.wrong:
        return found
    above, below = (_numeric.one_sided(evaluate, side, noise, dtype) for side in (1, -1))
    jump = (above.value - below.value).abs()
    kinks = ~(jump <= 1e-6 * float(direction.abs().max()) + 4 * (above.error + below.error))
    kinks = kinks | _numeric.staircase(evaluate, noise, dtype)
    if not bool((kinks & (weights != 0)).any()):
        return found
    if not bool((~kinks & (weights != 0)).any()):
        return found._replace(measured=False, wrong=False)
    rest = (weights * ~kinks).split([y.numel() for y in s.outputs])
    w = [None if c is None else part.reshape(c.shape).to(c.dtype) for c, part in zip(v, rest, strict=True)]
    return _judged(s, points, i, direction, w, weights * ~kinks, estimate)


def _judged(
    s: Subject,
    points: Sequence[Tensor],
    i: int,
    direction: Tensor,
    v: Sequence[Tensor | None],
    weights: Tensor,
    estimate: _numeric.Estimate,
) -> Slope:
    g = s.linear_part(v, points)[i]
    parts = torch.zeros(1, dtype=torch.float64) if g is None else _numeric.flat([g * direction])
    hand = float(parts.sum())
    counted = weights != 0
    terms = (weights * estimate.value).where(counted, 0)
    numeric = float(terms.sum())
    doubt = float((weights.abs() * estimate.error).where(counted, 0).sum())
    reach = float(direction.abs().max())
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    # Rounding in backward: of terms as large as what arrives, which may cancel.
    rough = (s.case.atol + 64 * torch.finfo(s.points[i].dtype).eps * largest) * reach
    scale = float(terms.abs().sum()) + float(parts.abs().nan_to_num(0, 0, 0).sum())
    tolerance = rough + 10 * s.case.rtol * scale + 4 * doubt
    # Far out a step is large: what oscillates between two steps is not resolved by them.
    known = all(map(_finite, (numeric, doubt))) and 4 * doubt <= 0.1 * (min(reach, 1.0) + abs(numeric))
    return Slope(hand, numeric, known, known and not abs(hand - numeric) <= tolerance)


def _finite(number: float) -> bool:
    return number - number == 0


def _flat(v: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return _numeric.flat([torch.zeros_like(y) if c is None else c for c, y in zip(v, like, strict=True)])
