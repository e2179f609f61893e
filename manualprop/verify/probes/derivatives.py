"""Is it the derivative: first, second and third order, backward and forward; and is it the right function."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._compare import (
    Comparison,
    Gradient,
    Hand,
    Tangent,
    by_forward,
    by_jvp,
    compare,
    first_order_of,
)
from manualprop.verify._diagnosis import explain, of_refused_shape
from manualprop.verify._explanations import MISSING
from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed, skipped
from manualprop.verify._subject import Subject
from manualprop.verify._verdicts import STATE
from manualprop.verify._watch import watched
from manualprop.verify.probes._exchanged import wrong_all_the_same

LOST = "no output requires grad: see output_requires_grad"


def _differentiable(s: Subject) -> bool:
    return any(y.requires_grad for y in s(*s.at()))


def _outcome(s: Subject, comparisons: Sequence[Comparison]) -> Outcome:
    if any(c.wrong.any() for c in comparisons):
        evidence, diagnosis, details = explain(s, comparisons)
        return finding(evidence, diagnosis, **details)
    known = [c for c in comparisons if c.measured.any()]
    if any(c.hand.numel() for c in comparisons) and not known:
        return skipped("differences cannot measure it here: it lies at kinks, or the values are too rough")
    worst = max(((c.hand - c.numeric).abs()[c.measured].max().item() for c in known), default=0.0)
    text = [f"largest error {worst:.1g} in {', '.join(s.names[c.point] for c in known)}"] if known else []
    for c in comparisons:
        missed = int((~c.measured).sum())
        if missed and not c.measured.any():
            text.append(f"{s.names[c.point]}: not measured here{_at_kinks(c)}")
        elif missed:
            text.append(f"{s.names[c.point]}: {missed} entries not measured here{_at_kinks(c)}")
    return passed("; ".join(text) or "nothing to measure", error=worst)


def _at_kinks(c: Comparison) -> str:
    return ", at kinks (see ties)" if c.kinks.any() else ""


def _limited(s: Subject, hand: Hand | None = None) -> Outcome:
    """A comparison of something that need not be supported, if the refusal is loud."""
    try:
        comparisons = compare(s, hand)
    except Exception as error:  # whatever torch or the checked code refuses with
        return refused(s, error)
    return _outcome(s, comparisons)


def refused(s: Subject, error: Exception) -> Outcome:
    """A limit, since it is loud; but a gradient of the wrong shape is a mistake that the engine met by chance."""
    if re.search(r"returned an (invalid gradient|incorrect number of gradients)", str(error)):
        return finding(f"raises {message(error)}", of_refused_shape(str(error), s))
    return limit(message(error))


@probe()
def first_order(s: Subject) -> Outcome:
    """backward against numerical differentiation."""
    if not _differentiable(s):
        return skipped(LOST)
    outcome = _outcome(s, first_order_of(s))
    larger = _larger_than_its_input(s) if outcome.verdict == "passed" else ""
    return dataclasses.replace(outcome, evidence=f"{outcome.evidence}{larger}")


def _larger_than_its_input(s: Subject) -> str:
    """The gradients that autograd itself sums to the shape of their input: right on every route, but not for free."""
    found: list[str] = []

    def see(backward: Callable[..., Any], arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        ctx = arguments[0]
        given = [r for r, wanted in zip(results, ctx.needs_input_grad, strict=False) if wanted]
        targets = [(node, i) for node, i in ctx.next_functions if node is not None]
        for g, (node, i) in zip(given, targets, strict=False):
            shape = list(node._input_metadata[i].shape)
            if isinstance(g, Tensor) and list(g.shape) != shape:
                found.append(f"; autograd sums a gradient of shape {list(g.shape)} to its input's {shape}")

    with watched(s.functions, see):
        s.gradients()
    return found[0] if found else ""


@probe()
def second_order(s: Subject) -> Outcome:
    """The gradients' own derivative under create_graph, in the inputs and in grad_output."""
    if not _differentiable(s):
        return skipped(LOST)
    gradient = Gradient(s)
    try:
        _backward(gradient)
    except Exception as error:  # whatever torch or the checked code refuses with
        return refused(s, error)
    try:
        comparisons = compare(gradient)
    except Exception as error:  # whatever torch or the checked code refuses with
        return refused(s, error)
    outcome = _outcome(gradient, comparisons)
    if outcome.verdict == "finding" and _wrong_by_itself(s, comparisons, outcome):
        outcome = apart(outcome, "first_order")
    if outcome.verdict == "finding" and not _reads_its_output(s):
        outcome = apart(outcome, "partial_outputs")
    if outcome.verdict == "finding" and wrong_all_the_same(s):
        # Of numbers that are there, what other calls have left behind may be the cause.
        outcome = apart(outcome, *(STATE if outcome.diagnosis.startswith(MISSING) else ("interleaving",)))
    return outcome


