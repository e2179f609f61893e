"""Eight yes-or-no numbers to a byte: what is kept of a mask.

Symbols
    k      numbers that are 0 or 1, as bytes          bits   the same, eight to a byte
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import transforms_active

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


def _as_integers(k: Tensor) -> Tensor:
    """Eight bytes read as one integer, or the bytes where that cannot be: in transforms, and of fake tensors."""
    whole = k.numel() > 0 and k.shape[-1] % 8 == 0 and k.storage_offset() % 8 == 0
    return k.view(torch.int64) if whole and not _watched() and type(k) is Tensor else k


def _shifts(like: Tensor) -> Tensor:
    """0 to 7, as a column."""
    return torch.arange(PLANES, dtype=like.dtype, device=like.device).view(PLANES, 1)


def _watched() -> bool:
    return transforms_active() or torch.compiler.is_compiling()
