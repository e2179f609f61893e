"""Right Functions and callables of our own writing, each near to a defect of the other files."""

import math
from typing import Any

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


# ---------------------------------------------------------------- softmax, norms


@control("first_order", "extremes", "dtypes", args=lambda r: (r(4, 5),))
class Softmax(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(-1, keepdim=True))


@control(
    "sizes",
    "first_order",
    "dtypes",
    args=lambda r: (r(4, 6), r(6), r(6)),
    accept={"output_requires_grad": "mean and deviation are there for a fused backward"},
)
class LayerNorm(Function):
    """Saves the row's mean and deviation as further, non-differentiable outputs."""

    @staticmethod
    def forward(x, weight, bias):
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        return (x - mean) * rstd * weight + bias, mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, g, _mean, _rstd):
        x, weight = ctx.saved_tensors
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        z = (x - mean) * rstd
        dz = g * weight
        dx = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
        rows = tuple(range(g.dim() - 1))
        return dx, (g * z).sum(rows) if rows else g * z, g.sum(rows) if rows else g


@control("sizes", "ties", "extremes", args=lambda r: (r(4, 6), r(6)))
class RmsNorm(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        z = x * rstd
        dz = g * weight
        return rstd * (dz - z * (dz * z).mean(-1, keepdim=True)), (g * z).reshape(-1, x.shape[-1]).sum(0)


@control("first_order", "input_layout", "grad_output_layout", args=lambda r: (r(3, 4, 2, 2), r(4), r(4)))
class GroupNorm(Function):
    """Two groups; statistics over each group's channels and positions."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.group_norm(x, 2, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        grouped = (x.shape[0], 2, x.shape[1:].numel() // 2)
        rows = x.reshape(grouped)
        rstd = (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        z = (rows - rows.mean(-1, keepdim=True)) * rstd
        dz = (g * weight[:, None, None]).reshape(grouped)
        dx = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
        return dx.view(x.shape), (g * z.view(x.shape)).sum((0, 2, 3)), g.sum((0, 2, 3))


# ---------------------------------------------------------------- losses


@control(
    "first_order", "extremes", "linearity", args=lambda r: (r(6, 4), torch.tensor([0, 1, -100, 2, -100, 3]))
)
class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return F.cross_entropy(x, target)

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        kept = (target != -100).unsqueeze(1)
        onehot = F.one_hot(target.clamp(min=0), x.shape[1])
        return g / kept.sum() * kept * (x.softmax(1) - onehot), None


@control("ties", "first_order", "same_input", args=lambda r: (r(4, 3), r(4, 3)))
class AbsoluteError(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return (x - target).abs().mean()

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        d = g * (x - target).sign() / x.numel()
        return d, -d


# ---------------------------------------------------------------- gather, scatter, pooling, cumulative


@control("first_order", "requires_grad_subsets", args=lambda r: (torch.tensor([1, 3, 1, 0, 1]), r(4, 3)))
class Embedding(Function):
    @staticmethod
    def forward(ctx, index, weight):
        ctx.save_for_backward(index)
        ctx.rows = len(weight)
        return weight[index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return None, g.new_zeros(ctx.rows, g.shape[-1]).index_add(0, index, g)


@control("first_order", args=lambda r: (r(3, 5), torch.tensor([[0, 0, 1], [4, 2, 4], [3, 3, 3]])))
class Gather(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(1, index)

    @staticmethod
    def backward(ctx, g):
        return g.new_zeros(ctx.shape).scatter_add(1, ctx.saved_tensors[0], g), None


@control("ties", "first_order", "partial_outputs", args=lambda r: (r(2, 9),))
class MaxPoolWithIndices(Function):
    """The first of a window's ties gets all; the indices are an integer output."""

    @staticmethod
    def forward(ctx, x):
        y, at = x.unfold(1, 3, 1).max(-1)
        at = at + torch.arange(y.shape[1])
        ctx.mark_non_differentiable(at)
        ctx.save_for_backward(at)
        ctx.width = x.shape[1]
        return y, at

    @staticmethod
    def backward(ctx, g, _):
        (at,) = ctx.saved_tensors
        return g.new_zeros(len(g), ctx.width).scatter_add(1, at, g)


@control("ties", "first_order", args=lambda r: (r(4, 5),))
class MaximumSharedByTies(Function):
    """Each of k ties gets 1/k, as torch.amax."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        ties = (x == y.unsqueeze(-1)).to(g.dtype)
        return g.unsqueeze(-1) * ties / ties.sum(-1, keepdim=True)


@control("ties", "first_order", args=lambda r: (r(6),))
class SortByIndex(Function):
    @staticmethod
    def forward(ctx, x):
        y, at = x.sort(-1)
        ctx.save_for_backward(at)
        return y

    @staticmethod
    def backward(ctx, g):
        (at,) = ctx.saved_tensors
        return g.gather(-1, at.argsort(-1))


@control("sizes", "zero_size", "first_order", args=lambda r: (r(3, 5),))
class CumulativeSum(Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(-1)

    @staticmethod
    def backward(ctx, g):
        return g.flip(-1).cumsum(-1).flip(-1)


@control("first_order", args=lambda r: (r(2, 3, 6, 6), r(4, 3, 3, 3)))
class ConvolutionByUnfolding(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        columns = F.unfold(x, weight.shape[2:])  # (N, C K K, H W)
        side = x.shape[2] - weight.shape[2] + 1
        return (weight.flatten(1) @ columns).unflatten(-1, (side, -1))

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        columns = F.unfold(x, weight.shape[2:])
        dweight = (g.flatten(2) @ columns.mT).sum(0).reshape(weight.shape)
        dx = F.fold(weight.flatten(1).T @ g.flatten(2), x.shape[2:], weight.shape[2:])
        return dx, dweight


@control("first_order", "requires_grad_subsets", args=lambda r: (r(2, 5, 4), r(2, 6, 4), r(2, 6, 3)))
class Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        c = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * c).softmax(-1)
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * c
        return ds @ k, ds.mT @ q, p.mT @ g


# ---------------------------------------------------------------- several outputs, structures


@control("partial_outputs", "first_order", args=lambda r: (r(4, 5),))
class SineAndCosine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g_sin, g_cos):
        (x,) = ctx.saved_tensors
        dx = None if g_sin is None else g_sin * x.cos()
        if g_cos is None:
            return dx
        return -g_cos * x.sin() if dx is None else dx - g_cos * x.sin()


@control("aliasing", "mutation", "output_requires_grad", args=lambda r: (r(4, 6),))
def halves_as_views(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, 1)
    return a, b


@control(
    "partial_outputs",
    "output_requires_grad",
    args=lambda r: (r(4, 6),),
    accept={"output_requires_grad": "the mean is there to be looked at"},
)
def outputs_in_a_dictionary(x: Tensor) -> dict[str, Any]:
    return {"logits": x.tanh(), "argmax": x.argmax(1), "parts": [x.exp(), (x.sin(), x.detach())]}


@control("requires_grad_subsets", "first_order", args=lambda r: ([r(4, 3), r(4, 2)],))
def concatenation_of_a_list(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1).tanh()


@control("aliasing", "mutation", args=lambda r: (r(4, 6),))
class IdentityAsAView(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g


@control("zero_size", "sizes", "first_order", args=lambda r: (r(4, 6),))
class MeanSquare(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x / max(1, x.numel())


@control("compile", "vmap", "func_grad", args=lambda r: (r(4, 3),))
def scaled_by_a_python_number(x: Tensor) -> Tensor:
    """``item()``: loudly impossible to batch, and a break in a compiled graph."""
    return x.tanh() * (2.0 if x.detach().sum().item() > -1e9 else 3.0)


@control("dtypes", "autocast", args=lambda r: (r(4, 3),))
def refuses_half_precision(x: Tensor) -> Tensor:
    if x.dtype.itemsize < 4:
        raise TypeError("float32 or float64, please")
    return x.sin()


@control("sizes", "zero_size", args=lambda r: (r(4, 6),))
def refuses_other_widths(x: Tensor) -> Tensor:
    if x.shape[-1:] != (6,) or not x.numel():
        raise ValueError("rows of 6, please")
    return x.sin().reshape(-1, 2, 3).sum(1)


# ---------------------------------------------------------------- random numbers, state


@control("random_state", "repeat", "checkpointing", args=lambda r: (r(6, 5),))
class DropoutThatKeepsItsMask(Function):
    @staticmethod
    def forward(ctx, x):
        mask = (torch.rand_like(x) < 0.5).to(x.dtype) * 2
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@control("random_state", "repeat", args=lambda r: (r(6, 5),))
class NoiseReplayedFromItsSeed(Function):
    """A generator of its own: the global one is untouched."""

    @staticmethod
    def forward(ctx, x):
        ctx.seed = 5
        ctx.save_for_backward(x)
        return x * _noise(x, ctx.seed)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * _noise(x, ctx.seed)


def _noise(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


@control("mutation", "interleaving", "saved_tensors", args=lambda r: (r(4, 3),))
class SquareWithAScratchBuffer(Function):
    """Scratch memory of its own, filled anew and never handed out."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scratch = torch.empty_like(x)
        scratch.copy_(x)
        return scratch.mul_(2) * g if not torch.is_grad_enabled() else 2 * x * g


@control("saved_bytes", args=lambda r: (r(16, 8),), saved_bytes=16 * 8 * 8)
class SigmoidKeepsItsOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


@control("saved_tensors", "leaks", args=lambda r: (r(4, 3),))
class PowerKeepsNumbersOnItsContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.exponent, ctx.shape, ctx.table = 3, x.shape, [1, 2, 3]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.exponent * x**2


@control("first_order", "linearity", args=lambda r: (r(3, 3),), reference=lambda x: (x.exp(), x.exp().sum()))
def value_with_its_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.exp()
    return y, y.sum()


@control("first_order", args=lambda r: (3 * r(4, 3),), accept={"first_order": "on purpose"})
class StraightThroughRoundDeclared(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


@control("first_order", args=lambda r: (r(4, 3),), accept={"first_order": "on purpose"})
class GradientReversalDeclared(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g
