"""In the manner of real libraries: quantisers, arrays of memory and of places, losses; right, and wrong in one line."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, control, defect

# ---------------------------------------------------------------- surrogates that detach


def rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


@control(
    "first_order", "second_order", "sizes", "extremes", "ties", args=lambda r: (r(4, 3),), surrogate=rounded
)
class RoundAsItsInput(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


def scaled_codes(r) -> tuple[Tensor, Tensor]:
    return r(5, 4), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


LOW, HIGH = -4, 3  # codes of three bits


def quantised(x: Tensor, step: Tensor) -> Tensor:
    """The quantiser's values; its gradient in the step is scaled down by the number of entries."""
    v = x / step
    codes = (v.clamp(LOW, HIGH).round() - v.clamp(LOW, HIGH)).detach() + v.clamp(LOW, HIGH)
    y, scale = codes * step, 1 / math.sqrt(max(1, HIGH * x.numel()))
    free = x.clamp(LOW * step.detach(), HIGH * step.detach())
    in_step = y - free
    return (y - free - scale * in_step).detach() + free + scale * in_step


class _LearnedStep(Function):
    @staticmethod
    def forward(ctx, x, step):
        ctx.save_for_backward(x, step)
        return (x / step).round().clamp(LOW, HIGH) * step

    @classmethod
    def parts(cls, ctx, g):
        x, step = ctx.saved_tensors
        v = (x / step).detach()
        inside = (v >= LOW) & (v <= HIGH)
        codes = v.round().clamp(LOW, HIGH)
        return g * inside, g * torch.where(inside, codes - v, codes) / math.sqrt(max(1, HIGH * x.numel()))


@control("first_order", "ranks", "sizes", args=scaled_codes, surrogate=quantised)
class LearnedStep(_LearnedStep):
    @staticmethod
    def backward(ctx, g):
        dx, each = _LearnedStep.parts(ctx, g)
        return dx, each.sum()


# ---------------------------------------------------------------- memory and dtypes


class _UnitRows(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=-1, keepdim=True)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def writes_into_its_input(call: Call) -> bool:
    x = call.args[0].detach().clone().requires_grad_()
    before = x.detach().clone()
    call.fn(x)
    return not torch.equal(x.detach(), before)


def project(x: Tensor, g: Tensor) -> Tensor:
    """The part of g across the rows of x."""
    u = x / x.norm(dim=-1, keepdim=True)
    return g - (g * u).sum(-1, keepdim=True) * u


