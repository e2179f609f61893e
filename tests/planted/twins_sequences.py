"""In the manner of real libraries, each right, and wrong in one line: sequences, routing, masks, solvers.

N rows, D columns, S sequence, H hidden, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import control, defect
from planted.twins_library import differs_from

# ---------------------------------------------------------------- random numbers that are drawn again


def _mask(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(x.shape, generator=generator, dtype=torch.float64) < 0.6).to(x.dtype) / 0.6


@control("first_order", "repeat", "random_state", "saved_tensors", args=lambda r: (r(4, 5), 3))
class DropoutWithASeed(Function):
    """Keeps the seed in the place of the mask."""

    @staticmethod
    def forward(ctx, x, seed):
        ctx.seed = seed
        return x * _mask(x, seed)

    @staticmethod
    def backward(ctx, g):
        return g * _mask(g, ctx.seed), None


@defect("first_order", args=lambda r: (r(4, 5), 3), truth=lambda x, seed: x * _mask(x, seed))
class DropoutWithTheNextSeed(DropoutWithASeed):
    @staticmethod
    def backward(ctx, g):
        return g * _mask(g, ctx.seed + 1), None


# ---------------------------------------------------------------- recurrence


def lstm_inputs(r) -> tuple[Tensor, ...]:
    return r(3, 2, 4), r(8, 4), r(8, 2), r(8)


def lstm(x: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Tensor:
    h = c = x.new_zeros(x.shape[1], u.shape[1])
    hs = []
    for x_t in x:
        i, f, z, o = (x_t @ w.T + h @ u.T + b).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
    return torch.stack(hs)


@control("first_order", "dtypes", "requires_grad_subsets", args=lstm_inputs)
class LstmByTimeSteps(Function):
    """(S, N, D) -> (S, N, H); the gates are kept, and the steps are walked back."""

    @staticmethod
    def forward(ctx, x, w, u, b):
        h = c = x.new_zeros(x.shape[1], u.shape[1])
        hs, cs, gates = [h], [c], []
        for x_t in x:
            i, f, z, o = (x_t @ w.T + h @ u.T + b).chunk(4, -1)
            i, f, z, o = i.sigmoid(), f.sigmoid(), z.tanh(), o.sigmoid()
            c = f * c + i * z
            h = o * c.tanh()
            hs.append(h)
            cs.append(c)
            gates.append(torch.stack([i, f, z, o]))
        ctx.save_for_backward(x, w, u, torch.stack(hs), torch.stack(cs), torch.stack(gates))
        return torch.stack(hs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, u, hs, cs, gates = ctx.saved_tensors
        dh = dc = torch.zeros_like(hs[0])
        dx, dw, du, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(u), w.new_zeros(len(w))
        for t in reversed(range(len(x))):
            i, f, z, o = gates[t]
            dh = dh + g[t]
            tanh_c = cs[t + 1].tanh()
            dc = dc + dh * o * (1 - tanh_c**2)
            d = torch.cat(
                [
                    dc * z * i * (1 - i),
                    dc * cs[t] * f * (1 - f),
                    dc * i * (1 - z * z),
                    dh * tanh_c * o * (1 - o),
                ],
                -1,
            )
            dx[t] = d @ w
            dw, du, db = dw + d.T @ x[t], du + d.T @ hs[t], db + d.sum(0)
            dh, dc = d @ u, dc * f
        return dx, dw, du, db


@defect("first_order", args=lstm_inputs, truth=lstm)
class LstmThatForgetsItsCell(Function):
    """The gradient of the cell is not carried back over the steps."""

    forward = LstmByTimeSteps.forward

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, w, u, hs, cs, gates = ctx.saved_tensors
        dh = torch.zeros_like(hs[0])
        dx, dw, du, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(u), w.new_zeros(len(w))
        for t in reversed(range(len(x))):
            i, f, z, o = gates[t]
            dh = dh + g[t]
            tanh_c = cs[t + 1].tanh()
            dc = dh * o * (1 - tanh_c**2)
            d = torch.cat(
                [
                    dc * z * i * (1 - i),
                    dc * cs[t] * f * (1 - f),
                    dc * i * (1 - z * z),
                    dh * tanh_c * o * (1 - o),
                ],
                -1,
            )
            dx[t] = d @ w
            dw, du, db = dw + d.T @ x[t], du + d.T @ hs[t], db + d.sum(0)
            dh = d @ u
        return dx, dw, du, db


# ---------------------------------------------------------------- products of permuted axes


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nsd,edk->nesk", x, w)


@control("first_order", "second_order", "sizes", args=lambda r: (r(2, 3, 4), r(2, 4, 3)))
class PermutedProduct(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x.unsqueeze(1) @ w).contiguous()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = (g.permute(0, 2, 1, 3).flatten(2)) @ w.permute(0, 2, 1).flatten(0, 1)
        return dx, torch.einsum("nesk,nsd->edk", g, x)


@defect("first_order", args=lambda r: (r(2, 3, 4), r(2, 4, 3)), truth=product)
class PermutedProductOfUnpermutedWeights(PermutedProduct):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = (g.permute(0, 2, 1, 3).flatten(2)) @ w.permute(2, 0, 1).flatten(0, 1)
        return dx, torch.einsum("nesk,nsd->edk", g, x)


# ---------------------------------------------------------------- routing and masks


def routed(r) -> tuple[Tensor, Tensor, Tensor]:
    return r(5, 3), r(4, 3, 2), torch.tensor([1, 0, 3, 1, 2])


@control("first_order", "indices", "sizes", args=routed)
class MixtureOfExperts(Function):
    """Each row by the matrix of its expert."""

    @staticmethod
    def forward(ctx, x, experts, which):
        ctx.save_for_backward(x, experts, which)
        return torch.einsum("nd,ndk->nk", x, experts[which])

    @staticmethod
    def backward(ctx, g):
        x, experts, which = ctx.saved_tensors
        outer = torch.einsum("nd,nk->ndk", x, g)
        return (
            torch.einsum("nk,ndk->nd", g, experts[which]),
            torch.zeros_like(experts).index_add(0, which, outer),
            None,
        )


@defect(
    "first_order",
    args=routed,
    truth=lambda x, experts, which: torch.einsum("nd,ndk->nk", x, experts[which]),
)
class MixtureOfExpertsThatTrainsEachByOneRow(MixtureOfExperts):
    @staticmethod
    def backward(ctx, g):
        x, experts, which = ctx.saved_tensors
        outer = torch.einsum("nd,nk->ndk", x, g)
        return (
            torch.einsum("nk,ndk->nd", g, experts[which]),
            torch.zeros_like(experts).index_put((which,), outer),
            None,
        )


def largest(x: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(x).scatter(-1, x.topk(k, -1).indices, 1.0)
    return x * kept


@control("first_order", "ties", "second_order", args=lambda r: (r(4, 6), 2))
class TopK(Function):
    @staticmethod
    def forward(ctx, x, k):
        kept = torch.zeros_like(x).scatter(-1, x.topk(k, -1).indices, 1.0)
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx, g):
        (kept,) = ctx.saved_tensors
        return g * kept, None


@defect("first_order", args=lambda r: (r(4, 6), 2), truth=largest)
class TopKOfTheGradient(TopK):
    """Keeps the largest gradients, and not those of the largest inputs."""

    @staticmethod
    def backward(ctx, g):
        return g * torch.zeros_like(g).scatter(-1, g.topk(2, -1).indices, 1.0), None


# ---------------------------------------------------------------- losses and solvers


def spoken(r) -> tuple[Any, ...]:
    return r(6, 2, 4), torch.tensor([[1, 2, 2], [3, 1, 0]]), (6, 5), (3, 2)


def ctc(x: Tensor, target: Tensor, lengths: Any, targets: Any) -> Tensor:
    return F.ctc_loss(x.log_softmax(-1), target, lengths, targets, reduction="none")


def without_blanks(x: Tensor, target: Tensor, lengths: Any, targets: Any) -> bool:
    """A blank, 0, may stand behind the end of a target only: torch's gradient is wrong for others."""
    return all(bool((row[:n] > 0).all()) for row, n in zip(target, targets, strict=True))


