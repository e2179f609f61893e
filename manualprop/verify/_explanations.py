"""Usual mistakes: each explanation says what the Jacobian by hand would be.

H is the Jacobian by hand, N the numerical one.  Rows are cotangents, columns directions.  The first explanation that
fits to rounding is reported, and the simplest come first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._compare import Comparison, _only, compare, ratio_of
from manualprop.verify._random import generator, normal
from manualprop.verify._subject import Subject

MISSING = "zero: no gradient at all"
FIT = 2e-6  # of the largest entry: how closely an explanation must fit


class Wrong(NamedTuple):
    """One input's wrong Jacobian.  Entries that cannot be judged (kinks, infinities) are 0."""

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
        """Whether ``explained`` agrees with the Jacobian by hand."""
        scale = max(hand.abs().max().item(), explained.abs().max().item()) if hand.numel() else 0.0
        return bool(((hand - explained).abs() <= FIT * scale + self.c.tolerance).all())

    @property
    def negligible(self) -> bool:
        """Whether the error is hardly above the tolerance: then every explanation would fit."""
        beyond = ((self.hand - self.numeric).abs() / self.c.tolerance).where(self.c.wrong, 0)
        return not bool((beyond > 8).any())


# ----- explanations, the simplest first: each returns a sentence or nothing -----


def _zero(w: Wrong) -> str:
    if w.hand.abs().max() > 0:
        return ""
    given = w.s.gradients()[w.c.point]
    return f"{MISSING} (None is returned, or nothing requires grad)" if given is None else "zero"


def _exchanged(w: Wrong) -> str:
    for other in w.all:
        if other.point == w.c.point or w.s.points[other.point].shape != w.point.shape:
            continue
        if not other.wrong.any():
            continue  # two equal gradients are not exchanged
        if other.numeric.shape == w.hand.shape and w.fits(w.hand, other.numeric):
            return f"exchanged: this is the gradient of {w.s.names[other.point]}"
    return ""


def _constant(w: Wrong) -> str:
    c = ratio_of(w.hand, w.numeric)
    if c is None or not w.fits(w.hand, c * w.numeric):
        return ""
    return f"constant factor {_number(c)}{_meaning(c, w)} (in all paths)"


def _number(c: float) -> str:
    simple = Fraction(c).limit_denominator(1000)
    if abs(float(simple) - c) <= 1e-6 * abs(c) and simple.denominator <= 64:
        return str(simple)
    return f"{c:.6g}"


def _meaning(c: float, w: Wrong) -> str:
    """The usual origin of a constant factor."""
    if abs(c + 1) < 1e-5:
        return ": wrong sign"
    sign = ", and wrong sign" if c < 0 else ""
    size = abs(c)
    broadcast = {
        y.numel() // w.point.numel()
        for y in w.s.outputs
        if w.point.numel() and y.numel() % w.point.numel() == 0
    }
    if abs(size - 2) < 1e-5:
        pair = _reduced_pair(w)
        return f": doubled, accumulated twice{f', or a sum for a mean over {pair}' if pair else ''}?{sign}"
    if abs(size - 0.5) < 1e-5:
        pair = _reduced_pair(w)
        return f": half, a factor 2 missing{f', or a mean for a sum over {pair}' if pair else ''}?{sign}"
    for n in sorted(broadcast - {1}):
        if abs(size * n - 1) < 1e-5:
            return f"{_as_share(c, n)}: mean for sum over a broadcast dimension?{sign}"
        if abs(size - n) < 1e-5 * n:
            return f": sum for mean, or summed {n} times?{sign}"
    for n, what in _sizes(w):
        if abs(size * n - 1) < 1e-5:
            return f"{_as_share(c, n)}: a mean's divisor? ({what} is {n}){sign}"
        if abs(size - n) < 1e-5 * n:
            return f": a mean's divisor missing? ({what} is {n}){sign}"
    return sign


