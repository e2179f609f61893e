"""``manualprop programs``: the compiled programs that are kept on disk, and how to delete them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime

from manualprop._command_line import Mistake, Parser

ABOUT = """
An epoch of updates of a small network runs as one compiled program (Backprop(..., compile="epoch"), and the engine
"tape-free" in long runs). It takes about ten seconds to compile, so it is kept on disk for later runs. The least
recently used of more than 64 programs is deleted by itself. The environment variable MANUALPROP_PROGRAMS names another
folder.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: the arguments, beginning with the subcommand.

    Returns:
        The exit status: 0, 1 if the folder cannot be read or changed, or 2 for a mistake in the command. One line
        says what is wrong.
    """
    try:
        options = _parser().parse_args(list(arguments)[1:])
    except Mistake as mistake:
        print(f"manualprop: programs: {mistake}", file=sys.stderr)
        return 2
    try:
        print(_cleared() if options.clear else _listed())
    except (RuntimeError, OSError) as error:  # no folder, or another user's
        print(f"manualprop: programs: {str(error).removeprefix('Backprop: ')}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="manualprop programs",
        description="List the compiled programs that are kept on disk.",
        epilog=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--clear", action="store_true", help="delete them all")
    return parser


def _cleared() -> str:
    from manualprop._backprop._programs import clear, folder  # imports torch, which --help does not need

    return f"{counted_programs(clear())} deleted from {folder()}"


def _listed() -> str:
    from manualprop._backprop._programs import folder, packages

    lines, size = [], 0
    for package in packages():
        try:
            known = package.stat()
        except FileNotFoundError:  # another process has just removed it
            continue
        size += known.st_size
        used = datetime.fromtimestamp(known.st_mtime)
        lines.append(f"{package.stem}  {known.st_size / 1e6:4.1f} MB  last used {used:%Y-%m-%d %H:%M}")
    return "\n".join([*lines, f"{counted_programs(len(lines))}, {size / 1e6:.1f} MB in {folder()}"])


def counted_programs(number: int) -> str:
    """The number of programs in words: 1 program, 2 programs."""
    return f"{number} program{'s' * (number != 1)}"
