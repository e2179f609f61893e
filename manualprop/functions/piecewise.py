r"""Hand-derived rules of the piecewise linear and piecewise quadratic activations.

Symbols
    x   input        g   dL/dy, the gradient that arrives
    y   output       1[...]   1 where the condition holds, else 0
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise import Elementwise
from manualprop.functions._execution import indicator, inside

__all__ = [
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LeakyReLUFromInput",
    "ReLU",
    "ReLU6",
    "ReLUSquared",
    "ReLUSquaredFromInput",
    "Softshrink",
    "Threshold",
]

# ----- piecewise linear: the second derivative is 0 -----


class ReLU(Elementwise):
    r"""$y = \max(x, 0)$

    Derivation
        y' = 1 for x > 0, else 0                    piecewise linear
           = 1[y /= 0]                              since y = x > 0, or y = 0
        dL/dx = g where y /= 0, else 0              chosen: 0 times an infinite g would be NaN
    Kinks
        y'(0) = 0, as in PyTorch: the subgradient with the least norm.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact.
    """

    saves = "output"
    chooses = exact = True
    fuses = "relu"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return indicator(y != 0, y)


class ReLU6(Elementwise):
    r"""$y = \min(\max(x, 0), 6)$

    Derivation
        y' = 1 for 0 < x < 6, else 0                piecewise linear
           = 1[y /= 0] 1[y /= 6]                    since y = x strictly between, else y = 0 or y = 6
    Kinks
        y'(0) = y'(6) = 0, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact.
    """

    saves = "output"
    chooses = exact = True
    fuses = "relu6"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.relu6(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return inside(y, 0, 6)


class Hardtanh(Elementwise):
    r"""$y = \min(\max(x, a), b)$ with bounds $a \le b$

    Derivation
        y' = 1 for a < x < b, else 0                piecewise linear
           = 1[y /= a] 1[y /= b]                    since y = x strictly between, else y = a or y = b
    Kinks
        y'(a) = y'(b) = 0, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact, except where x rounds to a bound in half precision: such an x counts as the bound.
    """

    saves = "output"
    chooses = exact = True

    @staticmethod
    def f(x: Tensor, a: float, b: float) -> Tensor:
        return F.hardtanh(x, a, b)

    @staticmethod
    def df(y: Tensor, a: float, b: float) -> Tensor:
        return inside(y, a, b)


class LeakyReLU(Elementwise):
    r"""$y = x$ for $x > 0$, else $a x$, with a slope $a \ge 0$

    Derivation
        y' = 1 for x > 0, else a                    piecewise linear
           = a + (1 - a) 1[y > 0]                   y > 0 exactly where x > 0, because a >= 0
    Kinks
        y'(0) = a, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact for a <= 2; beyond, a + (1 - a) is 1 to a relative eps a.
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor, a: float) -> Tensor:
        return F.leaky_relu(x, a)

    @staticmethod
    def df(y: Tensor, a: float) -> Tensor:
        return a + (1 - a) * indicator(y > 0, y)


class LeakyReLUFromInput(Elementwise):
    r"""$y = x$ for $x > 0$, else $a x$, with any slope $a$

    Derivation
        y' = 1 for x > 0, else a                    piecewise linear
           = a + (1 - a) 1[x > 0]
    Kinks
        y'(0) = a, as in PyTorch.
    Memory
        x: for a < 0 the sign of y does not give the sign of x.
    Accuracy
        Exact for -1 <= a <= 2; beyond, a + (1 - a) is 1 to a relative eps |a|.
    """

    @staticmethod
    def f(x: Tensor, a: float) -> Tensor:
        return F.leaky_relu(x, a)

    @staticmethod
    def df(x: Tensor, a: float) -> Tensor:
        return a + (1 - a) * indicator(x > 0, x)


class Threshold(Elementwise):
    r"""$y = x$ for $x > c$, else the value $w$

    Derivation
        y' = 1 for x > c, else 0                    piecewise constant slope
           = 1[max(x, c) /= c]                      1 for a NaN, as in PyTorch
    Kinks
        y'(c) = 0, as in PyTorch.  y jumps there unless w = c.
    Memory
        x: an output equal to w may come from either side.
    Accuracy
        Exact: half precision is compared in float32, so c is not rounded, as in the forward pass.
    """

    chooses = True

    @staticmethod
    def f(x: Tensor, c: float, w: float) -> Tensor:
        return torch.threshold(x, c, w)

    @staticmethod
    def df(x: Tensor, c: float, w: float) -> Tensor:
        return indicator(x.clamp(min=c) != c, x)


