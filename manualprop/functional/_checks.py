"""Argument checks shared by the functions of every family."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, input: object) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a Tensor. Got {type(input).__name__}; use torch.as_tensor.")


def refuse_complex(name: str, *inputs: Tensor) -> None:
    for input in inputs:
        if isinstance(input, Tensor) and input.is_complex():
            raise TypeError(
                f"{name}: inputs must be real, the rule is derived for real numbers. Got {input.dtype}. "
                "Use the function of torch.nn for complex inputs."
            )


def whole_number(value: object) -> Any:
    """``value`` if it is one whole number, as torch takes it: of Python, of NumPy, or a tensor without axes; else None."""
    if isinstance(value, int | torch.SymInt):
        return value
    if isinstance(value, Tensor):
        is_one = value.dim() == 0 and not value.is_floating_point() and not value.is_complex()
        return int(value) if is_one else None
    return int(value) if isinstance(value, Integral) else None
