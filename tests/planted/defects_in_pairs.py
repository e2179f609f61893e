"""Two defects in one Function, of which neither follows from the other: both are found, each once."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from planted._table import defect


class _OfX(Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()


def one(r):
    return (r(4, 3),)


def slope(x):
    return x.cos()


def detached(x):
    """The slope, of which no derivative is known."""
    return x.detach().cos()


def shows(call):
    """At the inputs given, none of these differs from the sine but where ``truth`` says so."""
    return True


@defect("mutation", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class WritesIntoGradOutputAndDetachesItsSlope(_OfX):
    @staticmethod
    def backward(ctx, g):
        dx = g * detached(*ctx.saved_tensors)
        g.data.zero_()
        return dx


@defect("mutation", also=("saved_tensors",), args=one, truth=torch.sin, shows=shows)
class WritesIntoGradOutputAndKeepsItsInputOnTheContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        dx = g * slope(ctx.x)
        g.data.zero_()
        return dx


@defect("mutation", also=("first_order",), args=one, truth=torch.sin)
class WritesIntoGradOutputAndIsTwiceTooSteep(_OfX):
    @staticmethod
    def backward(ctx, g):
        dx = 2 * g * slope(*ctx.saved_tensors)
        g.data.zero_()
        return dx


@defect("mutation", also=("sizes",), args=one, truth=torch.sin, shows=shows)
class WritesIntoGradOutputAndForgetsTheLastRows(_OfX):
    @staticmethod
    def backward(ctx, g):
        dx = g * slope(*ctx.saved_tensors)
        g.data.zero_()
        dx[256:] = 0
        return dx


@defect("random_state", also=("saved_tensors",), args=one, truth=torch.sin, shows=shows)
class DrawsInBackwardAndKeepsItsInputOnTheContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        torch.rand(1)
        return g * slope(ctx.x)


@defect("random_state", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class DrawsInBackwardAndDetachesItsSlope(_OfX):
    @staticmethod
    def backward(ctx, g):
        torch.rand(1)
        return g * detached(*ctx.saved_tensors)


class _Last:
    x: torch.Tensor
    slope: torch.Tensor


@defect("interleaving", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class KeepsItsInputOnAClassAndDetachesItsSlope(Function):
    @staticmethod
    def forward(ctx, x):
        _Last.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * detached(_Last.x)


@defect("interleaving", also=("second_order",), args=one, truth=lambda x: x.sin() ** 2, shows=shows)
class KeepsACopyOnAClassAndDetachesOneFactor(Function):
    """A copy, too, is recognised by its values: from ``save_for_backward`` one of the two factors would have a slope."""

    @staticmethod
    def forward(ctx, x):
        _Last.x = x.clone()
        return x.sin() ** 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * _Last.x.sin() * detached(_Last.x)


@defect("interleaving", args=one, truth=torch.sin, shows=shows)
class KeepsItsSlopeOnAClass(Function):
    """One finding, for it is one cause: the slope is made in forward, where nothing is recorded.

    A ``detach`` in backward besides would change no number and no graph: nobody can tell it from outside.
    """

    @staticmethod
    def forward(ctx, x):
        _Last.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * _Last.slope


@defect("linearity", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class ClipsAndDetachesItsSlope(_OfX):
    @staticmethod
    def backward(ctx, g):
        return (g * detached(*ctx.saved_tensors)).clamp(-50, 50)


@defect("first_order", also=("second_order",), args=one, says="constant factor 2", truth=torch.sin)
class TwiceTooSteepAndDetached(_OfX):
    @staticmethod
    def backward(ctx, g):
        return 2 * g * detached(*ctx.saved_tensors)


@defect("first_order", also=("sizes",), args=one, says="constant factor 2", truth=torch.sin)
class TwiceTooSteepAndForgetsTheLastRows(_OfX):
    @staticmethod
    def backward(ctx, g):
        dx = 2 * g * slope(*ctx.saved_tensors)
        dx[256:] = 0
        return dx


@defect("first_order", also=("sizes",), args=one, says="constant factor 2", truth=lambda x: x.softmax(-1))
class SoftmaxTwiceTooSteepAndForgetsTheLastColumns(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        dx = 2 * y * (g - (g * y).sum(-1, keepdim=True))
        dx[:, 256:] = 0
        return dx


@defect("first_order", also=("sizes",), args=lambda r: (r(4, 3), r(3)), truth=lambda x, w: (x * w).sin())
class SlopeOfAnArctangentAndForgetsTheLastRows(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g = g / (1 + (x * weight) ** 2)
        dx = g * weight
        dx[256:] = 0
        return dx, (g * x).sum(0)


@defect("first_order", args=one, truth=lambda x: x.softmax(-1))
class SoftmaxWithoutItsSumAndForgetsTheLastColumns(Function):
    """One finding: nobody can say from outside what a wrong gradient should be where columns depend on each other.

    Here all columns lack a term at every size, and beyond 256 another one: the two errors add up to one.
    """

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        dx = y * (g - (g * y)[:, :1])
        dx[:, 256:] = 0
        return dx


@defect("first_order", also=("forward_mode",), args=one, says="wrong sign", truth=torch.sin)
class OfTheWrongSignWithATangentTwiceTooSteep(Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return -g * slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * slope(*ctx.saved_tensors)


@defect("first_order", also=("extremes",), args=one, says="constant factor 2", truth=F.softplus)
class SoftplusTwiceTooSteepAndNanFarOut(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x.exp() / (1 + x.exp())


@defect("first_order", also=("ties",), args=one, says="constant factor 2", truth=F.relu)
class ReluTwiceTooSteepWithASlopeOfItsOwnAtZero(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * (x > 0) + 5 * g * (x == 0)


@defect("extremes", also=("ties",), args=one, truth=lambda x: F.softplus(x) + x.abs(), shows=shows)
class NanFarOutAndOutsideAtZero(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x) + x.abs()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.exp() / (1 + x.exp()) + x.sign() + 3 * (x == 0))


@defect("dtypes", also=("extremes",), args=one, truth=F.softplus, shows=shows)
class TwiceTooSteepInFloat16AndNanFarOut(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() / (1 + x.exp()) * (2 if x.dtype == torch.float16 else 1)


@defect("sizes", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class ForgetsTheLastRowsAndDetachesItsSlope(_OfX):
    @staticmethod
    def backward(ctx, g):
        dx = g * detached(*ctx.saved_tensors)
        dx[256:] = 0
        return dx


@defect("second_order", also=("saved_tensors",), args=one, truth=torch.sin, shows=shows)
class DetachesItsSlopeAndKeepsItsInputOnTheContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * detached(ctx.x)


@defect("grad_output_layout", also=("second_order",), args=one, truth=torch.sin, shows=shows)
class ReadsGradOutputAsContiguousAndDetachesItsSlope(_OfX):
    @staticmethod
    def backward(ctx, g):
        strides = torch.empty(g.shape).stride()
        g = g if 0 in g.stride() else g.as_strided(g.shape, strides)
        return g * detached(*ctx.saved_tensors)


@defect(
    "requires_grad_subsets",
    also=("second_order",),
    args=lambda r: (r(4, 3), r(4, 3)),
    truth=lambda a, b: a.sin() + b,
    shows=shows,
)
class NeedsBothAndDetachesItsSlope(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a)
        return a.sin() + b

    @staticmethod
    def backward(ctx, g):
        if not all(ctx.needs_input_grad):
            return None, None
        return g * detached(*ctx.saved_tensors), g
