"""Right functions in the manner of layers: softmax, norms, losses, gathering and pooling."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function

from planted._table import control

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
