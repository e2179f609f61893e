"""In the manner of libraries: rotary embeddings, adapters, attention, what is no derivative on purpose, losses, modules."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import Call, control, defect
from planted.defects_extremes import gradient_at
from planted.defects_memory import lives_on
from planted.defects_numbers import off

# ---------------------------------------------------------------- rotary embeddings, adapters, attention


@control("first_order", "mutation", "grad_output_layout", args=lambda r: (r(2, 3, 4), r(3, 2, grad=False)))
class RotaryEmbedding(Function):
    """An orthogonal map: its transpose is the rotation back."""

    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return _rotated(x, angle.cos(), angle.sin())

    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return _rotated(g, angle.cos(), -angle.sin()), None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@defect(
    "first_order",
    args=lambda r: (r(2, 3, 4), r(3, 2, grad=False)),
    truth=lambda x, angle: _rotated(x, angle.cos(), angle.sin()),
)
class RotaryEmbeddingRotatesForwardInBackward(Function):
    @staticmethod
    def forward(ctx, x, angle):
        ctx.save_for_backward(angle)
        return _rotated(x, angle.cos(), angle.sin())

    @staticmethod
    def backward(ctx, g):
        (angle,) = ctx.saved_tensors
        return _rotated(g, angle.cos(), angle.sin()), None


@control(
    "first_order", "requires_grad_subsets", args=lambda r: (r(5, 4), r(3, 4, grad=False), r(2, 4), r(3, 2))
)
class LowRankAdapter(Function):
    """y = x W^T + s x A^T B^T with a frozen W."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return x @ weight.T + 0.5 * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        gb = 0.5 * g @ b
        return g @ weight + gb @ a, None, gb.T @ x, 0.5 * g.T @ (x @ a.T)


@defect(
    "first_order",
    args=lambda r: (r(5, 4), r(3, 4, grad=False), r(2, 4), r(3, 2)),
    says="one path|no simple",
    truth=lambda x, w, a, b: x @ w.T + 0.5 * (x @ a.T) @ b.T,
)
class LowRankAdapterForgetsItsPathToTheInput(Function):
    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return x @ weight.T + 0.5 * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        gb = 0.5 * g @ b
        return g @ weight, None, gb.T @ x, 0.5 * g.T @ (x @ a.T)


@defect(
    "sizes",
    args=lambda r: (r(2, 4, 3), r(2, 4, 3), r(2, 4, 3)),
    truth=lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    shows=lambda call: off(call, *(torch.randn(1, 20, 3, dtype=torch.float64) for _ in range(3))),
)
class BlockedAttentionLosesItsLastPartialBlock(Function):
    """Keys in blocks of 16; of a longer sequence the rest gets no gradient."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        c = 1 / math.sqrt(q.shape[-1])
        p = (q @ k.mT * c).softmax(-1)
        dp = g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * c
        dk, dv = ds.mT @ q, p.mT @ g
        s = k.shape[-2]
        if s > 16:
            dk[..., s - s % 16 :, :] = 0
            dv[..., s - s % 16 :, :] = 0
        return ds @ k, dk, dv


@control("first_order", "second_order", "sizes", args=lambda r: (r(2, 5, 3), r.positive(2, 5, 3)))
class GatedCumulativeSum(Function):
    """h_t = a_t h_{t-1} + x_t: backward is the same recurrence in reverse."""

    @staticmethod
    def forward(ctx, x, a):
        h = _scan(x, a)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        if not g.shape[1]:
            return g.clone(), torch.zeros_like(a)
        shifted = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        dx = _scan(g.flip(1), shifted.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return dx, dx * before


@defect(
    "first_order",
    args=lambda r: (r(2, 5, 3), r.positive(2, 5, 3)),
    truth=lambda x, a: _scan(x, a),
)
class GatedCumulativeSumShiftsItsGatesWrongly(Function):
    """a_t for a_{t+1}: off by one step."""

    @staticmethod
    def forward(ctx, x, a):
        h = _scan(x, a)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, h = ctx.saved_tensors
        dx = _scan(g.flip(1), a.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return dx, dx * before


def _scan(x: Tensor, a: Tensor) -> Tensor:
    states = []
    h = torch.zeros_like(x[:, 0]) if x.shape[1] else None
    for x_t, a_t in zip(x.unbind(1), a.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, 1) if states else x * a


# ---------------------------------------------------------------- not the derivative, on purpose


@defect("first_order", args=lambda r: (3 * r(4, 3),), shows=lambda call: bool(call.gradients()[0].any()))
class StraightThroughSign(Function):
    """Not declared: it is not the derivative, and must be said so."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-1e3, 1e3) * 1.0


