"""Functions as public libraries have them, in pure PyTorch and our own words: right ones, and ones with the defect
that users of such libraries report.

N rows, I inputs, O outputs (or classes), S sequence, D features of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import Call, control, defect
from planted.defects_arguments import as_contiguous, differs
from planted.defects_memory import edited
from planted.defects_routes import wrong_second
from planted.defects_state import changes, second_backward_differs

# ---------------------------------------------------------------- activations kept small


@control("first_order", "second_order", "extremes", "compile", args=lambda r: (r(4, 5),))
class MemoryEfficientSwish(Function):
    """Keeps x alone and computes the sigmoid again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * s * (1 + x * (1 - s))


@control("first_order", "extremes", "dtypes", args=lambda r: (r(4, 5),))
class MemoryEfficientMish(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * F.softplus(x).tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        t = F.softplus(x).tanh()
        return g * (t + x * x.sigmoid() * (1 - t * t))


@defect(
    "inplace_edit",
    "saved_tensors",
    args=lambda r: (r(4, 5),),
    truth=F.silu,
    shows=edited,
)
class SwishWithItsInputAsAnAttribute(Function):
    """The tutorial's first version, ``ctx.i = i``: it trains, until something writes into the input."""

    @staticmethod
    def forward(ctx, i):
        ctx.i = i.detach()
        return i * i.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        s = ctx.i.sigmoid()
        return g * s * (1 + ctx.i * (1 - s))


@defect(
    "retain_graph",
    "mutation",
    "repeat",
    args=lambda r: (r(4, 6), r(4, 6)),
    says="overwritten|stale",
    truth=lambda a, b: F.gelu(a) * b,
    shows=second_backward_differs,
)
class GatedGeluReusesItsSavedTensors(Function):
    """One buffer fewer each: the gradients are written over copies that were saved, behind autograd's back."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a.clone(), b.clone())
        return F.gelu(a) * b

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = (t.data for t in ctx.saved_tensors)
        cdf = (1 + torch.erf(a * 0.5**0.5)) / 2
        slope = cdf + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        db = g * a * cdf
        a.copy_(g * b * slope)
        b.copy_(db)
        return a.clone(), db


@control("first_order", "mutation", "retain_graph", "saved_bytes", args=lambda r: (r(4, 6), r(4, 6)))
class GatedSiluRecomputed(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        silu = a * s
        return g * b * (s + silu * (1 - s)), g * silu


# ---------------------------------------------------------------- norms


@defect(
    "mutation",
    args=lambda r: (r(4, 6), r(6)),
    says="grad_output|overwritten",
    truth=lambda x, w: F.rms_norm(x, (6,), w, 1e-6),
    shows=changes,
)
class FusedRmsNormInPlaceOfGradOutput(Function):
    """dX is stored over dY, which another branch of the graph may still need."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, rstd, weight)
        return x * rstd * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, rstd, weight = ctx.saved_tensors
        z = x * rstd
        dweight = (g * z).reshape(-1, x.shape[-1]).sum(0)
        g.mul_(weight)
        g.sub_(z * (g * z).mean(-1, keepdim=True)).mul_(rstd)
        return g, dweight


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 6), r(6), r(6)),
    says="only for",
    truth=lambda x, w, b: F.layer_norm(x, (6,), w, b),
    shows=lambda call: differs(call, torch.randn(6, 4, dtype=torch.float64).T),
)
class FusedLayerNormReadsGradOutputByRows(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        z = (x - x.mean(-1, keepdim=True)) * rstd
        ctx.save_for_backward(z, rstd, weight)
        return z * weight + bias

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, rstd, weight = ctx.saved_tensors
        g = as_contiguous(g)
        dz = g * weight
        dx = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
        rows = tuple(range(g.dim() - 1))
        return dx, (g * z).sum(rows) if rows else g * z, g.sum(rows) if rows else g


@defect(
    "second_order",
    args=lambda r: (r(4, 6), r(6), r(6)),
    says="zero|silent|one path|does not",
    truth=lambda x, w, b: F.layer_norm(x, (6,), w, b),
    shows=wrong_second,
)
class FusedLayerNormWithoutDoubleBackward(Function):
    """The kernel fills tensors of its own: what it returns has no history, and nobody says so."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        mean = x.mean(-1, keepdim=True)
        ctx.save_for_backward(x, weight, mean, rstd)
        return (x - mean) * rstd * weight + bias

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, rstd = (t.detach() for t in ctx.saved_tensors)
        g = g.detach()
        z = (x - mean) * rstd
        dz = g * weight
        dx = rstd * (dz - dz.mean(-1, keepdim=True) - z * (dz * z).mean(-1, keepdim=True))
        rows = tuple(range(g.dim() - 1))
        return dx, (g * z).sum(rows) if rows else g * z, g.sum(rows) if rows else g


@defect(
    "first_order",
    "extremes",
    "ties",
    args=lambda r: (r(5, 3), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64).requires_grad_(), r(3)),
    truth=lambda x, w, b: F.leaky_relu(F.batch_norm(x, None, None, w, b, training=True), 0.01),
)
class InvertedActivatedBatchNorm(Function):
    """Recovers z from the output, (y - b) / w: a zero-initialised scale gives 0 / 0."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rstd = (x.var(0, unbiased=False) + 1e-5).rsqrt()
        y = F.leaky_relu((x - x.mean(0)) * rstd * weight + bias, 0.01)
        ctx.save_for_backward(y, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, rstd, weight, bias = ctx.saved_tensors
        g = torch.where(y > 0, g, 0.01 * g)
        z = (torch.where(y > 0, y, y / 0.01) - bias) / weight
        dz = g * weight
        dx = rstd * (dz - dz.mean(0) - z * (dz * z).mean(0))
        return dx, (g * z).sum(0), g.sum(0)


# ---------------------------------------------------------------- linear + cross-entropy, in chunks


def _chunked_loss(x: Tensor, weight: Tensor, target: Tensor, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and its gradients, without all logits at once."""
    dx, dweight, loss = [], torch.zeros_like(weight), x.new_zeros(())
    for part, t in zip(x.split(rows), target.split(rows), strict=True):
        z = part @ weight.T
        loss = loss + F.cross_entropy(z, t, reduction="sum")
        dz = (z.softmax(1) - F.one_hot(t, len(weight))) / max(1, len(x))
        dx.append(dz @ weight)
        dweight = dweight + dz.T @ part
    return loss / len(x), torch.cat(dx), dweight


@control(
    "first_order", "linearity", "requires_grad_subsets", args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5))
)
class ChunkedLinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx, x, weight, target):
        loss, dx, dweight = _chunked_loss(x, weight, target)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dweight = ctx.saved_tensors
        return g * dx, g * dweight, None


@defect(
    "mutation",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="input",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: not torch.equal(call.args[0].detach().clone(), (call(), call.args[0].detach())[1]),
)
class ChunkedLinearCrossEntropyOverItsInput(Function):
    """The gradient is stored over the hidden states: right if nobody reads them again."""

    @staticmethod
    def forward(ctx, x, weight, target):
        loss, dx, dweight = _chunked_loss(x, weight, target)
        ctx.save_for_backward(dx.clone(), dweight)
        x.data.copy_(dx)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dweight = ctx.saved_tensors
        return g * dx, g * dweight, None


@defect(
    "retain_graph",
    "repeat",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="overwritten|stale|second backward",
    truth=lambda x, w, t: 3 * F.cross_entropy(x @ w.T, t),
    shows=second_backward_differs,
)
def chunked_loss_scales_what_it_saved(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return 3 * _ScalesWhatItSaved.apply(x, weight, target)


class _ScalesWhatItSaved(Function):
    @staticmethod
    def forward(ctx, x, weight, target):
        loss, dx, dweight = _chunked_loss(x, weight, target)
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dweight = (t.data.mul_(g) for t in ctx.saved_tensors)
        return dx.clone(), dweight.clone(), None


@defect(
    "first_order",
    args=lambda r: (r(6, 4), r(3, 4), r.index(3, 6)),
    says=r"constant factor 3",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
)
class ChunkedLossDividesByItsChunk(Function):
    """The mean of a chunk of two rows, not of all six."""

    @staticmethod
    def forward(ctx, x, weight, target):
        loss, dx, dweight = _chunked_loss(x, weight, target)
        ctx.save_for_backward(dx * (len(x) / 2), dweight * (len(x) / 2))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dweight = ctx.saved_tensors
        return g * dx, g * dweight, None


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: not subset_of_first(call),
)
class ChunkedLossWithFrozenFeaturesTrainsNothing(Function):
    @staticmethod
    def forward(ctx, x, weight, target):
        loss, dx, dweight = _chunked_loss(x, weight, target)
        ctx.save_for_backward(dx, dweight if x.requires_grad else torch.zeros_like(weight))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dweight = ctx.saved_tensors
        return g * dx, g * dweight, None


def subset_of_first(call: Call) -> bool:
    """Is the second argument's gradient anything but zero if the first one needs none?"""
    x, weight, target = call.args
    return bool(torch.autograd.grad(call.fn(x.detach(), weight, target), weight)[0].any())
