"""The update as a torch operation, the last one in a compiled graph of forward and backward pass.

In plain graph code a product that is added to a weight gets a tensor of its own, and the weights are copied
back and forth.  The graph calls an operation that changes its arguments as it is: the update stays folded
into the product.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from manualprop._backprop._destinations import Descend

FACTORS = {"take": 1, "take_weight": 2}  # method of a destination -> the number of tensors it takes


class Updates:
    """The updates of the parameters that learn.  A graph holds only tensors and numbers: it has their number.

    The hyperparameters are read when the graph runs, so a scheduler causes no new compilation.
    """

    def __init__(self, descend: Mapping[Parameter, Descend]) -> None:
        self.destinations = list(descend.values())
        self.number = next(_numbers)
        _known[self.number] = self

    def record(self, factors: Sequence[Tensor], methods: Sequence[str], loss: Tensor) -> None:
        """Put the updates into the graph that is being made; they happen only if the loss is finite."""
        weights = [destination.value for destination in self.destinations]
        _operation()(weights, factors, loss, self.number, methods)


_known: WeakValueDictionary[int, Updates] = WeakValueDictionary()
_numbers = itertools.count()


@functools.cache
def _library() -> Any:
    library = torch.library.Library("manualprop", "FRAGMENT")
    library.define(
        "descend(Tensor(a!)[] weights, Tensor[] factors, Tensor loss, int number, str[] methods) -> ()"
    )
    library.impl("descend", _descend, "CompositeExplicitAutograd")
    torch.library.register_fake("manualprop::descend", lambda *_: None, lib=library)
    return library  # its definitions last as long as this object


def _operation() -> Any:
    _library()
    return torch.ops.manualprop.descend.default


def _descend(
    weights: list[Tensor], factors: list[Tensor], loss: Tensor, number: int, methods: list[str]
) -> None:
    if not math.isfinite(loss.item()):
        return
    destinations, given = _known[number].destinations, iter(factors)
    if any(w.data_ptr() != d.value.data_ptr() for w, d in zip(weights, destinations, strict=True)):
        raise RuntimeError(
            "Backprop: the compiled graph must change the weights where they are. Got copies of them; no weight was "
            "changed. Use compile=False, and tell us with which model."
        )
    for destination, method in zip(destinations, methods, strict=True):
        getattr(destination, method)(*[next(given) for _ in range(FACTORS[method])])
