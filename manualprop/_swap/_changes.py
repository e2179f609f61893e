"""The changes that a swap makes."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn


class Change(NamedTuple):
    """One layer gets another class; a fused one also gets the attributes that it needs.

    A change of functions leaves the class, and sets the attribute that runs our rules for torch's functions.
    """

    path: str
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    fuses: bool = False
    attributes: Mapping[str, Any] = MappingProxyType({})
    replaced: Mapping[str, Any] = MappingProxyType({})  # attributes that were there before

    @property
    def is_of_functions(self) -> bool:
        return self.before is self.after


def apply(changes: Iterable[Change]) -> None:
    for change in changes:
        if not change.is_of_functions:
            change.module.__class__ = change.after
        _replace(vars(change.module), change.replaced, change.attributes)


def revert(changes: Iterable[Change]) -> None:
    for change in changes:
        if not change.is_of_functions:
            change.module.__class__ = change.before
        _replace(vars(change.module), change.attributes, change.replaced)


def _replace(values: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in old:
        values.pop(name, None)
    values.update(new)
