"""One pytest item for each probe.  pytest is imported when a test asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from manualprop.verify._case import Case, Project
from manualprop.verify._check import check, chosen
from manualprop.verify._probe import FEATURES, Level
from manualprop.verify._settings import project_settings
from manualprop.verify._verdicts import members
from manualprop.verify.probes import load


class Accepted(Exception):
    """A probe's finding is accepted.  The text says why."""


def gradient_tests(
    fn: Callable[..., Any] | Case,
    inputs: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    surrogate: Callable[..., Any] | None = None,
    accept: Mapping[str, str] | None = None,
    declare: Mapping[str, bool] | None = None,
    domain: Callable[..., bool] | None = None,
    unique: Sequence[str] | str = (),
    project: Project | Mapping[str, Project] | None = None,
    level: Level = "full",
    only: Sequence[str] | str | None = None,
    seed: int = 0,
    rtol: float = 1e-6,
    atol: float = 1e-7,
    saved_bytes: int | None = None,
    time_limit: float = 60.0,
) -> Callable[..., None]:
    """Make a test function with one item for each probe: ``test_my_op = gradient_tests(MyOp.apply, inputs=(x, w))``.

    A finding fails its item.  An accepted one is a strict xfail: the suite says when the acceptance is no longer needed.
    Any other limit is skipped with its message.

    Args:
        fn: as for :func:`check`, or a :class:`Case`.
        inputs: a tensor, a tuple of arguments, or a function of sizes that makes either.  The test calls the
            function; collection does not.
        accept: as for :func:`check`.  ``[tool.manualprop.verify]`` in pyproject.toml counts too.
        kwargs, reference, surrogate, declare, domain, unique, project: as for :func:`check`.
        level, only, seed, rtol, atol, saved_bytes, time_limit: as for :func:`check`.

    Returns:
        A test function for pytest; its name is that of the variable it is assigned to.

    Raises:
        ValueError: if a probe's name is unknown.
    """
    import pytest

    own = fn.accept if isinstance(fn, Case) else {}
    function, name = (fn.fn, fn.name) if isinstance(fn, Case) else (fn, "")
    reasons = {**project_settings().accepted(function, name), **own, **(accept or {})}
    members(reasons, list(load()), "accept")
    members(declare or {}, list(load()), "declare")
    grouped = {p: group for group in reasons if group in FEATURES for p in FEATURES[group]}

    def case() -> Case:
        if isinstance(fn, Case):
            return dataclasses.replace(fn, accept=reasons)
        made = inputs if callable(inputs) and not isinstance(inputs, torch.Tensor) else None
        args = () if made else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return Case(
            fn, args, kwargs or {}, reference, declare or {}, rtol, atol, saved_bytes, seed=seed, accept=reasons,
            surrogate=surrogate, domain=domain, unique=unique, project=project, inputs=made,
        )  # fmt: skip

    def marked(probe: str) -> Any:
        if probe not in reasons and probe not in grouped:
            return probe
        reason = reasons.get(probe) or reasons[grouped[probe]]
        strict = probe in reasons  # of a group some may pass
        return pytest.param(probe, marks=pytest.mark.xfail(raises=Accepted, strict=strict, reason=reason))

    @pytest.mark.parametrize("probe", [marked(p.name) for p in chosen(level, only)])
    def test(probe: str) -> None:
        __tracebackhide__ = True  # pytest shows the findings, not this
        report = check(case(), level=level, only=probe, time_limit=time_limit)
        report.assert_passed()
        for outcome in report.accepted:
            raise Accepted(outcome.evidence)
        for outcome in report.limits:
            pytest.skip(f"limit: {outcome.evidence}")
        if all(o.verdict == "skipped" for o in report):
            pytest.skip("; ".join(o.evidence for o in report))
        if probe in grouped and probe == FEATURES[grouped[probe]][0]:
            # Strict for the whole group: this item fails if no probe of it needs the acceptance.
            check(case(), level=level, only=grouped[probe], time_limit=time_limit).assert_passed()

    return test
