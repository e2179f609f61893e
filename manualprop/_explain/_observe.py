"""One step of a real model, observed: what every layer is given, what it makes, and the gradients that come back.

A copy of the model runs, so the user's own stays as it is.  :class:`manualprop.Backprop` runs the copy where it can:
its stages are the hand-derived formulas, and nothing else computes a number that is shown.  Any other model runs under
autograd with hooks, and says which of its gradients are not by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from manualprop import functions as rules
from manualprop import nn
from manualprop._backprop import Backprop
from manualprop._backprop._stages import Activation, Affine, Applied, Dropped, Stage, build
from manualprop._backprop._trace import rule_named_as
from manualprop._splitting import compares_elements, denominator, gradient
from manualprop.descent import Descent
from manualprop.functions import Rule

AFFINE, ACTIVATION, OTHER = "affine", "activation", "other"


@dataclass(frozen=True)
class Weight:
    """A parameter: its name in the model, its numbers, its gradient, and what the update adds to it.

    ``gradient`` and ``change`` are None where it does not learn.
    """

    name: str
    value: Tensor
    gradient: Tensor | None
    change: Tensor | None


@dataclass
class Layer:
    """One call of a layer.

    Args:
        path: in the model.
        module: the layer.
        kind: "affine", "activation" or "other".
        rule: that computes it, where there is one.
        p: parameters of an activation, after its input.
        by_hand: whether its gradients are this package's formulas.
        x: its input.
        y: its output.
        g: gradient of the loss with respect to y; None where nothing before it learns.
        dx: with respect to x; None likewise.
        weights: its parameters.
        mask: what dropout multiplied each number of x by, if it drew.
    """

    path: str
    module: Module
    kind: str
    rule: type[Rule] | None
    p: tuple[Any, ...]
    by_hand: bool
    x: Tensor
    y: Tensor
    g: Tensor | None = None
    dx: Tensor | None = None
    weights: list[Weight] = field(default_factory=list)
    mask: Tensor | None = None

    @property
    def name(self) -> str:
        """Its class."""
        return type(self.module).__name__


@dataclass
class Observation:
    """What one step makes.

    Args:
        layers: in the order of their work.
        loose: parameters that belong to no layer that was called.
        output: of the model.
        target: of the examples.
        losses: of the single examples or elements; None for a loss that cannot tell.
        loss: the one number.
        divisor: what the mean of the loss divides by; None for a loss that cannot tell.
        g: gradient of the loss with respect to the output.
    """

    layers: list[Layer]
    loose: list[Weight]
    output: Tensor
    target: Tensor
    losses: Tensor | None
    loss: float
    divisor: float | None
    g: Tensor

    def weights(self) -> Iterator[Weight]:
        """All parameters, each once."""
        seen = set()
        for weight in [w for layer in self.layers for w in layer.weights] + self.loose:
            if weight.name not in seen:
                seen.add(weight.name)
                yield weight


class Trainee:
    """A copy of a model with a loss and a descent, which observations and updates may change.

    Args:
        model: is left as it is.
        loss: called on (output, target).
        descent: that makes the updates.
        seed: of dropout and the like.

    Attributes:
        why: why autograd runs the model; "" where its own formulas do, layer by layer.
    """

    def __init__(self, model: Module, loss: Module, descent: Descent, seed: int = 0) -> None:
        self.model, self.loss, self.descent, self.seed = (
            copy.deepcopy(model),
            copy.deepcopy(loss),
            descent,
            seed,
        )
        self.step: Backprop | None = None
        self.why, self.made = "", 0
        try:
            self.step = Backprop(self.model, self.loss, descent)
        except TypeError as error:
            self._turn_to_autograd(str(error))
        else:
            self.optimizer, self.lr_scheduler = self.step.optimizer, self.step.lr_scheduler

    def _turn_to_autograd(self, why: str) -> None:
        self.step, self.why = None, why.removeprefix("Backprop: ")
        learning = [p for p in self.model.parameters() if p.requires_grad]
        if not learning:
            raise ValueError(
                "explain: the model must have a parameter that requires a gradient. Got none; set requires_grad."
            )
        self.optimizer = self.descent.make_optimizer(learning)
        self.lr_scheduler = self.descent.make_lr_scheduler(self.optimizer)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Within, random layers draw what they draw in this update, and the user's generator is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.made)
            yield

    def update(self, x: Tensor, target: Tensor) -> float:
        """Make one update; return the loss before it."""
        with self._drawing():
            self.made += 1
            return self._update(x, target)

    def _update(self, x: Tensor, target: Tensor) -> float:
        if self.step is not None:
            return self.step(x, target)
        self.optimizer.zero_grad()
        value = gradient(self.model, self.loss, [(x, target)])
        self.descent.clip_gradients(self.model.parameters())
        self.optimizer.step()
        if self.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update":
            self.lr_scheduler.step()
        return value

    def rehearse(self, x: Tensor, target: Tensor) -> None:
        """Refuse what does not fit together, in one line.

        Raises:
            TypeError: for a model that does not return one tensor, and a loss that is not one number.
            ValueError: for inputs that the model cannot take, and targets that the loss cannot take.
        """
        with self._kept(), self._drawing(), torch.no_grad():
            output = _attempt(lambda: self.model(x), f"the model must take inputs of {_described(x)}")
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"explain: the model must return one tensor. Got {type(output).__name__}; wrap it in a module that "
                    "returns the tensor to compare with the target."
                )
            if compares_elements(self.loss) and output.shape != target.shape:
                raise ValueError(
                    f"explain: {type(self.loss).__name__} must be given an output and a target of one shape. Got "
                    f"{tuple(output.shape)} and {tuple(target.shape)}; reshape the target, or choose another loss."
                )
            what = f"the loss must take an output of {_described(output)} and targets of {_described(target)}"
            loss = _attempt(lambda: self.loss(output, target), what)
            if not isinstance(loss, Tensor) or loss.dim():
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"explain: the loss must be one number. Got {got}; use reduction='mean'.")
        self.settle(x, target)

    def settle(self, x: Tensor, target: Tensor) -> None:
        """Turn to autograd if a layer or the loss is refused at the sight of data."""
        if self.step is None:
            return
        why = ""
        with self._kept(), self._drawing():
            try:
                self.step.gradients(x, target)
            except FloatingPointError:  # which the diagnosis tells
                pass
            except (
                TypeError,
                ValueError,
                RuntimeError,
            ) as error:  # the model and the loss have run: it is the step
                why = str(error)
        if why:
            self._turn_to_autograd(why)

    def gradient(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the gradient of every parameter that learns, as one vector."""
        with self._drawing():
            if self.step is not None:
                found = self.step.gradients(x, target)
            else:
                self.optimizer.zero_grad()
                gradient(self.model, self.loss, [(x, target)])
                found = {
                    name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
                }
                self.optimizer.zero_grad()
        return torch.cat(
            [
                found.get(name, torch.zeros_like(p)).reshape(-1)
                for name, p in self.model.named_parameters()
                if p.requires_grad
            ]
        )

    def observe(self, x: Tensor, target: Tensor) -> Observation:
        """Observe the step from here, its update included; weights and optimizer are then as before."""
        with self._kept(), self._drawing():
            if self.step is not None:
                found, gradients = self._by_hand(self.step, x, target)
            else:
                found, gradients = self._by_autograd(x, target)
        with self._kept(), self._drawing():
            changes = self._changes(x, target)
        self._hand_out(found, gradients, changes)
        return found

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Within, everything may change; afterwards it is as before."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        values = [t.detach().clone() for t in tensors]
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        schedule = None if self.lr_scheduler is None else copy.deepcopy(self.lr_scheduler.state_dict())
        try:
            yield
        finally:
            with torch.no_grad():
                for t, value in zip(tensors, values, strict=True):
                    t.copy_(value)
            self.optimizer.load_state_dict(optimizer)
            if self.lr_scheduler is not None and schedule is not None:
                self.lr_scheduler.load_state_dict(schedule)

    def _changes(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the update adds to each parameter; nothing where the loss is not finite."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self._update(x, target)
        except FloatingPointError:
            pass
        return {name: p.detach() - before[name] for name, p in self.model.named_parameters()}

    # ----- by hand -----

    def _by_hand(self, step: Backprop, x: Tensor, target: Tensor) -> tuple[Observation, dict[str, Tensor]]:
        layers: dict[int, Layer] = {}

        def note(stage: Stage, direction: str, given: tuple[Any, ...], made: Tensor | None) -> None:
            if direction == "forward":
                assert made is not None
                kind, rule, p = described(stage)
                layers[id(stage)] = Layer(
                    stage.path, stage.layer, kind, rule, p, True, given[0], made.clone(), mask=_mask(stage)
                )
            else:
                layer = layers[id(stage)]
                layer.g, layer.dx = given[0], None if made is None else made.clone()

        seen = step.observe(x, target, note)
        losses = self._losses(seen.output, target)
        found = Observation(
            list(layers.values()), [], seen.output, target, losses, seen.loss.item(), seen.divisor, seen.g
        )
        return found, seen.gradients

    def _losses(self, output: Tensor, target: Tensor) -> Tensor | None:
        single = copy.copy(self.loss)
        if getattr(single, "reduction", None) is None:
            return None
        single.reduction = "none"  # type: ignore[assignment]
        with torch.no_grad():
            losses: Any = single(output, target)
        return losses if isinstance(losses, Tensor) and losses.dim() else None

    # ----- by autograd -----

    def _by_autograd(self, x: Tensor, target: Tensor) -> tuple[Observation, dict[str, Tensor]]:
        layers: list[Layer] = []
        arriving: list[Tensor] = []
        with torch.enable_grad(), hooked(self.model, layers):
            output = self.model(x)
            output.register_hook(lambda g: arriving.append(g.detach().clone()))
            loss = self.loss(output, target)
            self.model.zero_grad()
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        try:
            divisor: float | None = float(denominator(self.loss, output, target))
        except (TypeError, AttributeError, RuntimeError):
            divisor = None
        output = output.detach()
        losses = self._losses(output, target)
        g = arriving[0] if arriving else torch.zeros_like(output)
        return Observation(layers, [], output, target, losses, loss.item(), divisor, g), gradients

    # ----- parameters -----

    def _hand_out(self, found: Observation, gradients: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
        """Give each layer its parameters."""
        names = {p: name for name, p in self.model.named_parameters()}

        def weight(p: Parameter) -> Weight:
            name = names[p]
            gradient = gradients.get(name)
            if gradient is None and p.requires_grad:
                gradient = torch.zeros_like(p)  # no example reached it
            change = changes[name] if p.requires_grad else None
            return Weight(name, p.detach().clone(), gradient, change)

        owned = set()
        for layer in found.layers:
            own = list(layer.module.parameters())
            layer.weights = [weight(p) for p in own]
            owned.update(own)
        found.loose = [weight(p) for p in names if p not in owned]


def _attempt(call: Callable[[], Any], what: str) -> Any:
    """What ``call`` returns; in place of the user's own error, one that says what must hold."""
    try:
        return call()
    except Exception as error:  # the model and the loss are the user's
        text = " ".join(str(error).split())
        raise ValueError(f"explain: {what}. It raised {type(error).__name__}: {text}") from error


def _described(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}"


def described(stage: Stage) -> tuple[str, type[Rule] | None, tuple[Any, ...]]:
    """The kind of a stage's layer, its rule, and the parameters of that."""
    if isinstance(stage, Affine):
        return AFFINE, rules.Linear, ()
    if isinstance(stage, Activation):
        return ACTIVATION, stage.rule, stage.p
    if isinstance(stage, Applied):
        application = getattr(stage, "application", None)
        return OTHER, _by_name(stage.layer) if application is None else application.rule, ()
    return OTHER, _by_name(stage.layer), ()


def _mask(stage: Stage) -> Tensor | None:
    """What a stage of dropout has just multiplied its input by."""
    if isinstance(stage, Dropped):
        return stage.scale
    application = getattr(stage, "application", None)
    if application is None or application.rule is not rules.Dropout:
        return None
    x, *drawn = application.arguments
    return rules.Dropout.forward(torch.ones_like(x), *drawn)


def _by_name(layer: Module) -> type[Rule] | None:
    """The rule that has the name of a layer."""
    found = rule_named_as(layer)
    return found if isinstance(found, type) and issubclass(found, Rule) else None


def twin_stage(path: str, layer: Module) -> Stage | None:
    """The stage of a layer, or of our twin of torch's layer; None for anybody else's."""
    ours = type(layer)
    if ours.__module__.startswith("torch.nn.") and hasattr(nn, ours.__name__):
        layer = copy.copy(layer)
        layer.__class__ = getattr(nn, ours.__name__)  # which differs from torch's in its forward alone
    try:
        return build(layer, path)
    except TypeError:
        return None


@contextmanager
def hooked(model: Module, layers: list[Layer]) -> Iterator[None]:
    """Within, every call of a layer without layers in it is noted."""
    handles = []
    returned: list[tuple[Layer, list[Tensor]]] = []
    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            handles += _hooks(path, module, layers, returned)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, found in returned:
            layer.dx = found[0] if found else None


def _hooks(
    path: str, module: Module, layers: list[Layer], later: list[tuple[Layer, list[Tensor]]]
) -> list[Any]:
    stage = twin_stage(path, module)
    kind, rule, p = (OTHER, None, ()) if stage is None else described(stage)
    by_hand = type(module).__module__.startswith("manualprop.nn.")
    given: list[
        tuple[Tensor, list[Tensor]]
    ] = []  # of the call under way: its input, and the gradient of that

    def before(_: Module, inputs: tuple[Any, ...]) -> None:
        given.clear()
        x = next((one for one in inputs if isinstance(one, Tensor)), None)
        if x is not None:
            returned: list[Tensor] = []
            given.append((x.detach().clone(), returned))  # an in-place layer writes over it
            if x.requires_grad:
                x.register_hook(lambda dx: returned.append(dx.detach().clone()))

    def after(_: Module, inputs: tuple[Any, ...], output: Any) -> None:
        parts = output if isinstance(output, list | tuple) else [output]
        y = next((one for one in parts if isinstance(one, Tensor)), None)
        if y is None or not given:
            return
        x, returned = given[0]
        layer = Layer(path, module, kind, rule, p, by_hand, x, y.detach().clone())
        layers.append(layer)
        if y.requires_grad:

            def arrive(g: Tensor) -> None:
                layer.g = g.detach().clone()

            y.register_hook(arrive)
        later.append((layer, returned))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
