"""Activations with a second argument, with the names, signatures and defaults of :mod:`torch.nn.functional`."""

import math

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex
from manualprop.functional.activation import leaky_relu
from manualprop.functional.linear import _autocast_low
from manualprop.functions._execution._in_place import write_over

__all__ = ["glu", "prelu", "rrelu"]


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.prelu`, by :class:`manualprop.functions.PReLU`.

    Shape:
        ``input`` (N, C, ...) or any; ``weight`` (C,), (1,) or ()
    """
    input, weight = _autocast_low(input, weight)
    output: Tensor = rules.PReLU.apply(input, weight)
    return output


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.rrelu`, by :class:`manualprop.functions.RReLU`, or in evaluation ``LeakyReLU``.

    The same seed draws the same slopes as in torch.
    """
    refuse_complex("rrelu", input)
    for name, bound in (("lower", lower), ("upper", upper)):
        if not math.isfinite(bound):
            raise RuntimeError(f"rrelu: {name} bound must be finite, got {bound}")
    if lower > upper:
        raise RuntimeError("Lower bound should be less than or equal to the upper bound")
    if not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    slopes = torch.empty_like(input, memory_format=torch.contiguous_format)
    torch.ops.aten.rrelu_with_noise(input.detach(), slopes, lower, upper, True)  # random for x <= 0, else 1
    if inplace:
        return write_over(rules.RReLU, input, slopes)
    output: Tensor = rules.RReLU.apply(input, slopes)
    return output


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Like :func:`torch.nn.functional.glu`, by :class:`manualprop.functions.GLU`."""
    output: Tensor = rules.GLU.apply(input, dim)
    return output
