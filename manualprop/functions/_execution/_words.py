"""The few words that formulas use beside torch's: each is mathematics, with a quicker spelling for eager mode.

In a formula they mean what they say; ``_lowering.py`` spells them for a program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def word(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that stays one step when a formula is traced."""

    def call(*args: Any) -> Any:
        proxy = next((a for a in args if isinstance(a, fx.Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_function", call, args, {})
        return function(*args)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


@word
def indicator(condition: Tensor, like: Tensor) -> Tensor:
    """1[condition]: 1 where it holds, else 0, in the dtype of ``like``.  A condition is booleans, or bytes 0 and 1."""
    return condition.to(like.dtype)


@word
def inside(y: Tensor, a: float, b: float) -> Tensor:
    """1[y /= a] 1[y /= b] in the dtype of ``y``, which is nowhere below ``a`` nor above ``b``."""
    return ((y != a) & (y != b)).to(y.dtype)


@word
def chosen(slope: Tensor, g: Tensor) -> Tensor:
    """``g * slope``, and 0 where the slope is 0, whatever ``g`` is: 0 times infinity would be NaN."""
    return (
        g.masked_fill(slope == 0, 0) * slope
    )  # in this order a derivative of it, too, has no 0 times infinity


@word
def decay(x: Tensor) -> Tensor:
    """e^x of numbers that are not positive.  Its absolute error is eps, its relative error grows as eps |x|."""
    return torch.exp(x)


@word
def erfc(z: Tensor) -> Tensor:
    """1 - erf z, which keeps the left tail.  Compiled it is 1 - erf z: inductor's erfc takes twice as long as all the rest."""
    return 1 - torch.erf(z) if torch.compiler.is_compiling() else torch.erfc(z)


@word
def on_class(r: Tensor | float, t: Tensor, like: Tensor) -> Tensor:
    """r 1[c = t] along the second axis of ``like`` (N, C, ...), in its dtype; r a number, or r and t (N, 1, ...)."""
    zeros = torch.zeros_like(like)
    if isinstance(r, Tensor) and not torch.compiler.is_compiling():
        return zeros.scatter(1, t, r.to(like.dtype).expand_as(t))
    one = zeros.scatter(1, t, 1.0)  # inductor makes it a comparison, where it would scatter value by value
    return one * r.to(like.dtype) if isinstance(r, Tensor) else one * r


@word
def less_on_class(b: Tensor, r: Tensor | float, t: Tensor) -> Tensor:
    """b - r 1[c = t], as :func:`on_class`."""
    if (
        torch.compiler.is_compiling() and b.dim() == 2
    ):  # inductor adds to few values in less time than it compares all
        minus_r = -r if isinstance(r, Tensor) else b.new_full((), -r)
        return b.scatter_add(1, t, minus_r.expand_as(t))
    return b - on_class(r, t, b)


@word
def of_class(x: Tensor, t: Tensor) -> Tensor:
    """x_t: of x (N, C, ...) along its second axis, or of one number for each class; t is (N, 1, ...)."""
    if x.dim() == t.dim():
        return x.gather(1, t)
    if torch.compiler.is_compiling() and t.dim() > 2:
        # A sum over the classes is kept for all of them, where inductor would look x_t up for each.
        one = torch.arange(x.numel(), device=x.device).view(x.shape) == t
        return (one * x).sum(1, keepdim=True)
    return x.reshape(-1)[t]


def weight_of(w: Tensor | None, t: Tensor) -> Tensor | float:
    """w_t, and 1 without weights."""
    return 1.0 if w is None else of_class(w, t)
