"""Say how a gradient is wrong: hold it against the numerical one, and against what usual mistakes would give.

H is the Jacobian by hand, N the numerical one, both seen through cotangents (rows) and directions (columns).  Each
explanation below says what H would then be; the first that fits is named, the simplest first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._compare import Comparison, _only, compare
from manualprop.verify._random import generator, normal
from manualprop.verify._subject import Subject

NONE = "no simple explanation"
MOST = 400  # entries of an input, and of the outputs, up to which the whole Jacobian is had for the diagnosis
FIT = 1e-5  # of the largest entry: how closely an explanation must fit


class Wrong(NamedTuple):
    """One input's wrong Jacobian, with what cannot be judged (kinks, infinities) masked out."""

    s: Subject
    c: Comparison
    all: Sequence[Comparison]
    hand: Tensor
    numeric: Tensor

    @property
    def name(self) -> str:
        return self.s.names[self.c.point]

    @property
    def point(self) -> Tensor:
        return self.s.points[self.c.point]

    def fits(self, hand: Tensor, explained: Tensor) -> bool:
        """Whether ``explained`` accounts for what the hand gave."""
        scale = max(hand.abs().max().item(), explained.abs().max().item()) if hand.numel() else 0.0
        return bool(((hand - explained).abs() <= FIT * scale + self.c.tolerance).all())


def explain(s: Subject, comparisons: Sequence[Comparison]) -> tuple[str, str, dict[str, Any]]:
    """Evidence, diagnosis and details of a comparison in which something is wrong."""
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


def of_refused_shape(text: str) -> str:
    """What autograd's complaint about a gradient's shape tells."""
    shapes = re.search(r"got \[([\d, ]*)\] but expected shape compatible with \[([\d, ]*)\]", text)
    if shapes is None:
        return ""
    got, expected = ([int(n) for n in group.split(",") if n.strip()] for group in shapes.groups())
    if got == expected[::-1]:
        return "transposed"
    if sorted(got) == sorted(expected):
        return "transposed: its dimensions are permuted"
    if len(got) >= len(expected) and math.prod(got) > math.prod(expected):
        return "missing sum over a broadcast dimension"
    return f"gradient of shape {got} for an input of shape {expected}: exchanged with another's?"


def _whole(s: Subject, c: Comparison) -> Comparison:
    """The comparison with unit vectors on both sides, if that can be had and shows the error too."""
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
    for explanation in EXPLANATIONS:
        text = explanation(w)
        if text:
            return text
    return NONE


# ----- explanations, the simplest first; each returns a sentence or nothing -----


def _zero(w: Wrong) -> str:
    if w.hand.abs().max() > 0:
        return ""
    given = w.s.gradients()[w.c.point]
    return (
        "zero: no gradient at all (None is returned, or nothing requires grad)" if given is None else "zero"
    )


def _exchanged(w: Wrong) -> str:
    for other in w.all:
        if other.point == w.c.point or w.s.points[other.point].shape != w.point.shape:
            continue
        if not other.wrong.any():
            continue  # the same gradient twice is no exchange
        if other.numeric.shape == w.hand.shape and w.fits(w.hand, other.numeric):
            return f"exchanged: this is the gradient of {w.s.names[other.point]}"
    return ""


def _constant(w: Wrong) -> str:
    c = _ratio(w.hand, w.numeric)
    if c is None or not w.fits(w.hand, c * w.numeric):
        return ""
    return f"constant factor {_number(c)}{_meaning(c, w)} (in all paths)"


def _ratio(hand: Tensor, numeric: Tensor) -> float | None:
    """The c for which hand - c numeric is smallest."""
    norm = (numeric * numeric).sum().item()
    return (hand * numeric).sum().item() / norm if norm else None


def _number(c: float) -> str:
    simple = Fraction(c).limit_denominator(1000)
    if abs(float(simple) - c) <= 1e-6 * abs(c) and simple.denominator <= 64:
        return str(simple)
    return f"{c:.6g}"


