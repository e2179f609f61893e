r"""Hand-derived rules of the elementwise activations $y = f(x)$.  One class for each.

Read a class from top to bottom: definition, derivation, choice at the kinks, what is kept in memory, where
it loses accuracy, then the same formulas as code.  The plumbing is in ``_elementwise.py``.

Symbols
    x   input                 s   the logistic sigmoid of x, where a rule needs it
    y   output                1[...]   1 where the condition holds, else 0
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise import Elementwise
from manualprop.functions._execution import decay, erfc, indicator

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "ELUFromInput",
    "GELUTanh",
    "LogSigmoid",
    "Mish",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "SoftplusFromInput",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]

# Constants are outside the classes: compiled autograd cannot read an attribute of a Function.

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_LAMBDA = 1.0507009873554804934193349852946
GELU_K, GELU_C = 2 * math.sqrt(2 / math.pi), 0.044715
# The largest number with a finite exponential in ATen's precision: log(max) minus half its last place.
LARGEST_EXPONENT = {
    dtype: math.log(torch.finfo(full).max) * (1 - torch.finfo(full).eps / 2)
    for dtype, full in {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }.items()
}
GELU_FAR = 1e4  # a bound for x and for its cubic: beyond it sigma (1 - sigma) is 0 in every dtype

# ----- sigmoid family -----


class Sigmoid(Elementwise):
    r"""$y = 1 / (1 + e^{-x})$

    Derivation
        y' = e^{-x} / (1 + e^{-x})^2                quotient rule
           = y (1 - y) = y - y^2                    since 1 - y = e^{-x} / (1 + e^{-x})
        d y' / d y = 1 - 2 y                        so f''(x) = (1 - 2 y) y (1 - y)
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        The relative error of y' grows as eps / (1 - y): 0 for x > 17 in float32, where y rounds to 1.
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return y - y * y

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return 1 - 2 * y


class Tanh(Elementwise):
    r"""$y = \tanh x = \sinh x / \cosh x$

    Derivation
        y' = (cosh^2 x - sinh^2 x) / cosh^2 x       quotient rule
           = 1 - y^2
        d y' / d y = -2 y                           so f''(x) = -2 y (1 - y^2)
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        The relative error of y' grows as eps / (1 - |y|): 6e-2 at x = 8 in float32.
    """

    saves = "output"
    fuses = "tanh"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return 1 - y * y

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return -2 * y


class LogSigmoid(Elementwise):
    r"""$y = \log \sigma(x) = -\log(1 + e^{-x})$

    Derivation
        y' = e^{-x} / (1 + e^{-x}) = 1 - s          chain rule, with s = sigma(x)
           = 1 - e^y                                since e^y = s
        d y' / d y = -e^y                           so f''(x) = -s (1 - s)
    Memory
        y, which the next layer keeps anyway.  PyTorch keeps x and a buffer.
    Accuracy
        1 - e^y is taken as -expm1(y): right to the last bits even where y -> 0.
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.logsigmoid(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return -torch.expm1(y)

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return -torch.exp(y)


class Softplus(Elementwise):
    r"""$y = \log(1 + e^{\beta x}) / \beta$ for $\beta x \le \theta$, else $y = x$, $\beta > 0$, $\theta \ge 20$ (float64: 38)

    Derivation
        y' = e^{beta x} / (1 + e^{beta x})          chain rule
           = 1 - e^{-beta y}                        since e^{beta y} = 1 + e^{beta x}
           = 1 beyond the threshold                 the same within rounding: e^-theta is lost against 1
        d y' / d y = beta e^{-beta y}               0 beyond the threshold
    Kinks
        At beta x = theta the value jumps by log(1 + e^-theta) / beta: at most 2e-9 / beta.  With a smaller
        theta the slope jumps too: :class:`SoftplusFromInput` is used there.
    Memory
        y, which the next layer keeps anyway.
    Accuracy
        1 - e^{-beta y} is taken as -expm1(-beta y): right to the last bits even where y -> 0.
        Where e^{beta x} would overflow, y = x for every threshold; torch's y is inf there.
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor, beta: float, theta: float) -> Tensor:
        return F.softplus(x, beta, min(theta, LARGEST_EXPONENT[x.dtype]))

    @staticmethod
    def df(y: Tensor, beta: float, theta: float) -> Tensor:
        return -torch.expm1(-beta * y)

    @staticmethod
    def ddf(y: Tensor, beta: float, theta: float) -> Tensor:
        return torch.where(y * beta > theta, torch.zeros_like(y), beta * torch.exp(-beta * y))


