"""Normalisations with the names, signatures and defaults of :mod:`torch.nn.functional`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import check_tensor, refuse_complex

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Like :func:`torch.nn.functional.layer_norm`, by :class:`manualprop.functions.LayerNorm`."""
    check_tensor("layer_norm", input)
    shape = tuple(normalized_shape)
    _check_normalized_shape("layer_norm", input, shape)
    output: Tensor = rules.LayerNorm.apply(input, weight, bias, len(shape), eps)[0]
    return output


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Like :func:`torch.nn.functional.rms_norm`, by :class:`manualprop.functions.RMSNorm`.

    Args:
        eps: added under the root; None for the machine epsilon of the precision of the computation.
    """
    check_tensor("rms_norm", input)
    refuse_complex("rms_norm", input)
    shape = tuple(normalized_shape)
    if shape and input.dim() < len(shape):
        raise ValueError(f"Input tensor must have at least {len(shape)} dimensions, but got {input.dim()}")
    _check_normalized_shape("rms_norm", input, shape)
    if weight is not None and tuple(weight.shape) != shape:
        raise RuntimeError(
            "rms_norm: Expected weight to be of same shape as normalized_shape, but got weight of shape "
            f"{list(weight.shape)} and normalized_shape = {list(shape)}"
        )
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    output: Tensor = rules.RMSNorm.apply(input, weight, len(shape), eps)[0]
    return output


def _check_normalized_shape(name: str, input: Tensor, shape: tuple[int, ...]) -> None:
    if not shape:
        raise RuntimeError(
            f"{name}: Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
            "element, but got normalized_shape = ()"
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors there
        return
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"Given normalized_shape={list(shape)}, expected input with shape [*, {str(list(shape))[1:-1]}], but "
            f"got input of size{list(input.shape)}"
        )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Like :func:`torch.nn.functional.group_norm`, by :class:`manualprop.functions.GroupNorm`."""
    if input.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    rows, rest = input.size(0) * input.size(1) // num_groups, input.shape[2:]
    _more_than_one(rows * rest.numel(), "value per channel", [rows, num_groups, *rest])
    output: Tensor = rules.GroupNorm.apply(input, weight, bias, num_groups, eps)[0]
    return output


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Like :func:`torch.nn.functional.batch_norm`, by ``BatchNorm`` or, in evaluation, ``BatchNormEvaluation``.

    In training the running statistics are updated in place.
    """
    _check_batch_norm(input, training, eps)
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _check_batch_norm(input: Tensor, training: bool, eps: float) -> None:
    if training:
        _more_than_one(input.size(0) * input.shape[2:].numel(), "value per channel", input.shape)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    output: Tensor
    if input.dim() == 1 and input.numel() == 0:  # torch accepts this, without channels or elements
        return input.clone()
    if training:
        output = rules.BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)[0]
    else:
        output = rules.BatchNormEvaluation.apply(input, weight, bias, running_mean, running_var, eps)[0]
    return output


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Like :func:`torch.nn.functional.instance_norm`: a batch norm where each example has its own channels.

    In training each running statistic becomes the mean over the examples.
    """
    if use_input_stats:
        _more_than_one(input.shape[2:].numel(), "spatial element", input.shape)
    elif running_mean is None or running_var is None:
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when use_input_stats is false"
        )
    N, C, *rest = input.shape
    mean, var, W, b = (None if s is None else s.repeat(N) for s in (running_mean, running_var, weight, bias))
    x = input.contiguous().view(1, N * C, *rest)
    y = _batch_norm(x, mean, var, W, b, use_input_stats, momentum, eps)
    for running, update in ((running_mean, mean), (running_var, var)):
        if use_input_stats and running is not None and update is not None:
            _overwrite(running, update.view(N, C).mean(0))
    return y.view(input.shape)


def _more_than_one(count: int, what: str, size: Sequence[int]) -> None:
    if count == 1:
        raise ValueError(f"Expected more than 1 {what} when training, got input size {size}")


def _overwrite(buffer: Any, value: Tensor) -> None:
    """Write in place.  ``torch.func`` forbids it for captured tensors; running statistics are exempt."""
    torch.ops.aten.alias(buffer).copy_(value)
