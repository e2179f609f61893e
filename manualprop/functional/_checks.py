"""Argument checks shared by the functions of every family."""

from torch import Tensor


def refuse_complex(name: str, *inputs: Tensor) -> None:
    for input in inputs:
        if isinstance(input, Tensor) and input.is_complex():
            raise TypeError(
                f"{name}: inputs must be real, the rule is derived for real numbers. Got {input.dtype}. "
                "Use the function of torch.nn for complex inputs."
            )
