"""Other sizes than the ones at hand: none, one, primes, and beyond the powers of two where kernels change."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._budget import work
from manualprop.verify._compare import wrong_in_first_order
from manualprop.verify._probe import probe
from manualprop.verify._random import generator
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed, skipped
from manualprop.verify._resize import (
    Axis,
    aside,
    axes,
    cost,
    has_repeats,
    is_integer,
    refusal,
    repeated,
    resized,
    runs,
)
from manualprop.verify._subject import Subject
from manualprop.verify.probes._apart import multiples, otherwise_than_its_rows
from manualprop.verify.probes._runs import copies

FIRST = (1, 7, 8, 257, 1025)  # of every axis; of the batch also
MORE = (65537, 256, 255, 127, 31, 13, 1023, 65535)
MOST_BYTES = 16 << 20  # of one tensor
MOST_UNITS = 4_000.0  # of work in one evaluation (see _budget)
QUICK_UNITS = 1_000.0  # at the level quick, beyond 1025
MOST_SECONDS = 0.5  # of processor time in one evaluation
IN_ALL = 60_000.0  # units for all sizes together, after which larger ones are left out
STEPS = (1e-4, 1e-5, 1e-3, 1e-6, 1e-2, 1e-7)
RTOL = 1e-5
RAISES = "accepted in forward, then backward raises"


# ----- the derivative in a few directions -----


Make = Callable[[int], Subject]  # a seed -> the function to look at


def wrong_slope(make: Make, axis: Axis | None) -> str | None:
    """A direction in which the gradient is wrong, or None.  It must be wrong for three sets of values and directions."""
    said = None
    for seed in (0, 1, 2):
        try:
            s = make(seed)
        except Exception:  # no such inputs can be made, or they are not allowed
            return None
        said = _wrong_slope(aside(s, seed) if seed else s, axis, seed)
        if said is None:
            return None
    return said


def _wrong_slope(s: Subject, axis: Axis | None, seed: int) -> str | None:
    leaves = s.at()
    try:
        outputs = s(*leaves)
    except Exception:  # whatever the checked code raises: refused, loudly
        return None
    if not any(y.requires_grad for y in outputs):
        return None
    v = s.cotangents_for(outputs, seed + 1)
    try:
        found = s.linear_part(v) if s.nonlinear else s.pull_back(outputs, leaves, copies(v))
    except Exception as error:  # whatever the checked code raises
        return f"{RAISES} {message(error)}"
    weights = _numeric.flat(
        [w if y.requires_grad else torch.zeros_like(w) for w, y in zip(v, outputs, strict=True)]
    )
    values = _numeric.flat(outputs)
    if not torch.isfinite(values).all():
        return None
    if values.numel() and s._largest and float(values.abs().max()) > 1e8 * s._largest:
        return None  # it blows up with the size, and the digits are gone
    scatter = 4 * float((weights * values).norm()) * max(torch.finfo(torch.float64).eps, s._relative_noise)
    for i, g in enumerate(found):
        g = torch.zeros_like(s.points[i]) if g is None else g
        g = g / s._multiples[i] if s._multiples else g
        if not torch.isfinite(g).all():
            return f"gradient of {s.names[i]}: {_first_not_finite(g)}, though the value is finite"
        for where, free in _directions(s, axis, i, seed):
            d = s.tangent(i, free)
            parts = (g.double() * d.double()).flatten()
            hand, size = float(parts.sum()), float(parts.norm())
            evaluate = s.along([d if j == i else None for j in range(len(s.points))])
            numeric = _agreeing(evaluate, weights, hand, size, scatter)
            if numeric is not None:  # is it as rough here as it was where the noise was measured?
                rougher = max(
                    scatter, 4 * float((weights * _numeric.noises(evaluate).nan_to_num(torch.inf)).norm())
                )
                by_hand = 100 * s.roughness[i] * float(d.abs().sum())
                numeric = _agreeing(evaluate, weights, hand, size, rougher, by_hand)
            if numeric is not None:
                return f"slope along {where} of {s.names[i]}: {hand:.6g} by backward, {numeric:.6g} by differences"
    return None


def _agreeing(
    evaluate: _numeric.Evaluate,
    weights: Tensor,
    hand: float,
    size: float,
    scatter: float,
    by_hand: float = 0.0,
) -> float | None:
    """None if differences with some step agree with ``hand`` or none can tell; else the best of them.

    A large step may cross a kink that a small one does not reach.  A wrong gradient agrees with no step.  Where the two
    smallest steps disagree, the function is a staircase, and its differences say nothing.
    """
    told: list[tuple[float, float, float, float]] = []  # (step, by how much it is off, slope, doubt)
    for h in STEPS:
        change = _numeric._safe(evaluate, h) - _numeric._safe(evaluate, -h)
        numeric = float(weights @ change) / (2 * h)
        scale = size + max(abs(numeric), *[abs(slope) for _, _, slope, _ in told], 0.0)
        doubt = scatter / h
        if not math.isfinite(numeric) or doubt > 0.01 * scale + 1e-7:
            continue
        off = abs(hand - numeric) - doubt - by_hand - RTOL * scale - 1e-7
        if off <= 0:
            return None
        told.append((h, off, numeric, doubt))
    if not told:
        return None
    _, least, best, _ = min(told, key=lambda step: step[1])
    fine = sorted(told)[:2]
    apart = abs(fine[0][2] - fine[-1][2]) - fine[0][3] - fine[-1][3]
    return best if apart <= 0.1 * least else None


def _directions(s: Subject, axis: Axis | None, i: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The last slices along the axis, entries here and there, and all of a small tensor."""
    point = s.points[i]
    if not point.numel():
        return
    (dense,) = s.random_like([point], 20 + seed + 100 * i)
    for d in [] if axis is None else [d for j, d in axis.points if j == i]:
        n = point.shape[d]
        tail = torch.zeros_like(dense)
        tail.narrow(d, max(0, n - 3), min(3, n)).copy_(dense.narrow(d, max(0, n - 3), min(3, n)))
        yield "the last slices", tail
    if point.numel() <= 4096:
        yield "a direction", dense
    else:
        some = torch.randint(point.numel(), (32,), generator=generator("some entries", seed))
        sparse = torch.zeros_like(dense).flatten()
        sparse[some] = dense.flatten()[some]
        yield "some entries", sparse.view_as(dense)


