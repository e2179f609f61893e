"""Layers that look at windows of their input: convolutions and pools.  What a window covers, and what made a number.

Symbols
    n   example      c   channel of the input      i   place in the input      k   place in the window
                     o   channel of the output     q   place in the output
    Places have one number for each axis.  A transposed convolution goes the other way: from q and o to i and c.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from manualprop import functions as rules
from manualprop._explain._observe import Layer
from manualprop.functions._execution._axes import Like
from manualprop.functions.pooling import of_each_axis

Options = dict[str, Any]
CONVOLUTION, TRANSPOSED, MAXIMA, MEANS = (
    (rules.Convolution,),
    (rules.TransposedConvolution,),
    (rules.MaxPool, rules.AdaptiveMaxPool),
    (rules.AvgPool, rules.AdaptiveAvgPool),
)


def window_options(layer: Layer) -> Options | None:
    """What decides the windows of a layer, one number for each axis; None for a layer without windows."""
    axes = re.search(r"([123])d$", layer.name)
    if (
        layer.rule not in (*CONVOLUTION, *TRANSPOSED, *MAXIMA, *MEANS)
        or not axes
        or layer.x.dim() != int(axes[1]) + 2
    ):
        return None
    module: Any = layer.module
    if layer.rule in (rules.AdaptiveMaxPool, rules.AdaptiveAvgPool):
        return {"adaptive": True}
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None  # the padding is then a step before the convolution
    kernel, dilation = (
        of_each_axis(option, int(axes[1])) for option in (module.kernel_size, getattr(module, "dilation", 1))
    )
    if isinstance(module.padding, str):
        full = zip(dilation, kernel, strict=True)
        padding = [d * (k - 1) // 2 if module.padding == "same" else 0 for d, k in full]
    else:
        padding = list(of_each_axis(module.padding, int(axes[1])))
    stride = of_each_axis(module.stride, int(axes[1])) or kernel
    found: Options = {
        "kernel": list(kernel),
        "stride": list(stride),
        "padding": padding,
        "dilation": list(dilation),
    }
    if layer.rule in (*CONVOLUTION, *TRANSPOSED):
        found["groups"] = module.groups
    if layer.rule is rules.AvgPool:
        found |= {"include": module.count_include_pad, "divisor": getattr(module, "divisor_override", None)}
    return found


def window(options: Options, axis: int, q: int, size: int, count: int) -> list[tuple[int, int]]:
    """The (k, i) of one axis of window q: places in the window and in the input, without what lies outside.

    Args:
        options: of the layer.
        axis: the axis of positions, from 0.
        q: the place in the output.
        size: of the input along the axis.
        count: of the places in the output along the axis.
    """
    if "adaptive" in options:
        first, end = q * size // count, -(-(q + 1) * size // count)
        return list(enumerate(range(first, end)))
    names = ("kernel", "stride", "padding", "dilation")
    kernel, stride, padding, dilation = (options[name][axis] for name in names)
    places = ((k, q * stride + k * dilation - padding) for k in range(kernel))
    return [(k, i) for k, i in places if 0 <= i < size]


def mean_divisor(options: Options, at: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...]) -> int:
    """What the mean of window ``at`` divides by; ``x`` and ``y`` are the sizes of all axes of positions."""
    if options.get("divisor"):
        return int(options["divisor"])
    found = 1
    for axis, q in enumerate(at):
        count = len(window(options, axis, q, x[axis], y[axis]))
        if options.get("include"):
            begin = q * options["stride"][axis] - options["padding"][axis]
            count = min(begin + options["kernel"][axis], x[axis] + options["padding"][axis]) - begin
        found *= count
    return found


def chosen_places(layer: Layer) -> Tensor | None:
    """The places of the maxima, along the flattened axes of positions; None for any other layer."""
    options = window_options(layer)
    if layer.rule not in MAXIMA or options is None:
        return None
    module: Any = layer.module
    axes = layer.x.dim() - 2
    if layer.rule is rules.AdaptiveMaxPool:
        _, places, _ = rules.AdaptiveMaxPool.forward(layer.x, axes, module.output_size)
        return places
    kernel, stride, padding, dilation = (
        options[name] for name in ("kernel", "stride", "padding", "dilation")
    )
    given = kernel, stride, padding, dilation, module.ceil_mode
    _, places, _ = rules.MaxPool.forward(layer.x, axes, *given)
    return places


def told_options(layer: Layer) -> str:
    """The options of a convolution or pool in words; "" for any other layer."""
    options = window_options(layer)
    if options is None or "adaptive" in options:
        return ""
    words = [f"here k has {'×'.join(map(str, options['kernel']))} places"]
    words += [f"{letter} = {_each(options[name])}" for letter, name in (("s", "stride"), ("p", "padding"))]
    if layer.rule not in MEANS:
        words.append(f"d = {_each(options['dilation'])}")
    if options.get("groups", 1) > 1:
        words.append(f"{options['groups']} groups of channels")
    return ", ".join(words)


def _each(numbers: list[int]) -> str:
    """One number, if it is the same for each axis."""
    return "×".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


# ----- how a number was made: what the page and :mod:`._worked` write out -----


def of_output(i: int, layer: Layer, x: str) -> Options | None:
    """How an output of layer i was made from the tensor ``x``; None for a layer without windows."""
    options = window_options(layer)
    if options is None:
        return None
    if layer.rule in (*CONVOLUTION, *TRANSPOSED):
        kind = "convolution" if layer.rule in CONVOLUTION else "transposed"
        weight, *bias = [f"p:{w.name}" for w in layer.weights]
        return {"kind": kind, "x": x, "W": weight, "b": bias[0] if bias else "", **options}
    if layer.rule in MAXIMA:
        return {"kind": "maximum", "x": x, "i": f"i:{i}", **options}
    return {"kind": "mean", "x": x, **options}


def of_input_gradient(i: int, layer: Layer, x: str) -> Options | None:
    """How dL/dx of layer i was made; None for a layer without windows."""
    options = window_options(layer)
    if options is None:
        return None
    if layer.rule in (*CONVOLUTION, *TRANSPOSED):
        kind = "convolution_input" if layer.rule in CONVOLUTION else "transposed_input"
        made = {"kind": kind, "g": f"g:{i}", "W": f"p:{layer.weights[0].name}"}
    elif layer.rule in MAXIMA:
        made = {"kind": "chosen", "g": f"g:{i}", "i": f"i:{i}"}
    else:
        made = {"kind": "mean_input", "g": f"g:{i}"}
    return {**made, "x": x, **options}


def of_weight_gradient(i: int, layer: Layer, x: str, is_bias: bool) -> Options | None:
    """How a gradient of the weights or biases of layer i was made; None for a layer without windows."""
    options = window_options(layer)
    if options is None or layer.rule not in (*CONVOLUTION, *TRANSPOSED):
        return None
    if is_bias:
        return {"kind": "convolution_bias", "g": f"g:{i}"}
    kind = "convolution_weight" if layer.rule in CONVOLUTION else "transposed_weight"
    return {"kind": kind, "g": f"g:{i}", "x": x, **options}


def own_input_gradient(layer: Layer) -> Tensor | None:
    """dL/dx as this layer alone makes it; None for a layer without windows."""
    options = window_options(layer)
    if options is None or layer.g is None:
        return None
    size = tuple(layer.x.shape[2:])
    if layer.rule in (*CONVOLUTION, *TRANSPOSED):
        s, p, d = (tuple(options[name]) for name in ("stride", "padding", "dilation"))
        W = layer.weights[0].value
        if layer.rule in TRANSPOSED:
            return rules.Convolution.forward(layer.g, W, None, s, p, d, options["groups"], size)
        return rules.TransposedConvolution.forward(layer.g, W, None, s, p, d, options["groups"], size)
    places = chosen_places(layer)
    if places is not None:
        return rules.SumAtPlaces.forward(layer.g, places, size)
    module: Any = layer.module
    dx: Tensor
    if layer.rule is rules.AdaptiveAvgPool:
        dx = rules.AdaptiveAvgPool.adjoint.forward(layer.g, Like.of(layer.x), tuple(layer.y.shape[2:]))
        return dx
    kernel, stride, padding = (tuple(options[name]) for name in ("kernel", "stride", "padding"))
    given = kernel, stride, padding, module.ceil_mode, options["include"], options["divisor"]
    dx = rules.AvgPool.adjoint.forward(layer.g, Like.of(layer.x), *given)
    return dx
