"""The few functions that formulas use in addition to torch's.

In a formula each is plain mathematics; ``_lowering.py`` gives it a faster form in a program for eager mode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def word(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a function that stays one step when a formula is traced."""

    def call(*args: Any) -> Any:
        proxy = next((a for a in args if isinstance(a, fx.Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", call, args, {})
        return function(*args)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


@word
def indicator(condition: Tensor, like: Tensor) -> Tensor:
    """1 where ``condition`` (booleans, or bytes 0 and 1) holds, else 0, in the dtype of ``like``."""
    return condition.to(like.dtype)


@word
def inside(y: Tensor, a: float, b: float) -> Tensor:
    """1[y /= a] 1[y /= b] in the dtype of ``y``; every y must be between ``a`` and ``b``."""
    return ((y != a) & (y != b)).to(y.dtype)


@word
def chosen(slope: Tensor, g: Tensor) -> Tensor:
    """``g * slope``, but 0 where the slope is 0, for every ``g``: 0 times infinity would be NaN."""
    return g.masked_fill(slope == 0, 0) * slope  # in this order its derivative has no 0 times infinity either


@word
def decay(x: Tensor) -> Tensor:
    """e^x for x <= 0.  The absolute error is eps; the relative error grows as eps |x|."""
    return torch.exp(x)


@word
def erfc(z: Tensor) -> Tensor:
    """erfc z, which keeps the tail where 1 - erf z cancels.

    Compiled code still takes 1 - erf z: inductor's erfc takes twice as long as everything else together.
    """
    return 1 - torch.erf(z) if torch.compiler.is_compiling() else torch.erfc(z)


@word
def on_class(r: Tensor | float, t: Tensor, like: Tensor) -> Tensor:
    """r 1[c = t] along the second axis of ``like`` (N, C, ...), in its dtype.

    t is (N, 1, ...); r is a number or has the shape of t.
    """
    zeros = torch.zeros_like(like)
    if isinstance(r, Tensor) and not torch.compiler.is_compiling():
        return zeros.scatter(1, t, r.to(like.dtype).expand_as(t))
    one = zeros.scatter(1, t, 1.0)  # inductor turns this into a comparison; other scatters go value by value
    return one * r.to(like.dtype) if isinstance(r, Tensor) else one * r


@word
def less_on_class(b: Tensor, r: Tensor | float, t: Tensor) -> Tensor:
    """b - r 1[c = t], with r and t as in :func:`on_class`."""
    if (
        torch.compiler.is_compiling() and b.dim() == 2
    ):  # in inductor, adding to a few values is faster than comparing all of them
        minus_r = -r if isinstance(r, Tensor) else b.new_full((), -r)
        return b.scatter_add(1, t, minus_r.expand_as(t))
    return b - on_class(r, t, b)


@word
def of_class(x: Tensor, t: Tensor) -> Tensor:
    """x_t along the second axis of x (N, C, ...) or of one number for each class; t is (N, 1, ...)."""
    if x.dim() == t.dim():
        return x.gather(1, t)
    if torch.compiler.is_compiling() and t.dim() > 2:
        # inductor would look x_t up again for each class; a sum over the classes is computed once.
        one = torch.arange(x.numel(), device=x.device).view(x.shape) == t
        return (one * x).sum(1, keepdim=True)
    return x.reshape(-1)[t]


def weight_of(w: Tensor | None, t: Tensor) -> Tensor | float:
    """w_t, and 1 without weights."""
    return 1.0 if w is None else of_class(w, t)
