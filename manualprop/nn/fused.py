"""Blocks of layers as one module: the exact composition of their parts, with fewer bytes kept for backward.

If a part of a block was replaced (for example by an adapter), is parametrized, or has a hook, the block runs
its parts one after the other, and so calls the new part.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from manualprop import functional as F
from manualprop.functional.fused import _activate, _batch_norm_activation_conv, _check_names
from manualprop.nn import convolution, linear, norm
from manualprop.nn._heard import is_heard
from manualprop.nn.norm import _statistics

__all__ = [
    "MLP",
    "ActivationLinear",
    "BatchNormActivationConv1d",
    "BatchNormActivationConv2d",
    "BatchNormActivationConv3d",
    "GatedMLP",
    "LayerNormLinear",
    "LinearActivation",
    "PackedReLU",
    "RMSNormLinear",
    "ReLUDropout",
]

BATCH_NORMS = tuple(getattr(norm, f"BatchNorm{axes}d") for axes in (1, 2, 3))
CONVOLUTIONS = tuple(getattr(convolution, f"Conv{axes}d") for axes in (1, 2, 3))
PLAIN = {
    *(nn.Linear, linear.Linear, nn.LayerNorm, norm.LayerNorm, nn.RMSNorm, norm.RMSNorm),
    *(kind for ours in (*BATCH_NORMS, *CONVOLUTIONS) for kind in (ours, getattr(nn, ours.__name__))),
}


def nobody_listens(*parts: nn.Module) -> bool:
    """Whether each part is a plain layer of torch or ours, so that its parameters say all that it does."""
    return all(type(part) in PLAIN and not is_heard(part) for part in parts)


class LinearActivation(nn.Linear):
    """A linear layer and its activation, by :func:`manualprop.functional.linear_activation`.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`; ``state_dict`` is the same.
        activation: a name such as ``"gelu"``: see :mod:`manualprop.functional.fused`.
        keep: ``"pre-activation"`` (for ReLU, its square and Tanh the output), or ``"input"``: the product is
            then computed again.

    Shape:
        (..., in_features) -> (..., out_features)

    Raises:
        ValueError: for an unknown ``activation`` or ``keep``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "gelu",
        keep: str = "pre-activation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names("LinearActivation", activation, keep)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.keep = activation, keep

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_activation(input, self.weight, self.bias, self.activation, self.keep)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, keep={self.keep!r}"


class ActivationLinear(nn.Linear):
    """An activation, dropout, and the linear layer after it, by :func:`manualprop.functional.activation_linear`.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`; ``state_dict`` is the same.
        activation: a name such as ``"gelu"``: see :mod:`manualprop.functional.fused`.
        dropout: probability that an activation is dropped in training, in [0, 1].

    Shape:
        (..., in_features) -> (..., out_features)

    Raises:
        ValueError: for an unknown ``activation``, or a ``dropout`` out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "gelu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names("ActivationLinear", activation)
        _check_dropout("ActivationLinear", dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation, self.dropout = activation, dropout

    def forward(self, input: Tensor) -> Tensor:
        return F.activation_linear(
            input, self.weight, self.bias, self.activation, self.dropout, self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}, dropout={self.dropout}"


class MLP(nn.Module):
    """Linear, activation, dropout, linear, by :func:`manualprop.functional.mlp`.

    The layers are ``linear1`` and ``linear2``, as in :class:`torch.nn.TransformerEncoderLayer`.  You may
    assign an existing layer to either; its parameters are then shared.

    Args:
        in_features, hidden_features, out_features: the number of features at input, hidden layer and output.
        activation: a name such as ``"gelu"``: see :mod:`manualprop.functional.fused`.
        dropout: probability that a hidden activation is dropped in training, in [0, 1].
        bias: whether the layers have biases.
        keep: ``"pre-activation"``, or ``"input"``, which computes the hidden layer again in backward.
        device, dtype: as :class:`torch.nn.Linear`.

    Shape:
        (..., in_features) -> (..., out_features)

    Raises:
        ValueError: for an unknown ``activation`` or ``keep``, or a ``dropout`` out of its range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        keep: str = "pre-activation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names("MLP", activation, keep)
        _check_dropout("MLP", dropout)
        super().__init__()
        self.activation, self.dropout, self.keep = activation, dropout, keep
        self.linear1: nn.Linear = linear.Linear(in_features, hidden_features, bias, device, dtype)
        self.linear2: nn.Linear = linear.Linear(hidden_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.linear1, self.linear2
        if nobody_listens(first, second):
            return F.mlp(
                input,
                first.weight,
                first.bias,
                second.weight,
                second.bias,
                self.activation,
                self.dropout,
                self.training,
                self.keep,
            )
        hidden = _activate(first(input), self.activation)
        output: Tensor = second(F.dropout(hidden, self.dropout, self.training))
        return output

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, keep={self.keep!r}"


class GatedMLP(nn.Module):
    """``down_proj(f(gate_proj(x)) * up_proj(x))``, by :func:`manualprop.functional.gated_mlp`.

    SwiGLU is ``activation="silu"``, GEGLU ``"gelu"``, ReGLU ``"relu"``.  The layers are named as in Llama.
    You may assign an existing layer to each; its parameters are then shared.

    Args:
        in_features, hidden_features, out_features: the number of features at input, hidden layer and output.
        activation: a name such as ``"silu"``: see :mod:`manualprop.functional.fused`.
        bias: whether the layers have biases.
        keep: ``"pre-activation"`` for the two branches, or ``"input"``, which computes them again in backward.
        device, dtype: as :class:`torch.nn.Linear`.

    Shape:
        (..., in_features) -> (..., out_features)

    Raises:
        ValueError: for an unknown ``activation`` or ``keep``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: str = "silu",
        bias: bool = False,
        keep: str = "pre-activation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names("GatedMLP", activation, keep)
        super().__init__()
        self.activation, self.keep = activation, keep
        self.gate_proj: nn.Linear = linear.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj: nn.Linear = linear.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj: nn.Linear = linear.Linear(hidden_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if nobody_listens(gate, up, down):
            weights, biases = (gate.weight, up.weight, down.weight), (gate.bias, up.bias, down.bias)
            return F.gated_mlp(input, *weights, *biases, self.activation, self.keep)
        output: Tensor = down(_activate(gate(input), self.activation) * up(input))
        return output

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, keep={self.keep!r}"


class ReLUDropout(nn.Module):
    """ReLU, then dropout, by :func:`manualprop.functional.relu_dropout`.

    Args:
        p: probability that an element is dropped in training, in [0, 1].

    Raises:
        ValueError: for a ``p`` out of its range.
    """

    def __init__(self, p: float = 0.5) -> None:
        _check_dropout("ReLUDropout", p)
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class PackedReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` by :func:`manualprop.functional.packed_relu`: one bit kept per element.

    Use it if the next layer does not keep its input: before a sum, an average pooling, a frozen layer.  A
    layer cannot know what comes next, so you choose.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.packed_relu(input, self.inplace)


class LayerNormLinear(nn.Module):
    """A layer norm over the last axis and a linear layer, by :func:`manualprop.functional.layer_norm_linear`.

    The layers are ``norm`` and ``linear``; you may assign an existing layer to either.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        eps: added to the variance.

    Shape:
        (..., in_features) -> (..., out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm: nn.LayerNorm = norm.LayerNorm(in_features, eps, device=device, dtype=dtype)
        self.linear: nn.Linear = linear.Linear(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.norm, self.linear
        if nobody_listens(first, second) and len(first.normalized_shape) == 1:
            return F.layer_norm_linear(input, first.weight, first.bias, second.weight, second.bias, first.eps)
        output: Tensor = second(first(input))
        return output


class RMSNormLinear(nn.Module):
    """An RMS norm over the last axis and a linear layer, by :func:`manualprop.functional.rms_norm_linear`.

    The layers are ``norm`` and ``linear``; you may assign an existing layer to either.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`.
        eps: added under the root; None for the machine epsilon of the precision of the computation.

    Shape:
        (..., in_features) -> (..., out_features)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm: nn.RMSNorm = norm.RMSNorm(in_features, eps, device=device, dtype=dtype)
        self.linear: nn.Linear = linear.Linear(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.norm, self.linear
        if nobody_listens(first, second) and len(first.normalized_shape) == 1:
            return F.rms_norm_linear(input, first.weight, second.weight, second.bias, first.eps)
        output: Tensor = second(first(input))
        return output


def fits_convolution(conv: nn.Module, input: Tensor) -> bool:
    """Whether one block can do what ``conv`` does with a normalised ``input``: in batches, padded by zeros."""
    weight, mode = conv.weight, conv.padding_mode
    return mode == "zeros" and isinstance(weight, Tensor) and input.dim() == weight.dim()


def batch_norm_activation_conv(
    first: _BatchNorm, activation: str, second: Any, input: Tensor
) -> tuple[Tensor, Tensor]:
    """``second(f(first(input)))`` and ``f(first(input))``, as one block."""
    statistics, parameters = _statistics(first, input), (first.weight, first.bias, second.weight, second.bias)
    mean, var, by_batch, momentum = statistics
    numbers = (activation, by_batch, momentum, first.eps)
    options = (second.stride, second.padding, second.dilation, second.groups)
    return _batch_norm_activation_conv(input, mean, var, *parameters, *numbers, *options)


class _BatchNormActivationConv(nn.Module):
    """A batch norm, an activation and a convolution, by :func:`manualprop.functional.batch_norm_activation_conv`.

    The layers are ``norm`` and ``conv``; you may assign an existing layer to either.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as :class:`torch.nn.Conv2d`.
        activation: a name such as ``"relu"``: see :mod:`manualprop.functional.fused`.
        eps, momentum, affine, track_running_stats: as :class:`torch.nn.BatchNorm2d`.
        device, dtype: as :class:`torch.nn.Conv2d`.

    Shape:
        (N, in_channels, X) -> (N, out_channels, Q), with one, two or three axes of positions in X and Q

    Raises:
        ValueError: for an unknown ``activation``.
    """

    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names(type(self).__name__, activation)
        super().__init__()
        self.activation = activation
        numbers, place = (stride, padding, dilation, groups, bias), {"device": device, "dtype": dtype}
        batch_norm, conv = BATCH_NORMS[self.axes - 1], CONVOLUTIONS[self.axes - 1]
        self.norm: _BatchNorm = batch_norm(in_channels, eps, momentum, affine, track_running_stats, **place)
        self.conv: Any = conv(in_channels, out_channels, kernel_size, *numbers, **place)

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.norm, self.conv
        if nobody_listens(first, second) and fits_convolution(second, input):
            return batch_norm_activation_conv(first, self.activation, second, input)[0]
        output: Tensor = second(_activate(first(input), self.activation))
        return output

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class BatchNormActivationConv1d(_BatchNormActivationConv):
    __doc__ = _BatchNormActivationConv.__doc__
    axes = 1


class BatchNormActivationConv2d(_BatchNormActivationConv):
    __doc__ = _BatchNormActivationConv.__doc__
    axes = 2


class BatchNormActivationConv3d(_BatchNormActivationConv):
    __doc__ = _BatchNormActivationConv.__doc__
    axes = 3


def _check_dropout(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: dropout must be a probability, in [0, 1]. Got {p}.")