def _first_not_finite(g: Tensor) -> str:
    at = (~torch.isfinite(g)).nonzero()[0].tolist()
    return f"{float(g[tuple(at)])} at {at}"


# ----- sizes -----


@probe()
def sizes(s: Subject) -> Outcome:
    """First order at 1, at primes, across 2^8, 2^10 and 2^16, where two axes are equally long, and for 0-d inputs."""
    _remember_noise(s)
    if wrong_in_first_order(s):
        return _of_its_own(s)
    if wrong_slope(lambda seed: s, None) is not None:
        return skipped("wrong at the sizes given: see first_order")
    s._unique = frozenset(_never_repeating(s))
    tested: list[str] = []
    failures: list[Failure] = []
    resizable = list(axes(s))
    left = [IN_ALL / 4 if s.quick else IN_ALL]
    for k, axis in enumerate(resizable):
        ladder, units = _affordable(s, axis, FIRST if k else (*FIRST, *MORE))
        ladder, failed = _failing(s, axis, ladder, units, left, _at_size)
        failures += failed or list(_square(s, axis, resizable))
        tested.append(f"{_called(s, axis)}: {', '.join(map(str, ladder))}")
    if not failures:
        odd = _all_odd(s, [axis for axis in resizable if axis.points or axis.size])
        if odd is not None:
            tested.append(odd[0])
            if odd[1] is not None:
                return finding(f"{odd[0]}: {odd[1]}", "only for odd sizes")
        said = _zero_dimensional(s)
        if said is not None:
            return finding(f"0-d inputs: {said}", "only for 0-d inputs")
        if not tested:
            return skipped("no size can be changed: forward raises")
        return passed(f"right at sizes {'; '.join(tested)}")
    found = _found(s, failures)
    return found if "raises" in failures[0].said else apart(found, "second_order")


