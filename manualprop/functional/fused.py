"""Blocks of layers as one function: the exact composition of their parts, with fewer bytes kept for backward.

``activation`` is a name that a rule declares by ``fuses``, such as ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or
``"silu"``.  The error for an unknown name lists all of them.  ``keep`` is ``"pre-activation"`` or
``"input"``.  With ``"input"`` nothing is kept per hidden element, and backward computes the products before
the activation again.  With the same seed dropout drops the same elements as in the parts.
"""

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop._torch import any_autocast
from manualprop.functional import activation as activations
from manualprop.functional._checks import refuse_complex
from manualprop.functional.convolution import Numbers, _is_batched, _options
from manualprop.functional.dropout import _check_probability, _kept
from manualprop.functional.linear import _autocast_low, linear
from manualprop.functional.norm import _check_batch_norm
from manualprop.functions._execution._in_place import write_over
from manualprop.functions.fused.mlp import ACTIVATIONS as ACTIVATIONS
from manualprop.functions.fused.mlp import FUSES as FUSES

__all__ = [
    "activation_linear",
    "batch_norm_activation_conv",
    "gated_linear",
    "gated_mlp",
    "layer_norm_linear",
    "linear_activation",
    "mlp",
    "packed_relu",
    "relu_dropout",
    "rms_norm_linear",
]

KEEP = ("pre-activation", "input")


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    keep: str = "pre-activation",
) -> Tensor:
    """``f(linear(input, weight, bias))``.

    Args:
        activation: the name of f.
        keep: ``"pre-activation"`` applies the two separate rules; a rule for both would not keep less.  They
            keep the pre-activation, or for ReLU, its square and Tanh only the output, which the next layer
            keeps anyway.  ``"input"`` applies :class:`manualprop.functions.LinearActivation`.

    Shape:
        ``input`` (..., I), ``weight`` (O, I), ``bias`` (O,) or None -> (..., O)

    Raises:
        ValueError: for an unknown ``activation`` or ``keep``.
    """
    _check_names("linear_activation", activation, keep)
    refuse_complex("linear_activation", input, weight)
    if keep == "pre-activation":
        return _activate(linear(input, weight, bias), activation)
    input, weight, bias = _autocast_low(input, weight, bias)
    output: Tensor = rules.LinearActivation.apply(input, weight, bias, activation)
    return output


