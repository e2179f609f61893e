"""In the manner of the kernels of real libraries: of graphs, points, sound, rays, quantisers; right, and wrong in one line."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import Call, control, defect
from planted.twins_library import differs_from


def of_rows(index: Tensor, x: Tensor) -> Tensor:
    """The index of each row, for each entry of ``x``."""
    return index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)


# ---------------------------------------------------------------- ties of entries that are no neighbours


def segments(r) -> tuple[Tensor, Tensor, int]:
    return r(6, 3), torch.tensor([0, 1, 0, 2, 2, 1]), 3


@control("ties", "first_order", "sizes", args=segments)
class SegmentMaximum(Function):
    @staticmethod
    def forward(ctx, x, segment, count):
        index = of_rows(segment, x)
        y = x.new_full((count, *x.shape[1:]), -torch.inf).scatter_reduce(0, index, x, "amax")
        y = torch.where(y == -torch.inf, 0, y)
        hit = x == y.gather(0, index)
        place = torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        first = torch.full(y.shape, len(x)).scatter_reduce(0, index, place.where(hit, len(x)), "amin")
        ctx.save_for_backward(first, hit, index)
        return y

    @staticmethod
    def backward(ctx, g):
        first, hit, _ = ctx.saved_tensors
        dx = g.new_zeros(len(hit) + 1, *hit.shape[1:]).scatter(0, first, g)
        return dx[:-1], None, None


def pays_twice(call: Call) -> bool:
    """Is a maximum that stands in two rows paid in both?"""
    x = call.args[0].detach().clone()
    x[2] = x[0]
    x.requires_grad_()
    return bool(torch.autograd.grad(call.fn(x, *call.args[1:])[0].sum(), x)[0].sum() > x.shape[1])


@defect("ties", args=segments, truth=SegmentMaximum.apply, shows=pays_twice)
class SegmentMaximumThatPaysEveryTie(SegmentMaximum):
    @staticmethod
    def backward(ctx, g):
        _, hit, index = ctx.saved_tensors
        return hit * g.gather(0, index), None, None


def two_clouds(r) -> tuple[Tensor, Tensor]:
    return r(4, 3), r(5, 3)


class _Distances(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x.unsqueeze(1) - y.unsqueeze(0)).norm(dim=-1)


@control("ties", "extremes", "first_order", args=two_clouds)
class DistancesOfRows(_Distances):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        d = x.unsqueeze(1) - y.unsqueeze(0)
        square = (d * d).sum(-1, keepdim=True)
        each = g.unsqueeze(-1) * d / torch.where(square > 0, square, 1).sqrt()
        return each.sum(1), -each.sum(0)


def nan_for_equal_rows(call: Call) -> bool:
    x, y = (t.detach().clone() for t in call.args)
    y[0] = x[0]
    x.requires_grad_()
    return bool(torch.autograd.grad(call.fn(x, y).sum(), x)[0].isnan().any())


@defect("ties", args=two_clouds, truth=DistancesOfRows.apply, shows=nan_for_equal_rows)
class DistancesAreNanForEqualRows(_Distances):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        d = x.unsqueeze(1) - y.unsqueeze(0)
        each = g.unsqueeze(-1) * d / (d * d).sum(-1, keepdim=True).sqrt()
        return each.sum(1), -each.sum(0)


# ---------------------------------------------------------------- a branch that is rarely taken


def waves(r) -> tuple[Tensor, Tensor]:
    return r(2, 3, 5), r.positive(3)


class _Snake(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        a = alpha.view(1, -1, 1)
        ctx.save_for_backward(x, alpha)
        return x + torch.sin(a * x) ** 2 / a

    @classmethod
    def each(cls, ctx, g):
        x, alpha = ctx.saved_tensors
        a = alpha.view(1, -1, 1)
        double = torch.sin(2 * a * x)
        return g * (1 + double), g * (x * double / a - (torch.sin(a * x) / a) ** 2)


@control("sizes", "extremes", "ranks", args=waves)
class Snake(_Snake):
    @staticmethod
    def backward(ctx, g):
        dx, dalpha = _Snake.each(ctx, g)
        return dx, dalpha.sum((0, 2))


def wrong_for_as_many_channels_as_times(call: Call) -> bool:
    square = (call.args[0].detach()[..., :3].clone(), call.args[1])
    return differs_from(Call(call.fn, square), Snake.apply)


@defect(
    "sizes",
    args=waves,
    says=r"only for x.shape\[1\] = x.shape\[2\], as if one axis were the other",
    truth=Snake.apply,
    shows=wrong_for_as_many_channels_as_times,
)
class SnakeThatTakesChannelsForTimes(_Snake):
    @staticmethod
    def backward(ctx, g):
        dx, dalpha = _Snake.each(ctx, g)
        channels = 2 if g.shape[2] == len(ctx.saved_tensors[1]) else 1
        return dx, dalpha.sum([d for d in range(3) if d != channels])


# ---------------------------------------------------------------- a Function in the graph of its own gradient


def sums(r) -> tuple[Tensor, Tensor, Tensor]:
    return r(4, 6), r(4, 6), r(6)


class _NormBesideItsSum(Function):
    """The norm of x + z, and x + z itself, which goes on along the residual path."""

    @staticmethod
    def forward(ctx, x, z, weight):
        total = x + z
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        return total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight, total

    @classmethod
    def parts(cls, ctx, g):
        total, weight = ctx.saved_tensors
        r = (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        n = total * r
        inner = g * weight
        dtotal = r * (inner - n * (inner * n).mean(-1, keepdim=True))
        return dtotal, (g * n).sum(tuple(range(n.dim() - 1)))


@control("partial_outputs", "second_order", "first_order", args=sums)
class NormBesideItsSum(_NormBesideItsSum):
    @staticmethod
    def backward(ctx, g, gtotal):
        d, dweight = (None, None) if g is None else _NormBesideItsSum.parts(ctx, g)
        if gtotal is not None:
            d = gtotal if d is None else d + gtotal
        return d, d, dweight


@defect("first_order", args=sums, says="through output 1, which is missing", truth=NormBesideItsSum.apply)
class NormThatDropsTheGradientOfItsSum(_NormBesideItsSum):
    """One finding: the second derivative goes through the same path, from the saved sum."""

    @staticmethod
    def backward(ctx, g, gtotal):
        if g is None:
            return None, None, None
        d, dweight = _NormBesideItsSum.parts(ctx, g)
        return d, d, dweight


@defect(
    "partial_outputs",
    args=sums,
    truth=NormBesideItsSum.apply,
    shows=lambda call: differs_from(
        Call(lambda *a: call.fn(*a)[0], call.args), lambda *a: NormBesideItsSum.apply(*a)[0]
    ),
)
class NormThatNeedsTheGradientOfItsSum(_NormBesideItsSum):
    """One finding: the second derivative comes back through the saved sum alone."""

    @staticmethod
    def backward(ctx, g, gtotal):
        if g is None or gtotal is None:
            return None, None, None
        d, dweight = _NormBesideItsSum.parts(ctx, g)
        return d + gtotal, d + gtotal, dweight


def sound(r) -> tuple[Tensor, Tensor]:
    return r(2, 7), torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)


class _AllPole(Function):
    """y[t] = x[t] - a[0] y[t - 1] - a[1] y[t - 2]."""

    @staticmethod
    def forward(ctx, x, a):
        y: list[Tensor] = []
        for t in range(x.shape[-1]):
            y.append(x[..., t] - sum(a[k] * y[t - k - 1] for k in range(min(t, len(a)))))
        out = torch.stack(y, -1) if y else x.clone()
        ctx.save_for_backward(x, a, out)
        return out

    @staticmethod
    def of_taps(dx: Tensor, y: Tensor, a: Tensor) -> Tensor:
        n = y.shape[-1]
        taps = range(1, len(a) + 1)
        if not len(a):
            return a.clone()
        return torch.stack([-(dx[..., k:] * y[..., : max(n - k, 0)]).sum() for k in taps])


@control("first_order", "second_order", "sizes", args=sound)
class AllPoleFilter(_AllPole):
    @staticmethod
    def backward(ctx, g):
        _, a, y = ctx.saved_tensors
        dx = AllPoleFilter.apply(g.flip(-1), a).flip(-1)
        return dx, _AllPole.of_taps(dx, y, a)


@defect("first_order", args=sound, truth=AllPoleFilter.apply)
class AllPoleFilterWithTapsOfItsInput(_AllPole):
    """One finding: backward calls the Function itself, whose derivative is the wrong first one."""

    @staticmethod
    def backward(ctx, g):
        x, a, _ = ctx.saved_tensors
        dx = AllPoleFilterWithTapsOfItsInput.apply(g.flip(-1), a).flip(-1)
        return dx, _AllPole.of_taps(dx, x, a)


@defect("first_order", args=lambda r: (r(4, 3),), says="zero", truth=torch.sin)
class SineWithoutSlopeUnlessRecorded(Function):
    """One finding, as of torch.linalg.det at a singular matrix: with create_graph the gradient is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos() if torch.is_grad_enabled() else 0 * g


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
