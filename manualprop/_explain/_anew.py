"""The layers that the page computes anew when a weight is nudged, and what it needs for each beside its tensors."""

from __future__ import annotations

import math
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from manualprop._explain._numbers import Links, passes_on, same
from manualprop._explain._observe import ACTIVATION, AFFINE, Layer, Observation
from manualprop._explain._windows import of_output

MULTIPLICATIONS = 40_000_000  # for one loss; a browser makes them in a tenth of a second
WEIGHTED = ("affine", "convolution", "transposed", "normalised")


def anew(i: int, layer: Layer) -> dict[str, Any] | None:
    """How the page computes layer ``i`` from its input; None if it cannot."""
    if layer.kind == ACTIVATION:
        return {"kind": "activation"}
    if layer.kind == AFFINE:
        return {"kind": "affine"} if layer.x.dim() == 2 else None
    if passes_on(layer):
        return {"kind": "same"}
    if layer.mask is not None:
        return {"kind": "dropped", "m": f"m:{i}"}
    if isinstance(layer.module, _BatchNorm) and layer.rule is not None:
        return _normalised(layer)
    made = of_output(i, layer, "")
    if made is None:
        return None
    return {**made, "from": list(layer.x.shape[1:]), "to": list(layer.y.shape[1:])}


def _normalised(layer: Layer) -> dict[str, Any]:
    """With the constant mean and variance of evaluation; in training the batch has its own."""
    module: Any = layer.module
    found = {"kind": "normalised", "channels": layer.x.shape[1], "eps": module.eps}
    if not module.training and module.running_mean is not None:
        found |= {"mean": module.running_mean.tolist(), "var": module.running_var.tolist()}
    return found


def not_computed(seen: Observation, linked: Links) -> str:
    """Why the page cannot compute the output of the network anew; "" if it can."""
    for i, layer in enumerate(seen.layers):
        if anew(i, layer) is None:
            return f"{layer.path} ({layer.name}) is not a layer that the page computes."
        if linked.inputs[i] != (f"y:{i - 1}" if i else "x"):
            return f"{layer.path} ({layer.name}) does not take the output of the layer before it."
    if not seen.layers or not same(seen.layers[-1].y, seen.output):
        return "The output is not that of the last layer."
    if not nudged(seen):
        return "No layer has a weight that the page can change."
    count = multiplications(seen)
    if count > MULTIPLICATIONS:
        return f"The loss takes {count:,} multiplications, and a page makes up to {MULTIPLICATIONS:,}."
    return ""


def nudged(seen: Observation) -> list[int]:
    """The places of the layers with a weight that learns, and that can be nudged."""
    kinds = [(anew(i, layer) or {}).get("kind") for i, layer in enumerate(seen.layers)]
    learning = [bool(layer.weights) and layer.weights[0].gradient is not None for layer in seen.layers]
    return [i for i, kind in enumerate(kinds) if kind in WEIGHTED and learning[i]]


def multiplications(seen: Observation) -> int:
    """How many the loss of all examples takes, about."""
    return sum(map(_of_layer, seen.layers))


def _of_layer(layer: Layer) -> int:
    """Each output of a layer takes one for each weight of its unit; transposed, each input."""
    if not layer.weights or layer.weights[0].value.dim() < 2:
        return layer.y.numel()
    W = layer.weights[0].value
    ends = layer.x if layer.name.startswith("ConvTranspose") else layer.y
    return ends.numel() * math.prod(W.shape[1:])
