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
        _check_dropout("MultilayerPerceptron", dropout)
        activate = _activation_class("MultilayerPerceptron", activation)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for depth, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
            layers[f"linear{depth}"] = hand.Linear(inputs, outputs)
            if depth < len(sizes) - 1:
                layers[f"activation{depth}"] = activate()
                if dropout > 0:
                    layers[f"dropout{depth}"] = nn.Dropout(dropout)
        super().__init__(layers)


class ConvolutionalNetwork(nn.Sequential):
    """Convolutions of 3 x 3, each with batch normalisation, an activation and a pool that halves the image; then Linear.

    Args:
        channels: of the image, and of the output of every convolution; two or more positive integers.
        classes: features of the output, at least 1.
        image: height and width of the input, each at least 2 to the power of the number of convolutions.
        activation: a class of manualprop.nn by name ("ReLU"), or any module by its class path ("torch.nn.ReLU").
        dropout: probability of dropping an input of Linear during training, at least 0 and below 1.

    Shape:
        (N, channels[0] * height * width), the pixels of an image in a row, -> (N, classes)

    Raises:
        ValueError: for channels, classes, an image, an activation or a dropout out of their range.
    """

    def __init__(
        self,
        channels: Sequence[int] = (1, 32, 64),
        classes: int = 10,
        image: tuple[int, int] = (8, 8),
        activation: str = "ReLU",
        dropout: float = 0.0,
    ) -> None:
        _check_sizes(channels, classes, image)
        _check_dropout("ConvolutionalNetwork", dropout)
        activate = _activation_class("ConvolutionalNetwork", activation)
        layers: OrderedDict[str, nn.Module] = OrderedDict(image=hand.Unflatten(1, (channels[0], *image)))
        for depth, (inputs, outputs) in enumerate(itertools.pairwise(channels), start=1):
            layers[f"convolution{depth}"] = hand.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers[f"norm{depth}"] = hand.BatchNorm2d(outputs)
            layers[f"activation{depth}"] = activate()
            layers[f"pool{depth}"] = hand.MaxPool2d(2)
        layers["flatten"] = hand.Flatten()
        if dropout > 0:
            layers["dropout"] = hand.Dropout(dropout)
        height, width = (side >> len(channels) - 1 for side in image)
        layers["linear"] = hand.Linear(channels[-1] * height * width, classes)
        super().__init__(layers)


def _check_sizes(channels: Sequence[int], classes: int, image: tuple[int, int]) -> None:
    if len(channels) < 2 or min(channels) < 1 or classes < 1:
        raise ValueError(
            "ConvolutionalNetwork: channels must be two or more positive integers, and classes one. Got "
            f"channels={list(channels)}, classes={classes}."
        )
    smallest = 2 ** (len(channels) - 1)
    if min(image) < smallest:
        raise ValueError(
            f"ConvolutionalNetwork: an image must be at least {smallest} x {smallest}, since each of the "
            f"{len(channels) - 1} pools halves it. Got image={tuple(image)}; give fewer channels."
        )


def _check_dropout(network: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{network}: dropout must be at least 0 and below 1. Got dropout={dropout}.")


def _activation_class(network: str, name: str) -> type[nn.Module]:
    path, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path or "manualprop.nn"), class_name)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"{network}: activation must be a class of manualprop.nn, such as 'Tanh', 'ReLU' or 'GELU', or "
            f"the class path of a module. Got activation={name!r}."
        )
    return found