def _lengths_of_others(axis: Axis, resizable: Sequence[Axis]) -> dict[int, Axis]:
    """The short lengths of the other axes: of that length, a formula may take one axis for the other."""
    return {a.length: a for a in resizable if a is not axis and a.length <= 64 and not axis.size}


def _square(s: Subject, axis: Axis, resizable: Sequence[Axis]) -> Iterator[Failure]:
    """What is wrong, and does not say so, where the axis is as long as another one."""
    least = axis.length if any(map(is_integer, s.others().values())) else 0  # an index may count along it
    wanted = [n for n in _lengths_of_others(axis, resizable) if n not in FIRST and n > least]
    for n in _affordable(s, axis, wanted)[0] if wanted and axis.length > 1 else []:
        said = _at_size(s, axis, n)
        if said is not None and RAISES not in said:
            yield Failure(axis, n, said, None)


def _found(s: Subject, failures: Sequence[Failure]) -> Outcome:
    worst = failures[0]
    return finding(
        f"size {worst.size} along {_called(s, worst.axis)}: {worst.said}",
        _words(s, failures),
        sizes=[f.size for f in failures],
    )


def _of_its_own(s: Subject) -> Outcome:
    """What else is wrong at other sizes, if the gradient is wrong at those given: only what begins beyond some size."""
    known, ask = _law(s)
    left = [IN_ALL / 4 if known.quick else IN_ALL]
    for k, axis in enumerate(axes(known)):
        # The length given is no evidence: a factor that follows the size is known there, and wrong elsewhere.
        wanted = [n for n in (FIRST if k else (*FIRST, *MORE)) if n not in (1, axis.length)]
        ladder, units = _affordable(known, axis, wanted)
        _, failures = _failing(known, axis, ladder, units, left, ask)
        if failures and all(f.beyond for f in failures):
            found = apart(_found(known, failures), "first_order", "second_order")
            how = (
                ", without the factor of first_order"
                if known._multiples
                else ", besides what first_order says"
            )
            return replace(found, evidence=f"{found.evidence}{how}")
    return skipped("wrong at the sizes given: see first_order")


def _law(s: Subject) -> tuple[Subject, Ask]:
    """What is known of a wrong gradient at other sizes (see _apart), as a subject and the question to ask of it."""
    try:
        found = multiples(s)
    except Exception:  # whatever the checked code raises: first_order tells
        return s, lambda s, axis, n: None
    if found is None:
        return s, _also_unlike_its_rows
    known = s.with_points(s.points)
    known._multiples = found
    return known, _at_size


def _also_unlike_its_rows(s: Subject, axis: Axis, n: int) -> str | None:
    """What is wrong at a size and is not the error of the rows themselves."""
    said = otherwise_than_its_rows(s, axis, n)
    return said if said and _at_size(s, axis, n) is not None else None


def _never_repeating(s: Subject) -> Iterator[int]:
    """The integer arguments that hold no value twice, and whose gradient is wrong if they do: see indices."""
    for i, t in s.others().items():
        if is_integer(t) and t.dim() == 1 and t.numel() == 1 and _is_an_index(s, i, t):
            yield i  # one integer cannot show whether repeats are allowed
        elif is_integer(t) and t.numel() > 1 and not has_repeats(t):
            there = s.with_points(s.points, others={i: repeated(t)})
            if _may_be_asked(there) and wrong_slope(lambda seed, there=there: there, None) is not None:  # type: ignore[misc]
                yield i


def _may_be_asked(s: Subject) -> bool:
    try:
        s.allowed(s.points)
    except Exception:  # the domain says no, or cannot be asked of these
        return False
    return True


