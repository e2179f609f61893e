r"""Hand-derived rules of the cross-entropies of two classes: with probabilities or logits as predictions.

One value for each element; reductions are in :mod:`manualprop.functional`.

Symbols
    x   prediction or logits          w   weight of the positive class
    t   target                        s   the logistic sigmoid of x
    l   loss, before reduction
Half precision
    The losses of half-precision predictions are computed and returned in float32: the reduction rounds once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise_loss import Curvature, ElementwiseLoss

__all__ = ["BCE", "BCEWithLogits", "BCEWithPosWeight", "MultiLabelSoftMargin"]


class BCE(ElementwiseLoss):
    r"""$l = -t \log x - (1 - t) \log(1 - x)$, with $x$ the probability of the second of two classes

    Each logarithm is at least -100, so that l is finite at x = 0 and x = 1.

    Derivation
        dl/dx = -t / x + (1 - t) / (1 - x)                         logarithm and chain rule
              = (x - t) / q    with q = x (1 - x)                  common denominator
        dl/dt = log(1 - x) - log x                                 the logarithms as in l
        d2l/dx2 = t / x^2 + (1 - t) / (1 - x)^2                    power rule
                = (t (1 - x)^2 + (1 - t) x^2) / q^2                without cancellation
        d2l/dxdt = -1 / q
    Kinks
        q is at least 1e-12 in every derivative, as in PyTorch: finite at x = 0 and x = 1.
        dl/dt = +-100 there, the derivative of l as defined; torch's is infinite.
    Second order
        By hand, as above; d2l/dt2 = 0.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        1 - x has lost what distinguishes x from 1: prefer :class:`BCEWithLogits`.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy(x, t, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return (x - t) / BCE.q(x)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.log1p(-x).clamp(min=-100) - x.log().clamp(min=-100)

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        q = BCE.q(x)
        xx = (t * (1 - x) ** 2 + (1 - t) * x**2) / q**2
        return (xx, -1 / q), (-1 / q, 0)

    @staticmethod
    def q(x: Tensor) -> Tensor:
        return ((1 - x) * x).clamp(min=1e-12)


class BCEWithLogits(ElementwiseLoss):
    r"""$l = -t \log s - (1 - t) \log(1 - s)$ with $s = 1 / (1 + e^{-x})$

    Derivation
        l = (1 - t) x - log s                                      since log(1 - s) = log s - x
        dl/dx = 1 - t - (1 - s) = s - t                            (log s)' = 1 - s
        dl/dt = -x
        d2l/dx2 = s (1 - s)                                        the slope of the sigmoid
    Second order
        By hand: d2l/dx2 as above,  d2l/dxdt = -1,  d2l/dt2 = 0.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        s - t cancels for a confident, right prediction; the absolute error stays within eps.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, t, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.sigmoid(x) - t

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return -x

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        s = torch.sigmoid(x)
        return (s * (1 - s), -1), (-1, 0)


class BCEWithPosWeight(ElementwiseLoss):
    r"""$l = -w t \log s - (1 - t) \log(1 - s)$ with $s = 1 / (1 + e^{-x})$ and a weight $w$ of the positive class

    Derivation, with m = 1 - t + w t, the mass on both classes
        l = (1 - t) x - m log s                                    since log(1 - s) = log s - x
        dl/dx = 1 - t - m (1 - s) = m s - w t                      (log s)' = 1 - s
        dl/dt = -x - (w - 1) log s
        dl/dw = -t log s
        d2l/dx2 = m s (1 - s)                                      the slope of the sigmoid
        d2l/dxdt = (w - 1) s - w
        d2l/dxdw = t (s - 1)
        d2l/dtdw = -log s
    Second order
        By hand, as above; d2l/dt2 = d2l/dw2 = 0.
    Shape
        x, t, w and l alike
    Memory
        x, t and w, alive outside anyway.
    Accuracy
        As :class:`BCEWithLogits`.
    """

    partials = ("output_gradient", "target_gradient", "weight_gradient")

    @staticmethod
    def f(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, t, reduction="none", pos_weight=w)

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        m = 1 - t + w * t
        return m * torch.sigmoid(x) - w * t

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return (1 - w) * F.logsigmoid(x) - x

    @staticmethod
    def weight_gradient(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """dl/dw."""
        return -t * F.logsigmoid(x)

    @staticmethod
    def curvature(x: Tensor, t: Tensor, w: Tensor) -> Curvature:
        s, log_s = torch.sigmoid(x), F.logsigmoid(x)
        xx, xt, xw = (w * t + 1 - t) * s * (1 - s), (w - 1) * s - w, t * (s - 1)
        return (xx, xt, xw), (xt, 0, -log_s), (xw, -log_s, 0)


class MultiLabelSoftMargin(ElementwiseLoss):
    r"""$l = -t \log s - (1 - t) \log(1 - s)$ with $s = 1 / (1 + e^{-x})$, of one class of several against all others

    Derivation
        -log s = max(-x, 0) - log sigma(|x|)                       where x < 0, sigma(x) = e^x sigma(-x)
        -log(1 - s) = max(x, 0) - log sigma(|x|)                   1 - s is the sigmoid of -x
        l = t max(-x, 0) + (1 - t) max(x, 0) - log sigma(|x|)
        dl/dx = s - t                                              as :class:`BCEWithLogits`, the same function
        dl/dt = log(1 - s) - log s = -x
        d2l/dx2 = s (1 - s)                                        the slope of the sigmoid
    Second order
        By hand: d2l/dx2 as above,  d2l/dxdt = -1,  d2l/dt2 = 0.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        For an infinite x, the joint form of :class:`BCEWithLogits`, (1 - t) x - log s, is infinity minus infinity.  This
        form keeps the two parts separate.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return t * (-x).clamp(min=0) + (1 - t) * x.clamp(min=0) - F.logsigmoid(x.abs())

    # The same function, but for how its values are computed.
    output_gradient = staticmethod(BCEWithLogits.output_gradient)
    target_gradient = staticmethod(BCEWithLogits.target_gradient)
    curvature = staticmethod(BCEWithLogits.curvature)