def activation_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``linear(dropout(f(input), p, training), weight, bias)``, by :class:`manualprop.functions.ActivationLinear`.

    ReLU, its square and Tanh are differentiated from their output, which the linear layer keeps anyway.
    Without dropout they run as separate rules, ReLU also with dropout.

    Args:
        activation: the name of f.
        p: probability that an activation is dropped, in [0, 1].
        training: whether anything is dropped.

    Shape:
        ``input`` (..., H), ``weight`` (O, H), ``bias`` (O,) or None -> (..., O)

    Raises:
        ValueError: for an unknown ``activation``, or a ``p`` out of its range.
        RuntimeError: if the shapes or, outside autocast, the dtypes do not fit.
    """
    _check_names("activation_linear", activation)
    _check_probability(p)
    refuse_complex("activation_linear", input, weight)
    drops = training and p > 0 and input.numel() > 0
    if activation == "relu":
        return linear(relu_dropout(input, p, training), weight, bias)
    if ACTIVATIONS[activation].from_output and not drops:
        return linear(_activate(input, activation), weight, bias)
    _check_fit("activation_linear", input, weight)
    weight, bias = _autocast_low(weight, bias)
    output: Tensor = rules.ActivationLinear.apply(input, weight, bias, *_mask(input, p, drops), activation)
    return output


def mlp(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
    keep: str = "pre-activation",
) -> Tensor:
    """``linear(dropout(f(linear(input, weight1, bias1)), p, training), weight2, bias2)``.

    Args:
        activation: the name of f.
        p: probability that a hidden activation is dropped, in [0, 1].
        training: whether anything is dropped.
        keep: ``"pre-activation"`` for :class:`manualprop.functions.Linear` and ``ActivationLinear``, ``"input"`` for
            :class:`manualprop.functions.MLP`.

    Shape:
        ``input`` (..., I), ``weight1`` (H, I), ``bias1`` (H,) or None, ``weight2`` (O, H), ``bias2`` (O,) or None
        -> (..., O)

    Raises:
        ValueError: for an unknown ``activation`` or ``keep``, or a ``p`` out of its range.
    """
    _check_names("mlp", activation, keep)
    _check_probability(p)
    refuse_complex("mlp", input, weight1, weight2)
    if keep == "pre-activation":
        hidden = linear(input, weight1, bias1)
        return activation_linear(hidden, weight2, bias2, activation, p, training)
    input, weight1, bias1, weight2, bias2 = _autocast_low(input, weight1, bias1, weight2, bias2)
    hidden = input.new_empty((*input.shape[:-1], weight1.shape[0]), requires_grad=False)
    drops = training and p > 0 and hidden.numel() > 0
    arguments = (input, weight1, bias1, weight2, bias2, *_mask(hidden, p, drops), activation)
    output: Tensor = rules.MLP.apply(*arguments)
    return output


def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    keep: str = "pre-activation",
) -> Tensor:
    """``linear(f(gate) * up, down_weight, down_bias)``; ``gate`` and ``up`` are linear in the input.

    SwiGLU is ``activation="silu"``, GEGLU ``"gelu"``, ReGLU ``"relu"``.

    Args:
        activation: the name of f.
        keep: ``"pre-activation"`` for :class:`manualprop.functions.Linear`, twice, and ``GatedLinear``; ``"input"``
            for :class:`manualprop.functions.GatedMLP`.

    Shape:
        ``input`` (..., I), ``gate_weight`` and ``up_weight`` (H, I), ``down_weight`` (O, H), biases (H,), (H,) and
        (O,) or None -> (..., O)

    Raises:
        ValueError: for an ``activation`` or ``keep`` that does not exist.
    """
    _check_names("gated_mlp", activation, keep)
    refuse_complex("gated_mlp", input, gate_weight, up_weight, down_weight)
    if keep == "pre-activation":
        gate, up = linear(input, gate_weight, gate_bias), linear(input, up_weight, up_bias)
        return gated_linear(gate, up, down_weight, down_bias, activation)
    low = _autocast_low(input, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias)
    output: Tensor = rules.GatedMLP.apply(*low, activation)
    return output


def gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """``linear(f(gate) * up, weight, bias)``, by :class:`manualprop.functions.GatedLinear`.

    Args:
        activation: the name of f.

    Shape:
        ``gate`` and ``up`` (..., H), ``weight`` (O, H), ``bias`` (O,) or None -> (..., O)

    Raises:
        ValueError: for an unknown ``activation``, or if the shapes of ``gate`` and ``up`` differ.
    """
    _check_names("gated_linear", activation)
    refuse_complex("gated_linear", gate, up, weight)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        kinds = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in (gate, up))
        raise ValueError(
            f"gated_linear: gate and up must have one shape and dtype. Got {kinds}; expand or convert one."
        )
    _check_fit("gated_linear", gate, weight)
    weight, bias = _autocast_low(weight, bias)
    output: Tensor = rules.GatedLinear.apply(gate, up, weight, bias, activation)
    return output


def relu_dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """``dropout(relu(input), p, training)``, by :class:`manualprop.functions.ReLUDropout`, or ``ReLU``.

    Args:
        p: probability that an element is dropped, in [0, 1].
        training: whether anything is dropped.

    Raises:
        ValueError: for a ``p`` out of its range.
    """
    _check_probability(p)
    refuse_complex("relu_dropout", input)
    if not training or p == 0 or input.numel() == 0:
        return activations.relu(input)
    output: Tensor = rules.ReLUDropout.apply(input, *_mask(input, p, True))
    return output


def packed_relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``relu(input)``, by :class:`manualprop.functions.PackedReLU`: keeps one bit per element.

    :func:`relu` keeps its output, which is free if the next layer keeps it too (linear, convolution).  Use
    this one where it does not: before a sum, an average pooling, a layer with frozen weights.
    """
    refuse_complex("packed_relu", input)
    if inplace:
        return write_over(rules.PackedReLU, input)
    output: Tensor = rules.PackedReLU.apply(input)[0]
    return output


