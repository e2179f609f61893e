"""Twins: a function that is right, and the same with one line that is wrong.  Slopes at kinks, extremes, ties; dtypes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, control, defect

FAR = torch.tensor([0.5, -1.0, 1.0, 2.0, 3.0], dtype=torch.float64)


def gradient_of(call: Call, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(call.fn(x, *call.args[1:]).sum(), x)[0]


def gradient_at(call: Call, *values: float) -> Tensor:
    return gradient_of(call, torch.tensor(values, dtype=torch.float64))


# ---------------------------------------------------------------- one output at a kink excuses that output alone


def shifted(r):
    return FAR.clone().requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


@control("first_order", "requires_grad_subsets", args=shifted, name="shifted_relu_at_its_kink")
class ShiftedRelu(Function):
    """The first entry of x is at the kink, the others are not."""

    @staticmethod
    def forward(ctx, x, b):
        y = (x - b).clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        dx = g * (y > 0)
        return dx, -dx.sum()


@defect("first_order", args=shifted, says="b.*zero|zero", truth=lambda x, b: (x - b).clamp(min=0))
class ShiftedReluForgetsItsShift(ShiftedRelu):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (y > 0), None


@control("first_order", args=lambda r: (r(4, 50), torch.zeros(50, dtype=torch.float64, requires_grad=True)))
class SumOfAbsoluteDistances(Function):
    """A hundred directions and more: seen through random cotangents, of which each meets a kink."""

    @staticmethod
    def forward(ctx, x, b):
        d = x - b
        d[:, 0] = 0 * d[:, 0] + b[0]  # exactly at the kink
        ctx.save_for_backward(d)
        return d.abs()

    @staticmethod
    def backward(ctx, g):
        (d,) = ctx.saved_tensors
        s = g * d.sign()
        db = -s.sum(0)
        db[0] = s[:, 0].sum()
        dx = s.clone()
        dx[:, 0] = 0
        return dx, db


@defect(
    "first_order",
    args=lambda r: (r(4, 50), torch.zeros(50, dtype=torch.float64, requires_grad=True)),
    shows=lambda call: bool(call.gradients()[1][1:].eq(0).all()),
)
class SumOfAbsoluteDistancesForgetsItsCentre(SumOfAbsoluteDistances):
    @staticmethod
    def backward(ctx, g):
        dx, db = SumOfAbsoluteDistances.backward(ctx, g)
        return dx, torch.zeros_like(db)


# ---------------------------------------------------------------- slopes at extremes


@control("extremes", "first_order", args=lambda r: (r(4, 3),))
class ExpOfItsInput(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp()


@defect("extremes", args=lambda r: (r(4, 3),), shows=lambda call: bool(gradient_at(call, 20.0) < 1e7))
class ExpWithAClampedSlope(ExpOfItsInput):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.clamp(-15, 15).exp()


@control("extremes", "ties", args=lambda r: (r(4, 3),))
class Huber(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=2.0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.where(x.abs() < 2, 2 * x.sign())


@defect(
    "extremes",
    args=lambda r: (r(4, 3).detach().clamp(-1.5, 1.5).requires_grad_(),),
    shows=lambda call: bool(gradient_at(call, -20.0) > 0),
)
class HuberWithTheWrongSignFarBelow(Huber):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.where(x.abs() < 2, 2 * x.sign().abs())


@control("extremes", args=lambda r: (r(4, 3),))
class SoftplusByItsSigmoid(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sigmoid()


@defect("extremes", args=lambda r: (r(4, 3),), shows=lambda call: bool(gradient_at(call, 7.0) == 0))
class SoftplusThatStopsAtSix(SoftplusByItsSigmoid):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sigmoid() * (x < 6)


# ---------------------------------------------------------------- ties and kinks


@control("ties", "first_order", args=lambda r: (r(4, 3),))
class LeakyRelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.where(x > 0, 0.1 * g)


@defect("ties", args=lambda r: (r(4, 3),), shows=lambda call: bool(gradient_at(call, 0.0) > 1))
class LeakyReluWithASlopeBeyondBothAtZero(LeakyRelu):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.where(x > 0, (1.1 * g).where(x == 0, 0.1 * g))


@defect("ties", args=lambda r: (r(4, 3),), shows=lambda call: bool(gradient_at(call, 0.0) < 0))
class ReluWithANegativeSlopeAtZero(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.where(x > 0, -0.2 * g * (x == 0))


@control("ties", "first_order", args=lambda r: (r(4, 6),))
class MaximumOfARow(Function):
    @staticmethod
    def forward(ctx, x):
        y, k = x.max(1)
        ctx.save_for_backward(k)
        ctx.width = x.shape[1]
        return y

    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return F.one_hot(k, ctx.width).to(g.dtype) * g.unsqueeze(1)


@defect(
    "ties",
    args=lambda r: (r(4, 6),),
    shows=lambda call: bool(gradient_of(call, torch.zeros(1, 6, dtype=torch.float64)).sum() > 1),
)
class MaximumThatPaysEveryTie(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.amax(1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (x == y.unsqueeze(1)) * g.unsqueeze(1)


# ---------------------------------------------------------------- rows of zeros


def zeroed(call: Call) -> Tensor:
    x = call.args[0].detach().clone()
    x[0] = 0
    return gradient_of(call, x)


@control("extremes", "ties", args=lambda r: (r(4, 3),))
class UnitRows(Function):
    """x / max(|x|, 1e-12): at a row of zeros the slope is 1e12, and steep is not NaN."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return g / n - x * ((x / n) * (g / n)).sum(-1, keepdim=True) / n


