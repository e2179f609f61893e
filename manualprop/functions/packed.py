r"""Hand-derived rule of a ReLU that keeps one bit for each element.

Symbols
    x   input               k      numbers that are 0 or 1, as bytes
    y   output              bits   the same, eight to a byte
    g   dL/dy, the gradient that arrives                  1[...]   1 where the condition holds, else 0
"""

from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import chosen, formula, indicator
from manualprop.functions._execution._bits import keep_bits, kept_bytes
from manualprop.functions._rule import Rule, flat

__all__ = ["PackedReLU"]


class PackedReLU(Rule):
    r"""$y = \max(x, 0)$; one bit per element is kept

    Derivation
        y' = 1[y /= 0]                              as :class:`ReLU`
        dL/dx = g 1[y /= 0]                         chain rule; chosen as in :class:`ReLU`
        dy = dx 1[y /= 0]                           forward mode
    Kinks
        y'(0) = 0, as in PyTorch.
    Second order
        dx does not depend on x.  The rule has a second output, without elements, which carries this zero
        derivative: x and y are not kept.
    Memory
        1[y /= 0], 1/8 byte per element; 1 byte if compiled, as in torch.  :class:`ReLU` keeps y, 4 bytes in
        float32.  That is free if the next layer keeps y anyway (a linear layer, a convolution).  It costs all
        4 bytes if not (a sum, an average pooling, a layer with frozen weights).
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        y, nothing = output
        bits = keep_bits(ctx, y.bool().view(torch.uint8))
        ctx.save_for_backward(bits, nothing)
        ctx.save_for_forward(bits, nothing)  # under vmap both save calls must list the same tensors

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> Tensor:
        bits, nothing = ctx.saved_tensors
        if g is None:  # a second derivative
            return torch.zeros_like(kept_bytes(ctx, bits), dtype=nothing.dtype)
        return flat(kept_of(g, kept_bytes(ctx, bits)), nothing)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        bits, _ = ctx.saved_tensors
        return kept_of(dx, kept_bytes(ctx, bits)), dx.new_empty(0)


@formula("g (N), k (N) -> dx like g", lift=False)
def kept_of(g: Tensor, k: Tensor) -> Tensor:
    """g where k is 1, else 0, for every g."""
    return chosen(indicator(k, g), g)
