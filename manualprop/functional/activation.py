"""Activations with the names, signatures and defaults of :mod:`torch.nn.functional`."""

import warnings
from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex
from manualprop.functional._offer import OFFERING
from manualprop.functions import Elementwise
from manualprop.functions._execution._in_place import write_over

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log_softmax",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "relu_squared",
    "selu",
    "sigmoid",
    "silu",
    "softmax",
    "softmin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
]


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.celu`, by :class:`manualprop.functions.CELU`."""
    return _activate(rules.CELU, input, alpha, inplace=inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.elu`, by :class:`manualprop.functions.ELU`."""
    rule = rules.ELU if alpha >= 0 else rules.ELUFromInput
    return _activate(rule, input, alpha, inplace=inplace)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Like :func:`torch.nn.functional.gelu`, by :class:`manualprop.functions.GELU` or ``GELUTanh``."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh'. Got approximate={approximate!r}.")
    return _activate(rules.GELU if approximate == "none" else rules.GELUTanh, input)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """Like :func:`torch.nn.functional.hardshrink`, by :class:`manualprop.functions.Hardshrink`."""
    return _activate(rules.Hardshrink, input, lambd)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.hardsigmoid`, by :class:`manualprop.functions.Hardsigmoid`."""
    return _activate(rules.Hardsigmoid, input, inplace=inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.hardswish`, by :class:`manualprop.functions.Hardswish`."""
    return _activate(rules.Hardswish, input, inplace=inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.hardtanh`, by :class:`manualprop.functions.Hardtanh`."""
    return _activate(rules.Hardtanh, input, min_val, max_val, inplace=inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.leaky_relu`, by :class:`manualprop.functions.LeakyReLU`."""
    rule = rules.LeakyReLU if negative_slope >= 0 else rules.LeakyReLUFromInput
    return _activate(rule, input, negative_slope, inplace=inplace)


def logsigmoid(input: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.logsigmoid`, by :class:`manualprop.functions.LogSigmoid`."""
    return _activate(rules.LogSigmoid, input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.mish`, by :class:`manualprop.functions.Mish`."""
    return _activate(rules.Mish, input, inplace=inplace)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.relu`, by :class:`manualprop.functions.ReLU`."""
    return _activate(rules.ReLU, input, inplace=inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.relu6`, by :class:`manualprop.functions.ReLU6`."""
    return _activate(rules.ReLU6, input, inplace=inplace)


def relu_squared(input: Tensor, inplace: bool = False) -> Tensor:
    """``relu(input) ** 2``, by :class:`manualprop.functions.ReLUSquared`, in float16 by ``ReLUSquaredFromInput``.

    Args:
        inplace: whether the result is written over ``input``.
    """
    narrow = isinstance(input, Tensor) and input.dtype == torch.float16
    return _activate(rules.ReLUSquaredFromInput if narrow else rules.ReLUSquared, input, inplace=inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.selu`, by :class:`manualprop.functions.SELU`."""
    return _activate(rules.SELU, input, inplace=inplace)


def sigmoid(input: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.sigmoid`, by :class:`manualprop.functions.Sigmoid`."""
    return _activate(rules.Sigmoid, input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.silu`, by :class:`manualprop.functions.SiLU`."""
    return _activate(rules.SiLU, input, inplace=inplace)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Like :func:`torch.nn.functional.softplus`, by :class:`manualprop.functions.Softplus` or ``SoftplusFromInput``.

    Raises:
        ValueError: if ``beta`` is not positive; torch returns inf or a concave function there.
    """
    if not beta > 0:
        raise ValueError(f"softplus: beta must be positive. Got beta={beta}.")
    from_output = threshold >= (38 if input.dtype == torch.float64 else 20)
    rule = rules.Softplus if from_output else rules.SoftplusFromInput
    return _activate(rule, input, beta, threshold)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """Like :func:`torch.nn.functional.softshrink`, by :class:`manualprop.functions.Softshrink`."""
    return _activate(rules.Softshrink, input, lambd)


def softsign(input: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.softsign`, by :class:`manualprop.functions.Softsign`."""
    return _activate(rules.Softsign, input)


def tanh(input: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.tanh`, by :class:`manualprop.functions.Tanh`."""
    return _activate(rules.Tanh, input)


def tanhshrink(input: Tensor) -> Tensor:
    """Like :func:`torch.nn.functional.tanhshrink`, by :class:`manualprop.functions.Tanhshrink`."""
    return _activate(rules.Tanhshrink, input)


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """Like :func:`torch.nn.functional.threshold`, by :class:`manualprop.functions.Threshold`."""
    return _activate(rules.Threshold, input, threshold, value, inplace=inplace)


def _activate(rule: type[Elementwise], input: Tensor, *p: float, inplace: bool = False) -> Tensor:
    refuse_complex(rule.__name__, input)
    if isinstance(input, Tensor) and input.is_nested and input.layout is torch.jagged and not inplace:
        return _of_values(rule, input, *p)
    if inplace:
        return write_over(rule, input, *p)
    output: Tensor = rule.apply(input, *p)
    return output


def _of_values(rule: type[Elementwise], jagged: Any, *p: float) -> Tensor:
    """The rule on each value of a jagged tensor."""
    values = rule.apply(jagged.values(), *p)
    return torch.nested.nested_tensor_from_jagged(
        values, jagged.offsets(), jagged.lengths(), jagged._ragged_idx
    )


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Like :func:`torch.nn.functional.softmax`, by :class:`manualprop.functions.Softmax`."""
    dim = _implicit_dim("softmax", input, _stacklevel) if dim is None else dim
    output: Tensor = rules.Softmax.apply(input if dtype is None else input.to(dtype), dim)
    return output


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Like :func:`torch.nn.functional.softmin`: the softmax of ``-input``."""
    dim = _implicit_dim("softmin", input, _stacklevel) if dim is None else dim
    return softmax(-input, dim, dtype=dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Like :func:`torch.nn.functional.log_softmax`, by :class:`manualprop.functions.LogSoftmax`."""
    dim = _implicit_dim("log_softmax", input, _stacklevel) if dim is None else dim
    output: Tensor = rules.LogSoftmax.apply(input if dtype is None else input.to(dtype), dim)
    return output


def _implicit_dim(name: str, input: Tensor, stacklevel: int) -> int:
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. "
        "Change the call to include dim=X as an argument.",
        stacklevel=stacklevel + OFFERING,
    )
    return 0 if input.dim() in (0, 1, 3) else 1
