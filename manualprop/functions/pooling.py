r"""Hand-derived rules of the pools that are not linear: the largest number or a p-norm of each window.

Symbols
    x   input                  g   dL/dy, the gradient that arrives
    y   output                 i   for each output o the place i(o) of the input that it is
    v   dL/d(dx)               e   an empty output, see below
Shape legend
    N   batch and channels: any number of leading axes
    X   the one, two or three spatial axes of the input, flattened; places count along them
    O   those of the output, flattened
Two maps
    Choice, y_o = x_i(o), and sum, x_j = sum_o 1[i(o) = j] g_o, are linear and transposes of each other: each
    is the other's backward pass.  So derivatives of every order are these two maps.
An empty output
    The gradient of a maximum does not depend on x, and x is not kept.  e has no numbers and belongs to x in the
    graph: the second derivative is then zeros, as in torch, instead of the error that x was not used.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise import Elementwise
from manualprop.functions._execution import eagerly, full, recorded
from manualprop.functions._execution._axes import Like, owned
from manualprop.functions._execution._places import in_line, largest_of_windows, numbers_at, summed_at
from manualprop.functions._rule import Rule, flat
from manualprop.functions.averaging import AvgPool
from manualprop.functions.linear_map import mapped

__all__ = [
    "Abs",
    "AdaptiveMaxPool",
    "Choice",
    "FractionalMaxPool",
    "LPPool",
    "MaxPool",
    "MaxUnpool",
    "SumAtPlaces",
]

# torch's kernels, by the number of spatial axes
MAX: dict[int, Callable[..., Any]] = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}
ADAPTIVE: dict[int, Callable[..., Any]] = {
    1: F.adaptive_max_pool1d_with_indices,
    2: F.adaptive_max_pool2d_with_indices,
    3: F.adaptive_max_pool3d_with_indices,
}
FRACTIONAL: dict[int, Callable[..., Any]] = {
    2: F.fractional_max_pool2d_with_indices,
    3: F.fractional_max_pool3d_with_indices,
}
UNPOOL: dict[int, Callable[..., Tensor]] = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
POWER: dict[int, Callable[..., Tensor]] = {1: F.lp_pool1d, 2: F.lp_pool2d, 3: F.lp_pool3d}
# A^T, looked up here: compiled autograd cannot read an attribute of a rule.
AverageTransposed = AvgPool.adjoint


# ----- the two maps -----


class Choice(Rule):
    r"""$y_o = x_{i(o)}$

    Derivation
        dL/dx_j = sum_o g_o dy_o/dx_j = sum_o 1[i(o) = j] g_o      chain rule; y_o is one of the x
        dy_o = dx_i(o)                                             forward mode: y is linear in x
    Shape
        x (N, X), i (N, O) -> y (N, O)
    Memory
        i, 8 bytes per output.
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(x: Tensor, i: Tensor, axes: int) -> Tensor:
        return numbers_at(x, i, axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, i, ctx.axes = inputs
        ctx.size = tuple(x.shape[x.dim() - ctx.axes :])
        ctx.save_for_backward(i)
        ctx.save_for_forward(i)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (i,) = ctx.saved_tensors
        return sum_at_places(g, i, ctx.size), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (i,) = ctx.saved_tensors
        tangent: Tensor = choice(dx, i, ctx.axes)
        return tangent


class SumAtPlaces(Rule):
    r"""$x_j = \sum_o 1[i(o) = j] g_o$

    Derivation
        dL/dg_o = sum_j v_j dx_j/dg_o = v_i(o)                     chain rule; g_o is in one sum
        dx_j = sum_o 1[i(o) = j] dg_o                              forward mode: x is linear in g
    Shape
        g (N, O), i (N, O) -> x (N, X)
    Memory
        i, 8 bytes per output.
    Accuracy
        One term for each window that chose the place; half precision is summed in float32.
    """

    @staticmethod
    def forward(g: Tensor, i: Tensor, size: tuple[int, ...]) -> Tensor:
        return summed_at(g, i, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[int, ...]], output: Tensor) -> None:
        _, i, ctx.size = inputs
        ctx.save_for_backward(i)
        ctx.save_for_forward(i)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        (i,) = ctx.saved_tensors
        return choice(v, i, len(ctx.size)), None, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor, *_: None) -> Tensor:
        (i,) = ctx.saved_tensors
        tangent: Tensor = sum_at_places(dg, i, ctx.size)
        return tangent


# The two maps inside of a backward: as rules where something may differentiate them again.
choice = recorded(Choice.apply, numbers_at)
sum_at_places = recorded(SumAtPlaces.apply, summed_at)


# ----- the largest number of each window -----


