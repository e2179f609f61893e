"""The update folded into a product, against the same update of a gradient that was made first."""

from collections import defaultdict

import pytest
import torch
from torch.nn import Parameter

from manualprop._backprop._destinations import Descend

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "shape", [(1, 64), (3, 20), (64, 1), (8, 6), (20, 8), (10, 12), (11, 30), (30, 9), (64, 64)], ids=str
)
def test_a_small_learning_rate_loses_no_example(shape: tuple[int, int], momentum: float) -> None:
    """Each example alone moves a weight by less than half a unit of its last place; all of them together do not."""
    weight = Parameter(torch.full(shape, 0.3))
    start, half_a_unit, rows = weight.detach().double(), 2.0**-26, 512
    hyperparameters = {"lr": half_a_unit / 2, "momentum": momentum, "weight_decay": 0.0, "dampening": 0.0}
    descend = Descend(weight, hyperparameters | {"nesterov": False, "maximize": False}, defaultdict(dict))
    for _ in range(2):  # the first step of a momentum makes its buffer, the second one uses it
        weight.data.fill_(0.3)
        descend.take_weight(torch.ones(shape[0], rows), torch.ones(rows, shape[1]))
    moved = (start - weight.detach().double()) / (half_a_unit / 2 * rows)
    expected = 1.0 + momentum
    # The weight moves by 128 units of its last place, and is rounded to one: hence 1 %.
    torch.testing.assert_close(moved, torch.full(shape, expected, dtype=torch.float64), rtol=1e-2, atol=0)
