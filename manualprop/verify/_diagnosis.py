"""Say how a gradient is wrong: compare it with the numerical one, and with what usual mistakes would give.

H is the Jacobian by hand, N the numerical one.  Rows are cotangents, columns directions.  Each explanation
(_explanations) says what H would be.  The first that fits is reported; the simplest come first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._compare import Comparison, _only, compare
from manualprop.verify._explanations import EXPLANATIONS, Wrong
from manualprop.verify._subject import Subject

NONE = "no simple explanation"
MOST = 400  # entries of an input, or of the outputs, up to which the diagnosis uses the whole Jacobian


def explain(s: Subject, comparisons: Sequence[Comparison]) -> tuple[str, str, dict[str, Any]]:
    """Evidence, diagnosis and details for comparisons of which some are wrong."""
    wrong = [_masked(s, _whole(s, c), comparisons) for c in comparisons if c.wrong.any()]
    diagnoses = {w.name: _diagnosed(w) for w in wrong}
    distinct = list(dict.fromkeys(diagnoses.values()))
    if len(distinct) == 1:
        diagnosis = distinct[0]
    else:
        diagnosis = "; ".join(f"{name}: {text}" for name, text in diagnoses.items())
    right = [s.names[c.point] for c in comparisons if not c.wrong.any()]
    also = f" (right for {', '.join(right)})" if right else ""
    worst = [_worst(w) for w in wrong]
    evidence = f"wrong for {', '.join(w.name for w in wrong)}{also}; worst: {worst[0]['text']}"
    maps = {w.name: _heat_map(w) for w in wrong}
    return evidence, diagnosis, {"worst": worst, "heat_maps": maps}


def of_refused_shape(text: str, s: Subject) -> str:
    """The diagnosis from autograd's error about a gradient's shape."""
    shapes = re.search(r"got \[([\d, ]*)\] but expected shape compatible with \[([\d, ]*)\]", text)
    if shapes is None:
        return ""
    got, expected = ([int(n) for n in group.split(",") if n.strip()] for group in shapes.groups())
    if got == expected[::-1]:
        return "transposed"
    if sorted(got) == sorted(expected):
        return "transposed: its dimensions are permuted"
    if [n for n in got if n != 1] == [n for n in expected if n != 1]:
        return f"an axis of length 1 too {'many' if len(got) > len(expected) else 'few'}"
    left = [n for n in expected if n != 1]
    outputs = list(zip(s.output_names, s.outputs, strict=True))
    for name, y in outputs:
        if math.prod(got) > math.prod(expected) and _left_of(y.shape, got) and _left_of(got, left):
            return f"missing sum over a dimension of {name}"
    owners = [name for name, p in zip(s.names, s.points, strict=True) if list(p.shape) == got]
    if owners:
        return f"exchanged: {got} is the shape of {' and '.join(owners)}"
    for name, y in outputs:
        if _left_of(y.shape, got) and _left_of(y.shape, left):
            return f"summed over other dimensions of {name} than it should be"
    return f"gradient of shape {got} for an input of shape {expected}"


def _left_of(shape: Sequence[int], some: Sequence[int]) -> bool:
    """Whether dropping dimensions of ``shape`` leaves ``some``."""
    rest = iter(shape)
    return all(n in rest for n in some)


def _whole(s: Subject, c: Comparison) -> Comparison:
    """The comparison with unit vectors on both sides, if it is affordable and shows the error too."""
    m, n = c.cotangents.shape[1], c.directions.shape[1]
    if c.whole or max(m, n) > MOST or getattr(s, "base", None) is not None:
        return c
    other = s.with_points(s.points)
    other.whole = MOST
    entire = compare(other, only=c.point)[0]
    return entire if entire.wrong.any() else c


def _masked(s: Subject, c: Comparison, comparisons: Sequence[Comparison]) -> Wrong:
    return Wrong(s, c, comparisons, c.hand.where(c.measured, 0), c.numeric.where(c.measured, 0))


def _diagnosed(w: Wrong) -> str:
    if not torch.isfinite(w.hand).all():
        share = (~torch.isfinite(w.hand)).double().mean().item()
        return f"not finite (NaN or infinite) in {share:.0%} of the entries"
    for explanation in () if w.negligible else EXPLANATIONS:
        text = explanation(w)
        if text:
            return text
    return NONE


# ----- the worst element -----


def _worst(w: Wrong) -> dict[str, Any]:
    """Where the error is largest, with its values and the nearest kink."""
    error = (w.c.hand - w.c.numeric).abs().nan_to_num(torch.inf).where(w.c.wrong, -1)
    v, d = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    hand, numeric = w.c.hand[v, d].item(), w.c.numeric[v, d].item()
    row, column = w.c.cotangents[v], w.c.directions[d]
    found: dict[str, Any] = {"input": w.name, "hand": hand, "numeric": numeric}
    text = f"by hand {hand:.6g}, numerically {numeric:.6g}"
    if int((column != 0).sum()) != 1:
        return {**found, "text": f"{text} in a random direction of {w.name}"}
    index = [int(i) for i in torch.unravel_index(column.argmax(), w.point.shape)] if w.point.dim() else []
    value = w.point[tuple(index)].item()
    found |= {"index": index, "value": value}
    text = f"d output / d {w.name}{index} at {value:.4g}: {text}"
    if int((row != 0).sum()) == 1:
        found["output"] = int(row.argmax())
    kink = _nearest_kink(w, column, value)
    if kink is not None:
        found["kink"] = kink
        text += f"; nearest kink at {kink:.4g}"
    return {**found, "text": text}


def _nearest_kink(w: Wrong, column: Tensor, value: float) -> float | None:
    """The nearest place where the slope jumps, or None.  It looks as far as the entry is large, at least 1."""
    evaluate = _only(w.s, w.c.point, column)
    reach = max(1.0, abs(value))
    t = torch.linspace(-reach, reach, 65, dtype=torch.float64)
    try:
        y = torch.stack([evaluate(float(k)) for k in t])
    except Exception:  # outside of the function's domain
        return None
    slope = (y[1:] - y[:-1]) / (t[1] - t[0])
    jump = (slope[1:] - slope[:-1]).abs().amax(1)
    if not bool(torch.isfinite(jump).all()) or jump.max() < 1e-6:
        return None
    sharp = (jump > 20 * jump.median() + 1e-6).nonzero().flatten()
    if not len(sharp):
        return None
    near = int(sharp[t[sharp + 1].abs().argmin()])
    at = _refined(evaluate, float(t[near]), float(t[near + 2]))
    return round(value + at, 6) + 0.0


def _refined(evaluate: _numeric.Evaluate, low: float, high: float) -> float:
    """The kink between ``low`` and ``high``: the largest second difference, in a smaller interval each time."""
    for _ in range(6):
        t = torch.linspace(low, high, 9, dtype=torch.float64)
        y = torch.stack([evaluate(float(k)) for k in t])
        bend = (y[2:] - 2 * y[1:-1] + y[:-2]).abs().amax(1)
        i = int(bend.argmax())
        low, high = float(t[i]), float(t[i + 2])
    return (low + high) / 2


def _heat_map(w: Wrong, most: int = 128) -> dict[str, Any]:
    """|hand - numeric|, the part that a page can show."""
    error = (w.c.hand - w.c.numeric).abs()[:most, :most]
    rounded = [[float(f"{e:.3g}") if math.isfinite(e) else None for e in row] for row in error.tolist()]
    return {
        "error": rounded,
        "shape": list(w.point.shape),
        "rows": "entries of the outputs" if w.c.whole else "cotangents",
        "columns": f"entries of {w.name}" if w.c.whole else f"directions in {w.name}",
    }