def _meaning(c: float, w: Wrong) -> str:
    """What a constant factor usually comes from."""
    if abs(c + 1) < 1e-5:
        return ": wrong sign"
    sign = ", and wrong sign" if c < 0 else ""
    size = abs(c)
    broadcast = {
        y.numel() // w.point.numel()
        for y in w.s.outputs
        if w.point.numel() and y.numel() % w.point.numel() == 0
    }
    for n in sorted(broadcast - {1}):
        if abs(size * n - 1) < 1e-5:
            return f" = 1/{n}: mean for sum over a broadcast dimension?{sign}"
        if abs(size - n) < 1e-5 * n and n > 2:
            return f": sum for mean, or summed {n} times?{sign}"
    if abs(size - 2) < 1e-5:
        return f": doubled, accumulated twice?{sign}"
    if abs(size - 0.5) < 1e-5:
        return f": half, a factor 2 missing?{sign}"
    for n, what in _sizes(w):
        if abs(size * n - 1) < 1e-5:
            return f" = 1/{n}: a mean's divisor? ({what} is {n}){sign}"
        if abs(size - n) < 1e-5 * n:
            return f": a mean's divisor missing? ({what} is {n}){sign}"
    return sign


def _sizes(w: Wrong) -> Iterator[tuple[int, str]]:
    """Every length and number of entries above 2, with its name."""
    tensors = [
        *zip(w.s.names, w.s.points, strict=True),
        *((f"output {i}", y) for i, y in enumerate(w.s.outputs)),
    ]
    for name, t in tensors:
        yield from ((n, f"the length of dim {d} of {name}") for d, n in enumerate(t.shape) if n > 2)
        if t.numel() > 2:
            yield t.numel(), f"the number of entries of {name}"


def _ignores_grad_output(w: Wrong) -> str:
    """H (1) = N (1) though rows are wrong: only the sum of the outputs was thought of."""
    s, i = w.s, w.c.point
    ones = s.gradients(cotangents=[torch.ones_like(y) for y in s.outputs])[i]
    others = s.gradients(cotangents=s.random_like(s.outputs, 3))[i]
    if ones is None or others is None:
        return ""
    if torch.equal(ones, others):
        return "grad_output is ignored: right at most for a grad_output of ones"
    if not w.c.whole:
        return ""
    good = (_numeric.flat([ones]) - w.numeric.sum(0)).abs() <= FIT * w.numeric.abs().sum(
        0
    ).max() + w.c.tolerance.sum(0)
    return "right only for a grad_output of ones" if bool((good | w.c.kinks.any(0)).all()) else ""


def _transposed(w: Wrong) -> str:
    if w.point.dim() < 2 or not w.c.whole:
        return ""
    for a in range(w.point.dim()):
        for b in range(a + 1, w.point.dim()):
            if w.point.shape[a] != w.point.shape[b] or w.point.shape[a] == 1:
                continue
            order = torch.arange(w.point.numel()).reshape(w.point.shape).transpose(a, b).reshape(-1)
            explained = w.numeric[:, order]
            c = _ratio(w.hand, explained)
            if c is not None and w.fits(w.hand, c * explained):
                factor = "" if abs(c - 1) < 1e-5 else f", with constant factor {_number(c)}"
                return f"transposed in dims {a} and {b}{factor}"
    return ""


def _missing_sum(w: Wrong) -> str:
    """Rows of H are those of N for some entries of the output, and zeros for the others."""
    if not w.c.whole:
        return ""
    tolerance = FIT * w.numeric.abs().max() + w.c.tolerance
    right = ((w.hand - w.numeric).abs() <= tolerance).all(1)
    dropped = (w.hand.abs() <= tolerance).all(1) & ~right
    if not bool((right | dropped).all()) or not bool(dropped.any()):
        return ""
    counted = right & (w.numeric.abs() > tolerance).any(1)
    offset = 0
    for k, y in enumerate(w.s.outputs):
        rows = slice(offset, offset + y.numel())
        offset += y.numel()
        if len(w.s.outputs) > 1 and bool(dropped[rows].all()):
            return f"one path of a sum is missing: what comes through output {k}"
        where = counted[rows].reshape(y.shape)
        lost = dropped[rows].reshape(y.shape)
        for d in range(y.dim()):
            others = [e for e in range(y.dim()) if e != d]
            kept = where.any(others) if others else where
            gone = lost.all(others) if others else lost
            if bool((kept ^ gone).all()) and bool(kept.any()) and bool(gone.any()):
                at = kept.nonzero().flatten().tolist()
                which = f"index {at[0]}" if len(at) == 1 else f"{len(at)} of {y.shape[d]} indices"
                return f"missing sum over dim {d} of output {k}: only {which} of it is counted"
    share = dropped.double().mean().item()
    return f"missing sum: {share:.0%} of the output's entries send nothing back"


