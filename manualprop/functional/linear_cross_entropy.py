"""The linear layer and the cross-entropy of its logits in one, with the signature of :mod:`torch.nn.functional`."""

from __future__ import annotations  # torch has the type of the options from 2.13 on

from typing import Any

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex
from manualprop.functional._reduction import legacy_reduction, loss_dtype, reduced_loss, refuse_gradient
from manualprop.functional.linear import _autocast_low
from manualprop.functions._execution import plain_eager
from manualprop.functions._execution._chunks import rows_of_a_chunk
from manualprop.functions._execution._classes import counting, divisor
from manualprop.functions.cross_entropy import weighted_probabilities

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: torch.nn.LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """Like :func:`torch.nn.functional.linear_cross_entropy`, by ``LinearCrossEntropy``, or ``LinearCrossEntropyOnce``.

    The logits are never in memory as a whole: with all arguments and under all transforms, one chunk of rows
    is computed at a time.

    Args:
        ignore_index: the index of targets that are left out; None stands for -100, and is required with class
            probabilities.
        label_smoothing: in [0, 1].
        options: None computes the logits again in backward.  Otherwise the forward pass makes the gradient,
            which is faster and serves one first-order backward pass.  With ``allow_retain_graph``, with
            ``reduction`` "none", under ``torch.func`` and under ``torch.compile`` the logits are still
            computed again.  The options for the size of a chunk apply; the others have no effect, and sums
            are always in float32 or wider.

    Shape:
        ``input`` (N, D) or (D,); ``linear_weight`` (C, D), or (C, ..., D) for several losses a row; ``target`` class
        indices (N, ...) or (), or class probabilities (N, C, ...) or (C,); ``linear_bias`` (C, ...); ``weight`` (C,)

    Raises:
        RuntimeError: if shapes do not fit; in a second backward pass, if the forward pass made the gradient.
        ValueError: if the number of targets is not the number of rows.
    """
    reduction = legacy_reduction(None, None, reduction)
    refuse_complex("linear_cross_entropy", input, linear_weight, target)
    _check_shapes(input, linear_weight, target, linear_bias)
    classes, *positions, _ = linear_weight.shape
    probabilities = target.shape == (*input.shape[:-1], classes, *positions)
    _check_options(target, weight, ignore_index, label_smoothing, classes, probabilities)
    ignored, e = -100 if ignore_index is None else ignore_index, float(label_smoothing)
    x, W, b = _autocast_low(input, linear_weight, linear_bias)
    t = target if input.dim() == 2 else target.unsqueeze(0)
    x = x if input.dim() == 2 else x.unsqueeze(0)
    if positions:  # several losses per row: flatten them into one axis
        W, b = W.flatten(1, -2), None if b is None else b.flatten(1)
        t = t.flatten(2) if probabilities else t.flatten(1)
    if probabilities and weight is not None and weight.requires_grad:
        t, weight, e = weighted_probabilities(t, weight, e), None, 0.0
    inputs = x, W, b, t, weight, ignored, e, _rows(x, W, options)
    mass: Tensor | int | None = None
    if reduction == "mean" and not probabilities:
        index, counted = counting(target, ignored)
        mass = divisor(index, weight, counted, torch.promote_types(x.dtype, torch.float32))
    if options is not None and reduction != "none" and _once(options, x, W, b, t):
        if reduction == "mean" and not isinstance(mass, Tensor):
            mass = x.new_tensor(target.numel() / classes if mass is None else mass, dtype=torch.float32)
        needs = (a is not None and a.requires_grad for a in (x, W, b))
        return rules.LinearCrossEntropyOnce.apply(*inputs, mass, *needs)[0].to(loss_dtype(x))  # type: ignore[no-any-return]
    loss: Tensor = rules.LinearCrossEntropy.apply(*inputs)[0]
    loss = loss.reshape((*input.shape[:-1], *positions))
    if mass is None and not loss.numel():
        mass = loss.sum()
    return reduced_loss(loss, reduction, loss_dtype(x), mass)


def _rows(x: Tensor, W: Tensor, options: Any) -> int:
    """The number of rows of a chunk."""
    count, features = x.shape
    logits = W.shape[:-1].numel()
    if options is not None and options.batch_chunk_size is not None:
        return int(options.batch_chunk_size)
    if options is not None and options.chunking_method not in (None, "auto"):
        return max(1, int(options._compute_batch_chunk_size(count, features, logits)))
    return rows_of_a_chunk(logits)


def _once(options: torch.nn.LinearCrossEntropyOptions, *tensors: Tensor | None) -> bool:
    """Whether the forward pass should, and can, make the gradient."""
    *inputs, t = tensors
    differentiable = any(a is not None and a.requires_grad for a in inputs)
    return (
        not options.allow_retain_graph
        and torch.is_grad_enabled()
        and differentiable
        and not (t is not None and t.requires_grad)
        and plain_eager()
    )


def _check_shapes(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> None:
    """torch's own checks, with torch's texts, and a check that there are as many targets as rows."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    classes = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != classes:
        raise RuntimeError(f"expected linear_bias shape {classes}, got {tuple(linear_bias.shape)}")
    if len(classes) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires "
            f"batched input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    rows, positions = tuple(input.shape[:-1]), classes[1:]
    if tuple(target.shape) in ((*rows, *positions), (*rows, *classes)):
        return
    if rows and target.dim() and target.shape[0] != rows[0]:
        raise ValueError(
            f"Expected input batch_size ({rows[0]}) to match target batch_size ({target.shape[0]})."
        )
    raise RuntimeError(
        f"linear_cross_entropy: target must have the shape {(*rows, *positions)} for class indices, or "
        f"{(*rows, *classes)} for class probabilities. Got {tuple(target.shape)}."
    )


def _check_options(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    classes: int,
    probabilities: bool,
) -> None:
    if probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if probabilities and not target.is_floating_point():
        raise RuntimeError(
            "linear_cross_entropy: Expected floating point type for target with class probabilities, got "
            f"{target.dtype}. For class indices leave out the axis of the classes."
        )
    if not probabilities:
        refuse_gradient("linear_cross_entropy", weight=weight)
        _check_classes(target, -100 if ignore_index is None else ignore_index, classes)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if weight is not None and weight.shape != (classes,):
        raise RuntimeError(
            f"linear_cross_entropy: weight tensor should be defined either for all {classes} classes or no "
            f"classes but got weight tensor of shape: {list(weight.shape)}"
        )


def _check_classes(target: Tensor, ignored: int, classes: int) -> None:
    """Check the dtype of class indices, and their values if values may be read."""
    if target.dtype != torch.int64:
        raise RuntimeError(
            f"linear_cross_entropy: class indices must be of torch.int64 (Long). Got {target.dtype}. Give target.long()."
        )
    if not plain_eager() or type(target) is not Tensor or not target.is_cpu or not target.numel():
        return
    for number in (n.item() for n in target.where(target != ignored, 0).aminmax()):
        if not 0 <= number < classes:
            raise IndexError(
                f"Target {number} is out of bounds: linear_cross_entropy has {classes} classes, and {ignored} for a target "
                "that is ignored."
            )
