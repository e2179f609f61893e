"""A wrong first derivative, one fault each: factor, sign, transposition, exchange, a path or a sum left out.

N rows, I inputs, O outputs, C channels, H height, W width, K window, S sequence, V entries of a table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import defect, raises

# ---------------------------------------------------------------- products


@defect(
    "first_order",
    args=lambda r: (r(5, 4), r(3, 4), r(3)),
    says=r"constant factor (0\.2|1/5).*mean",
    truth=F.linear,
)
class LinearWeightGradientIsMeanOverRows(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x / len(x), g.sum(0)


@defect(
    "first_order",
    args=lambda r: (r(6, 4), r(3, 4), r(3)),
    says=r"mean for sum",
    truth=F.linear,
)
class LinearBiasGradientIsMean(Function):
    @staticmethod
    def forward(x, weight, bias):
        return x @ weight.T + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x, g.mean(0)


@defect("first_order", args=lambda r: (r(4, 4), r(4, 4)), says="transposed", truth=torch.matmul)
class MatmulGradientTransposed(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g @ b.T, g.T @ a


@defect("first_order", args=lambda r: (r(4, 3), r(4, 3)), says="exchanged", truth=lambda a, b: a * b.exp())
class ProductGradientsExchanged(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b.exp()

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * a * b.exp(), g * b.exp()


@defect(
    "first_order",
    args=lambda r: (r(2, 3, 4, 5), r(3, 1, 1)),
    says="missing sum",
    truth=lambda x, scale: x * scale,
)
class ChannelScaleGradientWithoutSumOverBatch(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, (g * x)[0].sum((1, 2), keepdim=True)


@defect("first_order", args=lambda r: (r(4, 3), r(3)), says="missing sum", truth=torch.add)
class BiasGradientOfFirstRowOnly(Function):
    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, g):
        return g, g[0]


@defect(
    "first_order",
    args=lambda r: (r(4, 3), r(4, 2), r(6, 3, 2), r(6)),
    says="wrong sign",
    truth=lambda a, b, weight, bias: torch.einsum("ni,oij,nj->no", a, weight, b) - bias,
)
class BilinearBiasSubtractedWithGradientAdded(Function):
    @staticmethod
    def forward(ctx, a, b, weight, bias):
        ctx.save_for_backward(a, b, weight)
        return torch.einsum("ni,oij,nj->no", a, weight, b) - bias

    @staticmethod
    def backward(ctx, g):
        a, b, weight = ctx.saved_tensors
        da = torch.einsum("no,oij,nj->ni", g, weight, b)
        db = torch.einsum("no,oij,ni->nj", g, weight, a)
        return da, db, torch.einsum("no,ni,nj->oij", g, a, b), g.sum(0)


@defect("first_order", args=lambda r: (r(3, 4), r(2, 4)), says="zero", truth=F.linear)
class LinearWeightGetsNone(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[1], None


@defect(
    "first_order",
    "requires_grad_subsets",
    args=lambda r: (r(3, 4), r(2, 4), None),
    shows=lambda call: raises(call.gradients),
)
class LinearWithoutBiasCrashesInBackward(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return x @ weight.T if bias is None else x @ weight.T + bias

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        return g @ weight, g.T @ x, g.sum(0).to(bias.dtype)


# ---------------------------------------------------------------- elementwise


@defect("first_order", args=lambda r: (r(4, 3),), says="wrong sign", truth=torch.cos)
class CosineWrongSign(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cos()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sin()


@defect("first_order", args=lambda r: (r(4, 5),), truth=F.gelu)
class GeluExactWithSlopeOfTanhForm(Function):
    """Off by 4e-4 at most: gradcheck's default tolerance lets it pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].clamp(-20, 20)  # beyond, the slope is 0 or 1, and x^3 would overflow
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))


@defect(
    "first_order", args=lambda r: (r(4, 5),), says=r"constant factor 1\.0001", truth=lambda x: x.sigmoid()
)
class SigmoidOffByOneInTenThousand(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y) * 1.0001


