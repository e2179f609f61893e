"""The products of a linear layer, written into existing tensors: for the tape-free step and sums over chunks.

To make a tensor or a view costs as much as a small product.  So these functions write into existing tensors,
and take views that were made once.  The letters are those of :mod:`manualprop.functions.linear`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import transforms_active, unsafe_view

FEW = 2**11  # above this many rows, pairwise summation rounds less than a product


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b, as a tensor to which an in-place activation may write.

    For more than two axes torch returns a view of the product.  Autograd refuses to write into a view that a
    Function returned.
    """
    y = F.linear(x, W, b)  # (N, I) (I, O) + (O,) -> (N, O)
    view: Tensor = unsafe_view(y, y.shape) if y._is_view() else y
    return view


def bilinear(
    product: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, c: Tensor, W: Tensor, b: Tensor | None
) -> Tensor:
    """sum_ij a_i W_oij c_j + b_o, by ATen's kernel; by ``product(a, c, W)`` under vmap, which has no rule for the kernel."""
    if not transforms_active():
        return F.bilinear(a, c, W, b)
    y = product(a, c, W)
    return y if b is None else y + b


def multiply_and_add_into(y: Tensor | None, x: Tensor, W_t: Tensor, b: Tensor) -> Tensor:
    """x W^T + b of rows, into ``y`` if given; ``b`` has the shape of y."""
    return torch.addmm(b, x, W_t, out=y)  # (N, I) (I, O) + (N, O) -> (N, O)


def input_gradient_into(dx: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """g W of rows."""
    return torch.mm(g, W, out=dx)  # (N, O) (O, I) -> (N, I)


def bias_gradient_of_few(g_t: Tensor, ones: Tensor, db: Tensor) -> Tensor:
    """sum_n g_n as a product with N ones: for small N faster than a sum."""
    return torch.mv(g_t, ones, out=db)  # (O, N) (N,) -> (O,)


# On several threads the in-place product of a large weight and few rows takes up to twice as long as a new product and
# a sum: each thread writes where another one has just read (1024 x 1024, 32 rows, two threads: 1205 us against 601).
SHARED, ROWS = 2**20, 128


def add_weight_gradient(into: Tensor, g_t: Tensor, x: Tensor, scale: float, keep: float = 1.0) -> None:
    """``into <- keep * into + scale * g^T x`` in one in-place product: g^T x itself is not stored, but see `SHARED`."""
    if into.numel() >= SHARED and len(x) <= ROWS and keep == 1 and torch.get_num_threads() > 1:
        into.add_(torch.mm(g_t, x), alpha=scale)  # (O, N) (N, I) -> (O, I)
    elif keep == 1:
        into.addmm_(g_t, x, alpha=scale)  # (O, N) (N, I) -> (O, I)
    else:
        into.addmm_(g_t, x, alpha=scale, beta=keep)
