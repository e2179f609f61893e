"""The routes by which PyTorch differentiates, other than a plain backward: each gives what that gives, or refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, func
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from manualprop.verify._compare import right_instead
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import (
    Found,
    differs,
    elsewhere,
    gradients_named,
    outputs_named,
    ratio,
    repeatable,
)

BATCH = 3  # points that are batched, and cotangents or directions at a time
MOST = 4  # arguments that are varied one by one


def closeness(s: Subject, found: Found, expected: Found, names: Sequence[str]) -> str:
    """How the same mathematics in another order of operations differs, beyond rounding."""
    strict = 1e-9 if s.dtype == torch.float64 else 1e-4
    if not differs(found, expected, names, strict):
        return ""
    rough = [100 * r for r in s.roughness] if len(names) == len(s.points) else ()
    return differs(found, expected, names, max(strict, s.precision), rough)


def what_is_wrong(found: Found, expected: Found, route: str) -> str:
    """Why a route may differ."""
    if all(g is None or not g.any() for g in found):
        return f"zero: the gradient is lost under {route}"
    c = ratio(found, expected)
    if c is not None and abs(c - 1) < 1e-8:
        return f"wrong values, not gradients, under {route}"
    return f"constant factor {c:.6g} under {route}" if c is not None else f"only under {route}"


def recorded(s: Subject) -> list[bool]:
    """Which outputs require grad in the plain run."""
    return [y.requires_grad for y in s(*s.at())]


def lost(outputs: Sequence[Tensor], were_recorded: Sequence[bool]) -> str:
    """Which output has lost its graph."""
    pairs = enumerate(zip(outputs, were_recorded, strict=True))
    gone = [i for i, (y, was) in pairs if was and not y.requires_grad]
    return f"output {gone[0]} does not require grad" if gone else ""


# ----- memory for time -----


@probe()
@repeatable
def checkpointing(s: Subject) -> Outcome:
    """Forward run again in backward, by either kind of checkpoint; at quick by the one that needs no compiler."""
    refused, was_recorded = [], recorded(s)
    kinds = (
        (True,) if s.quick else (False, True)
    )  # the other asks for settings of torch._dynamo: half a second
    for reentrant in kinds:
        how = f"use_reentrant={reentrant}"
        leaves = s.at()
        s.reseed()
        try:
            # Reentrant, as checkpoint itself calls it; but that is marked for the compiler, which it would import.
            outputs = (
                CheckpointFunction.apply(s.function, True, *leaves)
                if reentrant
                else checkpoint(s.function, *leaves, use_reentrant=False)
            )
            gone = lost(outputs, was_recorded)
            pairs = [(y, c) for y, c in zip(outputs, s.cotangents, strict=True) if y.requires_grad]
            if not gone:
                torch.autograd.backward([y for y, _ in pairs], [c.clone() for _, c in pairs])
        except Exception as error:  # whatever torch or the checked code refuses with
            refused.append(f"{how}: {first_sentence(error)}")
            continue
        found = [leaf.grad for leaf in leaves]
        text = (
            gone
            or closeness(s, outputs, s.outputs, outputs_named(s))
            or closeness(s, found, s.plain, gradients_named(s))
        )
        if text:
            return finding(f"under checkpoint, {how}, {text}", what_is_wrong(found, s.plain, "checkpointing"))
    which = "both kinds give" if len(kinds) == 2 else "the reentrant kind gives"
    return limit("; ".join(refused)) if refused else passed(f"{which} the plain gradients")


@probe()
@repeatable
def saved_tensor_hooks(s: Subject) -> Outcome:
    """Saved tensors packed and unpacked, as by save_on_cpu: copied, laid out anew, sent through bytes."""
    for what, pack, unpack in (
        ("copies", torch.clone, lambda t: t),
        (
            "contiguous copies at each unpacking",
            lambda t: t,
            lambda t: t.clone(memory_format=torch.contiguous_format),
        ),
        ("bytes", _to_bytes, _from_bytes),
    ):
        leaves = s.at()
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                outputs = s(*leaves)
            found = s.pull_back(outputs, leaves, [c.clone() for c in s.cotangents])
        except Exception as error:  # whatever torch or the checked code refuses with
            return limit(f"saved as {what}: {first_sentence(error)}")
        text = closeness(s, found, s.plain, gradients_named(s))
        if text:
            return finding(
                f"with saved tensors packed as {what}, {text}",
                "backward relies on the identity or the address of a saved tensor, which others hand back",
            )
    return passed("packed and unpacked three ways")


def _to_bytes(t: Tensor) -> tuple[list[int], torch.dtype, Any]:
    real = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return list(real.shape), t.dtype, bytes(real.contiguous().reshape(-1).view(torch.uint8).tolist())


def _from_bytes(packed: tuple[list[int], torch.dtype, Any]) -> Tensor:
    shape, dtype, content = packed
    stored = dtype.to_real() if dtype.is_complex else dtype
    if not content:
        return torch.empty(shape[:-1] if dtype.is_complex else shape, dtype=dtype)
    t = torch.frombuffer(bytearray(content), dtype=stored).reshape(shape)
    return torch.view_as_complex(t) if dtype.is_complex else t


# ----- torch.func -----


def first_sentence(error: Exception) -> str:
    """The first sentence of an error.  Torch's refusals go on to say where to read more."""
    return message(error).partition(". ")[0]


