"""Masks are kept packed, eight elements to a byte.

Symbols
    k      numbers that are 0 or 1, as bytes          bits   the same, eight to a byte
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import transforms_active

# Eight planes of equal length, one after the other: bit i of byte j is number j of plane i.  A whole plane is
# shifted at once, eight bytes as one integer: each byte is 0 or 1, so a shift by up to 7 stays in its byte.
PLANES = 8
LOWEST = 0x0101010101010101  # the lowest bit of each of eight bytes


def pack(k: Tensor) -> Tensor:
    """Pack ``k``, whose bytes are 0 or 1, eight elements to a byte."""
    k = k.reshape(-1)
    if k.numel() % PLANES:
        k = F.pad(k, (0, -k.numel() % PLANES))
    planes = _as_integers(k.view(PLANES, k.numel() // PLANES))
    return (planes << _shifts(planes)).sum(0, dtype=planes.dtype).view(torch.uint8)  # (8, n) -> (n,)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack`."""
    integers = _as_integers(bits)
    planes = integers >> _shifts(integers)  # (n,) (8, 1) -> (8, n)
    planes &= LOWEST if planes.dtype == torch.int64 else 1
    return planes.view(torch.uint8).view(PLANES * bits.numel())[: shape.numel()].view(shape)


def keep_bits(ctx: Any, k: Tensor) -> Tensor:
    """``k`` packed in memory order; the context keeps its shape and this order.

    Under the compiler ``k`` stays as bytes: compiled kernels read a byte on the way, while packing and
    unpacking would be extra kernels.
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
    """The mask that :func:`keep_bits` kept."""
    if not ctx.packed:
        return bits
    k = unpack(bits, ctx.k_shape)
    return k.permute(0, 3, 1, 2) if ctx.channels_last else k


def _as_integers(k: Tensor) -> Tensor:
    """Eight bytes as one integer; the bytes themselves in transforms, for fake tensors and odd lengths."""
    whole = k.numel() > 0 and k.shape[-1] % 8 == 0 and k.storage_offset() % 8 == 0
    return k.view(torch.int64) if whole and not _watched() and type(k) is Tensor else k


def _shifts(like: Tensor) -> Tensor:
    """0 to 7, as a column."""
    return torch.arange(PLANES, dtype=like.dtype, device=like.device).view(PLANES, 1)


def _watched() -> bool:
    return transforms_active() or torch.compiler.is_compiling()
