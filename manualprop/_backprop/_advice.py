"""Why a loss is not finite: what the data say, and what to do about them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class NotFinite(FloatingPointError):
    """Of an update that was not made.

    Attributes:
        loss: of its examples.
    """

    def __init__(self, loss: float, text: str) -> None:
        super().__init__(text)
        self.loss = loss


def not_finite(tensor: Tensor) -> str:
    """Return which entry is the first that is nan or infinite, and how many there are; "" where all are finite.

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
    """Return what is wrong with the data of an update whose loss is not finite, and the remedy; "" for nothing.

    Args:
        x: inputs of the update.
        target: theirs.
        loss: called on (output, target).
    """
    for name, tensor in (("inputs", x), ("targets", target)):
        place = not_finite(tensor)
        if place:
            return f"The {name} hold {place}: remove such rows, or put in a value"
    ignored = getattr(loss, "ignore_index", None)
    if ignored is None or target.is_floating_point() or not bool((target == ignored).all()):
        return ""
    return (
        f"Every target of the update is {ignored} (ignore_index), and a mean over none is nan: leave out such "
        "examples, make an update of more of them, or use reduction='sum'"
    )
