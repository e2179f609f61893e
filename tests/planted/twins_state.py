"""Twins: a function that is right, and the same with one line that is wrong.  Grad modes, lost terms, recomputation."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from planted._table import Call, Fresh, control, defect

# ---------------------------------------------------------------- the same number in every mode


@control("grad_modes", "second_order", args=lambda r: (r(4, 3),))
class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


def by_mode(call: Call, **options) -> Tensor:
    (x,) = call.args
    return torch.autograd.grad(call.fn(x).sum(), x, **options)[0]


@defect(
    "grad_modes",
    args=lambda r: (r(4, 3),),
    says="create_graph",
    shows=lambda call: not torch.equal(by_mode(call), by_mode(call, create_graph=True)),
)
class SquareDoubledUnderCreateGraph(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = 2 * g if torch.is_grad_enabled() else g
        return 2 * g * x


_slopes: dict[int, Tensor] = {}


def after_a_change(call: Call) -> bool:
    x = call.args[0].detach().clone().requires_grad_()
    torch.autograd.grad(call.fn(x).sum(), x)
    with torch.no_grad():
        x.add_(1)
    return not torch.allclose(torch.autograd.grad(call.fn(x).sum(), x)[0], 2 * x)


@defect(
    "grad_modes", "saved_tensors", "repeat", args=lambda r: (r(4, 3),), says="stale", shows=after_a_change
)
class SquareRemembersASlopeForATensor(Square):
    """By the address of the input, as caches of transposed weights do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.key = x.data_ptr()
        if ctx.key not in _slopes or _slopes[ctx.key].shape != x.shape:
            _slopes.clear()
            _slopes[ctx.key] = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g * _slopes.get(ctx.key, 2 * ctx.saved_tensors[0])


# ---------------------------------------------------------------- what is lost in silence