def _reduced_pair(w: Wrong) -> str:
    """An axis of length 2, or pairs along an axis, over which the gradient or forward sums; nothing if there is none."""
    for name, y in zip(w.s.output_names, w.s.outputs, strict=True):
        for d in _unmatched(y.shape, w.point.shape):
            if y.shape[d] == 2:
                return f"dim {d} of {name}, of length 2"
            if y.dim() == w.point.dim() and y.shape[d] == 2 * w.point.shape[d]:
                return f"pairs along dim {d} of {name}"
        for d in _unmatched(w.point.shape, y.shape):
            if w.point.shape[d] == 2:
                return f"dim {d} of {w.name}, of length 2"
    return ""


def _unmatched(shape: Sequence[int], other: Sequence[int]) -> list[int]:
    """The dimensions of ``shape`` that ``other`` lacks, matched from the last one on."""
    if len(shape) == len(other):
        return [d for d, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    left, rest = [], list(other)
    for d in reversed(range(len(shape))):
        if shape[d] in rest:
            while rest.pop() != shape[d]:
                pass
        else:
            left.append(d)
    return left


def _as_share(c: float, n: int) -> str:
    """The factor as a fraction, unless ``_number`` writes it as one."""
    share = f"{'-' * (c < 0)}1/{n}"
    return "" if _number(c) == share else f" = {share}"


def _sizes(w: Wrong) -> Iterator[tuple[int, str]]:
    """Every length and number of entries above 2, with its name."""
    tensors = [
        *zip(w.s.names, w.s.points, strict=True),
        *zip(w.s.output_names, w.s.outputs, strict=True),
    ]
    for name, t in tensors:
        yield from ((n, f"the length of dim {d} of {name}") for d, n in enumerate(t.shape) if n > 2)
        if t.numel() > 2:
            yield t.numel(), f"the number of entries of {name}"


def _ignores_grad_output(w: Wrong) -> str:
    """1 H = 1 N although rows are wrong: right only for the sum of the outputs."""
    s, i = w.s, w.c.point
    ones = s.gradients(cotangents=[torch.ones_like(y) for y in s.outputs])[i]
    others = s.gradients(cotangents=s.random_like(s.outputs, 3))[i]
    if ones is None or others is None:
        return ""
    if torch.equal(ones, others):
        return "grad_output is ignored: right at most for a grad_output of ones"
    if not w.c.whole:
        return ""
    right = w.numeric.sum(0)
    slack = FIT * w.numeric.abs().sum(0).max() + w.c.tolerance.sum(0)
    if not bool((right.abs() > slack).any()):
        return ""  # through a softmax or a norm, ones give a gradient of 0: agreement means nothing
    good = (_numeric.flat([ones]) - right).abs() <= slack
    return "right only for a grad_output of ones" if bool((good | w.c.kinks.any(0)).all()) else ""


def _transposed(w: Wrong) -> str:
    if w.point.dim() < 2 or not w.c.whole:
        return ""
    for a in range(w.point.dim()):
        for b in range(a + 1, w.point.dim()):
            if w.point.shape[a] != w.point.shape[b] or w.point.shape[a] == 1:
                continue
            order = torch.arange(w.point.numel()).reshape(w.point.shape).transpose(a, b)
            c = _factor_in_order(w, order)
            if c is not None:
                factor = "" if abs(c - 1) < 1e-5 else f", with constant factor {_number(c)}"
                return f"transposed in dims {a} and {b}{factor}"
    return ""


def _reversed(w: Wrong) -> str:
    """H is N with the entries of the input in reverse order, as with a kernel that is not flipped."""
    if not w.c.whole:
        return ""
    dims = [d for d in range(w.point.dim()) if w.point.shape[d] > 1]
    for count in (1, 2, 3):
        for some in itertools.combinations(dims, count):
            order = torch.arange(w.point.numel()).reshape(w.point.shape).flip(some)
            c = _factor_in_order(w, order)
            if c is not None and abs(c - 1) < 1e-5:
                along = f"dim {some[0]}" if count == 1 else f"dims {', '.join(map(str, some))}"
                return f"reversed along {along}: its entries come from the other end"
    return ""


def _factor_in_order(w: Wrong, order: Tensor) -> float | None:
    """The c for which H = c N, with the entries of the input in another order; None if there is none."""
    explained = w.numeric[:, order.reshape(-1)]
    c = ratio_of(w.hand, explained)
    return c if c is not None and w.fits(w.hand, c * explained) else None


def _missing_sum(w: Wrong) -> str:
    """For some entries of the output the rows of H are those of N; for the others they are 0."""
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
            return f"one path of a sum is missing: what comes through {w.s.output_names[k]}"
        where = counted[rows].reshape(y.shape)
        lost = dropped[rows].reshape(y.shape)
        for d in range(y.dim()):
            others = [e for e in range(y.dim()) if e != d]
            kept = where.any(others) if others else where
            gone = lost.all(others) if others else lost
            if bool((kept ^ gone).all()) and bool(kept.any()) and bool(gone.any()):
                at = kept.nonzero().flatten().tolist()
                which = (
                    f"index {at[0]} of it is"
                    if len(at) == 1
                    else f"{len(at)} of its {y.shape[d]} indices are"
                )
                return f"missing sum over dim {d} of {w.s.output_names[k]}: only {which} counted"
    share = dropped.double().mean().item()
    return f"missing sum: {share:.0%} of the output's entries send nothing back"


def _one_output(w: Wrong) -> str:
    """Wrong only for some of several outputs."""
    if len(w.s.outputs) < 2:
        return ""
    bad = w.c.wrong.any(1)
    parts = bad.split([y.numel() for y in w.s.outputs]) if w.c.whole else []
    hit = [k for k, part in enumerate(parts) if bool(part.any())]
    if not hit or len(hit) == len(w.s.outputs):
        return ""
    rows = torch.cat([torch.full((y.numel(),), k in hit) for k, y in enumerate(w.s.outputs)])
    c = ratio_of(w.hand[rows], w.numeric[rows])
    inner = w.numeric * rows.unsqueeze(1)
    zero = not bool(w.hand[rows].abs().max() > 0)
    factor = ""
    if zero:
        factor = ", which is missing"
    elif c is not None and w.fits(w.hand * rows.unsqueeze(1), c * inner):
        factor = f", by a constant factor {_number(c)}{_meaning(c, w)}"
    return f"one path of a sum is wrong: what comes through {', '.join(w.s.output_names[k] for k in hit)}{factor}"


def _elsewhere(w: Wrong) -> str:
    """H is the derivative at another point.

    The numbers do not tell why: a forgotten factor W and a saved W overwritten by ones give the same gradient.  So the
    sentence names the two values only.
    """
    if not w.c.whole or getattr(w.s, "base", None) is not None:
        return ""
    direction = normal((w.c.directions.shape[1],), generator("elsewhere"))
    by_hand = w.hand @ direction
    for name, other, points in _other_points(w.s):
        try:
            there = _numeric.derivative(
                _only(w.s.with_points(points), w.c.point, direction), w.s.noise, w.point.dtype
            )
        except Exception:  # the function may not be defined there
            continue
        if not bool(4 * there.error.max() <= 1e-3 * by_hand.abs().max()):
            continue  # differences say too little there to explain anything
        explained = w.c.cotangents @ there.value
        close = FIT * by_hand.abs().max() + 4 * there.error.max() + w.c.tolerance.max()
        if bool(((by_hand - explained).abs() <= close).all()):
            forgotten = f", as if {name} were forgotten" if other == "1" else ""
            return f"this is the right gradient for {name} = {other}{forgotten}"
    return ""


def _other_points(s: Subject) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(the name of a point, what replaces it, all points with this in its place)"""

    def replaced(i: int, value: Tensor) -> list[Tensor]:
        return [value.clone() if j == i else p for j, p in enumerate(s.points)]

    for i, (name, p) in enumerate(zip(s.names, s.points, strict=True)):
        for k, y in enumerate(s.outputs):
            if y.shape == p.shape:
                yield name, s.output_names[k], replaced(i, y)
        for j, q in enumerate(s.points):
            if j != i and q.shape == p.shape:
                yield name, s.names[j], replaced(i, q)
        yield name, "0", replaced(i, torch.zeros_like(p))
        yield name, "1", replaced(i, torch.ones_like(p))
        yield name, f"|{name}|", replaced(i, p.abs())
        yield name, f"2 {name}", replaced(i, 2 * p)


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
    c = ratio_of(w.hand[:, bad], w.numeric[:, bad])
    explained = w.numeric.clone()
    how = ""
    if not bool(w.hand[:, bad].abs().max() > 0):
        how = "zero"
    elif c is not None:
        explained[:, bad] *= c
        how = f"constant factor {_number(c)}{_meaning(c, w)}" if w.fits(w.hand, explained) else ""
    return f"only in {share:.0%} of the entries of {w.name}, {where}" + (f": {how} there" if how else "")


def _where(bad: Tensor, x: Tensor, shape: torch.Size) -> str:
    """A condition that separates the wrong entries from the right ones."""
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


def _handed_on(w: Wrong) -> str:
    """H is the identity; N is not."""
    n = len(w.hand)
    if not w.c.whole or n != w.hand.shape[1] or getattr(w.s, "base", None) is not None:
        return ""
    if not w.fits(w.hand, torch.eye(n, dtype=w.hand.dtype)):
        return ""
    if w.s.random:
        return "grad_output is handed on as it is: the mask and the scale that forward draws are missing"
    return (
        "grad_output is handed on as it is: the function's own slope is missing "
        "(in a residual connection: the slope of the block)"
    )


def _one_path(w: Wrong) -> str:
    """The Jacobian is a sum of paths, and one is wrong: D = H - N is that path times a factor."""
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
            c = ratio_of(d, path)
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
    """H is N with a factor for each entry of the input or of the output."""
    if not w.c.whole:
        return ""
    for what, dim, tensors in (
        ("input", 0, [(n, p) for n, p in zip(w.s.names, w.s.points, strict=True)]),
        ("output", 1, list(zip(w.s.output_names, w.s.outputs, strict=True))),
    ):
        norm = (w.numeric * w.numeric).sum(dim, keepdim=True)
        factors = (w.hand * w.numeric).sum(dim, keepdim=True) / norm.where(norm > 0, 1)
        if not w.fits(w.hand, factors * w.numeric):
            continue
        used = factors[norm > 0]
        for name, t in (*tensors, *zip(w.s.output_names, w.s.outputs, strict=True)):
            extra = _numeric.flat([t])
            if extra.numel() != factors.numel():
                continue
            for text, value in ((f"{name}", extra), (f"1 / {name}", 1 / extra), (f"{name}^2", extra * extra)):
                c = ratio_of(factors.reshape(-1), value) if bool(torch.isfinite(value).all()) else None
                if c is not None and bool(
                    ((factors.reshape(-1) - c * value).abs() <= 1e-4 * factors.abs().max()).all()
                ):
                    return f"an extra factor {'' if abs(c - 1) < 1e-4 else _number(c) + ' '}{text}"
        low, high = (f"{k.item():.4g}" for k in (used.min(), used.max()))
        if low == high:
            return (
                f"nearly a constant factor, {low}, but not quite: is a small term, as eps, treated otherwise?"
            )
        return (
            f"a factor of its own for each entry of the {what}, from {low} to {high}: "
            "one path of a sum inside the formula, or a wrong formula"
        )
    return ""


def _step(w: Wrong) -> str:
    """The output is a step with slope 0; backward is not 0, mostly on purpose."""
    if not bool((w.numeric.abs() <= w.c.tolerance).all()) or not bool(w.hand.abs().max() > 0):
        return ""
    if getattr(w.s, "base", None) is not None:
        return ""
    far = w.s.random_like([w.point], 91)[0]
    here, there = (
        _numeric.flat(
            w.s.meant(*[p + k * far if j == w.c.point else p.clone() for j, p in enumerate(w.s.points)])
        )
        for k in (0.0, 1.0)
    )
    if bool(((here - there).abs() <= 1e-9).all()):
        return f"the output does not depend on {w.name}, and backward gives it a gradient"
    if w.hand.shape[0] == w.hand.shape[1] and w.fits(w.hand, torch.eye(len(w.hand), dtype=w.hand.dtype)):
        return (
            "straight-through: the output is a step, whose slope is 0, and backward hands grad_output on. "
            "If that is meant: surrogate=lambda x: x"
        )
    return (
        "a surrogate gradient: the output is a step, whose slope is 0, and backward is not. "
        "If that is meant, give surrogate= what backward is the gradient of"
    )


def _softmax_axis(w: Wrong) -> str:
    """H is the Jacobian of softmax or log_softmax over one axis; it should be over another."""
    y = w.s.outputs[0] if len(w.s.outputs) == 1 else None
    if y is None or not w.c.whole or y.shape != w.point.shape or y.dim() < 2:
        return ""
    flat = _numeric.flat([y])
    index = torch.arange(y.numel()).reshape(y.shape)
    eye = torch.eye(y.numel(), dtype=torch.float64)
    same = {}
    for d in range(y.dim()):
        row = index.select(d, 0).unsqueeze(d).expand(y.shape).reshape(-1)
        same[d] = (row.unsqueeze(0) == row.unsqueeze(1)).double()
    forms: dict[str, Callable[[int], Tensor]] = {
        "softmax": lambda d: torch.diag(flat) - same[d] * torch.outer(flat, flat),
        "log_softmax": lambda d: eye - same[d] * flat.exp().unsqueeze(0),
    }
    for name, jacobian in forms.items():
        right = [d for d in same if w.fits(w.numeric, jacobian(d))]
        wrong = [d for d in same if w.fits(w.hand, jacobian(d))]
        if right and wrong:
            return (
                f"{name} over the wrong axis: over dim {wrong[0]} in backward, over dim {right[0]} in forward"
            )
    return ""


def _detached(w: Wrong) -> str:
    """y = x a(x), and backward takes one factor for a constant."""
    if not w.c.whole or w.hand.shape[0] != w.hand.shape[1] or getattr(w.s, "base", None) is not None:
        return ""
    x = _numeric.flat([w.point])
    for y in w.s.outputs:
        if len(w.s.outputs) > 1 or y.shape != w.point.shape or not bool((x != 0).all()):
            return ""
        factor = torch.diag(_numeric.flat([y]) / x)
        if w.fits(w.hand, factor):
            return f"a detached factor: the output is {w.name} times a factor, and the factor is taken for a constant"
        if w.fits(w.hand, w.numeric - factor):
            return f"a detached factor: the output is {w.name} times a factor, and {w.name} is taken for a constant"
    return ""


def _missing_eps(w: Wrong) -> str:
    """The error falls with the square or the first power of the input's size, as when eps is missing."""
    if getattr(w.s, "base", None) is not None:
        return ""
    off = []
    for c in (1.0, 4.0, 16.0):
        points = [c * p if j == w.c.point else p for j, p in enumerate(w.s.points)]
        try:
            (there,) = compare(w.s.with_points(w.s.allowed(points)), only=w.c.point)
        except Exception:  # the function may not be defined there
            return ""
        known = there.measured
        scale = float(there.numeric.where(known, 0).norm())
        off.append(float((there.hand - there.numeric).where(known, 0).norm()) / scale if scale else 0.0)
    if min(off) <= 1e-9 or off[0] > 0.1:
        return ""
    ratios = [off[0] / off[1], off[1] / off[2]]
    for power in (16.0, 4.0):
        if all(abs(r - power) <= 0.15 * power for r in ratios):
            how = "square" if power == 16.0 else "first power"
            return (
                f"a missing eps: the error is {off[0]:.2g} of the gradient here, and falls with the {how} of the size "
                f"of {w.name}"
            )
    return ""


EXPLANATIONS: tuple[Callable[[Wrong], str], ...] = (
    _step,
    _zero,
    _exchanged,
    _constant,
    _ignores_grad_output,
    _transposed,
    _reversed,
    _softmax_axis,
    _detached,
    _one_output,
    _missing_sum,
    _part,
    _handed_on,
    _one_path,
    _elsewhere,
    _missing_eps,
    _own_factors,
)
