"""Rules that are wrong on purpose: each must be caught, by the property that is there for it."""

import functools
from collections.abc import Callable
from typing import Any

import properties
import pytest
import torch
from cases import Case, real
from torch import Tensor
from torch.autograd import Function

from manualprop import functional as F
from manualprop import functions as rules
from manualprop.functions import Elementwise


class OffByOneInTenThousandth(Elementwise):
    saves = "output"
    f = staticmethod(torch.tanh)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return (1 - y * y) * (1 + 1e-4)

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return -2 * y * (1 + 1e-4)


class CurvatureOfTheWrongSign(Elementwise):
    saves = "output"
    f = staticmethod(torch.tanh)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return 1 - y * y

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return 2 * y


class NoCurvature(Elementwise):
    saves = "output"
    f = staticmethod(torch.tanh)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return 1 - y * y


class ConstantsInFloat32(Elementwise):
    """torch.where of two Python numbers is float32, whatever the input."""

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(x, 0.3)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, 0.3)


class OverwritesWhatItSaved(Elementwise):
    saves = "output"
    f = staticmethod(torch.tanh)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return y.data.square_().neg_().add_(1)

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return -2 * y


class WrongKink(Elementwise):
    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


class NotFiniteFarOut(Elementwise):
    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return torch.exp(x) / (1 + torch.exp(x)) ** 2

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        e = torch.exp(x)
        return e * (1 - e) / (1 + e) ** 3


class Keeps(Elementwise):
    """Keeps the input where the output would do."""

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return 1 - torch.tanh(x) ** 2

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        w = torch.tanh(x)
        return -2 * w * (1 - w * w)


def by(rule: type[Function]) -> Callable[..., Any]:
    def function(x: Tensor) -> Any:
        return rule.apply(x)

    return function


class Planted(Case):
    """A row whose function is a wrong rule, to be held against a right function of torch."""

    def __call__(self, *arguments: Any) -> Any:
        return by(WRONG[self.label])(*arguments)


WRONG = {
    c.__name__: c
    for c in (
        OffByOneInTenThousandth,
        CurvatureOfTheWrongSign,
        NoCurvature,
        ConstantsInFloat32,
        OverwritesWhatItSaved,
        WrongKink,
        NotFiniteFarOut,
        Keeps,
    )
}


@pytest.mark.parametrize(
    ("label", "name", "caught_by"),
    [
        ("OffByOneInTenThousandth", "tanh", properties.first_derivative),
        ("OffByOneInTenThousandth", "tanh", properties.gradient_is_torchs),
        ("CurvatureOfTheWrongSign", "tanh", properties.second_derivative),
        ("NoCurvature", "tanh", properties.second_derivative),
        ("ConstantsInFloat32", "leaky_relu", properties.gradient_is_torchs),
        ("OverwritesWhatItSaved", "tanh", properties.leaves_all_else_alone),
        ("WrongKink", "relu", properties.slope_at_the_kinks),
        ("NotFiniteFarOut", "sigmoid", properties.extremes_stay_finite),
        ("Keeps", "tanh", properties.keeps_what_it_declares),
    ],
)
def test_a_wrong_rule_is_caught(label: str, name: str, caught_by: Callable[[Case], None]) -> None:
    kwargs = {"negative_slope": 0.3} if name == "leaky_relu" else {}
    kinks = {0.0: 0.0} if name == "relu" else {}
    points = functools.partial(real, 3, 5, low=-3.31, high=3.73)
    case = Planted(name, lambda: (points(),), kwargs, True, kinks, keeps=("output",), label=label)
    with pytest.raises((AssertionError, RuntimeError)):
        caught_by(case)


class WrongLinear(rules.Linear):
    """Right for a contiguous gradient of ones only: sums the storage, not the tensor."""

    @staticmethod
    def bias_gradient(g: Tensor) -> Tensor:
        return torch.as_strided(g, (g.numel() // g.shape[-1], g.shape[-1]), (g.shape[-1], 1)).sum(0)


class Transposed(rules.Linear):
    @staticmethod
    def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
        return rules.Linear.weight_gradient(g, x).flip(0)


@pytest.mark.parametrize(
    ("attribute", "wrong", "caught_by"),
    [
        ("bias_gradient", WrongLinear.bias_gradient, properties.any_layout),
        ("weight_gradient", Transposed.weight_gradient, properties.first_derivative),
    ],
)
def test_a_wrong_linear_is_caught(
    attribute: str, wrong: Any, caught_by: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("linear", lambda: (real(4, 3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1))
    caught_by(case)
    monkeypatch.setattr(rules.Linear, attribute, staticmethod(wrong))
    with pytest.raises((AssertionError, RuntimeError)):
        caught_by(case)


def test_a_mean_of_means_is_caught() -> None:
    """A mean over all targets instead of those that count differs as soon as one is ignored."""
    x, t = real(5, 4), torch.tensor([0, -100, 2, 3, -100])
    right = F.cross_entropy(x, t)
    wrong = F.cross_entropy(x, t, reduction="none").mean()
    torch.testing.assert_close(right, torch.nn.functional.cross_entropy(x, t))
    assert not torch.allclose(right, wrong)
