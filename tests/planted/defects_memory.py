"""Wrong for what they keep: saved tensors, random numbers, modules."""

import copy
import gc
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from planted._table import Call, defect, raises
from planted.defects_state import interleaved

# ---------------------------------------------------------------- saved tensors


@defect(
    "inplace_edit",
    "saved_tensors",
    args=lambda r: (r(4, 3),),
    says="stale|overwritten",
    truth=torch.sin,
    shows=lambda call: edited(call),
)
class SineStashesItsInputOnTheContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.x.cos()


def edited(call: Call) -> bool:
    """Does an in-place edit of an input or output after forward change the gradient unseen?"""

    def gradient(edit: bool) -> Tensor:
        x = call.args[0].detach().clone().requires_grad_()
        y = call.fn(x, *call.args[1:])
        if edit:
            with torch.no_grad():
                x.add_(1)
        return torch.autograd.grad(y.sum(), x)[0]

    return not torch.equal(gradient(True), gradient(False))


@defect(
    "inplace_edit",
    "saved_tensors",
    args=lambda r: (r(4, 6), r(6)),
    says="stale|overwritten",
    truth=lambda x, w: F.rms_norm(x, (6,), w, 1e-6),
    shows=edited,
)
class RmsNormSavesDataOfItsInput(Function):
    """Saved properly, but as ``x.data``, which has a version counter of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x.data, rstd, weight)
        return x * rstd * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, rstd, weight = ctx.saved_tensors
        z = x * rstd
        dz = g * weight
        return rstd * (dz - z * (dz * z).mean(-1, keepdim=True)), (g * z).sum(0)


@defect(
    "saved_tensors",
    "leaks",
    args=lambda r: (r(4, 3),),
    truth=torch.sigmoid,
    shows=lambda call: lives_on(call),
)
class SigmoidKeepsItsOutputOnTheContext(Function):
    """output -> grad_fn -> ctx -> output: a cycle that only the garbage collector breaks."""

    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.y = y
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.y * (1 - ctx.y)


def lives_on(call: Call, backward: bool = True) -> bool:
    """Is something of the first output still alive when it is dropped, with the garbage collector off?"""
    gc.disable()
    try:
        y = call()[0]
        memory = weakref.ref(y.grad_fn)
        if backward:
            torch.autograd.grad(y.sum(), call.wanted())
        del y
        return memory() is not None
    finally:
        gc.enable()


_HISTORY: list[Tensor] = []


@defect(
    "leaks",
    args=lambda r: (r(4, 3),),
    truth=torch.exp,
    shows=lambda call: grows(call, _HISTORY),
)
class ExpLogsItsGradients(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        _HISTORY.append(g)
        return g * ctx.saved_tensors[0]


def grows(call: Call, history: list[Any]) -> bool:
    before = len(history)
    torch.autograd.grad(call()[0].sum(), call.wanted())
    return len(history) > before


_LOSSES: list[Tensor] = []


@defect(
    "leaks",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x.square().mean(),
    shows=lambda call: grows(call, _LOSSES),
)
def mean_square_remembers_its_losses(x: Tensor) -> Tensor:
    """The running total keeps every graph alive: ``losses.append(loss)`` for ``loss.item()``."""
    loss = x.square().mean()
    _LOSSES.append(loss)
    return loss


@defect(
    "saved_bytes",
    args=lambda r: (r(16, 8),),
    truth=F.silu,
    shows=lambda call: len(call()[0].grad_fn.saved_tensors) == 3,
    saved_bytes=16 * 8 * 8,
)
class SiluKeepsThreeTensorsForOne(Function):
    @staticmethod
    def forward(ctx, x):
        s = x.sigmoid()
        y = x * s
        ctx.save_for_backward(x, s, y.clone())
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        _, s, y = ctx.saved_tensors
        return g * (s + y * (1 - s))


@defect(
    "saved_tensor_hooks",
    "checkpointing",
    args=lambda r: (r(4, 3),),
    truth=torch.tanh,
    shows=lambda call: hooked(call),
)
class TanhTrustsTheAddressOfItsSavedOutput(Function):
    """``save_on_cpu`` and offloading hand back another tensor."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.address = y.data_ptr()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y) if y.data_ptr() == ctx.address else torch.zeros_like(g)


def hooked(call: Call) -> bool:
    right = call.gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return any(not torch.equal(a, b) for a, b in zip(call.gradients(), right, strict=True))


# ---------------------------------------------------------------- random numbers


@defect(
    "random_state",
    "repeat",
    "first_order",
    args=lambda r: (r(6, 5),),
    shows=lambda call: wrong_mask(call),
)
class DropoutDrawsANewMaskInBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x * (torch.rand_like(x) < 0.5) * 2

    @staticmethod
    def backward(ctx, g):
        return g * (torch.rand_like(g) < 0.5) * 2


