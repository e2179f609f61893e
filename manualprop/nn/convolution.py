"""Convolutions: each subclasses its torch twin and replaces only ``_conv_forward`` or ``forward``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from manualprop import functional as F

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]


def _padded(
    self: Any, convolution: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The convolution of a layer; paddings other than zeros are a step before it."""
    padding = self.padding
    if self.padding_mode != "zeros":
        input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = 0
    return convolution(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _transposed(
    self: Any, convolution: Callable[..., Tensor], input: Tensor, output_size: list[int] | None
) -> Tensor:
    """The transposed convolution of a layer; ``output_size`` decides its output_padding."""
    name, axes = type(self).__name__, len(self.kernel_size)
    if self.padding_mode != "zeros":
        raise ValueError(f"{name}: padding_mode must be 'zeros'. Got {self.padding_mode!r}.")
    output_padding = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
    )
    return convolution(
        input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
    )


class Conv1d(nn.Conv1d):
    """:class:`torch.nn.Conv1d` by :class:`manualprop.functions.Convolution`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv1d, input, weight, bias)


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` by :class:`manualprop.functions.Convolution`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv2d, input, weight, bias)


class Conv3d(nn.Conv3d):
    """:class:`torch.nn.Conv3d` by :class:`manualprop.functions.Convolution`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv3d, input, weight, bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` by :class:`manualprop.functions.TransposedConvolution`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose1d, input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` by :class:`manualprop.functions.TransposedConvolution`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose2d, input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` by :class:`manualprop.functions.TransposedConvolution`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose3d, input, output_size)


class LazyConv1d(nn.LazyConv1d):
    """:class:`torch.nn.LazyConv1d`; it becomes :class:`Conv1d` at its first input."""

    cls_to_become = Conv1d

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv1d, input, weight, bias)


class LazyConv2d(nn.LazyConv2d):
    """:class:`torch.nn.LazyConv2d`; it becomes :class:`Conv2d` at its first input."""

    cls_to_become = Conv2d

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv2d, input, weight, bias)


class LazyConv3d(nn.LazyConv3d):
    """:class:`torch.nn.LazyConv3d`; it becomes :class:`Conv3d` at its first input."""

    cls_to_become = Conv3d

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _padded(self, F.conv3d, input, weight, bias)


class LazyConvTranspose1d(nn.LazyConvTranspose1d):
    """:class:`torch.nn.LazyConvTranspose1d`; it becomes :class:`ConvTranspose1d` at its first input."""

    cls_to_become = ConvTranspose1d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose1d, input, output_size)


class LazyConvTranspose2d(nn.LazyConvTranspose2d):
    """:class:`torch.nn.LazyConvTranspose2d`; it becomes :class:`ConvTranspose2d` at its first input."""

    cls_to_become = ConvTranspose2d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose2d, input, output_size)


class LazyConvTranspose3d(nn.LazyConvTranspose3d):
    """:class:`torch.nn.LazyConvTranspose3d`; it becomes :class:`ConvTranspose3d` at its first input."""

    cls_to_become = ConvTranspose3d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _transposed(self, F.conv_transpose3d, input, output_size)