def _wrong_by_itself(s: Subject, second: Sequence[Comparison], outcome: Outcome) -> bool:
    """Whether a wrong second derivative would stay wrong if the first were right.

    It is the derivative of the gradient that backward gives, right or wrong.  One that does not come through has a
    cause of its own, and so has a wrong one of a gradient that is right itself; but backward may read the saved
    output, whose derivative is the wrong first one, or call the Function itself.
    """
    if not s.functions:
        return False
    reads = _reads_its_output(s)
    if outcome.diagnosis.startswith("zero") and not _gives_nothing(s) and not reads:
        return True
    right = _numeric.flat(
        [
            torch.full(p.shape, float(not c.wrong.any()))
            for p, c in zip(s.points, first_order_of(s), strict=True)
        ]
    )
    of_a_right_one = any(
        bool((c.wrong.any(1) & (c.cotangents.count_nonzero(1) == 1) & (c.cotangents @ right != 0)).any())
        for c in second
    )
    return of_a_right_one and not reads


def _gives_nothing(s: Subject) -> bool:
    """Whether some input gets no gradient at all."""
    return any(bool(c.wrong.any()) and not bool(c.hand.any()) for c in first_order_of(s))


def _reads_its_output(s: Subject) -> bool:
    """Whether the Function stands in the graph of its own gradient: by its saved output, or because backward calls it."""
    leaves = s.at()
    outputs = s(*leaves)
    gradients = s.pull_back(outputs, leaves, s.cotangents_for(outputs), create_graph=True)
    behind = (s.nodes(outputs), s.nodes([g for g in gradients if g is not None]))
    calls, again = ({node._forward_cls for node in nodes} for nodes in behind)
    return bool(calls & again)


def _backward(s: Subject) -> None:
    """``y.backward()``, which meets once_differentiable's refusal, where ``torch.autograd.grad`` walks past it."""
    outputs = [y for y in s(*s.at()) if y.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, s.cotangents_for(outputs))


@probe("deep")
def third_order(s: Subject) -> Outcome:
    """Once more."""
    if not _differentiable(s):
        return skipped(LOST)
    second = Gradient(s)
    try:
        if not _differentiable(second):
            return skipped("the gradient does not require grad: see second_order")
        third = Gradient(second)
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(message(error))
    return _limited(third)


@probe()
def forward_mode(s: Subject) -> Outcome:
    """jvp against numerical differentiation, by ``torch.autograd.forward_ad`` and by ``torch.func.jvp``."""
    dual = _forward(s, by_forward)
    if s.random:
        return dual  # under torch.func.jvp dropout draws other numbers from the same seed
    func = _forward(s, by_jvp)
    if func.verdict == "finding" and dual.verdict != "finding":
        return dataclasses.replace(func, evidence=f"torch.func.jvp: {func.evidence}")
    return dual


def _forward(s: Subject, by: Hand) -> Outcome:
    """A tangent that is wrong as the gradient is has the same cause; another one has its own."""
    outcome = _limited(s, by)
    if outcome.verdict != "finding":
        return outcome
    try:
        tangents, gradients = compare(s, by), first_order_of(s)
    except Exception:  # whatever the checked code raises
        return outcome
    same = all(
        bool(((t.hand - g.hand).abs() <= t.tolerance)[t.wrong].all())
        for t, g in zip(tangents, gradients, strict=True)
    )
    return outcome if same else apart(outcome, "first_order")


@probe()
def forward_over_reverse(s: Subject) -> Outcome:
    """The tangent of the gradients: a Hessian-vector product."""
    return _limited(Gradient(s), by_forward) if _differentiable(s) else skipped(LOST)


@probe("deep")
def nested_forward_mode(s: Subject) -> Outcome:
    """jvp of jvp, as in ``jacfwd(jacfwd(f))``."""
    tangent = Tangent(s)
    try:
        tangent.outputs  # noqa: B018  (evaluated for what it raises)
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(message(error))
    return _limited(tangent, by_jvp)


@probe()
def linearity(s: Subject) -> Outcome:
    """backward is linear in grad_output, from 1e-8 to 1e8, and zero for zero."""
    if not _differentiable(s):
        return skipped(LOST)
    v = s.cotangents
    w = s.random_like(s.outputs, 2)
    at_w = s.gradients(cotangents=w)
    # By powers of two: a product with one is exact, so that rounding and cancellation are the same on both sides.
    far = 27 if torch.finfo(s.points[0].dtype).max > 1e30 else 8
    for k in (-far, -13 if far > 13 else -4, 0, 1, 13 if far > 13 else 4, far):
        c = -1.0 if k == 0 else 2.0**k
        scaled = [c * t for t in v]
        said = _not_linear(
            s, f"{c:.3g} grad_output", scaled, [None if g is None else c * g for g in s.plain], 0.0
        )
        if said is not None:
            return said
    said = _not_linear(
        s, "zero grad_output", [0 * t for t in v], [None if g is None else 0 * g for g in s.plain], 0.0
    )
    if said is not None:
        return said
    both = [None if a is None or b is None else a + b for a, b in zip(s.plain, at_w, strict=True)]
    terms = [max(_largest(a), _largest(b)) for a, b in zip(s.plain, at_w, strict=True)]
    said = _not_linear(
        s, "a sum of two grad_outputs", [a + b for a, b in zip(v, w, strict=True)], both, 1.0, terms
    )
    return said or passed("linear from 1e-8 to 1e8")