class Hardsigmoid(Elementwise):
    r"""$y = \min(\max(x + 3, 0), 6) / 6$

    Derivation
        y' = 1/6 for -3 < x < 3, else 0             piecewise linear
           = 1[y /= 0] 1[y /= 1] / 6                since y is strictly between 0 and 1 there, else 0 or 1
    Kinks
        y'(-3) = y'(3) = 0, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact, except for an x so close to 3 that x + 3 rounds to 6: it counts as 3.
    """

    saves = "output"
    chooses = True

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.hardsigmoid(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return inside(y, 0, 1) / 6


class Hardshrink(Elementwise):
    r"""$y = x$ for $|x| > \lambda$, else 0

    Derivation
        y' = 1 for |x| > lambda, else 0             piecewise linear
           = 1[y /= 0]                              since |y| = |x| > lambda >= 0, or y = 0
        y' = 1 everywhere for lambda < 0            where y = x
    Kinks
        y'(-lambda) = y'(lambda) = 0, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact.
    """

    saves = "output"
    chooses = exact = True

    @staticmethod
    def f(x: Tensor, lambd: float) -> Tensor:
        return F.hardshrink(x, lambd)

    @staticmethod
    def df(y: Tensor, lambd: float) -> Tensor:
        return indicator(y != 0, y) if lambd >= 0 else torch.ones_like(y)


class Softshrink(Elementwise):
    r"""$y = x - \lambda \operatorname{sign} x$ for $|x| > \lambda$, else 0, with $\lambda \ge 0$

    Derivation
        y' = 1 for |x| > lambda, else 0             piecewise linear
           = 1[y /= 0]                              a difference of two unequal floats is never rounded to 0
    Kinks
        y'(-lambda) = y'(lambda) = 0, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        Exact.
    """

    saves = "output"
    chooses = exact = True

    @staticmethod
    def f(x: Tensor, lambd: float) -> Tensor:
        return F.softshrink(x, lambd)

    @staticmethod
    def df(y: Tensor, lambd: float) -> Tensor:
        return indicator(y != 0, y)


# ----- piecewise quadratic -----


class Hardswish(Elementwise):
    r"""$y = x \min(\max(x + 3, 0), 6) / 6$

    Derivation
        y  = x h with h = min(max(x + 3, 0), 6) / 6, whose slope is 1/6 for -3 < x < 3, else 0
        y' = h + x h'                               product rule
           = 1/2 + x/3 for -3 < x < 3               0 below, 1 above
           = (3/2 + z) / 3                          with z = x inside, -3/2 below and 3/2 above
        y'' = 2 h' = 1/3      for -3 < x < 3, else 0
    Kinks
        y'(-3) = 0 and y'(3) = 1, as in PyTorch: the slopes of the outer pieces.
    Memory
        x.
    Accuracy
        The relative error of y' grows near its zero x = -3/2, as for any difference.
    Reference
        Howard et al., 2019, https://arxiv.org/abs/1905.02244
    """

    chooses = True
    fuses = "hardswish"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.hardswish(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        z = torch.threshold(x, -3, -1.5)  # x <= -3 becomes -3/2
        z = -torch.threshold(-z, -3, -1.5)  # x >= 3 becomes 3/2
        return (1.5 + z) / 3

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        return indicator((x > -3) & (x < 3), x) / 3


class ReLUSquared(Elementwise):
    r"""$y = \max(x, 0)^2$

    Derivation, with r = max(x, 0)
        y' = 2 r                                    power rule for x > 0, else 0
           = 2 sqrt(y)                              since r >= 0
        d y' / d y = 1 / sqrt(y)                    so f''(x) = 2 for x > 0, else 0
    Kinks
        None in y': both sides give 0 at 0.  y'' jumps there from 0 to 2, and is taken as 0.
    Memory
        y, which the next layer keeps anyway.  ``torch.relu(x).square()`` also keeps max(x, 0).
    Accuracy
        The root halves the relative error of y.  Where x^2 rounds to 0, y' and y'' are 0: in float32 for x
        below 3e-23.  In float16 that limit is 2e-4, so :class:`ReLUSquaredFromInput` is used there.
    Reference
        So et al., 2021, Primer, https://arxiv.org/abs/2109.08668
    """

    saves = "output"
    chooses = True
    fuses = "relu_squared"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.relu(x).square()

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return 2 * torch.sqrt(y)

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        positive = y > 0
        return (
            indicator(positive, y) / torch.where(positive, y, torch.ones_like(y)).sqrt()
        )  # no infinity at y = 0


class ReLUSquaredFromInput(Elementwise):
    r"""$y = \max(x, 0)^2$, for a dtype with a short range: float16

    Derivation
        y'  = 2 max(x, 0)                           power rule for x > 0, else 0
        y'' = 2 for x > 0, else 0
    Kinks
        None in y': both sides give 0 at 0.  y'' jumps there from 0 to 2, and is taken as 0.
    Memory
        x: in float16, x^2 rounds to 0 for x below 2e-4, and to infinity from 256 on.
    Accuracy
        Exact.
    Reference
        So et al., 2021, Primer, https://arxiv.org/abs/2109.08668
    """

    chooses = True

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.relu(x).square()

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return 2 * x.clamp(min=0)

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        return 2 * indicator(x > 0, x)
