"""The tape-free step: forward propagation, backward propagation and update, written out, without autograd.

A :class:`Backprop` holds one stage for each layer.  A step runs the stages forwards, takes the gradient of the
loss, runs them backwards, and each stage hands the gradient of its parameters to where it is wanted: into the
parameter itself (the update, folded into the product that makes the gradient), or into a buffer.  The formulas are
those of :mod:`manualprop.functions`; none is written here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from manualprop._backprop._advice import data_at_fault
from manualprop._backprop._criterion import Criterion, Repeated
from manualprop._backprop._descend_op import Updates
from manualprop._backprop._destinations import Collect, Descend, Destinations, Factors, Guarded
from manualprop._backprop._graph import Body, Graphs, Hyperparameters, with_tensors
from manualprop._backprop._stages import Added, Affine, Backward, Chained, Forward, build, flat
from manualprop._backprop._trace import Note, Record, headline, record, recorder, watched
from manualprop.descent import Batch, Descent, Stochastic, check_splittable, is_sum

Collected = Mapping[Parameter, Collect]

# Elements kept from step to step, at most; with more, making tensors is nothing beside the work on them.
KEPT = 2**20


class Observed(NamedTuple):
    """What a step makes, as :meth:`Backprop.observe` saw it.

    - ``output``     of the model.
    - ``loss``       and ``divisor``, what its mean divides by.
    - ``g``          the gradient of the loss with respect to the output.
    - ``gradients``  of the parameters that learn, by name.
    """

    output: Tensor
    loss: Tensor
    divisor: float
    g: Tensor
    gradients: dict[str, Tensor]


class Backprop:
    """Train a model without a tape: one call is a forward pass, a backward pass and an update.

    The model is a :class:`torch.nn.Sequential`, nested as you like, of layers of :mod:`manualprop.nn` (and torch's
    Flatten, Unflatten, Identity and Dropout), with :class:`manualprop.nn.Residual` and
    :class:`manualprop.nn.Parallel` for branches.  Where the descent is plain or momentum gradient descent, the update
    is folded into the product that makes the gradient, and no gradient is ever stored.  After N steps the weights
    are those of torch.nn, autograd and the same optimizer, to rounding.  From the third step on inputs of one small
    shape, a step writes its tensors where the last one did (2^20 elements at most); never over an output.  Where
    somebody registered hooks of the optimizer's step, the gradients are handed to the optimizer, which calls them.

    Args:
        model: to be trained, in place.
        loss: of :mod:`manualprop.nn`, called on (output, target), with reduction "mean" or "sum".
        descent: of :mod:`manualprop.descent`: the update, and for Batch the size of the micro-batches. The rows of a
            call are the examples of one update: one with Stochastic, any number with MiniBatch and Batch.
        optimizer: the descent's, where it has been made already; it is made anew otherwise.
        compile: run the step as one graph, compiled by torch's inductor on the first step of each shape of the input
            (tens of seconds).  It calls the update, which stays folded into the product that makes the gradient and
            reads its hyperparameters then, so that a scheduler compiles nothing anew; an optimizer that asks for
            gradients makes its own step after the graph.  It pays for many or large elementwise layers.  Random
            layers draw other numbers than without.
        capture: replay the step as a CUDA graph: for small networks on a GPU, where starting the kernels takes longer
            than their work.  It needs a CUDA device, the model, the inputs and the targets on it, and one graph's
            memory for each shape of the input.  May be combined with ``compile``.

    Attributes:
        output: of the model in the latest step, before its update; with micro-batches, that of the last.

    Raises:
        RuntimeError: for ``capture`` without a GPU.
        TypeError: for a layer or a loss that cannot be run without a tape; the text names it and the way out; and for
            a descent that is none.
        ValueError: for a model without a parameter that requires a gradient.
    """

    def __init__(
        self,
        model: Module,
        loss: Module,
        descent: Descent,
        *,
        optimizer: Optimizer | None = None,
        compile: bool = False,
        capture: bool = False,
    ) -> None:
        if not isinstance(descent, Descent):
            raise TypeError(
                f"Backprop: descent must be one of manualprop.descent. Got {descent!r}; give a descent with its learning "
                "rate, such as MiniBatch(learning_rate=0.1)."
            )
        self.model, self.descent = model, descent
        self.criterion = Criterion(loss)
        self.stage = build(model)
        self._graphs = Graphs(compile, capture) if compile or capture else None
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
        self._parameters, self._modules = list(self.model.parameters()), list(self.model.modules())
        self._groups = self.optimizer.param_groups
        self._seen = [(p, p.requires_grad, p.data_ptr()) for p in self._parameters]
        self._hooks = self._has_hooks()
        self.stage.need(False)
        self._leaves = leaves = [s for s in self.stage.stages() if not isinstance(s, Chained | Added)]
        uses = Counter(p for leaf in leaves for p in leaf.parameters())
        self._learning = list(uses)
        self._ties = len(uses) < uses.total()
        groups = {p: group for group in self._groups for p in group["params"]}
        missing = [p for p in self._learning if p not in groups]
        if missing:  # it did not require a gradient when the optimizer was made
            self.optimizer.add_param_group({"params": missing})
            groups |= dict.fromkeys(missing, self._groups[-1])
        clips = self.descent.clip_gradient_norm is not None or self.descent.clip_gradient_value is not None
        self._folds = type(self.optimizer) is SGD and not clips and not self._hooks
        states = self.optimizer.state
        self._descend = {p: Descend(p, groups[p], states) for p in self._learning} if self._folds else {}
        self._updates = Updates(self._descend)
        self._micro = self.descent.micro_batch_size if isinstance(self.descent, Batch) else None
        self._by_update = self.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update"
        self._is_plain = self._folds and not self._ties and self._graphs is None and self._micro is None
        self._numbers = Hyperparameters(self._parameters[0].device)
        self._last: tuple[torch.Size, torch.dtype] | None = None
        self._forget()
        affine = [leaf for leaf in leaves if isinstance(leaf, Affine)]
        for leaf in affine:
            leaf.is_last = leaf is affine[-1]
        if self._graphs is not None:
            self._graphs = Graphs(self._graphs.compile, self._graphs.capture)
        self._send(self._descend)

    def __call__(self, x: Tensor, target: Tensor) -> float:
        """Make one update and return the loss before it.

        Args:
            x: inputs of all examples of the update.
            target: their targets.

        Raises:
            FloatingPointError: for a loss that is not finite; no weight was changed.
            ValueError: for more than one example, where the descent is Stochastic.
        """
        self._check()
        if x.shape == self._shape and x.dtype is self._dtype:
            with torch._C._InferenceMode(True):  # what torch.inference_mode enters, at half the price
                loss = self._repeat(x, target)
        else:
            loss = self._step(x, target)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks for
        if self._by_update:
            self.lr_scheduler.step()  # type: ignore[union-attr]
        return loss

    def _step(self, x: Tensor, target: Tensor) -> float:
        """One step of any kind."""
        examples = 1 if x.dim() < 2 and x.is_floating_point() else len(x)
        if examples != 1 and isinstance(self.descent, Stochastic):
            raise ValueError(
                f"Backprop: an update of Stochastic must see one example. Got {examples}; make one call for each, on "
                "x[i : i + 1] and target[i : i + 1], or use MiniBatch for one update of them all."
            )
        whole = self._micro is None or self._micro >= len(x)
        if not (whole and self._folds):
            return self._collect_and_update(x, target)
        if self._graphs is not None and self._graphs.capture and self._has_buffers():
            return self._run_graph(x, target)
        if self._ties:
            return self._collect_and_update(x, target)
        if self._graphs is not None and self._graphs.compile:
            return self._run_compiled(x, target)
        with torch.inference_mode():
            loss, _ = self._propagate(x, target)
        self._forget()
        if self._is_plain and self._last == (x.shape, x.dtype):
            self._prepare(x, target)
        self._last = x.shape, x.dtype
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
        # A resumed optimizer has other groups and states than before.
        if self._groups is not self.optimizer.param_groups or self._has_hooks() is not self._hooks:
            self._plan()
        for parameter, learns, memory in self._seen:
            if parameter.requires_grad is not learns or parameter.data_ptr() != memory:
                # model.double() moves it
                return self._plan()

    def _has_hooks(self) -> bool:
        """Whether somebody watches the optimizer's step: it is called then, with the gradients in ``.grad``."""
        optimizer: Any = self.optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    @contextmanager
    def _sending(self, to: Destinations) -> Iterator[None]:
        """Within, gradients go elsewhere than into the update, and no weight changes."""
        self._send(to)
        try:
            yield
        finally:
            self._send(self._descend)

    @contextmanager
    def _collecting(self) -> Iterator[Mapping[Parameter, Collect]]:
        """Within, gradients are collected, and no weight changes."""
        to = {p: Collect(p) for p in self._learning}
        with self._sending(to):
            yield to

    def _propagate(self, x: Tensor, target: Tensor, divide: bool = True) -> tuple[float, Tensor | float]:
        """Forward propagation, loss, gradient of the loss, backward propagation; the loss and its divisor."""
        self.output = output = self.stage.forward(x)
        loss, divisor, g = self.criterion(output, target, divide)
        value = self._finite(loss, x, target)
        self.stage.backward(g)
        return value, divisor

    # ----- steps on inputs of one shape -----

    def _forget(self) -> None:
        """Let go of what was prepared for further inputs of one shape."""
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._forwards: list[Forward] = []
        self._backwards: list[Backward] = []
        self._evaluate: Repeated = self.criterion.evaluate

    def _prepare(self, x: Tensor, target: Tensor) -> None:
        """Lay out further steps on inputs of this shape: a list of what is to be called, and the tensors to write into."""
        chain = flat(self.stage)
        if sum(stage.kept() for stage in chain) > KEPT:
            return
        ways = [stage.repeated() for stage in chain]
        first = next(i for i, stage in enumerate(chain) if stage.learns)
        self._forwards = [forward for forward, _ in ways]
        self._backwards = [backward for _, backward in reversed(ways[first:])]
        self._evaluate = self.criterion.repeated(self.output, target)
        self._shape, self._dtype = x.shape, x.dtype

    def _repeat(self, x: Tensor, target: Tensor) -> float:
        """What ``_propagate`` does, as it was prepared."""
        y = x
        for forward in self._forwards:
            y = forward(y)
        self.output = y
        loss, g = self._evaluate(y, target)
        if not math.isfinite(loss):
            self._refuse(loss, x, target)
        for backward in self._backwards:
            g = backward(g)  # type: ignore[assignment]  # None from the first that learns alone
        return loss

    def _finite(self, loss: Tensor, x: Tensor, target: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            self._refuse(value, x, target)
        return value

    def _refuse(self, value: float, x: Tensor, target: Tensor) -> NoReturn:
        advice = data_at_fault(x, target, self.criterion.loss) or "Try a smaller learning rate"
        raise FloatingPointError(
            f"Backprop: the loss must stay finite. Got loss={value} with learning rate {self._groups[0]['lr']:g}; no "
            f"weight was changed. {advice}."
        )

    # ----- the whole as one graph -----

    def _has_buffers(self) -> bool:
        """Whether no buffer of the momentum is missing: the first step makes them, and is a plain one."""
        return all(
            destination.buffer is not None
            for destination in self._descend.values()
            if destination.group["momentum"]
        )

    def _run_graph(self, x: Tensor, target: Tensor) -> float:
        """One step, by a graph of forward pass, backward pass and update."""
        form, numbers = self._numbers.of(self._groups)
        found, self.output = self._graph(self._whole_step, form, [x, target, *numbers])
        torch.autograd.graph.increment_version(self._learning)  # which autograd cannot see otherwise
        return self._finite(found, x, target)

    def _graph(self, body: Body, form: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        assert self._graphs is not None
        key = (body.__name__, form, *[module.training for module in self._modules])
        self.criterion.traced = True
        try:
            return self._graphs.run(body, key, inputs, self._changed)
        finally:
            self.criterion.traced = False

    def _changed(self) -> list[Tensor]:
        """What a step changes in place."""
        buffers = [destination.buffer for destination in self._descend.values()]
        return [*self._parameters, *self.model.buffers(), *(b for b in buffers if b is not None)]

    def _whole_step(self, x: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        """Loss and output; each weight is changed only if the loss is finite."""
        groups = dict(zip(map(id, self._groups), with_tensors(self._groups, numbers), strict=True))
        loss, _, output, *gradients = self._gradients(x, target)
        updates = []
        for (p, destination), gradient in zip(self._descend.items(), gradients, strict=True):
            updates.append(Guarded(p, groups[id(destination.group)], destination.buffer))
            updates[-1].take(gradient)
        finite = loss.isfinite()
        for update in updates:
            update.commit(finite)
        return loss, output

    def _run_compiled(self, x: Tensor, target: Tensor) -> float:
        """One step, by a compiled graph, which ends with the update folded into the products."""
        with torch.no_grad():
            found, self.output = self._graph(self._descending, None, [x, target])
        return self._finite(found, x, target)

    def _descending(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Loss and output; what the gradients are made of goes into the update."""
        to = {p: Factors(p) for p in self._learning}
        with self._sending(to):
            output = self.stage.forward(x)
            loss, _, g = self.criterion(output, target)
            self.stage.backward(g)
        made = [factor for factors in to.values() for factor in factors.made]
        self._updates.record(made, [factors.method for factors in to.values()], loss)
        return loss, output

    def _gradients(self, x: Tensor, target: Tensor, divide: bool = True) -> tuple[Tensor, ...]:
        """Loss, divisor, output, and the gradient of every parameter that learns."""
        with self._collecting() as to:
            output = self.stage.forward(x)
            loss, divisor, g = self.criterion(output, target, divide)
            self.stage.backward(g)
        divisor = divisor if isinstance(divisor, Tensor) else loss.new_full((), divisor)
        return loss, divisor, output, *[destination.made for destination in to.values()]

    def _sums(self, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """The same of the loss summed over the examples."""
        return self._gradients(x, target, divide=False)

    # ----- gradients first, update after -----

    def _collect_and_update(self, x: Tensor, target: Tensor) -> float:
        """One step in pieces, or with an optimizer that asks for gradients."""
        size = self._micro
        whole = size is None or size >= len(x)
        with torch.no_grad():
            pieces = [(x, target)] if whole else list(zip(x.split(size), target.split(size), strict=True))
            with self._collecting() as to:
                loss = self._accumulate(pieces, to)
            self._update(to)
        return loss

    def _collect(self, x: Tensor, target: Tensor, to: Collected, divide: bool) -> tuple[float, float]:
        """Loss and divisor of a piece, whose gradients go to the collection."""
        if self._graphs is None:
            value, divisor = self._propagate(x, target, divide)
            return value, float(divisor)
        body = self._gradients if divide else self._sums
        loss, divisor, self.output, *gradients = self._graph(body, None, [x, target])
        value = self._finite(loss, x, target)
        for destination, gradient in zip(to.values(), gradients, strict=True):
            destination.take(gradient.clone() if self._graphs.capture else gradient)
        return value, divisor.item()

    def _accumulate(self, pieces: Sequence[tuple[Tensor, Tensor]], to: Collected) -> float:
        """The gradient of the whole, from pieces: numerators and denominators add up, means do not."""
        if len(pieces) == 1:
            return self._collect(*pieces[0], to, divide=True)[0]
        check_splittable(self.criterion.loss, self.model)
        sums = [self._collect(x, t, to, divide=False) for x, t in pieces]
        total, divisor = (math.fsum(column) for column in zip(*sums, strict=True))
        if is_sum(self.criterion.loss):
            return total
        if not divisor:
            self._refuse(math.nan, *pieces[0])
        for destination in to.values():
            destination.made.div_(divisor)
        return total / divisor

    def _update(self, to: Collected) -> None:
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
        return self._named(to)

    def _named(self, to: Collected) -> dict[str, Tensor]:
        named = {p: name for name, p in self.model.named_parameters()}
        return {named[p]: destination.made for p, destination in to.items()}

    def observe(self, x: Tensor, target: Tensor, note: Note) -> Observed:
        """Run forward and backward propagation under the eyes of ``note``; no weight changes.

        Args:
            x: inputs of all examples of the update.
            target: their targets.
            note: called after each stage's work with the stage, "forward" or "backward", what it was given and what it
                made.
        """
        self._check()
        with torch.no_grad(), self._collecting() as to, watched(self._leaves, note):
            output = self.stage.forward(x)
            loss, divisor, g = self.criterion(output, target)
            kept = g.clone()  # the last stage may write over it
            self.stage.backward(g)
        return Observed(output, loss, float(divisor), kept, self._named(to))

    def trace(self, x: Tensor, target: Tensor) -> Iterator[Record]:
        """Yield one record for each forward and backward step, in order; no weight changes."""
        records: list[Record] = []
        made = self.observe(x, target, recorder(records))
        loss = self.criterion.loss
        turn = sum(one.direction == "forward" for one in records)  # where the way back begins
        yield from records[:turn]
        yield record("loss", "loss", loss, headline(loss), made.loss)
        yield record("backward", "loss", loss, "dL/dy, the gradient that starts", made.g)
        yield from records[turn:]
