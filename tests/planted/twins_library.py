"""In the manner of real libraries, each right, and wrong in one line: matrices, spikes, quantisers, attention.

N rows, D columns, S sequence, K codes.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import Call, control, defect
from planted.controls_alarms import RootOfADefiniteMatrix, definite, symmetric
from planted.twins_state import ReversibleBlock, _Reversible


def differs_from(call: Call, right) -> bool:
    """Are the gradients others than those of the right function?"""
    given, wanted = call.gradients(), Call(right, call.args).gradients()
    return any(not torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(given, wanted, strict=True))


# ---------------------------------------------------------------- matrices


@defect(
    "first_order",
    args=definite,
    project=symmetric,
    shows=lambda call: differs_from(call, RootOfADefiniteMatrix.apply),
)
class RootOfADefiniteMatrixWithSwappedSums(RootOfADefiniteMatrix):
    """Divides by the eigenvalues' sums of the matrix, and not of its root."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(s)
        inner = vectors.mT @ ((g + g.mT) / 2) @ vectors
        squares = values.square()
        return vectors @ (inner / (squares.unsqueeze(-1) + squares.unsqueeze(-2))) @ vectors.mT


def tall(r) -> tuple[Tensor]:
    return (r(5, 3),)


@control("first_order", "repeat", "linearity", args=tall)
class SingularValues(Function):
    @staticmethod
    def forward(ctx, a):
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        ctx.save_for_backward(u, vh)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        u, vh = ctx.saved_tensors
        return u @ torch.diag_embed(g) @ vh


@defect("first_order", args=tall, truth=torch.linalg.svdvals)
class SingularValuesInTheOrderOfTheColumns(SingularValues):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        u, vh = ctx.saved_tensors
        return u @ torch.diag_embed(g) @ vh.mT


class ReversibleBlockThatAddsWhereItShouldTakeAway(ReversibleBlock):
    def forward(self, x: Tensor) -> Tensor:
        return _Reversible.apply(self, -1.0, x, *self.f.parameters(), *self.g.parameters())


defect(
    "first_order",
    args=lambda r: (r(3, 4),),
    shows=lambda call: differs_from(call, _plainly_reversible(call.fn)),
)(ReversibleBlockThatAddsWhereItShouldTakeAway)


def _plainly_reversible(block: nn.Module):
    """The same without a hand-written backward, of the very parameters."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = block.f, block.g

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            a = a + self.f(b).tanh()
            return torch.cat([a, b + self.g(a).tanh()], -1)

    return Plain()


# ---------------------------------------------------------------- steps with a gradient


def fast_sigmoid(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@control(
    "first_order", "second_order", "sizes", "extremes", args=lambda r: (r(4, 3),), surrogate=fast_sigmoid
)
class Spike(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs()) ** 2


@defect(
    "first_order",
    args=lambda r: (r(4, 3),),
    surrogate=fast_sigmoid,
    shows=lambda call: differs_from(call, fast_sigmoid),
)
class SpikeWithAnUnsquaredSlope(Spike):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x.abs())


def codes(r) -> tuple[Tensor, Tensor]:
    return r(5, 3), r(4, 3)


def nearest(x: Tensor, book: Tensor) -> Tensor:
    return book[torch.cdist(x, book).argmin(1)]


@control(
    "first_order",
    "requires_grad_subsets",
    "sizes",
    args=codes,
    accept={"first_order": "straight through to x, whose nearest code is a step"},
)
class VectorQuantiser(Function):
    @staticmethod
    def forward(ctx, x, book):
        which = torch.cdist(x, book).argmin(1)
        ctx.save_for_backward(which)
        ctx.codes = len(book)
        return book[which]

    @staticmethod
    def backward(ctx, g):
        (which,) = ctx.saved_tensors
        return g, g.new_zeros(ctx.codes, g.shape[-1]).index_add(0, which, g)


@defect(
    "first_order",
    args=codes,
    says="book",
    shows=lambda call: not torch.allclose(call.gradients()[1], Call(nearest, call.args).gradients()[1]),
)
class VectorQuantiserThatLosesAllButOneOfACode(VectorQuantiser):
    @staticmethod
    def backward(ctx, g):
        (which,) = ctx.saved_tensors
        return g, g.new_zeros(ctx.codes, g.shape[-1]).index_put((which,), g)


STEP = 0.25


@control("first_order", "dtypes", "extremes", args=lambda r: (r(4, 3),), surrogate=lambda x: x.clamp(-1, 1))
class FakeQuantise(Function):
    """Rounds to eighths of [-1, 1]; the gradient goes straight through within, and nowhere outside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x.clamp(-1, 1) / STEP).round() * STEP

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


