"""``manualprop verify PACKAGE.MODULE[:NAME]``: hold custom backwards against everything autograd asks of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from manualprop.verify import Outcome, Report, check
from manualprop.verify._check import chosen
from manualprop.verify._discover import Found, NotFound, discover
from manualprop.verify._formats import html, junit
from manualprop.verify._probe import FEATURES, LEVELS, Level
from manualprop.verify._process import can_fork
from manualprop.verify._settings import (
    BadSettings,
    Settings,
    known_findings,
    project_settings,
    qualified_name,
    read_baseline,
    write_baseline,
)
from manualprop.verify._verdicts import members
from manualprop.verify.probes import load

EXAMPLES = """
what is verified:
  every manualprop.verify.Case among the attributes of a module, alone or in a list or dict, at its inputs;
  every autograd.Function defined in it without a case, at inputs that are made up until it accepts them.

what is known and stays:
  --accept PROBE=REASON, or in pyproject.toml, by qualified name:
      [tool.manualprop.verify.accept."mypackage.ops.Swish"]
      second_order = "its backward calls a kernel"
  --baseline FILE for a library that starts with findings: new ones count, and known ones that are gone.

examples:
  manualprop verify mypackage.ops
  manualprop verify mypackage.ops --jobs 4 --baseline verify.json --update-baseline
  manualprop verify mypackage.ops:Swish --only second_order --seed 3
  manualprop verify path/to/ops.py --junit verify.xml --html verify.html

