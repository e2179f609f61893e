"""Right functions that were once found wrong: what must not set off the checker."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from planted._table import control

# ---------------------------------------------------------------- rounding


def seeded(*shape: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _given(seed: int):
    def args(r):
        with torch.random.fork_rng():
            return (seeded(4, 3, seed=seed),)

    return args


for _seed in (0, 1, 2, 1000, 1001):
    control("linearity", "first_order", "ties", args=_given(_seed), name=f"normalize_after_seed_{_seed}")(
        lambda x: F.normalize(x, dim=-1)
    )


@control(
    "linearity", "func_grad", "jacrev", "vmap", "repeat", "grad_output_layout", args=lambda r: (r(4, 5),)
)
def softmax_summed(x: Tensor) -> Tensor:
    """Its gradient is rounding, and nothing else."""
    return x.softmax(1).sum(1)


@control("linearity", "first_order", args=lambda r: (r(4, 5),), accept={"first_order": "a spike"})
class SpikeWithAConstantSlope(Function):
    """Forward is exact, backward rounds: one tells nothing of the other."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * 0.3


@control("linearity", "dtypes", args=lambda r: (r(4, 5),))
def differences_that_cancel(x: Tensor) -> Tensor:
    return (1e6 + x) - 1e6 + x.roll(1, 0)


# ---------------------------------------------------------------- what is kept


@control("saved_tensors", "leaks", "inplace_edit", args=lambda r: (r(4, 3),))
class PolynomialWithItsCoefficientsOnCtx(Function):
    """Tensors made of numbers: nobody else has them, and they are the same whatever the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.coefficients = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
        return x + 2 * x**2 / 2 + 3 * x**3 / 3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        a, b, c = ctx.coefficients
        return g * (a + b * x + c * x**2)


# ---------------------------------------------------------------- the domain


def symmetric(a: Tensor) -> Tensor:
    """The nearest symmetric positive definite matrix, with eigenvalues of at least a tenth."""
    values, vectors = torch.linalg.eigh((a + a.mT) / 2)
    return vectors @ torch.diag_embed(values.clamp(min=0.1)) @ vectors.mT


def definite(r) -> tuple[Tensor]:
    a = r(4, 4).detach()
    return ((a @ a.T + 4 * torch.eye(4, dtype=torch.float64)).requires_grad_(),)


@control(
    "first_order",
    "second_order",
    "sizes",
    "extremes",
    "ties",
    "vmap",
    "repeat",
    "same_input",
    "input_layout",
    args=definite,
    project=symmetric,
)
class RootOfADefiniteMatrix(Function):
    """dA solves S dA + dA S = G: no derivative but along symmetric matrices."""

    @staticmethod
    def forward(ctx, a):
        values, vectors = torch.linalg.eigh(a)
        if bool((values <= 0).any()) or not torch.allclose(a, a.mT, atol=1e-6):
            raise ValueError("not symmetric and positive definite")
        s = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
        ctx.save_for_backward(s)
        return s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(s)
        inner = vectors.mT @ ((g + g.mT) / 2) @ vectors
        return vectors @ (inner / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT


@control(
    "extremes", "ties", "sizes", "repeat", "vmap", "interleaving", args=lambda r: (r.positive(4, 3),),
    domain=lambda x: bool((x > 0).all()),
)  # fmt: skip
class LogarithmOfPositiveNumbersOnly(Function):
    """Below zero it gives what it likes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs().clamp(min=1e-12).log()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / x * (x > 0)


@control(
    "sizes",
    "zero_size",
    "first_order",
    args=lambda r: _counted(4, 3),
    inputs=lambda rows=4, width=3: _counted(rows, width),
)
class MeanOfRaggedRows(Function):
    """Rows of several lengths, one behind the other: the lengths must add up."""

    @staticmethod
    def forward(ctx, x, lengths):
        assert int(lengths.sum()) == len(x)
        which = torch.arange(len(lengths)).repeat_interleave(lengths)
        ctx.save_for_backward(which, lengths)
        total = x.new_zeros(len(lengths), x.shape[1]).index_add(0, which, x)
        return total / lengths.unsqueeze(1)

    @staticmethod
    def backward(ctx, g):
        which, lengths = ctx.saved_tensors
        return (g / lengths.unsqueeze(1))[which], None


def _counted(rows: int, width: int) -> tuple[Any, ...]:
    lengths = torch.arange(rows) % 3 + 1
    return torch.randn(int(lengths.sum()), width, dtype=torch.float64, requires_grad=True), lengths


# ---------------------------------------------------------------- not linear on purpose


@control(
    "linearity",
    "first_order",
    "partial_outputs",
    "sizes",
    args=lambda r: (r(4, 3),),
    accept={"linearity": "clips"},
)
class ExpWithAClippedGradient(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.clamp(-0.5, 0.5) * y


@control("linearity", "first_order", "sizes", args=lambda r: (r(4, 3),), accept={"linearity": "a penalty"})
class ExpWithAPenalty(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() + 0.01 * x
