"""Neighbouring layers that run as one block, which keeps fewer bytes for backward; the layers stay in place.

The block is looked up at each call.  So a layer that later gets a hook, a parametrization, an adapter or a
replacement is simply called again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

from manualprop import functional as F
from manualprop.functional.fused import FUSES, _activate
from manualprop.nn import activation
from manualprop.nn._heard import is_heard
from manualprop.nn.activation import GELU
from manualprop.nn.container import Residual, check_alike
from manualprop.nn.dropout import Dropout
from manualprop.nn.foreign import TransposedLinear, foreign_original
from manualprop.nn.fused import BATCH_NORMS, CONVOLUTIONS, batch_norm_activation_conv, fits_convolution
from manualprop.nn.linear import Linear
from manualprop.nn.norm import LayerNorm, RMSNorm

__all__ = ["FusedResidual", "FusedSequential"]

# The layers and functions whose rules declare a name for blocks.
ACTIVATIONS = {
    getattr(activation, rule.__name__): name
    for name, rule in FUSES.items()
    if hasattr(activation, rule.__name__)
}
FUNCTIONS = {
    getattr(module, name): name for module in (torch, torch_F) for name in FUSES if hasattr(module, name)
}
# Those that are differentiated from their output; a following linear layer keeps it anyway.
KEPT_ANYWAY = {name for name, rule in FUSES.items() if rule.saves == "output"}

# A layer, or an activation as a function or by name.
Part = nn.Module | Callable[[Tensor], Tensor] | str


class Match(NamedTuple):
    """The next ``length`` parts can run as one function."""

    length: int
    call: Callable[[Tensor], Tensor]


def is_plain(part: Part, *kinds: type[nn.Module]) -> bool:
    """Whether a part is a layer of exactly one of these kinds, without hooks or its own ``forward``."""
    return isinstance(part, nn.Module) and type(part) in kinds and not is_heard(part)


def linear_parameters(part: Part) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a plain linear layer of ours, else None."""
    if isinstance(part, Linear) and is_plain(part, Linear):
        return part.weight, part.bias
    if isinstance(part, TransposedLinear) and foreign_original(type(part)) and not is_heard(part):
        return part.weight.t(), part.bias
    return None


def activation_name(part: Part) -> str | None:
    """The name of an activation for :func:`manualprop.functional.activation_linear`."""
    if isinstance(part, str):
        return part
    if not isinstance(part, nn.Module):
        return FUNCTIONS.get(part)
    if is_plain(part, GELU):
        return "gelu" if part.approximate == "none" else "gelu_tanh"
    if is_plain(part, *ACTIVATIONS):
        return ACTIVATIONS[type(part)]
    return None


def match(parts: Sequence[Part]) -> Match | None:
    """The longest run at the start of ``parts`` that keeps less as one function than separately."""
    return _activation(parts) or _norm(parts) or _batch_norm(parts)


def _activation(parts: Sequence[Part]) -> Match | None:
    """[activation, linear], [activation, dropout, linear], [ReLU, dropout]."""
    name = activation_name(parts[0])
    if name is None:
        return None
    dropout = parts[1] if len(parts) > 1 and is_plain(parts[1], Dropout) else None
    after = 1 if dropout is None else 2
    p, training = (dropout.p, dropout.training) if isinstance(dropout, Dropout) else (0.0, False)
    linear = linear_parameters(parts[after]) if len(parts) > after else None
    keeps_less = dropout or name not in KEPT_ANYWAY or isinstance(parts[0], str)
    if linear is not None and keeps_less:
        return Match(after + 1, lambda x: F.activation_linear(x, *linear, name, p, training))
    if dropout and name == "relu":
        return Match(2, lambda x: F.relu_dropout(x, p, training))
    return None


def _norm(parts: Sequence[Part]) -> Match | None:
    """[layer norm over the last axis, linear], [RMS norm over the last axis, linear]."""
    if len(parts) < 2 or not is_plain(parts[0], LayerNorm, RMSNorm):
        return None
    norm, linear = parts[0], linear_parameters(parts[1])
    if linear is None:
        return None
    if isinstance(norm, LayerNorm) and len(norm.normalized_shape) == 1:
        return Match(2, lambda x: F.layer_norm_linear(x, norm.weight, norm.bias, *linear, norm.eps))
    if isinstance(norm, RMSNorm) and len(norm.normalized_shape) == 1:
        return Match(2, lambda x: F.rms_norm_linear(x, norm.weight, *linear, norm.eps))
    return None


def _batch_norm(parts: Sequence[Part]) -> Match | None:
    """[batch norm, activation, convolution]."""
    found = batch_norm_parts(parts[:3])
    return None if found is None else Match(3, lambda x: with_activation(*found, x)[0])


def batch_norm_parts(parts: Sequence[Part]) -> tuple[Any, Part, str, Any] | None:
    """Batch norm, activation, its name, and convolution, if these are the parts; else None."""
    if len(parts) != 3 or not is_plain(parts[0], *BATCH_NORMS) or not is_plain(parts[2], *CONVOLUTIONS):
        return None
    name = activation_name(parts[1])
    return None if name is None else (parts[0], parts[1], name, parts[2])


def with_activation(norm: Any, part: Part, name: str, conv: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """``conv(h)`` and h, where h is the activation of ``norm(x)``."""
    if fits_convolution(conv, x):
        return batch_norm_activation_conv(norm, name, conv, x)
    h = norm(x)
    h = _activate(h, name) if isinstance(part, str) else part(h)
    return conv(h), h


class FusedSequential(nn.Sequential):
    """A :class:`torch.nn.Sequential` whose neighbours run as one block if that keeps less for backward.

    The layers stay: paths, ``state_dict``, shared weights and hooks are those of the Sequential.  Four kinds
    of neighbours run as one: an activation (and dropout) with the linear layer after it, ReLU with dropout,
    a layer or RMS norm over the last axis with the linear layer after it, and a batch norm with the activation and
    the convolution after it.  All must be plain layers of :mod:`manualprop.nn`, without hooks.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _in_sequence(list(self), input)


class FusedResidual(Residual):
    """A :class:`manualprop.nn.Residual` whose neighbours run as one block, as in :class:`FusedSequential`."""

    def forward(self, input: Tensor) -> Tensor:
        output = _in_sequence(list(self), input)
        check_alike("Residual", input, output)
        return input + output


def _in_sequence(parts: Sequence[nn.Module], input: Tensor) -> Tensor:
    at = 0
    while at < len(parts):
        found = _match_at(parts, at)
        input = found.call(input) if found else parts[at](input)
        at += found.length if found else 1
    return input


def runs(sequential: nn.Sequential) -> list[tuple[str, ...]]:
    """The names of the layers that would run as one."""
    names, parts = list(sequential._modules), list(sequential)
    found, at = [], 0
    while at < len(parts):
        count = (_match_at(parts, at) or Match(1, parts[at])).length
        found += [tuple(names[at : at + count])] if count > 1 else []
        at += count
    return found


def _match_at(parts: Sequence[nn.Module], at: int) -> Match | None:
    """The match from ``at`` on.  An in-place activation has one only after a layer with parameters.

    There its input is new.  Elsewhere it may be the input of the container, and then it must be written to.
    """
    is_in_place = getattr(parts[at], "inplace", False)
    return match(parts[at:]) if not is_in_place or (at > 0 and parts[at - 1]._parameters) else None