def _is_an_index(s: Subject, i: int, t: Tensor) -> bool:
    """Whether something is written where the integer says: another one gives other outputs of the same shapes."""
    other = s.with_points(s.points, others={i: (t + 1) % (int(t.max()) + 1) if int(t.max()) else t})
    try:
        other.allowed(other.points)
        return [y.shape for y in other(*other.at())] == [y.shape for y in s.outputs]
    except Exception:  # whatever the checked code raises
        return False


class Failure(NamedTuple):
    """A size at which the gradient is wrong."""

    axis: Axis
    size: int
    said: str
    beyond: int | None  # the largest size that is right, if all above are wrong


def _remember_noise(s: Subject) -> None:
    """Rounding relative to the largest output: other sizes inherit it."""
    largest = max((float(y.abs().max()) for y in s.outputs if y.numel()), default=0.0)
    s._largest = largest if math.isfinite(largest) else 0.0
    s._relative_noise = s.noise / largest if largest > 0 and math.isfinite(largest) else 0.0


Units = Callable[[int], float]  # a size -> the work of one evaluation
Ask = Callable[[Subject, Axis, int], str | None]  # what is wrong at a size


def _affordable(s: Subject, axis: Axis, wanted: Sequence[int]) -> tuple[list[int], Units]:
    """Those sizes that memory and time allow, and the work at each, judged by how the largest tensor grows."""
    pairs = ((64, 128), (16, 32), (8, 16))
    pair = next(((k, n) for k, n in pairs if _bytes_of_inputs(s, axis, n) <= MOST_BYTES / 16), None)
    if pair is None or any(refusal(s, axis, n) is not None for n in pair):
        return [
            n for n in wanted if n <= 31 and _bytes_of_inputs(s, axis, n) <= MOST_BYTES / 16
        ], lambda n: work(s)
    slow = pair
    small, large = min(pair, (16, 32))  # enough to count operations, and quicker
    low, high = (cost(resized(s, axis, n)) for n in (small, large))
    power = max(1.0, math.log2(high.bytes / low.bytes)) if low.bytes else 1.0
    # Only growth counts: an operation on few numbers takes as long as on none.
    more = (high.units - low.units) / (large**power - small**power)

    def units(n: int) -> float:
        grown: float = high.units + more * (float(n) ** power - float(large) ** power)
        return max(1.0, grown)

    most = QUICK_UNITS if s.quick else MOST_UNITS
    allowed = [
        n
        for n in wanted
        if high.bytes * (n / large) ** power <= MOST_BYTES
        and (n <= large or units(n) <= (most if n > 1025 else MOST_UNITS))
    ]
    allowed = _in_time(s, axis, allowed, *slow)
    if {257, 1025} <= set(allowed):
        allowed = _in_time(s, axis, allowed, 257, 1025)
    return allowed, units


def _in_time(s: Subject, axis: Axis, wanted: Sequence[int], small: int, large: int) -> list[int]:
    """The sizes that processor time allows: an operation may loop inside, and cost more than its entries say.

    The limit is far above usual times, so that a loaded machine says the same.
    """
    if not any(n > large for n in wanted):
        return list(wanted)
    before, after = (min(_seconds(s, axis, n) for _ in range(2)) for n in (small, large))
    power = min(4.0, max(1.0, math.log(after / before) / math.log(large / small)))
    return [n for n in wanted if n <= large or after * (n / large) ** power <= MOST_SECONDS]


def _seconds(s: Subject, axis: Axis, n: int) -> float:
    """Of processor time, for one forward and backward."""
    there = resized(s, axis, n)
    start = time.process_time()
    with contextlib.suppress(Exception):  # whatever the checked code raises
        there.gradients()
    return max(time.process_time() - start, 1e-6)


def _bytes_of_inputs(s: Subject, axis: Axis, n: int) -> float:
    """Bytes of all inputs with length ``n``.  A kernel of four dimensions of this length grows with the fourth power."""
    if axis.size or not axis.length:
        return 0.0
    total = 0.0
    for tensors, places in ((dict(enumerate(s.points)), axis.points), (s.others(), axis.others)):
        for i, t in tensors.items():
            grown = sum(1 for j, _ in places if j == i)
            total += t.numel() * t.element_size() * (n / axis.length) ** grown
    return total


