"""One pytest item for each probe.  pytest is imported when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from manualprop.verify._case import Case
from manualprop.verify._check import check, chosen
from manualprop.verify._probe import Level
from manualprop.verify._verdicts import members
from manualprop.verify.probes import load


class Unsupported(Exception):
    """What a probe asks for is not supported, and loudly so."""


def gradient_tests(
    fn: Callable[..., Any] | Case,
    inputs: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    unsupported: Iterable[str] = (),
    level: Level = "full",
    only: Sequence[str] | str | None = None,
    seed: int = 0,
    rtol: float = 1e-6,
    atol: float = 1e-7,
    saved_bytes: int | None = None,
    time_limit: float = 60.0,
) -> Callable[..., None]:
    """Make a test function with one item for each probe: ``test_my_op = gradient_tests(MyOp.apply, inputs=(x, w))``.

    A finding fails its item.  A limit that is declared in ``unsupported`` is a strict xfail, so that the suite says
    when it starts to work; one that is not is skipped with its message.

    Args:
        fn: as for :func:`check`, or a :class:`Case`.
        inputs: a tensor, a tuple of arguments, or a function without arguments that makes either, called in the
            test and not when tests are collected.
        kwargs: keyword arguments of ``fn``.
        reference: as for :func:`check`.
        unsupported: names of probes or features, as in ``["forward_mode", "double_backward"]``.
        level, only, seed, rtol, atol, saved_bytes, time_limit: as for :func:`check`.

    Returns:
        A test function for pytest; its name is that of the variable it is assigned to.

    Raises:
        ValueError: if a probe's name is unknown.
    """
    import pytest

    declared = set(members(list(unsupported), list(load()), "unsupported"))
    supported = {p for p, yes in getattr(fn, "declare", {}).items() if yes}

    def case() -> Case:
        if isinstance(fn, Case):
            return fn
        args = inputs() if callable(inputs) and not isinstance(inputs, torch.Tensor) else inputs
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        return Case(fn, args, kwargs or {}, reference, {}, rtol, atol, saved_bytes, seed=seed)

    def marked(name: str) -> Any:
        if name not in declared:
            return name
        reason = f"{name} is declared as unsupported"
        return pytest.param(name, marks=pytest.mark.xfail(raises=Unsupported, strict=True, reason=reason))

    @pytest.mark.parametrize("probe", [marked(p.name) for p in chosen(level, only)])
    def test(probe: str) -> None:
        __tracebackhide__ = True  # pytest shows the findings, not this
        report = check(case(), level=level, only=probe, time_limit=time_limit)
        report.assert_passed()
        for outcome in report.limits:
            if probe in declared or probe in supported:
                raise Unsupported(outcome.evidence)
            pytest.skip(f"limit: {outcome.evidence}")
        if all(o.verdict == "skipped" for o in report):
            pytest.skip("; ".join(o.evidence for o in report))

    return test
