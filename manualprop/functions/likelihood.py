r"""Hand-derived rules of the losses that are negative log likelihoods, and of the Kullback-Leibler divergence.

One value for each element; reductions are in :mod:`manualprop.functional`.

Symbols
    x   prediction          l   loss, before reduction
    t   target              g   dL/dl, the gradient that arrives
    1[...]   1 where the condition holds, else 0
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise_loss import Curvature, ElementwiseLoss
from manualprop.functions._execution import indicator

__all__ = ["GaussianNLL", "KLDiv", "KLDivLogTarget", "PoissonNLL", "PoissonNLLFromRate"]


class PoissonNLL(ElementwiseLoss):
    r"""$l = e^x - t x + s(t)$, the count $t$ under a Poisson distribution of rate $e^x$

    s(t) is 0, unless the loss is ``full`` and t > 1.  It is then the Stirling approximation of log t!:
        s(t) = t log t - t + log(2 pi t) / 2

    Derivation
        dl/dx = e^x - t                                            exponential and product rule
        dl/dt = -x + s'(t)
        s'(t) = log t + 1 / 2t       for t > 1, else 0             product and chain rule
        s''(t) = 1/t - 1 / 2t^2      for t > 1, else 0
    Kinks
        s'(1) = s''(1) = 0, as in PyTorch.
    Second order
        By hand: d2l/dx2 = e^x,  d2l/dxdt = -1,  d2l/dt2 = s''(t).
    Shape
        x, t and l alike
    Memory
        x and t, which are alive outside anyway; torch keeps e^x too.
    Accuracy
        e^x - t cancels where the prediction is right; the absolute error stays within eps t.
        At t = 0 the derivative of the full loss with respect to t is -x; torch's is NaN.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor, full: bool) -> Tensor:
        return F.poisson_nll_loss(x, t, log_input=True, full=full, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, full: bool) -> Tensor:
        return x.exp() - t

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, full: bool) -> Tensor:
        return stirling_slope(t) - x if full else -x

    @staticmethod
    def curvature(x: Tensor, t: Tensor, full: bool) -> Curvature:
        return (x.exp(), -1), (-1, stirling_curvature(t) if full else 0)


