"""Other numbers than the ones at hand: fewer digits, extreme values, ties and kinks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._difference import sizes, tolerance
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, limit, message, passed, skipped
from manualprop.verify._resize import aside
from manualprop.verify._subject import Subject

LOWER = (torch.float32, torch.bfloat16, torch.float16)
ROUNDINGS = 32  # as many roundings at the scale of the largest entry are nobody's fault

# ----- dtypes -----


@probe()
def dtypes(s: Subject) -> Outcome:
    """Gradients in float32, bfloat16 and float16 against the function's own float64 run at the rounded inputs."""
    if s.dtype != torch.float64:
        return skipped("float64 is refused, so there is nothing to compare with")
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped("no output requires grad: see output_requires_grad")
    said = _float32_inside(s)
    if said is not None:
        return finding(said, "only in dtype float64: it has the accuracy of float32 (a constant, a cast?)")
    tested, refused = [], []
    for dtype in LOWER:
        name = str(dtype).removeprefix("torch.")
        for scale in (1.0, 16.0) if dtype == torch.float16 else (1.0,):
            said = _in_dtype(s, dtype, scale)
            if said is not None and said.startswith("refused"):
                refused.append(f"{name}: {said}")
                break
            if said is not None:
                return finding(f"{name}: {said}", f"only in dtype {name}")
        else:
            tested.append(name)
    if refused:
        return limit("; ".join(refused), works=tested)
    return passed(f"within rounding in {', '.join(tested)}")


def _in_dtype(s: Subject, dtype: torch.dtype, scale: float) -> str | None:
    """What is wrong in a dtype, at ``scale`` times the inputs; None if nothing."""
    points = [(scale * p).to(dtype) for p in s.points]
    low = s.with_points(points, dtype=dtype)
    high = s.with_points([p.double() for p in points], dtype=torch.float64, through=dtype)
    leaves = low.at()
    try:
        outputs = low(*leaves)
    except Exception as error:  # whatever the checked code raises
        return f"refused: {message(error)}" if scale == 1 else None
    if not all(torch.isfinite(y).all() for y in outputs) or s.random:
        return None
    for ones in (False, True):
        v = [torch.ones_like(y) if ones else y for y in outputs]
        v = v if ones else low.random_like(outputs, 1)
        leaves = low.at()
        try:
            found = low.pull_back(low(*leaves), leaves, v)
        except Exception as error:  # whatever the checked code raises
            return f"accepted in forward, then backward raises {message(error)}"
        try:
            exact = high.gradients(cotangents=[w.double() for w in v])
            allowed = _allowed(high, [w.double() for w in v], exact, dtype, outputs)
        except Exception:  # whatever the checked code raises: outside its domain at this scale
            return None
        said = _beyond(s, found, exact, allowed, torch.finfo(dtype).max)
        if said is not None:
            return said
    return None


def _allowed(
    high: Subject,
    v: Sequence[Tensor],
    exact: Sequence[Tensor | None],
    dtype: torch.dtype,
    low: Sequence[Tensor],
) -> list[float]:
    """By how much each gradient may be off: rounding of inputs and grad_output moves it so, and its own rounding."""
    eps = torch.finfo(dtype).eps
    largest = [0.0] * len(exact)
    for seed in range(4):
        signs = [1 + eps * d.sign() for d in high.random_like(high.points, 50 + seed)]
        turned = [1 + eps * d.sign() for d in high.random_like(v, 70 + seed)]
        moved = high.gradients(
            points=[p * k for p, k in zip(high.points, signs, strict=True)],
            cotangents=[w * k for w, k in zip(v, turned, strict=True)],
        )
        for i, (g, e) in enumerate(zip(moved, exact, strict=True)):
            if g is not None and e is not None and g.numel():
                largest[i] = max(largest[i], float((g - e).abs().nan_to_num(torch.inf).max()))
    # Where the value itself is further off than by rounding, its gradient may be too.
    scale = sizes(high.outputs)
    loss = [
        float((a.double() - b).abs().max()) / (k or 1.0) if a.numel() else 0.0
        for a, b, k in zip(low, high.outputs, scale, strict=True)
    ]
    worse = max([1.0, *(k / eps for k in loss)])
    whole = max(sizes(exact))
    tiny = torch.finfo(dtype).tiny
    return [
        ROUNDINGS * (moved + worse * eps * max(size, 1e-3 * whole)) + tiny
        for moved, size in zip(largest, sizes(exact), strict=True)
    ]


