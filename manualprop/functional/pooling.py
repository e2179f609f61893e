"""Pools that are not linear, with the names, signatures and defaults of :mod:`torch.nn.functional`.

Shape legend
    ``input`` (N, C, X) or (C, X) with one, two or three spatial axes X; the output has the axes O in their place.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import check_tensor, refuse_complex
from manualprop.functions._rule import Rule
from manualprop.functions.pooling import of_each_axis

Sizes = int | Sequence[int]
Pooled = Tensor | tuple[Tensor, Tensor]

__all__ = [
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
]


def max_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """Like :func:`torch.nn.functional.max_pool1d`, by :class:`manualprop.functions.MaxPool`.

    Args:
        kernel_size: numbers of a window along each axis.
        stride: distance of the windows; None: ``kernel_size``.
        padding: -inf added at both ends of each axis, at most half of ``kernel_size``.
        dilation: distance of the numbers of a window.
        ceil_mode: whether the last window may reach beyond the padded input.
        return_indices: whether to return the places of the maxima too, counted along the flattened spatial axes.
    """
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _largest(rules.MaxPool, input, 1, *options, return_indices=return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """Like :func:`torch.nn.functional.max_pool2d`; :func:`max_pool1d` with two spatial axes."""
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _largest(rules.MaxPool, input, 2, *options, return_indices=return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """Like :func:`torch.nn.functional.max_pool3d`; :func:`max_pool1d` with three spatial axes."""
    options = kernel_size, stride, padding, dilation, ceil_mode
    return _largest(rules.MaxPool, input, 3, *options, return_indices=return_indices)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Pooled:
    """Like :func:`torch.nn.functional.adaptive_max_pool1d`, by :class:`manualprop.functions.AdaptiveMaxPool`.

    Args:
        output_size: number of windows along each axis.
        return_indices: whether to return the places of the maxima too, counted along the flattened spatial axes.
    """
    return _largest(rules.AdaptiveMaxPool, input, 1, output_size, return_indices=return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Pooled:
    """Like :func:`torch.nn.functional.adaptive_max_pool2d`, by :class:`manualprop.functions.AdaptiveMaxPool`.

    Args:
        output_size: number of windows along each axis; None: as many as the input has numbers.
        return_indices: whether to return the places of the maxima too, counted along the flattened spatial axes.
    """
    return _largest(rules.AdaptiveMaxPool, input, 2, output_size, return_indices=return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Pooled:
    """Like :func:`torch.nn.functional.adaptive_max_pool3d`; :func:`adaptive_max_pool2d` with three spatial axes."""
    return _largest(rules.AdaptiveMaxPool, input, 3, output_size, return_indices=return_indices)


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    output_size: Sizes | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Pooled:
    """Like :func:`torch.nn.functional.fractional_max_pool2d`, by :class:`manualprop.functions.FractionalMaxPool`.

    Args:
        kernel_size: numbers of a window along each axis.
        output_size: number of windows along each axis.
        output_ratio: instead, a fraction of the input's size, in (0, 1).
        return_indices: whether to return the places of the maxima too, counted along the flattened spatial axes.
        _random_samples: the random numbers (N, C, 2) in [0, 1); None: they are drawn as in torch.

    Raises:
        ValueError: without a size and a ratio.
    """
    size = _fractional_size("fractional_max_pool2d", input, 2, output_size, output_ratio)
    drawn = _drawn(input, 2) if _random_samples is None else _random_samples
    return _largest(
        rules.FractionalMaxPool, input, 2, kernel_size, size, drawn, return_indices=return_indices
    )


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    output_size: Sizes | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Pooled:
    """Like :func:`torch.nn.functional.fractional_max_pool3d`; :func:`fractional_max_pool2d` with three spatial axes."""
    size = _fractional_size("fractional_max_pool3d", input, 3, output_size, output_ratio)
    drawn = _drawn(input, 3) if _random_samples is None else _random_samples
    return _largest(
        rules.FractionalMaxPool, input, 3, kernel_size, size, drawn, return_indices=return_indices
    )


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.max_unpool1d`, by :class:`manualprop.functions.MaxUnpool`.

    Args:
        indices: the places of ``input``, as ``max_pool1d(..., return_indices=True)`` returns them.
        kernel_size: of the pool that is undone, and so ``stride`` and ``padding``.
        output_size: sizes of the spatial axes, where several are possible.
    """
    return _unpooled(input, indices, 1, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.max_unpool2d`; :func:`max_unpool1d` with two spatial axes."""
    return _unpooled(input, indices, 2, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.max_unpool3d`; :func:`max_unpool1d` with three spatial axes."""
    return _unpooled(input, indices, 3, kernel_size, stride, padding, output_size)


def lp_pool1d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.lp_pool1d`, by :class:`manualprop.functions.LPPool`.

    Args:
        norm_type: the p of the norm, not 0; may be infinite.
        kernel_size: numbers of a window along each axis.
        stride: distance of the windows; None: ``kernel_size``.
        ceil_mode: whether the last window may reach beyond the input.
    """
    return _norm_of_windows(input, norm_type, 1, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.lp_pool2d`; :func:`lp_pool1d` with two spatial axes."""
    return _norm_of_windows(input, norm_type, 2, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor,
    norm_type: int | float,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.lp_pool3d`; :func:`lp_pool1d` with three spatial axes."""
    return _norm_of_windows(input, norm_type, 3, kernel_size, stride, ceil_mode)


def _largest(rule: type[Rule], input: Tensor, axes: int, *options: Any, return_indices: bool) -> Pooled:
    check_tensor(f"{rule.__name__}{axes}d", input)
    y, i, _ = rule.apply(input, axes, *options)
    return (y, i) if return_indices else y


def _fractional_size(name: str, input: Tensor, axes: int, size: Any, ratio: Any) -> Any:
    if size is None and ratio is None:
        raise ValueError(f"{name} requires specifying either an output_size or an output_ratio")
    if size is not None:
        return size
    ratios = (ratio,) * axes if isinstance(ratio, int | float) else tuple(ratio)
    if len(ratios) != axes:
        raise ValueError(f"{name} requires output_ratio to either be a single Int or tuple of Ints.")
    return [int(n * r) for n, r in zip(input.shape[-axes:], ratios, strict=True)]


def _drawn(input: Tensor, axes: int) -> Tensor:
    """The random numbers, by the call that torch makes."""
    batch = 1 if input.dim() == axes + 1 else input.size(0)
    return torch.rand(batch, input.size(-axes - 1), axes, dtype=input.dtype, device=input.device)


def _unpooled(
    input: Tensor, indices: Tensor, axes: int, kernel_size: Any, stride: Any, padding: Any, size: Any
) -> Tensor:
    if kernel_size is None or padding is None:
        raise TypeError(
            f"max_unpool{axes}d: kernel_size and padding must be numbers. Got {kernel_size} and {padding}."
        )
    kernel, pad = of_each_axis(kernel_size, axes), of_each_axis(padding, axes)
    step = kernel if stride is None else of_each_axis(stride, axes)
    size = _unpool_size(input, kernel, step, pad, size)
    x: Tensor = rules.MaxUnpool.apply(input, indices, axes, kernel, step, pad, size)
    return x


def _unpool_size(input: Tensor, kernel: Any, step: Any, pad: Any, size: Any) -> tuple[int, ...]:
    """The sizes of the spatial axes, with torch's errors; torch's own function has checks that the compiler cannot trace."""
    axes = len(kernel)
    usual = [(input.shape[d - axes] - 1) * step[d] + kernel[d] - 2 * pad[d] for d in range(axes)]
    given = usual if size is None else size[2:] if len(size) == axes + 2 else size
    if len(given) != axes:
        raise ValueError(
            f"output_size should be a sequence containing {axes} or {axes + 2} elements, but it has a length of "
            f"'{len(given)}'"
        )
    for d, n in enumerate(given):
        least, most = usual[d] - step[d], usual[d] + step[d]
        if size is not None and not least < n < most:
            raise ValueError(f'invalid output_size "{given}" (dim {d} must be between {least} and {most})')
        if n < 0:
            raise ValueError(
                "max_unpooling: output_size must contain non-negative spatial dimensions, but got "
                f"output_size[{d}]={n}"
            )
    return tuple(given)


def _norm_of_windows(
    input: Tensor, p: int | float, axes: int, kernel_size: Any, stride: Any, ceil_mode: bool
) -> Tensor:
    y: Tensor
    if abs(p) != math.inf:  # not math.isinf, which the compiler cannot trace for a p that varies
        y = rules.LPPool.apply(input, p, axes, kernel_size, stride, ceil_mode)
        return y
    refuse_complex(f"lp_pool{axes}d", input)
    size: Tensor = rules.Abs.apply(input)
    y, *_ = rules.MaxPool.apply(size if p > 0 else -size, axes, kernel_size, stride, 0, 1, ceil_mode)
    return y if p > 0 else -y
