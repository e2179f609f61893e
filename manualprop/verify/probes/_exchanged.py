"""A wrong second derivative: would it be right if backward read what save_for_backward returns?

A Function may keep a detached input or output on its class.  The second derivative is then lost: a consequence.
Here backward gets the input or the output itself.  A second derivative that stays wrong has a cause of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from manualprop.verify._compare import Gradient, compare
from manualprop.verify._subject import Subject
from manualprop.verify._watch import wrapped
from manualprop.verify.probes._kept import held_by


def wrong_all_the_same(s: Subject) -> bool:
    """Whether the second derivative is wrong although backward reads the inputs and outputs themselves.

    False where this cannot be told: the class keeps nothing, or backward reads a tensor kept there that is neither
    an input nor an output.
    """
    s(*s.at())
    if not held_by(s.functions):
        return False
    exchange, base = _Exchange(), s.fresh()

    def function(*points: Tensor) -> tuple[Tensor, ...]:
        outputs = s.function(*points)
        kept = [t for _, t in held_by(s.functions)]
        exchange.instead = {id(t): _same(t, [*points, *outputs, *s.others().values()]) for t in kept}
        return outputs

    base.function = function  # type: ignore[method-assign]
    with wrapped(s.functions, exchange.around):
        wrong = any(bool(c.wrong.any()) for c in compare(Gradient(base)))
    return wrong and exchange.known and not exchange.unknown


def _same(t: Tensor, candidates: Sequence[Tensor]) -> Tensor | None:
    """The first candidate with the dtype and the entries of ``t``, in its shape."""
    for c in candidates:
        if c.dtype == t.dtype and c.numel() == t.numel():
            shaped = c.reshape(t.shape)
            if torch.equal(shaped.detach(), t.detach()):
                return shaped
    return None


class _Exchange(TorchFunctionMode):
    """Operations get other tensors instead of those kept, which are recognised by identity.

    Attributes:
        instead: the id of a kept tensor -> what to use instead, or None.
        known: whether some operation was given another tensor.
        unknown: whether some operation read a kept tensor with None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.instead: dict[int, Tensor | None] = {}
        self.known = self.unknown = False

    def around(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)  # so that held_by looks at what is wrapped
        def run(*args: Any) -> Any:
            with self:
                return backward(*args)

        return run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(self._other, args), **tree_map(self._other, kwargs or {}))

    def _other(self, t: Any) -> Any:
        if id(t) not in self.instead:
            return t
        other = self.instead[id(t)]
        self.known |= other is not None
        self.unknown |= other is None
        return t if other is None else other
