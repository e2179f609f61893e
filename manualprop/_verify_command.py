"""``manualprop verify PACKAGE.MODULE[:NAME]``: hold custom backwards against everything autograd asks of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from manualprop.verify import Outcome, Report, check
from manualprop.verify._check import chosen
from manualprop.verify._discover import Found, NotFound, discover
from manualprop.verify._formats import html, junit
from manualprop.verify._probe import FEATURES, LEVELS
from manualprop.verify.probes import load

EXAMPLES = """
what is verified:
  every manualprop.verify.Case among the attributes of a module, alone or in a list or dict, at its inputs;
  every autograd.Function defined in it without a case, at inputs that are made up until it accepts them.

examples:
  manualprop verify mypackage.ops
  manualprop verify mypackage.ops:Swish --only second_order --seed 3
  manualprop verify path/to/ops.py --junit verify.xml --html verify.html

exit status: 0 nothing found, 1 a finding or a Function without inputs, 2 a mistake in the command
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
        "--level",
        choices=LEVELS,
        default="full",
        help="how much to ask (default: full, some seconds a Function)",
    )
    parser.add_argument("--only", metavar="PROBE[,PROBE]", help="these probes only; --list names them")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="for one probe (default: 60)"
    )
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
    if not options.targets and not options.list:
        raise _Mistake("name what to verify, as in `manualprop verify mypackage.ops`")
    for path in (options.json, options.junit, options.html):
        if path is not None and path != Path("-") and not path.parent.is_dir():
            raise _Mistake(f"{path} cannot be written: there is no folder {path.parent}")
    found = [f for target in options.targets for f in discover(target, options.seed)]
    if options.list:
        _show_list(found)
        return 0
    out = sys.stderr if options.json == Path("-") else sys.stdout
    reports, unverified = [], []
    for f in found:
        if f.case is None:
            unverified.append(f.target)
            continue
        report = _verified(f, options)
        reports.append(report)
        made_up = f"inputs made up: {f.guessed}\n" if f.guessed else ""
        print(f"\n{f.target}\n{made_up}{report}", file=out)
    _write(options, reports)
    for target in unverified:
        print(
            f"\n{target}: NOT VERIFIED, since no inputs were found that it accepts. Put a case beside it:",
            file=out,
        )
        print(f"    CASE = manualprop.verify.Case({target.partition(':')[2]}.apply, (inputs, ...))", file=out)
    bad = [r for r in reports if not r.passed]
    print(f"\n{len(reports)} verified, {len(bad)} with findings, {len(unverified)} not verified", file=out)
    return 1 if bad or unverified else 0


def _verified(found: Found, options: argparse.Namespace) -> Report:
    assert found.case is not None
    only = options.only.split(",") if options.only else None
    try:
        count = len(chosen(options.level, only))
    except ValueError as error:
        raise _Mistake(str(error)) from None
    with _progress(found.target, count) as step:
        try:
            report = check(
                dataclasses.replace(found.case, seed=options.seed or found.case.seed),
                level=options.level,
                only=only,
                time_limit=options.time_limit,
                progress=step,
            )
        except ValueError as error:
            raise _Mistake(str(error)) from None
    again = f"manualprop verify {found.target} --seed {options.seed} --only"
    outcomes = (dataclasses.replace(o, reproduction=f"{again} {o.probe}") for o in report.outcomes)
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


def _write(options: argparse.Namespace, reports: Sequence[Report]) -> None:
    for path, text in (
        (options.json, lambda: json.dumps([json.loads(r.to_json()) for r in reports], indent=2) + "\n"),
        (options.junit, lambda: junit(reports)),
        (options.html, lambda: html(reports)),
    ):
        if path == Path("-"):
            print(text(), end="")
        elif path is not None:
            path.write_text(text(), encoding="utf-8")
