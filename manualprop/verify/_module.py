"""A module's parameters and buffers exchanged for others, and left so: backward may look them up again.

A reversible block, a checkpoint or an adjoint reads the parameters from the module while it runs backward.  After
``torch.func.functional_call`` the module holds its own again by then.
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
    """The tensors of a module, and where they stand in it.

    Attributes:
        own: by name, what the module came with.
        parameters: which of these are parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        # Weakly: this object is found by the module, and must not keep it alive.
        self._module = weakref.ref(module)
        self.own: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.parameters = frozenset(name for name, _ in module.named_parameters())
        by_tensor = {id(t): name for name, t in self.own.items()}
        self.places: list[
            tuple[dict[str, Any], str, str]
        ] = [  # (dictionary, key, name): of tied ones several
            (held, key, by_tensor[id(t)])
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for key, t in held.items()
            if t is not None
        ]
        self._away = False
        self._last: dict[str, Tensor] = {}
        self._behind = WeakIdKeyDictionary()  # an output -> the tensors with which it was computed

    def call(self, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns with ``state``, which stays in it until :meth:`restore`."""
        module = self._module()
        assert module is not None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            # A tracer left behind in the module would outlive what it traces.
            return functional_call(module, state, args, kwargs)
        self._put(state)
        self._last = state
        result = module(*args, **kwargs)
        for held, key, name in self.places:
            if held.get(key) is not None:
                state[name] = held[key]  # a buffer may have been assigned anew
        return result

    def _put(self, state: dict[str, Tensor]) -> None:
        self._away = True
        for held, key, name in self.places:
            held[key] = state[name]

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Outputs of the last call: their backward finds the module as their forward did."""
        for y in outputs:
            if y.grad_fn is not None:
                self._behind[y] = self._last
        self._last = {}

    def recall(self, outputs: Sequence[Tensor]) -> None:
        """Put back what these outputs were computed with."""
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
    """The one exchange of a module; ``afresh``, since its tensors may be others than the last time."""
    found = _EXCHANGES.get(module)
    if found is not None and afresh:
        found.restore()
    if found is None or afresh:
        found = _EXCHANGES[module] = Exchange(module)
    return found
