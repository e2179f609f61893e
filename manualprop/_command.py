"""The console command `manualprop`: a table of subcommands, each imported only when it is called.

`--version` and `--help` answer from here, before torch and Lightning, which take seconds to import.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import manualprop
from manualprop._invocation import console_command


class Command(NamedTuple):
    """One subcommand.

    Args:
        summary: one line for `--help`.
        extra: of the package that it needs.
        needs: a module of that extra, by which to see whether it is installed.
        home: module with a function main(arguments), which are those from the subcommand on, and returns the status.
    """

    summary: str
    extra: str
    needs: tuple[str, ...]
    home: str


_LIGHTNING = ("lightning", "torchmetrics", "jsonargparse", "rich", "matplotlib")
_CLI = "manualprop.training.cli"
_HELP = Path(__file__).parent / "training" / "help"  # made from the parser, which takes seconds to make

COMMANDS = {
    "fit": Command(
        "train a network by batch, stochastic or mini-batch descent", "training", _LIGHTNING, _CLI
    ),
    "validate": Command(
        "evaluate a trained network on the validation examples", "training", _LIGHTNING, _CLI
    ),
    "test": Command("evaluate a trained network on the test examples", "training", _LIGHTNING, _CLI),
    "predict": Command("write the predictions of a trained network to a file", "training", _LIGHTNING, _CLI),
    "explain": Command(
        "show the steps of an update with the numbers of a real batch",
        "explain",
        ("torch", "rich", "latex2mathml"),
        "manualprop._explain_command",
    ),
    "practice": Command(
        "derive gradients yourself, and be told how they are wrong",
        "",
        ("torch",),
        "manualprop._practice_command",
    ),
    "programs": Command(
        "list or delete the compiled programs that are kept on disk",
        "",
        ("torch",),
        "manualprop._programs_command",
    ),
    "receipt": Command(
        "measure what a model keeps for its backward pass, layer by layer",
        "",
        ("torch",),
        "manualprop._receipt_command",
    ),
    "verify": Command(
        "prove custom backwards right, or show how they are wrong",
        "",
        ("torch",),
        "manualprop._verify_command",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for a failure, 2 for a mistake in the command, 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"manualprop {manualprop.__version__}")
        return 0
    try:
        return _run(words)
    except KeyboardInterrupt:
        return _complain("interrupted", status=130)
    except BrokenPipeError:  # `manualprop ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    command = COMMANDS.get(words[0])
    if command is None:
        similar = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {similar[0]!r}?" if similar else f"Known are {', '.join(COMMANDS)}."
        return _complain(f"unknown command {words[0]!r}. {hint}")
    if command.home == _CLI and {"-h", "--help"} & set(words):
        print((_HELP / f"{words[0]}.txt").read_text(encoding="utf-8"), end="")
        return 0
    missing = [name for name in command.needs if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f'pip install "manualprop[{command.extra}]"'
        return _complain(
            f"{words[0]} needs {', '.join(missing)}, which is not installed. Get it with: {remedy}"
        )
    words = ["--help" if word == "--help=all" else word for word in words]
    run: Callable[[Sequence[str]], int] = importlib.import_module(command.home).main
    return run(words)


def _complain(text: str, status: int = 2) -> int:
    print(f"manualprop: {text}", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: manualprop COMMAND [OPTION ...]",
            "",
            "Hand-derived backpropagation for PyTorch.",
            "",
            "commands:",
            *(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "  manualprop COMMAND --help shows the options of a command.",
            "",
            "options:",
            "  -h, --help     show this and stop",
            "  -V, --version  show the version and stop",
            "",
            f"example: {console_command()} fit --config recipes/digits/minibatch.yaml",
        ]
    )
