"""Embedding with the name, signature and defaults of :mod:`torch.nn.functional`."""

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex

__all__ = ["embedding"]


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Like :func:`torch.nn.functional.embedding`, by :class:`manualprop.functions.Embedding`.

    With ``max_norm`` the selected rows of ``weight`` are first shortened in place, without gradient.

    Shape:
        ``input`` (...) indices, ``weight`` (V, D) -> (..., D)
    """
    refuse_complex("embedding", weight)
    if padding_idx is not None and not -weight.size(0) <= padding_idx < weight.size(0):
        raise AssertionError("Padding_idx must be within num_embeddings")
    if max_norm is not None:
        input = input.contiguous()
        torch.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    row = -1 if padding_idx is None else padding_idx % weight.size(0)
    output: Tensor = rules.Embedding.apply(input, weight, row, scale_grad_by_freq, sparse)
    return output
