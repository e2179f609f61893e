"""Stages, one for each layer of a model: forward propagation and backward propagation, written out.

Symbols
    x   input of a layer        g   dL/dy, the gradient that arrives
    y   its output              dx  dL/dx, the gradient for the layer before
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from manualprop import functions as rules
from manualprop import nn
from manualprop._backprop._context import Application, Context, applications
from manualprop._backprop._destinations import Destinations
from manualprop.functions import Elementwise
from manualprop.functions._execution import LARGE, Runner
from manualprop.functions._execution._products import (
    FEW,
    bias_gradient_of_few,
    input_gradient_into,
    multiply_and_add_into,
)
from manualprop.functions.linear import rows
from manualprop.nn.fusing import KEPT_ANYWAY, activation_name, match, runs

Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor], "Tensor | None"]


class Stage:
    """A layer of the step.  ``forward`` keeps what ``backward`` needs, and ``backward`` frees it."""

    def __init__(self, path: str, layer: Module) -> None:
        self.path, self.layer = path, layer
        self.needs_dx = True  # whether a layer before it learns
        self.learns = False  # whether it learns itself
        self.owns_x = False  # whether no one else uses the input, so that it may be overwritten
        self.owns_g = False  # whether no one else uses the arriving gradient, so that it may be overwritten

    def parameters(self) -> list[Parameter]:
        """The parameters that this stage trains."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, g: Tensor) -> Tensor | None:
        """Pass the parameters' gradients to their destinations; return dx, or None if no layer needs it."""
        raise NotImplementedError

    def stages(self) -> Iterator[Stage]:
        """This stage and its inner stages."""
        yield self

    def need(self, before: bool) -> bool:
        """Set ``needs_dx`` from whether a layer before learns; return whether any layer up to here learns."""
        self.needs_dx = before
        self.learns = bool(self.parameters())
        return before or self.learns

    def bind(self) -> None:
        """Look up the layer's parameters; outside of a graph's tracing, which replaces them."""

    def send(self, to: Destinations) -> None:
        """Set where the gradients of the parameters go."""
        self.to = to

    def kept(self) -> int:
        """The number of elements that ``repeated`` keeps from step to step."""
        return 0

    def repeated(self) -> tuple[Forward, Backward]:
        """Forward and backward propagation for further inputs of the same shape as the last."""
        return self.forward, self.backward


multiply_and_add = rules.Linear.forward
input_gradient, bias_gradient = rules.Linear.input_gradient, rules.Linear.bias_gradient


class Affine(Stage):
    """Multiply by the weights, add the biases: :class:`manualprop.nn.Linear`."""

    is_last = False  # the last Affine: y may be the model's output, which the caller may keep

    def bind(self) -> None:
        # Looked up once: to read a parameter from a module costs as much as a small product.
        W: Any = self.layer.weight
        b: Any = self.layer.bias
        self.W, self.b = W.detach(), None if b is None else b.detach()

    def send(self, to: Destinations) -> None:
        W: Any = self.layer.weight
        b: Any = self.layer.bias
        self.W_to, self.b_to = to.get(W), None if b is None else to.get(b)

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        self.shape: torch.Size = x.shape
        return multiply_and_add(x, self.W, self.b)

    def backward(self, g: Tensor) -> Tensor | None:
        x = self.x
        del self.x
        dx = input_gradient(g, self.W) if self.needs_dx else None
        if self.W_to is not None:  # after dx: the update may be folded in
            self.W_to.take_weight(rows(g).t(), rows(x))
        if self.b_to is not None:
            self.b_to.take_bias(self._bias_gradient(g))
        return dx

    def _bias_gradient(self, g: Tensor) -> Tensor:
        """Bit-identical to ``repeated``, so that a resumed run equals an uninterrupted one."""
        g = rows(g)
        N, O = g.shape
        return (
            bias_gradient_of_few(g.t(), g.new_ones(N), g.new_empty(O)) if 1 < N <= FEW else bias_gradient(g)
        )

    def kept(self) -> int:
        elements: int = self.shape[:-1].numel() * sum(self.W.shape)
        return elements

    def repeated(self) -> tuple[Forward, Backward]:
        """Buffers and views are made once and reused: making one costs as much as a small product."""
        if len(self.shape) != 2:
            return self.forward, self.backward
        W, W_to, b_to, needs_dx = self.W, self.W_to, self.b_to, self.needs_dx
        N, (O, I) = self.shape[0], W.shape
        few = N <= FEW
        W_t, ones, zero = W.t(), W.new_ones(N), W.new_zeros(())
        b = (zero if self.b is None else self.b).expand(N, O)
        y = None if self.is_last else W.new_empty(N, O)
        dx = W.new_empty(N, I) if needs_dx else None
        kept = last_g = g_t = only_row = zero
        db = W.new_empty(O)

        def forward(x: Tensor) -> Tensor:
            nonlocal kept
            kept = x
            return multiply_and_add_into(y, x, W_t, b)

        def backward(g: Tensor) -> Tensor | None:
            nonlocal last_g, g_t, only_row
            if g is not last_g:  # usually the same buffer: the stage that made g reuses its buffers too
                last_g, g_t, only_row = g, g.t(), g[0]
            if dx is not None:
                input_gradient_into(dx, g, W)
            if W_to is not None:  # after dx: the update may be folded in
                W_to.take_weight(g_t, kept)
            if b_to is not None:
                b_to.take_bias(
                    only_row if N == 1 else bias_gradient_of_few(g_t, ones, db) if few else bias_gradient(g)
                )
            return dx

        return forward, backward


