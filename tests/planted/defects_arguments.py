"""Wrong for some arguments only: layouts, requires_grad subsets, unused outputs, the same input twice, aliases."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, defect, raises


def as_contiguous(t: Tensor) -> Tensor:
    """What a kernel sees that is given ``t.data_ptr()`` and takes t for contiguous; zeros beyond the memory."""
    storage = torch.empty(0, dtype=t.dtype).set_(
        t.untyped_storage(), 0, (t.untyped_storage().nbytes() // t.itemsize,)
    )
    flat = storage[t.storage_offset() :]
    return F.pad(flat, (0, max(0, t.numel() - len(flat))))[: t.numel()].view(t.shape)


def ignores_offset(t: Tensor) -> Tensor:
    """As a kernel that reads the strides, but from the start of the storage."""
    return t.detach().as_strided(t.shape, t.stride(), 0)


def differs(call: Call, grad_output: Tensor) -> bool:
    """Is the gradient another one than for a contiguous copy of the same grad_output?"""
    wanted = call.wanted()
    given = torch.autograd.grad(call(), wanted, grad_output)
    right = torch.autograd.grad(call(), wanted, grad_output.clone(memory_format=torch.contiguous_format))
    return any(not torch.allclose(a, b) for a, b in zip(given, right, strict=True))


def transposed(*shape: int) -> Tensor:
    return torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))


def differs_for_input(call: Call, x: Tensor) -> bool:
    """Is the gradient of the first argument another one than for a contiguous copy of it?"""

    def gradient(x: Tensor) -> Tensor:
        y = call.fn(x, *call.args[1:])
        return torch.autograd.grad(y, x, torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))[0]

    right = gradient(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_())
    return not torch.allclose(gradient(x.detach().requires_grad_()), right)


# ---------------------------------------------------------------- layout of grad_output


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 5),),
    says="only for",
    truth=torch.tanh,
    shows=lambda call: differs(call, transposed(4, 5)),
)
class TanhReadsGradOutputAsContiguous(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return as_contiguous(g) * (1 - y * y)


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 6), r(6)),
    says="only for",
    truth=lambda x, w: F.rms_norm(x, (6,), w, 1e-6),
    shows=lambda call: differs(call, torch.ones((), dtype=torch.float64).expand(4, 6)),
)
class RmsNormTakesExpandedGradOutputForDense(Function):
    """Any dense layout is copied; stride 0, as ``.sum()`` sends it, is not thought of."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, rstd, weight)
        return x * rstd * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, rstd, weight = ctx.saved_tensors
        g = as_contiguous(g) if 0 in g.stride() else g
        z = x * rstd
        dz = g * weight
        return rstd * (dz - z * (dz * z).mean(-1, keepdim=True)), (g * z).sum(0)


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 5), r(3, 5)),
    says="only for",
    truth=F.linear,
    shows=lambda call: differs(call, torch.randn(6, 3, dtype=torch.float64)[2:]),
)
class LinearIgnoresOffsetOfGradOutput(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g = ignores_offset(g) if g.storage_offset() else g
        return g @ weight, g.T @ x


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 5), r(4)),
    truth=lambda x, b: x + b[:, None],
    shows=lambda call: raises(lambda: torch.autograd.grad(call(), call.wanted(), transposed(4, 5))),
)
class RowBiasViewsGradOutput(Function):
    """Loud, but only in backward: ``view`` of what is not contiguous."""

    @staticmethod
    def forward(ctx, x, bias):
        return x + bias[:, None]

    @staticmethod
    def backward(ctx, g):
        return g.clone(), g.view(-1).view(g.shape).sum(1)


