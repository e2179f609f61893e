"""Functions as public libraries have them, in pure PyTorch and our own words: right ones, and ones with the defect
that users of such libraries report.

N rows, I inputs, O outputs (or classes), S sequence, D features of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import Call, control, defect
from planted.defects_arguments import as_contiguous, differs
from planted.defects_numbers import gradient_at, off
from planted.defects_routes import wrong_second
from planted.defects_state import changes, edited, lives_on, second_backward_differs

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


# ---------------------------------------------------------------- rotary embeddings, adapters, attention


@control("first_order", "mutation", "grad_output_layout", args=lambda r: (r(2, 3, 4), r(3, 2, grad=False)))
class RotaryEmbedding(Function):
    """An orthogonal map: its transpose is the rotation back."""

    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return _rotated(x, angle.cos(), angle.sin())

    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return _rotated(g, angle.cos(), -angle.sin()), None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@defect(
    "first_order",
    args=lambda r: (r(2, 3, 4), r(3, 2, grad=False)),
    truth=lambda x, angle: _rotated(x, angle.cos(), angle.sin()),
)
class RotaryEmbeddingRotatesForwardInBackward(Function):
    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return _rotated(x, angle.cos(), angle.sin())

    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return _rotated(g, angle.cos(), angle.sin()), None


@control(
    "first_order", "requires_grad_subsets", args=lambda r: (r(5, 4), r(3, 4, grad=False), r(2, 4), r(3, 2))
)
class LowRankAdapter(Function):
    """y = x W^T + s x A^T B^T with a frozen W."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return x @ weight.T + 0.5 * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        gb = 0.5 * g @ b
        return g @ weight + gb @ a, None, gb.T @ x, 0.5 * g.T @ (x @ a.T)


@defect(
    "first_order",
    args=lambda r: (r(5, 4), r(3, 4, grad=False), r(2, 4), r(3, 2)),
    says="one path|no simple",
    truth=lambda x, w, a, b: x @ w.T + 0.5 * (x @ a.T) @ b.T,
)
class LowRankAdapterForgetsItsPathToTheInput(Function):
    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return x @ weight.T + 0.5 * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        gb = 0.5 * g @ b
        return g @ weight, None, gb.T @ x, 0.5 * g.T @ (x @ a.T)


@defect(
    "sizes",
    args=lambda r: (r(2, 4, 3), r(2, 4, 3), r(2, 4, 3)),
    truth=lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    shows=lambda call: off(call, *(torch.randn(1, 20, 3, dtype=torch.float64) for _ in range(3))),
)
class BlockedAttentionLosesItsLastPartialBlock(Function):
    """Keys in blocks of 16; of a longer sequence the rest gets no gradient."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        c = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * c).softmax(-1)
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * c
        dk, dv = ds.mT @ q, p.mT @ g
        s = k.shape[-2]
        if s > 16:
            dk[..., s - s % 16 :, :] = 0
            dv[..., s - s % 16 :, :] = 0
        return ds @ k, dk, dv


@control("first_order", "second_order", "sizes", args=lambda r: (r(2, 5, 3), r.positive(2, 5, 3)))
class GatedCumulativeSum(Function):
    """h_t = a_t h_{t-1} + x_t: backward is the same recurrence in reverse."""

    @staticmethod
    def forward(ctx, x, a):
        h = _scan(x, a)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        if not g.shape[1]:
            return g.clone(), torch.zeros_like(a)
        shifted = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        dx = _scan(g.flip(1), shifted.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return dx, dx * before


@defect(
    "first_order",
    args=lambda r: (r(2, 5, 3), r.positive(2, 5, 3)),
    truth=lambda x, a: _scan(x, a),
)
class GatedCumulativeSumShiftsItsGatesWrongly(Function):
    """a_t for a_{t+1}: off by one step."""

    @staticmethod
    def forward(ctx, x, a):
        h = _scan(x, a)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        dx = _scan(g.flip(1), a.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return dx, dx * before


def _scan(x: Tensor, a: Tensor) -> Tensor:
    states = []
    h = torch.zeros_like(x[:, 0]) if x.shape[1] else None
    for x_t, a_t in zip(x.unbind(1), a.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, 1) if states else x * a


# ---------------------------------------------------------------- not the derivative, on purpose


@defect("first_order", args=lambda r: (3 * r(4, 3),), shows=lambda call: bool(call.gradients()[0].any()))
class StraightThroughSign(Function):
    """Not declared: it is not the derivative, and must be said so."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1e3, 1e3) * 1.0