# In-place forms of the activations whose derivative is written in the output.
IN_PLACE: Mapping[type[Elementwise], Callable[[Tensor], Tensor]] = {
    rules.ReLU: torch.relu_,
    rules.Sigmoid: torch.sigmoid_,
    rules.Tanh: torch.tanh_,
}


class Activation(Stage):
    """Activate: any elementwise rule."""

    def __init__(self, path: str, layer: Module, rule: type[Elementwise], p: tuple[Any, ...]) -> None:
        super().__init__(path, layer)
        self.rule, self.p, self.saves_output = rule, p, rule.saves == "output"
        self.chain_rule: Runner = rule.chain.product

    def forward(self, x: Tensor) -> Tensor:
        y = self.rule.f(x, *self.p)
        self.s = y if self.saves_output else x
        self.is_small = x.numel() < LARGE
        return y

    def backward(self, g: Tensor) -> Tensor | None:
        s = self.s
        del self.s
        if not self.needs_dx:
            return None
        dx: Tensor = self.chain_rule(g, s, *self.p, over=0 if self.owns_g else None)
        return dx

    def repeated(self) -> tuple[Forward, Backward]:
        if not (self.is_small and self.owns_g and self.needs_dx):
            return self.forward, self.backward
        p, saves_output, chain_rule = self.p, self.saves_output, self.chain_rule
        of_one = self.rule.f
        f = (lambda x: of_one(x, *p)) if p else of_one
        if self.owns_x:
            f = IN_PLACE.get(self.rule, f)
        s: Any = None
        program: Any = None

        def forward(x: Tensor) -> Tensor:
            nonlocal s
            y = f(x)
            s = y if saves_output else x
            return y

        def backward(g: Tensor) -> Tensor:
            nonlocal program
            if program is None:  # looked up once: a lookup costs as much as one of its operations
                program = chain_rule.program((g, s), p, over=0).run
            dx: Tensor = program(g, s)
            return dx

        return forward, backward


class Applied(Stage):
    """Any other layer whose forward is one application of one rule: norms, softmax, PReLU, dropout ..."""

    def forward(self, x: Tensor) -> Tensor:
        y, found = applications(self.layer.forward, x)
        # Dropout in evaluation returns its input itself.
        self.application = None if y is x else the_one(found, x, y, self.path, self.layer)
        self.again = None if y is x else self._again(found[0], x)
        return y

    def backward(self, g: Tensor) -> Tensor | None:
        application = self.application
        self.application = None
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
        """Ask the rule only for the gradients that are needed."""
        application.context.needs_input_grad = tuple(
            argument in self.to if isinstance(argument, Parameter) else needed and self.needs_dx
            for argument, needed in zip(
                application.arguments, application.context.needs_input_grad, strict=True
            )
        )

    def _again(self, application: Application, x: Tensor) -> tuple[type[rules.Rule], tuple[Any, ...]] | None:
        """The rule and its arguments behind x, if they are the same for any x of this shape; otherwise None.

        They are if all that the layer gives its rule are settings and parameters, and if it has no buffers to change.
        """
        first, *behind = application.arguments
        may_change = [*self.layer.buffers(), *self.layer.children()]
        drawn = [
            a for a in behind if isinstance(a, Tensor) and not isinstance(a, Parameter)
        ]  # random numbers
        if first is not x or may_change or drawn:
            return None
        return application.rule, tuple(behind)

    def repeated(self) -> tuple[Forward, Backward]:
        """The rule without its layer, while that keeps its settings: 0.9 of the time of a small convnet."""
        if self.again is None:
            return self.forward, self.backward
        rule, behind = self.again
        present, settings = vars(self.layer), dict(vars(self.layer))
        taken = [
            (i, self.to[a]) for i, a in enumerate(behind, 1) if isinstance(a, Parameter) and a in self.to
        ]
        places = {i for i, _ in taken}
        context = Context((self.needs_dx, *[i in places for i in range(1, 1 + len(behind))]))
        application: Any = None

        def forward(x: Tensor) -> Tensor:
            nonlocal application
            if present != settings:
                application = None
                return self.forward(x)
            output = rule.forward(x, *behind)
            rule.setup_context(context, (x, *behind), output)
            application = Application(rule, (x, *behind), output, context)
            y: Tensor = output[0] if isinstance(output, tuple) else output
            return y

        def backward(g: Tensor) -> Tensor | None:
            nonlocal application
            if application is None:
                return self.backward(g)
            found = application.backward(g)
            application, context.saved_tensors = None, ()
            for i, destination in taken:
                destination.take(found[i])
            dx: Tensor | None = found[0]
            return dx

        return forward, backward


