r"""Hand-derived rules of the cross-entropies: with logits, log-probabilities or probabilities as predictions.

One value for each example (for each element with two classes); reductions are in :mod:`manualprop.functional`.

Symbols
    x   prediction or logits          g   dL/dl, the gradient that arrives
    t   target                        v   dL/d(dx), the gradient of the gradient
    l   loss, before reduction        c, k run over the C classes
    s   the logistic sigmoid of x     1[...]   1 where the condition holds, else 0
Half precision
    The losses of half-precision predictions are computed and returned in float32: the reduction rounds once.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._elementwise_loss import Curvature, ElementwiseLoss
from manualprop.functions._kernels import flattened, minus, rows_of_a_block
from manualprop.functions._rule import (
    HALF,
    Rule,
    full_dtype,
    in_full_precision,
    plain_eager,
    times,
    transforms_active,
)
from manualprop.functions.softmax import dot

__all__ = ["BCE", "NLL", "BCEWithLogits", "BCEWithPosWeight", "CrossEntropy", "SoftCrossEntropy"]

MANY = 2**15  # numbers from which finding their places in memory pays, measured


class CrossEntropy(Rule):
    r"""$l = -\sum_c m_c \log p_c$ with $p = \operatorname{softmax}(x)$ and class indices $t$ as targets

    The mass on class c, with class weights w (1 without), label smoothing e and t /= ignore_index:
        m_c = (1 - e) w_t 1[c = t] + (e / C) w_c                   all 0 for an ignored target

    Derivation, with M = sum_c m_c
        d(log p_c)/dx_k = 1[c = k] - p_k                           log-softmax
        dl/dx_k = -sum_c m_c (1[c = k] - p_k)                      chain rule
                = M p_k - m_k                                      without weights and smoothing: p - onehot(t)
        dL/dx = g (M p - m)
        dl = <M p - m, dx>                                         forward mode
    Second order
        :class:`CrossEntropyGradient`, by hand.
    Shape
        x (N, C, ...) and t (N, ...) -> l (N, ...);  x (C,) and t () -> l ()
    Memory
        x, t and w.
    Accuracy
        M p - m cancels for a confident, right prediction; the absolute error stays within eps M.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
        lift = x.dtype in HALF and t.shape == shape_of_targets(x)
        n = rows_of_a_block(t, x) if lift else len(x)
        if n == len(x):
            return CrossEntropy._losses(x, t, w, ignore_index, e)
        pieces = zip(x.split(n), t.split(n), strict=True)
        return torch.cat([CrossEntropy._losses(*piece, w, ignore_index, e) for piece in pieces])

    @staticmethod
    def _losses(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
        x, w = in_full_precision(x), lifted(w, x)
        if e == 0 and NLL._picks(x, t, w):
            return NLL.forward(torch.log_softmax(x, 1), t, w, ignore_index)
        return F.cross_entropy(x, t, w, None, ignore_index, None, "none", e)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, w, ctx.ignore_index, ctx.e = inputs
        ctx.save_for_backward(x, t, w)
        ctx.save_for_forward(x, t, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        dim = class_dim(x)
        index, counted = NLL.classes(x, t, ctx.ignore_index)
        g = g.where(counted.squeeze(dim), 0)  # infinite where a mean is over ignored targets alone
        if torch.is_grad_enabled() or transforms_active():
            m = target_mass(x, t, w, ctx.ignore_index, ctx.e)
            dx = CrossEntropyGradient.apply(g, x, m, dim)
        else:
            dx = CrossEntropy._gradient(x, w, index, counted, ctx.e, g.unsqueeze(dim))
        return dx, None, None, None, None

    @staticmethod
    def _gradient(x: Tensor, w: Tensor | None, index: Tensor, counted: Tensor, e: float, g: Tensor) -> Tensor:
        """dL/dx = g M p - g m, where g is 0 for an ignored target; some rows at a time if many are to be lifted."""
        if torch.compiler.is_compiling():  # which multiplies by g on the way; what comes before it could keep
            b = CrossEntropy._difference(x, w, *CrossEntropy._masses(x, w, index, counted, e))
            return times(b, g).to(x.dtype)
        masses = CrossEntropy._masses(x, w, index, g, e)
        n = rows_of_a_block(g, index, x) if x.dtype in HALF and x.dim() > 1 else len(x)
        if n == len(x):
            return CrossEntropy._difference(x, w, *masses).to(x.dtype)
        dx = torch.empty_like(x)
        pieces = [itertools.repeat(None) if s is None else s.split(n) for s in (dx, x, *masses)]
        for out, some_x, *some in zip(*pieces, strict=False):
            out.copy_(CrossEntropy._difference(some_x, w, *some))
        return dx

    @staticmethod
    def output_gradient(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
        """dl/dx = M p - m: the gradient of the loss with respect to the network's output, for each example."""
        index, counted = NLL.classes(x, t, ignore_index)
        return CrossEntropy._difference(x, w, *CrossEntropy._masses(x, w, index, counted, e))

    @staticmethod
    def _masses(
        x: Tensor, w: Tensor | None, index: Tensor, one: Tensor, e: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The target; and what M p - m has of p, of onehot(t) and, with label smoothing, of w, if ``one`` is the unit.

        All (N, 1, ...): ``one`` is 1 where the target counts and 0 where it is ignored, or g in place of 1.
        """
        one, w, C = one.to(full_dtype(x)), lifted(w, x), x.shape[class_dim(x)]
        m_t = one if w is None else one * CrossEntropy._weight(x, w, index)
        if e == 0:
            return index, m_t, m_t, None
        m_t, share = m_t * (1 - e), one * (e / C)
        return index, m_t + share * (C if w is None else w.sum()), m_t, share

    @staticmethod
    def _weight(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        """w_t."""
        if torch.compiler.is_compiling() and x.dim() > 2:
            # A sum over the classes is kept for all of them, where inductor would look w_t up for each.
            return (CrossEntropy._onehot(x, index) * along_classes(w, x)).sum(1, keepdim=True)
        return w[index]

    @staticmethod
    def _onehot(x: Tensor, index: Tensor) -> Tensor:
        """1[c = t] (N, C, ...), by a scattering that inductor makes a comparison."""
        return torch.zeros_like(x, dtype=full_dtype(x)).scatter(class_dim(x), index, 1.0)

    @staticmethod
    def _difference(
        x: Tensor, w: Tensor | None, index: Tensor, M: Tensor, m_t: Tensor, share: Tensor | None
    ) -> Tensor:
        """M p - m with m = m_t onehot(t) + share w, where t is ``index``."""
        b = times(torch.softmax(in_full_precision(x), class_dim(x)), M)
        if share is not None:
            b = minus(b, share if w is None else share * along_classes(in_full_precision(w), x))
        if torch.compiler.is_compiling() and x.dim() > 2:
            # a comparison with the index, where inductor would add value by value
            return b - CrossEntropy._onehot(x, index) * m_t
        return CrossEntropy.minus_target(b, index, -m_t)

    @staticmethod
    def minus_target(Mp: Tensor, index: Tensor, minus_M: Tensor) -> Tensor:
        """M p - m, written into M p, where the whole mass M is on the class ``index``; both (N, 1, ...)."""
        return Mp.scatter_add_(class_dim(Mp), index, minus_M)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx  # class weights are constants, as in PyTorch
        dim = class_dim(x)
        m = target_mass(x, t, w, ctx.ignore_index, ctx.e)
        p = torch.softmax(in_full_precision(x), dim)
        return dot(m.sum(dim, keepdim=True) * p - m, in_full_precision(dx), dim).squeeze(dim)


class SoftCrossEntropy(Rule):
    r"""$l = -\sum_c m_c \log p_c$ with $p = \operatorname{softmax}(x)$ and any mass $m$ on the classes as target

    Derivation, with M = sum_c m_c
        dl/dx_k = -sum_c m_c (1[c = k] - p_k) = M p_k - m_k        as in :class:`CrossEntropy`
        dL/dx = g (M p - m)
        dL/dm_c = -g log p_c
        dl = <M p - m, dx> - <log p, dm>                           forward mode
    Second order
        :class:`CrossEntropyGradient`, by hand; that of dL/dm follows from the rule of log-softmax's products.
    Shape
        x and m (N, C, ...) -> l (N, ...);  (C,) -> ()
    Memory
        x and m.
    Accuracy
        As :class:`CrossEntropy`.
    """

    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        dim = class_dim(x)
        log_p = torch.log_softmax(in_full_precision(x), dim)
        return -(log_p * in_full_precision(m)).sum(dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, m = ctx.saved_tensors
        needs_x, needs_m = ctx.needs_input_grad
        dim = class_dim(x)
        dx = None
        if needs_x and (torch.is_grad_enabled() or transforms_active()):
            dx = CrossEntropyGradient.apply(g, x, m, dim)
        elif needs_x:
            dx = times(SoftCrossEntropy.output_gradient(x, m), g.unsqueeze(dim)).to(x.dtype)
        dm = None
        if needs_m:
            dm = (-g.unsqueeze(dim) * torch.log_softmax(in_full_precision(x), dim)).to(m.dtype)
        return dx, dm

    @staticmethod
    def output_gradient(x: Tensor, m: Tensor) -> Tensor:
        """dl/dx = M p - m: the gradient of the loss with respect to the network's output, for each example."""
        dim, m = class_dim(x), in_full_precision(m)
        return torch.softmax(in_full_precision(x), dim).mul_(m.sum(dim, keepdim=True)).sub_(m)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dm: Tensor | None) -> Tensor:
        x, m = (in_full_precision(s) for s in ctx.saved_tensors)
        dim = class_dim(x)
        log_p = torch.log_softmax(x, dim)
        dl = -dot(log_p, in_full_precision(dm), dim) if dm is not None else 0
        if dx is not None:
            dl = dl + dot(m.sum(dim, keepdim=True) * log_p.exp() - m, in_full_precision(dx), dim)
        assert isinstance(dl, Tensor)  # autograd calls this only with a tangent
        return dl.squeeze(dim)


class CrossEntropyGradient(Rule):
    r"""$b = g (M p - m)$, the gradient of both cross-entropies, itself differentiated

    Derivation, with dp_k/dx_j = p_k (1[j = k] - p_j), the Jacobian of softmax
        dL/dg   = <v, M p - m>                                     b is linear in g
        dL/dx_j = sum_k v_k g M dp_k/dx_j = g M p_j (v_j - <v, p>)
        dL/dm_c = sum_k v_k g (p_k - 1[k = c]) = g (<v, p> - v_c)
        db = dg (M p - m) + g (dM p + M p (dx - <p, dx>) - dm)     forward mode, dM = sum_c dm_c
    Shape
        g (N, ...), x and m (N, C, ...) -> b (N, C, ...)
    Memory
        g, x and m.
    """

    @staticmethod
    def forward(g: Tensor, x: Tensor, m: Tensor, dim: int) -> Tensor:
        p, full_m = torch.softmax(in_full_precision(x), dim), in_full_precision(m)
        return (g.unsqueeze(dim) * (full_m.sum(dim, keepdim=True) * p - full_m)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        g, x, m, ctx.dim = inputs
        ctx.save_for_backward(g, x, m)
        ctx.save_for_forward(g, x, m)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, m, M, p = CrossEntropyGradient._parts(ctx)
        full_v = in_full_precision(v)
        needs_g, needs_x, needs_m, _ = ctx.needs_input_grad
        vp = dot(full_v, p, ctx.dim)
        dg = dot(full_v, M * p - m, ctx.dim).squeeze(ctx.dim) if needs_g else None
        dx = (g * M * p * (full_v - vp)).to(v.dtype) if needs_x else None
        dm = g * (vp - full_v) if needs_m else None
        return dg, dx, dm, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, dm: Tensor | None, _: None) -> Tensor:
        g, m, M, p = CrossEntropyGradient._parts(ctx)
        db = torch.zeros_like(p) if dg is None else dg.unsqueeze(ctx.dim) * (M * p - m)
        if dx is not None:
            db = db + g * M * p * (dx - dot(p, dx, ctx.dim))
        if dm is not None:
            db = db + g * (dm.sum(ctx.dim, keepdim=True) * p - dm)
        return db.to(ctx.saved_tensors[1].dtype)

    @staticmethod
    def _parts(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """g with its class axis, m, M and p."""
        g, x, m = ctx.saved_tensors
        m = in_full_precision(m)
        p = torch.softmax(in_full_precision(x), ctx.dim)
        return g.unsqueeze(ctx.dim), m, m.sum(ctx.dim, keepdim=True), p


class NLL(Rule):
    r"""$l = -w_t x_t$, the log-probability of the class $t$, with class weights $w$ (1 without)

    Derivation
        dl/dx_c = -w_t 1[c = t]                                    linear in x;  0 for an ignored target
        dL/dx_c = -g w_t 1[c = t]                                  chain rule
        dl = -w_t dx_t                                             forward mode
    Second order
        dL/dx is linear in g and constant in x: autograd differentiates the scattering as written.
    Shape
        x (N, C, ...) and t (N, ...) -> l (N, ...);  x (C,) and t () -> l ()
    Memory
        x for its shape, t and w.
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int) -> Tensor:
        if NLL._picks(x, t, w):
            index, counted = NLL.classes(x, t, ignore_index)
            x_t = at_classes(x, index)
            if x_t is not None:
                x_t = (
                    in_full_precision(x_t)
                    if w is None
                    else in_full_precision(x_t) * in_full_precision(w)[index]
                )
                return x_t.neg_().where(counted, 0).squeeze(1)
        return F.nll_loss(in_full_precision(x), t, lifted(w, x), None, ignore_index, None, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, w, ctx.ignore_index = inputs
        ctx.save_for_backward(x, t, w)
        ctx.save_for_forward(x, t, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        dim = class_dim(x)
        index, counted = NLL.classes(x, t, ctx.ignore_index)
        gw = g.unsqueeze(dim) if w is None else g.unsqueeze(dim) * w[index]
        # (N, 1, ...); g is infinite where a mean is over ignored targets alone.
        gw = gw.where(counted, 0).to(x.dtype)
        if torch.compiler.is_compiling():
            # a comparison with the index, where inductor would scatter value by value
            dx = constant_zeros(x).scatter(dim, index, -1.0) * gw
        else:
            dx = scattered(constant_zeros(x), dim, index, -gw)
        return dx, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx  # class weights are constants, as in PyTorch
        dim = class_dim(x)
        index, counted = NLL.classes(x, t, ctx.ignore_index)
        dx_t = in_full_precision(dx.gather(dim, index))
        dl = -dx_t if w is None else -w[index] * dx_t
        return dl.where(counted, 0).squeeze(dim)

    @staticmethod
    def classes(x: Tensor, t: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """t with the class axis, (N, 1, ...), 0 where it is ignored; and where it is not."""
        index = t.unsqueeze(class_dim(x))
        counted = index.ne(ignore_index)
        return index.where(counted, 0), counted

    @staticmethod
    def class_and_weight(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
        """t with the class axis, (N, 1, ...), and w_t; both 0 where the target is ignored."""
        index, counted = NLL.classes(x, t, ignore_index)
        weight = counted.to(full_dtype(x))
        return index, weight if w is None else weight * w[index]

    @staticmethod
    def _picks(x: Tensor, t: Tensor, w: Tensor | None) -> bool:
        """Whether the numbers at the targets are better picked by their places in memory: x (N, C, ...) is large, and
        has further axes or would have to be lifted as a whole.  Not where ATen has to say what is wrong with t or w.
        """
        return (
            (x.dim() > 2 or (x.dim() == 2 and x.dtype in HALF))
            and x.numel() >= MANY
            and x.is_cpu
            and t.dtype == torch.int64
            and t.shape == shape_of_targets(x)
            and (w is None or (w.shape == x.shape[1:2] and w.dtype == x.dtype))
            and flattened(x) is not None
            and flattened(t) is not None
        )


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
        dl/dt = +-100 there, the derivative of l as defined, where torch's is infinite.
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


def class_dim(x: Tensor) -> int:
    """The axis of the classes: the second, or the only one."""
    return 0 if x.dim() == 1 else 1


def shape_of_targets(x: Tensor) -> torch.Size:
    """That of class numbers for x: (N, ...)."""
    return x.shape[: class_dim(x)] + x.shape[class_dim(x) + 1 :]


def along_classes(w: Tensor, x: Tensor) -> Tensor:
    """``w`` (C,) so that it broadcasts over ``x`` (N, C, ...) or (C,)."""
    return w.view(-1, *(1,) * (x.dim() - 1 - class_dim(x)))


def lifted(w: Tensor | None, x: Tensor) -> Tensor | None:
    """Class weights in full precision, if they are of x's dtype; if not, torch has its say on the mismatch."""
    return in_full_precision(w) if w is not None and w.dtype == x.dtype else w


def target_mass(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
    """m, the mass that class indices ``t`` put on each class: (N, C, ...)."""
    dim, classes = class_dim(x), x.shape[class_dim(x)]
    dtype = full_dtype(x)
    counted = t.ne(ignore_index).unsqueeze(dim)
    index = t.unsqueeze(dim).where(counted, 0)
    w = x.new_ones(classes, dtype=dtype) if w is None else w.to(dtype)
    axes = [1] * x.dim()
    axes[dim] = classes
    onehot = torch.arange(classes, device=x.device).view(axes) == index
    m = w.view(axes) * (onehot.to(dtype) * (1 - e) + e / classes)  # a bool times a float is float32
    return m * counted


def constant_zeros(x: Tensor) -> Tensor:
    """Zeros like ``x`` that autograd takes for a function of x: its derivative is zeros, and not an error."""
    if not torch.is_grad_enabled():
        return torch.zeros_like(x)
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def at_classes(x: Tensor, index: Tensor) -> Tensor | None:
    """``x`` (N, C, ...) at class numbers (N, 1, ...), a fresh tensor like these; None if one is out of range.

    x must be dense.  ATen's gather takes four times as long along an axis that is not the last.
    """
    lowest, highest = index.aminmax()
    if lowest < 0 or highest >= x.shape[1]:
        return None
    (numbers,) = flattened(x) or [x]
    return numbers.index_select(0, places(x, index)).view(index.shape)


def places(x: Tensor, index: Tensor) -> Tensor:
    """Where in memory a dense ``x`` (N, C, ...) has its numbers at the classes (N, 1, ...), one after the other."""
    N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    along_c, along_l = (L, 1) if x.is_contiguous() else (1, C)
    starts = torch.arange(0, x.numel(), C * L).view(N, 1) + torch.arange(0, L * along_l, along_l)  # (N, L)
    return starts.add_(index.reshape(N, L), alpha=along_c).view(-1)


def scattered(fresh: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """``fresh`` with ``values`` at ``index``, in place unless it is recorded, or ``vmap`` batches the index alone."""
    if torch.is_grad_enabled() or not plain_eager() or is_legacy_batchedtensor(values):
        return fresh.scatter(dim, index, values)
    one_each = dim == 1 and index.shape[1] == 1
    if one_each and fresh.is_cpu and fresh.dtype in HALF and (numbers := flattened(fresh)) is not None:
        # ATen's scatter lifts and lowers it all.
        numbers[0].index_copy_(0, places(fresh, index), values.reshape(-1))
        return fresh
    return fresh.scatter_(dim, index, values)
