"""Average pooling with the names, signatures and defaults of :mod:`torch.nn.functional`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import whole_number
from manualprop.functions.linear_map import mapped

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
]

Sizes = int | Sequence[int]
NUMBERS = {1: "one int", 2: "two ints", 3: "three ints"}


def avg_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Like :func:`torch.nn.functional.avg_pool1d`, by :class:`manualprop.functions.AvgPool`.

    Args:
        kernel_size: numbers of a window along each axis.
        stride: distance of the windows; None: ``kernel_size``.
        padding: zeros added at both ends of each axis, at most half of ``kernel_size``.
        ceil_mode: whether the last window may reach beyond the padded input.
        count_include_pad: whether the divisor counts the padding.

    Shape:
        ``input`` (N, C, L) or (C, L) -> the same, with fewer elements along the last axis
    """
    return _average("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.avg_pool2d`, by :class:`manualprop.functions.AvgPool`.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad: as in :func:`avg_pool1d`.
        divisor_override: what the sum of a window is divided by; None: the numbers of the window.

    Shape:
        ``input`` (N, C, H, W) or (C, H, W) -> the same, with fewer elements along the last two axes
    """
    return _average(
        "avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def avg_pool3d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.avg_pool3d`; :func:`avg_pool2d` with three spatial axes.

    Shape:
        ``input`` (N, C, D, H, W) or (C, D, H, W) -> the same, with fewer elements along the last three axes
    """
    return _average(
        "avg_pool3d", 3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def adaptive_avg_pool1d(input: Tensor, output_size: Sizes) -> Tensor:
    """Like :func:`torch.nn.functional.adaptive_avg_pool1d`, by :class:`manualprop.functions.AdaptiveAvgPool`.

    Args:
        output_size: number of windows along each axis.

    Shape:
        ``input`` (N, C, L) or (C, L) -> (N, C, ``output_size``) or (C, ``output_size``)
    """
    size = repeated_size("adaptive_avg_pool1d", "output_size", output_size, 1)
    return mapped(rules.AdaptiveAvgPool, input, size)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Like :func:`torch.nn.functional.adaptive_avg_pool2d`, by :class:`manualprop.functions.AdaptiveAvgPool`.

    Shape:
        ``input`` (N, C, H, W) or (C, H, W) -> the same, with ``output_size`` for the last two axes, where
        None keeps the input's
    """
    return _adaptive("adaptive_avg_pool2d", 2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Like :func:`torch.nn.functional.adaptive_avg_pool3d`, by :class:`manualprop.functions.AdaptiveAvgPool`.

    Shape:
        ``input`` (N, C, D, H, W) or (C, D, H, W) -> the same, with ``output_size`` for the last three axes,
        where None keeps the input's
    """
    return _adaptive("adaptive_avg_pool3d", 3, input, output_size)


def _average(
    name: str,
    axes: int,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    kernel = repeated_size(name, "kernel_size", kernel_size, axes)
    is_given = stride is not None and not (isinstance(stride, list | tuple) and len(stride) == 0)
    steps = repeated_size(name, "stride", stride, axes) if is_given else kernel
    zeros = repeated_size(name, "padding", padding, axes)
    return mapped(rules.AvgPool, input, kernel, steps, zeros, ceil_mode, count_include_pad, divisor_override)


def _adaptive(name: str, axes: int, input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    one = whole_number(output_size)
    if one == 1 and isinstance(input, Tensor) and input.dim() == axes:  # torch takes it without channels too
        return _adaptive(name, axes, input.unsqueeze(0), 1).squeeze(0)
    sizes = axes if one is not None else len(output_size) if isinstance(output_size, Sequence) else 0
    if isinstance(input, Tensor) and input.dim() <= sizes:
        kind = ValueError if one is None else RuntimeError
        raise kind(
            f"{name}: input must have more axes than output_size has numbers: Input dimension should be at least "
            f"{sizes + 1}. Got {list(input.shape)}."
        )
    size = repeated_size(name, "output_size", output_size, axes)
    if None in size:
        size = tuple(n if o is None else o for o, n in zip(size, input.shape[-axes:], strict=True))
    return mapped(rules.AdaptiveAvgPool, input, size)


def repeated_size(
    name: str, what: str, value: int | Sequence[int | None] | None, axes: int
) -> tuple[Any, ...]:
    """One size for each axis, from one size for all or a sequence of sizes."""
    if (one := whole_number(value)) is not None:
        return (one,) * axes
    is_optional = what == "output_size"
    if not isinstance(value, list | tuple) or not all(
        whole_number(n) is not None or (n is None and is_optional) for n in value
    ):
        raise TypeError(f"{name}: {what} must be {NUMBERS[axes]}. Got {value!r}.")
    if is_optional and len(value) != axes:
        raise RuntimeError(
            f"{name}: output_size must be {axes}: 'output_size' should contain {NUMBERS[axes]}. Got {value!r}."
        )
    if len(value) not in (1, axes):
        raise RuntimeError(
            f"{name}: {what} must either be a single int, or a tuple of {NUMBERS[axes]}. Got {value!r}."
        )
    return tuple(map(whole_number, value)) * (axes // len(value))
