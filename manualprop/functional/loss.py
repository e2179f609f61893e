"""Losses with the names, signatures and defaults of :mod:`torch.nn.functional`: checks and reductions."""

import warnings

import torch
from torch import Tensor
from torch.nn import _reduction

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.mse_loss`, by :class:`manualprop.functions.MSE`.

    Shape:
        ``input``, ``target`` alike, or broadcastable (with a warning); ``weight`` like ``input``.
    """
    reduction = _legacy_reduction(size_average, reduce, reduction)
    refuse_complex("mse_loss", input, target)
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=2,
        )
    if weight is not None and weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    x, t = torch.broadcast_tensors(*_promoted(input, target))
    loss = rules.MSE.apply(x, t)
    if weight is None:
        return _reduced(loss, reduction, x)
    return _reduced(loss * weight, reduction, x, weight.sum())


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Like :func:`torch.nn.functional.cross_entropy`, by ``CrossEntropy`` or ``SoftCrossEntropy``.

    Shape:
        ``input`` (N, C, ...) or (C,); ``target`` class indices (N, ...) or (), or class probabilities like
        ``input``; ``weight`` (C,)
    """
    reduction = _legacy_reduction(size_average, reduce, reduction)
    refuse_complex("cross_entropy", input, target)
    if input.shape == target.shape:
        return _soft_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    loss = rules.CrossEntropy.apply(input, target, weight, ignore_index, float(label_smoothing))
    if reduction != "mean":
        return _reduced(loss, reduction, input)
    counted = target.ne(ignore_index)
    mass = counted if weight is None else weight[target.where(counted, 0)] * counted
    return _reduced(loss, reduction, input, mass.sum())


def _soft_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Cross-entropy with class probabilities."""
    dim, classes = (0, input.numel()) if input.dim() == 1 else (1, input.shape[1])
    if not target.is_floating_point():
        raise RuntimeError(
            "cross_entropy: a target of the input's shape holds class probabilities and must be floating "
            f"point. Got {target.dtype}. For class indices leave out the class axis {dim}."
        )
    if ignore_index >= 0:
        raise RuntimeError(
            "cross_entropy: ignore_index is not supported for floating point target. "
            f"Got ignore_index={ignore_index}. Use class indices, or give the ignored rows probability 0."
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(
            f"cross_entropy: weight tensor should be defined either for all {classes} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    mass = target
    if label_smoothing > 0:
        mass = target * (1 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        axes = [1] * input.dim()
        axes[dim] = classes
        mass = mass * weight.view(axes)
    loss = rules.SoftCrossEntropy.apply(input, mass)
    return _reduced(loss, reduction, input, None if loss.numel() else loss.sum())


def _legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _reduction.get_enum(reduction)  # ValueError for an unknown one, as in torch
    return reduction


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype."""
    first, *rest = (t.dtype for t in tensors)
    if all(dtype == first for dtype in rest):
        return tensors
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return tuple(t.to(first) for t in tensors)


def _reduced(loss: Tensor, reduction: str, input: Tensor, mass: Tensor | None = None) -> Tensor:
    """The reduction of ``loss``, rounded once to the dtype torch returns; a mean is over ``mass`` if given."""
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.mean() if mass is None else loss.sum() / mass
    # Autocast runs losses in float32 and leaves them there.
    return loss if torch._C._is_any_autocast_enabled() else loss.to(input.dtype)
