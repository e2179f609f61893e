"""The probes of the arguments: each on a planted defect that it must find, and on what must not set it off."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manualprop.verify import Outcome, check
from manualprop.verify._difference import difference, listed
from manualprop.verify.probes.layouts import expansions, layouts

ARGUMENTS = (
    "grad_output_layout",
    "input_layout",
    "requires_grad_subsets",
    "partial_outputs",
    "same_input",
    "aliasing",
    "output_requires_grad",
)


def outcome(probe: str, fn, *args) -> Outcome:
    return check(fn, *args, only=probe, isolate=False)[probe]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


class Scale(Function):
    """y = x * w, right; the defects below differ from it in one place."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x


class MemoryOrder(Scale):
    """Takes grad_output's memory for its entries in order."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = torch.as_strided(g, g.shape, torch.empty(g.shape).stride()) if g.numel() > 1 else g
        return g * w, g * x


class WritesBeside(Scale):
    """Pads grad_output to whole blocks, in place."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        if g.untyped_storage().size() // g.itemsize > g.storage_offset() + g.numel():
            torch.as_strided(g, (1,), (1,), g.storage_offset() + g.numel()).zero_()
        return g * w, g * x


class ViewsAtBackward(Scale):
    """Flattens its saved input, which only a contiguous one allows."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g.reshape(-1) * x.view(-1)).view(g.shape)


class FirstOnly(Scale):
    """Asks needs_input_grad of the wrong argument."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (g * w if ctx.needs_input_grad[0] else None), (g * x if ctx.needs_input_grad[0] else None)


