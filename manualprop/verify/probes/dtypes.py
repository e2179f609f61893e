"""The dtypes that go in and come out, mixed dtypes, and autocast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manualprop.verify._compare import Comparison, compare, first_order_of
from manualprop.verify._difference import listed, sizes
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed, skipped
from manualprop.verify._subject import OutsideDomain, Subject, is_float
from manualprop.verify.probes._runs import copies

LOST = "no output requires grad: see output_requires_grad"
LOW = (torch.float32, torch.bfloat16, torch.float16)

# How many roundings of the working dtype, relative to a tensor's largest entry, a right gradient may be off by.
# In half precision a formula spelled in it rounds at each of a dozen steps; in float32 sums over many rows do.
ROUNDINGS = {torch.float32: 1000.0, torch.bfloat16: 16.0, torch.float16: 32.0}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor rounded to ``dtype``, in its own; anything else as it is."""
    if not is_float(value) or value.is_complex():
        return value
    return value.detach().to(dtype).to(value.dtype).requires_grad_(value.requires_grad)


# ----- dtypes -----


class Lowered(NamedTuple):
    """The function in a lower dtype, and in float64 at the very same numbers."""

    low: Subject
    high: Subject


def lowered(s: Subject, dtype: torch.dtype) -> Lowered:
    args, kwargs = tree_map(lambda t: _cast(t, dtype), (tuple(s.case.args), dict(s.case.kwargs)))
    case = dataclasses.replace(s.case, args=args, kwargs=kwargs)
    low, high = Subject(case, dtype), Subject(case, s.dtype)
    low._not_leaf = high._not_leaf = s._not_leaf
    return Lowered(
        low, high.with_points([p.to(q.dtype) for p, q in zip(low.points, high.points, strict=True)])
    )


def _allowed(
    high: Subject, v: Sequence[Tensor | None], plain: Sequence[Tensor | None], eps: float
) -> list[Tensor]:
    """How far each gradient moves, at most, when every number that goes in is rounded once: entry by entry."""
    moved = [torch.zeros_like(p) for p in high.points]
    for seed in (31, 32, 33, 34):
        noise = high.random_like([*high.points, *[t for t in v if t is not None]], seed)
        shaken = [p * (1 + eps * n.clamp(-2, 2)) for p, n in zip(high.points, noise, strict=False)]
        rest = iter(noise[len(shaken) :])
        w = [None if t is None else t * (1 + eps * next(rest).clamp(-2, 2)) for t in v]
        for i, (a, b) in enumerate(zip(high.gradients(shaken, w), plain, strict=True)):
            if a is not None and b is not None:
                moved[i] = torch.maximum(moved[i], (a - b).abs().nan_to_num(torch.inf))
    return moved


@probe()
def dtypes(s: Subject) -> Outcome:
    """Gradients in float32, bfloat16 and float16 against float64 at the same numbers; and whether float64 is float64."""
    if s.dtype != torch.float64:
        return limit("float64 is refused, so there is nothing to hold lower dtypes against")
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    wrong, refused, seen = [], [], []
    rough = _float32_inside(s)
    if rough:
        wrong.append(("float64", rough))
    for dtype in LOW:
        name = short(dtype)
        low_and_high = lowered(s, dtype)
        try:
            y = low_and_high.low(*low_and_high.low.at())
        except Exception as error:  # whatever the checked code refuses with
            refused.append(f"{name}: {message(error)}")
            continue
        evidence = _in_dtype(low_and_high, y, dtype)
        seen.append(name)
        if evidence:
            wrong.append((name, evidence))
    if wrong:
        name, evidence = wrong[0]
        found = finding(f"{name}: {evidence}", f"wrong only in dtype {listed([n for n, _ in wrong])}")
        return found if "raises" in evidence else apart(found, "second_order")
    if refused and not seen:
        return limit("; ".join(refused))
    return passed(
        f"{', '.join(seen)} agree with float64" + (f"; refused: {'; '.join(refused)}" if refused else "")
    )


