"""Argument checks shared by the functions of every family."""

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
