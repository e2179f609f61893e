r"""Hand-derived rule of the embedding.

Shape legend
    N   number of indices: any number of axes, flattened where a sum over them is taken
    V   num_embeddings        D   embedding_dim
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._rule import Rule, in_full_precision, plain_eager


class Embedding(Rule):
    r"""$y_n = W_{i_n}$, the rows of $W$ chosen by the indices $i$

    Derivation
        y_nd = sum_v 1[i_n = v] W_vd                               a product with one-hot rows
        dL/dW_vd = sum_n 1[i_n = v] g_nd                           onehot(i)^T g: each g_n is added to row i_n
        dy_n = dW_{i_n}                                            forward mode: y is linear in W
    Options
        padding_idx           its row gets no gradient, by definition: 1[i_n = v] is 0 there
        scale_grad_by_freq    by definition g_nd / (how often i_n occurs), so that row v gets the mean of its g
        sparse                dL/dW as a sparse tensor: the pairs (i_n, g_n) themselves
        In reverse only: the tangent is that of y as it is.  Where these are used the gradient is not that of y.
    Second order
        dW is linear in g, and a function of nothing else: autograd differentiates the sum as written.
    Shape
        i (N), W (V, D) -> y (N, D)
    Memory
        i.
    Accuracy
        A sum of as many terms as an index occurs, in float32 for half precision.
    """

    @staticmethod
    def forward(i: Tensor, W: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool) -> Tensor:
        return torch.embedding(W, i, padding_idx, scale_grad_by_freq, sparse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        i, W, *ctx.options = inputs
        ctx.V, ctx.D = W.shape
        ctx.save_for_backward(i)
        ctx.save_for_forward(i)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (i,) = ctx.saved_tensors
        padding_idx, scale_grad_by_freq, sparse = ctx.options
        i, rows = i.reshape(-1), g.reshape(-1, ctx.D)  # (N,), (N, D)
        if scale_grad_by_freq:
            rows = rows / frequency(i, ctx.V, rows).unsqueeze(1)
        if sparse:
            dW = sparse_rows(i, rows, ctx.V, padding_idx)
        else:
            if padding_idx >= 0:
                rows = rows.masked_fill(i.eq(padding_idx).unsqueeze(1), 0)
            dW = sum_by_index(i, in_full_precision(rows), ctx.V).to(g.dtype)  # (V, N) (N, D) -> (V, D)
        return None, dW, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, dW: Tensor, *options: None) -> Tensor:
        (i,) = ctx.saved_tensors
        return torch.embedding(dW, i)


def sum_by_index(i: Tensor, rows: Tensor, V: int) -> Tensor:
    """onehot(i)^T rows."""
    zeros = rows.new_zeros(V, *rows.shape[1:])
    if plain_eager() and not is_legacy_batchedtensor(rows):
        return zeros.index_add_(0, i, rows)
    return zeros.index_add(0, i, rows)


def frequency(i: Tensor, V: int, rows: Tensor) -> Tensor:
    """How often each index occurs among the indices."""
    ones = torch.ones_like(i, dtype=in_full_precision(rows.detach()).dtype)
    return sum_by_index(i, ones, V).index_select(0, i).to(rows.dtype)


def sparse_rows(i: Tensor, rows: Tensor, V: int, padding_idx: int) -> Tensor:
    """The rows at their indices, not yet added up, as torch has it."""
    if padding_idx >= 0:
        kept = i.ne(padding_idx)
        i, rows = i[kept], rows[kept]
    return torch.sparse_coo_tensor(i.unsqueeze(0), rows, (V, rows.shape[1]), check_invariants=False)
