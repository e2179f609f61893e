r"""Formulas as the rules' own docstrings state them: the headline in LaTeX, the lines of the derivation in plain letters.

A line of a derivation such as ``dL/dW_oi = sum_n g_no x_ni`` becomes LaTeX, which the page typesets, and a formula in
LaTeX becomes plain letters, which the terminal shows.
"""

from __future__ import annotations

import re
from typing import Any

import manualprop.descent
from manualprop._backprop._trace import derivation

GREEK = {
    "alpha": "α",
    "beta": "β",
    "epsilon": "ε",
    "eta": "η",
    "theta": "θ",
    "lambda": "λ",
    "mu": "μ",
    "pi": "π",
    "sigma": "σ",
    "phi": "φ",
    "Phi": "Φ",
    "zeta": "ζ",
}
FUNCTIONS = ("cosh", "sinh", "tanh", "exp", "log", "max", "min")
NAMED = ("sign", "softmax", "onehot", "erf", "erfc", "expm1", "clamp")


def without_roles(text: str) -> str:
    """A line of a docstring without the marks that only the documentation's builder reads."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text)


def derived(rule: Any, left: str) -> str:
    """What the derivation finds for ``left`` such as "dL/dW": the left side and the end of the chain of equations.

    "" where no line begins so.
    """
    lines = derivation(rule).splitlines()
    for i, line in enumerate(lines):
        name, equals, rest = _without_reason(line).partition(" = ")
        if not (equals and re.fullmatch(rf"{re.escape(left)}(_\w+|\[[\w,]+\])?\s*", name)):
            continue
        end = "" if _goes_on(lines, i) else _last_side(rest) + _terms_that_count(line)
        for k, later in enumerate(lines[i + 1 :], start=i + 1):
            following = re.match(r"\s+= (.*)", _without_reason(later))
            if following is None:
                break
            if " beyond " not in following[1] and not _goes_on(
                lines, k
            ):  # a case at the margin; a sum of several lines
                end = _last_side(following[1])
        is_whole = all(end.count(a) == end.count(b) for a, b in ("()", "[]", "{}"))
        return f"{name.strip()} = {end.strip()}" if is_whole and end else ""
    return ""


def _goes_on(lines: list[str], i: int) -> bool:
    """Whether the next line adds to the sum of line i."""
    return i + 1 < len(lines) and lines[i + 1].lstrip().startswith("+ ")


def _without_reason(line: str) -> str:
    """A line of a derivation without the reason at its right margin."""
    indent = len(line) - len(line.lstrip())
    return line[:indent] + re.split(r"\s{3,}(?![\s=])", line.lstrip())[0]


def _terms_that_count(line: str) -> str:
    """Over which terms a sum goes, where this stands at the right margin: " over s q + d k - p = i"."""
    found = re.search(r"\s{3,}(over [^,;]+)", line)
    return f" {found[1]}" if found and "sum" in line else ""


def _last_side(text: str) -> str:
    """What stands after the last " = " that is not within brackets, as in 1[c = t]."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and text.startswith(" = ", i):
            start = i + 3
    return text[start:]


def update_formula() -> str:
    """The update of gradient descent, as the module of the descents states it."""
    found = re.search(r"\$(\\theta[^$]*)\$", manualprop.descent.__doc__ or "")
    assert found is not None, "the docstring of manualprop.descent states the update"
    return f"${found[1]}$"


# ----- plain letters to LaTeX -----

_TOKEN = re.compile(
    r"(?P<partial>d[lLy](?:_\w+)?/d\w+(?:\[[\w,]+\])?)|(?P<sum>sum_(?:\w+|\{[^{}]+\}))|(?P<indicator>1\[)|(?P<relation>/=|<=|>=)"
    r"|(?P<transpose>\^T\b)|(?P<power>\^-?\w+)|(?P<exponent>\^\{)"
    r"|(?P<entry>[A-Za-z]\[\w(?:,\w)*\])|(?P<below>[A-Za-z]_\{[^{}]+\})|(?P<word>[A-Za-z]\w*'*)|(?P<space>\s+)|(?P<other>.)"
)
_RELATIONS = {"/=": r"\ne ", "<=": r"\le ", ">=": r"\ge "}


def latex(line: str) -> str:
    """A line in plain letters, as derivations have them, in LaTeX: ``g^T x`` as ``g^{\\top} x``."""
    return "".join(_converted(found) for found in _TOKEN.finditer(line)).strip()


def _converted(found: re.Match[str]) -> str:
    kind, text = found.lastgroup, found[0]
    if kind == "partial":
        above, below = text.split("/")
        return rf"\frac{{\partial {_word(above[1:])}}}{{\partial {_word(_with_subscript(below[1:]))}}}"
    if kind == "sum":
        return rf"\sum_{{{text[4:].strip('{}')}}} "
    if kind == "entry":
        return _word(_with_subscript(text))
    if kind == "below":
        return f"{_word(text[0])}{text[1:]} "
    if kind == "indicator":
        return r"\mathbf{1}["
    if kind == "relation":
        return _RELATIONS[text]
    if kind == "transpose":
        return r"^{\top}"
    if kind == "power":
        return f"^{{{_word(text[1:])}}}"
    return _word(text) if kind == "word" else text


def _with_subscript(text: str) -> str:
    """x[n,c,i] as x_nci; anything else as it is."""
    return re.sub(r"\[([\w,]+)\]$", lambda found: "_" + found[1].replace(",", ""), text)


def _word(text: str) -> str:
    name, _, below = text.partition("_")
    if name in GREEK:
        name = rf"\{name}"
    elif name in FUNCTIONS:
        name = rf"\{name}"
    elif name in NAMED:
        name = rf"\operatorname{{{name}}}"
    elif len(name.rstrip("'")) > 2:
        return rf"\text{{ {text} }}"
    return f"{name}_{{{below}}} " if below else f"{name} "


# ----- LaTeX to plain letters -----

_PLAIN = [
    (r"\\(?:mathbf|operatorname|text|mathrm)\{([^{}]*)\}", r"\1"),
    (r"\\t?frac(\w)(\w)", r"\1/\2"),
    (r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)"),
    (r"\\sqrt\s*\{([^{}]+)\}", r"√(\1)"),
    (r"\\sqrt\s*", "√"),
    (r"\^\{?\\top\}?", "ᵀ"),
    (r"\\(?:[,;!]|[Bb]igg?)", ""),
    (r"\\sum", "Σ"),
    (r"\\leftarrow", "←"),
    (r"\\nabla", "∇"),
    (r"\\partial\s*", "∂"),
    (r"\\in\b", "∈"),
    (r"\\sim\b", "~"),
    (r"\\ne\b", "≠"),
    (r"\\ge\b", "≥"),
    (r"\\le\b", "≤"),
    (r"\\odot", "⊙"),
    (r"\\cdot", "·"),
    (r"\^2\b", "²"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"_\{(\w+)\}", r"_\1"),
]


def plain(text: str) -> str:
    """A formula in LaTeX, with or without dollar signs, in letters that a terminal shows."""
    text = text.replace("$", "")
    for pattern, replacement in _PLAIN:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"\\(\w+)", lambda found: GREEK.get(found[1], found[1]), text)
    return re.sub(r"\s+", " ", re.sub(r"\{([^{}]*)\}", r"(\1)", text)).strip()


def pieces(text: str) -> list[tuple[bool, str]]:
    """A text with mathematics between dollar signs, in pieces: (whether it is mathematics, the piece)."""
    return [(bool(i % 2), piece) for i, piece in enumerate(text.split("$")) if piece]
