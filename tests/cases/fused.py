"""Rows of the blocks; what stands for torch is the composition of its functions."""

from typing import Any

import torch
import torch.nn.functional as torch_F
from torch import Tensor

from cases import activation as activations
from cases._case import Case, real
from cases.norm import running
from manualprop.functions.fused.mlp import FUSES

# What the next layer keeps anyway.
FROM_OUTPUT = [name for name, rule in FUSES.items() if rule.saves == "output"]


# The first row of each activation says what torch does.
ROWS = {row.name: row for row in reversed(activations.CASES)}


def f(activation: str, u: Tensor) -> Tensor:
    if activation == "gelu_tanh":
        return torch_F.gelu(u, approximate="tanh")
    h: Tensor = ROWS[activation].torchs(u)
    return h


def linear_activation(
    x: Tensor, W: Tensor, b: Any = None, activation: str = "gelu", keep: str = ""
) -> Tensor:
    return f(activation, torch_F.linear(x, W, b))


def activation_linear(
    u: Tensor, W: Tensor, b: Any = None, activation: str = "gelu", p: float = 0.0
) -> Tensor:
    h = f(activation, u)
    return torch_F.linear(torch_F.dropout(h, p) if p else h, W, b)


def mlp(
    x: Tensor, W: Tensor, b: Any, V: Tensor, c: Any, activation: str = "gelu", p: float = 0.0, keep: str = ""
) -> Tensor:
    return activation_linear(torch_F.linear(x, W, b), V, c, activation, p)


def gated_linear(a: Tensor, c: Tensor, V: Tensor, e: Any = None, activation: str = "silu") -> Tensor:
    return torch_F.linear(f(activation, a) * c, V, e)


def gated_mlp(
    x: Tensor,
    W: Tensor,
    U: Tensor,
    V: Tensor,
    *biases: Any,
    activation: str = "silu",
    keep: str = "",
) -> Tensor:
    p, s, e = biases or (None, None, None)
    return gated_linear(torch_F.linear(x, W, p), torch_F.linear(x, U, s), V, e, activation)


def relu_dropout(x: Tensor, p: float = 0.5) -> Tensor:
    return torch_F.dropout(torch.relu(x), p)


def layer_norm_linear(x: Tensor, w: Any, c: Any, W: Tensor, b: Any = None, eps: float = 1e-5) -> Tensor:
    return torch_F.linear(torch_F.layer_norm(x, x.shape[-1:], w, c, eps), W, b)


def rms_norm_linear(x: Tensor, w: Any, W: Tensor, b: Any = None, eps: float | None = None) -> Tensor:
    return torch_F.linear(torch_F.rms_norm(x, x.shape[-1:], w, eps), W, b)


def batch_norm_activation_conv(
    x: Tensor,
    m: Any,
    v: Any,
    w: Any,
    c: Any,
    W: Tensor,
    b: Any = None,
    activation: str = "relu",
    **options: Any,
) -> Tensor:
    statistics = {name: options.pop(name) for name in ("training", "momentum", "eps") if name in options}
    h = f(activation, torch_F.batch_norm(x, m, v, w, c, **statistics))
    conv = (torch_F.conv1d, torch_F.conv2d, torch_F.conv3d)[W.dim() - 3]
    return conv(h, W, b, **options)


def kernel(*shape: int) -> tuple[Tensor, Tensor]:
    return real(*shape, low=-0.8, high=0.9, seed=8), real(shape[0], seed=9)


def x(*batch: int) -> tuple[Tensor]:
    return (real(*batch, 3, low=-1.31, high=1.17),)


def down(hidden: int = 5) -> tuple[Tensor, Tensor]:
    return real(4, hidden, low=-0.9, high=1.1, seed=3), real(4, seed=4)


def up(seed: int = 1) -> tuple[Tensor, Tensor]:
    return real(5, 3, low=-0.83, high=0.91, seed=seed), real(5, low=-0.7, high=0.9, seed=seed + 1)


def row(reference: Any, arguments: Any, kwargs: dict[str, Any] | None = None, **fields: Any) -> Case:
    return Case(reference.__name__, arguments, kwargs or {}, reference=reference, **fields)


def scale(features: int = 3) -> tuple[Tensor, Tensor]:
    return real(features, low=0.4, high=1.9, seed=5), real(features, seed=6)


