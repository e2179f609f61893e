"""The probes of dtypes, autocast, extreme values and ties.  More planted defects stand in ``planted``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import CONTROLS
from planted.controls_alarms import symmetric
from torch import Tensor
from torch.autograd import Function

from manualprop.verify import check

X = torch.tensor([[0.3, -1.2, 2.0], [0.9, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)


def by_hand(f: Callable[..., Any], df: Callable[..., Any]) -> Callable[..., Any]:
    class ByHand(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            ctx.save_for_backward(x)
            return f(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return df(ctx.saved_tensors[0], g)

    return ByHand.apply


def outcome(probe: str, fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    return check(fn, *(inputs or (X,)), only=probe, isolate=False, **options)[probe]


def test_a_gradient_that_is_right_in_float64_only() -> None:
    wrong = by_hand(torch.sin, lambda x, g: g * x.cos() * (1 if x.dtype == torch.float64 else 2))
    found = outcome("dtypes", wrong)
    assert (found.verdict, found.diagnosis) == ("finding", "wrong only in dtype float32, bfloat16 or float16")


@pytest.mark.parametrize("constant", [torch.tensor(0.3), torch.full((2, 3), 0.3)], ids=["0-d", "2-d"])
def test_a_constant_in_float32_is_seen_in_float64(constant: Tensor) -> None:
    found = outcome("dtypes", by_hand(lambda x: 0.3 * x, lambda x, g: g * constant.to(x.device)))
    assert "float64: the gradient of x is off by 1.2e-08" in found.evidence


def test_a_row_of_zeros_is_among_the_few_points_of_quick() -> None:
    def slow(x: Tensor) -> Tensor:
        for _ in range(150):
            x = x.clone()
        return x.sin()

    wrong = by_hand(slow, lambda x, g: g * x.cos() * torch.where(x.norm(dim=-1, keepdim=True) < 1e-6, -1, 1))
    found = check(wrong, X, only="extremes", level="quick", isolate=False)["extremes"]
    assert "by backward" in found.evidence and found.evidence.endswith("[0] = 0")


def test_a_dtype_that_forward_refuses_is_a_limit_and_one_that_backward_refuses_a_finding() -> None:
    def float64_only(x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            raise TypeError("float64 only")
        return x.sin()

    refused = outcome("dtypes", by_hand(float64_only, lambda x, g: g * x.cos()))
    assert refused.verdict == "limit"
    half_way = outcome("dtypes", by_hand(torch.sin, lambda x, g: g * float64_only(x + torch.pi / 2)))
    assert "forward accepts it, backward raises TypeError: float64 only" in half_way.evidence


def test_autocast() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert outcome("autocast", F.linear, X, weight).verdict == "passed"

    def doubled(x: Tensor) -> Tensor:
        return by_hand(torch.sin, lambda x, g: g * x.cos() * (2 if g.dtype == torch.bfloat16 else 1))(
            x.bfloat16() if torch.is_autocast_enabled("cpu") else x
        )

    assert "instead of" in outcome("autocast", doubled).evidence


def test_extremes() -> None:
    overflow = by_hand(F.softplus, lambda x, g: g * x.exp() / (1 + x.exp()))
    found = outcome("extremes", overflow)
    assert "the gradient of x is NaN, the value is finite and has a slope" in found.evidence
    assert found.diagnosis == "only at extreme values"
    assert outcome("extremes", torch.sqrt, X.abs()).verdict == "passed", "infinite at 0, as its slope is"
    assert outcome("extremes", F.softplus).verdict == "passed"


@pytest.mark.parametrize(("slope", "verdict"), [(1.0, "passed"), (3.0, "finding")])
def test_at_a_kink_float32_may_take_any_slope_of_those_nearby(slope: float, verdict: str) -> None:
    def df(x: Tensor, g: Tensor) -> Tensor:
        at_zero = 0.0 if x.dtype == torch.float64 else slope
        return g * torch.where(x == 0, at_zero, x.sign())

    found = outcome("extremes", by_hand(torch.abs, df))
    assert found.verdict == verdict, found
    assert verdict == "passed" or "float32" in found.diagnosis


def test_far_out_the_slope_is_measured_along_what_is_allowed_there() -> None:
    """At the border of the definite matrices no direction is known; far within a wrong slope is found."""
    call = next(c for c in CONTROLS if c.name == "root_of_adefinite_matrix").make()
    for seed in (4, 6):
        found = outcome("extremes", call.fn, *call.args, project=symmetric, seed=seed)
        assert found.verdict == "passed", found.evidence
    clipped = by_hand(lambda x: x**2, lambda x, g: 2 * g * x.clamp(max=15))
    found = outcome("extremes", clipped, X, project=lambda x: x.clamp(min=-2))
    assert "the slope in x is 4.25204, by backward 3.18903 at x with an entry 20" in found.evidence


def test_torchs_mish_has_no_second_derivative_in_float32_at_90() -> None:
    found = outcome("extremes", F.mish)
    assert "the second derivative in input is NaN, in float64 it is finite" in found.evidence
    assert found.diagnosis == "wrong only in dtype float32, only at extreme values"


@pytest.mark.parametrize(
    "fn",
    [torch.relu, torch.abs, lambda x: x.amax(-1), lambda x: x.sort(-1).values, lambda x: x.median(-1).values],
    ids=["relu", "abs", "amax", "sort", "median"],
)
def test_torchs_own_choices_at_ties_are_right(fn: Callable[..., Any]) -> None:
    tied = torch.tensor([[1.0, 1.0, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    found = outcome("ties", fn, tied)
    assert found.verdict == "passed", found.evidence


def test_a_slope_that_is_not_between_those_nearby() -> None:
    found = outcome("ties", by_hand(torch.relu, lambda x, g: g * (x > 0) + 2 * g * (x == 0)))
    assert found.diagnosis == "wrong only at ties and kinks"
    assert "the gradient of x[0, 0] is 2, nearby it is from 0 to 1" in found.evidence


def test_torchs_prelu_takes_another_slope_forwards_than_backwards_at_0() -> None:
    slope = torch.tensor([0.25], dtype=torch.float64)
    assert "forward mode gives a slope of" in outcome("ties", F.prelu, X, slope).evidence


def test_a_reference_decides_at_a_kink() -> None:
    one = by_hand(torch.relu, lambda x, g: g * (x >= 0))
    assert outcome("ties", one).verdict == "passed"
    assert "the gradient of x is" in outcome("ties", one, reference=torch.relu).evidence