def wrong_mask(call: Call) -> bool:
    (y,) = call()
    (dx,) = torch.autograd.grad(y.sum(), call.args)
    return not torch.equal(dx != 0, y != 0)


@defect(
    "random_state",
    args=lambda r: (r(6, 5),),
    truth=lambda x: x * 1.5,
    shows=lambda call: draws(call),
)
class ScaleReseedsTheGenerator(Function):
    """Reproducible itself; every draw after it is the same in each step."""

    @staticmethod
    def forward(ctx, x):
        torch.manual_seed(0)
        return x * 1.5

    @staticmethod
    def backward(ctx, g):
        return g * 1.5


def draws(call: Call) -> bool:
    """Is the generator's state another one after forward and backward?"""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        torch.autograd.grad([y.sum() for y in call()], call.wanted())
        return not torch.equal(state, torch.random.get_rng_state())


@defect(
    "random_state",
    args=lambda r: (r(6, 5),),
    truth=torch.tanh,
    shows=draws,
)
class TanhShufflesItsRowsInBackward(Function):
    """The gradient is right; the random numbers of the rest of the model depend on it."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        order = torch.randperm(len(g))
        dx = torch.empty_like(g)
        return dx.index_put((order,), (g * (1 - y * y))[order])


# ---------------------------------------------------------------- modules


@defect(
    "module_copy",
    args=lambda r: (r(5, 4),),
    shows=lambda call: copy.deepcopy(call.fn).scale != call.fn.scale,
)
class CopiedLayerForgetsItsScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = 1.0
        self.scale = 3.0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "scale"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


@defect(
    "module_copy",
    args=lambda r: (r(5, 4),),
    shows=lambda call: copy_trains_the_original(call),
)
class CopiedLayerUsesTheOriginalsWeight(nn.Module):
    """A lambda is copied as it is, with ``self`` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.run = lambda x: self.linear(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def copy_trains_the_original(call: Call) -> bool:
    twin = copy.deepcopy(call.fn)
    twin(call.args[0]).sum().backward()
    return all(p.grad is None for p in twin.parameters())


@defect(
    "first_order",
    "requires_grad_subsets",
    args=lambda r: (r(5, 4),),
    says="zero",
    shows=lambda call: any(
        g is None for g in torch.autograd.grad(call()[0].sum(), call.wanted(), allow_unused=True)
    ),
)
class LayerWhoseShiftIsNotTrained(nn.Module):
    """``self.shift.data``: registered, in the optimizer, and never with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.shift.data).sigmoid()


def checkpointed(call: Call) -> bool:
    """Does checkpointing change the gradient, or fail?"""
    from torch.utils.checkpoint import checkpoint

    def gradient(reentrant: bool | None) -> Tensor:
        x = call.args[0].detach().clone().requires_grad_()
        y = call.fn(x) if reentrant is None else checkpoint(call.fn, x, use_reentrant=reentrant)
        y.sum().backward()
        return x.grad

    right = gradient(None)
    return raises(lambda: [torch.testing.assert_close(gradient(kind), right) for kind in (False, True)])


_GRAD_MODE: list[bool] = [True]


@defect(
    "checkpointing",
    "repeat",
    args=lambda r: (r(5, 4),),
    truth=lambda x: x.exp() * x,
    shows=checkpointed,
)
def wrong_after_a_forward_without_grad_mode(x: Tensor) -> Tensor:
    """The no-grad forward of a reentrant checkpoint leaves a flag that the recomputation trusts."""
    if not torch.is_grad_enabled():
        _GRAD_MODE[0] = False
    y = _ExpTimes.apply(x, _GRAD_MODE[0])
    if torch.is_grad_enabled():
        _GRAD_MODE[0] = True
    return y


class _ExpTimes(Function):
    @staticmethod
    def forward(ctx, x, trained):
        ctx.trained = trained
        ctx.save_for_backward(x)
        return x.exp() * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() * (1 + x) if ctx.trained else g * x.exp(), None


_PENDING: list[Tensor] = []


@defect(
    "interleaving",
    "checkpointing",
    "saved_tensors",
    "leaks",
    "retain_graph",
    "repeat",
    "inplace_edit",
    args=lambda r: (r(5, 4),),
    truth=torch.cos,
    shows=lambda call: interleaved(call),
)
class CosineKeepsItsInputsOnAStack(Function):
    """Right while backwards come in the reverse order of forwards, each exactly once."""

    @staticmethod
    def forward(ctx, x):
        _PENDING.append(x.detach())
        return x.cos()

    @staticmethod
    def backward(ctx, g):
        return -g * (_PENDING.pop() if _PENDING else torch.zeros_like(g)).sin()
