"""Traces a step: one record for each tensor that it makes."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from manualprop import functions as rules
from manualprop._backprop._stages import Stage


@dataclass(frozen=True)
class Record:
    """One step of a trace.

    Args:
        direction: "forward", "loss" or "backward".
        path: the layer's path in the model.
        layer: the layer's class.
        formula: the rule's formula; in a backward step, its derivation.
        shape: the shape of the result.
        norm: the Euclidean norm of the result.
    """

    direction: str
    path: str
    layer: str
    formula: str
    shape: tuple[int, ...]
    norm: float


CONVOLUTIONS = {"Conv": "Convolution", "ConvTranspose": "TransposedConvolution"}

# Called with a stage, "forward" or "backward", the stage's inputs, and its result.
Note = Callable[[Stage, str, tuple[Any, ...], "Tensor | None"], None]


@contextmanager
def noted(stages: Sequence[Stage], note: Note) -> Iterator[None]:
    """Inside, every stage calls ``note`` with its inputs and its result, forwards and backwards."""

    def watch(
        stage: Stage, direction: str, run: Callable[..., Tensor | None]
    ) -> Callable[..., Tensor | None]:
        def told(*given: Any) -> Tensor | None:
            kept = tuple(one.clone() for one in given)  # a stage may overwrite the arriving gradient
            made = run(*given)
            note(stage, direction, kept, made)
            return made

        return told

    for stage in stages:
        stage.forward = watch(stage, "forward", stage.forward)  # type: ignore[method-assign,assignment]
        stage.backward = watch(stage, "backward", stage.backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for stage in stages:
            del stage.forward, stage.backward


def recorder(records: list[Record]) -> Note:
    """A ``note`` function that adds one record for each step of each stage."""

    def note(stage: Stage, direction: str, given: tuple[Any, ...], made: Tensor | None) -> None:
        rule = rule_named_as(stage.layer)
        formula = headline(rule) if direction == "forward" else derivation(rule)
        if rule is None:
            formula = type(stage.layer).__name__ if direction == "forward" else "dx = g, in the shape of x"
        records.append(record(direction, stage.path, stage.layer, formula, made))

    return note


def record(direction: str, path: str, layer: Module, formula: str, made: Tensor | None) -> Record:
    shape = () if made is None else tuple(made.shape)
    norm = 0.0 if made is None else made.detach().double().norm().item()
    return Record(direction, path, type(layer).__name__, formula, shape, norm)


def rule_named_as(layer: Module) -> Any:
    """The rule named as a layer, such as MaxPool of MaxPool2d; None without one."""
    name = type(layer).__name__.removesuffix("Loss")
    family = re.sub(r"[123]d$", "", name)
    return getattr(rules, name, None) or getattr(rules, CONVOLUTIONS.get(family, family), None)


def headline(rule: Any) -> str:
    """The first line of a rule's docstring: its formula, mathematics between dollar signs; "" without a rule."""
    return (inspect.getdoc(rule) or "").partition("\n")[0] if rule is not None else ""


def derivation(rule: Any) -> str:
    """The derivation of a rule, line by line; "" where its docstring has none."""
    found = re.search(r"^Derivation.*?\n(.*?)(?=^\S|\Z)", inspect.getdoc(rule) or "", re.M | re.S)
    return textwrap.dedent(found[1]).strip("\n") if found and rule is not None else ""