def _beyond(
    s: Subject,
    found: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    allowed: Sequence[float],
    most: float,
) -> str | None:
    for name, g, e, bound in zip(s.names, found, exact, allowed, strict=True):
        if g is None or e is None or not g.numel() or not torch.isfinite(e).all() or e.abs().max() > most / 8:
            continue
        if not torch.isfinite(g).all():
            return f"gradient of {name} is not finite, though the value is, and float64 has {float(e.abs().max()):.4g}"
        off = (g.double() - e).abs()
        at = int(off.argmax())
        if float(off.flatten()[at]) > bound:
            return (
                f"gradient of {name}: {float(g.flatten()[at]):.6g} instead of {float(e.flatten()[at]):.6g}, "
                f"which rounding explains to {bound:.2g}"
            )
    return None


def _float32_inside(s: Subject) -> str | None:
    """A float64 gradient that is right to eight digits only, of a value that is right to sixteen."""
    said = None
    for seed in (1, 2, 3):
        here = aside(s, seed)
        leaves = here.at()
        try:
            outputs = here(*leaves)
            v = here.cotangents_for(outputs)
            found = here.pull_back(outputs, leaves, v)
            noise = here.noise
        except Exception:  # whatever the checked code raises: outside its domain
            return None
        said = None
        for i in range(len(found)):
            (d,) = here.random_like([here.points[i]], 30 + seed)
            slope = _numeric.derivative(here.along([d if j == i else None for j in range(len(found))]), noise)
            if not slope.value.numel():
                continue
            known = slope.error <= 5e-12 * slope.value.abs().max()  # no kink was crossed
            parts = known.split([y.numel() for y in outputs])
            w = [u * k.view_as(u) * y.requires_grad for u, k, y in zip(v, parts, outputs, strict=True)]
            g = here.gradients(cotangents=w)[i]
            weights = _numeric.flat(w)
            numeric = float((weights * slope.value)[known].sum())
            doubt = float((weights.abs() * slope.error)[known].sum())
            hand = 0.0 if g is None else float((g * d).sum())
            size = max(abs(numeric), 0.0 if g is None else float((g * d).norm()))
            off = abs(hand - numeric)
            if doubt < 2e-10 * size and 2e-10 * size + 4 * doubt < off < 1e-6 * size:
                said = (
                    f"float64: slope along a direction of {s.names[i]} is off by {off / size:.1g} of its size, "
                    f"known to {doubt / size:.1g}"
                )
        if said is None:
            return None
    return said


# ----- autocast -----


@probe()
def autocast(s: Subject) -> Outcome:
    """float32 inputs under bfloat16 autocast: backward runs, and is as near as bfloat16 allows."""
    if s.dtype != torch.float64 or not torch.amp.is_autocast_available("cpu"):
        return skipped("no float32 run to compare with")
    low = s.with_points([p.float() for p in s.points], dtype=torch.float32)
    leaves = low.at()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = low(*leaves)
    except Exception as error:  # whatever the checked code raises
        return limit(f"forward under autocast raises {message(error)}")
    if not any(y.requires_grad for y in outputs):
        return skipped("no output requires grad: see output_requires_grad")
    v = low.random_like(outputs, 1)
    try:
        found = low.pull_back(outputs, leaves, v)
    except Exception as error:  # whatever the checked code raises
        return finding(
            f"accepted under autocast, then backward raises {message(error)}", "only under autocast"
        )
    for name, g, leaf in zip(s.names, found, leaves, strict=True):
        if g is not None and g.dtype != leaf.dtype:
            return finding(f"gradient of {name} is {g.dtype} for {leaf.dtype}", "only under autocast")
    if s.random or not all(torch.isfinite(y).all() for y in outputs):
        return passed("backward runs")
    high = s.with_points([p.float().double() for p in s.points], dtype=torch.float64, through=torch.float32)
    exact_v = [w.double() for w in v]
    exact = high.gradients(cotangents=exact_v)
    allowed = _allowed(high, exact_v, exact, torch.bfloat16, outputs)
    said = _beyond(s, found, exact, allowed, 1e30)
    return passed("within rounding of bfloat16") if said is None else finding(said, "only under autocast")


# ----- extremes -----

EXTREME = (0.0, -0.0, 1e-30, -1e-30, 18.0, 50.0, 90.0, 300.0, 800.0, 1e4, 1e30)


