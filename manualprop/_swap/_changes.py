"""The changes that a swap makes."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class Change(NamedTuple):
    """One layer gets another class."""

    path: str
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]


def apply(changes: Iterable[Change]) -> None:
    for change in changes:
        change.module.__class__ = change.after


def revert(changes: Iterable[Change]) -> None:
    for change in changes:
        change.module.__class__ = change.before
