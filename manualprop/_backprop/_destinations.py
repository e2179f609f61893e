"""Where the gradient of a parameter goes: into a buffer, or at once into the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from manualprop import functions as rules


class Destination:
    """Takes the gradient of one parameter, which a stage hands over once in every backward pass."""

    def __init__(self, parameter: Parameter) -> None:
        self.value = parameter.detach()

    def take(self, gradient: Tensor) -> None:
        """Take a gradient of the parameter's shape."""
        raise NotImplementedError

    def take_weight(self, g: Tensor, x: Tensor) -> None:
        """Take the gradient of a Linear weight, from its factors."""
        self.take(rules.Linear.weight_gradient(g, x))

    def take_bias(self, g: Tensor) -> None:
        """Take the gradient of a Linear bias, from the gradient that arrived."""
        self.take(rules.Linear.bias_gradient(g))


Destinations = Mapping[Parameter, Destination]


class Collect(Destination):
    """Adds gradients up: over micro-batches, or over the places where a tied weight stands."""

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
        """The gradient; zeros where no example reached the parameter."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.value)
        return self.gradient

    def take_weight(self, g: Tensor, x: Tensor) -> None:
        if self.gradient is None:
            self.take(rules.Linear.weight_gradient(g, x))
        else:
            rules.Linear.add_weight_gradient(self.gradient, g, x, 1.0)


class Descend(Destination):
    """The update of stochastic gradient descent, as torch.optim.SGD defines it, folded into the gradient.

    With the gradient G, negated for ``maximize``, and the weight decay d, momentum m and dampening p:
        d W + G -> G;   B <- m B + (1 - p) G;   G + m B (Nesterov), or B -> D;   W <- W - lr D
    Without momentum D = G, and the update is one product:  W <- (1 - lr d) W - lr g^T x.
    """

    def __init__(self, parameter: Parameter, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        super().__init__(parameter)
        self.group, self.state = group, state
        self.row = self.value.view(1, -1) if self.value.dim() == 1 else self.value

    def buffers(self) -> list[Tensor]:
        """What the update changes beside the parameter."""
        return [buffer for buffer in self.state.values() if isinstance(buffer, Tensor)]

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
        buffer: Tensor | None = self.state.get("momentum_buffer")
        if buffer is None:  # the first gradient is not dampened
            with torch.inference_mode(False):  # it outlives the step, and goes into checkpoints
                buffer = self.state["momentum_buffer"] = torch.empty_like(self.value)
            return buffer.copy_(gradient)
        dampening = self.group["dampening"]
        return buffer.mul_(self.group["momentum"]).add_(
            gradient * (1 - dampening) if on(dampening) else gradient
        )

    def take_weight(self, g: Tensor, x: Tensor) -> None:
        group, W = self.group, self.value
        lr = -group["lr"] if group["maximize"] else group["lr"]
        if group["momentum"]:
            self._take_weight_with_momentum(g, x)
        elif group["weight_decay"]:
            rules.Linear.add_weight_gradient(W, g, x, -lr, 1 - group["lr"] * group["weight_decay"])
        else:
            rules.Linear.add_weight_gradient(W, g, x, -lr)

    def _take_weight_with_momentum(self, g: Tensor, x: Tensor) -> None:
        group, W = self.group, self.value
        buffer = self.state.get("momentum_buffer")
        if group["nesterov"] or buffer is None:
            self.take(rules.Linear.weight_gradient(g, x))
            return
        kept = 1 - group["dampening"]
        scale = -kept if group["maximize"] else kept
        rules.Linear.add_weight_gradient(buffer, g, x, scale, group["momentum"])
        if group["weight_decay"]:
            buffer.add_(W, alpha=kept * group["weight_decay"])
        W.add_(buffer, alpha=-group["lr"])

    def take_bias(self, g: Tensor) -> None:
        group = self.group
        if group["momentum"] or group["weight_decay"]:
            self.take(rules.Linear.bias_gradient(g))
        else:
            rules.Linear.add_bias_gradient(self.row, g, group["lr"] if group["maximize"] else -group["lr"])


class Factors(Destination):
    """Keeps what a gradient is made of, so that a graph may end there and the update still be folded."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(parameter)
        self.method, self.made = "take", [torch.zeros_like(self.value)]

    def take(self, gradient: Tensor) -> None:
        self.method, self.made = "take", [gradient]

    def take_weight(self, g: Tensor, x: Tensor) -> None:
        self.method, self.made = "take_weight", [g, x]

    def take_bias(self, g: Tensor) -> None:
        self.method, self.made = "take_bias", [g]


HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay")


def on(hyperparameter: float | Tensor) -> bool:
    """Whether a hyperparameter has an effect; as a tensor it stands for any number but 0."""
    return isinstance(hyperparameter, Tensor) or hyperparameter != 0


class Guarded(Descend):
    """The same update for a graph, which can neither read a number nor raise: kept only if all is well.

    The hyperparameters that are not 0 come as tensors, so that a scheduler may move them without a new graph.
    """

    def __init__(self, parameter: Parameter, group: Mapping[str, Any], state: dict[str, Any]) -> None:
        self.originals = {"": parameter.detach()} | {
            name: buffer for name, buffer in state.items() if isinstance(buffer, Tensor)
        }
        super().__init__(parameter, group, {name: buffer.clone() for name, buffer in self.originals.items()})
        self.value = self.state[""]

    def _move(self, direction: Tensor) -> None:
        self.value.sub_(direction * self.group["lr"])

    def commit(self, well: Tensor) -> None:
        """Make the update real where ``well`` is true."""
        for name, original in self.originals.items():
            original.copy_(torch.where(well, self.state[name], original))
