"""The diagnosis of ``explain`` sees what is planted, and leaves healthy networks in peace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from test_explain import MINI, T, X, example, network
from torch import Tensor
from torch import nn as torch_nn

import manualprop
from manualprop import nn
from manualprop.descent import Batch, Descent, MiniBatch

Made = Callable[[], torch_nn.Module]


def saturated() -> torch_nn.Module:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(60)
    return model


def dead() -> torch_nn.Module:
    model = network(nn.ReLU)
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    return model


def deep(scale: float, activation: type[torch_nn.Module] = nn.Sigmoid) -> torch_nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(7) for layer in (nn.Linear(5, 5), activation())]
    model = nn.Sequential(*layers, nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def zeros() -> torch_nn.Module:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def silent() -> torch_nn.Module:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return model


def constant() -> torch_nn.Module:
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
    return model


IGNORED = torch.full((40,), -100)
RARE = torch.cat([torch.zeros(38, dtype=torch.long), torch.tensor([1, 2])])
HUGE, TINY = MiniBatch(batch_size=40, learning_rate=30.0), MiniBatch(batch_size=40, learning_rate=1e-7)
UNEVEN = X * torch.tensor([1.0, 1.0, 1.0, 1.0, 4000.0])

PLANTED: dict[str, tuple[Made, Tensor, Tensor, Descent, str, str, str]] = {
    "healthy": (network, X, T, MINI, "", "", ""),
    "vanishing": (lambda: deep(1.0), X, T, MINI, "the gradients vanish", "12", "it begins at 12"),
    "exploding": (lambda: deep(6.0, nn.Identity), X, T, MINI, "the gradients explode", "10", "times that at 14"),
    "dead": (dead, X, T, MINI, "units are dead", "1", "67 % of the units are 0 in all 40 examples"),
    "saturated": (saturated, X, T, MINI, "units are saturated", "1", "% of the numbers"),
    "ignored": (network, X, IGNORED, MINI, "the loss cannot fall: all targets are ignored", "data", "40 targets is -100"),
    "constant": (constant, X, T, MINI, "the loss cannot fall below that of a constant", "output", "all 40 rows"),
    "no gradient": (silent, X, T, MINI, "the loss cannot fall: every gradient is 0", "loss", "exactly 0"),
    "too large": (network, X, T, HUGE, "the update is much too large", "0.weight", "2.weight"),
    "too small": (network, X, T, TINY, "the update is much too small", "0.weight", "2.weight"),
    "unscaled": (network, X * 100 + 7, T, MINI, "the inputs are not scaled", "data", "spread"),
    "uneven": (network, UNEVEN, T, MINI, "the inputs are not scaled", "data", "of the columns goes from"),
    "imbalance": (network, X, RARE, MINI, "the classes are not balanced", "data", "class 0 has 38 of 40 examples"),
    "symmetry": (zeros, X, T, MINI, "the units are copies of each other", "0", "are 0"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_the_diagnosis_sees_what_is_planted(planted: str) -> None:
    make, x, target, descent, name, where, evidence = PLANTED[planted]
    found = manualprop.explain(make(), nn.CrossEntropyLoss(), x[: len(target)], target, descent, updates=0)
    if not name:
        assert found.findings == ()
        return
    told = {finding.name.partition(":")[0]: finding for finding in found.findings}
    finding = next((f for f in found.findings if f.name.startswith(name)), None)
    assert finding is not None, told
    assert finding.where == where and finding.helps
    assert evidence in finding.evidence


@pytest.mark.parametrize("kind", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_healthy_networks_are_left_in_peace(kind: type[torch_nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), kind(), nn.Linear(20, 20), kind(), nn.Linear(20, 3)).double()
    assert manualprop.explain(model, nn.CrossEntropyLoss(), X, T, MINI, updates=0).findings == ()


def test_a_loss_that_is_not_finite_is_told() -> None:
    x, target = example()
    x[3, 1] = math.nan
    found = manualprop.explain(
        network(), nn.CrossEntropyLoss(), x, target, Batch(learning_rate=0.1), updates=5
    )
    assert (
        found.findings[0].name == "the loss is not finite"
        and "nan in row 3, column 1" in found.findings[0].helps
    )
    assert found.recording.stopped and len(found.recording.frames) == 1
    assert json.loads(found.to_json())["loss"]["value"] is None
    assert "nan" in str(found)
