"""The tape-free step: forward propagation, backward propagation and update, written out, without autograd.

A :class:`Backprop` holds one stage for each layer.  A step runs the stages forwards, takes the gradient of the
loss, runs them backwards, and each stage hands the gradient of its parameters to where it is wanted: into the
parameter itself (the update, folded into the product that makes the gradient), or into a buffer.  The formulas are
those of :mod:`manualprop.functions`; none is written here.

Symbols
    x   input of a layer        g   dL/dy, the gradient that arrives
    y   its output              dx  dL/dx, the gradient handed to the layer before
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import SGD, Optimizer

from manualprop import functions as rules
from manualprop import nn
from manualprop.descent import Batch, Descent, check_splittable, denominator, is_sum
from manualprop.functions import Elementwise, Rule
from manualprop.functions._rule import recording


class Context:
    """What a rule keeps between its forward and its backward, where no tape does it."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Nothing: there is no forward mode here."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing: an absent gradient is handed to backward as None."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Nothing: only the first output is differentiated."""


@dataclass
class Application:
    """One application of a rule: what it was given, what it kept, what it returned."""

    rule: type[Rule]
    arguments: tuple[Any, ...]
    output: Any
    context: Context

    def backward(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the arguments, by the rule's own backward."""
        others = len(self.output) - 1 if isinstance(self.output, tuple) else 0
        found = self.rule.backward(self.context, g, *[None] * others)
        return found if isinstance(found, tuple) else (found,)


def applications(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, list[Application]]:
    """The value of ``function``, and the rules that were applied in it, in order."""
    found: list[Application] = []

    def record(rule: type[Rule], given: tuple[Any, ...]) -> Any:
        needs = tuple(isinstance(a, Tensor) and a.is_floating_point() for a in given)
        context = Context(needs)
        output = rule.forward(*given)
        rule.setup_context(context, given, output)
        found.append(Application(rule, given, output, context))
        return output

    with recording(record):
        return function(*arguments), found


# ----- where the gradient of a parameter goes -----


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
            rules.Linear.add_weight_gradient(self.gradient, g, x, 1.0, 1.0)


class Descend(Destination):
    """The update of stochastic gradient descent, as torch.optim.SGD defines it, folded into the gradient.

    With the gradient G, negated for ``maximize``, and the weight decay d, momentum m and dampening p:
        d W + G -> G;   B <- m B + (1 - p) G;   G + m B (Nesterov), or B -> D;   W <- W - lr D
    Without momentum D = G, and the update is one product:  W <- (1 - lr d) W - lr g^T x.
    """

    def __init__(self, parameter: Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
        super().__init__(parameter)
        self.group, self.state = group, state

    def take(self, gradient: Tensor) -> None:
        group, W = self.group, self.value
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay"]:
            gradient = gradient + group["weight_decay"] * W
        if group["momentum"]:
            buffer = self._momentum(gradient)
            gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
        W.add_(gradient, alpha=-group["lr"])

    def _momentum(self, gradient: Tensor) -> Tensor:
        buffer: Tensor | None = self.state.get("momentum_buffer")
        if buffer is None:  # the first gradient is not dampened
            with torch.inference_mode(False):  # it outlives the step, and goes into checkpoints
                buffer = self.state["momentum_buffer"] = torch.empty_like(self.value)
            return buffer.copy_(gradient)
        return buffer.mul_(self.group["momentum"]).add_(gradient, alpha=1 - self.group["dampening"])

    def take_weight(self, g: Tensor, x: Tensor) -> None:
        group, W = self.group, self.value
        sign = -1.0 if group["maximize"] else 1.0
        if not group["momentum"]:
            decayed = 1 - group["lr"] * group["weight_decay"]
            rules.Linear.add_weight_gradient(W, g, x, decayed, -sign * group["lr"])
        elif group["nesterov"] or "momentum_buffer" not in self.state:
            self.take(rules.Linear.weight_gradient(g, x))
        else:
            buffer, kept = self.state["momentum_buffer"], 1 - group["dampening"]
            rules.Linear.add_weight_gradient(buffer, g, x, group["momentum"], sign * kept)
            if group["weight_decay"]:
                buffer.add_(W, alpha=kept * group["weight_decay"])
            W.add_(buffer, alpha=-group["lr"])

    def take_bias(self, g: Tensor) -> None:
        group = self.group
        if group["momentum"] or group["weight_decay"]:
            self.take(rules.Linear.bias_gradient(g))
        else:
            sign = -1.0 if group["maximize"] else 1.0
            rules.Linear.add_bias_gradient(self.value, g, -sign * group["lr"])


# ----- stages: one for each layer -----

Destinations = Mapping[Parameter, Destination]


class Stage:
    """A layer of the step.  ``forward`` keeps what ``backward`` needs, and ``backward`` lets go of it."""

    def __init__(self, path: str, layer: Module) -> None:
        self.path, self.layer = path, layer
        self.needs_dx = True  # whether a layer before has anything to learn

    def parameters(self) -> list[Parameter]:
        """The parameters that this stage trains."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, g: Tensor) -> Tensor | None:
        """Hand the parameters' gradients to their destinations and return dx, None where nobody needs it."""
        raise NotImplementedError

    def stages(self) -> Iterator[Stage]:
        """Itself and the stages within."""
        yield self

    def need(self, before: bool) -> bool:
        """Settle ``needs_dx``, given whether a layer before learns; return whether one up to here does."""
        self.needs_dx = before
        return before or bool(self.parameters())

    def send(self, to: Destinations) -> None:
        """Settle where the gradients of the parameters go."""
        self.to = to


class Affine(Stage):
    """Multiply by the weights, add the biases: :class:`manualprop.nn.Linear`."""

    def send(self, to: Destinations) -> None:
        W: Any = self.layer.weight
        b: Any = self.layer.bias
        # Looked up once: reading a parameter off a module, and hashing it, costs as much as a small product.
        self.W, self.b = W.detach(), None if b is None else b.detach()
        self.W_to, self.b_to = to.get(W), None if b is None else to.get(b)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return rules.Linear.forward(x, self.W, self.b)

    def backward(self, g: Tensor) -> Tensor | None:
        x = self.x
        del self.x
        dx = rules.Linear.input_gradient(g, self.W) if self.needs_dx else None
        if self.W_to is not None:  # after dx: the update may be folded in
            self.W_to.take_weight(g, x)
        if self.b_to is not None:
            self.b_to.take_bias(g)
        return dx


class Activation(Stage):
    """Activate: any elementwise rule."""

    def __init__(self, path: str, layer: Module, rule: type[Elementwise], p: tuple[Any, ...]) -> None:
        super().__init__(path, layer)
        self.rule, self.p, self.saves_output = rule, p, rule.saves == "output"

    def forward(self, x: Tensor) -> Tensor:
        y = self.rule.f(x, *self.p)
        self.s = y if self.saves_output else x
        return y

    def backward(self, g: Tensor) -> Tensor | None:
        s = self.s
        del self.s
        return self.rule.chain.product(g, s, *self.p) if self.needs_dx else None


class Applied(Stage):
    """Any other layer whose forward is one application of one rule: norms, softmax, PReLU, dropout ..."""

    def forward(self, x: Tensor) -> Tensor:
        y, found = applications(self.layer.forward, x)
        # Dropout in evaluation hands its very input on.
        self.application = None if y is x else the_one(found, x, y, self.path, self.layer)
        return y

    def backward(self, g: Tensor) -> Tensor | None:
        application = self.application
        del self.application
        if application is None:
            return g
        self._want(application)
        dx = None
        for argument, gradient in zip(application.arguments, application.backward(g), strict=True):
            if gradient is None:
                continue
            if isinstance(argument, Parameter):
                self.to[argument].take(gradient)
            else:
                dx = gradient
        return dx

    def _want(self, application: Application) -> None:
        """Ask the rule for no more than is wanted."""
        application.context.needs_input_grad = tuple(
            argument in self.to if isinstance(argument, Parameter) else needed and self.needs_dx
            for argument, needed in zip(
                application.arguments, application.context.needs_input_grad, strict=True
            )
        )


def the_one(found: list[Application], x: Tensor, y: Tensor, path: str, layer: Module) -> Application:
    """The single application that leads from x to y; anything else has no gradient here."""
    if len(found) == 1:
        first = found[0].output[0] if isinstance(found[0].output, tuple) else found[0].output
        if first is y and sum(a is x for a in found[0].arguments) == 1:
            return found[0]
    raise TypeError(refusal(path, layer, "its forward is more than one application of one rule"))


class Reshaped(Stage):
    """Flatten and Unflatten: the gradient takes the input's shape again."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        y: Tensor = self.layer(x)
        return y

    def backward(self, g: Tensor) -> Tensor | None:
        return g.reshape(self.shape)


class Dropped(Stage):
    """torch's Dropout: y = m x / (1 - p) with a mask m, so dx = m g / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        self.scale = None
        if self.layer.training and self.layer.p > 0:  # type: ignore[operator]
            self.scale = torch.nn.functional.dropout(torch.ones_like(x), self.layer.p)  # type: ignore[arg-type]
        return x if self.scale is None else x * self.scale

    def backward(self, g: Tensor) -> Tensor | None:
        scale, self.scale = self.scale, None
        return g if scale is None else g * scale


class Chained(Stage):
    """Repeat: the layers of a Sequential, one after the other."""

    def __init__(self, path: str, layer: Module, chain: Sequence[Stage]) -> None:
        super().__init__(path, layer)
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.chain:
            x = stage.forward(x)
        return x

    def backward(self, g: Tensor) -> Tensor | None:
        dx: Tensor | None = g
        for stage in reversed(self.chain):
            if dx is None:  # nothing before has anything to learn
                return None
            dx = stage.backward(dx)
        return dx

    def stages(self) -> Iterator[Stage]:
        yield self
        for stage in self.chain:
            yield from stage.stages()

    def need(self, before: bool) -> bool:
        self.needs_dx = before
        for stage in self.chain:
            before = stage.need(before)
        return before


class Added(Stage):
    """Branches from one input whose outputs are added: the gradient goes into each, and what returns is added."""

    def __init__(self, path: str, layer: Module, branches: Sequence[Stage], skip: bool) -> None:
        super().__init__(path, layer)
        self.branches, self.skip = branches, skip

    def forward(self, x: Tensor) -> Tensor:
        total = x if self.skip else None
        for branch in self.branches:
            y = branch.forward(x)
            total = y if total is None else total + y
        assert total is not None
        return total

    def backward(self, g: Tensor) -> Tensor | None:
        dx = g if self.skip else None
        for branch in self.branches:
            found = branch.backward(g)
            if found is not None:
                dx = found if dx is None else dx + found
        return dx if self.needs_dx else None

    def stages(self) -> Iterator[Stage]:
        yield self
        for branch in self.branches:
            yield from branch.stages()

    def need(self, before: bool) -> bool:
        self.needs_dx = before
        learns = [branch.need(before) for branch in self.branches]
        return before or any(learns)


# ----- from a model to its stages -----

WAY_OUT = "Train this model with autograd, where the same modules work, or give it layers of manualprop.nn"


def refusal(path: str, layer: Module, why: str) -> str:
    """The text that refuses a layer: which, where, why, and what to do."""
    return f"Backprop: layer {path or 'model'!r} ({type(layer).__name__}) cannot be run without a tape: {why}. {WAY_OUT}."


def _headline(layer: Module) -> str:
    """The formula of a layer's rule, or what the layer is where it has none."""
    return _sections(layer)[0]


def _derivation(layer: Module) -> str:
    """The derivation of a layer's rule."""
    return _sections(layer)[1]


def _sections(layer: Module) -> tuple[str, str]:
    rule = getattr(rules, type(layer).__name__.removesuffix("Loss"), None)
    document = inspect.getdoc(rule) if rule else None
    if not document:
        return type(layer).__name__, "dx = g, in the shape of x"
    headline, _, rest = document.partition("\n")
    derivation = re.search(r"^Derivation.*?\n(.*?)(?=^\S|\Z)", rest, re.MULTILINE | re.DOTALL)
    return headline, textwrap.dedent(derivation[1]).strip() if derivation else ""


def build(layer: Module, path: str = "") -> Stage:
    """The stage of a layer, with those of the layers within.

    Raises:
        TypeError: for a layer that has none.
    """
    _refuse_hooks(layer, path)
    kind = type(layer)
    if kind.forward is nn.Sequential.forward:
        return Chained(path, layer, _within(layer, path))
    if kind is nn.Residual:
        return Added(path, layer, [Chained(path, layer, _within(layer, path))], skip=True)
    if kind is nn.Parallel:
        return Added(path, layer, _within(layer, path), skip=False)
    if kind in (nn.Identity, torch.nn.Identity):
        return Chained(path, layer, [])
    if kind in (torch.nn.Flatten, torch.nn.Unflatten):
        return Reshaped(path, layer)
    if kind is torch.nn.Dropout:
        return Dropped(path, layer)
    if kind is nn.Linear:
        return Affine(path, layer)
    if kind.__module__.startswith("manualprop.nn."):
        return _activation(layer, path) or Applied(path, layer)
    if kind.__module__.startswith("torch.nn.") and hasattr(nn, kind.__name__):
        raise TypeError(refusal(path, layer, "it is torch's; call manualprop.swap(model) first"))
    raise TypeError(refusal(path, layer, "its forward is not known here"))


def _within(layer: Module, path: str) -> list[Stage]:
    # Not named_children, which names a layer that stands in two places only once.
    within = [(name, child) for name, child in layer._modules.items() if child is not None]
    return [build(child, f"{path}.{name}" if path else name) for name, child in within]


def _refuse_hooks(layer: Module, path: str) -> None:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, name, None) for name in names):
        raise TypeError(refusal(path, layer, "it has hooks, which would not be called"))