@defect("first_order", args=lambda r: (r(4, 3),), says="wrong sign|constant factor -", truth=lambda x: x * 1)
class GradientReversal(Function):
    @staticmethod
    def forward(ctx, x, scale=0.5):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


@defect(
    "reference", args=lambda r: (r(4, 3),), truth=torch.tanh, reference=torch.sin, shows=lambda call: True
)
class TanhHeldAgainstASine(Function):
    """Right in itself, and not the function that it should be."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


# ---------------------------------------------------------------- losses, implicit functions, modules


@control("first_order", "extremes", args=lambda r: (r(6), torch.tensor([0.0, 1, 1, 0, 1, 0]).double()))
class SigmoidFocalLoss(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        z = torch.where(target > 0, x, -x)  # the loss is (1 - p)^2 (-log p), p = sigmoid(z)
        return ((-z).sigmoid().square() * F.softplus(-z)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        sign = torch.where(target > 0, 1.0, -1.0).to(x.dtype)
        z = sign * x
        p, q, loss = z.sigmoid(), (-z).sigmoid(), F.softplus(-z)
        return g * sign * q * q * (-2 * p * loss - q), None


def contracts(weight: Tensor, x: Tensor) -> bool:
    """Whether the iteration has a fixed point to go to."""
    return bool(weight.norm() < 4 * len(x))


@control("first_order", "second_order", "sizes", args=lambda r: (r(3, 3), r(3)), domain=contracts)
class FixedPoint(Function):
    """y = tanh(W y / 4 n + x), by iteration; backward solves (I - J^T) u = g, as the implicit function theorem says."""

    @staticmethod
    def forward(ctx, weight, x):
        y = torch.zeros_like(x)
        for _ in range(60):
            y = torch.tanh(weight @ y / (4 * len(y)) + x)
        ctx.save_for_backward(weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, y = ctx.saved_tensors
        slope = 1 - y * y
        eye = torch.eye(len(y), dtype=y.dtype)
        u = torch.linalg.solve(eye - (slope[:, None] * weight / (4 * len(y))).T, g) * slope
        return torch.outer(u, y) / (4 * len(y)), u


@defect(
    "first_order",
    args=lambda r: (r(3, 3), r(3)),
    says="one path|no simple|factor",
    truth=lambda w, x: _iterated(w, x),
    domain=contracts,
)
class FixedPointOfOneStep(Function):
    """One step of the iteration for the solve: the feedback of y on itself is left out."""

    @staticmethod
    def forward(ctx, weight, x):
        y = _iterated(weight, x)
        ctx.save_for_backward(weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _, y = ctx.saved_tensors
        u = g * (1 - y * y)
        return torch.outer(u, y) / (4 * len(y)), u


def _iterated(weight: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for _ in range(60):
        y = torch.tanh(weight @ y / (4 * len(y)) + x)
    return y


@control("first_order", "saved_tensors", "leaks", "checkpointing", args=lambda r: (r(3, 4),))
class ReversibleBlock(nn.Module):
    """Keeps its outputs and computes its inputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2)
        self.h = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _Reversible.apply(x, self.f.weight, self.f.bias, self.h.weight, self.h.bias)


class _Reversible(Function):
    @staticmethod
    def forward(ctx, x, fw, fb, hw, hb):
        x1, x2 = x.chunk(2, -1)
        y1 = x1 + F.linear(x2, fw, fb)
        y2 = x2 + F.linear(y1, hw, hb)
        y = torch.cat([y1, y2], -1)
        ctx.save_for_backward(y, fw, hw, hb)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, fw, hw, hb = ctx.saved_tensors
        y1, y2 = y.chunk(2, -1)
        g1, g2 = g.chunk(2, -1)
        x2 = y2 - F.linear(y1, hw, hb)
        dhw, dhb = _of_linear(g2, y1)
        g1 = g1 + g2 @ hw
        dfw, dfb = _of_linear(g1, x2)
        return torch.cat([g1, g2 + g1 @ fw], -1), dfw, dfb, dhw, dhb