@defect(
    "grad_output_layout",
    args=lambda r: (r(2, 3, 4, 4), r(3)),
    says="only for",
    truth=lambda x, w: x * w[:, None, None],
    shows=lambda call: differs(
        call, torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    ),
)
class ChannelScaleReadsChannelsLastAsContiguous(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight[:, None, None]

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if g.is_contiguous(memory_format=torch.channels_last) and not g.is_contiguous():
            g = as_contiguous(g)
        return g * weight[:, None, None], (g * x).sum((0, 2, 3))


# ---------------------------------------------------------------- layout of inputs


@defect(
    "input_layout",
    args=lambda r: (r(4, 5),),
    says="only for",
    truth=F.gelu,
    shows=lambda call: differs_for_input(call, transposed(4, 5)),
)
class GeluReadsItsSavedInputAsContiguous(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x = as_contiguous(ctx.saved_tensors[0])
        cdf = (1 + torch.erf(x * 0.5**0.5)) / 2
        return g * (cdf + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5)


@defect(
    "input_layout",
    args=lambda r: (r(5, 4),),
    truth=lambda x: x.square().sum(0),
    shows=lambda call: raises(lambda: differs_for_input(call, transposed(5, 4))),
)
class SquareSumViewsItsSavedInput(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum(0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2 * x.view(-1)).view(x.shape) * g


@defect(
    "input_layout",
    args=lambda r: (r(2, 3, 4, 4),),
    says="only for",
    truth=lambda x: x.softmax(1),
    shows=lambda call: differs_for_input(
        call, torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    ),
)
class SoftmaxOverChannelsTakesTheLastForChannelsLast(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(1)
        ctx.dim = 3 if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last) else 1
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(ctx.dim, keepdim=True))


@defect(
    "input_layout",
    args=lambda r: (r(4, 6),),
    says="only for",
    truth=lambda x: x.cumsum(1),
    shows=lambda call: differs_for_input(call, torch.randn(4, 12, dtype=torch.float64)[:, ::2]),
)
class CumulativeSumTakesAStrideForADimension(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.dim = 1 if x.stride(1) == 1 or x.shape[1] == 1 else 0
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, g):
        return g.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim)


# ---------------------------------------------------------------- requires_grad subsets


def subset(call: Call, *indices: int) -> list[Tensor | None]:
    """The gradients of those arguments, when they alone require one."""
    args = [a.detach().requires_grad_(i in indices) for i, a in enumerate(call.args)]
    y = call.fn(*args)
    return list(torch.autograd.grad(y.sum(), [args[i] for i in indices], allow_unused=True))


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(4, 5), r(3, 5), r(3)),
    truth=F.linear,
    shows=lambda call: subset(call, 1, 2)[0] is None,
)
class LinearAsksAboutInputForWeight(Function):
    """With frozen features, as in the first layer, the weight is silently not trained."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx, dweight = g @ weight, g.T @ x
        return dx, dweight, g.sum(0)


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(4, 5), r(5), r(5)),
    truth=lambda x, w, b: F.layer_norm(x, (5,), w, b),
    shows=lambda call: raises(lambda: subset(call, 0)),
)
class LayerNormNeedsItsWeightTrained(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        z = (x - x.mean(-1, keepdim=True)) * rstd
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(z, rstd, weight)
        return z * weight + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        z, rstd, weight = ctx.saved_tensors
        dz = g * weight
        dx = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
        return dx, (g * z).sum(0), g.sum(0)


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(4, 3), r(3, 5), r(5, 2)),
    truth=lambda x, a, b: 2 * (x @ a @ b),
    shows=lambda call: not torch.allclose(subset(call, 1)[0], subset(call, 0, 1, 2)[1]),
)
class AdapterScalesOnlyWhenBothFactorsAreTrained(Function):
    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(x, a, b)
        return 2 * (x @ a @ b)

    @staticmethod
    def backward(ctx, g):
        x, a, b = ctx.saved_tensors
        db = None
        if ctx.needs_input_grad[2]:
            g = 2 * g
            db = (x @ a).T @ g
        return g @ b.T @ a.T, x.T @ (g @ b.T), db


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(6, 4), r(4), r(4)),
    truth=lambda x, w, b: x * w + b,
    shows=lambda call: raises(lambda: subset(call, 0, 1)),
)
class AffineUnpacksWhatItDidNotSave(Function):
    @staticmethod
    def forward(x, weight, bias):
        return x * weight + bias

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.with_bias = bias.requires_grad
        ctx.save_for_backward(x, weight) if bias.requires_grad else ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0), g.sum(0)


# ---------------------------------------------------------------- several outputs


@defect(
    "partial_outputs",
    args=lambda r: (r(4, 5),),
    truth=lambda x: (x.sin(), x.cos()),
    shows=lambda call: raises(lambda: torch.autograd.grad(call()[0].sum(), call.args)),
)
class SineAndCosineNeedBothGradients(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g_sin, g_cos):
        (x,) = ctx.saved_tensors
        return g_sin * x.cos() - g_cos * x.sin()


@defect(
    "partial_outputs",
    args=lambda r: (r(4, 5),),
    truth=lambda x: (x.mean(1), x.std(1)),
    shows=lambda call: (
        not torch.autograd.grad(call()[1].sum(), call.args, allow_unused=True, materialize_grads=True)[
            0
        ].any()
    ),
)
class MeanAndDeviationDropAllWhenTheMeanIsUnused(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.mean(1), x.std(1)

    @staticmethod
    def backward(ctx, g_mean, g_std):
        (x,) = ctx.saved_tensors
        if g_mean is None:
            return None
        n = x.shape[1]
        dx = (g_mean / n).unsqueeze(1).expand_as(x)
        if g_std is not None:
            dx = dx + (g_std / x.std(1) / (n - 1)).unsqueeze(1) * (x - x.mean(1, keepdim=True))
        return dx


# ---------------------------------------------------------------- f(x, x), aliases


def _twice(call: Call) -> bool:
    """f(x, x): is the gradient another one than the sum of the two of f(x, copy of x)?"""
    x = call.args[0]
    y = call.fn(x, x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    copy = x.detach().clone().requires_grad_()
    return not torch.allclose(dx, sum(torch.autograd.grad(call.fn(x, copy).sum(), (x, copy))))


@defect(
    "same_input",
    args=lambda r: (r(4, 3), r(4, 3)),
    truth=torch.mul,
    shows=_twice,
)
class ProductKeepsOneOfTwoEqualInputs(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.same = a.data_ptr() == b.data_ptr()
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, None if ctx.same else g * a


@defect(
    "same_input",
    args=lambda r: (r(3, 4), r(3, 4)),
    truth=lambda a, b: (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)),
    shows=_twice,
)
class CosineSimilarityTakesEqualInputsForConstants(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.detached = a is b
        ctx.save_for_backward(a, b)
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        if ctx.detached:
            return g.unsqueeze(1) * a, g.unsqueeze(1) * b
        na, nb = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
        ua, ub, g = a / na, b / nb, g.unsqueeze(1)
        c = (ua * ub).sum(1, keepdim=True)
        return g * (ub - c * ua) / na, g * (ua - c * ub) / nb


def _shares(call: Call) -> bool:
    memory = {t.untyped_storage().data_ptr() for t in call.wanted()}
    return any(y.untyped_storage().data_ptr() in memory for y in call())


@defect(
    "aliasing",
    "mutation",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x * 1,
    shows=_shares,
)
class IdentityReturnsTheMemoryOfItsInput(Function):
    """Not as a view, which autograd would track: an in-place step on the output changes the input unseen."""

    @staticmethod
    def forward(ctx, x):
        return x.data

    @staticmethod
    def backward(ctx, g):
        return g.clone()


_BUFFERS: dict[torch.Size, Tensor] = {}


@defect(
    "interleaving",
    "aliasing",
    "repeat",
    "mutation",
    args=lambda r: (r(4, 3),),
    says="overwritten|stale",
    truth=torch.exp,
    shows=lambda call: call.fn(call.args[0]).data_ptr() == call.fn(call.args[0] + 1).data_ptr(),
)
class ExpReturnsTheSameBufferEachTime(Function):
    """The second call overwrites the first one's output."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        if x.shape not in _BUFFERS or _BUFFERS[x.shape].dtype != x.dtype:
            _BUFFERS[x.shape] = torch.empty_like(x)
        return torch.exp(x.detach(), out=_BUFFERS[x.shape]).detach()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