def _in_dtype(pair: Lowered, y: Sequence[Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the gradients in ``dtype``, or nothing."""
    high = pair.high
    expected_y = high(*high.at())
    if len(y) != len(expected_y) or any(a.shape != b.shape for a, b in zip(y, expected_y, strict=False)):
        return "the outputs have other shapes than in float64"
    if not all(torch.isfinite(a).all() for a in y):
        return ""  # beyond the range of the dtype already in forward: nothing is promised
    forward = max((_relative(a, b) for a, b in zip(y, expected_y, strict=True)), default=0.0)
    # Random cotangents, then ones: a long sum of one sign stops growing if it is rounded at each addition.
    for steady in (False, True):
        cotangents = [torch.ones_like(t) for t in expected_y] if steady else high.cotangents_for(expected_y)
        v = [c.to(a.dtype) if a.requires_grad else None for a, c in zip(y, cotangents, strict=True)]
        evidence = _off(pair, v, forward, dtype, steady)
        if evidence:
            return evidence
    return ""


def _off(pair: Lowered, v: Sequence[Tensor | None], forward: float, dtype: torch.dtype, steady: bool) -> str:
    """How far the gradients for ``v`` are off, or nothing; ``forward`` is the relative error of the outputs."""
    low, high = pair
    eps = torch.finfo(dtype).eps
    exact = [None if c is None else c.double() for c in v]
    leaves = low.at()
    try:
        found = low.pull_back(low(*leaves), leaves, copies(v))
    except NotImplementedError:  # an operation that torch does not have in this dtype
        return ""
    except Exception as error:  # whatever the checked code raises
        return f"forward accepts it, backward raises {message(error)}"
    expected = high.gradients(cotangents=exact)
    slack = _allowed(high, exact, expected, eps)
    # Terms that cancel leave their rounding errors, and they are as large as what arrives.
    largest = max([*sizes(expected), *sizes(high.plain), *sizes(exact)])
    for name, a, b, moved in zip(low.names, found, expected, slack, strict=True):
        if a is None or b is None or not b.numel() or not torch.isfinite(b).all():
            continue
        scale = b.abs().max().item()
        if scale > torch.finfo(dtype).max:
            continue
        if not torch.isfinite(a).all():
            return f"the gradient of {name} is not finite, in float64 it is at most {scale:.4g}"
        scale = max(scale, largest if steady else 0.01 * largest)
        allowed = max(ROUNDINGS[dtype] * eps, 8 * forward) * scale + 8 * moved + torch.finfo(dtype).tiny
        off = (a.double() - b).abs()
        if bool((off > allowed).any()):
            at = int((off - allowed).argmax())
            got, want = a.flatten()[at].item(), b.flatten()[at].item()
            return f"the gradient of {name} is {got:.5g} instead of {want:.5g}, where its largest entry is {scale:.4g}"
    return ""


def _relative(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().item() if b.numel() else 0.0
    return (a.double() - b).abs().max().item() / scale if scale else 0.0


def _float32_inside(s: Subject) -> str:
    """Whether the value is exact in float64 and the gradient is not: a constant or a cast in float32."""
    if s.precision > 1e-8:
        return ""  # the whole function works in less: judged as that
    worst = ""
    compared: list[Callable[[], list[Comparison]]] = [lambda: first_order_of(s), lambda: _at(s, 35)]
    if all(torch.equal(p.float().double(), p) for p in s.points):
        compared = [lambda: _at(s, 36, few=True), lambda: _at(s, 35)]  # a cast of these loses no digit
    for comparisons in compared:
        worst = ""
        for c in comparisons():
            if not c.numeric.numel() or c.wrong.any():
                continue  # wrong altogether: the business of first_order
            scale = c.numeric.abs().nan_to_num(0).max().item()
            doubt = (c.tolerance - s.case.atol - s.case.rtol * scale) / 4
            off = (c.hand - c.numeric).abs().where(c.measured & (doubt < 1e-11 * max(scale, 1e-3)), 0)
            if bool((off > 1e-9 * scale + 40 * doubt.nan_to_num(0, 0, 0) + 1e-15).any()):
                worst = f"the gradient of {s.names[c.point]} is off by {off.max().item():.2g}: float32 in backward?"
                break
        if not worst:
            return ""
    return worst


def _at(s: Subject, seed: int, few: bool = False) -> list[Comparison]:
    """First order at points close by, which float32 does not hold; in ``few`` directions, for speed."""
    noise = s.random_like(s.points, seed)
    try:
        aside = s.with_points(s.allowed([p + 1e-3 * n for p, n in zip(s.points, noise, strict=True)]))
    except OutsideDomain:
        return []
    aside.whole = 8 if few else s.whole
    return compare(aside)


# ----- what comes out, and mixtures -----

BELOW = {torch.float64: 3, torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}


@probe()
def output_dtype(s: Subject) -> Outcome:
    """What comes out has no fewer digits than what goes in."""
    seen, refused = [], []
    for dtype in (torch.float64, *LOW):
        if s.dtype != torch.float64 and dtype == torch.float64:
            continue
        low = lowered(s, dtype).low if dtype != s.dtype else s
        try:
            result = low.raw(*low.at())
        except Exception:  # whatever the checked code refuses with
            refused.append(short(dtype))
            continue
        for k, y in enumerate(t for t in tree_leaves(result) if is_float(t)):
            real = y.dtype.to_real() if y.dtype.is_complex else y.dtype
            if BELOW.get(real, 0) < BELOW[dtype]:
                return finding(
                    f"{short(dtype)} in, {short(real)} out: output {k}",
                    f"the digits of {short(dtype)} are lost, and the dtype is not the caller's",
                )
        seen.append(short(dtype))
    if not seen:
        return skipped("forward refuses every dtype but the given one")
    return passed(f"{', '.join(seen)} come out as they go in, or with more digits")


def _same_draws(y: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether outputs agree as those of one function with the same random numbers do."""
    return all(_relative(a, b) <= 1e-3 for a, b in zip(y, expected, strict=True))


@probe()
def mixed_dtypes(s: Subject) -> Outcome:
    """One input in float32 and the others in float64, where forward accepts that: the same gradients."""
    if s.dtype != torch.float64 or len(s.points) < 2:
        return skipped("there is one differentiated input" if len(s.points) < 2 else "float64 is refused")
    if not any(y.requires_grad for y in s(*s.at())):
        return skipped(LOST)
    done, refused, eps = [], [], torch.finfo(torch.float32).eps
    for i, name in enumerate(s.names):
        rounded = s.points[i].float()
        high = s.with_points([rounded.double() if j == i else p for j, p in enumerate(s.points)])
        leaves = high.at()
        leaves[i] = rounded.clone().requires_grad_()
        try:
            y = s(*leaves)
        except Exception:  # whatever the checked code refuses with
            continue
        if s.random and not _same_draws(y, high.outputs):
            continue  # in float32 the generator gives other numbers
        v = [c.to(a.dtype) if a.requires_grad else None for a, c in zip(y, high.cotangents, strict=True)]
        who = f"{name} in float32, the others in float64"
        try:
            found = s.pull_back(y, leaves, copies(v))
        except Exception as error:  # whatever the checked code raises
            refused.append(f"{who}: forward accepts it, backward raises {message(error)}")
            continue
        exact = [None if c is None else c.double() for c in v]
        expected = high.gradients(cotangents=exact)
        slack = _allowed(high, exact, expected, eps)
        largest = max([*sizes(expected), *sizes(exact)])
        for k, (a, b, moved) in enumerate(zip(found, expected, slack, strict=True)):
            if a is None or b is None or not b.numel() or not torch.isfinite(b).all():
                continue
            off = (a.double() - b).abs()
            if not bool((off <= ROUNDINGS[torch.float32] * eps * largest + 8 * moved).all()):
                at = int(off.nan_to_num(torch.inf).argmax())
                got, want = a.flatten()[at].item(), b.flatten()[at].item()
                return finding(
                    f"{who}: the gradient of {s.names[k]} is {got:.6g} instead of {want:.6g}",
                    "only for mixed dtypes",
                )
        done.append(name)
    if refused:
        return limit(refused[0])
    return (
        passed(f"right with {listed(done)} in float32") if done else skipped("forward refuses mixed dtypes")
    )


# ----- autocast -----


@probe()
def autocast(s: Subject) -> Outcome:
    """Forward under bfloat16 autocast and backward outside of it, as in training, against the plain run."""
    low, high = lowered(s, torch.float32)
    device = low.points[0].device.type
    try:
        plain_y = low(*low.at())
    except Exception as error:  # whatever the checked code refuses with
        return limit(f"float32: {message(error)}")
    if not any(y.requires_grad for y in plain_y):
        return skipped(LOST)
    leaves = low.at()
    try:
        with torch.autocast(device, torch.bfloat16):
            y = low(*leaves)
    except Exception as error:  # whatever the checked code refuses with
        return limit(message(error))
    v = [
        c.to(a.dtype) if a.requires_grad else None
        for a, c in zip(y, low.cotangents_for(plain_y), strict=True)
    ]
    try:
        found = low.pull_back(y, leaves, copies(v))
    except Exception as error:  # whatever the checked code raises
        return limit(f"forward accepts it, backward raises {message(error)}")
    exact = [None if c is None else c.to(high.points[0].dtype) for c in v]
    expected = high.gradients(cotangents=exact)
    eps = torch.finfo(torch.bfloat16).eps
    slack = _allowed(high, exact, expected, eps)
    forward = max((_relative(a, b) for a, b in zip(y, high.outputs, strict=True)), default=0.0)
    largest = max([*sizes(expected), *sizes(exact)])  # terms that cancel leave their rounding errors
    for name, a, b, moved in zip(low.names, found, expected, slack, strict=True):
        if (a is None) != (b is None):
            return finding(
                f"the gradient of {name} is {'lost' if a is None else 'found only'} under autocast"
            )
        if a is None or b is None or not b.numel() or not torch.isfinite(b).all():
            continue
        scale = max(b.abs().max().item(), 0.1 * largest)
        off = (a.double() - b.double()).abs()
        allowed = max(ROUNDINGS[torch.bfloat16] * eps, 8 * forward) * scale + 8 * moved + 1e-30
        if not bool((off <= allowed).all()):
            at = int((off - allowed).nan_to_num(torch.inf).argmax())
            got, want = a.flatten()[at].item(), b.flatten()[at].item()
            return finding(
                f"the gradient of {name} is {got:.5g} instead of {want:.5g}",
                "wrong only in dtype bfloat16 of autocast",
            )
    return passed("agrees with the plain run to the accuracy of bfloat16")
