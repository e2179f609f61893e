"""The update folded into a product, against the same update of a gradient that was made first."""

import gc
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from manualprop._backprop import _descend_op
from manualprop._backprop._descend_op import Updates
from manualprop._backprop._destinations import Descend

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(1, 64), (3, 20), (64, 1), (8, 6), (20, 8), (10, 12), (64, 64)], ids=str)
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


def update(weight: Parameter) -> tuple[Updates, list[Tensor]]:
    """Two rows of ones as the factors of the weight's gradient, and the update that takes them."""
    hyperparameters = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    factors = [torch.ones(weight.shape[0], 2), torch.ones(2, weight.shape[1])]
    return Updates({weight: Descend(weight, hyperparameters, defaultdict(dict))}), factors


@pytest.mark.parametrize("loss", [1.0, torch.inf, torch.nan])
def test_the_operation_of_a_graph_updates_where_the_loss_is_finite(loss: float) -> None:
    weight = Parameter(torch.zeros(3, 4))
    updates, factors = update(weight)
    updates.record(factors, ["take_weight"], torch.tensor(loss))
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), -0.2 if loss == 1 else 0.0))


def test_the_operation_of_a_graph_refuses_copies_of_the_weights() -> None:
    weight = Parameter(torch.zeros(3, 4))
    updates, factors = update(weight)
    with pytest.raises(RuntimeError, match="must change the weights where they are"):
        torch.ops.manualprop.descend(
            [weight.detach().clone()], factors, torch.tensor(1.0), updates.number, ["take_weight"]
        )
    assert not weight.any()


def test_a_graph_keeps_nothing_of_a_step_that_is_gone() -> None:
    number = update(Parameter(torch.zeros(3, 4)))[0].number
    gc.collect()
    assert number not in _descend_op._known