@defect("extremes", args=lambda r: (r(4, 3),), shows=lambda call: bool(zeroed(call).isnan().any()))
class UnitRowsAreNanAtZero(UnitRows):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True)
        return g / n.clamp_min(1e-12) - x * (x * g).sum(-1, keepdim=True) / n**3


@defect(
    "extremes",
    args=lambda r: (r(4, 3),),
    reference=lambda x: F.normalize(x, dim=-1),
    shows=lambda call: bool(zeroed(call).isnan().any()),
)
class UnitRowsAreNanAtZeroBesideAReference(UnitRowsAreNanAtZero):
    pass


# ---------------------------------------------------------------- dtypes


def comes_out(call: Call) -> torch.dtype:
    return call()[0].dtype


@control("output_dtype", "dtypes", args=lambda r: (r(4, 3),))
class SineInItsOwnDtype(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos()


@defect(
    "output_dtype",
    args=lambda r: (r(4, 3),),
    says="float32 out",
    shows=lambda call: comes_out(call) == torch.float32,
)
class SineInFloat32Always(SineInItsOwnDtype):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.float().sin()


@control("mixed_dtypes", "dtypes", args=lambda r: (r(4, 3), r(3)))
class ScaleOfAnyDtype(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, torch.einsum("...j,...j->j", g, x.to(g.dtype))


def mixed(call: Call) -> Tensor:
    x, w = call.args[0].detach().float().requires_grad_(), call.args[1]
    return torch.autograd.grad(call.fn(x, w).sum(), w)[0]


@defect(
    "mixed_dtypes",
    args=lambda r: (r(4, 3), r(3)),
    says="mixed",
    shows=lambda call: not torch.allclose(mixed(call), call.args[0].sum(0)),
)
class ScaleThatReadsAnotherDtype(ScaleOfAnyDtype):
    """The memory is read in the dtype of the gradient, whatever it was written in."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        x = x if x.dtype == g.dtype else torch.cat([x, x], -1).view(g.dtype)
        return g * w, torch.einsum("...j,...j->j", g, x)


@control("first_order", "dtypes", "linearity", args=lambda r: (r(3, 4).detach().float().requires_grad_(),))
class WorksInFloat32Only(Function):
    """A table of constants in float32: judged in float32, and not in a dtype that nobody gives it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ torch.eye(x.shape[-1], dtype=x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g @ torch.eye(g.shape[-1])


@defect(
    "first_order",
    args=lambda r: (r(3, 4).detach().float().requires_grad_(),),
    says="constant factor 1.5|3/2",
    shows=lambda call: bool(call.gradients()[0].abs().max() > 0),
)
class WorksInFloat32OnlyAndIsTooSteep(WorksInFloat32Only):
    @staticmethod
    def backward(ctx, g):
        return 1.5 * g @ torch.eye(g.shape[-1])
