r"""How a loss, and the gradient of one update, are computed in pieces.

A gradient computed in pieces is exact here. A mean loss is a quotient, $L = \sum_i w_i l_i / \sum_i w_i$,
where w is 1, a class weight, or 0 for an ignored target. The mean of the means of the pieces is not L, even
weighted by the number of examples. But the numerator and the denominator add up over pieces. So both are
summed, and the gradient is divided once, at the end (`sum_and_denominator`, `finish_gradient`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

Loss = Callable[[Tensor, Tensor], Tensor]

# Losses of torch whose mean divides by the number of compared elements, for all weights.
_MEAN_OVER_ELEMENTS = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


def gradient(model: nn.Module, loss: Loss, pieces: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Add the exact gradient of one update to every `.grad` and return the loss.

    Args:
        model: called on the inputs of each piece.
        loss: called on (output, target); for several pieces see `check_splittable`.
        pieces: (input, target) pairs that together are the examples of the update. For several pieces every
            `.grad` must be None or zero, because the sum over all pieces is divided at the end.

    Raises:
        TypeError: for several pieces, if the loss cannot be split exactly.
    """
    if len(pieces) == 1:
        x, target = pieces[0]
        value = loss(model(x), target)
        value.backward()
        return value.item()
    check_splittable(loss, model)
    total = divisor = 0.0
    for x, target in pieces:
        piece, weight = sum_and_denominator(loss, model(x), target)
        piece.backward()
        total, divisor = total + piece.item(), divisor + weight
    return finish_gradient(model.parameters(), loss, total, divisor)


def finish_gradient(parameters: Iterable[Parameter], loss: Loss, total: float, divisor: float) -> float:
    """Turn the gradient of the summed loss in every `.grad` into the gradient of the loss; return the loss.

    Args:
        parameters: the parameters whose `.grad` is divided, if they have one; unchanged if the loss is a sum.
        loss: the loss whose sum is `total`.
        total: sum of the loss over all pieces.
        divisor: sum of the pieces' denominators; 0 (all targets ignored) gives nan, as in torch.
    """
    if is_sum(loss):
        return total
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
    return total / divisor if divisor else math.nan


def is_sum(loss: Loss) -> bool:
    """Return whether the loss is a sum over examples, which adds up over pieces without a division.

    Args:
        loss: with or without an attribute `reduction`.
    """
    return getattr(loss, "reduction", None) == "sum"


def sum_and_denominator(loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Return a loss summed over a piece, and the divisor of its mean over the piece.

    Args:
        loss: with an attribute `reduction`; see `check_splittable`.
        output: the model's output.
        target: the targets.

    Raises:
        TypeError: if the loss cannot be split into pieces exactly.
    """
    check_splittable(loss)
    if is_sum(loss):
        return loss(output, target), float(len(output))
    summed: Any = copy.copy(loss)  # shallow: class weights and other buffers stay shared
    summed.reduction = "sum"
    return summed(output, target), denominator(loss, output, target)


def denominator(loss: Any, output: Tensor, target: Tensor) -> float:
    """Return the divisor of the mean of a loss over a piece; divisors add up over pieces.

    Args:
        loss: accepted by `check_splittable`, with reduction "mean" or "batchmean".
        output: the model's output.
        target: the targets.
    """
    # A Python float: as a bfloat16 tensor, 1297 examples would count as 1296.
    if hasattr(loss, "denominator"):
        return float(loss.denominator(output, target))
    if loss.reduction == "batchmean":
        return float(len(output))
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return float(math.prod(torch.broadcast_shapes(output.shape, target.shape)))
    if target.is_floating_point():  # class probabilities: the mean ignores the class weights
        return output.numel() / output.shape[min(1, output.dim() - 1)]
    kept = target != loss.ignore_index
    return float(kept.sum() if loss.weight is None else loss.weight[target[kept].long()].sum())


def check_splittable(loss: Loss, model: nn.Module | None = None) -> None:
    """Refuse a loss or a model whose gradient over a whole does not follow from those over the pieces.

    The losses of torch.nn and manualprop.nn with reduction "mean" or "sum" can be split. Your own loss, a
    module or another callable, can be split if it has an attribute `reduction` that it follows: "sum"; or
    "mean", with a method `denominator(output, target)` that returns the divisor of the mean. A model must
    treat every example separately; batch normalisation in training mode does not.

    Args:
        loss: called on (output, target).
        model: checked too if given.

    Raises:
        TypeError: for any other loss.
        ValueError: for a model with batch normalisation in training mode.
    """
    reduction = getattr(loss, "reduction", None)
    divides = is_known(loss) or hasattr(loss, "denominator")
    if not (reduction == "sum" or (reduction in ("mean", "batchmean") and divides)):
        raise TypeError(
            "A gradient computed in pieces must be exact, and it is not known what the mean of "
            f"{getattr(loss, '__name__', type(loss).__name__)} divides by. Got reduction={reduction!r}. Give it an "
            "attribute reduction='sum', or reduction='mean' and a method denominator(output, target) that returns "
            "what its mean divides by; or compute each update in one piece (micro_batch_size=None, one process)."
        )
    for path, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                "A gradient computed in pieces must be exact, and batch normalisation makes every example depend on "
                f"its piece. Got {type(module).__name__} at {path!r} in training mode. Use LayerNorm or GroupNorm, or "
                "compute each update in one piece (micro_batch_size=None, one process)."
            )


def compares_elements(loss: Loss) -> bool:
    """Return whether a loss of torch.nn or manualprop.nn pairs output and target element by element.

    Args:
        loss: called on (output, target).
    """
    return is_known(loss) and isinstance(loss, _MEAN_OVER_ELEMENTS)


def is_known(loss: Loss) -> bool:
    """Return whether `denominator` knows what the mean of a loss divides by without asking the loss.

    Args:
        loss: called on (output, target).
    """
    # A subclass from elsewhere may have changed `forward`, so the class itself must come from torch or from us.
    home = type(loss).__module__.partition(".")[0]
    known = (*_MEAN_OVER_ELEMENTS, nn.CrossEntropyLoss, nn.NLLLoss)
    return home in ("torch", "manualprop") and isinstance(loss, known)
