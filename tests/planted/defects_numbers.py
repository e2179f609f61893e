"""Wrong for some sizes, dtypes or values only: thresholds, empty batches, half precision, extremes, ties."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, defect, raises


def off(call: Call, *args: Tensor, tolerance: float = 1e-6) -> bool:
    """Is the gradient for these arguments another one than torch's, in truth or in float64?  Or does it fail?"""
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
    wanted = [a for a in leaves if a.requires_grad]
    return raises(
        lambda: _must_agree(
            torch.autograd.grad(call.fn(*leaves).double().sum(), wanted),
            torch.autograd.grad(call.truth(*leaves).double().sum(), wanted),
            tolerance,
        )
    )


def _must_agree(given: tuple[Tensor, ...], right: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(given, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- sizes


@defect(
    "sizes",
    args=lambda r: (r(3, 4),),
    says="beyond size 256",
    truth=torch.tanh,
    shows=lambda call: off(call, torch.ones(300, 2, dtype=torch.float64)),
)
class TanhDropsTheTailBeyondABlockOf256(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        n = y.numel()
        whole = n if n <= 256 else n - n % 256
        dx = (g * (1 - y * y)).reshape(-1)
        return torch.where(torch.arange(n) < whole, dx, 0.0).view_as(y)


@defect(
    "sizes",
    args=lambda r: (r(3, 4),),
    says="beyond size 1024",
    truth=lambda x: x.softmax(-1),
    shows=lambda call: off(call, torch.arange(1100, dtype=torch.float64).sin().expand(2, 1100)),
)
class SoftmaxSumsItsFirst1024ColumnsOnly(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y)[..., :1024].sum(-1, keepdim=True))


@defect(
    "sizes",
    args=lambda r: (r(7, 3), r(3)),
    says="beyond size (256|255)",
    truth=torch.add,
    shows=lambda call: off(call, torch.ones(300, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)),
)
class BiasCountsItsRowsInAByte(Function):
    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, g):
        rows = int(torch.tensor(g.numel() // max(1, g.shape[-1])).to(torch.uint8))
        return g.clone(), g.reshape(-1, g.shape[-1])[:rows].sum(0)


@defect(
    "sizes",
    args=lambda r: (r(7),),
    says="beyond size (65536|32768|32767|65535)",
    truth=torch.square,
    shows=lambda call: off(call, torch.ones(70_000, dtype=torch.float64)),
)
class SquareIndexesBySixteenBits(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        at = torch.arange(x.numel()) % 2**16
        return (2 * x * g).reshape(-1).mul(torch.arange(x.numel()) == at).view_as(x)


@defect(
    "sizes",
    args=lambda r: (r(4, 5), r(5)),
    truth=lambda x, w: x @ w,
    shows=lambda call: off(call, torch.ones(1, 5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)),
)
class MatrixVectorSqueezesASingleRow(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.squeeze()
        return torch.einsum("n,i->ni", g, w), x.T @ g


@defect(
    "sizes",
    args=lambda r: (r(6),),
    truth=torch.exp,
    shows=lambda call: off(call, torch.ones((), dtype=torch.float64)),
)
class ExpLoopsOverTheFirstDimension(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.stack([g[i] * y[i] for i in range(len(y))])


@defect(
    "sizes",
    args=lambda r: (r(4, 6),),
    truth=lambda x: x.square().mean(),
    shows=lambda call: off(call, torch.ones(7, dtype=torch.float64)),
)
class MeanSquareHalvesAnOddCount(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x / max(1, x.numel() // 2)


@defect(
    "zero_size",
    args=lambda r: (r(4, 3), r(2, 3)),
    truth=F.linear,
    shows=lambda call: off(
        call, torch.ones(0, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    ),
)
class LinearGradientIsNanForAnEmptyBatch(Function):
    """The mean over rows, times their number."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, (g[..., :, None] * x[..., None, :]).mean(0) * len(x)


@defect(
    "zero_size",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x.square().sum(),
    shows=lambda call: off(call, torch.ones(0, 3, dtype=torch.float64)),
)
class SumOfSquaresAsksForTheLargestOfNone(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scale = x.abs().max().clamp(min=1e-300)
        return g * 2 * (x / scale) * scale


# ---------------------------------------------------------------- dtypes


@defect(
    "dtypes",
    "first_order",
    args=lambda r: (r(6, 5),),
    truth=lambda x: F.leaky_relu(x, 0.3),
    shows=lambda call: off(call, torch.tensor([-1.0, 2.0], dtype=torch.float64), tolerance=1e-10),
)
class LeakyReluSlopesInFloat32(Function):
    """torch.where of two Python numbers is float32: off by 1e-9 in float64."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x > 0, 1.0, 0.3)


@defect(
    "dtypes",
    args=lambda r: (r.positive(1000, 8), r(8)),
    says="only in",
    truth=lambda x, w: x * w,
    shows=lambda call: accumulates(call),
)
class ScaleAccumulatesInHalfPrecision(Function):
    """Row by row: each of a thousand additions rounds to the sum's precision."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dweight = torch.zeros_like(weight)
        for row in (g * x).unbind(0):
            dweight = dweight + row
        return g * weight, dweight


def accumulates(call: Call) -> bool:
    def weight_gradient(dtype: torch.dtype) -> Tensor:
        x, w = (a.detach().to(torch.bfloat16).to(dtype).requires_grad_() for a in call.args)
        return torch.autograd.grad(call.fn(x, w).double().sum(), w)[0].double()

    right = weight_gradient(torch.float64)
    return bool((weight_gradient(torch.bfloat16) - right).abs().max() > 4 * right.abs().max() * 2**-8)


@defect(
    "dtypes",
    "extremes",
    args=lambda r: (r(4, 6),),
    says="only in",
    truth=lambda x: F.normalize(x, dim=1, eps=1e-12),
    shows=lambda call: not _half_gradient(call, torch.arange(6.0)[None]).any(),
)
class NormalizeOverflowsInHalfPrecision(Function):
    """The sum of squares, at full scale in float16: 256^2 > 65504."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.normalize(x.double(), dim=1).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scale = 256.0 if x.dtype == torch.float16 else 1.0
        norm = ((x * scale).square().sum(1, keepdim=True)).sqrt() / scale
        y = x / norm
        return (g - y * (g * y).sum(1, keepdim=True)) / norm


def _half_gradient(call: Call, x: Tensor) -> Tensor:
    x = x.half().requires_grad_()
    return torch.autograd.grad(call.fn(x).float().sum(), x)[0]


@defect(
    "dtypes",
    args=lambda r: (r(4, 5),),
    says="only in",
    truth=torch.sigmoid,
    shows=lambda call: _wrong_in_half(call),
)
class SigmoidScalesItsGradientBeyondHalf(Function):
    """Scaled up against underflow, by what float16 cannot hold."""

    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return (g * 2.0**17) * (y * (1 - y)) / 2.0**17


def _wrong_in_half(call: Call) -> bool:
    return not _half_gradient(call, torch.zeros(3)).isfinite().all()


@defect(
    "dtypes",
    args=lambda r: (r(4, 5),),
    truth=torch.exp,
    shows=lambda call: off(call, torch.ones(3)),
    says="only in",
)
class ExpTakesFloat32ForFloat64(Function):
    """A dispatch table with a typo: float32 runs the kernel of another function."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y if y.dtype != torch.float32 else g * torch.special.expm1(y)


@defect(
    "dtypes",
    args=lambda r: (r(4, 5), r(3, 5)),
    truth=F.linear,
    shows=lambda call: off(call, torch.ones(2, 5).bfloat16(), torch.ones(3, 5).bfloat16()),
)
class LinearMixesItsDtypesInBackward(Function):
    """float32 accumulation is right; the cast back is forgotten before the second product."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if g.dtype in (torch.float16, torch.bfloat16):
            g = g.float()
        return g @ weight, g.T @ x


@defect(
    "autocast",
    args=lambda r: (r(4, 5), r(3, 5)),
    truth=F.linear,
    shows=lambda call: autocast_fails(call),
    declare={"autocast": True},  # otherwise a limit: it raises
)
class LinearMeetsAutocastInForwardOnly(Function):
    """forward runs under autocast, backward does not: bfloat16 grad_output times float32 weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


def autocast_fails(call: Call) -> bool:
    args = [a.detach().float().requires_grad_() for a in call.args]
    with torch.autocast("cpu", torch.bfloat16):
        y = call.fn(*args)
    return raises(lambda: torch.autograd.grad(y.float().sum(), args))


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
