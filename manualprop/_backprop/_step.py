"""The tape-free step: forward propagation, backward propagation and update, written out, without autograd.

A :class:`Backprop` holds one stage for each layer.  A step runs the stages forwards, takes the gradient of
the loss, and runs the stages backwards.  Each stage sends the gradient of its parameters to its destination:
into the parameter itself (the update is folded into the product that makes the gradient), or into a buffer.
All formulas come from :mod:`manualprop.functions`.  ``_ways.py`` has the ways of running a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from manualprop._backprop._criterion import Criterion
from manualprop._backprop._epoch import Epoch, Epochs, Pieces, Scanned
from manualprop._backprop._graph import Graphs
from manualprop._backprop._plan import Plan
from manualprop._backprop._stages import build, hooks_of, read_once
from manualprop._backprop._trace import Note, Record, headline, noted, record, recorder, rule_named_as
from manualprop._backprop._ways import Collected, Compiled, Plain, Repeated, Way, WholeStep, repeated
from manualprop._torch import any_autocast, optimizer_post_hooks, optimizer_pre_hooks
from manualprop.descent import Descent, Stochastic


class Observed(NamedTuple):
    """The results of a step, from :meth:`Backprop.observe`.

    - ``output``     the model's output.
    - ``loss``       the loss; ``divisor`` is the divisor of its mean.
    - ``g``          the gradient of the loss with respect to the output.
    - ``gradients``  the gradients of the parameters that learn, by name.
    """

    output: Tensor
    loss: Tensor
    divisor: float
    g: Tensor
    gradients: dict[str, Tensor]


class Backprop:
    """Train a model without a tape: one call is a forward pass, a backward pass and an update.

    The model is a :class:`torch.nn.Sequential`, which may be nested.  It contains layers of
    :mod:`manualprop.nn`, torch's Flatten, Unflatten, Identity and Dropout, and
    :class:`manualprop.nn.Residual` and
    :class:`manualprop.nn.Parallel` for branches.  With plain or momentum gradient descent, the update is
    folded into the product that makes the gradient, and no gradient is ever stored.  After N steps the
    weights equal those of torch.nn, autograd and the same optimizer, within rounding.  From the third small
    input of equal shape, buffers are reused (2^20 elements at most); an output never is.  If the optimizer's
    step has hooks, the optimizer gets the gradients and calls the hooks.

    Args:
        model: the model to train, in place.
        loss: a loss of :mod:`manualprop.nn`, called on (output, target), with reduction "mean" or "sum".
        descent: a descent of :mod:`manualprop.descent`: the update, and for Batch the size of the
            micro-batches. The rows of a call are the examples of one update: one with Stochastic, any number
            with MiniBatch and Batch.
        optimizer: the descent's optimizer, if it exists already; otherwise a new one is made.  It must hold every
            parameter that requires a gradient.
        compile: True: run the step as one graph.  torch's inductor compiles it at the first step (about ten
            seconds), and for another shape of the input when it has come eight times; on the CPU the program is
            kept on disk for later processes.  The graph of a small network makes the update too; that of a large
            one returns the factors of the gradients, and the update stays folded into their product.  A scheduler
            causes no new compilation.  An optimizer that needs gradients makes its own step after the graph.
            Random layers draw other numbers than without ``compile``.
            "epoch": run the updates of :meth:`epoch` as one program, on the CPU.  It is compiled once for each
            number of rows (about ten seconds, with a C++ compiler) and kept on disk, too.
        capture: replay the step as a CUDA graph: for small networks on a GPU, where launching the kernels
            takes longer than their work.  It needs a CUDA device with the model, the inputs and the targets
            on it, and one graph's memory for each input shape.  May be combined with ``compile``.

    Attributes:
        output: the model's output in the latest step, before the update; with micro-batches, the last one's.

    Raises:
        RuntimeError: for ``capture`` without a GPU.
        TypeError: for a layer or a loss that cannot run without a tape (the text names it and what to do),
            and if ``descent`` is not a descent.
        ValueError: for a model without a parameter that requires a gradient, for an optimizer that does not hold
            all of them, for another ``compile``, and for updates that cannot be one program.
    """

    def __init__(
        self,
        model: Module,
        loss: Module,
        descent: Descent,
        *,
        optimizer: Optimizer | None = None,
        compile: bool | Literal["epoch"] = False,
        capture: bool = False,
    ) -> None:
        if not isinstance(descent, Descent):
            raise TypeError(
                f"Backprop: descent must be one of manualprop.descent. Got {descent!r}; give a descent with its learning "
                "rate, such as MiniBatch(learning_rate=0.1)."
            )
        if compile not in (False, True, "epoch") or (compile == "epoch" and capture):
            raise ValueError(
                "Backprop: compile must be False, True or 'epoch', and 'epoch' goes without capture. Got "
                f"compile={compile!r} and capture={capture}."
            )
        self.model, self.descent = model, descent
        self._loss = loss
        self._compile, self._capture, self._by_epoch = compile is True, capture, compile == "epoch"
        trained = self._trained()
        self.optimizer = descent.make_optimizer(trained) if optimizer is None else optimizer
        self._require_held(trained)
        self.lr_scheduler = descent.make_lr_scheduler(self.optimizer) if optimizer is None else None
        self.output = torch.empty(0)
        self._make()

    def _trained(self) -> list[Parameter]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(
                "Backprop: the model must have a parameter that requires a gradient. Got none; set requires_grad."
            )
        return trained

    def _require_held(self, trained: Sequence[Parameter]) -> None:
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.model.named_parameters() if p in set(trained) - held]
        if missing:
            raise ValueError(
                "Backprop: the optimizer must hold every parameter that requires a gradient. Got one without "
                f"{', '.join(missing)}; call requires_grad_(False) on what is not to be trained, or give it to the optimizer."
            )

    def __getstate__(self) -> dict[str, Any]:
        given = ("model", "descent", "optimizer", "lr_scheduler", "output")
        options = ("_loss", "_compile", "_capture", "_by_epoch")
        return {name: vars(self)[name] for name in (*given, *options)}  # the rest is made from these

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make()

    def _make(self) -> None:
        """Make the stages, find the parameters that learn and where their gradients go; make the ways of a step."""
        self.stage, self.criterion = build(self.model), Criterion(self._loss)
        self._hooks = any(self._watchers())
        self._plan = plan = Plan(
            self.model, self.stage, self.criterion, self.descent, self.optimizer, self._hooks
        )
        self._seen = [
            (module._parameters, name, p, p.requires_grad, p.data_ptr())
            for module in self.model.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        self._no_hooks = [*hooks_of(self.model.modules()), *([] if self._hooks else self._watchers())]
        self._read = read_once(plan.leaves)
        read = [vars(self._loss), *[m._modules for m in self.model.modules() if m._modules]]
        # Tensors are not compared, and need not be: a step reads them.
        if next(self._loss.buffers(), None) is None:
            read.append(self._loss._buffers)
        self._read += [(present, dict(present)) for present in read]
        graphs = Graphs(self._compile, self._capture) if self._compile or self._capture else None
        self._plain, self._collected = Plain(plan), Collected(plan, graphs)
        self._compiled = Compiled(plan, graphs) if graphs is not None and self._compile else None
        self._whole = WholeStep(plan, graphs) if graphs and (self._capture or plan.is_small) else None
        self._first = Collected(plan, None)
        self._by_update = self.lr_scheduler is not None and self.descent.lr_scheduler_interval == "update"
        scanned = Scanned(plan) if self._by_epoch else None
        scheduler = self.lr_scheduler if self._by_update else None
        self._epochs = Epochs(plan, self._step, scanned, scheduler)
        self._forget()

    def __call__(self, x: Tensor, target: Tensor) -> float:
        """Make one update and return the loss before it.

        Args:
            x: the inputs of all examples of the update.
            target: their targets.

        Raises:
            FloatingPointError: if the loss is not finite; no weight is changed then.
            TypeError: for what is no tensor, and for a layer that has come and cannot run without a tape.
            ValueError: for more than one example with Stochastic.
        """
        self._check()
        return self._update(x, target)

    def _update(self, x: Tensor, target: Tensor) -> float:
        if isinstance(x, Tensor) and x.shape == self._shape and x.dtype is self._dtype:
            loss, self.output = self._repeated(x, target)  # type: ignore[misc]
        else:
            loss, self.output = self._way(x, target)(x, target)
            self._prepare(x, target)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers check this
        if self._by_update:
            self.lr_scheduler.step()  # type: ignore[union-attr]
        return loss

    def epoch(self, x: Tensor, target: Tensor, order: Iterable[Pieces]) -> Epoch:
        """Make all updates of an epoch; return their losses and outputs.

        With ``compile="epoch"`` updates on equal numbers of examples are one program, and all others are steps,
        as are the updates of a network so large that steps are faster.  The weights are those of the steps,
        within rounding.  If a loss is not finite, the weights are those before its update.

        Args:
            x: the inputs of all examples, one for each row.
            target: their targets.
            order: for each update the numbers of its rows, in pieces: what ``descent.updates(len(x))`` yields,
                or its first updates.  Of an update in pieces, only the last piece's output is returned.

        Raises:
            FloatingPointError: if a loss is not finite; ``made`` is the number of updates before.
            ValueError: for more than one example with Stochastic, for an update without an example, and if ``x``
                and ``target`` have other lengths.
            IndexError: for a row that does not exist.
            TypeError: for an ``order`` of anything else, and with ``compile="epoch"`` for a model that draws random
                numbers.
            RuntimeError: with ``compile="epoch"`` if the program cannot be compiled.
        """
        self._check()
        _require_tensors(x, target)
        made = self._epochs(x, target, order)
        if len(made.losses):
            self.output = self._epochs.output
        return made

    def has_program(self, x: Tensor, target: Tensor) -> bool:
        """Whether the program of updates on inputs of this shape is on disk, and need not be compiled.

        Args:
            x: the inputs of one update.
            target: their targets.

        Raises:
            TypeError: for a model that draws random numbers.
        """
        self._check()
        scanned = self._epochs.scanned
        return scanned is not None and scanned.is_kept(x, target)

    def prepare_program(self, x: Tensor, target: Tensor) -> None:
        """Load or compile the program of updates on inputs of this shape, which :meth:`epoch` otherwise does.

        Args:
            x: the inputs of one update.
            target: their targets.

        Raises:
            TypeError: for a model that draws random numbers.
            RuntimeError: if the program cannot be compiled.
        """
        self._check()
        self._epochs.prepare(x, target)

    def _step(self, x: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """An update of an epoch, which looks only once for what may have changed."""
        return self._update(x, target), self.output

    def _way(self, x: Tensor, target: Tensor) -> Way:
        """The way of running a step for these inputs."""
        _require_tensors(x, target)
        examples = 1 if x.dim() < 2 and x.is_floating_point() else len(x)
        if examples != 1 and isinstance(self.descent, Stochastic):
            raise ValueError(
                f"Backprop: an update of Stochastic must see one example. Got {examples}; make one call for each, on "
                "x[i : i + 1] and target[i : i + 1], or use MiniBatch for one update of them all."
            )
        plan = self._plan
        if not (plan.folds and (plan.micro is None or plan.micro >= len(x))):
            return self._collected
        if self._whole is not None:
            return self._whole if plan.has_buffers() else self._first
        if plan.ties:
            return self._collected
        return self._compiled or self._plain

    # ----- steps on inputs of one shape -----

    def _forget(self) -> None:
        """Drop what was prepared for further inputs of one shape."""
        self._shape: torch.Size | None = None
        self._dtype: torch.dtype | None = None
        self._repeated: Repeated | None = None
        self._last: tuple[torch.Size, torch.dtype] | None = None

    def _prepare(self, x: Tensor, target: Tensor) -> None:
        """Prepare reuse of buffers, if this was the second plain step on inputs of one shape."""
        last = self._last
        self._forget()
        self._last = x.shape, x.dtype
        if self._plan.is_plain and not self._compile and not self._capture and last == self._last:
            self._repeated = repeated(self._plan, self.output, target)
            if self._repeated is not None:
                self._shape, self._dtype = self._last

    # ----- what may have changed since the last step -----

    def _check(self) -> None:
        if any_autocast():
            raise RuntimeError(
                "Backprop: a step runs in the precision of the model. Got an enabled autocast; leave the region, and "
                "give the model the precision with model.to(dtype)."
            )
        # A resumed optimizer has new groups and states.
        if self._plan.groups is not self.optimizer.param_groups or (
            self._hooks and not any(self._watchers())
        ):
            return self._make()
        for owned, name, parameter, learns, memory in self._seen:
            # model.double() replaces the data, load_state_dict(assign=True) the parameter
            if (
                owned.get(name) is not parameter
                or parameter.requires_grad is not learns
                or parameter.data_ptr() != memory
                or parameter._backward_hooks  # which are refused
                or parameter._post_accumulate_grad_hooks
            ):
                self._hand_over()
                return self._make()
        for present, read in self._read:
            if present != read:
                return self._make()
        if any(self._no_hooks):
            self._make()  # which refuses a layer's

    def _hand_over(self) -> None:
        """Give a parameter that replaces another, as in load_state_dict(assign=True), its place in the optimizer."""
        groups, states = self.optimizer.param_groups, self.optimizer.state
        held = {p for group in groups for p in group["params"]}
        for owned, name, old, *_ in self._seen:
            new = owned.get(name)
            if new is None or new in held or new.shape != old.shape:
                continue
            for group in groups:
                group["params"][:] = [new if p is old else p for p in group["params"]]
            if old in states:
                states[new] = states.pop(old)

    def _watchers(self) -> list[Any]:
        """The hooks of the optimizer's step: with any, it is called, with the gradients in ``.grad``."""
        optimizer: Any = self.optimizer
        own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        return [*own, optimizer_pre_hooks, optimizer_post_hooks]

    # ----- gradients without an update -----

    def gradients(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the gradient of every parameter that learns, by name; no weight and no ``.grad`` changes."""
        self._check()
        with torch.no_grad(), self._plan.collecting() as to:
            self.output, *_ = self._plan.propagate(x, target)
        return self._plan.named(to)

    def observe(self, x: Tensor, target: Tensor, note: Note) -> Observed:
        """Run forward and backward propagation and call ``note`` at each stage; no weight changes.

        Args:
            x: the inputs of all examples of the update.
            target: their targets.
            note: called after each stage with the stage, "forward" or "backward", its inputs and its result.
        """
        self._check()
        plan = self._plan
        with torch.no_grad(), plan.collecting() as to, noted(plan.leaves, note):
            output = self.stage.forward(x)
            loss, divisor, g = self.criterion(output, target)
            kept = g.clone()  # the last stage may overwrite it
            self.stage.backward(g)
        return Observed(output, loss, float(divisor), kept, plan.named(to))

    def trace(self, x: Tensor, target: Tensor) -> Iterator[Record]:
        """Yield one record for each forward and backward step, in order; no weight changes."""
        records: list[Record] = []
        made = self.observe(x, target, recorder(records))
        loss = self.criterion.loss
        turn = sum(one.direction == "forward" for one in records)  # where backward propagation begins
        yield from records[:turn]
        yield record("loss", "loss", loss, headline(rule_named_as(loss)), made.loss)
        yield record("backward", "loss", loss, "dL/dy, the gradient that starts", made.g)
        yield from records[turn:]


def _require_tensors(x: object, target: object) -> None:
    for name, given in (("inputs", x), ("targets", target)):
        if not isinstance(given, Tensor):
            raise TypeError(
                f"Backprop: {name} must be a tensor. Got {type(given).__name__}; convert it with torch.as_tensor."
            )
