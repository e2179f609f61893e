"""The texts of `manualprop fit --help` and the like: made from the parser, and shipped in `help/` here.

It takes seconds to make the parser, and its own help, which `--help=all` shows, is three times as long. After
a change of an option, `python3 scripts/run.py docs help` writes the texts again.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

from manualprop import descent, training
from manualprop import nn as hand
from manualprop.training._usage import without_markup
from manualprop.training.cli import COMMANDS, DescentCLI

WIDTH, COLUMN = 80, 25
_TRAINER = "trainer."
# Options of the Trainer that get a description; of the others only the name is listed.
_COMMON = (
    "max_epochs",
    "max_steps",
    "max_time",
    "accelerator",
    "devices",
    "precision",
    "logger",
    "callbacks",
    "limit_train_batches",
    "fast_dev_run",
    "enable_progress_bar",
    "detect_anomaly",
)
# The options that all descents share are listed once.
_SHARED = set(inspect.signature(descent.Stochastic).parameters)

_EXAMPLES = ("--name digits-minibatch", "--config recipes/digits/minibatch.yaml --name mine")
_END = (
    "In brackets: the default. The VALUE null takes an option back. --descent.help MiniBatch describes the options "
    "of a class (so do --model.model.help and --data.help), --help=all every option; these take some seconds."
)

Rows = list[tuple[str, str]]

FOLDER = Path(__file__).parent / "help"


def texts() -> dict[str, str]:
    """Return the text of each command."""
    return {command: _text(command, parser) for command, parser in _parsers().items()}


class _Made(Exception):
    """Carries the parsers out of the constructor before it parses."""

    def __init__(self, parsers: Mapping[str, ArgumentParser]) -> None:
        super().__init__()
        self.parsers = parsers


class _ParsersOnly(DescentCLI):
    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        """Stop here: only the parsers are needed."""
        raise _Made(self._subcommand_parsers)


def _parsers() -> Mapping[str, ArgumentParser]:
    try:
        _ParsersOnly([])
    except _Made as made:
        return made.parsers
    raise AssertionError("the constructor parses")


def _text(command: str, parser: ArgumentParser) -> str:
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    nested = {dest.partition(".")[0] for dest in actions if "." in dest}
    run = [action for dest, action in actions.items() if dest not in (*nested, "help") and "." not in dest]
    trainer = {
        dest.removeprefix(_TRAINER): action
        for dest, action in actions.items()
        if dest.startswith(_TRAINER) and not dest.endswith(".help")
    }
    parts = [
        [f"usage: manualprop {command} [--config RECIPE] [--name NAME] [--KEY VALUE ...]", ""],
        textwrap.wrap(COMMANDS[command], WIDTH),
        ["", f"example: manualprop {command} {_EXAMPLES[command == 'fit']}"],
        _section("the run", [("--" + _named(action), _said(action)) for action in run]),
        _section("--descent NAME, one of", [(c.__name__, _summary(c)) for c in _descents()]),
        _section("--descent.KEY VALUE", _descent_rows()),
        _section("--model.model NAME, or the class path of any torch.nn.Module", _class_rows(_models())),
        _section("--model.loss NAME, one of manualprop.nn, or any class path", [("", ", ".join(_losses()))]),
        _section("--model.KEY VALUE", [("engine", _said(actions["model.engine"]))]),
        _section("--data NAME, or the class path of any LightningDataModule", _class_rows(_data_modules())),
        _section(
            "--trainer.KEY VALUE, of Lightning's Trainer", [(key, _said(trainer[key])) for key in _COMMON]
        ),
        _lines("", "also: " + ", ".join(key for key in trainer if key not in _COMMON)),
        ["", *textwrap.wrap(_END, WIDTH)],
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def _section(title: str, rows: Rows) -> list[str]:
    return ["", f"{title}:", *(line for name, text in rows for line in _lines(name, text))]


def _lines(name: str, text: str) -> Iterator[str]:
    indent = COLUMN if name else 2
    body = textwrap.wrap(text, WIDTH - indent, break_on_hyphens=False) or [""]
    if len(name) + 3 > COLUMN:
        yield f"  {name}"
        name = ""
    for number, line in enumerate(body):
        yield f"{'  ' + name if number == 0 else '':<{indent}}{line}".rstrip()


def _named(action: argparse.Action) -> str:
    name = action.option_strings[-1].removeprefix("--")
    return name if action.nargs == 0 or name == "print_config" else f"{name} {name.upper()}"


def _said(action: argparse.Action) -> str:
    return _sentence(action.help or "") + _default(action.default)


def _sentence(text: str) -> str:
    """The first sentence, without Sphinx's markup."""
    text = re.sub(r"\s+", " ", without_markup(text)).strip()
    sentence = re.split(r"(?<!\be\.g)(?<!\bie)\.(?=\s|$)", text)[0]
    return sentence[:1].upper() + sentence[1:] + "."


def _default(value: object) -> str:
    if value is None or value is False or value is inspect.Parameter.empty or str(value).startswith("=="):
        return ""
    return f" {list(value)}" if isinstance(value, tuple) else f" [{value}]"


def _summary(cls: type) -> str:
    return _sentence(inspect.getdoc(cls) or "")


def _class_rows(classes: list[type]) -> Rows:
    return [(c.__name__, f"{_summary(c)} Options: {', '.join(_options(c))}") for c in classes]


def _options(cls: type) -> list[str]:
    return [p.name + _default(p.default) for p in inspect.signature(cls).parameters.values()]


def _option_rows(cls: type) -> Rows:
    parser = ArgumentParser()
    parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
    plain = [action for action in parser._actions if not action.dest.endswith("help")]
    return [(action.dest, _said(action)) for action in plain]


def _descent_rows() -> Rows:
    shared = _option_rows(descent.Stochastic)
    own = [
        (name, f"{cls.__name__}: {text[0].lower()}{text[1:]}")
        for cls in _descents()
        for name, text in _option_rows(cls)
        if name not in _SHARED
    ]
    return own + shared


def _descents() -> list[type]:
    return _public(descent, lambda c: issubclass(c, descent.Descent) and not inspect.isabstract(c))


def _models() -> list[type]:
    return _offered(lambda c: issubclass(c, nn.Module) and not hasattr(c, "training_step"))


def _data_modules() -> list[type]:
    return _offered(lambda c: issubclass(c, LightningDataModule) and not _required(c))


def _offered(wanted: Callable[[type], bool]) -> list[type]:
    """Classes of the package of training, by name: it imports them in the order in which they are used."""
    return sorted(_public(training, wanted), key=lambda c: c.__name__)


def _losses() -> list[str]:
    classes = _public(hand, lambda c: c.__name__.endswith("Loss") and not _required(c))
    return [c.__name__ for c in classes]


def _required(cls: type) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _public(module: Any, wanted: Callable[[type], bool]) -> list[type]:
    found = [value for value in vars(module).values() if inspect.isclass(value) and wanted(value)]
    return [c for c in dict.fromkeys(found) if c.__module__.startswith("manualprop")]
