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
        norm = norm.where(norm > 0, torch.inf)  # a row of zeros gets no gradient
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
