"""An epoch of updates: updates on equal numbers of examples are one program, all others are steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop._backprop._graph import Form, Graphs, effective, form_of, undone
from manualprop._backprop._plan import Plan
from manualprop._backprop._programs import Program, compiled_program, is_kept
from manualprop._backprop._scan import RandomGraphError, Scan, scanned
from manualprop._backprop._ways import Graphed

Pieces = tuple[Tensor, ...]  # the rows of one update, in pieces

# The most updates in one call of a program, and the most elements that it reads.  Ctrl-C, a loss that is not
# finite and a progress bar wait for the end of a call, which is well under a second.
UPDATES, ELEMENTS = 1024, 2**22


class Epoch(NamedTuple):
    """The results of an epoch, from :meth:`Backprop.epoch`.

    - ``losses``   the loss of each update, before it: one number for each.
    - ``outputs``  the outputs for all examples, in the order of the updates.
    """

    losses: Tensor
    outputs: Tensor


def joined(parts: Sequence[Epoch]) -> Epoch:
    """Several parts of an epoch as one."""
    if not parts:
        return Epoch(torch.empty(0, dtype=torch.float64), torch.empty(0))
    losses, outputs = zip(*parts, strict=True)
    return Epoch(torch.cat(losses), torch.cat(outputs))


def portions(order: Iterable[Pieces], size: int) -> Iterator[list[Pieces]]:
    """The updates, grouped: those of a group follow each other and see equal numbers of examples.

    Args:
        order: the rows of each update, in pieces.
        size: the number of elements of one example.
    """
    for (_, rows), group in itertools.groupby(order, key=lambda pieces: (len(pieces), len(pieces[0]))):
        most = max(1, min(UPDATES, ELEMENTS // max(1, rows * size)))
        while part := list(itertools.islice(group, most)):
            yield part


class Schedule:
    """The hyperparameters of the updates to come, and the way back if these are not made after all."""

    def __init__(self, plan: Plan, scheduler: Any) -> None:
        self.plan, self.scheduler = plan, scheduler
        if scheduler is not None:
            self.before = copy.deepcopy(scheduler.state_dict())
            self.groups = [{k: v for k, v in group.items() if k != "params"} for group in plan.groups]

    def of(self, updates: int) -> tuple[Form, list[Tensor]] | None:
        """Form and hyperparameters, one tensor of numbers for each; None if the form changes on the way."""
        groups = self.plan.groups
        form, names = form_of(groups), effective(groups)
        numbers = []
        for _ in range(1 if self.scheduler is None else updates):
            if form_of(groups) != form:
                return None
            numbers.append([float(groups[i][name]) for i, name in names])
            if self.scheduler is not None:
                self.scheduler.step()
        columns = torch.tensor(numbers, dtype=torch.float64).expand(updates, len(names)).t().contiguous()
        return form, list(columns)

    def take_back(self) -> None:
        """Undo the steps of the scheduler."""
        if self.scheduler is not None:
            self.scheduler.load_state_dict(self.before)
            for group, before in zip(self.plan.groups, self.groups, strict=True):
                group.update(before)


class Scanned(Graphed):
    """Many updates as one program, which repeats the step."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, Graphs(compile=True, capture=False))
        self._scans: dict[Any, Scan] = {}
        self._programs: dict[Any, Program] = {}

    def obstacle(self) -> str | None:
        """Why the updates of this plan cannot be one program; None if they can."""
        plan = self.plan
        if not plan.folds:
            return "the update must be plain or momentum gradient descent, without clipping and without hooks"
        devices = {p.device.type for p in plan.parameters}
        if devices != {"cpu"}:
            return f"a program runs on the CPU, and the model must be there. It is on {', '.join(devices)}"
        return None

    def is_kept(self, x: Tensor, target: Tensor) -> bool:
        """Whether the program for the updates on inputs of this shape is on disk.

        Raises:
            RandomGraphError: for a model that draws random numbers.
        """
        return is_kept(self._scan(x, target, form_of(self.plan.groups)).graph)

    def __call__(
        self, x: Tensor, target: Tensor, form: Form, numbers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Make one update for each entry of x, of target and of the numbers; return the losses and the outputs.

        None if a loss is not finite, or if the program refuses a target: then nothing has changed.
        """
        scan = self._scan(x[0], target[0], form)
        run = self._program(x[0], target[0], form, scan)
        try:
            found = run([*scan.carried, x.contiguous(), target.contiguous(), *numbers, *scan.fixed])
        except RuntimeError:  # a class that does not exist; the step says which
            return None
        new, (losses, outputs) = found[: len(scan.carried)], found[len(scan.carried) :]
        if not losses.isfinite().all():
            return None
        with torch.no_grad():
            for tensor, value in zip(scan.carried, new, strict=True):
                tensor.copy_(value)
        torch.autograd.graph.increment_version(self.plan.learning)  # autograd does not see these writes
        return losses, outputs

    def _key(self, x: Tensor, target: Tensor, form: Form) -> Any:
        modes = tuple(module.training for module in self.modules)
        return form, modes, x.shape, x.dtype, target.shape, target.dtype

    def _scan(self, x: Tensor, target: Tensor, form: Form) -> Scan:
        key = self._key(x, target, form)
        if key not in self._scans:
            numbers = [torch.zeros((), dtype=torch.float64) for _ in effective(self.plan.groups)]
            criterion = self.plan.criterion
            criterion.traced = True
            try:
                with undone(self.changed()):
                    self._scans[key] = scanned(self._step, [x, target, *numbers])
            finally:
                criterion.traced = False
        return self._scans[key]

    def _program(self, x: Tensor, target: Tensor, form: Form, scan: Scan) -> Program:
        key = self._key(x, target, form)
        if key not in self._programs:
            self._programs[key] = compiled_program(scan.graph, scan.examples)
        return self._programs[key]

    def _step(self, x: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        loss, output, updates = self.updates(x, target, numbers)
        for update in updates:
            update.commit()
        return loss, output


__all__ = ["Epoch", "RandomGraphError", "Scanned", "Schedule", "joined", "portions"]
