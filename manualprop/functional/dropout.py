"""Dropout with the names, signatures and defaults of :mod:`torch.nn.functional`.

On the CPU the same seed drops the same elements as in torch: the same calls draw the numbers.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop._torch import transforms_active
from manualprop.functional._checks import check_tensor
from manualprop.functional._offer import OFFERING
from manualprop.functions._execution._in_place import write_over
from manualprop.functions._rule import Rule
from manualprop.functions.activation import SELU

__all__ = ["alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"]

SATURATED = SELU.LAMBDA * SELU.ALPHA  # SELU saturates at minus this


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.dropout`, by :class:`manualprop.functions.Dropout`."""
    return _dropout(input, p, training, inplace)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.dropout1d`, by :class:`manualprop.functions.Dropout`."""
    _check_probability(p)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            "Note that dropout1d exists to provide channel-wise dropout on inputs with 1 "
            "spatial dimension, a channel dimension, and an optional batch dimension (i.e. 2D or 3D inputs)."
        )
    return _dropout(input, p, training, inplace, channels=True, batched=input.dim() == 3)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.dropout2d`, by :class:`manualprop.functions.Dropout`."""
    _check_probability(p)
    if input.dim() not in (3, 4):
        _warn_of_dimensions("dropout2d", input, "2 spatial dimensions", "3D or 4D")
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior is "
            "desired - input is interpreted as shape (N, C, L), where C is the channel dim. To maintain the 1D "
            "channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=2 + OFFERING,
        )
    return _dropout(input, p, training, inplace, channels=True)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.dropout3d`, by :class:`manualprop.functions.Dropout`."""
    _check_probability(p)
    if input.dim() not in (4, 5):
        _warn_of_dimensions("dropout3d", input, "3 spatial dimensions", "4D or 5D")
    return _dropout(input, p, training, inplace, channels=True, batched=input.dim() == 5)


def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.alpha_dropout`, by :class:`manualprop.functions.AlphaDropout`."""
    return _dropout(input, p, training, inplace, alpha=True)


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    """Like :func:`torch.nn.functional.feature_alpha_dropout`, by :class:`manualprop.functions.AlphaDropout`."""
    return _dropout(input, p, training, inplace, channels=True, alpha=True)


def _dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    *,
    channels: bool = False,
    batched: bool = True,
    alpha: bool = False,
) -> Tensor:
    """Drop elements or whole ``channels``: set them to 0, or for ``alpha`` to SELU's saturation value."""
    _check_probability(p)
    check_tensor("dropout", input)
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.is_complex() and p != 1:
        raise NotImplementedError(f"dropout: inputs must be real, or p 0 or 1. Got {input.dtype} and p={p}.")
    rule: type[Rule] = rules.Dropout
    given: tuple[Any, ...]
    if p == 1:
        given = input.new_zeros((), dtype=torch.uint8), 1.0
    elif alpha:
        a = 1 / math.sqrt((SATURATED**2 * p + 1) * (1 - p))
        rule, given = rules.AlphaDropout, (_kept(input, p, channels, batched), a, p, SATURATED)
    else:
        given = _kept(input, p, channels, batched), 1 - p
    if inplace:
        return write_over(rule, input, *given)
    output: Tensor = rule.apply(input, *given)
    return output


def _kept(input: Tensor, p: float, channels: bool, batched: bool) -> Tensor:
    """1 with probability 1 - p, else 0, as bytes: compiled code reads bytes faster than booleans."""
    kept = torch.empty_like(input, dtype=torch.uint8, requires_grad=False)
    if channels:
        if batched and input.dim() < 2:
            raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
        leading = 2 if batched else 1
        kept = kept.new_empty((*input.shape[:leading], *(1,) * (input.dim() - leading)))
    if transforms_active():  # vmap applies its ``randomness`` only to a tensor that is not batched
        return torch.bernoulli(torch.empty(kept.shape, dtype=torch.uint8, device=kept.device), 1 - p)
    return kept.bernoulli_(1 - p)


def _check_probability(p: float) -> None:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _warn_of_dimensions(name: str, input: Tensor, space: str, expected: str) -> None:
    warnings.warn(
        f"{name}: Received a {input.dim()}-D input to {name}, which is deprecated and will result in an error in "
        "a future release. To retain the behavior and silence this warning, please use dropout instead. Note that "
        f"{name} exists to provide channel-wise dropout on inputs with {space}, a channel dimension, and an "
        f"optional batch dimension (i.e. {expected} inputs).",
        stacklevel=3 + OFFERING,
    )
