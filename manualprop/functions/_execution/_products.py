"""The products of a linear layer for those who have somewhere to write them: the step without a tape, sums over chunks.

Making a tensor or a view takes as long as a small product, so these write into tensors that are there, from views that
were made once.  The letters are those of :mod:`manualprop.functions.linear`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import unsafe_view

FEW = 2**11  # above this many rows, pairwise summation rounds less than a product


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b, which an in-place activation may write to.

    Of more than two axes torch returns a view of the product, and the view of a Function refuses that.
    """
    y = F.linear(x, W, b)  # (N, I) (I, O) + (O,) -> (N, O)
    view: Tensor = unsafe_view(y, y.shape) if y._is_view() else y
    return view


def multiply_and_add_into(y: Tensor | None, x: Tensor, W_t: Tensor, b: Tensor) -> Tensor:
    """x W^T + b of rows, into ``y`` if it is given; ``b`` is as wide as y."""
    return torch.addmm(b, x, W_t, out=y)  # (N, I) (I, O) + (N, O) -> (N, O)


def input_gradient_into(dx: Tensor, g: Tensor, W: Tensor) -> Tensor:
    """g W of rows."""
    return torch.mm(g, W, out=dx)  # (N, O) (O, I) -> (N, I)


def bias_gradient_of_few(g_t: Tensor, ones: Tensor, db: Tensor) -> Tensor:
    """sum_n g_n as a product with N ones: quicker than a sum where N is small."""
    return torch.mv(g_t, ones, out=db)  # (O, N) (N,) -> (O,)


def add_weight_gradient(into: Tensor, g_t: Tensor, x: Tensor, scale: float, keep: float = 1.0) -> None:
    """``into <- keep * into + scale * g^T x``, one product in place: g^T x itself is never stored."""
    if keep == 1:
        into.addmm_(g_t, x, alpha=scale)  # (O, N) (N, I) -> (O, I)
    else:
        into.addmm_(g_t, x, alpha=scale, beta=keep)
