"""Linear maps with the names, signatures and defaults of :mod:`torch.nn.functional`."""

from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop._torch import any_autocast
from manualprop.functional._checks import refuse_complex

__all__ = ["bilinear", "linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like :func:`torch.nn.functional.linear`, by :class:`manualprop.functions.Linear`.

    Shape:
        ``input`` (..., I), ``weight`` (O, I) or (I,), ``bias`` (O,) or None -> (..., O) or (...)
    """
    refuse_complex("linear", input, weight)
    if weight.dim() == 1:  # torch also takes a weight of one row without the row axis
        return linear(input, weight.unsqueeze(0), bias).squeeze(-1)
    input, weight, bias = _autocast_low(input, weight, bias)
    output: Tensor = rules.Linear.apply(input, weight, bias)
    return output


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like :func:`torch.nn.functional.bilinear`, by :class:`manualprop.functions.Bilinear`.

    Shape:
        ``input1`` (..., I), ``input2`` (..., J), ``weight`` (O, I, J), ``bias`` (O,) or None -> (..., O)
    """
    refuse_complex("bilinear", input1, input2, weight)
    output: Tensor = rules.Bilinear.apply(input1, input2, weight, bias)
    return output


def _autocast_low(*tensors: Any) -> Any:
    """The tensors as autocast casts them for a matrix product.

    The cast is outside the rule: inside it, backward would get half-precision gradients and float32 weights.
    """
    if not any_autocast():
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(low) if t is not None and t.dtype in eligible else t for t in tensors)