class SoftplusFromInput(Elementwise):
    r"""$y = \log(1 + e^{\beta x}) / \beta$ for $\beta x \le \theta$, else $y = x$, with $\beta > 0$ and any $\theta$

    Derivation, with s = sigma(beta x)
        y'  = e^{beta x} / (1 + e^{beta x}) = s     chain rule;  1 beyond the threshold
        y'' = beta s (1 - s)                        0 beyond the threshold
    Kinks
        At beta x = theta the value jumps by log(1 + e^-theta) / beta, and the slope from s to 1.
    Memory
        x.  y is not enough: beta y between theta and log(1 + e^theta) may come from either side of the jump.
    Accuracy
        A few units in the last place.
    """

    @staticmethod
    def f(x: Tensor, beta: float, theta: float) -> Tensor:
        return F.softplus(x, beta, theta)

    @staticmethod
    def df(x: Tensor, beta: float, theta: float) -> Tensor:
        return torch.where(x * beta > theta, torch.ones_like(x), torch.sigmoid(beta * x))

    @staticmethod
    def ddf(x: Tensor, beta: float, theta: float) -> Tensor:
        s = torch.sigmoid(beta * x)
        return torch.where(x * beta > theta, torch.zeros_like(x), beta * s * (1 - s))


class SiLU(Elementwise):
    r"""$y = x \sigma(x)$, also called swish

    Derivation, with s = sigma(x) and s' = s (1 - s) = s - s^2
        y'  = s + x s'                              product rule
        y'' = 2 s' + x s''                          product rule, once more
            = s (1 - s) (2 + x (1 - 2 s))           since s'' = s' (1 - 2 s)
    Memory
        x.
    Accuracy
        The relative error of y' grows near its zero x = -1.278, as for any sum.  For large x, 1 - s loses
        digits and x (1 - s) is off by eps x / 2, as in PyTorch.  sigma(-x) would cost a second sigmoid.
    Reference
        Elfwing, Uchibe and Doya, 2017, https://arxiv.org/abs/1702.03118
    """

    fuses = "silu"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        ds = s - s * s
        return s + x * ds

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))


