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
