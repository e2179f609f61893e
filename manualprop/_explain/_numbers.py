"""The numbers of a step, each under a key by which steps, pages and files refer to it.

Keys
    x            input of the model              loss:g       dL/dy of the model's output
    y:0          output of layer 0               target       of the examples
    g:0          dL/dy of layer 0                loss:l       losses of the examples
    x:0, dx:0    input of layer 0, and dL/dx, where these are not the output of another layer and its gradient
    i:2          places of the maxima that layer 2 chose, counted along the flattened axes of positions
    m:3          what dropout, layer 3, multiplied each number of its input by
    p:NAME       a parameter                     d:NAME       its gradient        u:NAME     what the update adds to it
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manualprop._explain._observe import ACTIVATION, AFFINE, Layer, Observation
from manualprop._explain._windows import chosen_places


@dataclass(frozen=True)
class Links:
    """Which numbers a layer shares with others.

    Args:
        inputs: for each layer, the key of its input.
        returns: for each layer, the key of dL/dx; "" where there is none.
    """

    inputs: tuple[str, ...]
    returns: tuple[str, ...]


def links(seen: Observation) -> Links:
    """Find, for each layer, whose output it is given and whose gradient it hands back."""
    inputs: list[str] = []
    returns: list[str] = []
    for i, layer in enumerate(seen.layers):
        before = next((j for j in reversed(range(i)) if same(seen.layers[j].y, layer.x)), None)
        inputs.append(f"y:{before}" if before is not None else "x" if not i else f"x:{i}")
        if layer.dx is None:
            returns.append("")
        elif before is not None and same(seen.layers[before].g, layer.dx):
            returns.append(f"g:{before}")
        else:
            returns.append(f"dx:{i}")
    return Links(tuple(inputs), tuple(returns))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers."""
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def passes_on(layer: Layer) -> bool:
    """Whether a layer hands its input on as it is, perhaps in another shape: Flatten, Identity, Dropout in evaluation."""
    return layer.kind not in (AFFINE, ACTIVATION) and same(layer.x.reshape(-1), layer.y.reshape(-1))


def numbers(seen: Observation, linked: Links) -> dict[str, Tensor]:
    """All numbers of an observation, by key."""
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(seen.layers):
        found.setdefault(linked.inputs[i], layer.x)
        found[f"y:{i}"] = layer.y
        if layer.g is not None:
            found[f"g:{i}"] = layer.g
        if linked.returns[i] and layer.dx is not None:
            found.setdefault(linked.returns[i], layer.dx)
        if layer.mask is not None:
            found[f"m:{i}"] = layer.mask
        places = chosen_places(layer)
        if places is not None:
            found[f"i:{i}"] = places
    found |= {"target": seen.target, "output": seen.output, "loss:g": seen.g}
    if seen.losses is not None:
        found["loss:l"] = seen.losses
    for weight in seen.weights():
        found[f"p:{weight.name}"] = weight.value
        if weight.gradient is not None:
            found[f"d:{weight.name}"] = weight.gradient
        if weight.change is not None:
            found[f"u:{weight.name}"] = weight.change
    return found


def as_table(key: str, t: Tensor) -> Tensor:
    """A tensor as a table: examples (and positions) down, units across; a weight with its units down."""
    if t.dim() == 2:
        return t
    if t.dim() < 2:
        one_each = key in ("target", "loss:l", "x")  # a number for each example
        return t.reshape(-1, 1) if one_each else t.reshape(1, -1)
    if t.dim() == 3 and key[:2] not in ("p:", "d:", "u:"):
        return t.reshape(-1, t.shape[-1])
    return t.reshape(len(t), -1)


@dataclass(frozen=True)
class Statistics:
    """What a tensor amounts to.

    - ``norm``    Euclidean.
    - ``mean``    and ``spread``, the standard deviation.
    - ``low``     smallest number, and ``high``, the largest.
    - ``zeros``   share of numbers that are 0.
    """

    norm: float
    mean: float
    spread: float
    low: float
    high: float
    zeros: float


def statistics(t: Tensor) -> Statistics:
    """The statistics of a tensor; zeros of one without elements."""
    t = t.detach().double()
    if not t.numel():
        return Statistics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    spread = t.std(correction=0).item()
    zeros = (t == 0).double().mean().item()
    return Statistics(t.norm().item(), t.mean().item(), spread, t.min().item(), t.max().item(), zeros)


def rms(t: Tensor | None) -> float:
    """The root of the mean square; 0 without a tensor."""
    return 0.0 if t is None or not t.numel() else t.double().norm().item() / math.sqrt(t.numel())


# ----- what a unit does in all examples -----


def slopes(layer: Layer) -> Tensor | None:
    """f' of an activation at each of its inputs, by the rule's own ``df``; None for any other layer."""
    rule = layer.rule
    df = getattr(rule, "df", None)
    if layer.kind != ACTIVATION or df is None:
        return None
    s = layer.y if rule.saves == "output" else layer.x  # type: ignore[union-attr]
    with torch.no_grad():
        found: Tensor = df(s, *layer.p)
    return found


FLAT_AT_ZERO = ("ReLU", "ReLU6", "ReLUSquared", "Hardswish", "Threshold")
SATURATING = ("Tanh", "Sigmoid", "Hardtanh", "Hardsigmoid", "Softsign")


def dead(layer: Layer) -> float | None:
    """The share of units that are 0 in every example, and so learn nothing; None where that means nothing."""
    name = "" if layer.rule is None else layer.rule.__name__.removesuffix("FromInput")
    slope = slopes(layer)
    if name not in FLAT_AT_ZERO or slope is None or slope.dim() < 2 or len(slope) < 2:
        return None
    if slope.dim() > 3:  # of an image a unit is a channel, at all positions
        slope = slope.movedim(1, -1)
    return (slope.flatten(0, -2) == 0).all(0).double().mean().item()


def saturated(layer: Layer) -> float | None:
    """The share of numbers whose slope is under a fiftieth of the steepest; None where that means nothing."""
    name = "" if layer.rule is None else layer.rule.__name__
    slope = slopes(layer)
    if name not in SATURATING or slope is None:
        return None
    steepest = 0.25 if name == "Sigmoid" else 1 / 6 if name == "Hardsigmoid" else 1.0
    return (slope < steepest / 50).double().mean().item()


Numbers = Mapping[str, Tensor]
