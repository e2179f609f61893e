"""A wrong first derivative of a layer, one fault each: softmax, norms, losses, attention, gathering, several outputs.

N rows, I inputs, O outputs, C channels, H height, W width, K window, S sequence, V entries of a table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import defect, raises

# ---------------------------------------------------------------- softmax, norms


@defect("first_order", args=lambda r: (r(4, 5),), says="one path", truth=lambda x: x.softmax(-1))
class SoftmaxWithoutSumTerm(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@defect(
    "first_order", args=lambda r: (r(4, 5),), says="one path|grad_output", truth=lambda x: x.log_softmax(-1)
)
class LogSoftmaxWithoutSumTerm(Function):
    @staticmethod
    def forward(x):
        return x.log_softmax(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clone()


@defect(
    "first_order",
    args=lambda r: (r(4, 6), r(6), r(6)),
    says="one path",
    truth=lambda x, w, b: F.layer_norm(x, (6,), w, b),
)
class LayerNormWithoutMeanTerm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        z = (x - x.mean(-1, keepdim=True)) * rstd
        ctx.save_for_backward(z, rstd, weight)
        return z * weight + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        z, rstd, weight = ctx.saved_tensors
        dz = g * weight
        dx = rstd * (dz - z * (dz * z).mean(-1, keepdim=True))
        return dx, (g * z).sum(0), g.sum(0)


@defect(
    "first_order",
    args=lambda r: (r(5, 3), r(3), r(3)),
    says="one path",
    truth=lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
)
class BatchNormTakesStatisticsForConstants(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(0, unbiased=False) + 1e-5).rsqrt()
        z = (x - x.mean(0)) * rstd
        ctx.save_for_backward(z, rstd, weight)
        return z * weight + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        z, rstd, weight = ctx.saved_tensors
        return g * weight * rstd, (g * z).sum(0), g.sum(0)


@defect(
    "first_order",
    args=lambda r: (r(4, 6), r(6)),
    truth=lambda x, w: F.rms_norm(x, (6,), w, 1e-6),
)
class RmsNormWeightGradientFromRawInput(Function):
    @staticmethod
    def forward(ctx, x, weight):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, rstd, weight)
        return x * rstd * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, rstd, weight = ctx.saved_tensors
        z = x * rstd
        dz = g * weight
        return rstd * (dz - z * (dz * z).mean(-1, keepdim=True)), (g * x).sum(0)


@defect(
    "first_order",
    args=lambda r: (r(4, 3),),
    says="a detached factor: the output is x times",
    truth=lambda x: F.normalize(x, dim=1),
)
class NormalizeWithoutProjection(Function):
    @staticmethod
    def forward(ctx, x):
        norm = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(norm)
        return x / norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g / ctx.saved_tensors[0]


# ---------------------------------------------------------------- losses


@defect(
    "first_order",
    args=lambda r: (r(7, 4), r.index(4, 7)),
    says=r"constant factor 7",
    truth=F.cross_entropy,
)
class CrossEntropyForgetsItsMean(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return F.cross_entropy(x, target)

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        return g * (x.softmax(1) - F.one_hot(target, x.shape[1])), None


@defect(
    "first_order",
    args=lambda r: (r(6, 4), torch.tensor([0, 1, -100, 2, -100, 3])),
    says=r"constant factor (0\.66|2/3)",
    truth=F.cross_entropy,
)
class CrossEntropyDividesByIgnoredRows(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return F.cross_entropy(x, target)

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        kept = (target != -100).unsqueeze(1)
        return g / len(x) * kept * (x.softmax(1) - F.one_hot(target.clamp(min=0), x.shape[1])), None


@defect(
    "first_order",
    args=lambda r: (r(6, 4), torch.tensor([0, 1, -100, 2, -100, 3])),
    truth=lambda x, target: F.cross_entropy(x, target, reduction="sum"),
)
class CrossEntropyTrainsIgnoredRows(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return F.cross_entropy(x, target, reduction="sum")

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        return g * (x.softmax(1) - F.one_hot(target.clamp(min=0), x.shape[1])), None


@defect("first_order", args=lambda r: (r(4, 3), r(4, 3)), says="wrong sign", truth=F.mse_loss)
class MseTargetGradientOfTheSameSign(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        return (x - target).square().mean()

    @staticmethod
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        d = g * 2 * (x - target) / x.numel()
        return d, d


# ---------------------------------------------------------------- attention, convolution


@defect(
    "first_order",
    args=lambda r: (r(2, 5, 4), r(2, 6, 4), r(2, 6, 3)),
    says=r"constant factor 2",
    truth=lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v,
)
class AttentionForgetsItsScaleInBackward(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, p = ctx.saved_tensors
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        return ds @ k, ds.mT @ q, p.mT @ g


@defect(
    "first_order",
    args=lambda r: (r(2, 5, 4), r(2, 5, 4), r(2, 5, 3)),
    truth=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
)
class CausalAttentionWithoutMaskInBackward(Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        c = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * c).softmax(-1)
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * c
        return ds @ k, ds.mT @ q, p.mT @ g


@defect(
    "first_order",
    args=lambda r: (r(2, 3, 6, 6), r(4, 3, 3, 3)),
    truth=F.conv2d,
)
class ConvolutionWeightGradientFlipped(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        columns = F.unfold(x, weight.shape[2:])  # (N, C K K, H W)
        dweight = (g.flatten(2) @ columns.mT).sum(0).reshape(weight.shape)
        return F.conv_transpose2d(g, weight), dweight.flip(2, 3)


# ---------------------------------------------------------------- gather, scatter, pooling, cumulative


@defect(
    "first_order",
    args=lambda r: (torch.tensor([1, 3, 1, 0, 1]), r(4, 3)),
    truth=F.embedding,
)
class EmbeddingLosesRepeatedRows(Function):
    @staticmethod
    def forward(ctx, index, weight):
        ctx.save_for_backward(index, weight)
        return weight[index]

    @staticmethod
    def backward(ctx, g):
        index, weight = ctx.saved_tensors
        return None, torch.zeros_like(weight).index_put((index,), g)


@defect(
    "first_order",
    args=lambda r: (r(3, 5), torch.tensor([[0, 0, 1], [4, 2, 4], [3, 3, 3]])),
    truth=lambda x, index: x.gather(1, index),
)
class GatherScattersWithoutAdding(Function):
    @staticmethod
    def forward(x, index):
        return x.gather(1, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index = inputs
        ctx.save_for_backward(index)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter(1, index, g), None


@defect(
    "first_order",
    args=lambda r: (r(2, 9),),
    truth=lambda x: F.max_pool1d(x, 3, 1),
)
class MaxPoolOverlappingWindowsOverwrite(Function):
    @staticmethod
    def forward(ctx, x):
        y, at = x.unfold(1, 3, 1).max(-1)
        ctx.save_for_backward(at + torch.arange(y.shape[1]), x)
        return y

    @staticmethod
    def backward(ctx, g):
        at, x = ctx.saved_tensors
        return torch.zeros_like(x).scatter(1, at, g)


@defect(
    "first_order",
    args=lambda r: (r(2, 3, 4, 4),),
    says=r"constant factor 4",
    truth=lambda x: F.avg_pool2d(x, 2),
)
class AveragePoolForgetsItsDivisor(Function):
    @staticmethod
    def forward(ctx, x):
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, g):
        return g.repeat_interleave(2, 2).repeat_interleave(2, 3)


@defect("first_order", args=lambda r: (r(3, 5),), truth=lambda x: x.cumsum(1))
class CumulativeSumRunsForwardInBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, g):
        return g.cumsum(1)


@defect("first_order", args=lambda r: (r(3, 5, 2), r(3, 2)), truth=lambda x, h: _decay(x, h))
class LinearRecurrenceLosesInitialState(Function):
    """h_t = h_{t-1} / 2 + x_t: the gradient of h_0 is that of h_1, not halved, and x's is right."""

    @staticmethod
    def forward(ctx, x, h):
        return _decay(x, h)

    @staticmethod
    def backward(ctx, g):
        s = g.shape[1]
        t = torch.arange(s, dtype=g.dtype)
        # (S, S): of x_j in h_i.
        decay = torch.where(t[:, None] >= t, 0.5 ** (t[:, None] - t).clamp(min=0), 0.0)
        dx = torch.einsum("ij,nic->njc", decay, g)
        return dx, dx[:, 0]