@defect(
    "first_order",
    args=lambda r: (r(4, 3),),
    surrogate=lambda x: x.clamp(-1, 1),
    shows=lambda call: differs_from(call, lambda x: x.clamp(-1, 1)),
)
class FakeQuantiseThatGoesThroughOutside(FakeQuantise):
    @staticmethod
    def backward(ctx, g):
        return g * 1.0


def sparsemax(z: Tensor) -> Tensor:
    """The point of the simplex that is nearest to each row."""
    ordered = z.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    inside = 1 + k * ordered > ordered.cumsum(-1)
    count = inside.sum(-1, keepdim=True)
    tau = ((ordered * inside).sum(-1, keepdim=True) - 1) / count
    return (z - tau).clamp(min=0)


@control("first_order", "ties", "sizes", "dtypes", args=lambda r: (r(4, 5),))
class Sparsemax(Function):
    @staticmethod
    def forward(ctx, z):
        p = sparsemax(z)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        s = (p > 0).to(g.dtype)
        return s * (g - (g * s).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


@defect("first_order", args=lambda r: (r(4, 5),), truth=sparsemax)
class SparsemaxWithTheMeanOverAll(Sparsemax):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        s = (p > 0).to(g.dtype)
        return s * (g - (g * s).mean(-1, keepdim=True))


# ---------------------------------------------------------------- attention


def heads(r) -> tuple[Tensor, ...]:
    return r(2, 5, 3), r(2, 5, 3), r(2, 5, 3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@control("first_order", "sizes", "dtypes", "extremes", args=heads)
class AttentionInChunks(Function):
    """Keys two at a time; the largest score and the sum are carried along, and only the log of the sum is kept."""

    @staticmethod
    def forward(ctx, q, k, v):
        scale = 1 / math.sqrt(q.shape[-1])
        top = q.new_full((*q.shape[:-1], 1), -math.inf)
        total, out = torch.zeros_like(top), torch.zeros_like(q @ k.mT[..., :0] @ v[..., :0, :])
        for a, b in zip(k.split(2, -2), v.split(2, -2), strict=True):
            s = q @ a.mT * scale
            higher = torch.maximum(top, s.amax(-1, keepdim=True))
            p, old = (s - higher).exp(), (top - higher).exp()
            total, out, top = total * old + p.sum(-1, keepdim=True), out * old + p @ b, higher
        out = out / total
        ctx.save_for_backward(q, k, v, out, top + total.log())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        mean = (g * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), [], []
        for a, b in zip(k.split(2, -2), v.split(2, -2), strict=True):
            p = (q @ a.mT * scale - log_sum).exp()
            ds = p * (g @ b.mT - mean) * scale
            dq = dq + ds @ a
            dk.append(ds.mT @ q)
            dv.append(p.mT @ g)
        return dq, torch.cat(dk, -2), torch.cat(dv, -2)


@defect("sizes", "first_order", args=heads, shows=lambda call: _of_six(call))
class AttentionThatDropsAnEvenLastChunk(AttentionInChunks):
    """Takes every chunk but the last for whole: of an even number of keys the last chunk's are not turned around."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dq, dk, dv = AttentionInChunks.backward(ctx, g)
        if dk.shape[-2] % 2 == 0:
            dk[..., -2:, :] = 0
        return dq, dk, dv


def _of_six(call: Call) -> bool:
    generator = torch.Generator().manual_seed(1)
    args = [torch.randn(1, 6, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    given, right = (torch.autograd.grad(f(*args).square().sum(), args) for f in (call.fn, attend))
    return not torch.allclose(given[1], right[1])


def turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = angle.cos(), angle.sin()
    return torch.cat([a * c - b * s, a * s + b * c], -1)


def positions(r) -> tuple[Tensor, Tensor]:
    return r(2, 4, 6), torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.1, 0.01])).double()


@control("first_order", "second_order", "sizes", "input_layout", args=positions)
class Rotary(Function):
    """Turns pairs; the gradient is turned back."""

    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return turned(x, angle)

    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return turned(g, -angle), None


@defect("first_order", args=positions, truth=turned)
class RotaryTurnedTwice(Rotary):
    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return turned(g, angle), None
