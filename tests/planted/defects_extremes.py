"""Wrong at some values only: extremes, ties and kinks."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, defect

# ---------------------------------------------------------------- extremes


def gradient_at(call: Call, *values: float) -> Tensor:
    x = torch.tensor(values, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(call.fn(x).sum(), x)[0]


@defect(
    "extremes",
    args=lambda r: (r(4, 5),),
    truth=F.softplus,
    shows=lambda call: bool(gradient_at(call, 1000.0).isnan().any()),
)
class SoftplusSlopeOverflows(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() / (1 + x.exp())


@defect(
    "extremes",
    args=lambda r: (r(4, 5),),
    truth=lambda x: x.logsumexp(-1),
    shows=lambda call: bool(gradient_at(call, 1000.0, 1.0).isnan().any()),
)
class LogSumExpSlopeNotShifted(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        e = x.exp()
        return g.unsqueeze(-1) * e / e.sum(-1, keepdim=True)


@defect(
    "extremes",
    args=lambda r: (r(6), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)),
    truth=lambda x, target: F.binary_cross_entropy_with_logits(x, target, reduction="none"),
    shows=lambda call: (
        not torch.allclose(
            _with_target(call, 50.0),
            torch.tensor([-torch.sigmoid(torch.tensor(-50.0)).item()]).double(),
            atol=0,
        )
    ),
)
class BinaryCrossEntropyThroughProbabilities(Function):
    """1 / p (1 - p) of a saturated sigmoid: 0 / 0."""

    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return F.binary_cross_entropy_with_logits(x, target, reduction="none")

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        p = x.sigmoid()
        return g * ((1 - target) / (1 - p) - target / p) * p * (1 - p), None


def _with_target(call: Call, value: float) -> Tensor:
    x = torch.tensor([value], dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(
        call.fn(x, torch.zeros_like(x) if value > 50 else torch.ones_like(x)).sum(), x
    )[0]


@defect(
    "extremes",
    "ties",
    args=lambda r: (r.positive(3, 4),),
    truth=lambda x: x.cumprod(1),
    shows=lambda call: bool(_cumprod_at_zero(call).isnan().any()),
)
class CumulativeProductDividesByItsInput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.cumprod(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (g * y).flip(-1).cumsum(-1).flip(-1) / x


def _cumprod_at_zero(call: Call) -> Tensor:
    return gradient_at(call, 2.0, 0.0, 3.0)


@defect(
    "extremes",
    "ties",
    args=lambda r: (r(4, 5),),
    truth=lambda x: x.norm(dim=-1),
    shows=lambda call: bool(gradient_at(call, 0.0, 0.0).isnan().any()),
)
class NormIsNanAtZero(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.norm(dim=-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return (g / y).unsqueeze(-1) * x


@defect(
    "extremes",
    "ties",
    args=lambda r: (r(4, 5),),
    truth=lambda x: x.abs().pow(1.5),
    shows=lambda call: bool(gradient_at(call, 0.0).isnan().any()),
)
class PowerDividesByItsInput(Function):
    """0 * inf, for 1.5 sign(x) |x|^0.5."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs().pow(1.5)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 1.5 * x.abs().pow(1.5) * (1 / x)


# ---------------------------------------------------------------- ties and kinks


@defect(
    "ties",
    args=lambda r: (r(4, 5),),
    says="only at ties",
    truth=lambda x: x.amax(-1),
    shows=lambda call: float(gradient_at(call, 1.0, 1.0, 0.0).sum()) == 2,
)
class MaximumGivesOneToEveryTie(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g.unsqueeze(-1) * (x == y.unsqueeze(-1))


@defect(
    "ties",
    args=lambda r: (r(6),),
    says="only at ties",
    truth=lambda x: x.sort().values,
    shows=lambda call: not torch.equal(_sort_gradient(call), torch.tensor([2.0, 4.0, 3.0]).double()),
)
class SortFindsItsElementsByValue(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sort(-1).values
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return ((x.unsqueeze(-1) == y.unsqueeze(-2)) * g.unsqueeze(-2)).sum(-1)


def _sort_gradient(call: Call) -> Tensor:
    x = torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(call.fn(x), x, torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))[0]


@defect(
    "ties",
    args=lambda r: (r(4, 5),),
    says="only at ties",
    truth=torch.abs,
    shows=lambda call: abs(float(gradient_at(call, 0.0))) > 1,
)
class AbsoluteValueWithSlopeFiveAtZero(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x == 0, 5.0, x.sign())


@defect(
    "ties",
    "extremes",
    args=lambda r: (r(4, 5),),
    truth=torch.relu,
    shows=lambda call: bool(gradient_at(call, 0.0).isnan()),
)
class ReluDividesByItsInput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.relu()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y / x


@defect(
    "ties",
    args=lambda r: (r(2, 8),),
    says="only at ties",
    truth=lambda x: F.max_pool1d(x, 2),
    shows=lambda call: float(_pool_gradient(call).sum()) == 2,
)
class MaxPoolGivesAWindowsTiesBoth(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.unfold(-1, 2, 2).amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        n = 2 * y.shape[-1]
        dx = g.repeat_interleave(2, -1) * (x[..., :n] == y.repeat_interleave(2, -1))
        return F.pad(dx, (0, x.shape[-1] - n))


def _pool_gradient(call: Call) -> Tensor:
    return gradient_at(call, 1.0, 1.0)


@defect(
    "ties",
    args=lambda r: (r(4, 5), r(4, 5)),
    says="only at ties",
    truth=torch.maximum,
    shows=lambda call: _both_at_tie(call),
)
class MaximumOfTwoGivesNeitherATie(Function):
    """Both comparisons strict: at a tie neither argument gets a gradient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.maximum(a, b)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * (a > b), g * (b > a)


def _both_at_tie(call: Call) -> bool:
    a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return all(not d.any() for d in torch.autograd.grad(call.fn(a, b).sum(), (a, b)))


@defect(
    "extremes",
    args=lambda r: (r(4, 5),),
    truth=F.mish,
    shows=lambda call: bool(gradient_at(call, -800.0, 800.0).isnan().any()),
)
class MishSlopeAsARatioOfPolynomialsInExp(Function):
    """The memory-efficient form, e^x (4 (x + 1) + 4 e^2x + e^3x + e^x (4 x + 6)) / (2 e^x + e^2x + 2)^2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.mish(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        e = x.exp()
        omega = 4 * (x + 1) + 4 * e**2 + e**3 + e * (4 * x + 6)
        return g * e * omega / (2 * e + e**2 + 2) ** 2
