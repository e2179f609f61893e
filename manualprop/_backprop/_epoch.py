"""An epoch of updates: updates on equal numbers of examples are one program, all others are steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop._backprop._advice import NotFinite
from manualprop._backprop._graph import Form, Graphs, effective, form_of, undone
from manualprop._backprop._plan import Plan
from manualprop._backprop._programs import Program
from manualprop._backprop._scan import RandomGraphError, Scan, scanned
from manualprop._backprop._ways import Graphed, Way
from manualprop.descent import Stochastic

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


def portions(order: Iterable[Pieces], size: int) -> Iterator[list[Pieces]]:
    """The updates, grouped: those of a group follow each other and see equal numbers of examples.

    Args:
        order: the rows of each update, in pieces.
        size: the number of elements of one example.
    """
    for sizes, group in itertools.groupby(order, key=lambda pieces: tuple(map(len, pieces))):
        most = max(1, min(UPDATES, ELEMENTS // max(1, sum(sizes) * size)))
        while part := list(itertools.islice(group, most)):
            yield part


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``; without a copy if the rows follow each other."""
    first, n = rows.flatten()[:1], rows.numel()
    if n and torch.equal(rows.flatten(), torch.arange(n, device=rows.device).add_(first)):
        start = int(first)
        return x[start : start + n].view(*rows.shape, *x.shape[1:])
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])  # x[rows] is five times as slow


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


class Epochs:
    """Makes all updates of an epoch, by programs or by steps.

    Args:
        plan: the plan of the steps.
        step: makes one update; returns the loss and the output.
        scanned: makes many updates; None if steps make all.
        scheduler: of the learning rate, if it counts updates.

    Attributes:
        output: the output in the latest update.
    """

    output: Tensor

    def __init__(self, plan: Plan, step: Way, scanned: Scanned | None, scheduler: Any) -> None:
        self.plan, self.step, self.scanned, self.scheduler = plan, step, scanned, scheduler
        self._rows = 0  # of an update of the latest program

    def __call__(self, x: Tensor, target: Tensor, order: Iterable[Pieces]) -> Epoch:
        losses = [torch.empty(0, dtype=torch.float64)]
        outputs: list[Tensor] = []
        for updates in self._groups(x, order):
            made = self._in_one(x, target, updates)
            if made is None:
                made = self._by_steps(x, target, updates, before=sum(map(len, losses)))
            losses.append(made.losses)
            outputs.append(made.outputs)
        return Epoch(torch.cat(losses), torch.cat(outputs) if outputs else x.new_empty(0))

    def _groups(self, x: Tensor, order: Iterable[Pieces]) -> Iterator[list[Pieces]]:
        for updates in portions(order, x[0].numel()):
            if self.scanned is None or self.plan.has_buffers():
                yield updates
                continue
            yield updates[:1]  # a step, which makes the momentum buffers
            if updates[1:]:
                yield updates[1:]

    def _in_one(self, x: Tensor, target: Tensor, updates: list[Pieces]) -> Epoch | None:
        """The updates as one program; None, and nothing has changed, if steps must make them."""
        if self.scanned is None or not self._suits(updates):
            return None
        self.plan.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers check this
        rows = torch.stack([row for (row,) in updates]).to(x.device)
        schedule = Schedule(self.plan, self.scheduler)
        numbers = schedule.of(len(updates))
        found = None
        if numbers is not None:
            found = self.scanned(taken(x, rows), taken(target, rows), *numbers)
        if found is None:
            schedule.take_back()
            return None
        losses, outputs = found
        self._rows, self.output = rows.shape[1], outputs[-1]
        return Epoch(losses.double(), outputs.flatten(0, 1))

    def _suits(self, updates: list[Pieces]) -> bool:
        """Whether a program can make the updates, and is worth it."""
        plan, rows = self.plan, len(updates[0][0])
        if len(updates[0]) > 1 or not (plan.is_small and plan.has_buffers()):
            return False
        if isinstance(plan.descent, Stochastic) and rows != 1:  # the step says what is wrong
            return False
        return len(updates) > 1 or rows >= self._rows  # no program for the last, smaller batch of an epoch

    def _by_steps(self, x: Tensor, target: Tensor, updates: list[Pieces], before: int) -> Epoch:
        losses: list[float] = []
        outputs = []
        rows = torch.stack([torch.cat(pieces) for pieces in updates]).to(x.device)
        for one, its_target in zip(taken(x, rows), taken(target, rows), strict=True):
            try:
                loss, output = self.step(one, its_target)
            except NotFinite as error:
                error.made = before + len(losses)
                raise
            losses.append(loss)
            outputs.append(output)
            self.output = output
        return Epoch(torch.tensor(losses, dtype=torch.float64), torch.cat(outputs))


class Scanned(Graphed):
    """Many updates as one program, which repeats the step.

    Raises:
        ValueError: for updates that cannot be one program.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, Graphs(compile=True, capture=False))
        self._scans: dict[Any, Scan] = {}
        self._programs: dict[Any, Program] = {}
        if not plan.folds:
            raise ValueError(
                _refused(
                    "the update must be plain or momentum gradient descent, without clipping, and without hooks of "
                    f"the optimizer. Got {type(plan.optimizer).__name__}"
                )
            )
        devices = sorted({p.device.type for p in plan.parameters})
        if devices != ["cpu"]:
            raise ValueError(_refused(f"the model must be on the CPU. Got one on {', '.join(devices)}"))

    def is_kept(self, x: Tensor, target: Tensor) -> bool:
        """Whether the program for the updates on inputs of this shape is on disk.

        Raises:
            TypeError: for a model that draws random numbers.
        """
        return self.plan.is_small and self._scan(x, target, form_of(self.plan.groups)).is_kept()

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
        except (RuntimeError, IndexError):  # a class that does not exist; the step says which
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
            except RandomGraphError as error:
                why = f"the model must draw no random numbers. It does, by {error}"
                raise TypeError(_refused(why)) from None
            finally:
                criterion.traced = False
        return self._scans[key]

    def _program(self, x: Tensor, target: Tensor, form: Form, scan: Scan) -> Program:
        key = self._key(x, target, form)
        if key not in self._programs:
            self._programs[key] = scan.program()
        return self._programs[key]

    def _step(self, x: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        loss, output, updates = self.updates(x, target, numbers)
        for update in updates:
            update.commit()
        return loss, output


def _refused(why: str) -> str:
    return (
        f"Backprop: for compile='epoch', {why}. Use compile=False, where epoch() makes the updates by steps."
    )
