"""What the command line does with its arguments before they are parsed, and with the parser's errors.

jsonargparse reports a mistake with everything that it tried, in up to twenty lines. Here each kind of error
becomes one line with the key, the given value, and the nearest name that exists. An unknown kind of error is
shown as it is.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Trainer

from manualprop._invocation import console_command
from manualprop.training._errors import InputValueError
from manualprop.training.run_directory import RunDirectory

DESCRIPTION = "Hand-derived backpropagation: train by batch, stochastic or mini-batch gradient descent."

_KEYS = (
    "name",
    "seed",
    "seed_everything",
    "threads",
    "descent",
    "model.model",
    "model.loss",
    "model.engine",
    "data",
    "config",
)
_FLAGS = ("resume", "overwrite", "checkpoint")
_OWN_MODULES = ("manualprop.descent", "manualprop.training", "manualprop.nn")


# These replace the first line of the docstring of each key's class.
TITLES = {
    "descent": "Which examples an update sees, and the update",
    "model": "What is trained, and on which loss",
    "data": "The examples",
    "trainer": "Lightning's Trainer",
}


def without_markup(text: str) -> str:
    """Return a text without Sphinx's markup.

    Args:
        text: with roles, such as :class:`x`, and double backticks.
    """
    return re.sub(r"``?([^`]+)``?", r"\1", re.sub(r":\w+:`~?([^`]*)`", r"\1", text))


class HelpFormatter(DefaultHelpFormatter):
    """The usual help, without Sphinx's markup and without the lists of hundreds of torch modules."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = without_markup(super()._get_help_string(action))
        listed = re.search(r", known subclasses: ([^)]*)", text)
        if listed is None or listed[1].count(",") < 6:
            return text
        return text.replace(listed[0], "")


