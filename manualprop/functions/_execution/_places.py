"""Numbers at places: the sums and the choices of pooling.

``places`` (..., o) are numbers of places along the last axes of another tensor, flattened, as torch's pooling returns
them.  Each function is plain mathematics where something traces it, and has a faster form for eager mode.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution._formula import HALF, full, watched

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
MANY_CHANNELS, MANY_NUMBERS = 8, 2**15  # from here on a copy to channels-last pays


def largest_of_windows(
    kernel: Callable[..., Any], x: Tensor, axes: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """The largest numbers and their places, by one of ATen's max pools: ``kernel(x, *options)``.

    In channels-last ATen's kernel compares a vector of channels at a time, otherwise one number at a time.  A copy
    there and back gives the same numbers and places in 0.1 to 0.6 of the time.  Not for three axes: there the two
    kernels name different places in a window of -inf alone.
    """
    if axes != 2 or not _pays_in_channels_last(x):
        y, places = kernel(x, *options)
        return y, places
    y, places = kernel(x.contiguous(memory_format=torch.channels_last), *options)
    return y.contiguous(), places.contiguous()


def _pays_in_channels_last(x: Tensor) -> bool:
    if x.dim() != 4 or x.shape[1] < MANY_CHANNELS or x.numel() < MANY_NUMBERS or watched((x,)):
        return False
    return x.is_cpu and x.is_floating_point() and x.is_contiguous()


def numbers_at(x: Tensor, places: Tensor, axes: int) -> Tensor:
    """The numbers of ``x`` at ``places``, which count along the last ``axes`` axes of ``x``."""
    return in_line(x, axes).gather(-1, in_line(places, axes)).reshape(places.shape)


def summed_at(g: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """For each place of the last axes, of the given ``size``, the sum of the ``g`` that belong there."""
    axes = len(size)
    if not watched((g, places)):
        return _summed_in_place(g, places, size)
    flat, lead = in_line(full(g), axes), places.shape[:-axes]
    sums = flat.new_zeros(*lead, _count(size)).scatter_add(-1, in_line(places, axes), flat)
    return sums.reshape(*lead, *size).to(g.dtype)


def in_line(x: Tensor, axes: int) -> Tensor:
    """The last ``axes`` axes as one; by ``reshape``, for which the older vmap has a rule."""
    lead = x.shape[: x.dim() - axes]
    return x.reshape(*lead, _count(x.shape[x.dim() - axes :]))


def _summed_in_place(g: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """The same in the memory format of ``places``.

    ATen adds along an axis that is not the last one with long strides: channels-last numbers are
    added by their places in the memory of an example.
    """
    axes, count = len(size), _count(size)
    if places.is_contiguous() or not _is_channels_last(places):
        sums = _zeros(g, (*places.shape[:-axes], count))
        sums.scatter_add_(-1, in_line(places, axes), _in_precision_of(sums, in_line(g, axes)))
        return sums.view(*places.shape[:-axes], *size).to(g.dtype)
    N, C = places.shape[:2]
    channel = torch.arange(C, device=places.device)
    in_memory = torch.add(channel, places.movedim(1, -1), alpha=C).view(N, -1)
    sums = _zeros(g, (N, count * C))
    sums.scatter_add_(1, in_memory, _in_precision_of(sums, g.movedim(1, -1).reshape(N, -1)))
    return sums.view(N, *size, C).to(g.dtype).movedim(-1, 1)


def _zeros(g: Tensor, shape: Sequence[int]) -> Tensor:
    return g.new_zeros(shape, dtype=torch.float32 if g.dtype in HALF else g.dtype)


def _in_precision_of(sums: Tensor, g: Tensor) -> Tensor:
    return g if g.dtype == sums.dtype else g.to(sums.dtype)


def _is_channels_last(t: Tensor) -> bool:
    axes = t.dim() - 2
    return axes in FORMATS and t.is_contiguous(memory_format=FORMATS[axes])


def _count(size: Sequence[int]) -> int:
    return math.prod(size)
