"""Selects layers by class, by name pattern, or by a function."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

Selector: TypeAlias = type[nn.Module] | str | Callable[[str, nn.Module], bool]
Selection: TypeAlias = Selector | Iterable[Selector] | None


def selected(
    selection: Selection, name: str, paths: dict[nn.Module, list[str]], everything: bool
) -> set[nn.Module]:
    """The modules of ``paths`` that at least one selector of ``selection`` matches.

    Args:
        name: the argument's name, for the errors.
        paths: {module: all its paths}.
        everything: whether None selects all or none.
    """
    if selection is None:
        return set(paths) if everything else set()
    found: set[nn.Module] = set()
    for selector in _several(selection, name):
        takes = _test(selector, name)
        taken = {module for module, its in paths.items() if any(takes(path, module) for path in its)}
        if isinstance(selector, str) and not taken:
            raise ValueError(_no_match(name, selector, [path for its in paths.values() for path in its]))
        found |= taken
    return found


def _several(selection: Selector | Iterable[Selector], name: str) -> list[Selector]:
    if isinstance(selection, (str, type)) or callable(selection):
        return [selection]
    if isinstance(selection, Iterable):
        return list(selection)
    raise _not_a_selector(selection, name)


def _test(selector: Selector, name: str) -> Callable[[str, nn.Module], bool]:
    if isinstance(selector, str):
        return lambda path, module: any(fnmatchcase(part, selector) for part in _and_above(path))
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return lambda path, module: isinstance(module, selector)
    if isinstance(selector, type) or not callable(selector):
        raise _not_a_selector(selector, name)
    return selector


def _and_above(path: str) -> list[str]:
    """A path and the paths of its parents: a pattern that matches a module includes everything inside it."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names) + 1)]


def _not_a_selector(given: object, name: str) -> TypeError:
    shown = given.__name__ if isinstance(given, type) else type(given).__name__
    return TypeError(
        f"swap: {name} must be a class of modules, a pattern of names, a predicate of a path and a module, "
        f"or several of these. Got {shown}."
    )


def _no_match(name: str, pattern: str, paths: list[str]) -> str:
    near = get_close_matches(pattern, paths, n=1, cutoff=0.4)
    hint = f"the nearest is {near[0]!r}" if near else "model.named_modules() lists them"
    return f"swap: {name}={pattern!r} matches no module of the model; {hint}."