class _Quiet(argparse.ArgumentParser):
    """A parser without error messages: the real parser says what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def with_saved_config(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with the saved configuration of the run if none is given.

    Args:
        arguments: the command and what follows it; those of a new training run do not change.

    Raises:
        ValueError: if there is no saved configuration.
    """
    command, *rest = arguments
    options = _Quiet(add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config")
    options.add_argument("--name", default="run")
    options.add_argument("--resume", action="store_true")
    try:
        given, _ = options.parse_known_args(rest)
    except ValueError:  # a value is missing: the real parser says so
        return list(arguments)
    if given.config is not None or (command == "fit" and not given.resume):
        return list(arguments)
    run = RunDirectory(given.name)
    if run.config.is_file():
        return [command, "--config", str(run.config), *rest]
    if any(word.startswith(("-h", "--help", "--model")) or word.endswith(".help") for word in rest):
        return list(arguments)
    raise InputValueError(
        f"the name of a run that has been trained must be given. {run.config} does not exist; give its --name, or "
        f"train it first: {console_command()} fit --config recipes/digits/minibatch.yaml"
    )


def complaint(error: Exception, replaced: Mapping[str, str]) -> str:
    """Return a parser's error in a line or two.

    Args:
        error: the parser's error.
        replaced: Trainer options that do not exist here, and what to use instead.
    """
    text = str(error)
    for kind in (
        _recipe,
        _unknown_key,
        _unknown_option,
        _unknown_class,
        _unreadable,
        _restricted,
        _refused,
        _failed,
        _no_class,
        _not_one_of,
        _wrong_type,
        _missing,
        _no_file,
    ):
        explanation = kind(text, replaced)
        if explanation:
            return explanation
    return re.sub(r"\s+", " ", text)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a remark that names the known word most similar to an unknown one.

    Args:
        word: the unknown word.
        known: all known words.
    """
    similar = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if similar:
        return f"Did you mean {similar[0]!r}?"
    return f"Known are {', '.join(sorted(known))}." if len(known) <= 12 else "See --help."


def _unknown_key(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", text)
    if found is None:
        return ""
    key = found[1] or found[2]
    instead = replaced.get(key.removeprefix("trainer."), "")
    if instead:
        return f"unknown key {key!r}: {instead}."
    known = [*_KEYS, *_FLAGS, *(f"trainer.{name}" for name in _parameters(Trainer) if name not in replaced)]
    return (
        f"unknown key {key!r}. {nearest(key.removesuffix('.class_path').removesuffix('.init_args'), known)}"
    )


def _unknown_option(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"Option '([\w.]+)' is not accepted", text)
    if found is None:
        return ""
    paths = re.findall(r"class_path[ =]'([\w.]+)'", text)
    where = f" of {paths[-1]}" if paths else ""
    key = ".".join([*_key_path(text), found[1]])
    return (
        f"unknown option {key!r}{where}. {nearest(found[1], _parameters(_load(paths[-1])) if paths else [])}"
    )


def _unknown_class(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(
        r"module '([\w.]+)' has no attribute '(\w+)'|No module named '([\w.]+)'|dot import path string: (\S+)",
        text,
    )
    if found is None:
        return ""
    whole = re.search(r"given class_path '([\w.]+)'", text)
    path = whole[1] if whole else found[4] or f"{found[1] or found[3]}.{found[2] or ''}"
    home, _, name = path.rpartition(".")
    return f"{'.'.join(_key_path(text))}: unknown class {path!r}. {nearest(name, _known_classes(home))}"


def _not_one_of(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", text)
    return f"{'.'.join(_key_path(text))} must be one of {found[1]}. Got {found[2]!r}." if found else ""


def _wrong_type(text: str, replaced: Mapping[str, str]) -> str:
    value = re.findall(r"Got value: (.*)|Given value: (.*)", text)
    types = re.findall(r"Expected an? <class '([\w.]+)'>", text)
    if not (value and types):
        return ""
    plain = {"NoneType": "null", "Sequence": "list"}
    wanted = [plain.get(kind.rpartition(".")[2], kind) for kind in dict.fromkeys(types)]
    names = wanted[0] if value[0][0] else " or ".join(wanted)
    return f"{'.'.join(_key_path(text))} must be of type {names}. Got {value[0][0] or value[0][1]!r}."


def _missing(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"arguments are required: (.*)", text)
    if found is None:
        return ""
    keys = ", ".join(re.sub(r"\b(fit|validate|test|predict)\.", "", key) for key in found[1].split(", "))
    hint = (
        "give a recipe, such as --config recipes/digits/minibatch.yaml, or the --name of a run to go on with"
    )
    return f"these keys have no value: {keys}. To set them, {hint}."


def _no_file(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"(?:File does not exist|Path is not a file): '(.*)'", text)
    return f"the file given as --config must exist. Got {found[1]!r}." if found else ""


def _recipe(text: str, replaced: Mapping[str, str]) -> str:
    """The error for a recipe that is not a mapping of keys, not YAML, or not text."""
    for sign, what in (
        ("Unexpected config:", "hold the keys of a run, such as name, descent, model, data and trainer"),
        ("Problems parsing config:", "be YAML"),
        ("codec can't decode", "be text in UTF-8"),
    ):
        if sign in text:
            got = " ".join(text.partition(sign)[2].split() if sign.endswith(":") else text.split())
            return f"the file given as --config must {what}. Got {got or 'an empty file'}; compare recipes/digits/minibatch.yaml."
    return ""


def _refused(text: str, replaced: Mapping[str, str]) -> str:
    """The text of a constructor's own ValueError, taken from the list of all types that were tried."""
    found = re.search(
        r"Errors:\n\s*- ((?!Expected|Problem with|Parser key|Type |Not a valid subclass).+)", text
    )
    return found[1] if found else ""


def _restricted(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"Not of type \w+: (?:(\S+) )?does not conform to restriction (.*)", text)
    if found is None:
        return ""
    limits = (
        found[2].replace("v", "").replace(">=", "at least ").replace("<=", "at most ").replace(">", "above ")
    )
    value = re.search(r"Got value: (.*)|Given value: (.*)", text)
    got = found[1] or (value[1] or value[2] if value else "something else")
    return f"{'.'.join(_key_path(text))} must be {limits.strip()}. Got {got}."


def _unreadable(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"\[Errno \d+\] (.*): '(.*)'", text)
    if found is None:
        return ""
    return f"every file that the configuration names must be there. Got {found[1]}: {found[2]}; correct the path."


def _no_class(text: str, replaced: Mapping[str, str]) -> str:
    found = re.search(r"Not a valid subclass of (\w+)", text)
    if found is None:
        return ""
    value = re.findall(r"Got value: (.*)|Given value: (.*)", text)
    got = (value[-1][0] or value[-1][1]) if value else "something else"
    key = ".".join(_key_path(text))
    return f"{key} must name a class of the kind {found[1]}, by class_path, with its init_args. Got {got}."


def _failed(text: str, replaced: Mapping[str, str]) -> str:
    """The error text of a constructor, if it is not about the types of its arguments."""
    found = re.search(
        r"Problem with given class_path '[\w.]+?(\w+)':\n\s*+(?:- )?+((?!Expected|Problem with|Parser key|Validation |Not a valid subclass).+)",
        text,
    )
    return f"{found[1]}: {found[2].strip()}" if found else ""


def _key_path(text: str) -> list[str]:
    return re.findall(r"Parser key \"([\w.]+)\"", text)


def _load(path: str) -> Any:
    home, _, name = path.rpartition(".")
    return getattr(importlib.import_module(home), name)


def _parameters(function: Any) -> list[str]:
    return [
        name for name in inspect.signature(function).parameters if name not in ("self", "params", "kwargs")
    ]


def _known_classes(home: str) -> list[str]:
    names: list[str] = []
    for module_name in (home, *_OWN_MODULES):
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError):
            continue
        names += [name for name, value in vars(module).items() if inspect.isclass(value)]
    return names
