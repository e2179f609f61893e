"""Pixel shuffles with the names and signatures of :mod:`torch.nn.functional`."""

from torch import Tensor

from manualprop import functions as rules
from manualprop.functions.linear_map import mapped

__all__ = ["pixel_shuffle", "pixel_unshuffle"]


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """Like :func:`torch.nn.functional.pixel_shuffle`, by :class:`manualprop.functions.PixelShuffle`.

    Shape:
        ``input`` (..., C r^2, H, W) -> (..., C, H r, W r), with r the ``upscale_factor``
    """
    return mapped(rules.PixelShuffle, input, upscale_factor)


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """Like :func:`torch.nn.functional.pixel_unshuffle`, by :class:`manualprop.functions.PixelUnshuffle`.

    Shape:
        ``input`` (..., C, H r, W r) -> (..., C r^2, H, W), with r the ``downscale_factor``
    """
    return mapped(rules.PixelUnshuffle, input, downscale_factor)