class Maximum(Rule):
    """Base of the pools that choose the largest number; the windows differ.

    ``forward(x, axes, *options)`` returns y, i and the empty e.
    """

    abstract = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.axes, *options = inputs
        _, i, e = output
        ctx.others = (None,) * (1 + len(options))
        ctx.shape, ctx.size = x.shape, tuple(x.shape[x.dim() - ctx.axes :])
        ctx.mark_non_differentiable(i)
        ctx.save_for_backward(i, e)
        ctx.save_for_forward(i, e)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None, ge: Tensor | None) -> tuple[Tensor | None, ...]:
        i, e = ctx.saved_tensors
        if g is None:  # a second derivative, where only e is asked for
            assert ge is not None
            return ge.new_zeros(ctx.shape), *ctx.others
        return flat(sum_at_places(g, i, ctx.size), e), *ctx.others

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> tuple[Tensor, None, Tensor]:
        i, e = ctx.saved_tensors
        return choice(dx, i, ctx.axes), None, torch.zeros_like(e)


def with_empty(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    y, i = found
    return owned(y), i, y.new_empty(0)


class MaxPool(Maximum):
    r"""$y_o = \max_{j \in \text{window } o} x_j$

    Derivation
        y_o = x_i(o)                                               i(o): the place of the maximum
        dy_o/dx_j = 1[i(o) = j]                                    i is constant around x without ties
        dL/dx_j = sum_o 1[i(o) = j] g_o                            chain rule; windows may overlap
        dy_o = dx_i(o)                                             forward mode
    Kinks
        Of equal numbers the first has the slope 1, as in PyTorch; of NaNs the last.
    Second order
        dx is the sum at the places i, a linear map of g: its transpose is the choice.
    Shape
        x (N, X) -> y (N, O), i (N, O)
    Memory
        i, 8 bytes per output.  torch keeps x too.
    Accuracy
        The value is exact; the gradient has one term for each window, in half precision summed in float32.
    """

    @staticmethod
    def forward(
        x: Tensor, axes: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return with_empty(
            largest_of_windows(MAX[axes], x, axes, kernel_size, stride, padding, dilation, ceil_mode)
        )


class AdaptiveMaxPool(Maximum):
    r"""$y_o = \max_{j \in \text{window } o} x_j$, as many windows as asked for

    Derivation
        Window o of an axis with n numbers and m outputs covers floor(o n / m) to ceil((o + 1) n / m) - 1.
        dL/dx_j = sum_o 1[i(o) = j] g_o                            as in MaxPool
        dy_o = dx_i(o)                                             forward mode
    Kinks
        Of equal numbers the first has the slope 1, as in PyTorch; of NaNs the last.
    Second order
        As in MaxPool.
    Shape
        x (N, X) -> y (N, O), i (N, O)
    Memory
        i, 8 bytes per output.  torch keeps x too.
    Accuracy
        As in MaxPool.
    """

    @staticmethod
    def forward(x: Tensor, axes: int, output_size: Any) -> tuple[Tensor, Tensor, Tensor]:
        return with_empty(ADAPTIVE[axes](x, output_size))


class FractionalMaxPool(Maximum):
    r"""$y_o = \max_{j \in \text{window } o} x_j$, windows at random distances

    Derivation
        Window o of an axis with n numbers, m outputs and a random u in [0, 1) starts at
        floor((o + u) a) - floor(u a),  a = (n - k) / (m - 1)      and the last one at n - k
        dL/dx_j = sum_o 1[i(o) = j] g_o                            as in MaxPool; u is constant
        dy_o = dx_i(o)                                             forward mode
    Kinks
        Of equal numbers the first has the slope 1, as in PyTorch; of NaNs the last.
    Second order
        As in MaxPool.
    Shape
        x (N, X), u (batch, channels, axes) -> y (N, O), i (N, O)
    Memory
        i, 8 bytes per output.  torch keeps x too.
    Accuracy
        As in MaxPool.
    Reference
        Graham, 2014, https://arxiv.org/abs/1412.6071
    """

    @staticmethod
    def forward(
        x: Tensor, axes: int, kernel_size: Any, output_size: Any, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return with_empty(FRACTIONAL[axes](x, kernel_size, output_size, _random_samples=u))


class MaxUnpool(Rule):
    r"""$x_{i(o)} = y_o$ and 0 elsewhere: a partial inverse of the maximum

    Derivation
        x_j = sum_o 1[i(o) = j] y_o                                for places that differ
        dL/dy_o = v_i(o)                                           chain rule, v = dL/dx
        dx_i(o) = dy_o                                             forward mode: x is linear in y
    Kinks
        Where places are equal, x takes the last y in memory, and each of these y gets the gradient v_i(o), as
        in PyTorch.
    Second order
        dL/dy is the choice at i, a linear map of v: its transpose is the sum.
    Shape
        y (N, O), i (N, O) -> x (N, X)
    Memory
        i, 8 bytes per output.
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(
        y: Tensor, i: Tensor, axes: int, kernel_size: Any, stride: Any, padding: Any, size: tuple[int, ...]
    ) -> Tensor:
        x: Tensor = eagerly(
            lambda: owned(UNPOOL[axes](y, i, kernel_size, stride, padding, size)),
            lambda: written_at(y, i, size),
        )
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, i, ctx.axes, *_, ctx.size = inputs
        ctx.save_for_backward(i)
        ctx.save_for_forward(i)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (i,) = ctx.saved_tensors
        return choice(v, i, ctx.axes), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, *_: None) -> Tensor:
        (i,) = ctx.saved_tensors
        return written_at(dy, i, ctx.size)


def written_at(y: Tensor, i: Tensor, size: Sequence[int]) -> Tensor:
    """x_i(o) = y_o, and 0 elsewhere."""
    axes, lead = len(size), y.shape[: y.dim() - len(size)]
    zeros = y.new_zeros(*lead, math.prod(size))
    return zeros.scatter(-1, in_line(i, axes), in_line(y, axes)).reshape(*lead, *size)


# ----- the p-norm of each window -----


class LPPool(Rule):
    r"""$y_o = \Big(\frac{K}{n_o} \sum_{j \in \text{window } o} x_j^p\Big)^{1/p}$

    K is the number of places of a window, and n_o how many of them lie inside the input: fewer than K only
    with ``ceil_mode``, at the end of an axis.

    Derivation, with c_o = K / n_o
        dy_o/dx_j = (1/p) (y_o^p)^(1/p - 1) c_o p x_j^(p - 1)      chain rule, for j in window o
                  = c_o y_o^(1 - p) x_j^(p - 1)
        dL/dx_j = x_j^(p - 1) sum_o c_o y_o^(1 - p) g_o            over the windows o that cover j
                = K x_j^(p - 1) (A^T (y^(1 - p) g))_j              A: the average, 1 / n_o for each j of window o
        dy_o = c_o y_o^(1 - p) sum_j x_j^(p - 1) dx_j              forward mode, over the window
             = K y_o^(1 - p) (A (x^(p - 1) dx))_o
    Kinks
        dy_o/dx = 0 where the sum of x^p is 0, as PyTorch documents.
    Second order
        By autograd through these formulas: both x and y are differentiable in them.
    Shape
        x (N, X) -> y (N, O)
    Memory
        x and y, which are alive outside anyway.  torch keeps seven tensors, among them x^p.
    Accuracy
        The sum of x^p may overflow or underflow where y would not, as in PyTorch.
    """

    @staticmethod
    def forward(x: Tensor, p: float, axes: int, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
        y = POWER[axes](full(x), p, kernel_size, stride, ceil_mode)
        return y.to(x.dtype) if x.is_floating_point() else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.p, axes, kernel_size, stride, ceil_mode = inputs
        kernel = of_each_axis(kernel_size, axes)
        ctx.like, ctx.K = Like.of(x), math.prod(kernel)
        ctx.windows = kernel, of_each_axis(stride, axes) or kernel, (0,) * axes, ceil_mode, True, None
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y = map(full, ctx.saved_tensors)
        h = weighted_by_norm(full(g), y, ctx.p)
        sums = ctx.K * AverageTransposed.apply(h, ctx.like, *ctx.windows)  # (N, O) -> (N, X)
        return (x.pow(ctx.p - 1) * sums).to(g.dtype), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        x, y = map(full, ctx.saved_tensors)
        sums = ctx.K * mapped(AvgPool, x.pow(ctx.p - 1) * full(dx), *ctx.windows)  # (N, X) -> (N, O)
        return weighted_by_norm(sums, y, ctx.p).to(dx.dtype)


def of_each_axis(option: Any, axes: int) -> tuple[Any, ...]:
    """One number for each axis; nothing for None."""
    if option is None:
        return ()
    if isinstance(option, list | tuple):
        return tuple(option)
    return (option if isinstance(option, int | torch.SymInt) else operator.index(option),) * axes


def weighted_by_norm(h: Tensor, y: Tensor, p: float) -> Tensor:
    """h y^(1 - p), and 0 where the sum of x^p is 0."""
    zero = y == 0 if p > 0 else y.isinf()
    return h.masked_fill(zero, 0) * y.masked_fill(zero, 1).pow(1 - p)


class Abs(Elementwise):
    r"""$y = |x|$, whose largest number in a window is the norm for $p = \infty$

    Derivation
        dy/dx = sign x                                             piecewise linear
        dL/dx = g sign x                                           chain rule
    Kinks
        y'(0) = 0, as in PyTorch.
    Memory
        x.
    Accuracy
        Exact.
    """

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.abs(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return torch.sign(x)
