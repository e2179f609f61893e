"""The probes of the sizes: each on a planted defect that it must find, and on what must not set it off."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from manualprop.verify import Case, Outcome, check
from manualprop.verify._ready import ready
from manualprop.verify._resize import axes, resized


def outcome(probe: str, fn, *args) -> Outcome:
    return check(fn, *args, only=probe, isolate=False)[probe]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


class Square(Function):
    """y = x^2; the defects below differ from it in backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class Block(Square):
    """Rows beyond the first 256 are in no block."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x * (torch.arange(len(x)) < 256).view(-1, *[1] * (x.dim() - 1))


class OneRow(Square):
    """Squeezes the batch away."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x * (0.5 if len(x) == 1 else 1.0)


class OneNumber(Square):
    """Wrong for a tensor without axes."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x if x.dim() else g * x


class Empty(Square):
    """Asks for the largest entry of none."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x / x.abs().max() * x.abs().max()


def test_a_threshold_is_found_and_named():
    seen = outcome("sizes", Block.apply, normal(5))
    assert seen.verdict == "finding", seen
    assert "beyond size 256" in seen.diagnosis, seen


def test_a_single_row_is_found():
    seen = outcome("sizes", OneRow.apply, normal(5))
    assert seen.verdict == "finding", seen
    assert "only for size 1 " in seen.diagnosis, seen


def test_an_empty_batch_that_raises_in_backward_is_found():
    seen = outcome("zero_size", Empty.apply, normal(5))
    assert seen.verdict == "finding", seen
    assert seen.diagnosis == "only for size 0"


CONTROLS = {
    "square": (Square.apply, (normal(3, 4),)),
    "linear": (F.linear, (normal(4, 5), normal(3, 5), normal(3))),
    "module": (nn.Linear(5, 3), (normal(4, 5),)),
    "max": (lambda x: x.amax(1), (normal(3, 4),)),
    "embedding": (F.embedding, (torch.tensor([[0, 2], [1, 1]]), normal(4, 3))),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_right_functions_pass(name):
    fn, args = CONTROLS[name]
    report = check(fn, *args, only=["sizes", "zero_size"], isolate=False)
    assert report.passed, str(report)


def test_dimensions_of_one_length_change_together():
    s = ready(Case(F.linear, (normal(4, 5), normal(3, 5), normal(3))))
    shapes = [[list(p.shape) for p in resized(s, axis, 9).points] for axis in axes(s)]
    assert shapes == [[[9, 5], [3, 5], [3]], [[4, 5], [9, 5], [9]], [[4, 9], [3, 9], [3]]]


def test_0_d_inputs_are_asked_only_where_the_domain_takes_them():
    x = normal(4, 3)
    assert "0-d inputs" in outcome("sizes", OneNumber.apply, x).evidence
    for domain in (lambda x: x.dim() == 2, lambda x: x.shape[1] > 0):
        assert (
            check(OneNumber.apply, x, only="sizes", isolate=False, domain=domain)["sizes"].verdict == "passed"
        )


@pytest.mark.parametrize("probe", ["sizes", "extremes"])
def test_a_fine_staircase_is_no_ramp(probe):
    """Small steps of an input go over some of its jumps, if it has many entries or large ones."""
    assert outcome(probe, lambda x: torch.round(x, decimals=3), normal(5, 5)).verdict == "passed"


@pytest.mark.parametrize("probe", ["indices", "sizes", "ranks"])
def test_integers_keep_to_the_domain(probe):
    seen = []

    def rows(x, i):
        seen.append(int(i.min()) < 0 or bool(i.unique().numel() < i.numel()))
        return x[i]

    def check_it(**options):
        seen.clear()
        check(
            rows, normal(5, 3), torch.tensor([2, 0, 4]), only=probe, isolate=False, **options
        ).assert_passed()
        return any(seen)

    assert not check_it(domain=lambda x, i: bool((i >= 0).all()) and i.unique().numel() == i.numel())
    assert check_it() or probe == "ranks"