def _of_linear(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer's weight and bias."""
    g = g.reshape(-1, g.shape[-1])
    return g.T @ x.reshape(-1, x.shape[-1]), g.sum(0)


@defect(
    "leaks",
    "saved_tensors",
    args=lambda r: (r(4, 5),),
    truth=lambda x: x.softmax(-1),
    shows=lambda call: lives_on(call, backward=False),
)
class SparseSoftmaxKeepsItselfAlive(Function):
    """``ctx.output = output``, of the entmax kind."""

    @staticmethod
    def forward(ctx, x):
        ctx.output = x.softmax(-1)
        return ctx.output

    @staticmethod
    def backward(ctx, g):
        y = ctx.output
        return y * (g - (g * y).sum(-1, keepdim=True))


@defect(
    "first_order",
    args=lambda r: (r(3, 8),),
    truth=lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-5),
)
class WeightStandardisationWithTheOtherVariance(Function):
    """Bessel's n - 1 in backward, n in forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-5)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        centred, n = x - x.mean(1, keepdim=True), x.shape[1]
        s = x.std(1, unbiased=False, keepdim=True)
        inner = (g * centred).sum(1, keepdim=True) / ((n - 1) * s * (s + 1e-5))
        return (g - g.mean(1, keepdim=True) - centred * inner) / (s + 1e-5)


# ---------------------------------------------------------------- torch's own


@defect(
    "ties",
    "forward_mode",
    args=lambda r: (torch.tensor([0.0, 1, -1, 0]).double().requires_grad_(), torch.tensor([0.25]).double()),
    shows=lambda call: (
        float(gradient_at(Call(lambda x: call.fn(x, call.args[1]), ()), 0.0)) != 1
        and float(
            torch.func.jvp(
                lambda x: call.fn(x, call.args[1]), (torch.zeros(1).double(),), (torch.ones(1).double(),)
            )[1]
        )
        == 1
    ),
)
def torch_prelu_at_zero(x: Tensor, weight: Tensor) -> Tensor:
    """Slope 0.25 in reverse, 1 forward."""
    return F.prelu(x, weight)


@defect(
    "extremes",
    "second_order",
    "dtypes",
    args=lambda r: (torch.tensor([90.0, 1.0, -2.0]).requires_grad_(),),
    shows=lambda call: bool(_second_in_float32(call).isnan().any()),
)
def torch_mish_in_float32_at_90(x: Tensor) -> Tensor:
    return F.mish(x)


def _no_curvature(call: Call) -> bool:
    x = call.args[0]
    (d,) = torch.autograd.grad(call()[0], x, create_graph=True)
    return not d.requires_grad or torch.autograd.grad(d.sum(), x, allow_unused=True)[0] is None


def _second_in_float32(call: Call) -> Tensor:
    (x,) = call.args
    (d,) = torch.autograd.grad(call.fn(x).sum(), x, create_graph=True)
    return torch.autograd.grad(d.sum(), x)[0]


@defect(
    "second_order",
    "forward_mode",
    "mutation",
    "retain_graph",
    "repeat",
    "func_grad",
    "jacrev",
    "vmap_grad",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="zero|silent|one path|does not",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: _no_curvature(call),
)
def torch_chunked_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())


@defect(
    "forward_mode",
    "jacfwd",
    "second_order",
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="zero",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: (
        not bool(torch.func.jvp(lambda x: call.fn(x, *call.args[1:]), call.args[:1], call.args[:1])[1])
    ),
)
def torch_chunked_linear_cross_entropy_forward(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())


@defect(
    "input_layout",
    args=lambda r: (r(4, 5),),
    shows=lambda call: not torch.equal(*(t.median(0).values for t in _expanded_twice(call))),
)
def torch_median_of_an_expanded_input(x: Tensor) -> Tensor:
    """Wrong values where the stride along the dimension is 0."""
    return x.median(0).values


def _expanded_twice(call: Call) -> tuple[Tensor, Tensor]:
    x = call.args[0].detach()[:1].expand(4, 5)
    return x, x.contiguous()


@defect(
    "second_order",
    "forward_over_reverse",
    args=lambda r: (r(3, 4), r.positive(3, 1)),
    shows=lambda call: not torch.autograd.gradgradcheck(call.fn, call.args, raise_exception=False),
)
def torch_weight_norm_twice(v: Tensor, scale: Tensor) -> Tensor:
    """The double backward of ``torch.nn.utils.parametrizations.weight_norm`` on the CPU."""
    return torch._weight_norm(v, scale, 0)