@control("first_order", "indices", args=spoken, domain=without_blanks)
class Ctc(Function):
    """The gradient with respect to the scores: made by torch from the log-probabilities, with the softmax folded in."""

    @staticmethod
    def forward(ctx, x, target, lengths, targets):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = ctc(leaf, target, lengths, targets)
            (slope,) = torch.autograd.grad(loss.sum(), leaf)
        ctx.save_for_backward(slope)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return slope * g.view(1, -1, 1), None, None, None


@defect("first_order", args=spoken, shows=lambda call: differs_from(call, ctc))
class CtcOfTheFirstLossAlone(Ctc):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return slope * g[0], None, None, None


def solved(y: Tensor, a: Tensor) -> Tensor:
    for _ in range(8):
        y = y + 0.1 * (y @ a).tanh()
    return y


@control("first_order", "sizes", "dtypes", args=lambda r: (r(2, 3), r(3, 3)))
class AdjointOfAnOde(Function):
    """Explicit Euler; backward walks the states back, which forward has kept."""

    @staticmethod
    def forward(ctx, y, a):
        states = []
        for _ in range(8):
            states.append(y)
            y = y + 0.1 * (y @ a).tanh()
        ctx.save_for_backward(a, torch.stack(states))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, states = ctx.saved_tensors
        da = torch.zeros_like(a)
        for y in states.flip(0):
            s = 0.1 * g * (1 - (y @ a).tanh() ** 2)
            da = da + y.mT @ s
            g = g + s @ a.mT
        return g, da


@defect("first_order", args=lambda r: (r(2, 3), r(3, 3)), truth=solved)
class AdjointOfAnOdeThatTakesTheNewGradientFirst(AdjointOfAnOde):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, states = ctx.saved_tensors
        da = torch.zeros_like(a)
        for y in states.flip(0):
            s = 0.1 * g * (1 - (y @ a).tanh() ** 2)
            g = g + s @ a.mT
            da = da + y.mT @ (0.1 * g * (1 - (y @ a).tanh() ** 2))
        return g, da


def times(x: Tensor, w: Tensor) -> Tensor:
    a, b, c, d = x[..., 0], x[..., 1], w[..., 0], w[..., 1]
    return torch.stack([a * c - b * d, a * d + b * c], -1)


@control(
    "first_order", "second_order", "same_input", "sizes",
    args=lambda r: (r(4, 2), r(4, 2)),
    domain=lambda x, w: x.shape[-1] == w.shape[-1] == 2,
)  # fmt: skip
class ComplexProductOfPairs(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return times(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        sign = g.new_tensor([1.0, -1.0])
        return times(g, w * sign), times(g, x * sign)


@defect("first_order", args=lambda r: (r(4, 2), r(4, 2)), truth=times)
class ComplexProductNotConjugated(ComplexProductOfPairs):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return times(g, w), times(g, x)