def the_one(found: list[Application], x: Tensor, y: Tensor, path: str, layer: Module) -> Application:
    """The single application that leads from x to y; raises for anything else."""
    if len(found) == 1:
        first = found[0].output[0] if isinstance(found[0].output, tuple) else found[0].output
        if first is y and sum(a is x for a in found[0].arguments) == 1:
            return found[0]
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        names = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}
        way_out = f"Give it padding=0, and put the nn.{names[mode]} of manualprop.nn before it"
        raise TypeError(refusal(path, layer, f"it pads by {mode!r}, which is a layer of its own", way_out))
    raise TypeError(refusal(path, layer, "its forward is more than one application of one rule"))


class Reshaped(Stage):
    """Flatten and Unflatten: the gradient gets the input's shape."""

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
        for stage, after in itertools.pairwise(chain):
            stage.owns_g = isinstance(after, Affine)  # its dx is a new tensor
            after.owns_x = isinstance(stage, Affine)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.chain:
            x = stage.forward(x)
        return x

    def backward(self, g: Tensor) -> Tensor | None:
        dx: Tensor | None = g
        for stage in reversed(self.chain):
            if dx is None:  # no layer before learns
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
        self.learns = any(stage.learns for stage in self.chain)
        return before


class Added(Stage):
    """Branches from one input with added outputs: each branch gets g, and their dx are added."""

    def __init__(self, path: str, layer: Module, branches: Sequence[Stage], skip: bool) -> None:
        super().__init__(path, layer)
        self.branches, self.skip = branches, skip
        if skip or len(branches) > 1:
            for branch in branches:
                _refuse_writing(branch)

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
        for branch in self.branches:
            branch.need(before)
        self.learns = any(branch.learns for branch in self.branches)
        return before or self.learns


def _refuse_writing(branch: Stage) -> None:
    """Raise if the branch writes over its input, which others read as well."""
    for first in chain_of(branch):
        layer = first.layer[0] if isinstance(first.layer, FusedLayers) else first.layer
        if getattr(layer, "inplace", False):
            why = "it writes over its input, which is also read beside its branch"
            raise TypeError(refusal(first.path, layer, why, "Give it inplace=False"))
        if not isinstance(first, Reshaped):  # its output is its input, in another shape
            return


def chain_of(stage: Stage) -> list[Stage]:
    """The stages in the order of execution, with nested chains flattened."""
    if isinstance(stage, Chained):
        return [inner for within in stage.chain for inner in chain_of(within)]
    return [stage]


# ----- from a model to its stages -----

WAY_OUT = "Train this model with autograd, where the same modules work, or give it layers of manualprop.nn"


def refusal(path: str, layer: Module, why: str, way_out: str = WAY_OUT) -> str:
    """The error text for a layer: which, where, why, and what to do."""
    return f"Backprop: layer {path or 'model'!r} ({type(layer).__name__}) cannot be run without a tape: {why}. {way_out}."


