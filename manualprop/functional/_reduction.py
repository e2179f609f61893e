"""Reductions and argument checks shared by the losses."""

import warnings

import torch
from torch import Tensor

from manualprop._torch import any_autocast, reductions
from manualprop.functional._offer import OFFERING
from manualprop.functions._execution import HALF

NAMES = ("none", "mean", "sum")  # the index is ATen's number


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The name of the reduction; ``size_average`` and ``reduce`` are its deprecated form."""
    if size_average is None and reduce is None and reduction in NAMES:
        return reduction
    if size_average is not None or reduce is not None:
        reduction = reductions.legacy_get_string(size_average, reduce)
    # An unknown name raises ValueError, as in torch; the old name of "mean" warns.
    return NAMES[reductions.get_enum(reduction)]


def reduced_loss(
    loss: Tensor, reduction: str, dtype: torch.dtype, mass: Tensor | int | None = None
) -> Tensor:
    """The reduction of ``loss``, rounded once to ``dtype``; a mean is over ``mass`` if given."""
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        # Not loss.mean(): its backward fills a tensor as large as the loss with one number.
        loss = loss.sum() / (loss.numel() if mass is None else mass)
    return in_dtype(loss, dtype)


def in_dtype(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """``loss.to(dtype)``, skipped if there is nothing to do: even then it costs as much as a small loss."""
    return loss if loss.dtype is dtype else loss.to(dtype)


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss: the input's, or under autocast float32, as for most losses of torch."""
    if not input.is_floating_point():
        return torch.get_default_dtype()
    if input.dtype not in HALF or not any_autocast():
        return input.dtype
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.float32 if autocast else input.dtype


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype."""
    first, *rest = tensors
    dtype = first.dtype
    if all(t.dtype == dtype for t in rest):
        return tensors
    for t in rest:
        dtype = torch.promote_types(dtype, torch.result_type(first, t))
    return tuple(t.to(dtype) for t in tensors)


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype and shape."""
    tensors = promoted(*tensors)
    shape = tensors[0].shape
    if all(t.shape == shape for t in tensors):
        return tensors
    broadcast: tuple[Tensor, ...] = torch.broadcast_tensors(*tensors)
    return broadcast


def warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3 + OFFERING,
        )


def refuse_gradient(name: str, **arguments: Tensor | None) -> None:
    """Raise, as torch does, if an argument requires a gradient but has no derivative."""
    for argument, tensor in arguments.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"The function {name!r} is not differentiable with respect to argument {argument!r}. "
                f"Give {argument}.detach(), or a tensor that does not require a gradient."
            )
