"""The changes that a swap makes."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn


class Change(NamedTuple):
    """One layer gets another class; a fused one also gets the attributes that it needs."""

    path: str
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]
    fuses: bool = False
    attributes: Mapping[str, Any] = MappingProxyType({})


def apply(changes: Iterable[Change]) -> None:
    for change in changes:
        change.module.__class__ = change.after
        vars(change.module).update(change.attributes)


def revert(changes: Iterable[Change]) -> None:
    for change in changes:
        change.module.__class__ = change.before
        for name in change.attributes:
            vars(change.module).pop(name, None)
