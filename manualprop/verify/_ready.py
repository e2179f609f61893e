"""Prepare a case for the probes: find the dtype in which it runs, and refuse inputs that can show nothing."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from manualprop.verify import _numeric
from manualprop.verify._budget import QUICK, work
from manualprop.verify._case import Case
from manualprop.verify._meant import Detaching, pushed
from manualprop.verify._module import exchange
from manualprop.verify._subject import BadUse, OutsideDomain, Subject, is_float

EVALUATIONS = 8  # of differences along one direction


def ready(case: Case) -> Subject:
    """A subject that runs: in float64 if the function takes it, otherwise in the dtypes that were given.

    Raises:
        BadUse: if nothing can be shown with these inputs.
    """
    if isinstance(case.fn, torch.nn.Module):
        exchange(case.fn, afresh=True)
    given = Subject(case, None)
    _refuse_bad_input(given)
    subject = Subject(case)
    try:
        _settle(subject)
    except BadUse:
        raise
    except Exception as error:  # whatever the checked code raises
        given.note = f"judged in {_dtypes(given)}: forward refuses float64 ({type(error).__name__})"
        subject = given
        _settle(subject)  # raises what is wrong with the function at its own inputs
    _refuse_outside(subject)
    _refuse_chance(subject)
    _refuse_surrogate(subject)
    if case.surrogate is not None and _surrogate_detaches(subject):
        subject.case = dataclasses.replace(subject.case, surrogate=Detaching(case.surrogate))
    return subject


def lower_if_needed(subject: Subject) -> None:
    """Use the given dtypes if forward accepts float64, but backward does not.

    This runs backward, which may crash.  So it is called when a probe runs, not before.
    """
    given = Subject(subject.case, None)
    given._not_leaf = subject._not_leaf
    if subject.dtype is None or all(p.dtype == subject.dtype for p in given.points):
        return
    try:
        subject.gradients()
    except Exception as error:  # whatever the checked code raises
        try:
            given.gradients()
        except Exception:  # it raises in any dtype: first_order reports it
            return
        given.note = f"judged in {_dtypes(given)}: backward refuses float64 ({type(error).__name__})"
        subject.__dict__.clear()
        subject.__dict__.update(given.__dict__)


def look_at_less_if_quick(subject: Subject) -> None:
    """At level quick, differentiate an expensive function in some directions only."""
    directions = sum(min(p.numel(), subject.whole) for p in subject.points)
    if subject.quick and EVALUATIONS * directions * work(subject) > QUICK:
        subject.whole = 24


def _dtypes(subject: Subject) -> str:
    names = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in subject.points)
    return " and ".join(names)


def _settle(subject: Subject) -> None:
    """Run forward once, and find out how the function must be called."""
    try:
        outputs = subject(*subject.at())
    except RuntimeError as error:
        if "a leaf Variable that requires grad" not in str(error):
            raise
        subject._not_leaf = True
        outputs = subject(*subject.at())
    if not outputs:
        result = subject.raw(*subject.at())
        raise BadUse(
            TypeError,
            f"check: {subject.case.name} must return a floating tensor, or a nest of them. Got {type(result).__name__}.",
        )


def _refuse_outside(subject: Subject) -> None:
    """The given inputs must lie in the domain that the case declares."""
    try:
        near = subject.allowed(subject.points)
    except OutsideDomain:
        raise BadUse(
            ValueError,
            f"check: {subject.case.name}: domain must hold at the given inputs. It says no. "
            "Give inputs inside it.",
        ) from None
    for name, p, q in zip(subject.names, subject.points, near, strict=True):
        moved = float((p - q).abs().max()) if p.shape == q.shape and p.numel() else 0.0
        if p.shape != q.shape or moved > 1e-5 * (1 + float(p.abs().max())):
            raise BadUse(
                ValueError,
                f"check: {subject.case.name}: project must not change the given inputs. It moves {name} by "
                f"{moved:.3g}. Give inputs that are allowed.",
            )


def _refuse_surrogate(subject: Subject) -> None:
    if subject.case.surrogate is None:
        return
    shapes = [list(y.shape) for y in subject(*subject.at())]
    others = [list(y.shape) for y in subject.meant(*subject.at())]
    if shapes != others:
        raise BadUse(
            ValueError,
            f"check: surrogate must return what {subject.case.name} does. Got tensors of shape {others} for {shapes}.",
        )


def _surrogate_detaches(subject: Subject) -> bool:
    """Whether autograd and differences tell different derivatives of the surrogate."""
    direction = subject.random_like(subject.points, 7)
    try:
        found = pushed(subject.meant, subject.points, direction)
        slope = _numeric.derivative(subject.along(direction), subject.noise, subject.points[0].dtype)
    except Exception:  # whatever the surrogate raises: the probes tell
        return False
    sure = slope.error <= 1e-4 * (1 + slope.value.abs())
    return bool(((found - slope.value).abs() > 1e-2 * (1 + slope.value.abs()))[sure].any())


def _refuse_bad_input(subject: Subject) -> None:
    if subject.points:
        return
    tensors = [t for t in subject._leaves if isinstance(t, Tensor)]
    given = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors) or "no tensor"
    if tensors and not any(is_float(t) for t in tensors):
        text = f"only floating inputs have gradients. Got {given}. Give floating tensors that require grad."
    else:
        text = (
            f"no input requires a gradient. Got {given}. Call requires_grad_() on those to be differentiated."
        )
    raise BadUse(ValueError, f"check: {subject.case.name}: {text}")


def _refuse_chance(subject: Subject) -> None:
    first, second = ([y.detach() for y in subject(*subject.at())] for _ in range(2))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True):
            distance = f"differ by {(a - b).abs().max():.2g}" if a.shape == b.shape else "differ in shape"
            raise BadUse(
                ValueError,
                f"check: {subject.case.name} must give the same output for the same input and seed. Two runs from "
                f"torch.manual_seed({subject.case.seed}) {distance} in output {i}. Draw random numbers from torch's "
                "default generator, or check with the randomness off.",
            )
