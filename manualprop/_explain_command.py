"""``manualprop explain``: an update of the digits recipe, of a run, or of a user's model, step by step.

Loads what is to be explained and hands tensors on.  torch and Lightning are imported when they are needed, so that
``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manualprop._command_line import Mistake, Parser, made_up, named_model, told
from manualprop._invocation import console_command, shown

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from manualprop._explain import Explanation

EPILOG = """
inputs and targets, made up from a seed:
  8x64               float32, normally distributed
  8x64:bfloat16      any dtype of torch
  ids:50:8x16        tokens from 0 to 49
  classes:10         a target only: a class from 0 to 9 for each example

examples:
  manualprop explain
  manualprop explain --page digits.html
  manualprop explain --name digits-minibatch --checkpoint last --layer linear1
  manualprop explain mymodule:build --input 8x64 --target classes:10
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: from the subcommand on.

    Returns:
        The exit status: 0, or 2 for a mistake in the command, which has then been told in a line.
    """
    try:
        _run(_parser().parse_args(list(arguments)[1:]))
    except Mistake as mistake:
        print(f"manualprop: explain: {mistake}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="manualprop explain",
        description="Show the ten steps of an update with the numbers of a real batch:\n"
        "of the digits recipe, of a run (--name), or of your own model (MODULE:NAME).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODULE:NAME",
        nargs="?",
        help="a function without arguments that makes the model, or the model",
    )
    add("--input", metavar="WHAT", help="of the model, with one row for each example: see below")
    add("--target", metavar="WHAT", help="of the examples: see below")
    add("--loss", metavar="NAME", help="of manualprop.nn, or the path of any other (default: by the target)")
    add(
        "--descent",
        choices=("Batch", "Stochastic", "MiniBatch"),
        default="MiniBatch",
        help="of a model (default: %(default)s)",
    )
    add("--learning-rate", type=float, default=0.1, metavar="RATE", help="of a model (default: %(default)s)")
    add("--name", metavar="RUN", help="explain the run in runs/RUN")
    add("--checkpoint", default="best", help="of the run: best, last, or a path (default: best)")
    add("--layer", metavar="PATH", help="show this layer alone")
    add(
        "--example",
        type=int,
        default=0,
        metavar="N",
        help="show the numbers of this example of the batch (default: 0)",
    )
    add("--verbose", action="store_true", help="show derivations, inputs and more numbers")
    add("--page", metavar="FILE", type=Path, help="write the page, one file of HTML, as well")
    add("--figure", metavar="FILE", type=Path, help="draw a figure as well")
    add("--json", action="store_true", help="print JSON instead")
    add("--seed", type=int, default=0, help="of a model, what is made up, and dropout (default: 0)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.model and options.name:
        raise Mistake(
            f"give a model or the --name of a run, not both. Got {options.model} and {options.name}."
        )
    for name in ("input", "target", "loss"):
        if getattr(options, name) and not options.model:
            raise Mistake(f"--{name} belongs to a model of your own: give it as MODULE:NAME.")
    found = _of_model(options) if options.model else _trained(options)
    rendered = _attempt(
        lambda: found.render(layer=options.layer, example=options.example, verbose=options.verbose)
    )
    for path, write in ((options.page, found.save), (options.figure, lambda path: _draw(found, path))):
        if path is not None:
            _write(write, path)
    if options.json:
        print(found.to_json())
        return
    from rich.console import Console

    console = Console()
    console.print(rendered)
    for what, path in (("page", options.page), ("figure", options.figure)):
        if path is not None:
            console.print(f"{what}: {shown(path)}", soft_wrap=True)
    if options.page is None:
        again = (
            " ".join([console_command(), *sys.argv[1:], "--page explain.html"])
            if sys.argv[1:2] == ["explain"]
            else ""
        )
        console.print(
            f"The page: {again or console_command() + ' explain --page explain.html'}",
            style="dim",
            soft_wrap=True,
        )


def _attempt(call: Any) -> Any:
    """What ``call`` returns; what it complains of is the user's mistake."""
    try:
        return call()
    except (ValueError, TypeError, ImportError) as error:
        raise Mistake(" ".join(str(error).removeprefix("explain: ").split())) from error


