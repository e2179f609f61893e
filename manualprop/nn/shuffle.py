"""Changes of shape and pixel shuffles: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["Flatten", "PixelShuffle", "PixelUnshuffle", "Unflatten"]


class Flatten(nn.Flatten):
    """:class:`torch.nn.Flatten`: each element of y is one of x, so dx is g in the shape of x.

    Like torch's it returns a view, so there is nothing to compute in either direction.
    """


class Unflatten(nn.Unflatten):
    """:class:`torch.nn.Unflatten`: each element of y is one of x, so dx is g in the shape of x.

    Like torch's it returns a view, so there is nothing to compute in either direction.
    """


class PixelShuffle(nn.PixelShuffle):
    """:class:`torch.nn.PixelShuffle` by :class:`manualprop.functions.PixelShuffle`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """:class:`torch.nn.PixelUnshuffle` by :class:`manualprop.functions.PixelUnshuffle`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pixel_unshuffle(input, self.downscale_factor)
