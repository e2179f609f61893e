r"""Eight yes-or-no numbers to a byte, and the rule of a ReLU that keeps no more than these.

Symbols
    x   input               k      numbers that are 0 or 1, as bytes
    y   output              bits   the same, eight to a byte
    g   dL/dy, the gradient that arrives                  1[...]   1 where the condition holds, else 0
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop.functions import _kernels
from manualprop.functions._elementwise import BITS, chosen
from manualprop.functions._kernels import by_parts
from manualprop.functions._rule import Rule, flat, plain_eager, times, transforms_active

# Eight planes of equal length, one after the other: bit i of byte j is number j of plane i.  So a whole plane is
# shifted at once, eight bytes of it as one integer: they are 0 or 1, and a shift by up to 7 stays in its byte.
PLANES = 8
LOWEST = 0x0101010101010101  # the lowest bit of each of eight bytes


def pack(k: Tensor) -> Tensor:
    """The elements of ``k``, bytes that are 0 or 1, eight to a byte."""
    k = k.reshape(-1)
    if k.numel() % PLANES:
        k = F.pad(k, (0, -k.numel() % PLANES))
    planes = _as_integers(k.view(PLANES, k.numel() // PLANES))
    return (planes << _shifts(planes)).sum(0, dtype=planes.dtype).view(torch.uint8)  # (8, n) -> (n,)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`pack` packed."""
    integers = _as_integers(bits)
    planes = integers >> _shifts(integers)  # (n,) (8, 1) -> (8, n)
    planes &= LOWEST if planes.dtype == torch.int64 else 1
    return planes.view(torch.uint8).view(PLANES * bits.numel())[: shape.numel()].view(shape)


def keep_bits(ctx: Any, k: Tensor) -> Tensor:
    """``k`` packed in the order in which it is stored; its shape and this order go into the context.

    As it is where the compiler watches: its kernels read one byte per element as they go, where bits would be
    gathered from eight of them and spread over eight in kernels of their own.
    """
    ctx.packed = not torch.compiler.is_compiling()
    if not ctx.packed:
        return k
    ctx.channels_last = (
        k.dim() == 4 and not transforms_active() and k.is_contiguous(memory_format=torch.channels_last)
    )
    k = k.permute(0, 2, 3, 1) if ctx.channels_last else k
    ctx.k_shape = k.shape
    return pack(k)


def kept_bytes(ctx: Any, bits: Tensor) -> Tensor:
    """What :func:`keep_bits` kept."""
    if not ctx.packed:
        return bits
    k = unpack(bits, ctx.k_shape)
    return k.permute(0, 3, 1, 2) if ctx.channels_last else k


def kept(ctx: Any, bits: Tensor, dtype: torch.dtype, q: float = 1.0) -> Tensor:
    """1 / q where the bit is set, else 0: a fresh tensor."""
    return kept_bytes(ctx, bits).to(dtype).div_(q)


def scaled(x: Tensor, k: Tensor, q: float = 1.0) -> Tensor:
    """x k / q, a fresh tensor; ``k`` are bytes and may broadcast."""
    if k.shape != x.shape:
        return x * k.to(x.dtype).div_(q)
    if torch.is_grad_enabled() or x.numel() < _kernels.SMALLEST:
        return _scaled(k, x, q)
    return by_parts(_scaled, (q,), k, x)


def _scaled(k: Tensor, x: Tensor, q: float, out: Tensor | None = None) -> Tensor:
    factor = k.to(x.dtype) if out is None else out.copy_(k)
    return times(factor.div_(q), x)


def chosen_by_bytes(k: Tensor, g: Tensor) -> Tensor:
    """``g`` where the bytes ``k`` are 1, else 0, whatever g is there: as :func:`chosen`."""
    if torch.is_grad_enabled() or g.numel() < _kernels.SMALLEST:
        return _chosen_by_bytes(k, g)
    return by_parts(_chosen_by_bytes, (), k, g)


def _chosen_by_bytes(k: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # inductor compares bytes one by one, but makes integers of a whole vector of them.
        return (k.to(BITS[g.itemsize]) * g.view(BITS[g.itemsize])).view(g.dtype)
    if torch.is_grad_enabled() or not (g.is_cpu and type(g) is Tensor and plain_eager()):
        return g.masked_fill(k == 0, 0)
    k = k.to(BITS[g.itemsize]) if out is None else out.view(BITS[g.itemsize]).copy_(k)
    return chosen(g, k, out)


def _as_integers(k: Tensor) -> Tensor:
    """Eight bytes read as one integer, or the bytes where that cannot be: in transforms, and of fake tensors."""
    whole = k.numel() > 0 and k.shape[-1] % 8 == 0 and k.storage_offset() % 8 == 0
    return k.view(torch.int64) if whole and plain_eager() and type(k) is Tensor else k


def _shifts(like: Tensor) -> Tensor:
    """0 to 7, as a column."""
    return torch.arange(PLANES, dtype=like.dtype, device=like.device).view(PLANES, 1)


class PackedReLU(Rule):
    r"""$y = \max(x, 0)$, of which one bit per element is kept

    Derivation
        y' = 1[y /= 0]                              as :class:`ReLU`
        dL/dx = g 1[y /= 0]                         chain rule; chosen, as in :class:`ReLU`, not multiplied
        dy = dx 1[y /= 0]                           forward mode
    Kinks
        y'(0) = 0, as in PyTorch.
    Second order
        dx does not change with x.  Its zeros hang on an output of no elements: nothing of x or y is kept.
    Memory
        1[y /= 0], 1/8 byte per element; compiled 1 byte, as torch.  :class:`ReLU` keeps y, 4 bytes in float32, which costs nothing where the
        next layer keeps it anyway (a linear layer, a convolution), and all of them where it does not (a sum, a
        pooling by the mean, a layer whose weights are frozen).
    Accuracy
        Exact.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        y, nothing = output
        bits = keep_bits(ctx, y.bool().view(torch.uint8))  # y.ne(0) takes six times as long
        ctx.save_for_backward(bits, nothing)
        ctx.save_for_forward(bits, nothing)  # as many as for backward: vmap asks for one list of axes

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> Tensor:
        bits, nothing = ctx.saved_tensors
        if g is None:  # a second derivative
            return torch.zeros_like(kept_bytes(ctx, bits), dtype=nothing.dtype)
        return flat(chosen_by_bytes(kept_bytes(ctx, bits), g), nothing)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        bits, _ = ctx.saved_tensors
        return chosen_by_bytes(kept_bytes(ctx, bits), dx), dx.new_empty(0)
