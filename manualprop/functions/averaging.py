r"""Hand-derived rules of average pooling: each output is the mean of a window.

Symbols
    x   input, n long along an axis     k, s, p   kernel size, stride and padding of that axis
    y   output, o long                  g         dL/dy, the gradient that arrives
Written for one axis: a mean over a box is the mean along each axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manualprop.functions.linear_map import Separable

__all__ = ["AdaptiveAvgPool", "AvgPool"]

Sizes = tuple[int, ...]  # one for each pooled axis


class AvgPool(Separable):
    r"""$y_i = \frac1d \sum_{j=is-p}^{is-p+k-1} x_j$, where $x_j = 0$ outside; $d = k$ unless an option says otherwise

    Derivation
        M_ij = 1/d 1[is - p <= j < is - p + k]
        dL/dx_j = sum_i M_ij g_i                                   each output is spread evenly over its window
    Options
        count_include_pad     whether d counts the padding: d = k, less what a last window of ceil_mode has
                              beyond the padding.  If not, d is the number of elements of x in the window.
        divisor_override      the product of d over all axes, by definition.
    Second order
        dx is linear in g; its adjoint is this average.
    Shape
        x (..., n), one, two or three pooled axes -> y (..., o)
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of ceil(k / s) terms along an axis.
    """

    @staticmethod
    def f(
        x: Tensor,
        kernel: Sizes,
        stride: Sizes,
        padding: Sizes,
        ceil: bool,
        include: bool,
        divisor: int | None,
    ) -> Tensor:
        if len(kernel) == 1:
            return F.avg_pool1d(x, kernel, stride, padding, ceil, include)
        pool = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
        return pool(x, kernel, stride, padding, ceil, include, divisor)

    @staticmethod
    def row(
        i: int, n: int, o: int, k: int, s: int, p: int, include: bool, weight: float | None
    ) -> dict[int, float]:
        first, last = i * s - p, min(i * s - p + k, n + p)
        inside = range(max(first, 0), min(last, n))
        d = last - first if include else len(inside)
        return dict.fromkeys(inside, 1 / d if weight is None else weight)

    @staticmethod
    def along(
        kernel: Sizes, stride: Sizes, padding: Sizes, ceil: bool, include: bool, divisor: int | None
    ) -> Sequence[tuple[Any, ...]]:
        weights = [None if divisor is None else 1.0] * len(kernel)
        weights[-1] = None if divisor is None else 1 / divisor  # the whole divisor along the last axis
        axes = zip(kernel, stride, padding, weights, strict=True)
        return [(k, s, p, include, weight) for k, s, p, weight in axes]


class AdaptiveAvgPool(Separable):
    r"""$y_i$ is the mean of $x_j$ for $\lfloor i n / o \rfloor \le j < \lceil (i+1) n / o \rceil$

    Derivation, with l_i the number of elements of window i
        M_ij = 1/l_i 1[j in window i]
        dL/dx_j = sum_i M_ij g_i                                   each output is spread evenly over its window
        For o = 1 this is dx_j = g_0 / n: one number, repeated.
    Second order
        dx is linear in g; its adjoint is this average.
    Shape
        x (..., n), one, two or three pooled axes -> y (..., o)
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of at most ceil(o / n) + 1 terms along an axis.
    """

    @staticmethod
    def f(x: Tensor, size: Any) -> Tensor:
        if len(size) == 1:
            return torch.adaptive_avg_pool1d(x, size)
        return F.adaptive_avg_pool2d(x, size) if len(size) == 2 else F.adaptive_avg_pool3d(x, size)

    @staticmethod
    def row(i: int, n: int, o: int) -> dict[int, float]:
        window = range(i * n // o, -(-(i + 1) * n // o))
        return dict.fromkeys(window, 1 / len(window))

    @staticmethod
    def along(size: Sizes) -> Sequence[tuple[Any, ...]]:
        return [()] * len(size)
