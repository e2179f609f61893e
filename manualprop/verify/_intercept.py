"""Watch the Functions of a package while a test suite runs, and verify them at the inputs that it uses."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map

from manualprop._torch import leave_to_python
from manualprop.verify._case import Case
from manualprop.verify._check import check, chosen
from manualprop.verify._probe import LEVELS, Level
from manualprop.verify._report import Report, shortened
from manualprop.verify._settings import known_findings, project_settings, read_baseline, write_baseline
from manualprop.verify._subject import is_float

MOST_INPUTS = 3  # kinds of inputs for one Function
MOST_ENTRIES = 1_000_000  # of a tensor: larger inputs are not kept


class Interceptor:
    """Notes every ``apply`` of a Function of ``packages``, until :meth:`verify` is called.

    Args:
        packages: names of packages or modules, as in ``mypackage.ops``.
        level: of the checks; by default that of pyproject.toml, or quick.
        only: names of the probes to run.
        baseline: a file of known findings; by default that of pyproject.toml.
        update: write the findings into that file instead of failing on them.
    """

    def __init__(
        self,
        packages: Sequence[str],
        level: str | None = None,
        only: Sequence[str] | None = None,
        baseline: Path | None = None,
        update: bool = False,
    ) -> None:
        self.packages = tuple(packages)
        self.settings = project_settings()
        self.level = _level(level or self.settings.level or "quick")
        self.only = list(only) if only else None
        self.probes = [p.name for p in chosen(self.level, self.only)]
        self.baseline, self.update = baseline or self.settings.baseline, update
        if update and self.baseline is None:
            raise ValueError("name the baseline file to write")
        known = self.baseline is not None and not (update and not self.baseline.is_file())
        self.known = read_baseline(self.baseline) if self.baseline is not None and known else {}
        self.met: dict[type[Function], set[Any]] = {}
        self.waiting: list[Case] = []
        self.reports: list[Report] = []
        self.unverified: list[tuple[str, str]] = []  # name, why
        self._verifying = False
        self._wrapped: set[type] = set()
        self._wrap(Function)

    # ----- watching -----

    def _wrap(self, cls: type[Function]) -> None:
        """Wrap the class's apply."""
        self._wrapped.add(cls)
        original: Any = vars(cls)["apply"]  # a classmethod; from torch 2.14 on it is written in C
        watch = self

        def apply(this: type[Function], *args: Any, **kwargs: Any) -> Any:
            watch.note(this, args, kwargs)
            return original.__get__(None, this)(*args, **kwargs)

        leave_to_python(apply)  # the compiler cannot trace a call into C
        cls.apply = classmethod(apply)  # type: ignore[method-assign, assignment]

    def watch_overriding(self) -> None:
        """Wrap classes that override apply: they may never call their base's."""
        for cls in _subclasses(Function):
            if (
                "apply" in vars(cls)
                and cls not in self._wrapped
                and isinstance(vars(cls)["apply"], classmethod)
            ):
                self._wrap(cls)

    def note(self, cls: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments, if the Function is in one of the packages and this kind of call is new."""
        if self._verifying or len(self.met.get(cls, ())) >= MOST_INPUTS:
            return  # a probe's own call, or nothing more to learn
        if not any(cls.__module__ == p or cls.__module__.startswith(f"{p}.") for p in self.packages):
            return
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return  # tracers, not values
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.requires_grad and is_float(t) for t in tensors):
            return
        if any(type(t) not in (Tensor, torch.nn.Parameter) or t.numel() > MOST_ENTRIES for t in tensors):
            return
        met = self.met.setdefault(cls, set())
        signature = tuple((t.dim(), t.dtype, t.requires_grad) for t in tensors)
        if signature in met:
            return
        met.add(signature)
        args, kwargs = tree_map(_kept, (args, kwargs))
        # The author need not support every transform and order.  What is unsupported and loud stays a limit.
        self.waiting.append(Case(cls.apply, args, kwargs, name=f"{cls.__module__}.{cls.__qualname__}"))

    def verify(self, again: str = "") -> list[Report]:
        """Verify the calls noted since the last time, and return the reports with findings.

        ``again`` and the name of a probe make a command that runs that probe again.
        """
        cases, self.waiting = self.waiting, []
        self._verifying = True
        try:
            new = [report for case in cases if (report := self._verified(case, again)) is not None]
        finally:
            self._verifying = False
        self.reports += new
        return [] if self.update else [report for report in new if not report.passed]

    def finish(self) -> None:
        """Write the baseline, if ``update`` was given."""
        if self.update and self.baseline is not None:
            write_baseline(self.baseline, [(report.name, report) for report in self.reports])

    def _verified(self, case: Case, again: str) -> Report | None:
        accept = self.settings.accepted(case.fn, case.name)
        if not self.update:
            accept = {**known_findings(self.known, case.name, self.probes), **accept}
        try:
            report = check(dataclasses.replace(case, accept=accept), level=self.level, only=self.only)
        except (ValueError, TypeError) as error:  # nothing can be shown at these inputs
            self.unverified.append((case.name, str(error).removeprefix("check: ")))
            return None
        given = ", ".join(map(_described, tree_leaves((case.args, dict(case.kwargs)))))
        outcomes = [dataclasses.replace(o, notes=(f"called with {given}", *o.notes)) for o in report.outcomes]
        if again:
            outcomes = [
                dataclasses.replace(o, reproduction=f"{again}{o.probe}") if o.probe in self.probes else o
                for o in outcomes
            ]
        return dataclasses.replace(report, outcomes=tuple(outcomes))

    def summary(self) -> list[str]:
        """A line for each report, and one for each call that could not be verified."""
        lines = [report.summary() for report in self.reports] + [
            f"{name}: not verified: {why}" for name, why in self.unverified
        ]
        nothing = f"no torch.autograd.Function of {', '.join(self.packages)} was called with an input that requires grad"
        absent = [
            f"{name} was never imported: is that its name?"
            for name in self.packages
            if name not in sys.modules
        ]
        return (lines or [nothing]) + absent


def _level(name: str) -> Level:
    found = next((level for level in LEVELS if level == name), None)
    if found is None:
        raise ValueError(f"the level must be one of {', '.join(LEVELS)}. Got {name!r}.")
    return found


def _described(value: Any) -> str:
    """A tensor by its dtype and shape, anything else as it is."""
    if not isinstance(value, Tensor):
        return shortened(repr(value), 40)
    grad = " that requires grad" if value.requires_grad else ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{grad}"


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    return copy.requires_grad_(value.requires_grad)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    sub: type[Any]
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
