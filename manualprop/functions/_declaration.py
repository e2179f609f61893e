"""Checks of a rule's class statement.  A wrong declaration raises there, before the rule is used."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch.autograd import Function


def require_methods(rule: type, *names: str) -> None:
    for name in names:
        found = getattr(rule, name, None)
        if not callable(found) or found is getattr(
            Function, name, None
        ):  # torch's own raises when it is called
            given = "none" if found is None or callable(found) else repr(found)
            raise TypeError(
                f"{rule.__name__}: {name} must be a static method of the class. Got {given}. "
                f"A rule states {', '.join(names)}."
            )


def require_choice(rule: type, name: str, choices: tuple[Any, ...]) -> None:
    found = getattr(rule, name)
    if not any(found is choice or (type(found) is str and found == choice) for choice in choices):
        allowed = " or ".join(map(repr, choices))
        raise ValueError(f"{rule.__name__}: {name} must be {allowed}. Got {name} = {found!r}.")


def refuse_unknown(rule: type, known: set[str], helpers: bool) -> None:
    """Raise for an unknown name in the class, most often a misspelt one.

    Constants (upper case) and private names are allowed, and methods if ``helpers`` is true.
    """
    for name, value in vars(rule).items():
        method = callable(value) or isinstance(value, staticmethod)
        if name in known or name.startswith("_") or name.isupper() or (helpers and method):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.5)
        raise TypeError(
            f"{rule.__name__}: {name!r} is no declaration of a rule. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + f"Known are {', '.join(sorted(known))}; constants are upper case, helpers start with an underscore."
        )


def parameters(function: Callable[..., Any]) -> list[str] | None:
    """The names of a function's parameters; None if they are unknown (``*args``, a builtin)."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found):
        return None
    return [p.name for p in found]


def require_parameters(rule: type, name: str, like: str) -> None:
    """Raise unless the method ``name`` takes as many arguments as ``like``."""
    given, expected = parameters(getattr(rule, name)), parameters(getattr(rule, like))
    if given is None or expected is None:
        return
    defaults = inspect.signature(getattr(rule, name)).parameters
    needed = [p for p in given if defaults[p].default is inspect.Parameter.empty]
    if not len(needed) <= len(expected) <= len(given):
        raise TypeError(
            f"{rule.__name__}: {name} must have as many parameters as {like}({', '.join(expected)}). "
            f"Got {name}({', '.join(given)})."
        )
