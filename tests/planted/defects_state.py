"""Wrong for what they do to the world, or take from it: memory, random numbers, caches, leaks, modules."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from planted._table import Call, defect


def changes(call: Call, *watched: Tensor) -> bool:
    """Does a forward and a backward change one of these tensors, or grad_output?"""
    outputs = call()
    grads = [torch.rand_like(y) + 1 for y in outputs]
    watched = (*watched, *grads, *outputs)
    before = [t.detach().clone() for t in watched]
    torch.autograd.grad(outputs, call.wanted(), grads, allow_unused=True)
    return any(not torch.equal(a, b) for a, b in zip(before, watched, strict=True))


def second_backward_differs(call: Call) -> bool:
    (y,) = call()
    g = torch.linspace(0.5, 1, y.numel(), dtype=y.dtype).view(y.shape)
    first = [t.clone() for t in torch.autograd.grad(y, call.wanted(), g, retain_graph=True)]
    second = torch.autograd.grad(y, call.wanted(), g)
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- writes into others' memory


@defect(
    "mutation",
    args=lambda r: (r(4, 5),),
    says="grad_output|overwritten",
    truth=torch.sigmoid,
    shows=changes,
)
class SigmoidReusesGradOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.mul_(y * (1 - y))


@defect(
    "mutation",
    args=lambda r: (r(4, 5), r(3, 5)),
    says="grad_output|overwritten",
    truth=lambda x, w: F.linear(x, w).relu(),
    shows=changes,
)
class LinearReluMasksGradOutputData(Function):
    """Through ``.data``: neither autograd nor a batched gradient notices."""

    @staticmethod
    def forward(ctx, x, weight):
        y = (x @ weight.T).relu()
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        g.data.masked_fill_(y.data <= 0, 0)
        return g @ weight, g.T @ x


@defect(
    "retain_graph",
    "repeat",
    "mutation",
    args=lambda r: (r(4, 5),),
    says="overwritten|stale",
    truth=lambda x: x.softmax(1),
    shows=second_backward_differs,
)
class SoftmaxOverwritesItsSavedOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.softmax(1)
        ctx.save_for_backward(y)
        return y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        before = y.clone()
        dx = y.data.mul_(g)
        return dx - dx.sum(1, keepdim=True) * before


@defect(
    "mutation",
    "retain_graph",
    "repeat",
    args=lambda r: (r(3, 4), r(3, 4)),
    says="overwritten|stale|input",
    truth=lambda a, b: F.silu(a) * b,
    shows=lambda call: changes(call, *call.args),
)
class SwigluWritesGradientsIntoItsInputs(Function):
    """Saves two buffers, at the price of the caller's."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        a, b = (t.data for t in ctx.saved_tensors)
        s = a.sigmoid()
        db = g * a * s
        da = g * b * s * (1 + a * (1 - s))
        return a.copy_(da).clone(), b.copy_(db).clone()


@defect(
    "mutation",
    args=lambda r: (r(2, 3, 4), r(3, 2, grad=False)),
    says="input",
    truth=lambda x, angle: _rotate(x, angle),
    shows=lambda call: changed_by_forward(call),
)
class RotaryEmbeddingRotatesItsInputInPlace(Function):
    """Without ``mark_dirty``: the result is right, the caller's queries are gone."""

    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return x.data.copy_(_rotate(x, angle)).clone()

    @staticmethod
    def backward(ctx, g):
        return _rotate(g, -ctx.saved_tensors[0]), None


def changed_by_forward(call: Call) -> bool:
    before = [a.detach().clone() for a in call.args]
    call()
    return any(not torch.equal(a, b) for a, b in zip(before, call.args, strict=True))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@defect(
    "mutation",
    "aliasing",
    args=lambda r: (r(4, 5),),
    says="input",
    shows=lambda call: changed_by_forward(Call(call.fn, (call.args[0].detach().clone().requires_grad_(),))),
)
class ReluInPlaceWithoutMarkDirty(Function):
    @staticmethod
    def forward(ctx, x):
        x.data.clamp_(min=0)
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


@defect(
    "mutation",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x.exp(),
    shows=changes,
)
class ExpScalesItsOutputInBackward(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        dx = g * y
        y.data.mul_(0.5)
        return dx


@defect(
    "mutation",
    "repeat",
    args=lambda r: (r(5, 3),),
    shows=lambda call: changes(call, call.fn.running),
)
class NormUpdatesItsBufferInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return _TracksGradient.apply(x, self.running)


class _TracksGradient(Function):
    @staticmethod
    def forward(ctx, x, running):
        ctx.running = running
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        ctx.running.lerp_(g.detach().mean(0), 0.1)
        return g * 2 * ctx.saved_tensors[0], None


# ---------------------------------------------------------------- second backward, caches


@defect(
    "retain_graph",
    "repeat",
    args=lambda r: (r(4, 3),),
    truth=torch.tanh,
    shows=second_backward_differs,
)
class TanhFreesWhatItSavedOnItsContext(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.count = 0
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        ctx.count += 1
        return g * (1 - y * y) if ctx.count == 1 else torch.zeros_like(g)


class _Last:
    x: Tensor


@defect(
    "interleaving",
    "saved_tensors",
    "leaks",
    args=lambda r: (r(4, 3),),
    says="stale|overwritten",
    truth=torch.square,
    shows=lambda call: interleaved(call),
)
class SquareRemembersItsLastInputOnly(Function):
    """A class attribute: the second forward before the first backward gives the first one's gradient at its input."""

    @staticmethod
    def forward(ctx, x):
        _Last.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * _Last.x


def interleaved(call: Call) -> bool:
    x = call.args[0]
    (right,) = torch.autograd.grad(call.fn(x).sum(), x)
    y = call.fn(x)
    call.fn(x.detach() + 1)
    return not torch.equal(torch.autograd.grad(y.sum(), x)[0], right)


@defect(
    "interleaving",
    args=lambda r: (r(4, 3),),
    says="stale|overwritten",
    truth=lambda x: F.normalize(x, dim=1),
    shows=interleaved,
)
class NormaliserKeepsItsNormsInABuffer(nn.Module):
    """The buffer is written through ``.data``, so that autograd's version counter does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norms", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        norms = x.detach().norm(dim=1, keepdim=True)
        if self.norms.shape != norms.shape:
            self.norms = norms
        self.norms.data.copy_(norms)
        return _Normalize.apply(x, self.norms)


class _Normalize(Function):
    @staticmethod
    def forward(ctx, x, norms):
        y = x / norms
        ctx.save_for_backward(y, norms)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        y, norms = ctx.saved_tensors
        return (g - y * (g * y).sum(1, keepdim=True)) / norms, None


@defect(
    "repeat",
    "retain_graph",
    "first_order",
    args=lambda r: (r(5, 4),),
    shows=lambda call: not torch.equal(call.gradients()[0], call.gradients()[0]),
)
class LossScaleHalvesAtEachBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return _ScaledSquare.apply(x, self.scale)


class _ScaledSquare(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        scale = ctx.scale[0]
        ctx.scale[0] /= 2
        return g * 2 * ctx.saved_tensors[0] * scale, None