def _write(write: Any, path: Path) -> None:
    try:
        write(path)
    except OSError as error:
        reason = error.strerror or str(error).removeprefix("explain: ")
        raise Mistake(f"{path} must be a file in a folder that can be written to. {reason}") from error
    except (ImportError, ValueError) as error:  # a format that matplotlib does not know
        raise Mistake(str(error).removeprefix("explain: ")) from error


def _draw(found: Explanation, path: Path) -> None:
    found.figure().savefig(path, dpi=120)


# ----- a run, or the digits -----


def _trained(options: argparse.Namespace) -> Explanation:
    from manualprop._explain import explain
    from manualprop.training import UserError, loading

    needed = ("lightning", "jsonargparse", "torchmetrics") if options.name else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        remedy = 'pip install "manualprop[training]"'
        raise Mistake(f"a run needs {', '.join(missing)}, which is not installed. Get it with: {remedy}")
    try:
        found = loading.run(options.name, options.checkpoint) if options.name else loading.digits()
    except UserError as error:
        raise Mistake(str(error)) from error
    return _attempt(  # type: ignore[no-any-return]
        lambda: explain(
            found.model, found.loss, found.x, found.target, found.descent,
            title=found.title, image=found.image, seed=found.seed, history=found.history,
        )
    )  # fmt: skip


# ----- a model of the user's -----


def _of_model(options: argparse.Namespace) -> Explanation:
    if not options.input or not options.target:
        missing = "--input" if not options.input else "--target"
        raise Mistake(f"a model needs {missing}, such as --input 8x64 --target classes:10.")
    import torch

    from manualprop import descent as descents
    from manualprop._explain import explain

    torch.manual_seed(options.seed)
    model = named_model(options.model)
    x = _input(options.input)
    target = _target(options.target, model, x)
    loss = _loss(options.loss or ("MSELoss" if target.is_floating_point() else "CrossEntropyLoss"))
    made: Any = getattr(descents, options.descent)
    extra = {"batch_size": min(32, len(x))} if options.descent == "MiniBatch" else {}
    descent = _attempt(lambda: made(learning_rate=options.learning_rate, **extra))
    return _attempt(lambda: explain(model, loss, x, target, descent, title=options.model, seed=options.seed))  # type: ignore[no-any-return]


def _input(text: str) -> Tensor:
    tokens = re.fullmatch(r"ids:(\d+):(\d+(?:x\d+)*)", text)
    return made_up(f"{tokens[2]}:long:{tokens[1]}" if tokens else text)


def _target(text: str, model: Module, x: Tensor) -> Tensor:
    classes = re.fullmatch(r"classes:(\d+)", text)
    if classes is None:
        return _input(text)
    import torch

    try:
        with torch.no_grad():
            output: Any = model(x)
    except Exception as error:  # the model is the user's
        raise Mistake(f"the model must take inputs of shape {tuple(x.shape)}. {told(error)}") from error
    if not isinstance(output, torch.Tensor) or output.dim() < 2:
        raise Mistake("for --target classes:N the model must return a tensor of (examples, classes, ...).")
    if output.shape[1] != int(classes[1]):
        raise Mistake(
            f"--target classes:N must name as many classes as the model has outputs. Got {text}, and an output of shape "
            f"{tuple(output.shape)}."
        )
    return torch.randint(int(classes[1]), (output.shape[0], *output.shape[2:]))


def _loss(name: str) -> Module:
    import torch

    from manualprop import nn

    home, _, own = name.rpartition(".")
    module = _attempt(lambda: importlib.import_module(home)) if home else nn
    kind = getattr(module, own, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        losses = [one for one in dir(nn) if one.endswith("Loss")]
        near = difflib.get_close_matches(own, losses, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(losses)}."
        raise Mistake(f"--loss must be a loss of manualprop.nn, or the path of a class. Got {name!r}. {hint}")
    made: Module = _attempt(kind)
    return made
