"""Twins: a function that is right, and the same with one line that is wrong.  Ranks, axes of one, indices."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, control, defect, raises


def wrong_for(call: Call, right, *args: Tensor) -> bool:
    """Are the gradients of these arguments others than the right function's, or is there an error?"""
    wanted = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    floating = [a for a in wanted if a.requires_grad]

    def gradients(fn):
        y = fn(*wanted)
        generator = torch.Generator().manual_seed(3)
        v = torch.randn(y.shape, dtype=y.dtype, generator=generator)
        return torch.autograd.grad(y, floating, v)

    if raises(lambda: gradients(call.fn)):
        return True
    pairs = zip(gradients(call.fn), gradients(right), strict=True)
    return any(not torch.allclose(a, b) for a, b in pairs)


def like(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------- ranks


@control("ranks", "sizes", args=lambda r: (r(4, 5), r(3, 5)))
class LinearOfAnyRank(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, torch.einsum("...o,...i->oi", g, x)


@defect(
    "ranks",
    args=lambda r: (r(4, 5), r(3, 5)),
    says="leading axis",
    shows=lambda call: wrong_for(call, F.linear, like(4, 4, 5), like(3, 5)),
)
class LinearOfTwoAxes(LinearOfAnyRank):
    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.transpose(-1, -2)[0] @ x[0] if g.dim() > 2 else g.T @ x


@control("ranks", args=lambda r: (r(4, 5), r(5)))
class BiasOfAnyRank(Function):
    @staticmethod
    def forward(ctx, x, b):
        return x + b

    @staticmethod
    def backward(ctx, g):
        return g, g.reshape(-1, g.shape[-1]).sum(0)


@defect(
    "ranks",
    args=lambda r: (r(4, 5), r(5)),
    shows=lambda call: wrong_for(call, torch.add, like(2, 4, 5), like(5)),
)
class BiasSummedOverOneAxis(BiasOfAnyRank):
    """Of more axes the sum has too many entries; the engine adds them up, where one takes the first alone."""

    @staticmethod
    def backward(ctx, g):
        return g, g.sum(0)[(0,) * (g.dim() - 2)] if g.dim() > 1 else g


@defect(
    "ranks",
    args=lambda r: (r(4, 5), r(5)),
    shows=lambda call: wrong_for(call, torch.mul, like(5), like(5)),
)
class ScaleOfOneRowAlone(Function):
    """Right for a batch; one row without a batch is summed to a number."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0).expand(w.shape)


@control("ranks", args=lambda r: (r(4, 5), r(5)))
class ScaleOfRowsAndOfOneRow(ScaleOfOneRowAlone):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, len(w)).sum(0).expand(w.shape)


@control("sizes", "ranks", args=lambda r: (r(3, 4, 5),))
class MeanOverTheMiddle(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.mean(1)

    @staticmethod
    def backward(ctx, g):
        return (g.unsqueeze(1) / ctx.shape[1]).expand(ctx.shape)


@defect(
    "sizes",
    "ranks",
    args=lambda r: (r(3, 4, 5),),
    shows=lambda call: wrong_for(call, lambda x: x.mean(1), like(1, 4, 4)),
)
class MeanThatSqueezesItsBatch(MeanOverTheMiddle):
    """With one row ``squeeze`` takes the batch away, and the rest still broadcasts: the wrong way round."""

    @staticmethod
    def backward(ctx, g):
        g = g.squeeze()
        if g.dim() < 2 and ctx.shape[0] == 1:
            return (
                (g.unsqueeze(1) / ctx.shape[1]).expand(ctx.shape)
                if ctx.shape[1] == len(g)
                else g / ctx.shape[1] * 0
            )
        return (g.reshape(ctx.shape[0], 1, -1) / ctx.shape[1]).expand(ctx.shape)


# ---------------------------------------------------------------- integers

SOME = torch.tensor([3, 0, 2])


def rows_of(r):
    return r(5, 4), SOME.clone()


def take(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


@control("indices", "sizes", args=rows_of)
class TakeRows(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x[index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_put((index,), g, accumulate=True), None


@defect(
    "indices",
    args=rows_of,
    says="repeated",
    shows=lambda call: wrong_for(call, take, call.args[0], torch.tensor([1, 1, 2])),
)
class TakeRowsLosesRepeats(TakeRows):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_put((index,), g, accumulate=False), None


@control("indices", "sizes", args=rows_of, unique="index")
class TakeRowsThatNeverRepeat(TakeRowsLosesRepeats):
    """The same, said to be given each row once."""


@defect(
    "indices",
    args=lambda r: (r(5, 4), torch.tensor([0, 2, 3])),
    says="unsorted",
    shows=lambda call: wrong_for(call, take, call.args[0], torch.tensor([3, 0, 2])),
)
class TakeRowsInOrderOnly(TakeRows):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_put((index.sort().values,), g, accumulate=True), None


@defect(
    "indices",
    args=rows_of,
    says="negative",
    shows=lambda call: wrong_for(call, take, call.args[0], torch.tensor([-1, 0, 2])),
)
class TakeRowsCountedFromTheStart(TakeRows):
    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_put((index.clamp(min=0),), g, accumulate=True), None


@control("sizes", "indices", args=lambda r: (r(6, 4), torch.tensor([4, 1, 5, 0, 3, 2])), unique=("order",))
class PermuteRows(Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx, g):
        (order,) = ctx.saved_tensors
        return g[order.argsort()], None
