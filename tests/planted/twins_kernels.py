"""In the manner of the kernels of real libraries: of graphs, points, sound, rays; right, and wrong in one line."""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


def opacities(r) -> tuple[Tensor]:
    return ((r.positive(3, 6, grad=False) / 2).requires_grad_(),)


class _Rays(Function):
    """The weight of each sample on a ray: its opacity times the transparency of all samples before."""

    @staticmethod
    def forward(ctx, alpha):
        before = torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1]], -1).cumprod(-1)
        ctx.save_for_backward(alpha, before)
        return alpha * before

    @staticmethod
    def later(alpha: Tensor, before: Tensor, g: Tensor) -> Tensor:
        each = g * alpha * before
        return each.flip(-1).cumsum(-1).flip(-1) - each


def within_bounds(alpha: Tensor) -> bool:
    return bool(((alpha >= 0) & (alpha <= 1)).all())


@control("ties", "extremes", "first_order", args=opacities, domain=within_bounds)
class Rays(_Rays):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        alpha, before = ctx.saved_tensors
        return g * before - _Rays.later(alpha, before, g) / (1 - alpha).clamp_min(1e-10)


def nan_for_an_opaque_sample(call: Call) -> bool:
    alpha = call.args[0].detach().clone()
    alpha[0, 0] = 1
    alpha.requires_grad_()
    return bool(torch.autograd.grad(call.fn(alpha).sum(), alpha)[0].isnan().any())


@defect(
    "ties",
    args=opacities,
    domain=within_bounds,
    says="border of the domain",
    truth=Rays.apply,
    shows=nan_for_an_opaque_sample,
)
class RaysThatDivideByTransparency(_Rays):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        alpha, before = ctx.saved_tensors
        return g * before - _Rays.later(alpha, before, g) / (1 - alpha)


@control("ties", "extremes", args=lambda r: (r.positive(3, 4),), domain=lambda x: bool((x >= 0).all()))
class RootWithASlopeOfItsOwn(Function):
    """Infinite at the border of its domain, as the slope is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (2 * x.sqrt())


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