@defect(
    "first_order", args=lambda r: (r(4, 5),), says="a detached factor: the output is x times", truth=F.silu
)
class SiluWithoutSlopeOfItsGate(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.sigmoid()


@defect(
    "first_order",
    args=lambda r: (r(6, 4),),
    says="one path",
    truth=lambda x: x + x.tanh(),
)
class ResidualPathDropped(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def weighted(x, weight):
    return weight * x.sin()


ONE_FOR_WEIGHT = (
    r"^this is the right gradient for weight = 1, as if weight were forgotten (?!.*(stale|overwr))"
)


@defect("first_order", args=lambda r: (r(3, 4), r(3, 4)), says=ONE_FOR_WEIGHT, truth=weighted)
class SineForgetsItsWeight(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return weighted(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, _ = ctx.saved_tensors
        return g * x.cos(), g * x.sin()


@defect("first_order", args=lambda r: (r(3, 4), r(3, 4)), says=ONE_FOR_WEIGHT, truth=weighted)
class SineOverwritesItsSavedWeight(Function):
    """The same numbers as of a forgotten weight: a diagnosis of either must be true of both."""

    @staticmethod
    def forward(ctx, x, weight):
        kept = weight.clone()
        ctx.save_for_backward(x, kept)
        kept.data.fill_(1)
        return weighted(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight * x.cos(), g * x.sin()


@defect("first_order", args=lambda r: (r(6, 4),), says="one path|grad_output", truth=lambda x: x + x.sin())
class ResidualPathCountedTwice(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x + x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g + g + g * x.cos()


@defect(
    "first_order", args=lambda r: (r(3, 4),), says="doubled|constant factor 2", truth=lambda x: 0.5 * x * x
)
class HalfSquareDoubled(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = g * x
        return dx + dx


@defect(
    "first_order",
    args=lambda r: (r(3, 4),),
    kwargs={"scale": 3.0},
    says=r"constant factor (0\.33|1/3)",
    truth=lambda x, scale: (x * scale).tanh(),
)
def scaled_tanh_forgets_its_keyword_in_backward(x: Tensor, scale: float = 1.0) -> Tensor:
    return _ScaledTanh.apply(x, scale)


class _ScaledTanh(Function):
    @staticmethod
    def forward(ctx, x, scale):
        y = (x * scale).tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y), None


@defect(
    "first_order",
    args=lambda r: (3 * r(40),),
    truth=lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
)
class HuberSlopeUnboundedBeyondDelta(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x.abs() < 1, 0.5 * x * x, x.abs() - 0.5)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x


# ---------------------------------------------------------------- grad_output


@defect(
    "first_order",
    "linearity",
    args=lambda r: (r(4, 3),),
    says="grad_output of ones",
    truth=lambda x: x * x,
)
class SquareIgnoresGradOutput(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0]


@defect(
    "linearity",
    "first_order",
    args=lambda r: (r(6, 4), r.index(4, 6)),
    says="grad_output of ones",
    truth=lambda x, target: F.cross_entropy(x, target, reduction="sum"),
)
class CrossEntropyGradientMadeInForward(Function):
    """Right under ``loss.backward()``; a loss that is weighted or scaled is not heard."""

    @staticmethod
    def forward(ctx, x, target):
        dx = x.softmax(1)
        dx[torch.arange(len(x)), target] -= 1
        ctx.save_for_backward(dx)
        return F.cross_entropy(x, target, reduction="sum")

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].clone(), None


@defect(
    "linearity",
    args=lambda r: (r(4, 3),),
    truth=torch.tanh,
    shows=lambda call: bool(
        torch.autograd.grad(call.fn(*call.args), call.args, torch.full((4, 3), 1e6, dtype=torch.float64))[
            0
        ].max()
        <= 1e3
    ),
)
class TanhClipsItsGradient(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return (g * (1 - y * y)).clamp(-1e3, 1e3)


@defect(
    "linearity",
    args=lambda r: (r(4, 3),),
    truth=torch.exp,
    shows=lambda call: not torch.autograd.grad(call.fn(*call.args).sum() * 1e-7, call.args)[0].any(),
)
class ExpFlushesSmallGradients(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return torch.where(g.abs() < 1e-5, 0.0, g) * ctx.saved_tensors[0]