REDRAWN = "random numbers are drawn in another order here, so that values cannot be compared"


def _redrawn(s: Subject, sample: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether a random function's outputs under a transform are others than its plain ones."""
    return s.random and bool(closeness(s, found, [y.detach() for y in s(*sample)], outputs_named(s)))


def _values(s: Subject, points: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs as torch.func's backward computes them."""
    values: tuple[Tensor, ...] = func.vjp(s.function, *points)[0]
    return values


@probe()
@repeatable
def func_grad(s: Subject) -> Outcome:
    """torch.func.vjp and torch.func.grad, of all inputs and of each alone."""
    points = [p.clone() for p in s.points]
    names = gradients_named(s)
    try:
        s.reseed()
        outputs, pull = func.vjp(s.function, *points)[:2]
        found = pull(tuple(c.clone() for c in s.cotangents))
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(first_sentence(error))
    if _redrawn(s, points, outputs):
        return limit(REDRAWN)
    text = closeness(s, outputs, s.outputs, outputs_named(s)) or closeness(s, found, s.plain, names)
    if text:
        bad = finding(f"under torch.func.vjp {text}", what_is_wrong(found, s.plain, "torch.func"))
        return bad if right_instead(s, found) else apart(bad, "first_order")
    for i, name in list(enumerate(names))[:MOST]:
        try:
            s.reseed()
            alone = func.grad(lambda *p: weighed(s, p, s.cotangents), argnums=i)(*points)
        except Exception as error:  # whatever torch or the checked code refuses with
            return limit(f"torch.func.grad of {s.names[i]} alone: {first_sentence(error)}")
        text = closeness(s, [alone], [s.plain[i]], [name])
        if text:
            bad = finding(
                f"under torch.func.grad of {s.names[i]} alone {text}",
                what_is_wrong([alone], [s.plain[i]], "torch.func"),
            )
            return apart(bad, "first_order")
    return passed("vjp and grad give the plain gradients")


def weighed(s: Subject, points: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    """A number whose gradient is that of the outputs with these cotangents."""
    return _weighed(s, s.function(*points), cotangents)


def _weighed(s: Subject, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Tensor:
    triples = zip(outputs, cotangents, s.recorded, strict=True)
    return torch.stack([(c * y).sum() for y, c, differentiable in triples if differentiable]).sum()


def _rows(s: Subject) -> list[list[Tensor]]:
    """Several cotangents of all outputs."""
    return [s.random_like(s.outputs, 20 + k) for k in range(BATCH)]


@probe()
@repeatable
def jacrev(s: Subject) -> Outcome:
    """torch.func.jacrev: backward batched over several grad_outputs."""
    rows = _rows(s)

    def several(*points: Tensor) -> Tensor:
        outputs = s.function(*points)
        return torch.stack([_weighed(s, outputs, row) for row in rows])

    points = tuple(p.clone() for p in s.points)
    try:
        s.reseed()
        found = func.jacrev(several, tuple(range(len(points))))(*points)
        s.reseed()
        if s.random and _redrawn(s, points, _values(s, points)):
            return limit(REDRAWN)
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(first_sentence(error))
    for k, row in enumerate(rows):
        expected = s.gradients(cotangents=row)
        one = [f[k] for f in found]
        text = closeness(s, one, expected, gradients_named(s))
        if text:
            return finding(f"in a batch of grad_outputs, {text}", what_is_wrong(one, expected, "jacrev"))
    return passed("batched grad_outputs give the gradients of each")


@probe()
@repeatable
def jacfwd(s: Subject) -> Outcome:
    """torch.func.jacfwd: jvp batched over several tangents."""
    directions = [s.random_like(s.points, 30 + k) for k in range(BATCH)]
    points = tuple(p.clone() for p in s.points)

    def along(t: Tensor) -> tuple[Tensor, ...]:
        moved = [p + sum(t[k] * d[i] for k, d in enumerate(directions)) for i, p in enumerate(points)]
        return s.function(*moved)

    try:
        one_by_one = []
        for d in directions:
            s.reseed()
            one_by_one.append(func.jvp(s.function, points, tuple(d))[1])
        s.reseed()
        found = func.jacfwd(along, randomness="same")(torch.zeros(BATCH, dtype=points[0].dtype))
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(first_sentence(error))
    for k, expected in enumerate(one_by_one):
        one = [f[..., k] for f in found]
        text = closeness(s, one, expected, outputs_named(s))
        if text:
            return finding(
                f"in a batch of tangents, the tangent of {text}", what_is_wrong(one, expected, "jacfwd")
            )
    silent = _silent(s, one_by_one, directions)
    if silent:
        return finding(
            silent, "zero tangents, without an error: forward mode is not supported, and silently so"
        )
    return passed("batched tangents give the tangents of each")


def _silent(s: Subject, tangents: Sequence[Sequence[Tensor]], directions: Sequence[Sequence[Tensor]]) -> str:
    """Whether every tangent is zero where backward says it is not."""
    if any(t.any() for row in tangents for t in row):
        return ""
    for d in directions:
        slope = sum((g * t).sum().item() for g, t in zip(s.plain, d, strict=True) if g is not None)
        if abs(slope) > 1e-6:
            return f"the tangents are exactly zero, where backward gives a slope of {slope:.3g}"
    return ""


# ----- batches -----


def _batch(s: Subject) -> list[list[Tensor]]:
    """The points of each of several samples."""
    return [s.points, *(elsewhere(s, 40 + k) for k in range(1, BATCH))]


def _ways(s: Subject) -> list[tuple[str, list[int | None]]]:
    """Which arguments are batched, and along which dimension."""
    n = len(s.points)
    ways: list[tuple[str, list[int | None]]] = [("in_dims=0", [0] * n), ("in_dims=-1", [-1] * n)]
    if n > 1:
        ways += [
            (f"only {name} batched", [0 if j == i else None for j in range(n)])
            for i, name in list(enumerate(s.names))[:MOST]
        ]
    return ways


def _samples(s: Subject, dims: Sequence[int | None]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The batched arguments, and the points of each sample."""
    samples = _batch(s)
    each = [
        [p if d is not None else s.points[i] for i, (p, d) in enumerate(zip(row, dims, strict=True))]
        for row in samples
    ]
    stacked = [
        s.points[i] if d is None else torch.stack([row[i] for row in samples], d) for i, d in enumerate(dims)
    ]
    return stacked, each


@probe()
@repeatable
def vmap(s: Subject) -> Outcome:
    """A batch by torch.vmap gives the outputs, and by backward the gradients, of each sample."""
    was_recorded = recorded(s)
    for way, dims in _ways(s):
        stacked, each = _samples(s, dims)
        leaves = [p.clone().requires_grad_() for p in stacked]
        rows = [s(*sample) for sample in each]
        expected = [torch.stack(ys) for ys in zip(*rows, strict=True)]
        try:
            s.reseed()
            found = func.vmap(s.function, tuple(dims), randomness="same")(*leaves)
        except Exception as error:  # whatever torch or the checked code refuses with
            return limit(f"{way}: {first_sentence(error)}")
        if _redrawn(s, each[0], [y[0] for y in found]):
            return limit(REDRAWN)
        text = closeness(s, found, expected, outputs_named(s)) or lost(found, was_recorded)
        if text:
            return finding(f"with {way}, {text}", f"only under vmap, {way}")
        outcome = _backward_of_batch(s, way, dims, found, leaves, each)
        if outcome is not None:
            return outcome
    return passed(f"{BATCH} samples, by {', '.join(way for way, _ in _ways(s))}")


def _backward_of_batch(
    s: Subject,
    way: str,
    dims: Sequence[int | None],
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    each: Sequence[Sequence[Tensor]],
) -> Outcome | None:
    try:
        pulled = s.pull_back(outputs, leaves, [torch.stack([c] * BATCH) for c in s.cotangents])
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(f"backward through vmap, {way}: {first_sentence(error)}")
    rows = [s.gradients(sample) for sample in each]
    expected: list[Tensor | None] = []
    for d, column in zip(dims, zip(*rows, strict=True), strict=True):
        known = [g for g in column if g is not None]
        if not known:
            expected.append(None)
        else:
            expected.append(torch.stack(known).sum(0) if d is None else torch.stack(known, d))
    text = closeness(s, pulled, expected, gradients_named(s))
    if not text:
        return None
    return finding(f"backward through vmap, {way}: {text}", what_is_wrong(pulled, expected, "vmap"))


def _first_of_batch(s: Subject, dims: Sequence[int | None], stacked: Sequence[Tensor]) -> list[Tensor]:
    values = func.vmap(lambda *p: _values(s, p), tuple(dims), randomness="same")(*stacked)
    return [y[0] for y in values]


@probe()
@repeatable
def vmap_grad(s: Subject) -> Outcome:
    """Per-sample gradients by vmap(grad), as by one backward for each sample."""
    everything = tuple(range(len(s.points)))

    def gradients(*points: Tensor) -> Any:
        return func.grad(lambda *p: weighed(s, p, s.cotangents), argnums=everything)(*points)

    for way, dims in _ways(s):
        stacked, each = _samples(s, dims)
        try:
            s.reseed()
            found = func.vmap(gradients, tuple(dims), randomness="same")(*stacked)
            s.reseed()
            if s.random and _redrawn(s, each[0], _first_of_batch(s, dims, stacked)):
                return limit(REDRAWN)
        except Exception as error:  # whatever torch or the checked code refuses with
            return limit(f"{way}: {first_sentence(error)}")
        for k, sample in enumerate(each):
            expected = s.gradients(sample)
            one = [f[k] for f in found]
            text = closeness(s, one, expected, gradients_named(s))
            if text:
                return finding(
                    f"with {way}, in sample {k}, {text}", what_is_wrong(one, expected, "vmap of grad")
                )
    return passed(f"per-sample gradients of {BATCH} samples, by {', '.join(way for way, _ in _ways(s))}")
