"""What an exercise is, and the file that a learner gets, made from its solution."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from manualprop import functions

# Of a right gradient one asks these too; `second_order` is asked for by name, so that a refusal counts as well.
BEYOND = ("linearity", "ties", "extremes", "grad_output_layout", "mutation", "sizes", "saved_bytes")


@dataclass(frozen=True)
class Asked:
    """What verify is asked of a learner's code.

    Args:
        fn: the callable.
        args: where.
        reference: of the same arguments, right by definition.
        beyond: probes that follow once the value and the first order are right.
        second: whether the gradient must be differentiable again.
        keeps: what may be kept for backward, in the words of verify's probe `saved_bytes`: "inputs", "outputs".
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    reference: Callable[..., Any] | None = None
    beyond: tuple[str, ...] = BEYOND
    second: bool = True
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        name: as the command calls it.
        title: one line.
        statement: what is given and what is asked, in plain text.
        entry: the class or function of the learner's file that is marked.
        code: the solved file's code.  A line that ends in ``#= note`` is blank from its ``=`` on in the learner's
            file, one that ends in ``#-`` is left out there, and one that begins with ``#+`` stands there alone.
        hints: three, each nearer to the answer.
        rules: names of the rules whose derivations are the solution's.
        asked: what verify is asked, given the entry.
        derivation: text before that of the rules.
        words: what names of the report mean here, such as "output 0": "the new W".
        advice: what a diagnosis means here: a pattern of it, and a sentence that does not tell the answer.
    """

    name: str
    title: str
    statement: str
    entry: str
    code: str
    hints: tuple[str, str, str]
    rules: tuple[str, ...]
    asked: Callable[[Any], list[Asked]]
    derivation: str = ""
    words: Mapping[str, str] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_class(self) -> bool:
        """Whether a class is marked, and not a function."""
        return f"class {self.entry}(" in self.code

    def template(self) -> str:
        """The learner's file."""
        lines = []
        for line in self.code.strip("\n").splitlines():
            if line.endswith("#-"):
                continue
            if line.lstrip().startswith("#+ "):
                line = line.replace("#+ ", "", 1)
            blank = re.fullmatch(r"(.*? = ).*  #= (.*)", line)
            lines.append(f"{blank[1]}...  # {blank[2]}" if blank else line)
        return FILE.format(
            name=self.name, title=self.title, statement=self.statement.strip("\n"), code="\n".join(lines)
        )

    def solved(self) -> str:
        """The code with every blank filled in."""
        lines = [line for line in self.code.strip("\n").splitlines() if not line.lstrip().startswith("#+ ")]
        return "\n".join(line.removesuffix("#-").rstrip().replace("#= ", "# ") for line in lines)

    def solution(self) -> str:
        """The solved code, and the derivation."""
        parts = [self.solved(), "Derivation", textwrap.indent(self.derivation.strip(), "    ")]
        for name in self.rules:
            rule = rule_at(name)
            parts += [
                f"manualprop.functions.{name}: {formula_of(rule)}",
                textwrap.indent(derivation_of(rule), "    "),
            ]
        return "\n\n".join(part for part in parts if part)


FILE = '''"""Exercise {name}: {title}.

{statement}

Write what stands at the dots.  Then have it marked, in any of these ways:
    manualprop practice check {name}
    python practice/{name}.py
    pytest practice/{name}.py
Stuck?  manualprop practice hint {name}
"""

import torch

import manualprop


{code}


def test_{name}():
    manualprop.practice(__file__).assert_right()


if __name__ == "__main__":
    print(manualprop.practice(__file__))
'''


def rule_at(name: str) -> Any:
    """A rule, or a gradient that several rules share, by its name in `manualprop.functions`."""
    return functools.reduce(getattr, name.split("."), functions)


def formula_of(rule: Any) -> str:
    """The first line of a rule's docstring."""
    return (inspect.getdoc(rule) or "").partition("\n")[0]


def derivation_of(rule: Any) -> str:
    """The derivation in a rule's docstring, with what its heading says of the letters."""
    found = re.search(r"^Derivation(?:, )?([^\n]*)\n(.*?)(?=^\S|\Z)", inspect.getdoc(rule) or "", re.M | re.S)
    if not found:
        return ""
    lines = textwrap.dedent(found[2]).strip("\n")
    return f"{found[1]}\n{lines}" if found[1] else lines
