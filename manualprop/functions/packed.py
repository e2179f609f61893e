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
from manualprop.functions._kernels import by_parts
from manualprop.functions._rule import Rule, flat, plain_eager, times, transforms_active

# Byte i of a 64-bit integer is 0 or 1.  Times GATHER, bit i of them all stands in the highest byte; a byte times
# SPREAD stands in every byte of the integer, where SELECT leaves bit i of byte i.  That is at most 128, and with
# CARRY = 127 added it is at least 128 unless it was 0: the highest bit of each byte tells.
GATHER, SPREAD, SELECT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - 2**64
CARRY = 0x7F7F7F7F7F7F7F7F


def pack(k: Tensor) -> Tensor:
    """The elements of ``k``, bytes that are 0 or 1, eight to a byte, in the order of their indices."""
    k = k.reshape(-1)
    if k.numel() % 8:
        k = F.pad(k, (0, -k.numel() % 8))
    if _as_integers(k):
        return (k.view(torch.int64) * GATHER).bitwise_right_shift_(56).to(torch.uint8)
    return (k.view(k.numel() // 8, 8) * _powers(k)).sum(1, dtype=torch.uint8)  # (n, 8) (8,) -> (n,)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`pack` packed."""
    if _as_integers(bits):
        spread = (bits.to(torch.int64) * SPREAD).bitwise_and_(SELECT)
        k = spread.add_(CARRY).bitwise_right_shift_(7).bitwise_and_(SPREAD).view(torch.uint8)
    else:
        powers = bits.unsqueeze(1) & _powers(bits)  # (n, 1) (8,) -> (n, 8)
        k = powers.ne(0).to(torch.uint8).view(bits.numel() * 8)
    return k[: shape.numel()].view(shape)


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
    return times(factor if q == 1 else factor.div_(q), x)


def _as_integers(t: Tensor) -> bool:
    """Whether eight bytes may be read as one integer: neither transforms nor fake tensors can."""
    return plain_eager() and type(t) is Tensor and t.storage_offset() % 8 == 0


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


class PackedReLU(Rule):
    r"""$y = \max(x, 0)$, of which one bit per element is kept

    Derivation
        y' = 1[y /= 0]                              as :class:`ReLU`
        dL/dx = g 1[y /= 0]                         chain rule
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
        bits = keep_bits(ctx, y.bool())  # y.ne(0) takes six times as long
        ctx.save_for_backward(bits, nothing)
        ctx.save_for_forward(bits, nothing)  # as many as for backward: vmap asks for one list of axes

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        bits, nothing = ctx.saved_tensors
        return flat(scaled(g, kept_bytes(ctx, bits)), nothing)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        bits, _ = ctx.saved_tensors
        return scaled(dx, kept_bytes(ctx, bits)), dx.new_empty(0)
