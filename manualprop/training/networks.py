"""Networks built from the hand-derived layers."""

from __future__ import annotations

import importlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from manualprop import nn as hand


class MultilayerPerceptron(nn.Sequential):
    """Linear layers with an activation between them: initialise, multiply by weights and add biases, activate, repeat.

    Args:
        sizes: features of the input, of every hidden layer, and of the output; two or more positive integers.
        activation: a class of manualprop.nn by name ("Tanh"), or any module by its class path ("torch.nn.Tanh").
        dropout: probability of dropping a hidden unit during training, at least 0 and below 1.

    Shape:
        (N, sizes[0]) -> (N, sizes[-1])

    Raises:
        ValueError: for sizes, an activation or a dropout out of their range.
    """

    def __init__(
        self, sizes: Sequence[int] = (64, 64, 10), activation: str = "Tanh", dropout: float = 0.0
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                f"MultilayerPerceptron: sizes must be two or more positive integers. Got sizes={list(sizes)}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                f"MultilayerPerceptron: dropout must be at least 0 and below 1. Got dropout={dropout}."
            )
        activate = _activation_class(activation)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for depth, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
            layers[f"linear{depth}"] = hand.Linear(inputs, outputs)
            if depth < len(sizes) - 1:
                layers[f"activation{depth}"] = activate()
                if dropout > 0:
                    layers[f"dropout{depth}"] = nn.Dropout(dropout)
        super().__init__(layers)


def _activation_class(name: str) -> type[nn.Module]:
    path, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path or "manualprop.nn"), class_name)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            "MultilayerPerceptron: activation must be a class of manualprop.nn, such as 'Tanh', 'ReLU' or 'GELU', or "
            f"the class path of a module. Got activation={name!r}."
        )
    return found