exit status: 0 nothing found, 1 a finding or something that cannot be verified, 2 a mistake in the command
"""


class _Mistake(Exception):
    """Of the user: its text is one line for them."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Mistake(message)


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: from the subcommand on.

    Returns:
        The exit status: 0, 1 for a finding, or 2 for a mistake in the command, which has then been told in a line.
    """
    try:
        return _run(_parser().parse_args(list(arguments)[1:]))
    except (_Mistake, NotFound) as mistake:
        print(f"manualprop: verify: {mistake}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="manualprop verify",
        description="Prove custom backwards right, or show how they are wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "targets", nargs="*", metavar="MODULE[:NAME]", help="a module, package or .py file, or one name in it"
    )
    parser.add_argument(
        "--level", choices=LEVELS, help="how much to ask (default: pyproject.toml's, or full)"
    )
    parser.add_argument("--only", metavar="PROBE[,PROBE]", help="these probes only; --list names them")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of processor time, for one probe (default: 60)",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="PROBE=REASON",
        help="of one target: what this probe or group finds is known",
    )
    parser.add_argument(
        "--baseline", metavar="FILE", type=Path, help="findings that are known (default: pyproject.toml's)"
    )
    parser.add_argument(
        "--update-baseline", action="store_true", help="write what is found into the baseline, and end with 0"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="verify so many at a time (default: 1)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="a row for every probe")
    parser.add_argument(
        "--list", action="store_true", help="name the probes, and what is there to verify, and stop"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the reports as JSON; - for standard output"
    )
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write them as JUnit XML")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page with heat maps of wrong gradients"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    _refuse_mistakes(options)
    try:
        plan = _planned(options)
    except BadSettings as error:
        raise _Mistake(str(error)) from None
    found = [f for target in options.targets for f in discover(target, options.seed)]
    if options.list:
        _show_list(found)
        return 0
    if plan.accept and len(found) != 1:
        raise _Mistake(f"--accept speaks of one target. There are {len(found)}: use pyproject.toml")
    out = sys.stderr if options.json == Path("-") else sys.stdout
    reports, unverified = [], [(f.target, _why_not(f)) for f in found if f.case is None]
    cases = [f for f in found if f.case is not None]
    try:
        for f, result in _all_verified(cases, plan):
            if isinstance(result, str):
                unverified.append((f.target, result))
                continue
            reports.append(result)
            made_up = f"inputs made up: {f.guessed}\n" if f.guessed else ""
            print(f"\n{made_up}{result.table() if options.verbose else result}", file=out, flush=True)
    except KeyboardInterrupt:
        _write(options, reports, unverified)
        print(f"\ninterrupted: {len(reports)} of {len(cases)} verified", file=out)
        raise
    _write(options, reports, unverified)
    for target, why in unverified:
        print(f"\n{target}: NOT VERIFIED: {why}", file=out)
    gone = _gone(plan.settings, options.targets, found)
    for name in gone:
        print(
            f"\n{name}: pyproject.toml accepts findings of it, and there is no such name: take it out",
            file=out,
        )
    bad = [r for r in reports if not r.passed]
    print(f"\n{len(reports)} verified, {len(bad)} with findings, {len(unverified)} not verified", file=out)
    if plan.update is not None:
        count = write_baseline(plan.update, [(r.name, r) for r in reports])
        print(f"{plan.update}: {count} known finding{'s' * (count != 1)}", file=out)
        return 0
    return 1 if bad or unverified or gone else 0


def _why_not(found: Found) -> str:
    if found.broken:
        return found.broken
    name = found.target.partition(":")[2]
    return (
        "no inputs were found that it accepts. Put a case beside it:\n"
        f"    CASE = manualprop.verify.Case({name}.apply, (inputs, ...))"
    )


def _gone(settings: Settings, targets: Sequence[str], found: Sequence[Found]) -> list[str]:
    """The names in the table ``accept`` that nothing has, in the modules that are verified whole."""
    modules = {f.target.partition(":")[0] for f in found if ":" in f.target}
    modules -= {target.partition(":")[0] for target in targets if ":" in target}
    names = {f.target.replace(":", ".") for f in found}
    for case in (f.case for f in found if f.case is not None):
        names |= {case.name, qualified_name(case.fn)}
    return [name for name in settings.accept if name.rpartition(".")[0] in modules and name not in names]


def _refuse_mistakes(options: argparse.Namespace) -> None:
    if not options.targets and not options.list:
        raise _Mistake("name what to verify, as in `manualprop verify mypackage.ops`")
    for path in (options.json, options.junit, options.html, options.baseline):
        if path is not None and path != Path("-") and not path.parent.is_dir():
            raise _Mistake(f"{path} cannot be written: there is no folder {path.parent}")
    if options.jobs < 1:
        raise _Mistake(f"--jobs must be at least 1. Got {options.jobs}")
    for text in options.accept:
        if not all(text.partition("=")[::2]):
            raise _Mistake(
                f"--accept takes PROBE=REASON, as in --accept second_order='a kernel'. Got {text!r}"
            )


class _Plan(NamedTuple):
    """How to verify: the options, and what the project says once for all."""

    level: Level
    only: list[str] | None
    seed: int
    time_limit: float
    jobs: int
    accept: dict[str, str]
    settings: Settings
    known: dict[str, dict[str, str]]  # of the baseline
    update: Path | None  # the baseline to write


def _planned(options: argparse.Namespace) -> _Plan:
    settings = project_settings()
    only = options.only.split(",") if options.only else None
    wanted = options.level or settings.level or "full"
    level = next((known for known in LEVELS if known == wanted), None)
    if level is None:
        raise _Mistake(f"[tool.manualprop.verify] level must be one of {', '.join(LEVELS)}. Got {wanted!r}")
    baseline = options.baseline or settings.baseline
    if options.update_baseline and baseline is None:
        raise _Mistake("--update-baseline: name the file by --baseline FILE, or in pyproject.toml")
    accept = {name: reason for name, _, reason in (text.partition("=") for text in options.accept)}
    try:
        chosen(level, only)
        members(accept, list(load()), "accept")
    except ValueError as error:
        raise _Mistake(str(error)) from None
    known = {} if baseline is None or options.update_baseline else read_baseline(baseline)
    update = baseline if options.update_baseline else None
    return _Plan(level, only, options.seed, options.time_limit, options.jobs, accept, settings, known, update)


def _all_verified(found: Sequence[Found], plan: _Plan) -> Iterator[tuple[Found, Report | str]]:
    """Each with its report, or why it cannot be verified, in order; several at a time, in processes of their own, if that is asked."""
    if plan.jobs == 1 or len(found) < 2 or not can_fork():
        for f in found:
            with _progress(f.target, len(chosen(plan.level, plan.only))) as step:
                report = _verified(f, plan, step)
            yield f, report
        return
    # A fork hands the cases over as they are: they may be closures, which cannot be pickled.
    _WORK[:] = [(f, plan) for f in found]
    with ProcessPoolExecutor(plan.jobs, multiprocessing.get_context("fork")) as pool:
        try:
            yield from zip(found, pool.map(_verified_at, range(len(found))), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)
            _WORK.clear()


_WORK: list[tuple[Found, _Plan]] = []


def _verified_at(place: int) -> Report | str:
    return _verified(*_WORK[place], None)


def _verified(found: Found, plan: _Plan, step: Callable[[Outcome], None] | None) -> Report | str:
    case = found.case
    assert case is not None
    names = [p.name for p in chosen(plan.level, plan.only)]
    accept = {
        **known_findings(plan.known, found.target, names),
        **plan.settings.accepted(case.fn, case.name),
        **plan.accept,
    }
    try:
        report = check(
            dataclasses.replace(case, seed=plan.seed or case.seed, accept={**accept, **case.accept}),
            level=plan.level,
            only=plan.only,
            time_limit=plan.time_limit,
            progress=step,
        )
    except (ValueError, TypeError) as error:  # nothing can be shown at these inputs
        return str(error).removeprefix("check: ")
    again = f"manualprop verify {found.target} --seed {plan.seed}"
    outcomes = (
        dataclasses.replace(o, reproduction=f"{again} --only {o.probe}" if o.probe in load() else again)
        for o in report.outcomes
    )
    return dataclasses.replace(report, name=found.target, outcomes=tuple(outcomes))


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[Outcome], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda outcome: bar.update(task, advance=1, description=f"{title} {outcome.probe}")


def _show_list(found: Sequence[Found]) -> None:
    for f in found:
        print(f"{f.target}  {'no inputs found' if f.case is None else f.guessed or 'a case'}")
    if found:
        print()
    for name, probe in load().items():
        words = " ".join((probe.run.__doc__ or "").split())
        print(f"{name:<24}{probe.level:<7}{words}")
    groups = [f"{name} = {', '.join(members)}" for name, members in FEATURES.items()]
    print(f"\ngroups: {'; '.join(groups)}")


def _write(
    options: argparse.Namespace, reports: Sequence[Report], unverified: Sequence[tuple[str, str]]
) -> None:
    for path, text in (
        (options.json, lambda: json.dumps([json.loads(r.to_json()) for r in reports], indent=2) + "\n"),
        (options.junit, lambda: junit(reports, unverified)),
        (options.html, lambda: html(reports, unverified)),
    ):
        if path == Path("-"):
            print(text(), end="")
        elif path is not None:
            path.write_text(text(), encoding="utf-8")