@probe()
def extremes(s: Subject) -> Outcome:
    """One entry at 0, a denormal, +-1e30 and between: finite values have finite gradients where slopes are finite."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped("no output requires grad: see output_requires_grad")
    if not all(torch.isfinite(g).all() for g in s.plain if g is not None):
        return skipped("the plain gradient is not finite: see first_order")
    for dtype in (torch.float64, torch.float32) if s.dtype == torch.float64 else (s.points[0].dtype,):
        tiny = torch.finfo(dtype).tiny / 4
        for i, point in enumerate(s.points):
            if not point.numel():
                continue
            values = [(x, False) for x in (*EXTREME, tiny, *(-x for x in EXTREME if x >= 1), -tiny)]
            for value, whole in [*values, (0.0, True)]:
                said = _at_extreme(s, i, value, dtype, whole)
                if said is not None:
                    name = str(dtype).removeprefix("torch.")
                    other = "" if dtype == s.dtype else f", only in dtype {name}"
                    entries = "all entries" if whole else "an entry"
                    return finding(
                        f"{name}, {s.names[i]} with {entries} {value:g}: {said}", f"at extremes{other}"
                    )
    return passed("finite wherever value and slope are, from 0 to 1e30, in float32 and float64")


def _with_entry(s: Subject, i: int, value: float, dtype: torch.dtype, whole: bool) -> Subject:
    """With one entry, or all, at a value."""
    points = [p.to(dtype) for p in s.points]
    points[i] = points[i].clone()
    points[i].view(-1)[: None if whole else 1] = value
    return s.with_points(points, dtype=dtype)


def _both_orders(s: Subject) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
    """Outputs, first and second derivatives, or None where the function is not defined."""
    leaves = s.at()
    try:
        outputs = list(s(*leaves))
        v = s.cotangents_for(outputs)
        first = [g for g in s.pull_back(outputs, leaves, v, create_graph=True) if g is not None]
    except Exception:  # whatever the checked code raises
        return None
    second: list[Tensor] = []
    live = [g for g in first if g.requires_grad]
    if live:
        try:
            found = torch.autograd.grad(live, leaves, s.random_like(live, 9), allow_unused=True)
            second = [g for g in found if g is not None]
        except Exception:  # whatever the checked code raises: a limit of second_order
            second = []
    return outputs, first, second


def _at_extreme(s: Subject, i: int, value: float, dtype: torch.dtype, whole: bool) -> str | None:
    here = _both_orders(_with_entry(s, i, value, dtype, whole))
    if here is None or not all(_finite(here[0])):
        return None
    for order, what in ((1, "gradient"), (2, "second derivative")):
        if all(_finite(here[order])) or (order == 2 and not 1 <= abs(value) <= 1e4):
            continue  # second derivatives overflow far out, and have kinks where the first has its own at 0
        others = [_both_orders(_with_entry(s, i, v, torch.float64, whole)) for v in _around(value)]
        if dtype == torch.float32:
            others = [_both_orders(_with_entry(s, i, value, torch.float64, whole))]
        known = [o[order] for o in others if o is not None and all(_finite(o[0])) and all(_finite(o[order]))]
        if order == 1 and not known and dtype == torch.float64 and _slope_is_finite(s, i, value, whole):
            return "the gradient is not finite, though value and difference quotients are"
        if len(known) < len(others) or not _of_one_size(known, value if order == 1 else 0.0):
            continue
        return f"the {what} is not finite, though the value is, and its slope is finite there"
    return None


def _slope_is_finite(s: Subject, i: int, value: float, whole: bool) -> bool:
    """Whether difference quotients over two widths exist and do not grow."""
    values = []
    for v in _around(value):
        try:
            with torch.no_grad():
                other = _with_entry(s, i, v, torch.float64, whole)
                values.append(_numeric.flat(other(*other.points)))
        except Exception:  # whatever the checked code raises: outside its domain
            return False
    above, below, near_above, near_below = values
    width = abs(value) if abs(value) > 1 else 1.0
    wide, narrow = (above - below) / (2e-3 * width), (near_above - near_below) / (2e-6 * width)
    if not (torch.isfinite(wide).all() and torch.isfinite(narrow).all()):
        return False
    return float(narrow.abs().max()) <= 10 * float(wide.abs().max()) + 1e-6


def _finite(tensors: Sequence[Tensor]) -> Iterator[bool]:
    return (bool(torch.isfinite(t).all()) for t in tensors)


def _around(value: float) -> list[float]:
    """Near it on both sides, twice, so that a slope that grows without bound shows."""
    width = abs(value) if abs(value) > 1 else 1.0
    return [value + sign * width * h for h in (1e-3, 1e-6) for sign in (1, -1)]


def _of_one_size(known: Sequence[Sequence[Tensor]], value: float) -> bool:
    """Whether derivatives do not grow towards the place, and float32 could hold them."""
    largest = [max(sizes(k), default=0.0) for k in known]
    return max(largest) < 1e30 and (len(known) < 2 or max(largest[2:]) <= 10 * max(largest[:2]) + 1e-6)


# ----- ties -----

KINKS = (0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 6.0)
NEAR = (1e-3, 1e-6, 1e-9, 1e-12)
MOST_OUTPUTS = 12


@probe()
def ties(s: Subject) -> Outcome:
    """At kinks and ties: each output's gradient lies among those of nearby points, and both modes agree."""
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped("no output requires grad: see output_requires_grad")
    if s.random or s.dtype != torch.float64:
        return skipped("random, or refuses float64")
    if not all(torch.isfinite(g).all() for g in s.plain if g is not None):
        nearby = aside(s, 1)
        if not all(torch.isfinite(g).all() for g in nearby.plain if g is not None):
            return skipped("the plain gradient is not finite: see first_order")
    tested = 0
    for what, points in _tied(s):
        there = s.with_points(points)
        try:
            if not all(torch.isfinite(y).all() for y in there.outputs):
                continue
            said = _outside(there) or _modes_disagree(there)
        except Exception:  # whatever the checked code raises: outside its domain
            continue
        tested += 1
        if said is not None:
            return finding(f"{what}: {said}", "only at ties")
    return passed(f"among the slopes nearby at {tested} sets of ties and kinks")