@defect("first_order", args=lambda r: (r(4, 3),), says="wrong sign|constant factor -", truth=lambda x: x * 1)
class GradientReversal(Function):
    @staticmethod
    def forward(ctx, x, scale=0.5):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.scale * g, None


@defect(
    "reference", args=lambda r: (r(4, 3),), truth=torch.tanh, reference=torch.sin, shows=lambda call: True
)
class TanhHeldAgainstASine(Function):
    """Right in itself, and not the function that it should be."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


# ---------------------------------------------------------------- losses, implicit functions, modules


@control("first_order", "extremes", args=lambda r: (r(6), torch.tensor([0.0, 1, 1, 0, 1, 0]).double()))
class SigmoidFocalLoss(Function):
    @staticmethod
    def forward(ctx, x, target):
        ctx.save_for_backward(x, target)
        z = torch.where(target > 0, x, -x)  # the loss is (1 - p)^2 (-log p), p = sigmoid(z)
        return ((-z).sigmoid().square() * F.softplus(-z)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, target = ctx.saved_tensors
        sign = torch.where(target > 0, 1.0, -1.0).to(x.dtype)
        z = sign * x
        p, q, loss = z.sigmoid(), (-z).sigmoid(), F.softplus(-z)
        return g * sign * q * q * (-2 * p * loss - q), None


def contracts(weight: Tensor, x: Tensor) -> bool:
    """Whether the iteration has a fixed point to go to."""
    return bool(weight.norm() < 4 * len(x))


@control("first_order", "second_order", "sizes", args=lambda r: (r(3, 3), r(3)), domain=contracts)
class FixedPoint(Function):
    """y = tanh(W y / 4 n + x), by iteration; backward solves (I - J^T) u = g, as the implicit function theorem says."""

    @staticmethod
    def forward(ctx, weight, x):
        y = torch.zeros_like(x)
        for _ in range(60):
            y = torch.tanh(weight @ y / (4 * len(y)) + x)
        ctx.save_for_backward(weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        weight, y = ctx.saved_tensors
        slope = 1 - y * y
        eye = torch.eye(len(y), dtype=y.dtype)
        u = torch.linalg.solve(eye - (slope[:, None] * weight / (4 * len(y))).T, g) * slope
        return torch.outer(u, y) / (4 * len(y)), u


@defect(
    "first_order",
    args=lambda r: (r(3, 3), r(3)),
    says="one path|no simple|factor",
    truth=lambda w, x: _iterated(w, x),
    domain=contracts,
)
class FixedPointOfOneStep(Function):
    """One step of the iteration for the solve: the feedback of y on itself is left out."""

    @staticmethod
    def forward(ctx, weight, x):
        y = _iterated(weight, x)
        ctx.save_for_backward(weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        _, y = ctx.saved_tensors
        u = g * (1 - y * y)
        return torch.outer(u, y) / (4 * len(y)), u


def _iterated(weight: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for _ in range(60):
        y = torch.tanh(weight @ y / (4 * len(y)) + x)
    return y


@control("first_order", "saved_tensors", "leaks", "checkpointing", args=lambda r: (r(3, 4),))
class ReversibleBlock(nn.Module):
    """Keeps its outputs and computes its inputs back."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2)
        self.h = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _Reversible.apply(x, self.f.weight, self.f.bias, self.h.weight, self.h.bias)


class _Reversible(Function):
    @staticmethod
    def forward(ctx, x, fw, fb, hw, hb):
        x1, x2 = x.chunk(2, -1)
        y1 = x1 + F.linear(x2, fw, fb)
        y2 = x2 + F.linear(y1, hw, hb)
        y = torch.cat([y1, y2], -1)
        ctx.save_for_backward(y, fw, hw, hb)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, fw, hw, hb = ctx.saved_tensors
        y1, y2 = y.chunk(2, -1)
        g1, g2 = g.chunk(2, -1)
        x2 = y2 - F.linear(y1, hw, hb)
        dhw, dhb = _of_linear(g2, y1)
        g1 = g1 + g2 @ hw
        dfw, dfb = _of_linear(g1, x2)
        return torch.cat([g1, g2 + g1 @ fw], -1), dfw, dfb, dhw, dhb


