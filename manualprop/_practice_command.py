"""``manualprop practice``: exercises in deriving gradients; what is done, start, check, hint, solution.

torch is imported when it is needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manualprop._command_line import Mistake, Parser
from manualprop._invocation import console_command, shown

if TYPE_CHECKING:
    from manualprop._practice import Mark
    from manualprop._practice._progress import Progress

EXAMPLES = """
examples:
  manualprop practice                     the exercises, and what is done
  manualprop practice start tanh          writes practice/tanh.py
  manualprop practice check               marks every exercise that was started
  manualprop practice check tanh          marks one, as python practice/tanh.py does
  manualprop practice hint tanh           three steps, one at a time
  manualprop practice solution tanh       after an attempt, with the derivation
  manualprop practice check handed_in --csv marks.csv   a class: a row for each file

A file runs with your rights: mark those of people whom you trust, or in a container.

exit status: 0 all is right, or the table is written; 1 something is not right;
2 a mistake in the command
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: from the subcommand on.

    Returns:
        The exit status: 0, 1 if what was checked is not all right, 2 for a mistake, which has then been told in a line.
    """
    try:
        options = _parser().parse_args(list(arguments)[1:])
        run = {"start": _start, "check": _check, "hint": _hint, "solution": _solution}.get(
            options.action, _list
        )
        return run(options)
    except Mistake as mistake:
        print(f"manualprop: practice: {mistake}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="manualprop practice",
        description="Derive gradients yourself, and be told how they are wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_folder(parser, Path("practice"))
    actions = parser.add_subparsers(dest="action", metavar="start | check | hint | solution")
    start = actions.add_parser("start", help="write the file of an exercise")
    start.add_argument("name", nargs="?", metavar="NAME", help="of the exercise (default: the next one)")
    check = actions.add_parser("check", help="mark it")
    check.add_argument(
        "what", nargs="?", metavar="NAME|FILE|FOLDER", help="an exercise, a file, or all files of a folder"
    )
    check.add_argument("--csv", metavar="FILE", type=Path, help="write the marks: a row for each file")
    check.add_argument(
        "--time-limit",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="of processor time, for a file (default: 30)",
    )
    for name, summary in (
        ("hint", "the next of three hints"),
        ("solution", "the solution, after an attempt"),
    ):
        actions.add_parser(name, help=summary).add_argument("name", metavar="NAME")
    for action in actions.choices.values():
        _add_folder(action, argparse.SUPPRESS)
    return parser


def _add_folder(parser: argparse.ArgumentParser, default: Any) -> None:
    """--folder, before the action or after it."""
    parser.add_argument(
        "--folder", metavar="FOLDER", type=Path, default=default, help="of your files (default: practice)"
    )


# ----- the actions -----


def _list(options: argparse.Namespace) -> int:
    from manualprop._practice._exercises import EXERCISES

    progress = _progress(options)
    width = max(len(e.title) for e in EXERCISES.values())
    for number, (name, exercise) in enumerate(EXERCISES.items(), start=1):
        print(f"{number:>2}  {name:<14} {exercise.title:<{width}}  {progress.state(name)}".rstrip())
    done = sum(progress.done(name) for name in EXERCISES)
    print(f"\n{done} of {len(EXERCISES)} are right.", end="")
    following = _next(progress)
    print(f" Next: {console_command()} practice start {following}" if following else " That is all of them.")
    return 0


def _start(options: argparse.Namespace) -> int:
    from manualprop._practice._exercises import EXERCISES

    progress = _progress(options)
    name = _named(options.name) if options.name else _next(progress)
    if not name:
        raise Mistake("every exercise has been started. Give the name of one.")
    file = progress.file(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(EXERCISES[name].template())
    except FileExistsError as error:
        raise Mistake(
            f"{shown(file)} is there, and is left as it is. To begin anew, remove it, or give another --folder."
        ) from error
    except OSError as error:
        raise Mistake(f"{shown(file)} cannot be written: {error.strerror}.") from error
    print(f"{shown(file)} is written. Fill in the dots, then: {console_command()} practice check {name}")
    return 0


def _check(options: argparse.Namespace) -> int:
    if options.time_limit <= 0:
        raise Mistake(f"--time-limit must be positive. Got {options.time_limit:g}.")
    if options.csv and not options.csv.parent.is_dir():
        raise Mistake(f"{options.csv} cannot be written: there is no folder {options.csv.parent}.")
    files = list(_files(options))
    if not files:
        raise Mistake(f"there is nothing to mark. Begin with: {console_command()} practice start")
    rows, wrong = [], 0
    for file, name in files:
        mark = _marked(options, file, name)
        wrong += not mark.right
        told = f"{shown(file)}  {mark.exercise}: {mark.verdict}{': ' * bool(mark.how)}{mark.how}"
        print(told if options.csv else mark, flush=True)
        rows.append([str(file), mark.exercise, mark.verdict, mark.how])
    if options.csv:
        _write(options.csv, rows)
        print(f"{len(rows) - wrong} of {len(rows)} are right. The marks are in {shown(options.csv)}.")
        return 0
    return 1 if wrong else 0


def _hint(options: argparse.Namespace) -> int:
    from manualprop._practice._exercises import EXERCISES

    name = _named(options.name)
    due = _progress(options).next_hint(name)
    print(f"Hint {due + 1} of 3\n{EXERCISES[name].hints[due]}")
    return 0


def _solution(options: argparse.Namespace) -> int:
    from manualprop._practice._exercises import EXERCISES

    name = _named(options.name)
    if not _progress(options).attempted(name):
        raise Mistake(
            f"the solution of {name} comes after an attempt. Make one, and have it marked: "
            f"{console_command()} practice check {name}"
        )
    print(EXERCISES[name].solution())
    return 0


# ----- what they share -----


def _progress(options: argparse.Namespace) -> Progress:
    from manualprop._practice._progress import Progress

    return Progress(options.folder)


def _next(progress: Progress) -> str:
    """The first exercise that has not been started."""
    from manualprop._practice._exercises import EXERCISES

    return next((name for name in EXERCISES if not progress.file(name).exists()), "")


def _named(name: str) -> str:
    from manualprop._practice._practice import exercise_named

    try:
        return exercise_named(name)
    except ValueError as error:
        raise Mistake(str(error)) from error


def _files(options: argparse.Namespace) -> Iterator[tuple[Path, str | None]]:
    """What is to be marked, with the exercise where it is known by name."""
    from manualprop._practice._exercises import EXERCISES

    progress = _progress(options)
    if options.what is None:
        yield from ((progress.file(name), name) for name in EXERCISES if progress.file(name).exists())
        return
    path = Path(options.what)
    if options.what in EXERCISES or not path.exists():
        name = _named(options.what)
        if not progress.file(name).exists():
            raise Mistake(f"{name} must be started first: {console_command()} practice start {name}")
        yield progress.file(name), name
    elif path.is_dir():
        for file in sorted(path.rglob("*.py")):
            if not any(p == "__pycache__" or p.startswith(".") for p in file.relative_to(path).parts):
                yield file, None
    else:
        yield path, None


def _marked(options: argparse.Namespace, file: Path, name: str | None) -> Mark:
    from manualprop._practice import Mark, practice
    from manualprop._practice._child import marked_file
    from manualprop._practice._practice import exercise_of

    try:
        name = name or exercise_of(file)
    except ValueError as error:
        if not options.csv:
            raise Mistake(str(error)) from error
        return Mark("", "error", "of which exercise is it?")
    if options.csv:  # a teacher's folder is left as it is
        return marked_file(name, file, options.time_limit)
    return practice(file, name, time_limit=options.time_limit)


def _write(path: Path, rows: list[list[str]]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["file", "exercise", "mark", "how"])
            table.writerows(rows)
    except OSError as error:
        raise Mistake(f"{path} cannot be written: {error.strerror}.") from error