def _failing(
    s: Subject, axis: Axis, wanted: Sequence[int], units: Units, left: list[float], ask: Ask
) -> tuple[list[int], list[Failure]]:
    """The sizes that were tried, and those that are wrong; the smallest by bisection where all larger ones are."""
    said: dict[int, str | None] = {}
    for n in wanted:
        if n in (*FIRST, 65537) or left[0] > 0:
            said[n] = ask(s, axis, n)
            left[0] -= 12 * len(s.points) * units(n)  # a dozen evaluations for each point
    ladder = sorted(said)
    wrong = [n for n in ladder if said[n] is not None]
    if not wrong:
        return ladder, []
    right = [n for n in ladder if said[n] is None]
    beyond = None
    if right and max(right) < min(wrong):
        low, high = max(right), min(wrong)
        while high - low > 1:
            middle = (low + high) // 2
            at_middle = ask(s, axis, middle)
            if at_middle is None:
                low = middle
            else:
                high, said[middle] = middle, at_middle
        beyond = low
        wrong = [high, *[n for n in wrong if n != high]]
    elif right and wrong[-1] == ladder[-1] and len(wrong) > 1:
        # Right again here and there: blocks of some size, of which the last is dropped.
        smaller = [n for n in right if n < wrong[0]]
        beyond = max(smaller) if smaller and wrong[0] > 31 else None
    return ladder, [Failure(axis, n, said[n] or "", beyond) for n in wrong]


def _at_size(s: Subject, axis: Axis, n: int) -> str | None:
    said = wrong_slope(lambda seed: resized(s, axis, n, seed), axis)
    # Of an argument that is not differentiated, as a table of indices: loud, and nobody needs it.
    return None if said and RAISES in said and not axis.points and not axis.size else said


def _words(s: Subject, failures: Sequence[Failure]) -> str:
    """Beyond which size, in entries of a tensor where that explains it for every axis."""
    firsts = {f.axis: f for f in reversed(failures)}
    if all(f.beyond is not None for f in firsts.values()):
        if len(firsts) > 1:
            entries = _power_between(s, list(firsts.values()))
            if entries is not None:
                return f"beyond size {entries} (entries)"
        return " and ".join(f"beyond size {f.beyond} along {_called(s, axis)}" for axis, f in firsts.items())
    return f"only for {' and '.join(dict.fromkeys(_at_which(s, axis, failures) for axis in firsts))}"


def _at_which(s: Subject, axis: Axis, failures: Sequence[Failure]) -> str:
    """The sizes along one axis that are wrong, where they are no bound."""
    wrong = sorted({f.size for f in failures if f.axis == axis})
    other = _lengths_of_others(axis, list(axes(s))).get(wrong[0])
    if other is not None and len(wrong) == 1 and runs(s, other, wrong[0] + 2):
        apart_from_it = resized(s, other, wrong[0] + 2)  # of other lengths, all is right
        if _at_size(apart_from_it, axis, wrong[0]) is None:
            names = sorted(_called(s, a) for a in (axis, other))
            return f"{' = '.join(names)}, as if one axis were the other"
    return f"size{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))} along {_called(s, axis)}"


def _power_between(s: Subject, firsts: Sequence[Failure]) -> int | None:
    """A power of two that, as a number of entries, lies between right and wrong along every axis."""
    for power in (2**k for k in range(4, 18)):
        for i in range(len(s.points)):
            counts = [
                [resized(s, f.axis, n).points[i].numel() for n in (f.beyond or 0, f.size)] for f in firsts
            ]
            if all(low <= power < high for low, high in counts):
                return int(power)
    return None


def _called(s: Subject, axis: Axis) -> str:
    if axis.size:
        return f"inputs({axis.size}=...)"
    names = [f"{s.names[i]}.shape[{d}]" for i, d in axis.points]
    return names[0] if names else f"an argument's dimension of length {axis.length}"