def _tied(s: Subject) -> Iterator[tuple[str, list[Tensor]]]:
    yield "as given", list(s.points)
    kinks = list(dict.fromkeys([*KINKS, *(k for x in s.numbers() if abs(x) < 100 for k in (x, -x))]))
    for i, (name, p) in enumerate(zip(s.names, s.points, strict=True)):
        if not p.numel() or isinstance(s._points[i].slot, str):
            continue
        for c in kinks:
            some = p.clone().view(-1)
            some[::2] = c
            yield f"every second entry of {name} at {c:g}", _put(s, i, some.view_as(p))
        for c in (0.0, float(p.flatten()[0])):
            yield f"all entries of {name} at {c:.4g}", _put(s, i, torch.full_like(p, c))
        others = list(zip(s.names[:i], s.points[:i], strict=True))
        others += [("another argument", t) for t in s.others().values() if t.is_floating_point()]
        for other, q in others:
            if q.shape == p.shape:
                for c in (0.0, 1.0, -1.0):
                    yield f"{name} = {other} + {c:g}", _put(s, i, q + c)


def _put(s: Subject, i: int, point: Tensor) -> list[Tensor]:
    return [point if j == i else p for j, p in enumerate(s.points)]


def _rows(s: Subject, points: Sequence[Tensor], outputs: Sequence[int]) -> Tensor:
    """(outputs, entries of all points): the gradient of each of these entries of the outputs."""
    rows = []
    shapes = [y.numel() for y in s.outputs]
    for k in outputs:
        unit = torch.zeros(sum(shapes), dtype=torch.float64)
        unit[k] = 1
        v = [part.view_as(y) for part, y in zip(unit.split(shapes), s.outputs, strict=True)]
        grads = s.gradients(points=points, cotangents=v)
        rows.append(
            _numeric.flat(
                [torch.zeros_like(p) if g is None else g for g, p in zip(grads, s.points, strict=True)]
            )
        )
    return torch.stack(rows)


def _moved(s: Subject, direction: Tensor, h: float) -> list[Tensor]:
    parts = direction.split([p.numel() for p in s.points])
    return [p + h * d.view_as(p) for p, d in zip(s.points, parts, strict=True)]


