"""``manualprop receipt MODULE:BUILD --input SHAPE``: the receipt of a user's model on made-up inputs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from manualprop._receipt import Comparison, Receipt, receipt
from manualprop._swap import swap

EXAMPLES = """
inputs:
  32x128             float32, normally distributed
  32x128:bfloat16    any dtype of torch
  32x128:long:1000   integers from 0 to 999; without a bound 0 and 1
  mask=32x128:bool   given by name, as in model(x, mask=...)

examples:
  manualprop receipt torchvision.models:resnet18 --input 8x3x224x224 --swap
  manualprop receipt mymodule:build --input 32x128:long:1000 --png kept.png
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
        The exit status: 0, or 2 for a mistake in the command, which has then been told in a line.
    """
    try:
        _run(_parser().parse_args(list(arguments)[1:]))
    except _Mistake as mistake:
        print(f"manualprop: receipt: {mistake}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="manualprop receipt",
        description="Measure what a model keeps for its backward pass, layer by layer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODULE:NAME",
        help="a function without arguments that makes the model, or the model itself; modules of the working "
        "directory are found",
    )
    parser.add_argument(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE[:BOUND]]",
        action="append",
        default=[],
        type=str,
        help="an input, made up; several in the order of the model's arguments",
    )
    parser.add_argument("--swap", action="store_true", help="show it before and after manualprop.swap")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes, instead of a table")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw a bar for each layer as well")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the inputs (default: 0)")
    return parser


def _run(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    model = _model(options.model)
    inputs: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for text in options.input:
        name, _, described = text.rpartition("=")
        if name:
            named[name] = _tensor(described)
        else:
            inputs.append(_tensor(described))
    report: Receipt | Comparison
    report = before = _receipt(model, inputs, named)
    if options.swap:
        swap(model)
        report = before.beside(_receipt(model, inputs, named))
    if options.png:
        _draw(report, options.png)
    if options.json:
        print(report.to_json())
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console

        Console().print(report)
    else:
        print(report)


def _model(where: str) -> torch.nn.Module:
    home, colon, name = where.partition(":")
    if not (home and colon and name):
        raise _Mistake(f"the model must be given as MODULE:NAME, such as mymodule:build. Got {where!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(home)
    except Exception as error:  # the module is the user's: whatever it raises
        raise _Mistake(f"the module {home!r} must be importable. {_told(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            similar = difflib.get_close_matches(part, dir(found), n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise _Mistake(f"{home} must have an attribute {name!r}, which it has not.{hint}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, torch.nn.Module):
        try:
            found = found()
        except Exception as error:  # so is the function
            raise _Mistake(
                f"{where} must make a model when called without arguments. {_told(error)}"
            ) from error
    if not isinstance(found, torch.nn.Module):
        raise _Mistake(f"{where} must be, or return, a torch.nn.Module. Got {type(found).__name__}.")
    return found


def _tensor(text: str) -> Tensor:
    """A made-up tensor of a description such as 32x128:long:1000."""
    parts = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?(?::(\d+))?", text)
    if parts is None:
        raise _Mistake(f"an input must look like 32x128 or 32x128:long:1000. Got {text!r}.")
    shape = [int(size) for size in parts[1].split("x")]
    dtype = getattr(torch, parts[2] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise _Mistake(f"the dtype of an input must be one of torch, such as bfloat16. Got {parts[2]!r}.")
    if dtype.is_floating_point or dtype.is_complex:
        if parts[3]:
            raise _Mistake(f"only inputs of integers have a bound. Got {text!r}.")
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    bound = int(parts[3] or 2)
    if bound == 0:
        raise _Mistake(f"the bound of integers must be positive: they are from 0 to BOUND - 1. Got {text!r}.")
    return torch.randint(bound, shape).to(dtype)


def _receipt(model: torch.nn.Module, inputs: list[Tensor], named: dict[str, Tensor]) -> Receipt:
    try:
        return receipt(model, *inputs, **named)
    except Exception as error:  # the model is the user's
        shapes = [tuple(t.shape) for t in inputs] + [f"{name} {tuple(t.shape)}" for name, t in named.items()]
        given = ", ".join(map(str, shapes)) or "none: give them by --input"
        raise _Mistake(f"the model must take the inputs. Given were {given}. {_told(error)}") from error


def _draw(report: Receipt | Comparison, path: Path) -> None:
    try:
        report.save_png(path)
    except (ImportError, OSError) as error:
        raise _Mistake(f"the picture cannot be written. {_told(error)}") from error


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"It raised {type(error).__name__}{': ' * bool(text)}{text}"
