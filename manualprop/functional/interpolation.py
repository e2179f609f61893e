"""Interpolation with the name, signature and defaults of :mod:`torch.nn.functional`."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_F

from manualprop import functions as rules
from manualprop.functions._execution._nearest import Kernel
from manualprop.functions.linear_map import mapped

__all__ = ["interpolate"]

# {mode: the number of axes it takes}
AXES: dict[str, tuple[int, ...]] = {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
    "lanczos": (2,),
}


def interpolate(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.interpolate`, by the rule of the mode.

    Args:
        mode: ``"nearest"`` or ``"nearest-exact"`` (:class:`manualprop.functions.NearestInterpolation`),
            ``"linear"``, ``"bilinear"`` or ``"trilinear"``
            (:class:`manualprop.functions.LinearInterpolation`), ``"bicubic"``
            (:class:`manualprop.functions.CubicInterpolation`) or ``"area"``
            (:class:`manualprop.functions.AdaptiveAvgPool`).
        antialias: average over the elements that one output element stands for
            (:class:`manualprop.functions.AntialiasedInterpolation`); only for ``"bilinear"``, ``"bicubic"``
            and ``"lanczos"``.

    Shape:
        ``input`` (N, C, ...) with one, two or three more axes -> the same with ``size`` for these axes
    """
    axes = input.dim() - 2
    if _is_misuse(axes, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias):
        return torch_F.interpolate(  # which raises
            input,
            size,
            scale_factor,
            mode,
            align_corners,
            recompute_scale_factor,
            antialias,
        )
    to, scales = _for_each_axis(size, axes), _for_each_axis(scale_factor, axes)
    if scales is not None and (recompute_scale_factor or mode == "area"):
        to = tuple(math.floor(n * scale) for n, scale in zip(input.shape[2:], scales, strict=True))
        scales = None
    if mode == "area":
        return mapped(rules.AdaptiveAvgPool, input, to)
    if mode in ("nearest", "nearest-exact"):
        return mapped(
            rules.NearestInterpolation, input, to, scales, mode == "nearest-exact", Kernel.of(input)
        )
    align = bool(align_corners)
    if antialias:
        return mapped(rules.AntialiasedInterpolation, input, to, scales, mode, align)
    rule = rules.CubicInterpolation if mode == "bicubic" else rules.LinearInterpolation
    return mapped(rule, input, to, scales, align)


def _is_misuse(
    axes: int,
    size: Any,
    scale_factor: Any,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
) -> bool:
    given = size if scale_factor is None else scale_factor
    return (
        axes not in AXES.get(mode, ())
        or (size is None) == (scale_factor is None)
        or (isinstance(given, list | tuple) and len(given) != axes)
        or (align_corners is not None and mode in ("nearest", "nearest-exact", "area"))
        or bool(recompute_scale_factor and size is not None)
        or (antialias and mode not in ("bilinear", "bicubic", "lanczos"))
        or (mode == "lanczos" and (bool(align_corners) or not antialias))
    )


def _for_each_axis(value: Any, axes: int) -> tuple[Any, ...] | None:
    if value is None:
        return None
    return tuple(value) if isinstance(value, list | tuple) else (value,) * axes
