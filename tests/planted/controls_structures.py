"""Right functions: of several outputs, of structures, with random numbers, with state."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from planted._table import control

# ---------------------------------------------------------------- several outputs, structures


@control("partial_outputs", "first_order", args=lambda r: (r(4, 5),))
class SineAndCosine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g_sin, g_cos):
        (x,) = ctx.saved_tensors
        dx = None if g_sin is None else g_sin * x.cos()
        if g_cos is None:
            return dx
        return -g_cos * x.sin() if dx is None else dx - g_cos * x.sin()


@control("aliasing", "mutation", "output_requires_grad", args=lambda r: (r(4, 6),))
def halves_as_views(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, 1)
    return a, b


@control(
    "partial_outputs",
    "output_requires_grad",
    args=lambda r: (r(4, 6),),
    accept={"output_requires_grad": "the mean is there to be looked at"},
)
def outputs_in_a_dictionary(x: Tensor) -> dict[str, Any]:
    return {"logits": x.tanh(), "argmax": x.argmax(1), "parts": [x.exp(), (x.sin(), x.detach())]}


@control("requires_grad_subsets", "first_order", args=lambda r: ([r(4, 3), r(4, 2)],))
def concatenation_of_a_list(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1).tanh()


@control("aliasing", "mutation", args=lambda r: (r(4, 6),))
class IdentityAsAView(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g


@control("zero_size", "sizes", "first_order", args=lambda r: (r(4, 6),))
class MeanSquare(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2 * x / max(1, x.numel())


@control("compile", "vmap", "func_grad", args=lambda r: (r(4, 3),))
def scaled_by_a_python_number(x: Tensor) -> Tensor:
    """``item()``: loudly impossible to batch, and a break in a compiled graph."""
    return x.tanh() * (2.0 if x.detach().sum().item() > -1e9 else 3.0)


@control("dtypes", "autocast", args=lambda r: (r(4, 3),))
def refuses_half_precision(x: Tensor) -> Tensor:
    if x.dtype.itemsize < 4:
        raise TypeError("float32 or float64, please")
    return x.sin()


@control("sizes", "zero_size", args=lambda r: (r(4, 6),))
def refuses_other_widths(x: Tensor) -> Tensor:
    if x.shape[-1:] != (6,) or not x.numel():
        raise ValueError("rows of 6, please")
    return x.sin().reshape(-1, 2, 3).sum(1)


# ---------------------------------------------------------------- random numbers, state


@control("random_state", "repeat", "checkpointing", args=lambda r: (r(6, 5),))
class DropoutThatKeepsItsMask(Function):
    @staticmethod
    def forward(ctx, x):
        mask = (torch.rand_like(x) < 0.5).to(x.dtype) * 2
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


@control("random_state", "repeat", args=lambda r: (r(6, 5),))
class NoiseReplayedFromItsSeed(Function):
    """A generator of its own: the global one is untouched."""

    @staticmethod
    def forward(ctx, x):
        ctx.seed = 5
        ctx.save_for_backward(x)
        return x * _noise(x, ctx.seed)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * _noise(x, ctx.seed)


def _noise(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


@control("mutation", "interleaving", "saved_tensors", args=lambda r: (r(4, 3),))
class SquareWithAScratchBuffer(Function):
    """Scratch memory of its own, filled anew and never handed out."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scratch = torch.empty_like(x)
        scratch.copy_(x)
        return scratch.mul_(2) * g if not torch.is_grad_enabled() else 2 * x * g


@control("saved_bytes", args=lambda r: (r(16, 8),), saved_bytes=16 * 8 * 8)
class SigmoidKeepsItsOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


@control("saved_tensors", "leaks", args=lambda r: (r(4, 3),))
class PowerKeepsNumbersOnItsContext(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.exponent, ctx.shape, ctx.table = 3, x.shape, [1, 2, 3]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.exponent * x**2


@control("first_order", "linearity", args=lambda r: (r(3, 3),), reference=lambda x: (x.exp(), x.exp().sum()))
def value_with_its_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.exp()
    return y, y.sum()


@control("first_order", args=lambda r: (3 * r(4, 3),), accept={"first_order": "on purpose"})
class StraightThroughRoundDeclared(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


@control("first_order", args=lambda r: (r(4, 3),), accept={"first_order": "on purpose"})
class GradientReversalDeclared(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g
