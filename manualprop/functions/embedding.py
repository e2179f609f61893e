r"""Hand-derived rule of the embedding.

Shape legend
    N   number of indices: any number of axes, flattened for a sum over them
    V   num_embeddings        D   embedding_dim
"""

from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import full
from manualprop.functions._rule import Rule

__all__ = ["Embedding"]


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
        The first two change only the gradient, which is then not the derivative of y.  The tangent stays
        exact.
    Second order
        dW is linear in g and depends on nothing else: autograd differentiates the sum as written.
    Shape
        i (N), W (V, D) -> y (N, D)
    Memory
        i.
    Accuracy
        Each row is a sum with one term for each occurrence of its index; half precision is summed in float32.
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
        i, g = i.reshape(-1), g.reshape(-1, ctx.D)  # (N,), (N, D)
        if scale_grad_by_freq:
            g = g / frequency(i, g, ctx.V)
        if sparse:
            dW = sparse_rows(i, g, ctx.V, padding_idx)
        else:
            if padding_idx >= 0:
                g = g.masked_fill(i.eq(padding_idx).unsqueeze(1), 0)
            dW = sum_by_index(g, i, ctx.V).to(g.dtype)
        return None, dW, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, dW: Tensor, *options: None) -> Tensor:
        (i,) = ctx.saved_tensors
        return torch.embedding(dW, i)


def sum_by_index(g: Tensor, i: Tensor, V: int) -> Tensor:
    """onehot(i)^T g, in full precision."""
    g = full(g)
    return g.new_zeros(V, *g.shape[1:]).index_add(0, i, g)  # (V, N) (N, D) -> (V, D)


def frequency(i: Tensor, g: Tensor, V: int) -> Tensor:
    """For each index, how often it occurs; as a column."""
    count = sum_by_index(torch.ones_like(i, dtype=torch.float32), i, V)
    return count.index_select(0, i).unsqueeze(1).to(g.dtype)


def sparse_rows(i: Tensor, rows: Tensor, V: int, padding_idx: int) -> Tensor:
    """The rows at their indices; equal indices are not summed yet, as in torch."""
    if padding_idx >= 0:
        kept = i.ne(padding_idx)
        i, rows = i[kept], rows[kept]
    return torch.sparse_coo_tensor(i.unsqueeze(0), rows, (V, rows.shape[1]), check_invariants=False)
