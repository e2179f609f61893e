r"""Hand-derived rules of the regression losses, one value for each element.

Reductions are in :mod:`manualprop.functional`.  Every loss here is an even function of x - t, so x and t can
be exchanged: dl/dt at (x, t) is dl/dx at (t, x).

Symbols
    x   prediction          l   loss, before reduction
    t   target              g   dL/dl, the gradient that arrives
    1[...]   1 where the condition holds, else 0
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._elementwise_loss import Curvature, ElementwiseLoss
from manualprop.functions._execution import indicator, kernel

__all__ = ["L1", "MSE", "Huber", "SmoothL1"]


class L1(ElementwiseLoss):
    r"""$l = |x - t|$

    Derivation
        dl/dx = sign(x - t)                                        piecewise linear
        dl/dt = -dl/dx
        dL/dx = g dl/dx,  dL/dt = g dl/dt                          chain rule
    Kinks
        0 where x = t, as in PyTorch: the subgradient with the least norm.
    Second order
        By hand: 0.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        Exact.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return F.l1_loss(x, t, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.sign(x - t)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return L1.output_gradient(t, x)

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        return (0, 0), (0, 0)


class MSE(ElementwiseLoss):
    r"""$l = (x - t)^2$

    Derivation
        dl/dx = 2 (x - t)                                          power and chain rule
        dl/dt = -dl/dx
        dL/dx = g dl/dx,  dL/dt = g dl/dt                          chain rule
    Second order
        By hand: d2l/dx2 = 2 = d2l/dt2,  d2l/dxdt = -2.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        That of the difference x - t.
    """

    @staticmethod
    def f(x: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(x, t, reduction="none")

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor) -> Tensor:
        return 2 * (x - t)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor) -> Tensor:
        return MSE.output_gradient(t, x)

    @staticmethod
    def curvature(x: Tensor, t: Tensor) -> Curvature:
        return (2, -2), (-2, 2)


class SmoothL1(ElementwiseLoss):
    r"""$l = (x - t)^2 / 2 \beta$ where $|x - t| < \beta$, else $|x - t| - \beta / 2$, with $\beta > 0$

    Derivation
        dl/dx = (x - t) / beta       for |x - t| < beta            power and chain rule
              = sign(x - t)          else                          piecewise linear
              = (x - t) / beta, clamped to [-1, 1]                 the two in one
        dl/dt = -dl/dx
        l = c (x - t - beta c / 2) with c = dl/dx                  either piece: how compiled kernels make both at once
        d2l/dx2 = 1[|x - t| < beta] / beta
    Kinks
        d2l/dx2 = 0 at |x - t| = beta, as in PyTorch; dl/dx is continuous.
    Second order
        By hand: d2l/dt2 = d2l/dx2,  d2l/dxdt = -d2l/dx2.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        That of the difference x - t.
    Reference
        Girshick, 2015, https://arxiv.org/abs/1504.08083
    """

    @staticmethod
    @kernel(lambda x, t, beta: F.smooth_l1_loss(x, t, reduction="none", beta=beta))
    def f(x: Tensor, t: Tensor, beta: float) -> Tensor:
        c = SmoothL1.output_gradient(x, t, beta)
        return c * (x - t - c * (beta / 2))

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, beta: float) -> Tensor:
        return ((x - t) / beta).clamp(-1, 1)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, beta: float) -> Tensor:
        return SmoothL1.output_gradient(t, x, beta)

    @staticmethod
    def curvature(x: Tensor, t: Tensor, beta: float) -> Curvature:
        d = x - t
        k = indicator(d.abs() < beta, d) / beta
        return (k, -k), (-k, k)


class Huber(ElementwiseLoss):
    r"""$l = (x - t)^2 / 2$ where $|x - t| < \delta$, else $\delta (|x - t| - \delta / 2)$, with $\delta > 0$

    Derivation
        dl/dx = x - t                for |x - t| < delta           power and chain rule
              = delta sign(x - t)    else                          piecewise linear
              = x - t, clamped to [-delta, delta]                  the two in one
        dl/dt = -dl/dx
        l = c (x - t - c / 2) with c = dl/dx                       either piece: how compiled kernels make both at once
        d2l/dx2 = 1[|x - t| < delta]
    Kinks
        d2l/dx2 = 0 at |x - t| = delta, as in PyTorch; dl/dx is continuous.
    Second order
        By hand: d2l/dt2 = d2l/dx2,  d2l/dxdt = -d2l/dx2.
    Shape
        x, t and l alike
    Memory
        x and t, both alive outside anyway.
    Accuracy
        That of the difference x - t.
    Reference
        Huber, 1964, https://doi.org/10.1214/aoms/1177703732
    """

    @staticmethod
    @kernel(lambda x, t, delta: F.huber_loss(x, t, reduction="none", delta=delta))
    def f(x: Tensor, t: Tensor, delta: float) -> Tensor:
        c = Huber.output_gradient(x, t, delta)
        return c * (x - t - c / 2)

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, delta: float) -> Tensor:
        return (x - t).clamp(-delta, delta)

    @staticmethod
    def target_gradient(x: Tensor, t: Tensor, delta: float) -> Tensor:
        return Huber.output_gradient(t, x, delta)

    @staticmethod
    def curvature(x: Tensor, t: Tensor, delta: float) -> Curvature:
        d = x - t
        k = indicator(d.abs() < delta, d)
        return (k, -k), (-k, k)
