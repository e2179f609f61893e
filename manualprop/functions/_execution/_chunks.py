"""For rules that are computed in chunks of rows: the size of a chunk, and the memory of its logits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import any_autocast
from manualprop.functions._execution._formula import HALF, full, watched

ROWS = 256  # the fewest rows of a chunk: with fewer, adding dW up takes longer than making it
LOGITS = 2**22  # logits of a chunk with short rows


def rows_of_a_chunk(C: int) -> int:
    """The number of rows of C logits in a chunk."""
    return max(ROWS, LOGITS // max(C, 1))


def logits_in_chunks(
    x: Tensor, W: Tensor, b: Tensor | None, rows: int, *others: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows and its x W^T + b, (n, D) (D, C) + (C,) -> (n, C), in full precision.

    Each chunk overwrites the last, unless something traces one of the tensors.  New memory would cost a page
    fault every 4 KB: a tenth of the time.
    """
    N = x.shape[0]
    room = None
    if not watched((x, W, b, *others)):
        dtype = torch.float32 if x.dtype in HALF else x.dtype
        room = x.new_empty(min(rows, N), W.shape[0], dtype=dtype)
    for begin in range(0, max(N, 1), rows):
        n = slice(begin, min(begin + rows, N))
        yield n, _logits(x[n], W, b, None if room is None else room[: n.stop - n.start])


def _logits(x: Tensor, W: Tensor, b: Tensor | None, room: Tensor | None) -> Tensor:
    if room is None or room.dtype != x.dtype:
        z = F.linear(x, W, b)
        return full(z) if room is None else room.copy_(z)
    return torch.mm(x, W.t(), out=room) if b is None else torch.addmm(b, x, W.t(), out=room)


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context in which sums are in full precision, also under autocast."""
    device = t.device.type
    if any_autocast() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
