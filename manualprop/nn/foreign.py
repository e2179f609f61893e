"""Twins of layers of other libraries, found by the name of the class: no library is imported for them."""

import functools
from typing import Any

from torch import Tensor, nn

from manualprop import functional as F

__all__: list[str] = []


class TransposedLinear(nn.Module):
    """$y = x W + b$ by :class:`manualprop.functions.Linear`: a linear layer whose weight is (in, out)."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)  # (N, I) (I, O) + (O,) -> (N, O)


# {(module, name) of a foreign class: the class that computes the same by our rules}
FORWARDS: dict[tuple[str, str], type[nn.Module]] = {
    ("transformers.pytorch_utils", "Conv1D"): TransposedLinear,
}


def foreign_twin(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Our class for a class of another library, if there is one."""
    forward = FORWARDS.get((cls.__module__, cls.__qualname__))
    return None if forward is None else _made(forward, cls)  # type: ignore[arg-type]


def foreign_original(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of another library that one of our classes was made from."""
    original: type[nn.Module] | None = vars(cls).get("twin_of")
    return original


@functools.cache
def _made(forward: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls`` with our ``forward``; made once, and again when a layer of it is unpickled."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _unpickled, (cls,), dict(vars(self))

    members = {"__reduce_ex__": reduce, "twin_of": cls, "__module__": __name__, "__doc__": forward.__doc__}
    return type(cls.__name__, (forward, cls), members)


def _unpickled(cls: type[nn.Module]) -> nn.Module:
    twin = foreign_twin(cls)
    assert twin is not None
    return twin.__new__(twin)
