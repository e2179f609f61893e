"""Explains a loss that is not finite: what is wrong in the data, and what to do."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class NotFinite(FloatingPointError):
    """Raised when the loss is not finite; the update was not made.

    Attributes:
        loss: the loss of the update's examples.
        made: in an epoch, the updates that were made before.
    """

    made: int = 0

    def __init__(self, loss: float, text: str) -> None:
        super().__init__(text)
        self.loss = loss


def not_finite(tensor: Tensor) -> str:
    """Name the first entry that is nan or infinite, and count such entries; "" if all are finite.

    Args:
        tensor: one example per row.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all()):
        return ""
    places = (~tensor.isfinite()).nonzero()
    row, *column = places[0].tolist()
    at = f"row {row}" + (f", column {', '.join(map(str, column))}" if column else "")
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return f"{tensor[tuple(places[0])].item()} in {at}{more}"


def data_at_fault(x: Tensor, target: Tensor, loss: Module) -> str:
    """Say what is wrong with the data of an update whose loss is not finite, and the remedy; "" for nothing.

    Args:
        x: the inputs of the update.
        target: their targets.
        loss: called on (output, target).
    """
    for name, tensor in (("inputs", x), ("targets", target)):
        place = not_finite(tensor)
        if place:
            return f"The {name} hold {place}: remove such rows, or put in a value"
    if not x.numel():
        return "The update has no example: leave it out"
    ignored = getattr(loss, "ignore_index", None)
    if ignored is None or target.is_floating_point() or not bool((target == ignored).all()):
        return ""
    return (
        f"Every target of the update is {ignored} (ignore_index), and a mean over none is nan: leave out such "
        "examples, make an update of more of them, or use reduction='sum'"
    )
