"""A formula as JavaScript, printed from its trace.

``f`` of a rule is traced by :mod:`torch.fx` (``make_fx``), which also takes torch's composed functions apart: ``silu``
into a product, a sum, a quotient and an exponential.  What is left are a few dozen elementary operations, and each is
one word or sign of JavaScript.  So the page computes what the rule computes, and no formula is typed a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from manualprop._torch import taken_apart

# Elementary operations of numbers; {0} is the first argument.
NUMBERS = {
    "abs": "Math.abs({0})",
    "add": "({0} + {1})",
    "bitwise_and": "({0} && {1})",
    "bitwise_not": "!{0}",
    "bitwise_or": "({0} || {1})",
    "ceil": "Math.ceil({0})",
    "convert_element_type": "Number({0})",
    "cos": "Math.cos({0})",
    "div": "({0} / {1})",
    "eq": "({0} === {1})",
    "erf": "erf({0})",
    "erfc": "erfc({0})",
    "exp": "Math.exp({0})",
    "exp2": "2 ** {0}",
    "expm1": "Math.expm1({0})",
    "floor": "Math.floor({0})",
    "ge": "({0} >= {1})",
    "gt": "({0} > {1})",
    "isfinite": "Number.isFinite({0})",
    "isnan": "Number.isNaN({0})",
    "le": "({0} <= {1})",
    "log": "Math.log({0})",
    "log1p": "Math.log1p({0})",
    "lt": "({0} < {1})",
    "maximum": "Math.max({0}, {1})",
    "minimum": "Math.min({0}, {1})",
    "mul": "({0} * {1})",
    "ne": "({0} !== {1})",
    "neg": "(-{0})",
    "pow": "({0} ** {1})",
    "reciprocal": "(1 / {0})",
    "rsqrt": "(1 / Math.sqrt({0}))",
    "sign": "Math.sign({0})",
    "sin": "Math.sin({0})",
    "sqrt": "Math.sqrt({0})",
    "sub": "({0} - {1})",
    "tanh": "Math.tanh({0})",
    "where": "({0} ? {1} : {2})",
}
# Those of a row, whose numbers are those of one example; a number stands for a row of equal ones.
ROWS = {
    "amax": "largest({0})",
    "gather": "{0}[{2}]",
    "sum": "total({0})",
}
# Those that hand on the argument of this place: a number has no shape.
SAME = {"as_strided": 0, "broadcast_in_dim": 0, "copy_": 1, "full_like": 1, "reshape": 0, "squeeze": 0}
NOTHING = ("empty_strided", "empty", "full")  # made to be filled: what fills it gives the number


class NotPrintable(Exception):
    """A formula has a step that JavaScript has no word for."""


def of_numbers(formula: Callable[..., Tensor], count: int = 1) -> str:
    """A function of numbers, from one that works element by element.

    Args:
        formula: a function of ``count`` tensors.
        count: of its arguments.

    Raises:
        NotPrintable: for a step that has no word.
    """
    return _printed(_traced(formula, [torch.full((2,), 0.5) for _ in range(count)]), _number)


def of_loss_rows(formula: Callable[..., Tensor], output: Tensor, target: Tensor) -> str:
    """A function of the output and the target of one example, from one of a batch of them.

    Args:
        formula: a function of two tensors with an example in each row, such as a loss that is not reduced.
        output: a sample of the first, with two axes.
        target: of the second.

    Raises:
        NotPrintable: for a step that has no word.
    """
    return _printed(_traced(formula, [output[:1], target[:1]]), _row)


def _traced(formula: Callable[..., Tensor], samples: list[Tensor]) -> fx.GraphModule:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made = taken_apart(formula, samples)
    except RuntimeError as error:  # it looks at its numbers, which a trace has not
        raise NotPrintable(str(error)) from error
    made.graph.eliminate_dead_code()
    return made


def _printed(traced: fx.GraphModule, step: Callable[[str, list[str]], str]) -> str:
    """The graph as a function of JavaScript, a line for each step."""
    names: dict[fx.Node, str] = {}
    arguments: list[str] = []
    lines: list[str] = []

    def text(value: Any) -> str:
        return names[value] if isinstance(value, fx.Node) else number(value)

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            names[node] = "xt"[len(arguments)]
            arguments.append(names[node])
        elif node.op == "get_attr":
            names[node] = str(getattr(traced, str(node.target)).reshape(-1).tolist())
        elif node.op == "output":
            result = node.args[0]
            lines.append(f"return {text(result[0] if isinstance(result, tuple | list) else result)};")
        else:
            word, given = _word(node), [text(a) for a in node.args]
            if word in SAME:
                names[node] = given[SAME[word]]
                continue
            names[node] = f"v{len(lines)}"
            lines.append(f"const {names[node]} = {step(word, given)};")
    return f"({', '.join(arguments)}) => {{ {' '.join(lines)} }}"


def _word(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name.rpartition("::")[2]


def number(value: Any) -> str:
    """A number of Python as JavaScript writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "(-Infinity)"
    if isinstance(value, int | float):
        return f"({value!r})" if value < 0 else repr(value)
    return "null"  # a dtype or a list of axes, which numbers have not


def _number(word: str, arguments: list[str]) -> str:
    if word in NOTHING:
        return "0"
    if word not in NUMBERS:
        raise NotPrintable(word)
    return NUMBERS[word].format(*arguments)


def _row(word: str, arguments: list[str]) -> str:
    if word in NOTHING:
        return "0"
    if word in ROWS:
        return ROWS[word].format(*arguments)
    if word not in NUMBERS:
        raise NotPrintable(word)
    letters = "abc"[: len(arguments)]
    return f"each(({', '.join(letters)}) => {NUMBERS[word].format(*letters)}, {', '.join(arguments)})"