class PoissonNLLFromRate(ElementwiseLoss):
    r"""$l = x - t \log(x + \epsilon) + s(t)$, the count $t$ under a Poisson distribution of rate $x$

    s(t) as in :class:`PoissonNLL`.

    Derivation
        dl/dx = 1 - t / (x + eps)                                  logarithm and chain rule
        dl/dt = -log(x + eps) + s'(t)
    Second order
        By hand: d2l/dx2 = t / (x + eps)^2,  d2l/dxdt = -1 / (x + eps),  d2l/dt2 = s''(t).
    Shape
        x, t and l alike
    Memory
        x and t, which are alive outside anyway; torch keeps x + eps and its logarithm too.
    Accuracy
        1 - t / (x + eps) cancels where the prediction is right; the absolute error stays within eps.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor, full: bool, eps: float) -> Tensor:
        return F.poisson_nll_loss(x, t, log_input=False, full=full, eps=eps, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, full: bool, eps: float) -> Tensor:
        return 1 - t / (x + eps)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, full: bool, eps: float) -> Tensor:
        log_rate = (x + eps).log()
        return stirling_slope(t) - log_rate if full else -log_rate

    @staticmethod
    def curvature(x: Tensor, t: Tensor, full: bool, eps: float) -> Curvature:
        rate = x + eps
        return (t / rate**2, -1 / rate), (-1 / rate, stirling_curvature(t) if full else 0)


def stirling_slope(t: Tensor) -> Tensor:
    """s'(t), the derivative of Stirling's approximation of log t!."""
    large = t.clamp(min=1)  # keeps the masked elements finite
    return indicator(t > 1, t) * (large.log() + 0.5 / large)


def stirling_curvature(t: Tensor) -> Tensor:
    """s''(t)."""
    large = t.clamp(min=1)
    return indicator(t > 1, t) * (1 / large - 0.5 / large**2)


class GaussianNLL(ElementwiseLoss):
    r"""$l = \frac12 (\log V + (x - t)^2 / V) + c$ with $V = \max(v, \epsilon)$, the target under a Gaussian

    x is its mean and v its variance; c = log(2 pi) / 2 if the loss is ``full``, else 0.

    Derivation
        dl/dx = (x - t) / V                                        power and chain rule
        dl/dt = -dl/dx
        dl/dv = 1 / 2V - (x - t)^2 / 2V^2                          logarithm and power rule
    Kinks
        dV/dv = 1 everywhere, also where v < eps, as in PyTorch: a variance that is too low can rise again.
    Second order
        By hand: d2l/dx2 = 1/V = d2l/dt2 = -d2l/dxdt,  d2l/dxdv = -(x - t) / V^2 = -d2l/dtdv,
        d2l/dv2 = (x - t)^2 / V^3 - 1 / 2V^2.
    Shape
        x, t, v and l alike
    Memory
        x, t and v, which are alive outside anyway; torch keeps V, x - t and its square too.
    Accuracy
        dl/dv cancels where v is right; the absolute error stays within eps / V.
    Reference
        Nix and Weigend, 1994, https://doi.org/10.1109/ICNN.1994.374138
    """

    partials = ("output_gradient", "target_gradient", "variance_gradient")

    @staticmethod
    def f(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
        V = v.clamp(min=eps)
        return 0.5 * (V.log() + (x - t) ** 2 / V) + (0.5 * math.log(2 * math.pi) if full else 0)

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
        return (x - t) / v.clamp(min=eps)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
        return (t - x) / v.clamp(min=eps)

    @staticmethod
    def variance_gradient(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
        """dl/dv."""
        V = v.clamp(min=eps)
        return 0.5 / V - 0.5 * ((x - t) / V) ** 2

    @staticmethod
    def curvature(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Curvature:
        d, V = x - t, v.clamp(min=eps)
        xx, xv, vv = 1 / V, -d / V**2, d**2 / V**3 - 0.5 / V**2
        return (xx, -xx, xv), (-xx, xx, -xv), (xv, -xv, vv)


class KLDiv(ElementwiseLoss):
    r"""$l = t (\log t - x)$, with $t$ a probability and $x$ the logarithm of the predicted probability

    Derivation
        dl/dx = -t
        dl/dt = log t + 1 - x                                      product rule
    Kinks
        dl/dt = -inf at t = 0, its limit; torch's is NaN.
    Second order
        By hand: d2l/dx2 = 0,  d2l/dxdt = -1,  d2l/dt2 = 1/t.
    Shape
        x, t and l alike
    Memory
        x and t, which are alive outside anyway.
    Accuracy
        dl/dx is exact; dl/dt is as accurate as the logarithm.
    Reference
        Kullback and Leibler, 1951, https://doi.org/10.1214/aoms/1177729694
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return torch.xlogy(t, t) - t * x  # 0 log 0 = 0

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return -t

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return t.log() + 1 - x

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        return (0, -1), (-1, 1 / t)


class KLDivLogTarget(ElementwiseLoss):
    r"""$l = e^t (t - x)$, with $t$ and $x$ the logarithms of the true and of the predicted probability

    Derivation
        dl/dx = -e^t
        dl/dt = e^t (t - x + 1)                                    product and exponential rule
    Second order
        By hand: d2l/dx2 = 0,  d2l/dxdt = -e^t,  d2l/dt2 = e^t (t - x + 2).
    Shape
        x, t and l alike
    Memory
        x and t, which are alive outside anyway; torch keeps e^t and t - x too.
    Accuracy
        That of the exponential; t - x + 1 may cancel.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return t.exp() * (t - x)

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return -t.exp()

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return t.exp() * (t - x + 1)

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        p = t.exp()
        return (0, -p), (-p, p * (t - x + 2))