def layer_norm_linear(
    input: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``linear(layer_norm(input, ...), weight, bias)``, by :class:`manualprop.functions.LayerNormLinear`.

    Args:
        eps: added to the variance.

    Shape:
        ``input`` (..., I), ``norm_weight`` and ``norm_bias`` (I,) or None, ``weight`` (O, I), ``bias`` (O,) or None
        -> (..., O)

    Raises:
        RuntimeError: where the shapes or, outside of autocast, the dtypes do not fit.
    """
    refuse_complex("layer_norm_linear", input, weight)
    _check_fit("layer_norm_linear", input, weight)
    weight, bias = _autocast_low(weight, bias)
    output: Tensor = rules.LayerNormLinear.apply(input, norm_weight, norm_bias, weight, bias, eps)[0]
    return output


def rms_norm_linear(
    input: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``linear(rms_norm(input, ...), weight, bias)``, by :class:`manualprop.functions.RMSNormLinear`.

    Args:
        eps: added under the root; None for the machine epsilon of the precision of the computation.

    Shape:
        ``input`` (..., I), ``norm_weight`` (I,) or None, ``weight`` (O, I), ``bias`` (O,) or None -> (..., O)

    Raises:
        RuntimeError: where the shapes or, outside of autocast, the dtypes do not fit.
    """
    refuse_complex("rms_norm_linear", input, weight)
    _check_fit("rms_norm_linear", input, weight)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    weight, bias = _autocast_low(weight, bias)
    output: Tensor = rules.RMSNormLinear.apply(input, norm_weight, weight, bias, eps)[0]
    return output


def batch_norm_activation_conv(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """``conv(f(batch_norm(input, ...)), weight, bias, ...)`` with one, two or three axes of positions.

    By :class:`manualprop.functions.BatchNormActivationConvolution`, in evaluation by
    ``BatchNormEvaluationActivationConvolution``.  In training the running statistics are updated in place.

    Args:
        running_mean, running_var, training, momentum, eps: as :func:`torch.nn.functional.batch_norm`.
        activation: the name of f.
        stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d`.

    Shape:
        ``input`` (N, C, X), ``norm_weight``, ``norm_bias`` and the running statistics (C,) or None, ``weight``
        (O, C / groups, K), ``bias`` (O,) or None -> (N, O, Q)

    Raises:
        ValueError: for an unknown ``activation``, an ``eps`` out of its range, or one value for each channel in training.
        RuntimeError: where the shapes or, outside of autocast, the dtypes do not fit.
    """
    return _batch_norm_activation_conv(
        input,
        running_mean,
        running_var,
        norm_weight,
        norm_bias,
        weight,
        bias,
        activation,
        training,
        momentum,
        eps,
        stride,
        padding,
        dilation,
        groups,
    )[0]


def _batch_norm_activation_conv(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    training: bool,
    momentum: float,
    eps: float,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """y, and the activation h."""
    name = "batch_norm_activation_conv"
    _check_names(name, activation)
    refuse_complex(name, input, weight)
    _check_images(name, input, weight)
    _check_batch_norm(input, training, eps)
    s, p, d, Q = _options(
        name, weight.dim() - 2, input.shape[2:], weight.shape[2:], stride, padding, dilation
    )
    weight, bias = _autocast_low(weight, bias)
    parameters, options = (input, norm_weight, norm_bias, weight, bias), (activation, s, p, d, groups, Q)
    statistics = (running_mean, running_var, momentum, eps) if training else (running_mean, running_var, eps)
    rule = (
        rules.BatchNormActivationConvolution if training else rules.BatchNormEvaluationActivationConvolution
    )
    y, h, *_ = rule.apply(*parameters, *statistics, *options)
    return y, h


def _activate(input: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        return activations.gelu(input, approximate="tanh")
    output: Tensor = getattr(activations, activation)(input)
    return output


def _mask(hidden: Tensor, p: float, drops: bool) -> tuple[Tensor | None, float]:
    """The mask of the elements that are kept, drawn by torch's call; and the probability to divide by."""
    if not drops:
        return None, 1.0
    if p == 1:
        return hidden.new_zeros((), dtype=torch.uint8, requires_grad=False), 1.0
    return _kept(hidden, p, False, True), 1 - p


def _check_names(name: str, activation: str, keep: str = KEEP[0]) -> None:
    for what, given, choices in (("activation", activation, ACTIVATIONS), ("keep", keep, KEEP)):
        if given not in choices:
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{name}: {what} must be one of {names}. Got {given!r}.")


def _check_fit(name: str, input: Tensor, weight: Tensor) -> None:
    if input.shape[-1:] != weight.shape[1:]:
        raise RuntimeError(
            f"{name}: the last axis of input must be in_features of weight. Got shapes {tuple(input.shape)} and "
            f"{tuple(weight.shape)}."
        )
    _check_dtypes(name, input, weight)


def _check_images(name: str, input: Tensor, weight: Tensor) -> None:
    axes = weight.dim() - 2
    if not 1 <= axes <= 3 or not _is_batched(name, axes, input, weight):
        raise RuntimeError(
            f"{name}: input must have a batch, channels and the one to three axes of weight. Got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}."
        )
    _check_dtypes(name, input, weight)


def _check_dtypes(name: str, input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype and not any_autocast():
        raise RuntimeError(
            f"{name}: input and weight must have one dtype. Got {input.dtype} and {weight.dtype}; convert one."
        )
