"""Pools that are not linear: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F
from manualprop.functional.pooling import Pooled

__all__ = [
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
]


class MaxPool1d(nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` by :class:`manualprop.functions.MaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        options = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool1d(input, *options, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` by :class:`manualprop.functions.MaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        options = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool2d(input, *options, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class MaxPool3d(nn.MaxPool3d):
    """:class:`torch.nn.MaxPool3d` by :class:`manualprop.functions.MaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        options = self.kernel_size, self.stride, self.padding, self.dilation
        return F.max_pool3d(input, *options, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """:class:`torch.nn.AdaptiveMaxPool1d` by :class:`manualprop.functions.AdaptiveMaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` by :class:`manualprop.functions.AdaptiveMaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """:class:`torch.nn.AdaptiveMaxPool3d` by :class:`manualprop.functions.AdaptiveMaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class FractionalMaxPool2d(nn.FractionalMaxPool2d):
    """:class:`torch.nn.FractionalMaxPool2d` by :class:`manualprop.functions.FractionalMaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        return F.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,  # type: ignore[arg-type]
        )


class FractionalMaxPool3d(nn.FractionalMaxPool3d):
    """:class:`torch.nn.FractionalMaxPool3d` by :class:`manualprop.functions.FractionalMaxPool`."""

    def forward(self, input: Tensor) -> Pooled:
        return F.fractional_max_pool3d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            _random_samples=self._random_samples,  # type: ignore[arg-type]
        )


class MaxUnpool1d(nn.MaxUnpool1d):
    """:class:`torch.nn.MaxUnpool1d` by :class:`manualprop.functions.MaxUnpool`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.max_unpool1d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool2d(nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` by :class:`manualprop.functions.MaxUnpool`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool3d(nn.MaxUnpool3d):
    """:class:`torch.nn.MaxUnpool3d` by :class:`manualprop.functions.MaxUnpool`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return F.max_unpool3d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class LPPool1d(nn.LPPool1d):
    """:class:`torch.nn.LPPool1d` by :class:`manualprop.functions.LPPool`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.lp_pool1d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool2d(nn.LPPool2d):
    """:class:`torch.nn.LPPool2d` by :class:`manualprop.functions.LPPool`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool3d(nn.LPPool3d):
    """:class:`torch.nn.LPPool3d` by :class:`manualprop.functions.LPPool`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.lp_pool3d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)
