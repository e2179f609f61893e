r"""Hand-derived rules of interpolation: every output element is a weighted mean of a few input elements.

Symbols
    x   input, n long along an axis     q   input elements to an output element: n / o, or 1 / scale_factor if given
    y   output, o long                  u   the place of output element i among the input elements
    g   dL/dy, the gradient that arrives
Written for one axis: each axis is interpolated by itself.  The place is u = (i + 1/2) q - 1/2, where elements are cells
with a width; with align_corners they are points, and u = i (n - 1) / (o - 1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from manualprop.functions._execution._nearest import Kernel, copies, nearest_elements
from manualprop.functions.linear_map import Separable

__all__ = [
    "AntialiasedInterpolation",
    "CubicInterpolation",
    "LinearInterpolation",
    "NearestInterpolation",
]

Scales = tuple[float | None, ...]  # scale_factor of each axis, None where n / o is used

ONE_AXIS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def inputs_per_output(n: int, o: int, scale: float | None, align: bool) -> float:
    """Input elements to an output element."""
    if align:
        return (n - 1) / (o - 1) if o > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else n / o


def source(i: int, q: float, align: bool) -> float:
    """The place u of output element i."""
    return i * q if align else (i + 0.5) * q - 0.5


def summed(terms: Sequence[tuple[int, float]], n: int) -> dict[int, float]:
    """{j: weight} without zeros; a place outside of x stands for the nearest one inside."""
    row: dict[int, float] = {}
    for j, weight in terms:
        j = min(max(j, 0), n - 1)
        row[j] = row.get(j, 0.0) + weight
    return {j: weight for j, weight in row.items() if weight}


def resized(x: Tensor, size: Any, scales: Any, mode: str, align: bool | None, antialias: bool) -> Tensor:
    return F.interpolate(x, size, scales, mode, align, antialias=antialias)


class NearestInterpolation(Separable):
    r"""$y_i = x_{r(i)}$ with $r(i) = \lfloor i q \rfloor$, or $\lfloor (i + \frac12) q \rfloor$ for ``nearest-exact``

    Derivation
        M_ij = 1[j = r(i)]
        dL/dx_j = sum_i M_ij g_i = sum_{i: r(i) = j} g_i           the sum over the copies of x_j
    Second order
        dx is linear in g; its adjoint is this interpolation.
    Memory
        Nothing but the shape of x.
    Accuracy
        Sums of about o / n terms along an axis.  Where i q is an integer but for rounding, torch's kernels take
        one neighbour or the other by layout and dtype.  r(i) is read from the kernel that computed y.
    """

    @staticmethod
    def f(x: Tensor, size: Any, scales: Any, exact: bool, kernel: Kernel) -> Tensor:
        return copies(x, size, scales, exact, kernel)

    @staticmethod
    def row(i: int, n: int, o: int, scale: float | None, exact: bool, kernel: Kernel) -> dict[int, float]:
        return {nearest_elements(n, o, scale, exact, kernel)[i]: 1}

    @staticmethod
    def along(size: Any, scales: Scales, exact: bool, kernel: Kernel) -> Sequence[tuple[Any, ...]]:
        return [(scale, exact, kernel) for scale in scales or [None] * len(size)]


class LinearInterpolation(Separable):
    r"""$y_i = (1 - \lambda) x_k + \lambda x_{k+1}$ with $k = \lfloor u \rfloor$, $\lambda = u - k$, for $u \ge 0$

    Derivation
        M_ij = (1 - lambda_i) 1[j = k_i] + lambda_i 1[j = k_i + 1]
        dL/dx_j = sum_i M_ij g_i                                   each output gives to its two neighbours
        u < 0 counts as 0, and x_{n} as x_{n-1}.  For o = n the map is the identity.
    Second order
        dx is linear in g; its adjoint is this interpolation.
    Shape
        One axis ("linear"), two ("bilinear") or three ("trilinear").
    Memory
        Nothing but the shape of x.
    Accuracy
        The weights are computed in float64; torch computes them in the precision of x.
    """

    @staticmethod
    def f(x: Tensor, size: Any, scales: Any, align: bool) -> Tensor:
        return resized(x, size, scales, ONE_AXIS[x.dim() - 2], align, False)

    @staticmethod
    def row(i: int, n: int, o: int, scale: float | None, align: bool) -> dict[int, float]:
        u = float(i) if o == n else max(source(i, inputs_per_output(n, o, scale, align), align), 0.0)
        k = min(math.floor(u), n - 1)
        return summed([(k, 1 - (u - k)), (k + 1, u - k)], n)

    @staticmethod
    def along(size: Any, scales: Scales, align: bool) -> Sequence[tuple[Any, ...]]:
        return [(scale, align) for scale in scales or [None] * len(size)]


class CubicInterpolation(Separable):
    r"""$y_i = \sum_{m=-1}^{2} w(\lambda - m) x_{k+m}$ with $k = \lfloor u \rfloor$, $\lambda = u - k$, $a = -\frac34$

    Derivation
        w(d) = (a + 2) |d|^3 - (a + 3) d^2 + 1                     for |d| <= 1: Keys' cubic
             = a |d|^3 - 5 a d^2 + 8 a |d| - 4 a                   for 1 < |d| < 2
        M_ij = sum_m w(lambda_i - m) 1[j = k_i + m]                a place outside of x is the nearest one inside
        dL/dx_j = sum_i M_ij g_i
    Second order
        dx is linear in g; its adjoint is this interpolation.
    Shape
        Two axes.
    Memory
        Nothing but the shape of x.
    Accuracy
        The weights are computed in float64; torch computes them in the precision of x.
    Reference
        Keys, 1981, https://doi.org/10.1109/TASSP.1981.1163711
    """

    A = -0.75

    @staticmethod
    def f(x: Tensor, size: Any, scales: Any, align: bool) -> Tensor:
        return resized(x, size, scales, "bicubic", align, False)

    @staticmethod
    def row(i: int, n: int, o: int, scale: float | None, align: bool) -> dict[int, float]:
        u = source(i, inputs_per_output(n, o, scale, align), align)
        k = math.floor(u)
        return summed([(k + m, cubic(u - k - m, CubicInterpolation.A)) for m in (-1, 0, 1, 2)], n)

    @staticmethod
    def along(size: Any, scales: Scales, align: bool) -> Sequence[tuple[Any, ...]]:
        return [(scale, align) for scale in scales or [None] * len(size)]


class AntialiasedInterpolation(Separable):
    r"""$y_i = \sum_j w((j - u) / s) x_j / \sum_j w((j - u) / s)$ with $s = \max(q, 1)$

    Derivation
        w(d) = max(1 - |d|, 0)                                     bilinear: a triangle
             = Keys' cubic with a = -1/2, see :class:`CubicInterpolation`
             = sinc(d) sinc(d / 3)  for |d| < 3                    lanczos; sinc d = sin(pi d) / (pi d)
        M_ij = w((j - u_i) / s) / sum_l w((l - u_i) / s)           over the l of x within the support
        dL/dx_j = sum_i M_ij g_i
        For o = n the map is the identity.  Where the image shrinks, w becomes s times as wide: it removes what the coarse grid cannot show.
        Also with align_corners u = (i + 1/2) q - 1/2, as in PyTorch; there q = (n - 1) / (o - 1).
    Second order
        dx is linear in g; its adjoint is this interpolation.
    Shape
        Two axes.
    Memory
        Nothing but the shape of x.
    Accuracy
        The weights are computed in float64; torch computes them in the precision of x.
    """

    @staticmethod
    def f(x: Tensor, size: Any, scales: Any, mode: str, align: bool) -> Tensor:
        return resized(x, size, scales, mode, align, True)

    @staticmethod
    def row(i: int, n: int, o: int, scale: float | None, mode: str, align: bool) -> dict[int, float]:
        if o == n:
            return {i: 1}
        w, reach = FILTERS[mode]
        q = inputs_per_output(n, o, scale, align)
        s, middle = max(q, 1.0), (i + 0.5) * q
        first, last = max(int(middle - reach * s + 0.5), 0), min(int(middle + reach * s + 0.5), n)
        weights = {j: w((j - middle + 0.5) / s) for j in range(first, last)}
        total = sum(weights.values())
        return {j: weight / total for j, weight in weights.items() if weight}

    @staticmethod
    def along(size: Any, scales: Scales, mode: str, align: bool) -> Sequence[tuple[Any, ...]]:
        return [(scale, mode, align) for scale in scales or [None] * len(size)]


def cubic(d: float, a: float) -> float:
    """w(d) of Keys' cubic."""
    d = abs(d)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a if d < 2 else 0.0


def lanczos(d: float) -> float:
    """sinc(d) sinc(d / 3)."""
    if d == 0 or abs(d) >= 3:
        return float(d == 0)
    return 3 * math.sin(math.pi * d) * math.sin(math.pi * d / 3) / (math.pi * d) ** 2


# {mode: (w, where it ends)}
FILTERS: Mapping[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (lambda d: max(1 - abs(d), 0.0), 1),
    "bicubic": (lambda d: cubic(d, -0.5), 2),
    "lanczos": (lanczos, 3),
}