_GRADIENTS: dict[torch.Size, Tensor] = {}


@defect(
    "retain_graph",
    "repeat",
    "interleaving",
    "aliasing",
    "mutation",
    args=lambda r: (r(4, 3),),
    says="overwritten|stale",
    truth=torch.square,
    shows=lambda call: (
        torch.autograd.grad(call.fn(call.args[0]).sum(), call.args)[0].data_ptr()
        == torch.autograd.grad(call.fn(call.args[0]).sum(), call.args)[0].data_ptr()
    ),
)
class SquareReturnsTheSameGradientBuffer(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if x.shape not in _GRADIENTS or _GRADIENTS[x.shape].dtype != x.dtype:
            _GRADIENTS[x.shape] = torch.empty_like(x)
        return torch.mul(g, 2 * x, out=_GRADIENTS[x.shape])


# ---------------------------------------------------------------- outputs without a gradient


@defect(
    "output_requires_grad",
    args=lambda r: (r(4, 5), r(3, 5)),
    shows=lambda call: not call()[0].requires_grad,
)
def linear_through_numpy(x: Tensor, weight: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)


@defect(
    "output_requires_grad",
    args=lambda r: (r(4, 5),),
    shows=lambda call: not call()[0].requires_grad,
)
class TanhMarksItsOutputNonDifferentiable(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.mark_non_differentiable(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


@defect(
    "first_order",
    "output_requires_grad",
    args=lambda r: (r(4, 5), r(5)),
    says="zero|one path|no simple",
    truth=lambda x, w: (x * w).softmax(1),
)
def normalised_by_a_detached_sum(x: Tensor, weight: Tensor) -> Tensor:
    e = (x * weight).exp()
    return e / e.sum(1, keepdim=True).detach()


@defect(
    "requires_grad_subsets",
    "output_requires_grad",
    args=lambda r: (r(4, 5), r(3, 5)),
    truth=F.linear,
    shows=lambda call: not call.fn(call.args[0].detach(), call.args[1]).requires_grad,
)
def linear_without_tape_for_frozen_features(x: Tensor, weight: Tensor) -> Tensor:
    with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
        return x @ weight.T