def _one_output(w: Wrong) -> str:
    """Wrong only in what comes through some of several outputs."""
    if len(w.s.outputs) < 2:
        return ""
    bad = w.c.wrong.any(1)
    parts = bad.split([y.numel() for y in w.s.outputs]) if w.c.whole else []
    hit = [k for k, part in enumerate(parts) if bool(part.any())]
    if not hit or len(hit) == len(w.s.outputs):
        return ""
    rows = torch.cat([torch.full((y.numel(),), k in hit) for k, y in enumerate(w.s.outputs)])
    c = _ratio(w.hand[rows], w.numeric[rows])
    inner = w.numeric * rows.unsqueeze(1)
    zero = not bool(w.hand[rows].abs().max() > 0)
    factor = ""
    if zero:
        factor = ", which is missing"
    elif c is not None and w.fits(w.hand * rows.unsqueeze(1), c * inner):
        factor = f", by a constant factor {_number(c)}{_meaning(c, w)}"
    return f"one path of a sum is wrong: what comes through output {', '.join(map(str, hit))}{factor}"


def _elsewhere(w: Wrong) -> str:
    """H is the derivative at another point: a saved tensor was overwritten, or is of another call."""
    if not w.c.whole or getattr(w.s, "base", None) is not None:
        return ""
    direction = normal((w.c.directions.shape[1],), generator("elsewhere"))
    by_hand = w.hand @ direction
    for what, points in _other_points(w.s):
        try:
            there = _numeric.derivative(
                _only(w.s.with_points(points), w.c.point, direction), w.s.noise, w.point.dtype
            )
        except Exception:  # the function may not be defined there
            continue
        explained = w.c.cotangents @ there.value
        close = FIT * by_hand.abs().max() + 4 * there.error.max() + w.c.tolerance.max()
        if bool(((by_hand - explained).abs() <= close).all()):
            return f"overwritten or stale saved tensor: this is the gradient at {what}"
    return ""


def _other_points(s: Subject) -> Iterator[tuple[str, list[Tensor]]]:
    def replaced(i: int, value: Tensor) -> list[Tensor]:
        return [value.clone() if j == i else p for j, p in enumerate(s.points)]

    for i, (name, p) in enumerate(zip(s.names, s.points, strict=True)):
        for k, y in enumerate(s.outputs):
            if y.shape == p.shape:
                yield f"{name} = output {k}", replaced(i, y)
        for j, q in enumerate(s.points):
            if j != i and q.shape == p.shape:
                yield f"{name} = {s.names[j]}", replaced(i, q)
        yield f"{name} = 0", replaced(i, torch.zeros_like(p))
        yield f"{name} = 1", replaced(i, torch.ones_like(p))
        yield f"{name} = |{name}|", replaced(i, p.abs())
        yield f"{name} = 2 {name}", replaced(i, 2 * p)


def _part(w: Wrong) -> str:
    """Wrong in some entries of the input, right in the others."""
    if not w.c.whole:
        return ""
    bad = w.c.wrong.any(0)
    share = bad.double().mean().item()
    if share > 0.9:
        return ""
    x = _numeric.flat([w.point])
    where = _where(bad, x, w.point.shape)
    c = _ratio(w.hand[:, bad], w.numeric[:, bad])
    explained = w.numeric.clone()
    how = ""
    if not bool(w.hand[:, bad].abs().max() > 0):
        how = "zero"
    elif c is not None:
        explained[:, bad] *= c
        how = f"constant factor {_number(c)}{_meaning(c, w)}" if w.fits(w.hand, explained) else ""
    return f"only in {share:.0%} of the entries of {w.name}, {where}" + (f": {how} there" if how else "")


def _where(bad: Tensor, x: Tensor, shape: torch.Size) -> str:
    """A condition that tells the wrong entries from the right ones."""
    good = ~bad
    for text, condition in (
        ("where it is negative", x < 0),
        ("where it is positive", x > 0),
        ("where it is 0", x == 0),
    ):
        if torch.equal(condition, bad):
            return text
    if bool(good.any()) and x[bad].min() > x[good].max():
        return f"where it is above {x[good].max().item():.4g}"
    if bool(good.any()) and x[bad].max() < x[good].min():
        return f"where it is below {x[good].min().item():.4g}"
    shaped = bad.reshape(shape)
    for d in range(len(shape)):
        others = [e for e in range(len(shape)) if e != d]
        some = shaped.any(others) if others else shaped
        every = shaped.all(others) if others else shaped
        if torch.equal(some, every):
            at = some.nonzero().flatten().tolist()
            return f"at {at[:6]} of dim {d}"
    index = [int(i) for i in torch.unravel_index(bad.nonzero()[0, 0], shape)] if shape else []
    return f"as at {index}"


