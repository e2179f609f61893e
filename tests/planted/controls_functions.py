"""Right Functions and callables of our own writing, each near to a defect of the other files."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import control

# ---------------------------------------------------------------- products


@control("first_order", "requires_grad_subsets", "sizes", args=lambda r: (r(5, 4), r(3, 4), r(3)))
class LinearInTheOldStyle(Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dx = g @ weight if ctx.needs_input_grad[0] else None
        dweight = g.T @ x if ctx.needs_input_grad[1] else None
        dbias = g.sum(0) if ctx.with_bias and ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


control(
    "first_order",
    "requires_grad_subsets",
    args=lambda r: (r(5, 4), r(3, 4), None),
    name="linear_without_bias",
)(LinearInTheOldStyle)
control(
    "requires_grad_subsets",
    "partial_outputs",
    args=lambda r: (r(5, 4, grad=False), r(3, 4), r(3)),
    name="linear_of_frozen_features",
)(LinearInTheOldStyle)


@control("func_grad", "vmap", "vmap_grad", "compile", args=lambda r: (r(5, 4), r(3, 4)))
class LinearWithSetupContext(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.mT @ x

    @staticmethod
    def jvp(ctx, tx, tweight):
        x, weight = ctx.saved_tensors
        return tx @ weight.mT + x @ tweight.mT


@control("first_order", "same_input", args=lambda r: (r(4, 4), r(4, 4)))
class MatrixProduct(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.T, a.T @ g


@control("same_input", "first_order", args=lambda r: (r(4, 3), r(4, 3)))
class Product(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, g * a


@control("mutation", "aliasing", "grad_output_layout", args=lambda r: (r(4, 3), r(4, 3)))
class SumHandsOnGradOutputTwice(Function):
    """The same tensor for both inputs, and grad_output itself: allowed."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, g):
        return g, g


@control("first_order", "sizes", args=lambda r: (r(2, 3, 4, 5), r(3, 1, 1)))
class ChannelScale(Function):
    """The sum over the broadcast dimensions is left to autograd, which does it."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, g * x


# ---------------------------------------------------------------- elementwise


@control("forward_mode", "jacfwd", "vmap_grad", "jacrev", args=lambda r: (r(4, 3),))
class TanhOnEveryRoute(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)

    @staticmethod
    def jvp(ctx, t):
        (y,) = ctx.saved_tensors
        return t * (1 - y * y)


@control("ties", "extremes", args=lambda r: (r(4, 5),))
class ReluByItsOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


@control("ties", "first_order", args=lambda r: (r(4, 5),))
class AbsoluteValueWithSlopeOneAtZero(Function):
    """Any slope between the two one-sided ones is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@control("extremes", "dtypes", args=lambda r: (r(4, 5),))
class SoftplusStable(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].sigmoid()


@control("extremes", "dtypes", "first_order", args=lambda r: (r(4, 5),))
class GeluByItsInput(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        slope = torch.special.ndtr(x.float() if x.dtype.itemsize == 2 else x)
        density = torch.exp(-x.to(slope.dtype).square() / 2) / math.sqrt(2 * math.pi)
        return (g * (slope + x * density)).to(x.dtype)


@control("linearity", "retain_graph", args=lambda r: (r(4, 5),))
class ExpOnceDifferentiable(Function):
    """No double backward, and it says so."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


control(
    "second_order",
    args=lambda r: (r(4, 5),),
    accept={"double_backward": "on purpose"},
    name="exp_declared_once",
)(ExpOnceDifferentiable)


@control("mutation", "inplace_edit", "aliasing", args=lambda r: (r(4, 3),))
def relu_in_place(x: Tensor) -> Tensor:
    return _ReluInPlace.apply(x * 1)


class _ReluInPlace(Function):
    @staticmethod
    def forward(ctx, x):
        x.clamp_(min=0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


@control("first_order", "dtypes", args=lambda r: (r(4, 3),), kwargs={"scale": 3.0})
def scaled_tanh(x: Tensor, *, scale: float = 1.0) -> Tensor:
    return _ScaledTanh.apply(x, scale)


class _ScaledTanh(Function):
    @staticmethod
    def forward(ctx, x, scale):
        y = (x * scale).tanh()
        ctx.scale = scale
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y) * ctx.scale, None


@control("second_order", "third_order", args=lambda r: (r(4, 3),))
class CubeWithAHandWrittenSecondBackward(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        return _CubeBackward.apply(g, *ctx.saved_tensors)


class _CubeBackward(Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return 3 * g * x * x

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return 3 * v * x * x, 6 * v * g * x
