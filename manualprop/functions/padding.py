r"""Hand-derived rules of padding: elements are added around the last axes, or cut off where a width is negative.

Symbols
    x   input, n long along an axis     a, b   elements added before and after it; negative: cut off
    y   output, o = n + a + b long      c      the constant that is added
    g   dL/dy, the gradient that arrives
Written for one axis: each padded axis is mapped by itself.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from manualprop.functions._execution._axes import Like
from manualprop.functions.linear_map import LinearMap, Separable

__all__ = ["CircularPad", "ConstantPad", "ReflectionPad", "ReplicationPad"]

Widths = tuple[int, ...]  # (a, b) of the last axis, then of the axis before it, ...: torch's order


def by_axis(pad: Widths) -> list[tuple[int, int]]:
    """(a, b) of every padded axis, in the order of the axes."""
    return [(pad[k], pad[k + 1]) for k in range(len(pad) - 2, -1, -2)]


class ConstantPad(LinearMap):
    r"""$y_i = x_{i-a}$ for $0 \le i - a < n$, else $c$

    Derivation
        dL/dx_j = sum_i g_i 1[j = i - a] = g_{j+a}                 0 where j + a is cut off
        So dx is g padded by -a and -b with zeros.
        dy = t padded with zeros                                   forward mode: c is a constant
    Second order
        dx is linear in g; its adjoint is this padding with zeros.
    Memory
        Nothing but the shape of x.
    Accuracy
        Exact.
    """

    @staticmethod
    def f(x: Tensor, pad: Widths, c: float | None) -> Tensor:
        return F.pad(x, pad, "constant", c)

    @staticmethod
    def transposed(g: Tensor, like: Like, pad: Widths, c: float | None) -> Tensor:
        return F.pad(g, [-width for width in pad])

    @staticmethod
    def without_constant(pad: Widths, c: float | None) -> tuple[Any, ...]:
        return pad, None


class ReflectionPad(Separable):
    r"""$y_i = x_{r(i-a)}$ with $r(k) = -k$ for $k < 0$, $2(n-1)-k$ for $k \ge n$, else $k$

    Derivation
        dL/dx_j = sum_i g_i 1[j = r(i - a)]
                = g_{j+a}                                          the element itself
                + g_{a-j}          for 1 <= j <= a                 its reflection before,
                + g_{a+2(n-1)-j}   for n-1-b <= j <= n-2           and after
    Second order
        dx is linear in g; its adjoint is this padding.
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of at most three terms along an axis.
    """

    @staticmethod
    def f(x: Tensor, pad: Widths) -> Tensor:
        return F.pad(x, pad, "reflect")

    @staticmethod
    def row(i: int, n: int, o: int, a: int, b: int) -> dict[int, float]:
        k = abs(i - a)
        return {k if k < n else 2 * (n - 1) - k: 1}

    @staticmethod
    def along(pad: Widths) -> Sequence[tuple[int, int]]:
        return by_axis(pad)


class ReplicationPad(Separable):
    r"""$y_i = x_{\min(\max(i-a, 0), n-1)}$: the first and the last element, repeated

    Derivation
        dL/dx_j = sum_i g_i 1[j = min(max(i - a, 0), n - 1)]
                = g_{j+a}                                          the element itself
                + sum_{i<a} g_i        for j = 0                   and its repetitions before
                + sum_{i>=a+n} g_i     for j = n - 1               and after
    Second order
        dx is linear in g; its adjoint is this padding.
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of at most a + 1 or b + 1 terms along an axis.
    """

    @staticmethod
    def f(x: Tensor, pad: Widths) -> Tensor:
        return F.pad(x, pad, "replicate")

    @staticmethod
    def row(i: int, n: int, o: int, a: int, b: int) -> dict[int, float]:
        return {min(max(i - a, 0), n - 1): 1}

    @staticmethod
    def along(pad: Widths) -> Sequence[tuple[int, int]]:
        return by_axis(pad)


class CircularPad(Separable):
    r"""$y_i = x_{(i-a) \bmod n}$: the axis is a circle

    Derivation
        dL/dx_j = sum_i g_i 1[j = (i - a) mod n]
                = g_{j+a}                                          the element itself
                + g_{j+a-n}        for j >= n - a                  and again before
                + g_{j+a+n}        for j < b                       and after
        Where a or b is negative, the elements that are left after the cut make the circle.
    Second order
        dx is linear in g; its adjoint is this padding.
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of at most three terms along an axis.
    """

    @staticmethod
    def f(x: Tensor, pad: Widths) -> Tensor:
        return F.pad(x, pad, "circular")

    @staticmethod
    def row(i: int, n: int, o: int, a: int, b: int) -> dict[int, float]:
        first, left = max(-a, 0), n - max(-a, 0) - max(-b, 0)
        return {first + (i - max(a, 0)) % left: 1}

    @staticmethod
    def along(pad: Widths) -> Sequence[tuple[int, int]]:
        return by_axis(pad)