def build(layer: Module, path: str = "") -> Stage:
    """The stage of a layer, with the stages of its inner layers.

    Raises:
        TypeError: for a layer without a stage.
    """
    if isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin):
        raise TypeError(refusal(path, layer, "it has no parameters yet", "Call the model on an input first"))
    _refuse_hooks(layer, path)
    kind = type(layer)
    if kind.forward is nn.Sequential.forward:
        return Chained(path, layer, _within(layer, path))
    if isinstance(layer, nn.FusedSequential | nn.FusedResidual):
        chain = Chained(path, layer, _fused_within(layer, path))
        return Added(path, layer, [chain], skip=True) if kind is nn.FusedResidual else chain
    if kind is nn.Residual:
        return Added(path, layer, [Chained(path, layer, _within(layer, path))], skip=True)
    if kind is nn.Parallel:
        return Added(path, layer, _within(layer, path), skip=False)
    if kind in (nn.Identity, torch.nn.Identity):
        return Chained(path, layer, [])
    if kind in (nn.Flatten, torch.nn.Flatten, nn.Unflatten, torch.nn.Unflatten):
        return Reshaped(path, layer)
    if kind is torch.nn.Dropout:
        return Dropped(path, layer)
    if kind is nn.Linear:
        return Affine(path, layer)
    if kind.__module__.startswith("manualprop.nn."):
        return _activation(layer, path) or Applied(path, layer)
    if kind.__module__.startswith("torch.nn.") and hasattr(nn, kind.__name__):
        raise TypeError(refusal(path, layer, "it is torch's; call manualprop.swap(model) first"))
    if next(layer.children(), None) is not None:
        raise TypeError(
            refusal(
                path,
                layer,
                "its forward is Python code of its own, which is not read",
                "Train this model with autograd, where the same modules work, or write it as nn.Sequential of its "
                "layers, with nn.Residual and nn.Parallel of manualprop.nn for branches",
            )
        )
    raise TypeError(refusal(path, layer, "its forward is not known here"))


def _within(layer: Module, path: str) -> list[Stage]:
    # Not named_children: it names a layer that is used twice only once.
    within = [(name, child) for name, child in layer._modules.items() if child is not None]
    return [build(child, f"{path}.{name}" if path else name) for name, child in within]


def _fused_within(layer: torch.nn.Sequential, path: str) -> list[Stage]:
    """A stage for each run of layers that are one rule, and for each other layer."""
    children = {name: child for name, child in layer._modules.items() if child is not None}
    following = {first: rest for first, *rest in runs(layer)}
    within: list[Stage] = []
    names = iter(children)
    for name in names:
        inner = f"{path}.{name}" if path else name
        if name not in following:
            within.append(build(children[name], inner))
            continue
        run = {n: children[n] for n in (name, *(next(names) for _ in following[name]))}
        for part in run.values():
            _refuse_hooks(part, inner)
        within += _run_within(run, path)
    return within


def _run_within(run: Mapping[str, Module], path: str) -> list[Stage]:
    """The stages of layers that run as one: a linear layer of its own, if the activation is kept for it anyway."""
    *before, last = run
    first = next(iter(run))
    inner = f"{path}.{first}" if path else first
    if activation_name(run[first]) not in KEPT_ANYWAY or last == first:
        return [Applied(inner, FusedLayers(*run.values()))]
    if match([run[name] for name in before]):
        head: list[Stage] = [Applied(inner, FusedLayers(*(run[name] for name in before)))]
    else:
        head = [build(run[name], f"{path}.{name}" if path else name) for name in before]
    return [*head, build(run[last], f"{path}.{last}" if path else last)]


class FusedLayers(nn.FusedSequential):
    """Layers that run as one, also if the first would write over its input: that is new here."""

    def forward(self, input: Tensor) -> Tensor:
        found = match(list(self))
        return super().forward(input) if found is None else found.call(input)


def hooks_of(modules: Iterable[Module]) -> list[Mapping[int, Any]]:
    """The hooks of modules.  A module with hooks is refused."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for module in modules for name in names]


def read_once(leaves: Sequence[Stage]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes of each layer that is read only once, and a copy of them as they are now."""
    read = [vars(leaf.layer) for leaf in leaves if isinstance(leaf, Activation)]
    plain = vars(Module()).keys()
    return [(present, dict(present)) for present in read if present.keys() > plain]


def _refuse_hooks(layer: Module, path: str) -> None:
    if any(hooks_of([layer])):
        raise TypeError(refusal(path, layer, "it has hooks, which would not be called"))
    for name, p in layer.named_parameters(recurse=False):
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise TypeError(refusal(path, layer, f"its {name} has hooks, which would not be called"))


def _activation(layer: Module, path: str) -> Stage | None:
    """The stage of an elementwise activation, whose rule and parameters do not depend on the input."""
    if next(layer.parameters(), None) is not None:
        return None
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            _, found = applications(copy.copy(layer).forward, torch.ones(2, 2))
    except (RuntimeError, ValueError, IndexError):  # it does not take every shape, so it is not elementwise
        return None
    finally:
        torch.set_rng_state(state)
    if len(found) != 1 or not issubclass(found[0].rule, Elementwise):
        return None
    _, *p = found[0].arguments
    return Activation(path, layer, found[0].rule, tuple(p))
