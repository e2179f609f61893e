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
        The exit status: 0, or 2 for a mistake in the command, which is then reported in one line.
    """
    try:
        options = _parser().parse_args(list(arguments)[1:])
    except Mistake as mistake:
        print(f"manualprop: programs: {mistake}", file=sys.stderr)
        return 2
    print(_cleared() if options.clear else _listed())
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

    return f"{clear()} programs deleted from {folder()}"


def _listed() -> str:
    from manualprop._backprop._programs import folder, packages

    lines, size = [], 0
    for package in packages():
        known = package.stat()
        size += known.st_size
        used = datetime.fromtimestamp(known.st_mtime)
        lines.append(f"{package.stem}  {known.st_size / 1e6:4.1f} MB  last used {used:%Y-%m-%d %H:%M}")
    return "\n".join([*lines, f"{len(lines)} programs, {size / 1e6:.1f} MB in {folder()}"])
