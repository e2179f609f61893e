"""Runs a rule without a tape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manualprop.functions import Rule
from manualprop.functions._rule import recording


class Context:
    """Stands for autograd's ``ctx``: it keeps what a rule saves between its forward and its backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Do nothing: there is no forward mode here."""

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: backward always gets None for an absent gradient."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Do nothing: only the first output is differentiated."""


@dataclass
class Application:
    """One application of a rule: its arguments, what it saved, its output."""

    rule: type[Rule]
    arguments: tuple[Any, ...]
    output: Any
    context: Context

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments, by the rule's own backward."""
        others = len(self.output) - 1 if isinstance(self.output, tuple) else 0
        found = self.rule.backward(self.context, g, *[None] * others)
        return found if isinstance(found, tuple) else (found,)


def applications(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, list[Application]]:
    """The value of ``function``, and the applications of rules in it, in order."""
    found: list[Application] = []

    def record(rule: type[Rule], given: tuple[Any, ...]) -> Any:
        needs = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in given)
        context = Context(needs)
        output = rule.forward(*given)
        rule.setup_context(context, given, output)
        found.append(Application(rule, given, output, context))
        return output

    with recording(record):
        return function(*arguments), found