@defect("mutation", args=lambda r: (r(4, 3),), says="overwritten input: x", shows=writes_into_its_input)
class UnitRowsWrittenOverTheirInput(Function):
    """One finding: what is saved afterwards is the overwritten input."""

    @staticmethod
    def forward(ctx, x):
        with torch.no_grad():
            x.div_(x.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return project(x, g) / x.norm(dim=-1, keepdim=True)


def writes_into_what_arrives(call: Call) -> bool:
    x = call.args[0].detach().clone().requires_grad_()
    g = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    torch.autograd.grad(call.fn(x), x, g)
    return not torch.equal(g, torch.arange(12, dtype=torch.float64).reshape(4, 3))


@defect("mutation", args=lambda r: (r(4, 3),), truth=unit, shows=writes_into_what_arrives)
class UnitRowsTakeAwayInGradOutput(_UnitRows):
    """One finding: under create_graph a tensor that is written into after it was saved keeps itself alive."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True)
        g -= (g * x / n).sum(-1, keepdim=True) * x / n
        return g / n


def of_float32(r) -> tuple[Tensor, Tensor]:
    """Numbers that float32 holds, as from a user's float32 tensors."""
    return tuple(r(*shape).detach().float().double().requires_grad_() for shape in ((4, 3), (5, 3)))


@defect(
    "dtypes",
    args=of_float32,
    says="float64",
    truth=lambda x, weight: x @ weight.mT,
    shows=lambda call: bool((call.gradients()[0] - call.gradients()[0].float().double()).abs().max() == 0),
)
class LinearThatMultipliesInFloat32InBackward(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return (g.float() @ weight.float()).to(x.dtype), g.mT @ x


@control("mixed_dtypes", "random_state", "dtypes", args=lambda r: (r(6, 4), r(6, 4)))
class DropoutBesideAResidual(Function):
    @staticmethod
    def forward(ctx, x, z):
        mask = torch.rand_like(x) > 0.4
        ctx.save_for_backward(mask)
        return x * mask / 0.6 + z

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g * mask / 0.6, g.clone()


# ---------------------------------------------------------------- sizes that nobody needs


@control(
    "sizes",
    "zero_size",
    "indices",
    args=lambda r: (r(6), torch.tensor([[0, 0, 1, 2, 2, 0], [0, 1, 2, 1, 0, 1]]), r(3, 4), 3),
)
class SparseProduct(Function):
    """Row and column stand in a table of two rows: with a third one, backward raises."""

    @staticmethod
    def forward(ctx, values, index, dense, rows):
        ctx.save_for_backward(values, index, dense)
        return dense.new_zeros(rows, dense.shape[1]).index_add_(
            0, index[0], values[:, None] * dense[index[1]]
        )

    @staticmethod
    def backward(ctx, g):
        values, index, dense = ctx.saved_tensors
        row, column = index
        ddense = torch.zeros_like(dense).index_add(0, column, values[:, None] * g[row])
        return (g[row] * dense[column]).sum(1), None, ddense, None


@control(
    "zero_size", "sizes", args=lambda r: (r(6, 4), r.index(6, 7), torch.tensor([0, 3, 5]), r.positive(7))
)
class WeightedBags(Function):
    """Rows of a table, summed in bags.  Without a bag it raises."""

    @staticmethod
    def forward(ctx, table, index, offsets, weights):
        bag = (torch.arange(len(index))[:, None] >= offsets).sum(1) - 1
        ctx.save_for_backward(table, index, bag, weights)
        return table.new_zeros(len(offsets), table.shape[1]).index_add_(
            0, bag, table[index] * weights[:, None]
        )

    @staticmethod
    def backward(ctx, g):
        table, index, bag, weights = ctx.saved_tensors
        each = g[bag]
        dtable = torch.zeros_like(table).index_add(0, index, each * weights[:, None])
        return dtable, None, None, (each * table[index]).sum(1)


@control("sizes", "first_order", args=lambda r: (r.positive(3, 2, 4), r.positive(3, 2, 4, grad=False)))
class DiceLoss(Function):
    """A mean over samples: of a single number it raises."""

    @staticmethod
    def forward(ctx, p, target):
        dims = tuple(range(1, p.dim()))
        ctx.save_for_backward(p, target)
        both, each = (p * target).sum(dims, keepdim=True), (p + target).sum(dims, keepdim=True)
        return (1 - (2 * both + 1) / (each + 1)).mean()

    @staticmethod
    def backward(ctx, g):
        p, target = ctx.saved_tensors
        dims = tuple(range(1, p.dim()))
        both, each = (p * target).sum(dims, keepdim=True), (p + target).sum(dims, keepdim=True)
        dp = (2 * both + 1) / (each + 1) ** 2 - 2 * target / (each + 1)
        return g * dp / p.shape[0], None


# ---------------------------------------------------------------- one wrong formula, seen in other places


def pixels(r) -> tuple[Tensor, Tensor]:
    return r(2, 3, 6), torch.tensor([[[0, 2, 2], [5, 2, 0]], [[1, 1, 3], [1, 3, 1]]])


def picked(x: Tensor, index: Tensor) -> Tensor:
    """(N, C, L) at (N, H, W) -> (N, C, H, W)."""
    rows = torch.arange(len(index)).view(-1, 1, 1).expand_as(index)
    return x.permute(0, 2, 1)[rows, index].permute(0, 3, 1, 2)


@defect("first_order", args=pixels, truth=picked)
class PickedPixelsThatOverwriteEachOther(Function):
    """One finding: the layout of grad_output decides which of several gradients is written last."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return picked(x, index)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        dx = g.new_zeros(ctx.shape).permute(0, 2, 1).contiguous()
        rows = torch.arange(len(index)).view(-1, 1, 1).expand_as(index)
        dx.index_put_((rows, index), g.permute(0, 2, 3, 1))
        return dx.permute(0, 2, 1), None


def images(r) -> tuple[Tensor, Tensor, Tensor]:
    return r(3, 4, 5), r(4), r(4)


@defect(
    "first_order",
    args=images,
    says="constant factor 0.894429",
    truth=lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias),
)
class InstanceNormThatDividesByOneLess(Function):
    """One finding: a factor that follows the length is no defect of a certain length."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        ctx.save_for_backward(x, weight)
        square = centred.square().mean(-1, keepdim=True)
        return centred * (square + 1e-5).rsqrt() * weight[:, None] + bias[:, None]

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        c = x - x.mean(-1, keepdim=True)
        r = (c.square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + 1e-5).rsqrt()
        n, inner = c * r, g * weight[:, None]
        dx = r * (inner - inner.mean(-1, keepdim=True) - n * (inner * n).mean(-1, keepdim=True))
        return dx, (g * n).sum((0, 2)), g.sum((0, 2))


@defect("first_order", args=lambda r: (r(3, 6),), truth=lambda x: x.logcumsumexp(-1))
class LogOfSumsFromTheOtherEnd(Function):
    """One finding: far out, the wrong formula overflows."""

    @staticmethod
    def forward(ctx, x):
        y = x.logcumsumexp(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        upper = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool).triu()
        share = (x.unsqueeze(-2) - y.unsqueeze(-1)).where(upper, -torch.inf).exp()
        return (g.unsqueeze(-1) * share).sum(-2)
