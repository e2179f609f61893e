"""Run the probes on a case.  Nothing that they do reaches the caller."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from manualprop.verify import _process
from manualprop.verify._case import Case, Project
from manualprop.verify._cures import asked_again
from manualprop.verify._judge import judged, prepared
from manualprop.verify._probe import LEVELS, Level, Probe
from manualprop.verify._report import Outcome, Report, skipped
from manualprop.verify._subject import BadUse, Subject
from manualprop.verify._verdicts import held, members
from manualprop.verify.probes import load


def check(
    fn: Callable[..., Any] | Case,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    inputs: Callable[..., Any] | None = None,
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
    isolate: bool = True,
    progress: Callable[[Outcome], None] | None = None,
) -> Report:
    """Check a callable's hand-written gradients in every way that autograd may use them.

    Args:
        fn: ``MyFunction.apply``, a module (its parameters and buffers are checked too), any callable that returns
            tensors, or a :class:`Case`, which carries the arguments up to ``atol`` and ``saved_bytes``.
        args: the inputs.  Tensors that require grad are differentiated.  If no argument of a module requires grad,
            every floating one is differentiated.  The check works on copies in float64, in the same layout.
        kwargs: keyword arguments of ``fn``.
        inputs: a function that makes ``args`` from sizes with defaults:
            ``lambda rows=4, columns=5: (torch.randn(rows, columns, requires_grad=True),)``.  It also makes the inputs
            of other sizes.
        reference: a callable of the same arguments that is right by definition.  Autograd differentiates it.
        surrogate: the function whose gradient backward returns, if that is not ``fn``: ``lambda x: x`` for a
            rounding with a straight-through gradient.  It takes the same arguments and returns the same shapes, and may
            detach: ``lambda x: x + (x.round() - x).detach()``.
        accept: known findings and limits, each with the reason why it stays:
            ``{"double_backward": "backward calls a kernel"}``.  Names are those of the probes, or
            ``double_backward``, ``transforms``.  Strict: an acceptance that nothing needs is a finding.
        declare: what must be supported: ``{"vmap": True}``.  A limit there is a finding.
        domain: a predicate of the arguments: whether ``fn`` is defined there.
        unique: names of integer arguments that never hold a value twice.
        project: maps a tensor to the nearest one that is allowed (positive, symmetric, sorted, of unit rows).  One
            function for every differentiated argument, or a mapping from argument names to functions.
        level: ``quick`` leaves out compilation and other slow probes.  ``deep`` adds third derivatives and nested
            forward mode, where some of torch's own layers are wrong.
        only: names of the probes or groups to run.
        seed: of all random numbers.
        rtol: largest error of a gradient relative to its largest entry, in float64.
        atol: largest absolute error.
        saved_bytes: the most bytes that may be kept for backward, or None.
        time_limit: seconds of processor time after which a probe is given up.  It is also given up after as many
            seconds in which it computes nothing.
        isolate: run in child processes.  A crash or a hang in ``fn`` is then a finding, and nothing in the caller's
            process changes.  It has no effect where the platform cannot fork, or with tensors on an accelerator.
        progress: called with each outcome as it comes, before findings are linked to their causes.

    Returns:
        The report.  A defect never raises; :meth:`Report.assert_passed` does.

    Raises:
        ValueError: if no input requires a gradient, if a name in ``accept``, ``declare`` or ``only`` is unknown, or
            if ``fn`` is not deterministic under a fixed seed.
        TypeError: if ``fn`` is not callable, or returns no floating tensor.
    """
    if isinstance(fn, Case):
        if args or kwargs or inputs:
            raise TypeError("check: a Case already holds its arguments. Give no others.")
        case = dataclasses.replace(
            fn, args=() if fn.inputs else fn.args, accept={**fn.accept, **(accept or {})}
        )
    else:
        if args and inputs:
            raise TypeError("check: inputs makes the positional arguments. Give no others.")
        case = Case(
            fn, args, kwargs or {}, reference, declare or {}, rtol, atol, saved_bytes, seed=seed,
            accept=accept or {}, surrogate=surrogate, domain=domain, unique=unique, project=project, inputs=inputs,
        )  # fmt: skip
    probes = chosen(level, only)
    members(case.accept, list(load()), "accept")
    members(case.declare, list(load()), "declare")
    start = time.perf_counter()
    isolated = isolate and _process.can_fork() and not _on_accelerator(case)

    def ask(case: Case, probes: Sequence[Probe]) -> Iterator[Outcome]:
        quick = level == "quick"
        return _process.outcomes(case, probes, time_limit, quick) if isolated else _here(case, probes, quick)

    outcomes = []
    for outcome in ask(case, probes):
        outcome = dataclasses.replace(outcome, reproduction=_again(case, outcome))
        outcomes.append(outcome)
        if progress is not None:
            progress(outcome)
    outcomes = held(asked_again(case, outcomes, ask), case.declare, case.accept, list(load()))
    return Report(case.name, tuple(outcomes), time.perf_counter() - start)


def chosen(level: Level, only: Sequence[str] | str | None = None) -> list[Probe]:
    """The probes of a level, or those that are named.

    Raises:
        ValueError: if there is no such level or probe.
    """
    probes = load()
    if level not in LEVELS:
        raise ValueError(f"check: level must be one of {', '.join(map(repr, LEVELS))}. Got {level!r}.")
    if only is not None:
        return [
            probes[name] for name in members([only] if isinstance(only, str) else only, list(probes), "only")
        ]
    return [p for p in probes.values() if LEVELS.index(p.level) <= LEVELS.index(level)]


def _again(case: Case, outcome: Outcome) -> str:
    only = f"only={outcome.probe!r}, " if outcome.probe in load() else ""  # the plain call is no probe
    return f"check({case.name}, *inputs, {only}seed={case.seed})"


def _on_accelerator(case: Case) -> bool:
    tensors = [t for t in tree_leaves((case.args, dict(case.kwargs))) if isinstance(t, torch.Tensor)]
    if isinstance(case.fn, torch.nn.Module):
        tensors += [*case.fn.parameters(), *case.fn.buffers()]
    return any(t.device.type not in ("cpu", "meta") for t in tensors)


# ----- running in this process -----


def _here(case: Case, probes: Sequence[Probe], quick: bool) -> Iterator[Outcome]:
    """Run in this process, and restore the global state of torch afterwards."""
    with _everything_restored():
        subject = _raising_what_it_means(case, quick)
        if isinstance(subject, Outcome):
            yield subject
            return
        for probe in probes:
            if probe.alone and probe.name != "poisoned_backward":
                yield dataclasses.replace(
                    skipped("may bring the process down, and it cannot be isolated here"), probe=probe.name
                )
            else:
                yield judged(probe, subject)


def _raising_what_it_means(case: Case, quick: bool) -> Subject | Outcome:
    try:
        return prepared(case, quick)
    except BadUse as bad:
        raise bad.kind(str(bad)) from None


class _everything_restored:
    """The global state of torch that checked code may change."""

    def __enter__(self) -> None:
        self.random = torch.get_rng_state()
        self.dtype = torch.get_default_dtype()
        self.grad = torch.is_grad_enabled()
        self.threads = torch.get_num_threads()
        torch.set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.random)
        torch.set_default_dtype(self.dtype)
        torch.set_grad_enabled(self.grad)
        torch.set_num_threads(self.threads)