@control("output_requires_grad", "partial_outputs", args=lambda r: (r(4, 3),))
class ExpWithItsSum(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y, y.sum(1)

    @staticmethod
    def backward(ctx, g, h):
        (y,) = ctx.saved_tensors
        return (g + h.unsqueeze(1)) * y


@defect(
    "output_requires_grad",
    args=lambda r: (r(4, 3),),
    says="in silence",
    shows=lambda call: not call()[1].requires_grad,
)
class ExpWithASumThatIsNotDifferentiable(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        total = y.sum(1)
        ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx, g, h):
        (y,) = ctx.saved_tensors
        return g * y


@control("second_order", args=lambda r: (r(4, 3), r(3)))
class CubeTimesScale(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return _CubeTimesScaleBackward.apply(g, x, w)


class _CubeTimesScaleBackward(Function):
    @staticmethod
    def forward(ctx, g, x, w):
        ctx.save_for_backward(g, x, w)
        return 3 * g * x**2 * w, summed(g * x**3)

    @staticmethod
    def backward(ctx, a, b):
        g, x, w = ctx.saved_tensors
        dw = summed(3 * a * g * x**2)
        return 3 * a * x**2 * w + b * x**3, 6 * a * g * x * w + 3 * b * g * x**2, dw


def summed(t: Tensor) -> Tensor:
    """Over the rows, of which there may be none."""
    return t.reshape(-1, t.shape[-1]).sum(0)


def refused(call: Call) -> bool:
    x, w = call.args
    first = torch.autograd.grad(call.fn(x, w).sum(), x, create_graph=True)[0]
    try:
        torch.autograd.grad(first.sum(), w)
    except RuntimeError as error:
        return "invalid gradient" in str(error)
    return False


@defect("second_order", args=lambda r: (r(4, 3), r(3)), says="invalid gradient", shows=refused)
class CubeTimesScaleOfARefusedSecondShape(CubeTimesScale):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return _CubeTimesScaleBackwardNotSummed.apply(g, x, w)


class _CubeTimesScaleBackwardNotSummed(_CubeTimesScaleBackward):
    @staticmethod
    def backward(ctx, a, b):
        g, x, w = ctx.saved_tensors
        dw = (3 * a * g * x**2).T
        return 3 * a * x**2 * w + b * x**3, 6 * a * g * x * w + 3 * b * g * x**2, dw


@control("requires_grad_subsets", args=lambda r: (r(4, 3), r(3)))
def shifted(x: Tensor, bias: Tensor) -> Tensor:
    return x.tanh() + bias


@defect(
    "requires_grad_subsets",
    args=lambda r: (r(4, 3), r(3)),
    says="value depends on who requires grad",
    shows=lambda call: not torch.equal(call.fn(*call.args), call.fn(call.args[0], call.args[1].detach())),
)
def shifted_only_if_it_is_trained(x: Tensor, bias: Tensor) -> Tensor:
    return x.tanh() + bias if bias.requires_grad else x.tanh()


# ---------------------------------------------------------------- parameters that backward looks up again


class _Recompute(Function):
    """Keeps nothing but its input: backward runs the block of the module once more."""

    @staticmethod
    def forward(ctx, block, x, *parameters):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return None, *gradients(y, (x, *ctx.block.parameters()), g)


def gradients(y: Tensor, wanted: tuple[Tensor, ...], g: Tensor) -> list[Tensor | None]:
    """Of those that require one: parameters may be frozen."""
    found = iter(torch.autograd.grad(y, [t for t in wanted if t.requires_grad], g))
    return [next(found) if t.requires_grad else None for t in wanted]


class Recomputed(nn.Module):
    """A block whose inner values are made again in backward, as a checkpoint does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return _Recompute.apply(self.block, x, *self.block.parameters())


control(
    "first_order", "dtypes", "repeat", "interleaving", args=lambda r: (r(2, 3),), name="recomputed_block"
)(Fresh(Recomputed))


class _RecomputeTwiceAsSteep(_Recompute):
    @staticmethod
    def backward(ctx, g):
        nothing, *found = _Recompute.backward(ctx, g)
        return nothing, found[0], *[None if d is None else 2 * d for d in found[1:]]


@defect(
    "first_order",
    args=lambda r: (r(2, 3),),
    says="constant factor 2",
    truth=None,
    shows=lambda call: True if call.gradients()[1].abs().max() > 0 else False,
)
class RecomputedTwiceAsSteep(Recomputed):
    def forward(self, x: Tensor) -> Tensor:
        return _RecomputeTwiceAsSteep.apply(self.block, x, *self.block.parameters())


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): backward finds the inputs from the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _Reversible.apply(self, 1.0, x, *self.f.parameters(), *self.g.parameters())


class _Reversible(Function):
    @staticmethod
    def forward(ctx, module, sign, x, *parameters):
        ctx.module, ctx.sign = module, sign
        a, b = x.chunk(2, -1)
        with torch.no_grad():
            a = a + module.f(b).tanh()
            b = b + module.g(a).tanh()
        y = torch.cat([a, b], -1)
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        module = ctx.module
        (y,) = ctx.saved_tensors
        a, b = (t.detach() for t in y.chunk(2, -1))
        da, db = g.chunk(2, -1)
        with torch.enable_grad():
            a_in = a.clone().requires_grad_()
            inner = module.g(a_in).tanh()
        back = gradients(inner, (a_in, *module.g.parameters()), db)
        b = b - ctx.sign * inner.detach()
        da = da + back[0]
        with torch.enable_grad():
            b_in = b.clone().requires_grad_()
            inner = module.f(b_in).tanh()
        front = gradients(inner, (b_in, *module.f.parameters()), da)
        return None, None, torch.cat([da, db + front[0]], -1), *front[1:], *back[1:]


control("first_order", "dtypes", "saved_tensors", args=lambda r: (r(3, 4),), name="reversible_block_of_two")(
    Fresh(ReversibleBlock)
)
