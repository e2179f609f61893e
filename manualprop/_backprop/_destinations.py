"""Where the gradient of a parameter goes: into a buffer, or straight into the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from manualprop import functions as rules
from manualprop.functions._execution._products import add_weight_gradient


class Destination:
    """Takes the gradient of one parameter; a stage passes it on once in every backward pass."""

    def __init__(self, parameter: Parameter) -> None:
        self.value = parameter.detach()

    def take(self, gradient: Tensor) -> None:
        """Take a gradient of the parameter's shape."""
        raise NotImplementedError

    def take_weight(self, g_t: Tensor, x: Tensor) -> None:
        """Take the gradient of a Linear weight as its two factors: the transposed g, and the rows of x."""
        self.take(rules.Linear.weight_gradient(g_t.t(), x))

    def take_bias(self, db: Tensor) -> None:
        """Take the gradient of a Linear bias."""
        self.take(db)


Destinations = Mapping[Parameter, Destination]

THIN = 11  # a weight is thin if its smaller side is at most this; see Descend


class Collect(Destination):
    """Adds gradients up: over micro-batches, or over the places of a tied weight."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(parameter)
        self.gradient: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        if self.gradient is None:
            self.gradient = gradient.reshape(self.value.shape).to(self.value.dtype)
        else:
            self.gradient = self.gradient + gradient

    @property
    def made(self) -> Tensor:
        """The gradient; zeros if no example reached the parameter."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.value)
        return self.gradient

    def take_weight(self, g_t: Tensor, x: Tensor) -> None:
        if self.gradient is None:
            super().take_weight(g_t, x)
        else:
            add_weight_gradient(self.gradient, g_t, x, 1.0)


class Descend(Destination):
    """The update of stochastic gradient descent, as torch.optim.SGD defines it, folded into the gradient.

    With the gradient G (negated for ``maximize``), weight decay d, momentum m and dampening p:
        d W + G -> G;   B <- m B + (1 - p) G;   G + m B (Nesterov), or B -> D;   W <- W - lr D
    Without momentum D = G, and the update is one product:  W <- (1 - lr d) W - lr g^T x.
    For a thin W the whole gradient is computed first.  Some BLAS kernels for thin matrices (MKL's on AMD
    processors) would add each example's part to W separately; with a small learning rate such a part is lost
    in rounding.
    """

    def __init__(self, parameter: Parameter, group: Mapping[str, Any], states: dict[Any, Any]) -> None:
        super().__init__(parameter)
        self.group, self.states, self.key = group, states, parameter
        self.is_thin = min(parameter.shape, default=0) <= THIN

    @property
    def buffer(self) -> Tensor | None:
        """The momentum buffer in the state of torch.optim.SGD; None if there is none yet."""
        buffer: Tensor | None = self.states.get(self.key, {}).get("momentum_buffer")
        return buffer

    def take(self, gradient: Tensor) -> None:
        group, W = self.group, self.value
        if group["maximize"]:
            gradient = -gradient
        if on(group["weight_decay"]):
            gradient = gradient + group["weight_decay"] * W
        if on(group["momentum"]):
            buffer = self._momentum(gradient)
            gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
        self._move(gradient)

    def _move(self, direction: Tensor) -> None:
        self.value.add_(direction, alpha=-self.group["lr"])

    def _momentum(self, gradient: Tensor) -> Tensor:
        buffer = self.buffer
        if buffer is None:  # the first gradient is not dampened
            with torch.inference_mode(False):  # the buffer outlives the step and goes into checkpoints
                buffer = self.states[self.key]["momentum_buffer"] = torch.empty_like(self.value)
            return buffer.copy_(gradient)
        dampening = self.group["dampening"]
        return buffer.mul_(self.group["momentum"]).add_(
            gradient * (1 - dampening) if on(dampening) else gradient
        )

    def take_weight(self, g_t: Tensor, x: Tensor) -> None:
        group = self.group
        if self.is_thin and len(x) > 1:
            super().take_weight(g_t, x)
            return
        if group["momentum"]:
            self._take_weight_with_momentum(g_t, x)
            return
        scale = group["lr"] if group["maximize"] else -group["lr"]
        if group["weight_decay"]:
            add_weight_gradient(self.value, g_t, x, scale, 1 - group["lr"] * group["weight_decay"])
        else:
            add_weight_gradient(self.value, g_t, x, scale)

    def _take_weight_with_momentum(self, g_t: Tensor, x: Tensor) -> None:
        group, W, buffer = self.group, self.value, self.buffer
        if group["nesterov"] or buffer is None:
            super().take_weight(g_t, x)
            return
        kept = 1 - group["dampening"]
        scale = -kept if group["maximize"] else kept
        add_weight_gradient(buffer, g_t, x, scale, group["momentum"])
        if group["weight_decay"]:
            buffer.add_(W, alpha=kept * group["weight_decay"])
        W.add_(buffer, alpha=-group["lr"])

    def take_bias(self, db: Tensor) -> None:
        group = self.group
        if group["momentum"] or group["weight_decay"]:
            self.take(db)
        else:
            self.value.add_(db, alpha=group["lr"] if group["maximize"] else -group["lr"])


FACTORS = {"take": 1, "take_weight": 2}  # method of a destination -> the number of tensors it takes


class Factors(Destination):
    """Keeps the factors of a gradient: a graph returns them, and the update is still one product."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(parameter)
        self.method, self.made = "take", [torch.zeros_like(self.value)]

    def take(self, gradient: Tensor) -> None:
        self.method, self.made = "take", [gradient]

    def take_weight(self, g_t: Tensor, x: Tensor) -> None:
        self.method, self.made = "take_weight", [g_t, x]


HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay")


def on(hyperparameter: float | Tensor) -> bool:
    """Whether a hyperparameter has an effect; a tensor stands for any number except 0."""
    return isinstance(hyperparameter, Tensor) or hyperparameter != 0


class Guarded(Descend):
    """The same update for a graph, which cannot read a number or raise; ``commit`` decides whether it counts.

    Hyperparameters that are not 0 come as tensors, so a scheduler can change them without a new graph.
    """

    def __init__(self, parameter: Parameter, group: Mapping[str, Any], buffer: Tensor | None) -> None:
        buffers = {} if buffer is None else {"momentum_buffer": buffer}
        state = {name: buffer.clone() for name, buffer in buffers.items()}
        super().__init__(parameter, group, {parameter: state})
        self.originals = [self.value, *buffers.values()]
        self.value = self.value.clone()
        self.changed = [self.value, *state.values()]

    def _move(self, direction: Tensor) -> None:
        self.value.sub_(direction * self.group["lr"])

    def commit(self, well: Tensor | None = None) -> None:
        """Make the update real; if ``well`` is given, only where it is true."""
        for original, changed in zip(self.originals, self.changed, strict=True):
            original.copy_(changed if well is None else torch.where(well, changed, original))
