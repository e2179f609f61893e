"""Padding with the name, signature and defaults of :mod:`torch.nn.functional`."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as torch_F

from manualprop import functions as rules
from manualprop.functions.linear_map import LinearMap, mapped

__all__ = ["pad"]

MODES: Mapping[str, type[LinearMap]] = {
    "reflect": rules.ReflectionPad,
    "replicate": rules.ReplicationPad,
    "circular": rules.CircularPad,
}


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """Like :func:`torch.nn.functional.pad`, by the rule of the mode.

    Args:
        pad: how many elements to add before and after the last axis, then the axis before it, ...; a
            negative number cuts elements off.
        mode: ``"constant"`` (:class:`manualprop.functions.ConstantPad`), ``"reflect"``
            (:class:`manualprop.functions.ReflectionPad`), ``"replicate"``
            (:class:`manualprop.functions.ReplicationPad`) or ``"circular"``
            (:class:`manualprop.functions.CircularPad`).
        value: the constant that is added; only for ``"constant"``.

    Raises:
        NotImplementedError: for an unknown mode, or more axes than the mode pads.
        RuntimeError: if ``pad`` does not fit the input, or ``value`` not the mode.
    """
    widths = tuple(pad)
    if mode == "circular" and input.dim() - len(widths) / 2 in (1, 2):
        _refuse_more_than_a_circle(input, widths)
    if mode == "constant":
        return mapped(rules.ConstantPad, input, widths, value)
    if mode not in MODES or value not in (None, 0):
        return torch_F.pad(input, list(pad), mode, value)  # which raises
    return mapped(MODES[mode], input, widths)


def _refuse_more_than_a_circle(input: Tensor, pad: tuple[int, ...]) -> None:
    """Raise where an axis is cut to fewer elements than are added: torch's output then has elements that nothing wrote."""
    for n, a, b in zip(reversed(input.shape), pad[::2], pad[1::2], strict=False):
        left = n + min(a, 0) + min(b, 0)
        if min(a, b) < 0 <= left < max(a, b):
            raise RuntimeError(
                f"pad: circular padding must add at most the elements that are left after the cut. Got {(a, b)} "
                f"for {n} elements. Cut first, then pad by less."
            )
