"""Right by plain backward, wrong by another route: higher orders, forward mode, transforms, compilers; and the
ones that end the process or never end."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, defect


def second(call: Call) -> list[Tensor | None]:
    """The derivatives of a sum of squares of the first gradient; [] where it does not require a gradient."""
    wanted = call.wanted()
    outputs = call()
    first = torch.autograd.grad([y.square().sum() for y in outputs], wanted, create_graph=True)
    total = sum(d.square().sum() for d in first)
    return list(torch.autograd.grad(total, wanted, allow_unused=True)) if total.requires_grad else []


def wrong_second(call: Call) -> bool:
    right = second(Call(call.truth, call.args, call.kwargs))
    given = second(call)
    if len(given) != len(right):
        return True
    return any(
        a is None or not torch.allclose(a, b) for a, b in zip(given, right, strict=True) if b is not None
    )


def wrong_tangent(call: Call) -> bool:
    tangents = tuple(torch.cos(torch.arange(a.numel()).double()).view(a.shape) for a in call.args)
    primals = tuple(a.detach() for a in call.args)
    given = torch.func.jvp(call.fn, primals, tangents)[1]
    return not torch.allclose(given, torch.func.jvp(call.truth, primals, tangents)[1])


# ---------------------------------------------------------------- second order


@defect(
    "second_order",
    args=lambda r: (r(4, 3),),
    says="zero|silent|does not require",
    truth=lambda x: x * x * x,
    shows=wrong_second,
)
class CubeThroughNumpyInBackward(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * g.detach().numpy() * x.detach().numpy() ** 2)


@defect(
    "second_order",
    "saved_tensors",
    args=lambda r: (r(4, 3),),
    says="zero|silent|one path|does not",
    truth=torch.tanh,
    shows=wrong_second,
)
class TanhStashesItsSlope(Function):
    """The slope made in forward is a constant in backward: double backward sees g only."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.slope = 1 - y * y
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


@defect(
    "second_order",
    args=lambda r: (r(4, 5),),
    says="zero|silent|one path|does not",
    truth=lambda x: x.softmax(1),
    shows=wrong_second,
)
class SoftmaxSavesAnIntermediate(Function):
    """Saved, but neither input nor output: it has no history when the second backward comes."""

    @staticmethod
    def forward(ctx, x):
        e = (x - x.amax(1, keepdim=True)).exp()
        y = e / e.sum(1, keepdim=True)
        ctx.save_for_backward(y * 1)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(1, keepdim=True))


@defect(
    "second_order",
    args=lambda r: (r(6, 3), r(3)),
    says="zero|silent|one path|does not",
    truth=lambda x, w: (x @ w).sigmoid(),
    shows=wrong_second,
)
class LogisticComputesBackwardWithoutGradMode(Function):
    @staticmethod
    def forward(ctx, x, w):
        y = (x @ w).sigmoid()
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, w, y = ctx.saved_tensors
        with torch.no_grad():
            d = g * y * (1 - y)
            return d[:, None] * w, x.T @ d


@defect(
    "second_order",
    args=lambda r: (r(4, 3),),
    says=r"one path|constant factor|no simple",
    truth=torch.exp,
    shows=wrong_second,
)
class ExpWithAWrongSecondBackward(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return _ExpBackward.apply(g, x)


class _ExpBackward(Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return g * x.exp()

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return v * x.exp(), 2 * v * g * x.exp()


@defect(
    "second_order",
    args=lambda r: (r(4, 3),),
    says="zero|silent|one path|does not",
    truth=lambda x: x.square().sum(1),
    shows=wrong_second,
)
class SquareSumDetachesGradOutput(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum(1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g.detach()[:, None]


@defect(
    "second_order",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="zero|silent|one path|does not",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=wrong_second,
)
class LinearCrossEntropyMakesItsGradientInForward(Function):
    """Scaled by g, so the first order is right; the curvature is lost without a word."""

    @staticmethod
    def forward(ctx, x, weight, target):
        z = x @ weight.T
        dz = (z.softmax(1) - F.one_hot(target, len(weight))) / len(x)
        ctx.save_for_backward(dz @ weight, dz.T @ x)
        return F.cross_entropy(z, target)

    @staticmethod
    def backward(ctx, g):
        dx, dweight = ctx.saved_tensors
        return g * dx, g * dweight, None


@defect(
    "third_order",
    args=lambda r: (
        r(
            4,
        ),
    ),
    truth=torch.sin,
    shows=lambda call: third(call),
)
class SineWithAWrongThirdDerivative(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return _SineBackward.apply(g, *ctx.saved_tensors)


class _SineBackward(Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return g * x.cos()

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return v * x.cos(), -v * g * x.sin().detach()


def third(call: Call) -> bool:
    (x,) = call.args
    (d1,) = torch.autograd.grad(call.fn(x).sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad(d1.sum(), x, create_graph=True)
    d3 = torch.autograd.grad(d2.sum(), x, allow_unused=True)[0] if d2.requires_grad else None
    return d3 is None or not torch.allclose(d3, -x.cos())


# ---------------------------------------------------------------- forward mode


@defect(
    "forward_mode",
    "jacfwd",
    args=lambda r: (r(4, 3),),
    says="zero",
    truth=torch.tanh,
    shows=wrong_tangent,
)
class TanhTangentZero(Function):
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
        return torch.zeros_like(t)


@defect(
    "forward_mode",
    "jacfwd",
    args=lambda r: (r(4, 3),),
    says=r"constant factor 2|doubled",
    truth=torch.exp,
    shows=wrong_tangent,
)
class ExpTangentDoubled(Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * ctx.saved_tensors[0]


@defect(
    "forward_mode",
    "jacfwd",
    args=lambda r: (r(4, 3), r(2, 3)),
    says="zero|one path",
    truth=F.linear,
    shows=wrong_tangent,
)
class LinearTangentOfInputOnly(Function):
    @staticmethod
    def forward(x, weight):
        return x @ weight.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x

    @staticmethod
    def jvp(ctx, tx, tweight):
        return tx @ ctx.saved_tensors[1].T


@defect(
    "forward_mode",
    "jacfwd",
    args=lambda r: (r(4, 3),),
    says="zero",
    truth=lambda x: x.exp() * 2,
    shows=lambda call: not torch.func.jvp(call.fn, call.args, call.args)[1].any(),
)
def loses_tangents_where_no_gradient_is_required(x: Tensor) -> Tensor:
    """``requires_grad`` is False of a dual number: the forward goes where there is no tape."""
    return x.exp() * 2 if x.requires_grad else (x.detach().exp() * 2)
