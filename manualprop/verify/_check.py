"""Run the probes on a case, where nothing they do can reach the caller."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from manualprop.verify import _process
from manualprop.verify._case import Case
from manualprop.verify._diagnosis import of_refused_shape
from manualprop.verify._probe import FEATURES, LEVELS, Level, Probe, load
from manualprop.verify._report import Outcome, Report, finding, message, skipped
from manualprop.verify._subject import BadUse, Subject, ready


def check(
    fn: Callable[..., Any] | Case,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    reference: Callable[..., Any] | None = None,
    declare: Mapping[str, bool] | None = None,
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
    """Hold a callable's hand-written gradients against everything autograd may ask of them.

    Args:
        fn: ``MyFunction.apply``, a module (its parameters and buffers are checked too), any callable that returns
            tensors, or a :class:`Case`, which carries the arguments up to ``rtol``, ``atol`` and ``saved_bytes``.
        args: where it is checked.  Tensors that require grad are differentiated; for a module of whose arguments
            none does, every floating one is.  Values and layout are copied, and checked in float64.
        kwargs: keyword arguments of ``fn``.
        reference: a callable of the same arguments that is right by definition, differentiated by autograd.
        declare: ``{"double_backward": False}``: what is not supported, or must be.  Names are those of the probes,
            or ``double_backward``, ``transforms``.  Held against what is observed.
        level: ``quick`` leaves out compilation, large sizes and other slow probes; ``deep`` adds third derivatives
            and nested forward mode, where some of torch's own layers are wrong.
        only: names of the probes to run.
        seed: of everything random.
        rtol: largest error of a gradient relative to its largest entry, in float64.
        atol: largest absolute error.
        saved_bytes: the most bytes that may be kept for backward, or None.
        time_limit: seconds for one probe, after which it counts as hanging.
        isolate: run in child processes, so that a crash or a hang in ``fn`` is a finding and nothing of the caller
            changes.  Not done where the platform cannot fork, or with tensors on an accelerator.
        progress: called with every outcome as it comes.

    Returns:
        The report.  A defect never raises; :meth:`Report.assert_passed` does.

    Raises:
        ValueError: if no input requires a gradient, if a name in ``declare`` or ``only`` is unknown, or if ``fn``
            is not deterministic under a fixed seed.
        TypeError: if ``fn`` is not callable, or returns no floating tensor.
    """
    if isinstance(fn, Case):
        if args or kwargs:
            raise TypeError("check: a Case has its arguments in it. Give no others.")
        case = fn
    else:
        case = Case(fn, args, kwargs or {}, reference, declare or {}, rtol, atol, saved_bytes, seed=seed)
    probes = chosen(level, only)
    declared = _declared(case.declare, load())
    start = time.perf_counter()
    isolated = isolate and _process.can_fork() and not _on_accelerator(case)
    outcomes = []
    for outcome in _process.outcomes(case, probes, time_limit) if isolated else _here(case, probes):
        outcome = _held(outcome, declared)
        outcome = dataclasses.replace(outcome, reproduction=_again(case, outcome))
        outcomes.append(outcome)
        if progress is not None:
            progress(outcome)
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
        return [probes[name] for name in _known([only] if isinstance(only, str) else only, probes, "only")]
    return [p for p in probes.values() if LEVELS.index(p.level) <= LEVELS.index(level)]


def _declared(declare: Mapping[str, bool], probes: Mapping[str, Probe]) -> dict[str, bool]:
    return {name: value for key, value in declare.items() for name in _known([key], probes, "declare")}


def _known(names: Sequence[str], probes: Mapping[str, Probe], where: str) -> list[str]:
    import difflib

    found: list[str] = []
    for name in names:
        if name not in probes and name not in FEATURES:
            similar = difflib.get_close_matches(name, [*probes, *FEATURES], n=1)
            hint = (
                f"Did you mean {similar[0]!r}?"
                if similar
                else f"There are: {', '.join([*probes, *FEATURES])}."
            )
            raise ValueError(f"check: {where} must name probes. Got {name!r}. {hint}")
        found += FEATURES.get(name, (name,))
    return found


def _held(outcome: Outcome, declared: Mapping[str, bool]) -> Outcome:
    """The outcome in the light of what the author declares."""
    support = declared.get(outcome.probe)
    if support is None:
        return outcome
    if support and outcome.verdict == "limit":
        return dataclasses.replace(
            outcome, verdict="finding", evidence=f"declared as supported, but it is not: {outcome.evidence}"
        )
    if not support and outcome.verdict == "limit":
        return dataclasses.replace(
            outcome, verdict="passed", evidence=f"a limit, as declared: {outcome.evidence}"
        )
    if not support and outcome.verdict == "finding" and outcome.probe == "first_order":
        # Straight through a rounding, a reversed gradient: meant not to be the derivative.
        return dataclasses.replace(outcome, verdict="passed", evidence=f"as declared: {outcome.evidence}")
    if not support and outcome.verdict == "passed":
        return dataclasses.replace(
            outcome,
            verdict="finding",
            evidence="declared as unsupported, but it works: take the declaration back",
        )
    return outcome


def _again(case: Case, outcome: Outcome) -> str:
    return f"check({case.name}, *inputs, only={outcome.probe!r}, seed={case.seed})"


def _on_accelerator(case: Case) -> bool:
    tensors = [t for t in tree_leaves((case.args, dict(case.kwargs))) if isinstance(t, torch.Tensor)]
    if isinstance(case.fn, torch.nn.Module):
        tensors += [*case.fn.parameters(), *case.fn.buffers()]
    return any(t.device.type not in ("cpu", "meta") for t in tensors)


# ----- running -----


def judged(probe: Probe, subject: Subject) -> Outcome:
    """The outcome of one probe; an exception in it, or in the code it checks, is a finding."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = probe.run(subject)
    except Exception as error:  # whatever the checked code raises
        if probe.name != "first_order" and _plain_backward_raises(subject):
            outcome = skipped("the plain backward raises: see first_order")
        else:
            outcome = finding(f"raises {message(error)}", of_refused_shape(str(error)))
    return dataclasses.replace(outcome, probe=probe.name, seconds=time.perf_counter() - start)


def _plain_backward_raises(subject: Subject) -> bool:
    try:
        subject.gradients()
    except Exception:  # whatever the checked code raises
        return True
    return False


def prepared(case: Case) -> Subject | Outcome:
    """The case made ready to run, or the finding that it does not run at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ready(case)
        except BadUse:
            raise
        except Exception as error:  # whatever the checked code raises
            return dataclasses.replace(finding(f"the plain call raises {message(error)}"), probe="call")


def _here(case: Case, probes: Sequence[Probe]) -> Iterator[Outcome]:
    """Run in this process, and leave the global state of torch as it was found."""
    with _everything_restored():
        subject = _raising_what_it_means(case)
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


def _raising_what_it_means(case: Case) -> Subject | Outcome:
    try:
        return prepared(case)
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
