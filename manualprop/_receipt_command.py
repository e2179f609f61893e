"""``manualprop receipt MODULE:BUILD --input SHAPE``: the receipt of a user's model on made-up inputs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from manualprop._command_line import Mistake, Parser, made_up, named_model, told
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


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: the arguments, beginning with the subcommand.

    Returns:
        The exit status: 0, or 2 for a mistake in the command, which is then reported in one line.
    """
    try:
        _run(_parser().parse_args(list(arguments)[1:]))
    except Mistake as mistake:
        print(f"manualprop: receipt: {mistake}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    model = named_model(options.model)
    inputs: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for text in options.input:
        name, _, described = text.rpartition("=")
        if name:
            named[name] = made_up(described)
        else:
            inputs.append(made_up(described))
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


def _receipt(model: torch.nn.Module, inputs: list[Tensor], named: dict[str, Tensor]) -> Receipt:
    try:
        return receipt(model, *inputs, **named)
    except Exception as error:  # the model is the user's
        shapes = [tuple(t.shape) for t in inputs] + [f"{name} {tuple(t.shape)}" for name, t in named.items()]
        given = ", ".join(map(str, shapes)) or "none: give them by --input"
        raise Mistake(f"the model must take the inputs. Given were {given}. {told(error)}") from error


def _draw(report: Receipt | Comparison, path: Path) -> None:
    try:
        report.save_png(path)
    except (ImportError, OSError) as error:
        raise Mistake(f"the picture cannot be written. {told(error)}") from error
