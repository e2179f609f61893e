"""The ways of running a step.  Each is called on inputs and targets, makes one update, and returns loss and output.

================  ==================================================================================================
:class:`Plain`     the stages forwards and backwards, each update folded into the product that makes its gradient
:class:`Repeated`  the same for further small inputs of one shape: buffers and views are reused
:class:`Compiled`  forward and backward pass as one compiled graph, then the folded updates
:class:`WholeStep`     forward pass, backward pass and update as one graph: compiled, or captured on a GPU
:class:`Collected`  gradients first, then the update: for pieces, for tied weights, or for any optimizer
================  ==================================================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from manualprop._backprop._criterion import Evaluated
from manualprop._backprop._destinations import FACTORS, Factors, Guarded
from manualprop._backprop._graph import Body, Graphs, Hyperparameters, rehearse, undone, with_tensors
from manualprop._backprop._plan import Collection, Plan
from manualprop._backprop._stages import Activation, Affine, Backward, Forward, chain_of
from manualprop._splitting import check_splittable, is_sum
from manualprop._torch import InferenceMode

Way = Callable[[Tensor, Tensor], tuple[float, Tensor]]

# What a layer's setting may be, such as the eps of a norm.
SETTING = (bool, int, float, str, tuple, type(None))

# The most elements kept from step to step.  For larger models the cost of making tensors is negligible.
KEPT = 2**20


class Plain:
    """Forward propagation, loss, and backward propagation with the updates folded in."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        with torch.inference_mode():
            output, loss, _ = self.plan.propagate(x, target)
        return loss, output


# ----- steps on inputs of one shape -----


def repeated(plan: Plan, output: Tensor, target: Tensor) -> Repeated | None:
    """The way for further inputs of the last shape; None if it would keep too many elements.

    Args:
        plan: the plan, after a plain step.
        output: the output of that step.
        target: the target of that step.
    """
    chain = chain_of(plan.stage)
    if sum(stage.kept() for stage in chain) > KEPT:
        return None
    ways = [stage.repeated() for stage in chain]
    first = next(i for i, stage in enumerate(chain) if stage.learns)
    forwards = [forward for forward, _ in ways]
    backwards = [backward for _, backward in reversed(ways[first:])]
    return Repeated(plan, forwards, backwards, plan.criterion.repeated(output, target))


