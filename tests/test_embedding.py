"""What the table can not say of the embedding: rows shortened in place, sparse gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from torch import Tensor

from manualprop import functional as F

pytestmark = pytest.mark.quick

WORDS = torch.tensor([[1, 4, 1, 0], [2, 2, 1, 5]])


def table() -> Tensor:
    return torch.linspace(-2, 3, 18, dtype=torch.float64).reshape(6, 3).requires_grad_()


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_shortens_the_rows_that_are_looked_up(norm_type: float) -> None:
    ours, torchs = table(), table()
    y = F.embedding(WORDS, ours, max_norm=1.5, norm_type=norm_type)
    assert torch.equal(y, torch_F.embedding(WORDS, torchs, max_norm=1.5, norm_type=norm_type))
    assert torch.equal(ours, torchs) and not torch.equal(ours, table())
    (dW,) = torch.autograd.grad(y.sum(), ours)
    assert dW[:, 0].tolist() == [1, 3, 2, 0, 1, 1]


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"padding_idx": -2, "max_norm": 1.0}])
def test_sparse_gradient_is_torchs(options: dict[str, Any]) -> None:
    """Index for index, also where no index is left."""
    for words in (WORDS, torch.full((2,), 1), torch.zeros(0, dtype=torch.int64)):
        found = []
        for function in (F.embedding, torch_F.embedding):
            W = table()
            y = function(words, W, sparse=True, **options)
            (dW,) = torch.autograd.grad(y, W, torch.arange(1.0, y.numel() + 1).reshape(y.shape).double())
            found.append(dW)
        ours, torchs = found
        assert ours.is_sparse and torch.equal(ours._indices(), torchs._indices())
        assert torch.equal(ours._values(), torchs._values()) and ours.shape == torchs.shape


def test_a_sparse_step_of_sgd() -> None:
    W = torch.nn.Parameter(table().detach())
    F.embedding(WORDS, W, sparse=True).sum().backward()
    torch.optim.SparseAdam([W], lr=0.1).step()
    assert (W.detach() != table().detach()).any(1).tolist() == [True, True, True, False, True, True]


def test_misuse_is_torchs() -> None:
    for function in (F.embedding, torch_F.embedding):
        with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
            function(WORDS, table(), padding_idx=6)
        with pytest.raises(IndexError, match="index out of range"):
            function(WORDS + 3, table())
