"""Rows of the losses."""

import torch
from torch import Tensor

from cases._case import Case, real


def classes(*shape: int, high: int = 4) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def weights(count: int = 4) -> Tensor:
    return torch.linspace(0.3, 1.9, count, dtype=torch.float64)


def ignoring(t: Tensor, index: int) -> Tensor:
    return t.index_fill(0, torch.tensor([1]), index)


CASES = []
for reduction in ("none", "sum", "mean"):
    CASES += [
        Case(
            "mse_loss",
            lambda: (real(3, 4), real(3, 4, seed=1)),
            {"reduction": reduction},
            keeps=(0, 1),
        ),
        Case(
            "mse_loss",
            lambda: (real(3, 4), real(3, 4, seed=1)),
            {"reduction": reduction, "weight": weights(12).reshape(3, 4)},
            keeps=(0, 1),
            keeps_new=12 * 8 + 8,
        ),
        Case(
            "cross_entropy",
            lambda: (real(5, 4), classes(5)),
            {"reduction": reduction},
            keeps=(0, 1),
            keeps_new=8,
        ),
        Case(
            "cross_entropy",
            lambda: (real(5, 4), ignoring(classes(5), -100)),
            {"reduction": reduction, "weight": weights()},
            keeps=(0, 1),
            keeps_new=4 * 8 + 8,
            label="ignored",
        ),
        Case(
            "cross_entropy",
            lambda: (real(5, 4), ignoring(classes(5), 2)),
            {"reduction": reduction, "weight": weights(), "label_smoothing": 0.2, "ignore_index": 2},
            keeps=(0, 1),
            keeps_new=4 * 8 + 8,
        ),
        Case(
            "cross_entropy",
            lambda: (real(2, 4, 3), classes(2, 3)),
            {"reduction": reduction, "label_smoothing": 0.1},
            keeps=(0, 1),
            keeps_new=8,
            label="K-dimensional",
        ),
        Case(
            "cross_entropy",
            lambda: (real(4), classes()),
            {"reduction": reduction},
            keeps=(0, 1),
            keeps_new=8,
            label="one example",
        ),
        Case(
            "cross_entropy",
            lambda: (real(3, 4), real(3, 4, low=0.1, high=0.6, seed=1)),
            {"reduction": reduction, "weight": weights(), "label_smoothing": 0.1},
            keeps=(0,),
            keeps_new=3 * 4 * 8 + 4 * 8,
            label="probabilities",
        ),
        Case(
            "cross_entropy",
            lambda: (real(2, 4, 3), real(2, 4, 3, low=0.1, high=0.6, seed=1)),
            {"reduction": reduction},
            keeps=(0, 1),
            label="K-dimensional probabilities",
        ),
    ]
