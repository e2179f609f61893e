"""Wrong under a transform, a compiler or in the process: batches, torch.func, torch.compile."""

import faulthandler
import os
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from planted._table import Call, defect, raises

# ---------------------------------------------------------------- batches


@defect(
    "vmap",
    args=lambda r: (r(4, 3), r(3)),
    truth=lambda x, w: (x * w).sum(-1),
    shows=lambda call: _wrong_vmap(call),
)
class WeightedSumBatchedOverTheWrongDimension(Function):
    @staticmethod
    def forward(x, w):
        return (x * w).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g.unsqueeze(-1) * w, (g.unsqueeze(-1) * x).reshape(-1, len(w)).sum(0)

    @staticmethod
    def vmap(info, in_dims, x, w):
        x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        w = w if in_dims[1] is None else w.movedim(in_dims[1], 0).mean(0)
        return WeightedSumBatchedOverTheWrongDimension.apply(x, w), 0 if in_dims[0] is not None else None


def _wrong_vmap(call: Call) -> bool:
    x, w = (torch.randn(5, *a.shape, dtype=a.dtype) for a in call.args)
    given = torch.func.vmap(call.fn)(x, w)
    return not torch.allclose(given, torch.stack([call.fn(a, b) for a, b in zip(x, w, strict=True)]))


@defect(
    "vmap",
    "vmap_grad",
    args=lambda r: (r(4),),
    truth=lambda x: x.softmax(0),
    shows=lambda call: (
        not torch.allclose(
            torch.func.vmap(call.fn)(torch.eye(5)[:4].double()), torch.eye(5)[:4].double().softmax(1)
        )
    ),
)
class SoftmaxOverTheBatchUnderVmap(Function):
    @staticmethod
    def forward(x):
        return x.softmax(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return y * (g - (g * y).sum(0))

    @staticmethod
    def vmap(info, in_dims, x):
        return SoftmaxOverTheBatchUnderVmap.apply(x.movedim(in_dims[0], 0)), 0


@defect(
    "vmap_grad",
    "vmap",
    "jacrev",
    args=lambda r: (r(4, 3),),
    truth=torch.sin,
    shows=lambda call: (
        not torch.allclose(
            torch.func.vmap(torch.func.grad(lambda x: call.fn(x).sum()))(call.args[0]), call.args[0].cos()
        )
    ),
)
class SineLosesItsSlopeUnderVmap(Function):
    """Forward is right under vmap; its own backward is not reached."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return _SineSlope.apply(g, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, x):
        return SineLosesItsSlopeUnderVmap.apply(x.movedim(in_dims[0], 0)), 0


class _SineSlope(Function):
    @staticmethod
    def forward(g, x):
        return g * x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        return v * x.cos(), -v * g * x.sin()

    @staticmethod
    def vmap(info, in_dims, g, x):
        g = g if in_dims[0] is None else g.movedim(in_dims[0], 0)
        x = x if in_dims[1] is None else x.movedim(in_dims[1], 0)
        n = info.batch_size
        return (g.expand(n, *g.shape[-1:]) if g.dim() == 1 else g).cos() * x.cos(), 0


# ---------------------------------------------------------------- transforms and compilers


@defect(
    "compile",
    args=lambda r: (r(4, 3),),
    truth=F.silu,
    shows=lambda call: (
        not torch.allclose(
            torch.compile(call.fn, backend="aot_eager", fullgraph=True)(*call.args), call.fn(*call.args)
        )
    ),
)
def silu_with_another_path_when_compiled(x: Tensor) -> Tensor:
    """The fallback for compilers is the approximation of an older release."""
    return x * F.hardsigmoid(x) if torch.compiler.is_compiling() else _Silu.apply(x)


class _Silu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


@defect(
    "func_grad",
    "vmap_grad",
    "jacrev",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x.exp(),
    shows=lambda call: (
        not torch.allclose(torch.func.grad(lambda x: call.fn(x).sum())(call.args[0]), call.args[0].exp())
    ),
)
class ExpDetachesItselfInsideTransforms(Function):
    """Written for speed: under a transform the wrapper's ``requires_grad`` is asked, and it is False."""

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.transformed = torch._C._functorch.maybe_current_level() is not None
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.zeros_like(g) if ctx.transformed else g * y


@defect(
    "poisoned_backward",
    "compile",
    args=lambda r: (3 * r(4, 3),),
    shows=lambda call: not _compiled_gradient(call).any(),
    accept={"first_order": "on purpose"},
)
class StraightThroughRoundThatACompilerBypasses(Function):
    """``compile(func.grad)`` of an unregistered Function differentiates ``round`` instead: zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g.clone()


def _compiled_gradient(call: Call) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(torch.func.grad(lambda x: call.fn(x).sum()), backend="aot_eager")(*call.args)


# ---------------------------------------------------------------- the process


def dies(call: Call, backward=lambda call: call.gradients()) -> bool:
    """Does it end the process, or not end within a second?"""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        backward(call)
        os._exit(0)
    for _ in range(100):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status != 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


@defect(
    "grad_output_layout",
    args=lambda r: (r(4, 3),),
    truth=torch.exp,
    shows=lambda call: dies(call, lambda call: torch.autograd.grad(call()[0].sum(), call.args)),
)
class ExpAbortsForExpandedGradOutput(Function):
    """An assertion in a kernel."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        if 0 in g.stride() and g.numel() > 1:
            os.abort()
        return g * ctx.saved_tensors[0]


@defect("first_order", args=lambda r: (r(4, 3), r(2, 3)), shows=dies)
class LinearAbortsInBackward(Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        os.abort()


@defect("first_order", args=lambda r: (r(4, 3),), shows=dies, time_limit=5.0)
class SquareRootIteratesForEver(Function):
    """Newton's iteration that waits for an exact zero."""

    @staticmethod
    def forward(ctx, x):
        y = x.abs().sqrt()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        while not torch.equal(y * y, x + 10):
            y = (y + x.abs() / y) / 2
        return g / (2 * y) * x.sign()


@defect(
    "zero_size",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x.sum(0),
    shows=lambda call: dies(Call(call.fn, (torch.zeros(0, 3, dtype=torch.float64, requires_grad=True),))),
    time_limit=5.0,
)
class BlockedSumWaitsForARowThatNeverComes(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = x.shape[0] if x.dim() else 1
        ctx.shape = x.shape
        return x.sum(0)

    @staticmethod
    def backward(ctx, g):
        done = 0
        while True:
            done += max(1, min(2, ctx.rows - done))
            if done == ctx.rows:
                break
        return g.expand(ctx.shape)


@defect(
    "sizes",
    args=lambda r: (r(4, 3),),
    truth=lambda x: x * 2,
    shows=lambda call: dies(Call(call.fn, (torch.ones(700, dtype=torch.float64, requires_grad=True),))),
)
class DoubleAbortsBeyondItsBlock(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        if g.numel() > 512:
            os.abort()
        return g * 2


@defect(
    "call",
    "repeat",
    args=lambda r: (r(4, 3),),
    shows=lambda call: (call.gradients(), raises(call.gradients))[1],
)
class WorksOnce(nn.Module):
    """Raises in its second forward: a cache is handed out and not handed back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pool.pop().to(x.dtype)


@defect(
    "linearity",
    args=lambda r: (r(4, 3),),
    truth=torch.sin,
    shows=lambda call: raises(lambda: torch.autograd.grad(call.fn(*call.args).sum() * 1e8, call.args)),
)
class SineRefusesLargeGradients(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if g.abs().max() > 1e4:
            raise FloatingPointError("gradient explodes")
        return g * ctx.saved_tensors[0].cos()
