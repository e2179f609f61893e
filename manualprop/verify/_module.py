"""Exchange a module's parameters and buffers, and leave them exchanged for backward.

A reversible block, a checkpoint or an adjoint reads parameters from the module in its backward.
``torch.func.functional_call`` would have put the old ones back by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary


class Exchange:
    """The tensors of a module, and their places in it.

    Attributes:
        own: the module's original tensors, by name.
        parameters: the names of the parameters among them.
    """

    def __init__(self, module: nn.Module) -> None:
        # A weak reference: this object must not keep the module alive.
        self._module = weakref.ref(module)
        self.own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.parameters = frozenset(name for name, _ in module.named_parameters())
        by_tensor = {id(t): name for name, t in self.own.items()}
        self.places: list[
            tuple[dict[str, Any], str, str]
        ] = [  # (dictionary, key, name): several for tied tensors
            (held, key, by_tensor[id(t)])
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for key, t in held.items()
            if t is not None
        ]
        self._away = False
        self._last: dict[str, Tensor] = {}
        self._behind = WeakIdKeyDictionary()  # an output -> the tensors that computed it

    def call(self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns with ``state``, which stays in it until :meth:`restore`."""
        module = self._module()
        assert module is not None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            # A tracer left in the module would outlive its trace.
            return functional_call(module, state, args, kwargs)
        self._put(state)
        self._last = state
        result = module(*args, **kwargs)
        for held, key, name in self.places:
            if held.get(key) is not None:
                state[name] = held[key]  # forward may have assigned a new buffer
        return result

    def _put(self, state: dict[str, Tensor]) -> None:
        self._away = True
        for held, key, name in self.places:
            held[key] = state[name]

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Note these outputs of the last call, so that :meth:`recall` can put their tensors back."""
        for y in outputs:
            if y.grad_fn is not None:
                self._behind[y] = self._last
        self._last = {}

    def recall(self, outputs: Sequence[Tensor]) -> None:
        """Put the tensors that computed these outputs back into the module."""
        for y in outputs:
            state = self._behind.get(y)
            if state:
                self._put(state)
                return

    def restore(self) -> None:
        """Give the module its own tensors back."""
        if self._away:
            for held, key, name in self.places:
                held[key] = self.own[name]
            self._away = False


_EXCHANGES: weakref.WeakKeyDictionary[nn.Module, Exchange] = weakref.WeakKeyDictionary()


def exchange(module: nn.Module, afresh: bool = False) -> Exchange:
    """The one exchange of a module.  ``afresh``: made anew, because the module's tensors may have changed."""
    found = _EXCHANGES.get(module)
    if found is not None and afresh:
        found.restore()
    if found is None or afresh:
        found = _EXCHANGES[module] = Exchange(module)
    return found