def _largest(g: Tensor | None) -> float:
    return g.abs().nan_to_num(0, 0, 0).max().item() if g is not None and g.numel() else 0.0


def _not_linear(
    s: Subject,
    what: str,
    cotangents: Sequence[Tensor],
    expected: Sequence[Tensor | None],
    rounded: float,
    terms: Sequence[float] = (),
) -> Outcome | None:
    """The finding that gradients are not ``expected``; ``rounded`` is 1 where another order of operations may round."""
    found = s.gradients(cotangents=cotangents)
    for i, (name, a, want) in enumerate(zip(s.names, found, expected, strict=True)):
        if (a is None) != (want is None):
            return finding(f"for {what} the gradient of {name} is {'' if a is None else 'not '}None")
        if a is None or want is None or not torch.isfinite(want).all() or not want.numel():
            continue
        scale = want.abs().max().item()
        error = (a - want).abs().nan_to_num(torch.inf).max().item()
        allowed = max(s.precision if rounded else 1e-6, torch.finfo(want.dtype).eps) * max(
            scale, *terms[i : i + 1], 0.0
        )
        allowed += 100 * rounded * s.roughness[i] + torch.finfo(want.dtype).tiny
        if not error <= allowed:
            return finding(
                f"for {what} the gradient of {name} is off by {error:.3g}, where its largest entry is {scale:.3g}",
                _why_not_linear(s),
            )
    return None


def _why_not_linear(s: Subject) -> str:
    twice = s.gradients(cotangents=[2 * v for v in s.cotangents])
    pairs = [(a, b) for a, b in zip(s.plain, twice, strict=True) if a is not None and b is not None]
    if all(torch.equal(a, b) for a, b in pairs):
        return "grad_output is ignored: right at most for a grad_output of ones"
    return "not linear in grad_output"


@probe()
def reference(s: Subject) -> Outcome:
    """Values and gradients against those of the reference that was given."""
    if s.case.reference is None:
        return skipped("no reference was given")
    other = Subject(dataclasses.replace(s.case, fn=s.case.reference, surrogate=None), s.dtype)
    shared = [n for n in other.names if n in s.names]
    by_name = dict(zip(s.names, s.points, strict=True))
    if not shared and len(other.points) == len(s.points):  # parameters of other names, in the same places
        shared, other.names, by_name = s.names, s.names, dict(zip(s.names, s.points, strict=True))
    other = other.with_points([by_name.get(n, p) for n, p in zip(other.names, other.points, strict=True)])
    if len(other.outputs) != len(s.outputs):
        return finding(f"returns {len(s.outputs)} tensors, the reference {len(other.outputs)}")
    for i, (y, want) in enumerate(zip(s.outputs, other.outputs, strict=True)):
        if y.shape != want.shape:
            return finding(f"output {i} has shape {list(y.shape)}, the reference's {list(want.shape)}")
        bad = _off(y, want, s.precision)
        if bad:
            return finding(f"output {i}: {bad}", "wrong value")
    theirs = dict(zip(other.names, other.gradients(cotangents=s.cotangents), strict=True))
    for name, g in zip(s.names, s.plain, strict=True):
        want_g = theirs.get(name)
        if want_g is None:
            continue
        bad = _off(torch.zeros_like(want_g) if g is None else g, want_g, s.case.rtol)
        if bad:
            return finding(f"gradient of {name}: {bad}", "wrong gradient")
    return passed(f"value and gradients of {', '.join(n for n in s.names if n in theirs)} agree")


def _off(found: Tensor, want: Tensor, rtol: float) -> str:
    """How two tensors of the same shape differ by more than ``rtol`` of the largest entry, or nothing."""
    if not want.numel():
        return ""
    finite = torch.isfinite(want)
    if not torch.equal(found.nan_to_num(1, 2, 3)[~finite], want.nan_to_num(1, 2, 3)[~finite]):
        return "not finite in other places than the reference's"
    error = (found - want).abs().where(finite, 0)
    scale = want.abs().where(finite, 0).max().item()
    worst = error.max().item()
    if worst <= rtol * scale + 1e-12:
        return ""
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), want.shape))
    return f"off by {worst:.3g} at {list(index)}: {found[index].item():.6g}, the reference {want[index].item():.6g}"