def _all_odd(s: Subject, resizable: Sequence[Axis]) -> tuple[str, str | None] | None:
    """All axes at once, each with another odd length."""

    def odd(seed: int) -> Subject:
        other = s
        for axis, n in zip(resizable, (7, 5, 3, 11), strict=False):
            other = resized(other, axis, n, seed)
        return other

    if len(resizable) < 2:
        return None
    try:
        with torch.no_grad():
            odd(0)(*odd(0).points)
    except Exception:  # whatever the checked code raises: lengths that do not fit together
        return None
    return f"all together odd, {', '.join(str(list(p.shape)) for p in odd(0).points)}", wrong_slope(odd, None)


def _zero_dimensional(s: Subject) -> str | None:
    """Where every tensor has one shape, the same with their first entries alone."""
    others = s.others()
    shapes = {tuple(t.shape) for t in [*s.points, *others.values()]}
    if len(shapes) != 1 or () in shapes or any(p.complex or isinstance(p.slot, str) for p in s._points):
        return None
    if not s.points[0].numel():
        return None
    other = s.with_points(
        [p.flatten()[0].clone() for p in s.points],
        others={i: t.flatten()[0].clone() for i, t in others.items()},
    )
    said = wrong_slope(lambda seed: other.with_points(other.allowed(other.points)), None)
    elementwise = all(y.shape == s.points[0].shape for y in s.outputs)
    # A loss of many rows need not take a single number, if it says so.
    return None if said and RAISES in said and not elementwise else said


# ----- nothing -----


@probe()
def zero_size(s: Subject) -> Outcome:
    """Every dimension that can be empty, empty: gradients of the right shape, and none of them NaN."""
    if wrong_in_first_order(s) or wrong_slope(lambda seed: s, None) is not None:
        return skipped("wrong at the sizes given: see first_order")
    tested, refused = [], []
    for axis in axes(s):
        called = _called(s, axis)
        error = refusal(s, axis, 0)
        if error is not None:
            refused.append(f"{called} = 0: {message(error)}")
            continue
        said = _wrong_for_nothing(resized(s, axis, 0))
        needed = axis.batch and axis.points and s.functions
        if said is not None and RAISES in said and not needed:
            # Nothing to normalise or to sum over, or torch's own refusal: loud, and nobody needs it.
            refused.append(f"{called} = 0: {said}")
            continue
        if said is not None:
            return finding(f"{called} = 0: {said}", "only for size 0")
        tested.append(called)
    if tested:
        also = f"; refused: {refused[0]}" if refused else ""
        return passed(f"empty along {', '.join(tested)}{also}", works=tested)
    return limit(refused[0]) if refused else skipped("no size can be changed")


def _wrong_for_nothing(s: Subject) -> str | None:
    with _filled_memory():
        leaves = s.at()
        outputs = s(*leaves)
        if not any(y.requires_grad for y in outputs):
            return None
        try:
            found = s.pull_back(outputs, leaves, s.cotangents_for(outputs))
        except Exception as error:  # whatever the checked code raises
            return f"{RAISES} {message(error)}"
    if not all(torch.isfinite(y).all() for y in outputs):  # the mean of nothing
        return None
    empty = not any(y.numel() for y in outputs)
    for name, g in zip(s.names, found, strict=True):
        if g is not None and g.numel():
            if not torch.isfinite(g).all():
                return f"gradient of {name}: {_first_not_finite(g)}, though the value is finite"
            if empty and g.any():
                return f"gradient of {name} is not zero, though there is no output"
    return None if empty else wrong_slope(lambda seed: s, None)


class _filled_memory:
    """Fresh memory is filled with NaN, so that what is never written shows."""

    def __enter__(self) -> None:
        self.was = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        # Not torch.use_deterministic_algorithms, which imports the compiler first: a second of every child.
        torch._C._set_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch._C._set_deterministic_algorithms(self.was[0], warn_only=self.was[1])
