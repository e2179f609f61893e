"""Rows of the activations."""

from torch import Tensor

from cases._case import Case, real
from manualprop.functions import SELU


def x() -> tuple[object, ...]:
    """Points clear of every kink below."""
    return (real(3, 5, low=-3.31, high=3.73),)


def relu_squared(x: Tensor) -> Tensor:
    return x.relu().square()


def row(name: str, keeps: str = "input", **fields: object) -> Case:
    return Case(name, x, elementwise=True, keeps=(0,) if keeps == "input" else ("output",), **fields)  # type: ignore[arg-type]


ALPHA = {"gradient_is_torchs": "torch rounds 1 / alpha to float32: 2e-8 off in float64"}
OVERFLOW = "torch's e^x overflows below the threshold: inf, where the value is x"
SIXTH = {"gradient_is_torchs": "torch multiplies by a 1/6 rounded to float32: 5e-9 off in float64"}

# fmt: off
CASES = [
    row("celu",        "output", kinks={0.0: 1.0}),
    row("celu",        "output", kwargs={"alpha": 0.7}, kinks={0.0: 1.0}, except_for=ALPHA),
    row("celu",        "output", kwargs={"alpha": -0.9}, special=(0.0, 1e-4, 20.0, -20.0, 89.0), except_for=ALPHA | {"second_derivative_of_a_sum": ALPHA["gradient_is_torchs"]}),
    row("elu",         "output", kinks={0.0: 1.0}),
    row("elu",         "output", kwargs={"alpha": 0.6}, kinks={0.0: 0.6}),
    row("elu",         "input",  kwargs={"alpha": -0.6}, kinks={0.0: -0.6}),
    row("gelu"),
    row("gelu",        kwargs={"approximate": "tanh"}),
    row("hardshrink",  "output", kinks={0.5: 0.0, -0.5: 0.0}),
    row("hardshrink",  "output", kwargs={"lambd": 1.1}, kinks={1.1: 0.0, -1.1: 0.0}),
    row("hardshrink",  "output", kwargs={"lambd": -1.0}),
    row("hardsigmoid", "output", kinks={3.0: 0.0, -3.0: 0.0}, except_for=SIXTH),
    row("hardswish",   kinks={3.0: 1.0, -3.0: 0.0}),
    row("hardtanh",    "output", kinks={1.0: 0.0, -1.0: 0.0}),
    row("hardtanh",    "output", kwargs={"min_val": -0.3, "max_val": 2.1}, kinks={-0.3: 0.0, 2.1: 0.0}),
    row("leaky_relu",  "output", kinks={0.0: 0.01}),
    row("leaky_relu",  "output", kwargs={"negative_slope": 0.3}, kinks={0.0: 0.3}),
    row("leaky_relu",  "output", kwargs={"negative_slope": 0.0}, kinks={0.0: 0.0}),
    row("leaky_relu",  "input",  kwargs={"negative_slope": -0.3}, kinks={0.0: -0.3}),
    row("logsigmoid",  "output"),
    row("mish"),
    row("relu",        "output", kinks={0.0: 0.0}),
    row("relu6",       "output", kinks={0.0: 0.0, 6.0: 0.0}),
    row("relu_squared", "output", kinks={0.0: 0.0}, reference=relu_squared, except_for={"second_order_of_an_infinite_gradient_is_torchs": "written in y, the second derivative is 1 / sqrt(y) times 2 sqrt(y): at x = inf, 0 times infinity"}),
    row("selu",        "output", kinks={0.0: SELU.LAMBDA * SELU.ALPHA}),
    row("sigmoid",     "output"),
    row("silu"),
    row("softplus",    "input"),
    row("softplus",    "output", kwargs={"beta": 1.7, "threshold": 40}),
    row("softplus",    "input",  kwargs={"beta": 1.7, "threshold": 4}),
    row("softplus",    "output", kwargs={"threshold": 1e4}, special=(0.0, -0.0, 1e-40, 1e-4, 20.0, -20.0, -89.0, -1e4), except_for={"value_is_torchs_to_the_bit": OVERFLOW, "value_is_of_torchs_kind": OVERFLOW}),
    row("softshrink",  "output", kinks={0.5: 0.0, -0.5: 0.0}),
    row("softshrink",  "output", kwargs={"lambd": 1.1}, kinks={1.1: 0.0, -1.1: 0.0}),
    row("softsign",    "output", kinks={0.0: 1.0}),
    row("tanh",        "output"),
    row("tanhshrink"),
    row("threshold",   kwargs={"threshold": 0.2, "value": -1.5}, kinks={0.2: 0.0}),
    Case("softmax",     lambda: (real(3, 5),), {"dim": -1}, keeps=("output",)),
    Case("softmax",     lambda: (real(2, 3, 4),), {"dim": 1}, keeps=("output",)),
    Case("softmin",     lambda: (real(3, 5),), {"dim": 0}, keeps=("output",)),
    Case("log_softmax", lambda: (real(3, 5),), {"dim": -1}, keeps=("output",)),
    Case("log_softmax", lambda: (real(2, 3, 4),), {"dim": 1}, keeps=("output",)),
]
# fmt: on