TRAINING = {"training": True}
INPUT = {"keep": "input"}
HIDDEN, BITS = 6 * 5 * 8, 4  # bytes of the hidden layer of 6 rows, in float64 and in bits
STORED = {"any_layout": "torch too draws in the order in which the elements are stored"}

# fmt: off
CASES = [
    row(linear_activation, lambda: (*x(6), *up()), keeps=(0, 1), keeps_new=HIDDEN),
    row(linear_activation, lambda: (*x(6), *up()), {"activation": "tanh"}, keeps=(0, 1, "output")),
    *[row(linear_activation, lambda: (*x(6), *up()), {"activation": a} | INPUT, keeps=(0, 1, 2))
      for a in FUSES],
    row(linear_activation, lambda: (*x(2, 3), up()[0]), INPUT, keeps=(0, 1), label="no bias"),
    row(linear_activation, lambda: (*x(), *up()), INPUT, keeps=(0, 1, 2), label="one vector"),
    *[row(activation_linear, lambda: (real(6, 5), *down()), {"activation": a}, keeps=(0, 1))
      for a in FUSES if a not in FROM_OUTPUT],
    *[row(activation_linear, lambda: (real(6, 5), *down()), {"activation": a}, keeps=(1,), keeps_new=HIDDEN)
      for a in FROM_OUTPUT],
    *[row(activation_linear, lambda: (real(6, 5), *down()), {"activation": a, "p": 0.3}, keeps=(0, 1), keeps_new=BITS, random=True, except_for=STORED)
      for a in ("gelu", "silu", "tanh")],
    row(activation_linear, lambda: (real(6, 5), *down()), {"activation": "relu", "p": 0.3}, keeps=(1,), keeps_new=HIDDEN, random=True, except_for=STORED),
    row(activation_linear, lambda: (real(6, 5), *down()), {"p": 1.0}, keeps=(0, 1), keeps_new=1, random=True),
    row(activation_linear, lambda: (real(2, 3, 5), down()[0]), keeps=(0, 1), label="no bias"),
    row(activation_linear, lambda: (real(5), *down()), keeps=(0, 1), label="one vector"),
    *[row(mlp, lambda: (*x(6), *up(), *down()), {"activation": a}, keeps=(0, 1, 3), keeps_new=HIDDEN)
      for a in ("gelu", "relu", "tanh")],
    *[row(mlp, lambda: (*x(6), *up(), *down()), {"activation": a} | INPUT, keeps=(0, 1, 2, 3))
      for a in FUSES],
    *[row(mlp, lambda: (*x(6), *up(), *down()), {"activation": a, "p": 0.3}, keeps=(0, 1, 3), keeps_new=HIDDEN + BITS, random=True)
      for a in ("gelu", "relu", "tanh")],
    row(mlp, lambda: (*x(6), *up(), *down()), {"p": 0.3} | INPUT, keeps=(0, 1, 2, 3), keeps_new=BITS, random=True),
    row(mlp, lambda: (*x(6), *up(), *down()), {"p": 1.0} | INPUT, keeps=(0, 1, 2, 3), keeps_new=1, random=True),
    row(mlp, lambda: (*x(2, 3), up()[0], None, down()[0], None), INPUT, keeps=(0, 1, 3), label="no biases"),
    *[row(gated_linear, lambda: (real(6, 5), real(6, 5, seed=7), *down()), {"activation": a}, keeps=(0, 1, 2))
      for a in ("silu", "gelu", "relu", "relu_squared", "tanh")],
    row(gated_linear, lambda: (real(5), real(5, seed=7), down()[0]), keeps=(0, 1, 2), label="no bias, one vector"),
    *[row(gated_mlp, lambda: (*x(6), up()[0], up(8)[0], down()[0]), {"activation": a}, keeps=(0, 1, 2, 3), keeps_new=2 * HIDDEN)
      for a in ("silu", "gelu", "relu")],
    *[row(gated_mlp, lambda: (*x(6), up()[0], up(8)[0], down()[0]), {"activation": a} | INPUT, keeps=(0, 1, 2, 3))
      for a in ("silu", "gelu", "relu")],
    row(gated_mlp, lambda: (*x(2, 3), up()[0], up(8)[0], down()[0], up()[1], up(8)[1], down()[1]), keeps=(0, 1, 2, 3), keeps_new=2 * HIDDEN, label="biases"),
    row(gated_mlp, lambda: (*x(2, 3), up()[0], up(8)[0], down()[0], up()[1], up(8)[1], down()[1]), INPUT, keeps=(0, 1, 2, 3, 4, 5), label="biases"),
    row(relu_dropout, lambda: (real(4, 5, low=-3.31),), random=True, keeps=("output",), except_for=STORED),
    row(relu_dropout, lambda: (real(4, 5, low=-3.31),), {"p": 0.2}, random=True, keeps=("output",), except_for=STORED),
    row(relu_dropout, lambda: (real(4, 5, low=-3.31),), {"p": 1.0}, random=True, keeps=("output",)),
    Case("packed_relu", lambda: (real(3, 5, low=-3.31, high=3.73),), elementwise=True, keeps_new=2, kinks={0.0: 0.0}, reference=torch.relu, exact="relu, with a bit kept"),
    row(layer_norm_linear, lambda: (*x(6), *scale(), *up()), keeps=(0, 1, 2, 3), keeps_new=2 * 6 * 8),
    row(layer_norm_linear, lambda: (*x(2, 3), scale()[0], None, up()[0]), {"eps": 0.1}, keeps=(0, 1, 3), keeps_new=2 * 6 * 8, label="no biases"),
    row(layer_norm_linear, lambda: (*x(6), None, None, *up()), keeps=(0, 3), keeps_new=2 * 6 * 8, label="no weight"),
    row(layer_norm_linear, lambda: (*x(), *scale(), *up()), keeps=(0, 1, 2, 3), keeps_new=2 * 8, label="one vector"),
    row(layer_norm_linear, lambda: (*x(6), torch.tensor([0.0, 1.3, 0.0], dtype=torch.float64).requires_grad_(), scale()[1], *up()), keeps=(0, 1, 2, 3), keeps_new=2 * 6 * 8, label="weight 0"),
    row(rms_norm_linear, lambda: (*x(6), scale()[0], *up()), keeps=(0, 1, 2), keeps_new=6 * 8),
    row(rms_norm_linear, lambda: (*x(2, 3), scale()[0], up()[0]), {"eps": 0.1}, keeps=(0, 1, 2), keeps_new=6 * 8, label="no bias"),
    row(rms_norm_linear, lambda: (*x(6), None, *up()), keeps=(0, 2), keeps_new=6 * 8, label="no weight"),
    row(rms_norm_linear, lambda: (*x(6), torch.zeros(3, dtype=torch.float64).requires_grad_(), *up()), keeps=(0, 1, 2), keeps_new=6 * 8, label="weight 0"),
    row(batch_norm_activation_conv, lambda: (real(2, 2, 2, 2), None, None, *scale(2), *kernel(1, 2, 2, 2)), TRAINING | {"stride": 2, "padding": 1}, keeps=(0, 3, 4, 5), keeps_new=2 * 2 * 8),
    row(batch_norm_activation_conv, lambda: (real(2, 2, 3), None, None, None, None, kernel(2, 1, 3)[0]), TRAINING | {"activation": "gelu", "padding": "same", "groups": 2, "eps": 0.1}, keeps=(0, 5), keeps_new=2 * 2 * 8, label="no weight"),
    row(batch_norm_activation_conv, lambda: (real(3, 2, 3), None, None, torch.tensor([0.0, 1.3], dtype=torch.float64).requires_grad_(), scale(2)[1], *kernel(1, 2, 2)), TRAINING | {"activation": "silu", "dilation": 2}, keeps=(0, 3, 4, 5), keeps_new=2 * 2 * 8, label="weight 0"),
    row(batch_norm_activation_conv, lambda: (real(1, 2, 1, 3), *running(2), *scale(2), *kernel(1, 2, 1, 2)), {"activation": "tanh"}, keeps=(0, 1, 2, 3, 4, 5)),
    row(batch_norm_activation_conv, lambda: (real(1, 2, 1, 2, 3, low=-3.1), *running(2), None, None, kernel(2, 2, 1, 1, 2)[0]), {"eps": 0.1}, keeps=(0, 1, 2, 5), label="no weight"),
]
# fmt: on