class Repeated:
    """A list of functions to call, which reuse their buffers.  The output is always a new tensor."""

    def __init__(
        self, plan: Plan, forwards: list[Forward], backwards: list[Backward], evaluate: Evaluated
    ) -> None:
        self.plan, self.forwards, self.backwards, self.evaluate = plan, forwards, backwards, evaluate

    def __call__(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        with InferenceMode(True):  # the same as torch.inference_mode, at half the cost
            y = x
            for forward in self.forwards:
                y = forward(y)
            loss, g = self.evaluate(y, target)
            if not math.isfinite(loss):
                self.plan.refuse(loss, x, target)
            for backward in self.backwards:
                g = backward(g)  # type: ignore[assignment]  # None only from the first stage that learns
        return loss, y


# ----- the whole as one graph -----


class Graphed:
    """Runs the parts of a step as graphs, one for each shape and mode."""

    updates_too = False  # whether a graph makes the update, and so holds the momentum buffers

    def __init__(self, plan: Plan, graphs: Graphs) -> None:
        self.plan, self.graphs, self.modules = plan, graphs, list(plan.model.modules())
        others = [leaf.layer for leaf in plan.leaves if not isinstance(leaf, Affine | Activation)]
        self._set = [module for layer in others for module in layer.modules()]
        self.stand_ins: dict[Any, Tensor] = {}  # for momentum buffers that do not exist yet

    def graph(self, body: Body, form: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """``body(*inputs)``, run as a graph; ``form`` is part of the graph's key."""
        criterion = self.plan.criterion
        key = (body.__name__, form, self.settings())
        criterion.traced = True
        try:
            return self.graphs.run(body, key, inputs, self.changed, self.held())
        except RuntimeError:
            self._raise_as_steps(body, inputs)
            raise
        finally:
            criterion.traced = False

    def _raise_as_steps(self, body: Body, inputs: Sequence[Tensor]) -> None:
        """Raise the error that the step raises outside of a graph, if it does: it says more."""
        self.plan.criterion.traced = False
        with undone(self.changed()):
            rehearse(body, inputs)

    def finite(self, loss: Tensor, x: Tensor, target: Tensor) -> float:
        """The loss as a number; raises if it is not finite, or for a class that does not exist."""
        value = loss.item()
        if not math.isfinite(value):
            self._raise_as_steps(self.gradients, [x, target])
            self.plan.refuse(value, x, target)
        return value

    def settings(self) -> Any:
        """What a graph has as constants: the modes of all modules, and the settings of the layers that may change."""
        constants = [tuple(v for v in vars(m).values() if isinstance(v, SETTING)) for m in self._set]
        return *[module.training for module in self.modules], *constants

    def held(self) -> list[int]:
        """The memory of the tensors that a graph holds.  With other tensors it must be made again."""
        owners = [*self.modules, self.plan.criterion.loss]
        tensors = [b for owner in owners for b in owner._buffers.values() if b is not None]
        if self.updates_too and any(group["momentum"] for group in self.plan.groups):
            tensors += [b for b in self._momentum().values() if b is not None]
        return [tensor.data_ptr() for tensor in tensors]

    def _momentum(self) -> dict[Any, Tensor | None]:
        """The momentum buffers of the parameters that learn; None, or what stands in, for one that does not exist."""
        return {
            p: self.stand_ins.get(p) if (buffer := d.buffer) is None else buffer
            for p, d in self.plan.descend.items()
        }

    def changed(self) -> list[Tensor]:
        """The tensors that a step changes in place.

        Raises:
            TypeError: for a batch norm whose statistics are those of all batches: a graph cannot read their number.
        """
        plan = self.plan
        for leaf in plan.leaves:
            for layer in leaf.layer.modules():
                if layer.training and getattr(layer, "momentum", 0) is None and layer.track_running_stats:
                    raise TypeError(_refused(leaf.path, layer))
        buffers = self._momentum().values()
        return [*plan.parameters, *plan.model.buffers(), *(b for b in buffers if b is not None)]

    def gradients(self, x: Tensor, target: Tensor, divide: bool = True) -> tuple[Tensor, ...]:
        """Loss, divisor, output, and the gradient of every parameter that learns."""
        plan = self.plan
        with plan.collecting() as to:
            output = plan.stage.forward(x)
            loss, divisor, g = plan.criterion(output, target, divide)
            plan.stage.backward(g)
        divisor = divisor if isinstance(divisor, Tensor) else loss.new_full((), divisor)
        return loss, divisor, output, *[destination.made for destination in to.values()]

    def sums(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """The same, for the loss summed over the examples."""
        return self.gradients(x, target, divide=False)

    def updates(
        self, x: Tensor, target: Tensor, numbers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Guarded]]:
        """Loss, output, and the update of every parameter, which is not made yet."""
        plan = self.plan
        groups = dict(zip(map(id, plan.groups), with_tensors(plan.groups, numbers), strict=True))
        loss, _, output, *gradients = self.gradients(x, target)
        updates, momentum = [], self._momentum()
        for (p, destination), gradient in zip(plan.descend.items(), gradients, strict=True):
            updates.append(Guarded(p, groups[id(destination.group)], momentum[p]))
            updates[-1].take(gradient)
        return loss, output, updates


def _refused(path: str, layer: Module) -> str:
    return (
        f"Backprop: layer {path or 'model'!r} ({type(layer).__name__}) must have a momentum to be part of a graph. Got "
        "momentum=None, where each batch has a weight of its own. Use compile=False and capture=False."
    )


class WholeStep(Graphed):
    """One graph of forward pass, backward pass and update: compiled for small networks, or captured on a GPU."""

    updates_too = True

    def __init__(self, plan: Plan, graphs: Graphs) -> None:
        super().__init__(plan, graphs)
        self.numbers = Hyperparameters(plan.parameters[0].device)

    def __call__(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        form, numbers = self.numbers.of(self.plan.groups)
        found, output = self.graph(self._step, form, [x, target, *numbers])
        torch.autograd.graph.increment_version(self.plan.learning)  # autograd does not see the graph's writes
        return self.finite(found, x, target), output

    def _step(self, x: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        """Loss and output; each weight is changed only if the loss is finite."""
        loss, output, updates = self.updates(x, target, numbers)
        finite = loss.isfinite()
        for update in updates:
            update.commit(finite)
        return loss, output


class Compiled(Graphed):
    """Forward and backward pass as one compiled graph; then the updates, each folded into its product."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        plan = self.plan
        loss, output, *made = self.graph(self._factors, None, [x, target])
        value = self.finite(loss, x, target)
        given = iter(made)
        with torch.no_grad():
            for destination, method in zip(plan.descend.values(), self.methods, strict=True):
                getattr(destination, method)(*itertools.islice(given, FACTORS[method]))
        return value, output

    def _factors(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Loss, output, and the factors of the gradients."""
        plan = self.plan
        to = {p: Factors(p) for p in plan.learning}
        with plan.sending(to):
            output = plan.stage.forward(x)
            loss, _, g = plan.criterion(output, target)
            plan.stage.backward(g)
        self.methods = [factors.method for factors in to.values()]  # the same for all shapes
        return loss, output, *[factor for factors in to.values() for factor in factors.made]


# ----- gradients first, update after -----


class Collected:
    """The gradients of the whole update, then the update.  If there are graphs, each piece is one."""

    def __init__(self, plan: Plan, graphs: Graphs | None) -> None:
        self.plan, self.graphed = plan, None if graphs is None else Graphed(plan, graphs)
        self.output = torch.empty(0)

    def __call__(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        size = self.plan.micro
        whole = size is None or size >= len(x)
        with torch.no_grad():
            pieces = [(x, target)] if whole else list(zip(x.split(size), target.split(size), strict=True))
            with self.plan.collecting() as to:
                loss = self._accumulate(pieces, to)
            self._update(to)
        output, self.output = self.output, torch.empty(0)
        return loss, output

    def _accumulate(self, pieces: Sequence[tuple[Tensor, Tensor]], to: Collection) -> float:
        """Collect the gradient of the whole update from pieces: sums and divisors add up, means do not."""
        if len(pieces) == 1:
            return self._collect(*pieces[0], to, divide=True)[0]
        loss = self.plan.criterion.loss
        check_splittable(loss, self.plan.model)
        sums = [self._collect(x, t, to, divide=False) for x, t in pieces]
        total, divisor = (math.fsum(column) for column in zip(*sums, strict=True))
        if is_sum(loss):
            return total
        if not divisor:
            self.plan.refuse(math.nan, *pieces[0])
        for destination in to.values():
            destination.made.div_(divisor)
        return total / divisor

    def _collect(self, x: Tensor, target: Tensor, to: Collection, divide: bool) -> tuple[float, float]:
        """Loss and divisor of a piece; its gradients go into the collection."""
        graphed = self.graphed
        if graphed is None:
            self.output, value, its = self.plan.propagate(x, target, divide)
            return value, float(its)
        body = graphed.gradients if divide else graphed.sums
        loss, divisor, self.output, *gradients = graphed.graph(body, None, [x, target])
        value = graphed.finite(loss, x, target)
        for destination, gradient in zip(to.values(), gradients, strict=True):
            destination.take(gradient.clone() if graphed.graphs.capture else gradient)
        return value, divisor.item()

    def _update(self, to: Collection) -> None:
        """Make the update from the collected gradients."""
        plan = self.plan
        if plan.folds:
            for parameter, destination in to.items():
                plan.descend[parameter].take(destination.made)
            return
        for parameter, destination in to.items():
            parameter.grad = destination.made
        plan.descent.clip_gradients(plan.learning)
        plan.optimizer.step()
