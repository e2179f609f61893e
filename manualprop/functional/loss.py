"""Losses with the names, signatures and defaults of :mod:`torch.nn.functional`: checks and reductions."""

import warnings

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex
from manualprop.functional._offer import OFFERING
from manualprop.functional._reduction import (
    alike,
    in_dtype,
    legacy_reduction,
    loss_dtype,
    promoted,
    reduced_loss,
    refuse_gradient,
    warn_of_broadcasting,
)
from manualprop.functions._elementwise_loss import ElementwiseLoss
from manualprop.functions._execution import full, plain_eager
from manualprop.functions.cross_entropy import weighted_probabilities

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
]

# ----- regression -----


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.l1_loss`, by :class:`manualprop.functions.L1`.

    Shape:
        ``input``, ``target`` alike, or broadcastable (with a warning); ``weight`` like ``input``.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    warn_of_broadcasting(input, target)
    return _regression("l1_loss", rules.L1, input, target, reduction, weight)


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
    reduction = legacy_reduction(size_average, reduce, reduction)
    warn_of_broadcasting(input, target)
    return _regression("mse_loss", rules.MSE, input, target, reduction, weight)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Like :func:`torch.nn.functional.smooth_l1_loss`, by :class:`manualprop.functions.SmoothL1`, or ``L1``.

    Shape:
        ``input``, ``target`` alike, or broadcastable (with a warning).
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    warn_of_broadcasting(input, target)
    if beta == 0:
        return _regression("smooth_l1_loss", rules.L1, input, target, reduction)
    return _regression("smooth_l1_loss", rules.SmoothL1, input, target, reduction, None, beta)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.huber_loss`, by :class:`manualprop.functions.Huber`.

    As in torch, a weighted mean divides by the number of elements; other losses divide by the weights.

    Shape:
        ``input``, ``target`` alike, or broadcastable (with a warning); ``weight`` like ``input``.
    """
    reduction = legacy_reduction(None, None, reduction)
    warn_of_broadcasting(input, target)
    refuse_complex("huber_loss", input, target)
    x, t = alike(input, target)
    loss = rules.Huber.apply(x, t, delta)
    if weight is None:
        return reduced_loss(loss, reduction, loss_dtype(x))
    _check_weight(input, weight)
    return reduced_loss(loss * weight, reduction, torch.promote_types(loss_dtype(x), weight.dtype))


def _regression(
    name: str,
    rule: type[ElementwiseLoss],
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    *p: float,
) -> Tensor:
    refuse_complex(name, input, target)
    x, t = alike(input, target)
    if weight is None:
        return reduced_loss(rule.apply(x, t, *p), reduction, loss_dtype(x))
    _check_weight(input, weight)
    # torch makes the weighted loss from plain operations, and autocast does not cast those.
    return reduced_loss(
        rule.apply(x, t, *p) * weight,
        reduction,
        torch.promote_types(x.dtype, weight.dtype),
        full(weight).sum() if reduction == "mean" else None,
    )


def _check_weight(input: Tensor, weight: Tensor) -> None:
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")


# ----- likelihood -----


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.poisson_nll_loss`, by ``PoissonNLL`` or ``PoissonNLLFromRate``.

    Shape:
        ``input``, ``target`` alike, or broadcastable.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("poisson_nll_loss", input, target)
    x, t = alike(input, target)
    if log_input:
        loss = rules.PoissonNLL.apply(x, t, full)
    else:
        loss = rules.PoissonNLLFromRate.apply(x, t, full, eps)
    return reduced_loss(loss, reduction, loss_dtype(x))


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.gaussian_nll_loss`, by :class:`manualprop.functions.GaussianNLL`.

    Shape:
        ``input``, ``target`` alike, or broadcastable; ``var`` like ``input``, or with a last axis of 1, or
        without it, or a number.

    Raises:
        ValueError: if a variance is negative.  Inside a transform or compiled code values cannot be read:
            there the loss of a negative variance is NaN.
    """
    refuse_complex("gaussian_nll_loss", input, target)
    var = _checked_variance(input, var)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    x, t, v = alike(input, target, var)
    loss = rules.GaussianNLL.apply(x, t, v, full, eps)
    return reduced_loss(loss, reduction, x.dtype)