def _activation(layer: Module, path: str) -> Stage | None:
    """The stage of an elementwise activation, whose rule and parameters do not depend on the input."""
    if next(layer.parameters(), None) is not None:
        return None
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            _, found = applications(copy.copy(layer).forward, torch.ones(2, 2))
    except (RuntimeError, ValueError, IndexError):  # not a layer for any shape: no elementwise one
        return None
    finally:
        torch.set_rng_state(state)
    if len(found) != 1 or not issubclass(found[0].rule, Elementwise):
        return None
    _, *p = found[0].arguments
    return Activation(path, layer, found[0].rule, tuple(p))


class Criterion:
    """The loss and its gradient with respect to the network's output."""

    def __init__(self, loss: Module) -> None:
        if not type(loss).__module__.startswith("manualprop.nn."):
            twin = getattr(nn, type(loss).__name__, None)
            way = f"Use manualprop.nn.{twin.__name__}" if twin else WAY_OUT
            raise TypeError(
                f"Backprop: the loss must be one of manualprop.nn, whose gradient is known. Got {type(loss).__name__}. {way}."
            )
        if getattr(loss, "reduction", None) not in ("mean", "sum", "batchmean"):
            raise ValueError(
                "Backprop: the loss must be one number. Got reduction="
                f"{getattr(loss, 'reduction', None)!r}; use 'mean' or 'sum'."
            )
        self.loss, self.unreduced = loss, copy.copy(loss)
        self.unreduced.reduction = "none"  # type: ignore[assignment]

    def divisor(self, output: Tensor, target: Tensor) -> float:
        """What the loss, summed over the examples, is divided by."""
        return 1.0 if is_sum(self.loss) else denominator(self.loss, output, target)

    def __call__(self, output: Tensor, target: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
        """The loss, summed over the examples and divided, and its gradient with respect to the output."""
        losses, found = applications(self.unreduced.forward, output, target)
        if len(found) != 1 or found[0].arguments[0].shape != output.shape:
            raise TypeError(
                refusal("loss", self.loss, "its forward is more than one application of one rule")
            )
        application = found[0]
        application.context.needs_input_grad = (True, *[False] * (len(application.arguments) - 1))
        scale = 1 / divisor if divisor else math.nan
        dx = application.backward(torch.full_like(application.output, scale))[0]
        assert dx is not None
        return losses.sum() * scale, dx.to(output.dtype)


@dataclass(frozen=True)
class Record:
    """One step of a trace.

    Args:
        direction: "forward", "loss" or "backward".
        path: of the layer in the model.
        layer: its class.
        formula: of the rule; in a backward step, its derivation.
        shape: of what the step made.
        norm: Euclidean, of what the step made.
    """

    direction: str
    path: str
    layer: str
    formula: str
    shape: tuple[int, ...]
    norm: float


class Backprop:
    """Train a model without a tape: one call is a forward pass, a backward pass and an update.

    The model is a :class:`torch.nn.Sequential`, nested as you like, of layers of :mod:`manualprop.nn` (and torch's
    Flatten, Unflatten, Identity and Dropout), with :class:`manualprop.nn.Residual` and
    :class:`manualprop.nn.Parallel` for branches.  Where the descent is plain or momentum gradient descent, the update
    is folded into the product that makes the gradient, and no gradient is ever stored.  After N steps the weights
    are those of torch.nn, autograd and the same optimizer, to rounding.

    Args:
        model: to be trained, in place.
        loss: of :mod:`manualprop.nn`, called on (output, target), with reduction "mean" or "sum".
        descent: of :mod:`manualprop.descent`: the update, and for Batch the size of the micro-batches.
        optimizer: the descent's, where it has been made already; it is made anew otherwise.

    Attributes:
        output: of the model in the latest step, before its update; with micro-batches, that of the last.

    Raises:
        TypeError: for a layer or a loss that cannot be run without a tape; the text names it and the way out.
        ValueError: for a model without a parameter that requires a gradient.
    """

    def __init__(
        self, model: Module, loss: Module, descent: Descent, *, optimizer: Optimizer | None = None
    ) -> None:
        self.model, self.descent = model, descent
        self.criterion = Criterion(loss)
        self.stage = build(model)
        self.optimizer = descent.make_optimizer(self._trained()) if optimizer is None else optimizer
        self.lr_scheduler = descent.make_lr_scheduler(self.optimizer) if optimizer is None else None
        self.output = torch.empty(0)
        self._plan()

    def _trained(self) -> list[Parameter]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                "Backprop: the model must have a parameter that requires a gradient. Got none; set requires_grad."
            )
        return trained

    def _plan(self) -> None:
        """Settle who learns, and where its gradient goes."""
        self._parameters = list(self.model.parameters())
        self._flags = [p.requires_grad for p in self._parameters]
        self.stage.need(False)
        self._leaves = leaves = [s for s in self.stage.stages() if not isinstance(s, Chained | Added)]
        uses = Counter(p for leaf in leaves for p in leaf.parameters())
        self._learning = list(uses)
        self._ties = len(uses) < uses.total()
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        missing = [p for p in self._learning if p not in groups]
        if missing:  # it did not require a gradient when the optimizer was made
            self.optimizer.add_param_group({"params": missing})
            groups |= dict.fromkeys(missing, self.optimizer.param_groups[-1])
        clips = self.descent.clip_gradient_norm is not None or self.descent.clip_gradient_value is not None
        self._folds = type(self.optimizer) is SGD and not clips
        self._descend: dict[Parameter, Destination] = (
            {p: Descend(p, groups[p], self.optimizer.state[p]) for p in self._learning} if self._folds else {}
        )
        self._send(self._descend)

    def __call__(self, x: Tensor, target: Tensor) -> float:
        """Make one update and return the loss before it.

        Args:
            x: inputs of all examples of the update.
            target: their targets.

        Raises:
            FloatingPointError: for a loss that is not finite; no weight was changed.
        """
        self._check()
        size = self.descent.micro_batch_size if isinstance(self.descent, Batch) else None
        whole = size is None or size >= len(x)
        if whole and self._folds and not self._ties:
            with torch.inference_mode():
                loss, _ = self._propagate(x, target)
        else:
            with torch.no_grad():
                pieces = [(x, target)] if whole else list(zip(x.split(size), target.split(size), strict=True))
                with self._collecting() as to:
                    loss = self._accumulate(pieces, to)
                self._update(to)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for
        if self.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update":
            self.lr_scheduler.step()
        return loss

    def _send(self, to: Destinations) -> None:
        for leaf in self._leaves:
            leaf.send(to)

    def _check(self) -> None:
        if torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                "Backprop: a step runs in the precision of the model. Got an enabled autocast; leave the region, and "
                "give the model the precision with model.to(dtype)."
            )
        if self._flags != [p.requires_grad for p in self._parameters]:
            self._plan()

    @contextmanager
    def _collecting(self) -> Iterator[Mapping[Parameter, Collect]]:
        """Within, gradients are collected, and no weight changes."""
        to = {p: Collect(p) for p in self._learning}
        self._send(to)
        try:
            yield to
        finally:
            self._send(self._descend)

    def _propagate(self, x: Tensor, target: Tensor, divide: bool = True) -> tuple[float, float]:
        """Forward propagation, loss, gradient of the loss, backward propagation; the loss and its divisor."""
        self.output = output = self.stage.forward(x)
        divisor = self.criterion.divisor(output, target)
        loss, g = self.criterion(output, target, divisor if divide else 1.0)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"Backprop: the loss must stay finite. Got loss={value} with learning rate "
                f"{self.optimizer.param_groups[0]['lr']:g}; no weight was changed. Try a smaller learning rate, and "
                "look for nan or huge values in the data."
            )
        self.stage.backward(g)
        return value, divisor

    def _accumulate(self, pieces: Sequence[tuple[Tensor, Tensor]], to: Mapping[Parameter, Collect]) -> float:
        """The gradient of the whole, from pieces: numerators and denominators add up, means do not."""
        if len(pieces) == 1:
            return self._propagate(*pieces[0])[0]
        check_splittable(self.criterion.loss, self.model)
        sums = [self._propagate(x, t, divide=False) for x, t in pieces]
        total, divisor = (math.fsum(column) for column in zip(*sums, strict=True))
        if is_sum(self.criterion.loss):
            return total
        for destination in to.values():
            destination.made.div_(divisor)
        return total / divisor

    def _update(self, to: Mapping[Parameter, Collect]) -> None:
        """The update from gradients that are there."""
        if self._folds:
            for parameter, destination in to.items():
                self._descend[parameter].take(destination.made)
            return
        for parameter, destination in to.items():
            parameter.grad = destination.made
        self.descent.clip_gradients(self._learning)
        self.optimizer.step()

    def gradients(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the gradient of every parameter that learns, by name; no weight and no ``.grad`` changes."""
        self._check()
        with torch.no_grad(), self._collecting() as to:
            self._propagate(x, target)
        named = {p: name for name, p in self.model.named_parameters()}
        return {named[p]: destination.made for p, destination in to.items()}

    def trace(self, x: Tensor, target: Tensor) -> Iterator[Record]:
        """Yield one record for each forward and backward step, in order; no weight changes."""
        self._check()
        records: list[Record] = []
        with torch.no_grad(), self._collecting(), _observed(self._leaves, records):
            output = self.stage.forward(x)
            loss, g = self.criterion(output, target, self.criterion.divisor(output, target))
            records.append(_record("loss", "loss", self.criterion.loss, _headline(self.criterion.loss), loss))
            records.append(
                _record("backward", "loss", self.criterion.loss, "dL/dy, the gradient that starts", g)
            )
            self.stage.backward(g)
        yield from records


@contextmanager
def _observed(stages: Sequence[Stage], records: list[Record]) -> Iterator[None]:
    """Note what every stage makes, on its way forwards and backwards."""

    def observe(
        stage: Stage, direction: str, run: Callable[..., Tensor | None]
    ) -> Callable[..., Tensor | None]:
        def observed(*arguments: Any) -> Tensor | None:
            made = run(*arguments)
            formula = _headline(stage.layer) if direction == "forward" else _derivation(stage.layer)
            records.append(_record(direction, stage.path, stage.layer, formula, made))
            return made

        return observed

    for stage in stages:
        stage.forward = observe(stage, "forward", stage.forward)  # type: ignore[method-assign,assignment]
        stage.backward = observe(stage, "backward", stage.backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for stage in stages:
            del stage.forward, stage.backward


def _record(direction: str, path: str, layer: Module, formula: str, made: Tensor | None) -> Record:
    shape = () if made is None else tuple(made.shape)
    norm = 0.0 if made is None else made.detach().double().norm().item()
    return Record(direction, path, type(layer).__name__, formula, shape, norm)