class Mish(Elementwise):
    r"""$y = x \tanh(\zeta(x))$ with $\zeta(x) = \log(1 + e^x)$

    Derivation, with w = tanh(zeta(x)), s = sigma(x) = zeta', s' = s (1 - s)
        w'  = (1 - w^2) s                           chain rule
        y'  = w + x w'                              product rule
        w'' = -2 w w' s + (1 - w^2) s (1 - s)       product and chain rule
            = w' (1 - s - 2 w s)
        y'' = 2 w' + x w''                          product rule, once more
    Memory
        x.
    Accuracy
        Finite for every finite x; PyTorch's second derivative is NaN from x = 89 on in float32.
    Reference
        Misra, 2019, https://arxiv.org/abs/1908.08681
    """

    fuses = "mish"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.mish(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        w = torch.tanh(F.softplus(x))
        dw = (1 - w * w) * torch.sigmoid(x)
        return w + x * dw

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        s, w = torch.sigmoid(x), torch.tanh(F.softplus(x))
        dw = (1 - w) * (1 + w) * s
        ddw = dw * (1 - s - 2 * w * s)
        return 2 * dw + x * ddw


class Tanhshrink(Elementwise):
    r"""$y = x - \tanh x$

    Derivation, with w = tanh x and w' = 1 - w^2
        y'  = 1 - (1 - w^2) = w^2
        y'' = 2 w w' = 2 w (1 - w)(1 + w)           chain rule
    Memory
        x.
    Accuracy
        y' keeps its relative accuracy everywhere; y itself is a difference and cancels near 0, as in PyTorch.
    """

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return x - torch.tanh(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        return torch.tanh(x) ** 2

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        w = torch.tanh(x)
        return 2 * w * (1 - w) * (1 + w)


class Softsign(Elementwise):
    r"""$y = x / (1 + |x|)$

    Derivation
        y' = 1 / (1 + |x|)^2                        quotient rule, on either side of 0
           = (1 - |y|)^2                            since 1 - |y| = 1 / (1 + |x|)
        d y' / d y = -2 (1 - |y|) sign y            chain rule
    Kinks
        y'(0) = 1 from either side.  y'' jumps from 2 to -2 at 0 and is taken as 0 there.
    Memory
        y, which the next layer keeps anyway.  PyTorch keeps x, |x| and 1 + |x|.
    Accuracy
        The relative error of y' grows as eps (1 + |x|).
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return x / (1 + x.abs())

    @staticmethod
    def df(y: Tensor) -> Tensor:
        return (1 - y.abs()) ** 2

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return -2 * (1 - y.abs()) * torch.sign(y)


# ----- exponential family -----


class ELU(Elementwise):
    r"""$y = x$ for $x > 0$, else $\alpha (e^x - 1)$, with $\alpha \ge 0$

    Derivation
        y' = 1 for x > 0, else alpha e^x            exponential rule
           = 1 for y > 0, else y + alpha            since alpha e^x = y + alpha
           = min(y, 0) + alpha + (1 - alpha) 1[y > 0]
        d y' / d y = 1[y < 0]                       so f''(x) = alpha e^x for x < 0, else 0
    Kinks
        y'(0) = alpha, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.  PyTorch keeps x.
    Accuracy
        The absolute error of y' is at most eps alpha; where y rounds to -alpha, y' is 0.
    Reference
        Clevert, Unterthiner and Hochreiter, 2015, https://arxiv.org/abs/1511.07289
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor, alpha: float) -> Tensor:
        return F.elu(x, alpha)

    @staticmethod
    def df(y: Tensor, alpha: float) -> Tensor:
        return y.clamp(max=0) + alpha + (1 - alpha) * indicator(y > 0, y)

    @staticmethod
    def ddf(y: Tensor, alpha: float) -> Tensor:
        return indicator(y < 0, y)


class ELUFromInput(Elementwise):
    r"""$y = x$ for $x > 0$, else $\alpha (e^x - 1)$, with any $\alpha$

    Derivation
        y'  = 1 for x > 0, else alpha e^x           exponential rule
        y'' = alpha e^x for x < 0, else 0
    Kinks
        y'(0) = alpha, as in PyTorch; y'' is taken as 0 there.
    Memory
        x: for alpha < 0 the sign of y does not give the sign of x.
    Accuracy
        A few units in the last place everywhere.
    """

    @staticmethod
    def f(x: Tensor, alpha: float) -> Tensor:
        return F.elu(x, alpha)

    @staticmethod
    def df(x: Tensor, alpha: float) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), alpha * torch.exp(x))

    @staticmethod
    def ddf(x: Tensor, alpha: float) -> Tensor:
        return torch.where(x < 0, alpha * torch.exp(x.clamp(max=0)), torch.zeros_like(x))


class SELU(Elementwise):
    r"""$y = \lambda x$ for $x > 0$, else $\lambda \alpha (e^x - 1)$, with the two constants of the reference

    Derivation
        y' = lambda for x > 0, else lambda alpha e^x
           = lambda for y > 0, else y + lambda alpha               since lambda alpha e^x = y + lambda alpha
           = min(y, 0) + lambda alpha + lambda (1 - alpha) 1[y > 0]
        d y' / d y = 1[y < 0]
    Kinks
        y'(0) = lambda alpha, as in PyTorch.
    Memory
        y, which the next layer keeps anyway.  PyTorch keeps x.
    Accuracy
        The absolute error of y' is at most eps lambda alpha; where y rounds to -lambda alpha, y' is 0.
    Reference
        Klambauer et al., 2017, https://arxiv.org/abs/1706.02515: the constants are the solution of equation
        (14), the fixed point with mean 0 and variance 1.
    """

    saves = "output"
    ALPHA, LAMBDA = SELU_ALPHA, SELU_LAMBDA

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return torch.selu(x)

    @staticmethod
    def df(y: Tensor) -> Tensor:
        l, a = SELU_LAMBDA, SELU_ALPHA
        return y.clamp(max=0) + l * a + l * (1 - a) * indicator(y > 0, y)

    @staticmethod
    def ddf(y: Tensor) -> Tensor:
        return indicator(y < 0, y)


