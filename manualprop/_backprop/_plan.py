"""What every way of running a step needs: which parameters learn, where gradients go, a check of the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import SGD, Optimizer

from manualprop._backprop._advice import NotFinite, data_at_fault
from manualprop._backprop._criterion import Criterion
from manualprop._backprop._destinations import Collect, Descend, Destinations
from manualprop._backprop._stages import Added, Affine, Chained, Stage
from manualprop.descent import Batch, Descent

Collection = Mapping[Parameter, Collect]

SMALL = 2**17  # elements of all weights together


class Plan:
    """A model's stages, its loss and its optimizer as they are now.

    Args:
        model: the model to train.
        stage: the stage of the whole model.
        criterion: the loss.
        descent: the update.
        optimizer: the descent's optimizer.
        hooks: whether the optimizer's step has hooks.

    Attributes:
        leaves: the stages without inner stages.
        learning: the parameters that learn.
        ties: whether a parameter is used in several places.
        folds: whether the update is folded into the product that makes the gradient.
        descend: the destinations that fold the update; empty if ``folds`` is false.
        micro: the number of examples in a piece of an update; None for whole updates.
    """

    def __init__(
        self,
        model: Module,
        stage: Stage,
        criterion: Criterion,
        descent: Descent,
        optimizer: Optimizer,
        hooks: bool,
    ) -> None:
        self.model, self.stage, self.criterion = model, stage, criterion
        self.descent, self.optimizer, self.groups = descent, optimizer, optimizer.param_groups
        self.parameters = list(model.parameters())
        stage.need(False)
        self.leaves = [s for s in stage.stages() if not isinstance(s, Chained | Added)]
        uses = Counter(p for leaf in self.leaves for p in leaf.parameters())
        self.learning, self.ties = list(uses), len(uses) < uses.total()
        groups = self._groups()
        self.clips = descent.clip_gradient_norm is not None or descent.clip_gradient_value is not None
        self.folds = type(optimizer) is SGD and not self.clips and not hooks
        self.descend = {p: Descend(p, groups[p], optimizer.state) for p in self.learning if self.folds}
        self.micro = descent.micro_batch_size if isinstance(descent, Batch) else None
        affine = [leaf for leaf in self.leaves if isinstance(leaf, Affine)]
        for each in affine:
            each.is_last = each is affine[-1]
        for leaf in self.leaves:
            leaf.bind()
        self._send(self.descend)

    def _groups(self) -> dict[Any, dict[str, Any]]:
        """The optimizer's group of each parameter."""
        groups = {p: group for group in self.groups for p in group["params"]}
        missing = [p for p in self.learning if p not in groups]
        if missing:  # they did not require a gradient when the optimizer was made
            self.optimizer.add_param_group({"params": missing})
            groups |= dict.fromkeys(missing, self.groups[-1])
        return groups

    def unfolded(self) -> str:
        """Why the update is not folded."""
        name = type(self.optimizer).__name__
        return (
            name
            if type(self.optimizer) is not SGD
            else f"{name} with {'clipping' if self.clips else 'hooks'}"
        )

    @property
    def is_small(self) -> bool:
        """Whether a graph makes the update as well: it returns new weights, which costs a copy."""
        return self.weights <= SMALL

    @property
    def weights(self) -> int:
        """The elements of all weights together."""
        return sum(p.numel() for p in self.learning)

    @property
    def is_plain(self) -> bool:
        """Whether an update is one backward pass with the update folded into it."""
        return self.folds and not self.ties and self.micro is None

    def has_buffers(self) -> bool:
        """Whether all momentum buffers exist.  The first step makes them, so it is a plain one."""
        return all(d.buffer is not None for d in self.descend.values() if d.group["momentum"])

    # ----- where gradients go -----

    def _send(self, to: Destinations) -> None:
        for leaf in self.leaves:
            leaf.send(to)

    @contextmanager
    def sending(self, to: Destinations) -> Iterator[None]:
        """Inside, gradients go to ``to`` instead of into the update, and no weight changes."""
        self._send(to)
        try:
            yield
        finally:
            self._send(self.descend)

    @contextmanager
    def collecting(self) -> Iterator[Collection]:
        """Inside, gradients are collected, and no weight changes."""
        to = {p: Collect(p) for p in self.learning}
        with self.sending(to):
            yield to

    def named(self, to: Collection) -> dict[str, Tensor]:
        """The gradients of a collection, by the names of the parameters."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {names[p]: destination.made for p, destination in to.items()}

    # ----- forward and backward propagation -----

    def propagate(
        self, x: Tensor, target: Tensor, divide: bool = True
    ) -> tuple[Tensor, float, Tensor | float]:
        """Run forward propagation, the loss and backward propagation; return output, loss and divisor."""
        output = self.stage.forward(x)
        loss, divisor, g = self.criterion(output, target, divide)
        value = self.finite(loss, x, target)
        self.stage.backward(g)
        return output, value, divisor

    def finite(self, loss: Tensor, x: Tensor, target: Tensor) -> float:
        """The loss as a number; raises if it is not finite."""
        value = loss.item()
        if not math.isfinite(value):
            self.refuse(value, x, target)
        return value

    def refuse(self, value: float, x: Tensor, target: Tensor) -> NoReturn:
        """Raise for a loss that is not finite, and say what may be the cause."""
        advice = data_at_fault(x, target, self.criterion.loss) or "Try a smaller learning rate"
        raise NotFinite(
            value,
            f"Backprop: the loss must stay finite. Got loss={value} with learning rate {self.groups[0]['lr']:g}; no "
            f"weight was changed. {advice}.",
        )