def _outside(s: Subject) -> str | None:
    """An output whose gradient is no mixture of those at nearby points, or None."""
    m, n = sum(y.numel() for y in s.outputs), sum(p.numel() for p in s.points)
    generator = torch.Generator().manual_seed(s.case.seed)
    chosen = torch.randperm(m, generator=generator)[:MOST_OUTPUTS].tolist()
    here = _rows(s, s.points, chosen)
    directions = torch.randn(8, n, generator=generator, dtype=torch.float64)
    directions = directions.sign() * (directions.abs() + 0.5)  # every entry leaves its tie
    near = torch.stack([_rows(s, _moved(s, directions[k], NEAR[k % 4]), chosen) for k in range(4)])
    for row, k in enumerate(chosen):
        g, around = here[row], near[:, row]
        if not torch.isfinite(around).all():
            continue
        scale = float(around.abs().max()) + 1e-9
        smooth = (around - g).abs().amax(1).min() <= 1e-5 * scale
        if smooth:
            continue
        growth = float(around[3].abs().max()) > 100 * float(around[0].abs().max()) + 1e-6
        if growth:
            continue
        if not torch.isfinite(g).all():
            return f"the gradient of output entry {k} is not finite, nearby it is at most {scale:.4g}"
        if not s.functions:  # torch's own choice, a singular value's of equal ones: not for samples to judge
            continue
        distance = _distance(s, k, g, list(around), directions)
        if distance > 1e-3 * scale:
            worst = int((g - around.mean(0)).abs().argmax())
            return (
                f"the gradient of output entry {k} is no mixture of those nearby, off by {distance:.4g}: "
                f"{float(g[worst]):.6g}, nearby {float(around[:, worst].min()):.6g} to "
                f"{float(around[:, worst].max()):.6g}"
            )
    return None


def _distance(s: Subject, k: int, g: Tensor, around: list[Tensor], directions: Tensor) -> float:
    """From ``g`` to the hull of gradients nearby, which grows towards it as long as that helps."""
    for direction in directions[4:]:
        around.append(_rows(s, _moved(s, direction, 1e-6), [k])[0])
    distance = math.inf
    generator = torch.Generator().manual_seed(k)
    for step in range(48):
        rest = g - _nearest(torch.stack(around), g)
        distance = float(rest.abs().max())
        if distance <= 1e-4 * float(torch.stack(around).abs().max()):
            break
        # Where a maximum of slopes is taken, or a minimum, going along what is missing shows it.
        wanted = [sign * rest / rest.abs().max() + 0.05 * directions[step % 8] for sign in (1, -1)]
        # In an order, an entry comes to its place when so many others are below it.
        below = torch.rand(len(g), generator=generator) < (step + 0.5) / 48
        split = torch.where(below, -1.0, 1.0) * directions[step % 8].abs()
        split[int(rest.abs().argmax())] = 0.01
        for direction in [*wanted, split]:
            row = _rows(s, _moved(s, direction, 1e-6), [k])[0]
            if torch.isfinite(row).all():
                around.append(row)
    return distance


def _nearest(vertices: Tensor, g: Tensor) -> Tensor:
    """The point of the hull of ``vertices`` (K, N) nearest to ``g``: fully corrective, by projected gradient."""
    gram = vertices @ vertices.T
    target = vertices @ g
    step = 1.0 / float(torch.linalg.matrix_norm(gram, 2) + 1e-12)
    w = torch.full((len(vertices),), 1.0 / len(vertices), dtype=vertices.dtype)
    z, t = w, 1.0
    for _ in range(300):
        new = _on_simplex(z - step * (gram @ z - target))
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        z, w, t = new + (t - 1) / following * (new - w), new, following
    return w @ vertices


def _on_simplex(w: Tensor) -> Tensor:
    """The nearest non-negative weights of sum one."""
    u = w.sort(descending=True).values
    excess = (u.cumsum(0) - 1) / torch.arange(1, len(u) + 1, dtype=u.dtype)
    return (w - excess[int((u > excess).nonzero().max())]).clamp(min=0)


def _modes_disagree(s: Subject) -> str | None:
    """Forward and backward mode, which are transposes of each other also at a kink."""
    tangents = tuple(s.random_like(s.points, 5))
    try:
        forward = torch.func.jvp(s.function, tuple(s.points), tangents)[1]
    except Exception:  # whatever the checked code raises: a limit of forward_mode
        return None
    if not any(t.any() for t in forward):
        return None
    backward = s.plain
    left = sum(float((v * t).sum()) for v, t in zip(s.cotangents, forward, strict=True))
    right = sum(float((g * d).sum()) for g, d in zip(backward, tangents, strict=True) if g is not None)
    size = sum(float((g * d).norm()) for g, d in zip(backward, tangents, strict=True) if g is not None)
    if abs(left - right) <= max(1e-6, tolerance(s)) * (size + abs(left)) or not math.isfinite(left + right):
        return None
    return f"forward mode says {left:.6g}, backward {right:.6g}"