def _decay(x: Tensor, h: Tensor) -> Tensor:
    states = []
    for x_t in x.unbind(1):
        h = 0.5 * h + x_t
        states.append(h)
    return torch.stack(states, 1)


# ---------------------------------------------------------------- several outputs


@defect(
    "first_order",
    "partial_outputs",
    args=lambda r: (r(4, 5),),
    truth=lambda x: (x.mean(1), x.var(1, unbiased=False)),
)
class MeanAndVarianceIgnoreGradientOfVariance(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mean(1), x.var(1, unbiased=False)

    @staticmethod
    def backward(ctx, g_mean, g_variance):
        (x,) = ctx.saved_tensors
        return (g_mean / x.shape[1]).unsqueeze(1).expand_as(x)


@defect(
    "first_order",
    args=lambda r: (r(4, 6),),
    says="exchanged|grad_output of ones",
    truth=lambda x: x.chunk(2, 1),
)
class ChunkPutsGradientsInTheOtherOrder(Function):
    @staticmethod
    def forward(ctx, x):
        a, b = x.chunk(2, 1)
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx, ga, gb):
        return torch.cat([gb, ga], 1)


# ---------------------------------------------------------------- refused by autograd, which does not say why


@defect(
    "first_order",
    args=lambda r: (r(5, 4), r(3, 4)),
    says="transposed",
    shows=lambda call: raises(call.gradients),
)
class LinearWeightGradientOfTransposedShape(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, x.T @ g


@defect(
    "first_order",
    args=lambda r: (r(5, 4), r(3, 4)),
    says="exchanged",
    shows=lambda call: raises(call.gradients),
)
class LinearGradientsInTheOtherOrder(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g.T @ x, g @ weight


@defect("first_order", args=lambda r: (r(5, 4), r(4)), shows=lambda call: raises(call.gradients))
class ScaleGradientSummedOverTheWrongDimension(Function):
    """(5,) for a scale of (4,)."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum(1)