def _of_linear(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer's weight and bias."""
    g = g.reshape(-1, g.shape[-1])
    return g.T @ x.reshape(-1, x.shape[-1]), g.sum(0)


@defect(
    "leaks",
    "saved_tensors",
    args=lambda r: (r(4, 5),),
    truth=lambda x: x.softmax(-1),
    shows=lambda call: lives_on(call, backward=False),
)
class SparseSoftmaxKeepsItselfAlive(Function):
    """``ctx.output = output``, of the entmax kind."""

    @staticmethod
    def forward(ctx, x):
        ctx.output = x.softmax(-1)
        return ctx.output

    @staticmethod
    def backward(ctx, g):
        y = ctx.output
        return y * (g - (g * y).sum(-1, keepdim=True))


@defect(
    "first_order",
    args=lambda r: (r(3, 8),),
    truth=lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-5),
)
class WeightStandardisationWithTheOtherVariance(Function):
    """Bessel's n - 1 in backward, n in forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, unbiased=False, keepdim=True) + 1e-5)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        centred, n = x - x.mean(1, keepdim=True), x.shape[1]
        s = x.std(1, unbiased=False, keepdim=True)
        inner = (g * centred).sum(1, keepdim=True) / ((n - 1) * s.where(s > 0, 1) * (s + 1e-5))
        return (g - g.mean(1, keepdim=True) - centred * inner) / (s + 1e-5)


# ---------------------------------------------------------------- torch's own


@defect(
    "ties",
    "forward_mode",
    args=lambda r: (torch.tensor([0.0, 1, -1, 0]).double().requires_grad_(), torch.tensor([0.25]).double()),
    shows=lambda call: (
        float(gradient_at(Call(lambda x: call.fn(x, call.args[1]), ()), 0.0)) != 1
        and float(
            torch.func.jvp(
                lambda x: call.fn(x, call.args[1]), (torch.zeros(1).double(),), (torch.ones(1).double(),)
            )[1]
        )
        == 1
    ),
)
def torch_prelu_at_zero(x: Tensor, weight: Tensor) -> Tensor:
    """Slope 0.25 in reverse, 1 forward."""
    return F.prelu(x, weight)


@defect(
    "extremes",
    "second_order",
    "dtypes",
    args=lambda r: (torch.tensor([90.0, 1.0, -2.0]).requires_grad_(),),
    shows=lambda call: bool(_second_in_float32(call).isnan().any()),
)
def torch_mish_in_float32_at_90(x: Tensor) -> Tensor:
    return F.mish(x)


def _no_curvature(call: Call) -> bool:
    x = call.args[0]
    (d,) = torch.autograd.grad(call()[0], x, create_graph=True)
    return not d.requires_grad or torch.autograd.grad(d.sum(), x, allow_unused=True)[0] is None


def _second_in_float32(call: Call) -> Tensor:
    (x,) = call.args
    (d,) = torch.autograd.grad(call.fn(x).sum(), x, create_graph=True)
    return torch.autograd.grad(d.sum(), x)[0]


@defect(
    "second_order",
    "forward_mode",
    "mutation",
    "retain_graph",
    "repeat",
    "func_grad",
    "jacrev",
    "vmap_grad",
    also=("forward_mode",),
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="zero|silent|one path|does not",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: _no_curvature(call),
)
def torch_chunked_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())


@defect(
    "forward_mode",
    "jacfwd",
    also=("second_order",),
    args=lambda r: (r(5, 4), r(3, 4), r.index(3, 5)),
    says="zero",
    truth=lambda x, w, t: F.cross_entropy(x @ w.T, t),
    shows=lambda call: (
        not bool(torch.func.jvp(lambda x: call.fn(x, *call.args[1:]), call.args[:1], call.args[:1])[1])
    ),
)
def torch_chunked_linear_cross_entropy_forward(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())


@defect(
    "input_layout",
    args=lambda r: (r(4, 5),),
    shows=lambda call: not torch.equal(*(t.median(0).values for t in _expanded_twice(call))),
)
def torch_median_of_an_expanded_input(x: Tensor) -> Tensor:
    """Wrong values where the stride along the dimension is 0."""
    return x.median(0).values


def _expanded_twice(call: Call) -> tuple[Tensor, Tensor]:
    x = call.args[0].detach()[:1].expand(4, 5)
    return x, x.contiguous()


@defect(
    "second_order",
    "forward_over_reverse",
    args=lambda r: (r(3, 4), r.positive(3, 1)),
    # Elsewhere its kernels divide by a length of 0 and write past the end, which crashes the process, or does not.
    domain=lambda v, scale: v.dim() == 2 and v.numel() > 0 and scale.shape == (len(v), 1),
    shows=lambda call: not torch.autograd.gradgradcheck(call.fn, call.args, raise_exception=False),
)
def torch_weight_norm_twice(v: Tensor, scale: Tensor) -> Tensor:
    """The double backward of ``torch.nn.utils.parametrizations.weight_norm`` on the CPU."""
    return torch._weight_norm(v, scale, 0)
