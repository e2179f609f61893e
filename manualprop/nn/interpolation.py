"""Interpolation: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


class Upsample(nn.Upsample):
    """:class:`torch.nn.Upsample` by :func:`manualprop.functional.interpolate`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            recompute_scale_factor=self.recompute_scale_factor,
        )


class UpsamplingNearest2d(nn.UpsamplingNearest2d):
    """:class:`torch.nn.UpsamplingNearest2d` by :class:`manualprop.functions.NearestInterpolation`."""

    forward = Upsample.forward


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """:class:`torch.nn.UpsamplingBilinear2d` by :class:`manualprop.functions.LinearInterpolation`."""

    forward = Upsample.forward
