"""The probes of the numbers: each on a planted defect that it must find, and on what must not set it off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from manualprop.verify import Outcome, check

NUMBERS = ("dtypes", "autocast", "extremes", "ties")


def outcome(probe: str, fn, *args) -> Outcome:
    return check(fn, *args, only=probe, isolate=False)[probe]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


class Rectifier(Function):
    """y = max(x, 0.3 x); the defects below differ from it in backward."""

    slope = 0.3

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.3 * g)


class Float32Constant(Rectifier):
    """torch.where of two Python numbers is float32."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x > 0, 1.0, 0.3)


class Doubled(Rectifier):
    """Doubled in bfloat16."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.3 * g) * (2 if x.dtype == torch.bfloat16 else 1)


class OneAndAHalf(Rectifier):
    """1.5 at 0, where the slopes are 0.3 and 1."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.3 * g).where(x != 0, 1.5 * g)


class Overflows(Function):
    """The slope of softplus as a ratio of exponentials."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.exp() / (1 + x.exp())


class EveryTie(Function):
    """Each of several largest gets the whole gradient."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g.unsqueeze(-1) * (x == y.unsqueeze(-1))


class NoCast(Function):
    """A product that autocast makes in bfloat16 in forward, and nobody in backward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


DEFECTS = [
    ("dtypes", Float32Constant.apply, (normal(6, 5),), "only in dtype float64"),
    ("dtypes", Doubled.apply, (normal(6, 5),), "only in dtype bfloat16"),
    ("autocast", NoCast.apply, (normal(4, 5), normal(5, 3)), "only under autocast"),
    ("extremes", Overflows.apply, (normal(4),), "at extremes"),
    ("extremes", F.mish, (normal(4),), "at extremes, only in dtype float32"),
    ("ties", OneAndAHalf.apply, (normal(4, 5),), "only at ties"),
    ("ties", EveryTie.apply, (normal(4, 5),), "only at ties"),
    ("ties", F.prelu, (normal(4, 5), normal(5)), "only at ties"),
]


@pytest.mark.parametrize(("probe", "fn", "args", "says"), DEFECTS)
def test_a_defect_is_found(probe, fn, args, says):
    seen = outcome(probe, fn, *args)
    assert seen.verdict == "finding", seen
    assert seen.diagnosis.startswith(says), seen


CONTROLS = {
    "rectifier": (Rectifier.apply, (normal(4, 5),)),
    "relu": (torch.relu, (normal(4, 5),)),
    "softmax": (lambda x: x.softmax(1), (normal(4, 5),)),
    "layer norm": (lambda x, w: F.layer_norm(x, (5,), w), (normal(4, 5), normal(5))),
    "sort": (lambda x: x.sort(1).values, (normal(4, 5),)),
    "maximum": (torch.maximum, (normal(4, 5), normal(4, 5))),
    "linear": (F.linear, (normal(4, 5), normal(3, 5), normal(3))),
    "norm": (lambda x: x.norm(dim=1), (normal(4, 5),)),
    "embedding": (F.embedding, (torch.tensor([[0, 2], [1, 1]]), normal(4, 3))),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_right_functions_pass(name):
    fn, args = CONTROLS[name]
    report = check(fn, *args, only=NUMBERS, isolate=False)
    assert report.passed, str(report)


def test_a_dtype_that_is_refused_in_forward_is_a_limit():
    def single_or_double(x):
        if x.dtype in (torch.float16, torch.bfloat16):
            raise TypeError("no half precision")
        return x.tanh()

    seen = outcome("dtypes", single_or_double, normal(3))
    assert seen.verdict == "limit", seen
    assert "bfloat16: refused: TypeError" in seen.evidence