class CELU(Elementwise):
    r"""$y = x$ for $x > 0$, else $\alpha (e^{x / \alpha} - 1)$, with $\alpha \ne 0$

    Derivation
        y' = 1 for x > 0, else e^{x / alpha}        chain rule
           = 1 for y > 0, else y / alpha + 1        since e^{x / alpha} = y / alpha + 1
           = min(y, 0) / alpha + 1
        d y' / d y = 1[y < 0] / alpha
    Kinks
        None in y': both sides give 1 at 0.  y'' jumps there, and is taken as 0.
    Memory
        y, which the next layer keeps anyway.  PyTorch keeps x.
    Accuracy
        The absolute error of y' is at most eps; where y rounds to -alpha, y' is 0.
    Reference
        Barron, 2017, https://arxiv.org/abs/1704.07483
    """

    saves = "output"

    @staticmethod
    def f(x: Tensor, alpha: float) -> Tensor:
        return F.celu(x, alpha)

    @staticmethod
    def df(y: Tensor, alpha: float) -> Tensor:
        return y.clamp(max=0) / alpha + 1

    @staticmethod
    def ddf(y: Tensor, alpha: float) -> Tensor:
        return indicator(y < 0, y) / alpha


# ----- Gaussian family -----


class GELU(Elementwise):
    r"""$y = x \Phi(x)$ with the normal distribution's $\Phi(x) = \tfrac12 \operatorname{erfc}(-x / \sqrt 2)$

    Derivation, with Phi' = phi = e^{-x^2 / 2} / sqrt(2 pi) and phi' = -x phi
        y'  = Phi + x phi                           product rule
        y'' = phi + phi + x phi'                    product rule, once more
            = (2 - x^2) phi
    Memory
        x.
    Accuracy
        erfc keeps the left tail, where 1 + erf cancels to 0: y'(-6) is right to 1e-6, not 0.  Compiled kernels
        still take 1 + erf, as PyTorch always does: inductor's erfc takes twice as long as all the rest.
    Reference
        Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415
    """

    fuses = "gelu"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def df(x: Tensor) -> Tensor:
        phi = decay(-0.5 * x * x) / math.sqrt(2 * math.pi)
        Phi = 0.5 * erfc(-x / math.sqrt(2))
        return Phi + x * phi

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        phi = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return (2 - x * x) * phi


class GELUTanh(Elementwise):
    r"""$y = \tfrac12 x (1 + \tanh u)$ with $u = \sqrt{2 / \pi} (x + c x^3)$ and $c = 0.044715$

    Derivation, with s = sigma(2 u), s' = s (1 - s) 2 u', s'' = s' (1 - 2 s) 2 u' + s (1 - s) 2 u''
        y   = x s                                   since (1 + tanh u) / 2 = sigma(2 u)
        2 u = k (x + c x^3)                         with k = 2 sqrt(2 / pi)
        y'  = s + x s (1 - s) 2 u'                  product and chain rule
            = s + s (1 - s) k (x + 3 c x^3)         power rule
        y'' = 2 s' + x s''                          product rule, once more
            = s (1 - s) (4 u' + 2 x u'' + x (1 - 2 s) (2 u')^2)
    Memory
        x.
    Accuracy
        sigma keeps the left tail, where 1 + tanh u cancels to 0.  Where s (1 - s) is 0, its factor is clamped
        to stay finite: in float32 x^3 overflows from 7e12 on, and torch's gradient is NaN there.
    Reference
        Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415: they fitted c.
    """

    fuses = "gelu_tanh"

    @staticmethod
    def f(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def df(x: Tensor) -> Tensor:
        k, c = GELU_K, GELU_C
        x2, kx = x * x, k * x
        u2 = kx + c * kx * x2  # k (x + c x^3)
        s, r = torch.sigmoid(u2), torch.sigmoid(-u2)  # r = 1 - s
        w = (kx + 3 * c * kx * x2).clamp(-GELU_FAR, GELU_FAR)  # k (x + 3 c x^3)
        return s + s * r * w

    @staticmethod
    def ddf(x: Tensor) -> Tensor:
        k, c = GELU_K, GELU_C
        x = x.clamp(-GELU_FAR, GELU_FAR)
        x2 = x * x
        u2 = k * x * (1 + c * x2)
        s, r = torch.sigmoid(u2), torch.sigmoid(-u2)  # r = 1 - s
        du2, x_ddu2 = k * (1 + 3 * c * x2), 6 * k * c * x2
        return s * r * (2 * du2 + x_ddu2 + x * (r - s) * du2 * du2)
