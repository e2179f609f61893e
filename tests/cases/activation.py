"""Rows of the activations."""

from typing import Any

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

from cases._case import Case, real
from manualprop.functions import SELU
from manualprop.functions.activation import GELU_C


def x() -> tuple[object, ...]:
    """Points clear of every kink below."""
    return (real(3, 5, low=-3.31, high=3.73),)


def relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def exact_sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def exact_softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


def row(name: str, keeps: str = "input", **fields: object) -> Case:
    return Case(name, x, elementwise=True, keeps=(0,) if keeps == "input" else ("output",), **fields)  # type: ignore[arg-type]


ALPHA = {"gradient_is_torchs": "torch rounds 1 / alpha to float32: 2e-8 off in float64"}
OVERFLOW = "torch's e^x overflows below the threshold: inf, where the value is x"
SIXTH = {"gradient_is_torchs": "torch multiplies by a 1/6 rounded to float32: 5e-9 off in float64"}

# fmt: off
CASES = [
    row("celu",        "output", kinks={0.0: 1.0}, exact=lambda x: x if x > 0 else mpmath.expm1(x)),
    row("celu",        "output", kwargs={"alpha": 0.7}, kinks={0.0: 1.0}, except_for=ALPHA),
    row("celu",        "output", kwargs={"alpha": -0.9}, special=(0.0, 1e-4, 20.0, -20.0, 89.0), except_for=ALPHA | {"second_derivative_of_a_sum": ALPHA["gradient_is_torchs"]}),
    row("elu",         "output", kinks={0.0: 1.0}, exact=lambda x: x if x > 0 else mpmath.expm1(x)),
    row("elu",         "output", kwargs={"alpha": 0.6}, kinks={0.0: 0.6}),
    row("elu",         "input",  kwargs={"alpha": -0.6}, kinks={0.0: -0.6}),
    row("gelu", exact=lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2),
    row("gelu",        kwargs={"approximate": "tanh"}, exact=lambda x: x * exact_sigmoid(2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpf(GELU_C) * x**3))),
    row("hardshrink",  "output", kinks={0.5: 0.0, -0.5: 0.0}, exact=lambda x: x if abs(x) > 0.5 else mpf(0)),
    row("hardshrink",  "output", kwargs={"lambd": 1.1}, kinks={1.1: 0.0, -1.1: 0.0}),
    row("hardshrink",  "output", kwargs={"lambd": -1.0}),
    row("hardsigmoid", "output", kinks={3.0: 0.0, -3.0: 0.0}, except_for=SIXTH, exact=lambda x: min(max(x + 3, 0), 6) / mpf(6)),
    row("hardswish",   kinks={3.0: 1.0, -3.0: 0.0}, exact=lambda x: x * min(max(x + 3, 0), 6) / mpf(6)),
    row("hardtanh",    "output", kinks={1.0: 0.0, -1.0: 0.0}, exact=lambda x: min(max(x, mpf(-1)), mpf(1))),
    row("hardtanh",    "output", kwargs={"min_val": -0.3, "max_val": 2.1}, kinks={-0.3: 0.0, 2.1: 0.0}),
    row("leaky_relu",  "output", kinks={0.0: 0.01}, exact=lambda x: x if x > 0 else x * mpf(0.01)),
    row("leaky_relu",  "output", kwargs={"negative_slope": 0.3}, kinks={0.0: 0.3}),
    row("leaky_relu",  "output", kwargs={"negative_slope": 0.0}, kinks={0.0: 0.0}),
    row("leaky_relu",  "input",  kwargs={"negative_slope": -0.3}, kinks={0.0: -0.3}),
    row("logsigmoid",  "output", exact=lambda x: -exact_softplus(-x)),
    row("mish", exact=lambda x: x * mpmath.tanh(exact_softplus(x))),
    row("relu",        "output", kinks={0.0: 0.0}, exact=lambda x: max(x, mpf(0))),
    row("relu6",       "output", kinks={0.0: 0.0, 6.0: 0.0}, exact=lambda x: min(max(x, mpf(0)), mpf(6))),
    row("relu_squared", "output", kinks={0.0: 0.0}, reference=relu_squared, except_for={"second_order_of_an_infinite_gradient_is_torchs": "written in y, the second derivative is 1 / sqrt(y) times 2 sqrt(y): at x = inf, 0 times infinity"}, exact=lambda x: max(x, mpf(0)) ** 2),
    row("selu",        "output", kinks={0.0: SELU.LAMBDA * SELU.ALPHA}, exact=lambda x: mpf(SELU.LAMBDA) * (x if x > 0 else mpf(SELU.ALPHA) * mpmath.expm1(x))),
    row("sigmoid",     "output", exact=exact_sigmoid),
    row("silu", exact=lambda x: x * exact_sigmoid(x)),
    row("softplus",    "input", exact=exact_softplus),
    row("softplus",    "output", kwargs={"beta": 1.7, "threshold": 40}),
    row("softplus",    "input",  kwargs={"beta": 1.7, "threshold": 4}),
    row("softplus",    "output", kwargs={"threshold": 1e4}, special=(0.0, -0.0, 1e-40, 1e-4, 20.0, -20.0, -89.0, -1e4), except_for={"value_is_torchs_to_the_bit": OVERFLOW, "value_is_of_torchs_kind": OVERFLOW}),
    row("softshrink",  "output", kinks={0.5: 0.0, -0.5: 0.0}, exact=lambda x: x - mpmath.sign(x) / 2 if abs(x) > 0.5 else mpf(0)),
    row("softshrink",  "output", kwargs={"lambd": 1.1}, kinks={1.1: 0.0, -1.1: 0.0}),
    row("softsign",    "output", kinks={0.0: 1.0}, exact=lambda x: x / (1 + abs(x))),
    row("tanh",        "output", exact=mpmath.tanh),
    row("tanhshrink", exact=lambda x: x - mpmath.tanh(x)),
    row("threshold",   kwargs={"threshold": 0.2, "value": -1.5}, kinks={0.2: 0.0}, exact="relu in general"),
    Case("softmax",     lambda: (real(3, 5),), {"dim": -1}, keeps=("output",)),
    Case("softmax",     lambda: (real(2, 3, 4),), {"dim": 1}, keeps=("output",)),
    Case("softmin",     lambda: (real(3, 5),), {"dim": 0}, keeps=("output",)),
    Case("log_softmax", lambda: (real(3, 5),), {"dim": -1}, keeps=("output",)),
    Case("log_softmax", lambda: (real(2, 3, 4),), {"dim": 1}, keeps=("output",)),
]
# fmt: on