def _one_path(w: Wrong) -> str:
    """The Jacobian is a sum of paths, of which one is wrong: D = H - N is that path, scaled."""
    if not w.c.whole:
        return ""
    n, d = w.numeric, w.hand - w.numeric
    if n.shape[0] == n.shape[1]:
        eye = torch.eye(len(n), dtype=n.dtype)
        direct, coupling = n * eye, n * (1 - eye)
        for what, path in (
            ("the identity (a residual connection)", eye),
            ("all but the identity (the block beside a residual connection)", n - eye),
            ("the direct one, of each output to its own input", direct),
            ("the coupling between entries (through a sum, a mean or a norm)", coupling),
        ):
            c = _ratio(d, path)
            if c is not None and abs(c) > 1e-6 and w.fits(d, c * path):
                return f"one path of a sum is wrong, {what}: {_path_factor(c)}; the rest is right"
    rank, full = _rank(d, w), max(_rank(n, w), _rank(w.hand, w))
    if 0 < rank < full and 3 * rank <= 2 * full:
        return (
            f"one path of a sum is wrong: the error has rank {rank} where the Jacobian has {full}, as a missing or "
            "extra term that goes through a sum, a mean or a norm has"
        )
    return ""


def _path_factor(c: float) -> str:
    return "it is missing" if abs(c + 1) < 1e-5 else f"constant factor {_number(1 + c)} in it"


def _rank(m: Tensor, w: Wrong) -> int:
    values = torch.linalg.svdvals(m)
    return int(
        (values > max(FIT * values.max().item(), w.c.tolerance.max().item() * math.sqrt(m.numel()))).sum()
    )


def _own_factors(w: Wrong) -> str:
    """H = N with a factor for each entry of the input, or of the output."""
    if not w.c.whole:
        return ""
    for what, dim, tensors in (
        ("input", 0, [(n, p) for n, p in zip(w.s.names, w.s.points, strict=True)]),
        ("output", 1, [(f"output {k}", y) for k, y in enumerate(w.s.outputs)]),
    ):
        norm = (w.numeric * w.numeric).sum(dim, keepdim=True)
        factors = (w.hand * w.numeric).sum(dim, keepdim=True) / norm.where(norm > 0, 1)
        if not w.fits(w.hand, factors * w.numeric):
            continue
        used = factors[norm > 0]
        for name, t in (*tensors, *((f"output {k}", y) for k, y in enumerate(w.s.outputs))):
            extra = _numeric.flat([t])
            if extra.numel() != factors.numel():
                continue
            for text, value in ((f"{name}", extra), (f"1 / {name}", 1 / extra), (f"{name}^2", extra * extra)):
                c = _ratio(factors.reshape(-1), value) if bool(torch.isfinite(value).all()) else None
                if c is not None and bool(
                    ((factors.reshape(-1) - c * value).abs() <= 1e-4 * factors.abs().max()).all()
                ):
                    return f"an extra factor {'' if abs(c - 1) < 1e-4 else _number(c) + ' '}{text}"
        return (
            f"a factor of its own for each entry of the {what}, from {used.min().item():.4g} to {used.max().item():.4g}: "
            "one path of a sum inside the formula, or a wrong formula"
        )
    return ""


EXPLANATIONS: tuple[Callable[[Wrong], str], ...] = (
    _zero,
    _exchanged,
    _constant,
    _ignores_grad_output,
    _transposed,
    _one_output,
    _missing_sum,
    _part,
    _one_path,
    _elsewhere,
    _own_factors,
)


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
    """Where, within 1 of the entry, the slope jumps: the nearest such place, or None."""
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
    """The kink between ``low`` and ``high``: where the second difference is largest, closer each time."""
    for _ in range(6):
        t = torch.linspace(low, high, 9, dtype=torch.float64)
        y = torch.stack([evaluate(float(k)) for k in t])
        bend = (y[2:] - 2 * y[1:-1] + y[:-2]).abs().amax(1)
        i = int(bend.argmax())
        low, high = float(t[i]), float(t[i + 2])
    return (low + high) / 2


def _heat_map(w: Wrong, most: int = 128) -> dict[str, Any]:
    """|hand - numeric|, as far as a page can show it."""
    error = (w.c.hand - w.c.numeric).abs()[:most, :most]
    rounded = [[float(f"{e:.3g}") if math.isfinite(e) else None for e in row] for row in error.tolist()]
    return {
        "error": rounded,
        "shape": list(w.point.shape),
        "rows": "entries of the outputs" if w.c.whole else "cotangents",
        "columns": f"entries of {w.name}" if w.c.whole else f"directions in {w.name}",
    }