class Two(Function):
    """exp x and sin x; forgets that either may be unused."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.exp(), x.sin()

    @staticmethod
    def backward(ctx, a, b):
        (x,) = ctx.saved_tensors
        return None if a is None else a * x.exp() + (0 if b is None else b * x.cos())


class OneOfTwo(Scale):
    """Takes the same tensor twice for a square, and forgets the factor."""

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return (g * x, None) if x.data_ptr() == w.data_ptr() else (g * w, g * x)


class OutputInInput(Function):
    """Writes its result over the input, and does not say so."""

    @staticmethod
    def forward(ctx, x):
        return x.data

    @staticmethod
    def backward(ctx, g):
        return g.clone()


class OneBuffer(Scale):
    """Both gradients are views of one buffer."""

    @staticmethod
    def forward(ctx, x, w):
        return x + w

    @staticmethod
    def backward(ctx, g):
        buffer = g.clone()
        return buffer.view_as(g), buffer.view_as(g)


class Frozen(nn.Module):
    """Loses the graph in eval mode."""

    def forward(self, x):
        return x.tanh() if self.training else x.detach().tanh()


DEFECTS = [
    (
        "grad_output_layout",
        MemoryOrder.apply,
        (normal(3, 4), normal(3, 4)),
        "only for a transposed.* grad_output",
    ),
    ("grad_output_layout", WritesBeside.apply, (normal(3), normal(3)), "only for a .*sliced grad_output"),
    ("input_layout", ViewsAtBackward.apply, (normal(3, 4), normal(3, 4)), "only for a transposed.* input"),
    (
        "requires_grad_subsets",
        FirstOnly.apply,
        (normal(3), normal(3)),
        "zero: w is not trained only when w requires",
    ),
    ("partial_outputs", Two.apply, (normal(3),), "one path: wrong only when output 1 is used"),
    ("same_input", OneOfTwo.apply, (normal(3), normal(3)), "one path"),
    ("aliasing", OutputInInput.apply, (normal(3),), "overwritten: output 0 shares memory"),
    ("aliasing", OneBuffer.apply, (normal(3), normal(3)), "overwritten: the gradient of .* shares memory"),
    ("output_requires_grad", lambda x: torch.tanh(x.detach()), (normal(3),), "zero: .* cut off"),
    ("output_requires_grad", Frozen(), (normal(3),), "zero: .* cut off"),
]


@pytest.mark.parametrize(
    ("probe", "fn", "args", "says"), DEFECTS, ids=lambda value: getattr(value, "__qualname__", None)
)
def test_a_defect_is_found(probe, fn, args, says):
    seen = outcome(probe, fn, *args)
    assert seen.verdict == "finding", seen
    assert re.search(says, seen.diagnosis), seen


CONTROLS = {
    "product": (Scale.apply, (normal(3, 4), normal(3, 4))),
    "linear": (F.linear, (normal(4, 5), normal(3, 5), normal(3))),
    "softmax": (lambda x: x.softmax(1), (normal(4, 5),)),
    "batch norm": (nn.BatchNorm1d(3), (normal(5, 3),)),
    "convolution": (F.conv2d, (normal(2, 3, 5, 5), normal(4, 3, 3, 3))),
    "sort": (lambda x: x.sort(1)[0], (normal(4, 5),)),
    "split": (lambda x: x.split(2), (normal(4, 5),)),
    "identity": (lambda x: x, (normal(4),)),
    "in place": (lambda x: F.relu(x, inplace=True), (normal(4),)),
    "dropout": (nn.Dropout(0.5), (normal(4, 5),)),
    "moments": (lambda x: torch.var_mean(x, 1), (normal(4, 5),)),
    "deviation": (lambda x: x.std(), (normal(4, 5, 4),)),  # of equal entries: rounding
    "embedding": (F.embedding, (torch.tensor([[0, 2], [1, 1]]), normal(4, 3))),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_right_functions_pass(name):
    fn, args = CONTROLS[name]
    report = check(fn, *args, only=ARGUMENTS, isolate=False)
    assert report.passed, str(report)
    assert not report.limits, str(report)


def test_what_is_refused_in_forward_is_a_limit():
    def flattened(x):
        return x.view(-1).tanh()

    seen = outcome("input_layout", flattened, normal(3, 4))
    assert seen.verdict == "limit"
    assert "view" in seen.evidence


def test_an_output_that_is_not_differentiable_loses_a_term_unless_it_does_not_depend():
    seen = outcome("output_requires_grad", lambda x: (x.tanh(), x.detach().mean()), normal(4))
    assert seen.verdict == "finding"
    assert "output 1" in seen.evidence and "in silence" in seen.evidence
    constant = outcome("output_requires_grad", lambda x: (x.tanh(), torch.ones(2)), normal(4))
    assert constant.verdict == "passed"


def test_torch_batch_norm_reads_a_strided_weight_without_its_stride():
    def batch_norm(x, weight):
        return F.batch_norm(x, None, None, weight, training=True)

    seen = outcome("input_layout", batch_norm, normal(6, 4), normal(4))
    assert seen.diagnosis.startswith("only for a strided")


def test_layouts_hold_the_values_and_nothing_else():
    t = torch.arange(120.0).view(1, 2, 3, 4, 5)
    names = []
    for layout in layouts(t):
        names.append(layout.name)
        assert torch.equal(layout.view, t)
        assert int(layout.own.sum()) == t.numel()
        assert layout.buffer[~layout.own].isnan().all()
    assert names == ["transposed", "permuted", "channels-last", "strided", "sliced", "sliced"]
    assert all(0 in e.stride() for e in expansions(t))


def test_a_difference_names_the_worst_entry():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.5, 4.0]])
    worst = difference([a, None], [b, torch.zeros(2)], 1e-6)
    assert worst is not None
    assert (worst.which, worst.place, worst.found, worst.expected) == (0, (1, 0), 3.0, 3.5)
    assert difference([a], [a.clone()], 0.0) is None
    assert difference([torch.tensor([torch.nan])], [torch.tensor([1.0])], 1e-6) is not None
    assert difference([torch.tensor([torch.nan])], [torch.tensor([torch.nan])], 1e-6) is None


def test_words_are_listed_once():
    assert listed(["a", "b", "a", "c"]) == "a, b or c"
    assert listed(["a"]) == "a"


class Raises(Scale):
    """A backward that never works."""

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no such luck")


def test_a_backward_that_raises_is_reported_once():
    report = check(Raises.apply, normal(3), normal(3), only=["first_order", *ARGUMENTS], isolate=False)
    assert [o.probe for o in report.findings] == ["first_order"], str(report)


def test_a_forward_that_reads_the_memory_is_reported_once() -> None:
    """A batch along the last axis comes in another layout, too."""

    def as_if_transposed(x: Tensor) -> Tensor:
        return torch.as_strided(x, (2, 2), (1, 2))

    report = check(
        as_if_transposed, normal(3, 3), only=("first_order", "input_layout", "vmap"), isolate=False
    )
    assert [o.probe for o in report.findings] == ["input_layout"]
    assert report["vmap"].evidence.startswith("see input_layout")