def _checked_variance(input: Tensor, var: Tensor | float) -> Tensor:
    """The variance as a tensor that broadcasts against ``input``."""
    if isinstance(var, float):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        return input.new_full((), var).expand_as(input)
    if not plain_eager():
        var = var.where(var >= 0, torch.nan)
    elif torch.any(var < 0):
        raise ValueError("var has negative entry/entries")
    if var.size() == input.size():
        return var
    if input.size()[:-1] == var.size():
        return var.unsqueeze(-1)
    if input.ndim == var.ndim:
        differing = [v for i, v in zip(input.size(), var.size(), strict=True) if i != v]
        if sum(i for i, v in zip(input.size(), var.size(), strict=True) if i != v) == 1 or differing == [1]:
            return var
    raise ValueError("var is of incorrect size")


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.kl_div`, by :class:`manualprop.functions.KLDiv` or ``KLDivLogTarget``.

    Shape:
        ``input``, ``target`` alike, or broadcastable.
    """
    batchmean = reduction == "batchmean"
    if size_average is None and reduce is None and reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2 + OFFERING,
        )
    reduction = legacy_reduction(size_average, reduce, "sum" if batchmean else reduction)
    rule = rules.KLDivLogTarget if log_target else rules.KLDiv
    if input.is_complex() or target.is_complex():
        raise RuntimeError("kl_div: Complex inputs not supported.")
    if not (input.is_floating_point() and target.is_floating_point()):
        raise RuntimeError("kl_div: Integral inputs not supported.")
    x, t = alike(input, target)
    if batchmean and input.dim() != 0:
        return reduced_loss(rule.apply(x, t), "mean", loss_dtype(x), input.size()[0])
    return reduced_loss(rule.apply(x, t), reduction, loss_dtype(x))


# ----- cross-entropy -----


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
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("cross_entropy", input, target)
    if input.dim() == target.dim() and input.shape == target.shape:
        return _soft_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
    if weight is not None:
        refuse_gradient("cross_entropy", weight=weight)
    loss = rules.CrossEntropy.apply(
        input, _indices(target), weight, ignore_index, float(label_smoothing), reduction
    )
    return in_dtype(loss, loss_dtype(input))


def _indices(target: Tensor) -> Tensor:
    """Class indices.  As an index, torch takes bytes for a mask."""
    return target.long() if target.dtype is torch.uint8 else target


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.nll_loss`, by :class:`manualprop.functions.NLL`.

    Shape:
        ``input`` (N, C, ...) or (C,); ``target`` (N, ...) or (); ``weight`` (C,)
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("nll_loss", input)
    if weight is not None:
        refuse_gradient("nll_loss", weight=weight)
    return in_dtype(
        rules.NLL.apply(input, _indices(target), weight, ignore_index, reduction), loss_dtype(input)
    )


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
    e = float(label_smoothing)
    if weight is not None and weight.requires_grad:
        target, weight, e = weighted_probabilities(target, weight, e), None, 0.0
    return in_dtype(rules.SoftCrossEntropy.apply(input, target, weight, e, reduction), loss_dtype(input))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.binary_cross_entropy`, by :class:`manualprop.functions.BCE`.

    Args:
        input: probabilities, in [0, 1].
        target: like ``input``.
        weight: a factor of each loss, broadcast to ``target``.

    Raises:
        ValueError: if the sizes of ``target`` and ``input`` differ.
        RuntimeError: if ``input`` is not in [0, 1].
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}) is "
            "deprecated. Please ensure they have the same size."
        )
    refuse_gradient("binary_cross_entropy", weight=weight)
    loss = rules.BCE.apply(input, target)
    if weight is not None:
        loss = loss * weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    return reduced_loss(loss, reduction, loss_dtype(input))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.binary_cross_entropy_with_logits`, by ``BCEWithLogits`` or ``BCEWithPosWeight``.

    Args:
        input: logits.
        target: like ``input``.
        weight: a factor of each loss, broadcastable to ``target``.
        pos_weight: a factor of the positive part of each loss, broadcastable to ``target``.

    Raises:
        ValueError: if the sizes of ``target`` and ``input`` differ.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    name = "binary_cross_entropy_with_logits"
    refuse_complex(name, input, target)
    refuse_gradient(name, weight=weight, pos_weight=pos_weight)
    dtype = loss_dtype(target)
    if pos_weight is None:
        loss = rules.BCEWithLogits.apply(*promoted(input, target))
    else:
        loss = rules.BCEWithPosWeight.apply(*promoted(input, target, pos_weight.expand_as(input)))
    return reduced_loss(loss if weight is None else loss * weight, reduction, dtype)
