"""An epoch of updates: updates on equal numbers of examples are one program, all others are steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop._backprop._advice import NotFinite
from manualprop._backprop._graph import (
    ONE_AT_A_TIME,
    Form,
    Graphs,
    effective,
    form_of,
    has_micro_kernels,
    rehearse,
    undone,
)
from manualprop._backprop._plan import Plan
from manualprop._backprop._programs import Program
from manualprop._backprop._scan import RandomGraphError, Scan, scanned
from manualprop._backprop._ways import Graphed, Way
from manualprop.descent import Stochastic

Pieces = tuple[Tensor, ...]  # the rows of one update, in pieces

# The most updates in one call of a program, and the most elements that it reads.  Ctrl-C, a loss that is not
# finite and a progress bar wait for the end of a call, which is well under a second.
UPDATES, ELEMENTS = 1024, 2**22

# The most elements of all weights together, with which a program of micro-kernels is faster than steps.
LARGEST = 2**20


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

    Raises:
        TypeError: for an update that is no tuple of tensors.
    """
    for sizes, group in itertools.groupby(order, key=_sizes):
        most = max(1, min(UPDATES, ELEMENTS // max(1, sum(sizes) * size)))
        while part := list(itertools.islice(group, most)):
            yield part


def _sizes(pieces: Pieces) -> tuple[int, ...]:
    try:
        return tuple([piece.shape[0] for piece in pieces])  # len() of a tensor takes four times as long
    except (AttributeError, IndexError, TypeError):  # not asked before: this is called for every update
        raise TypeError(_no_rows(f"{type(pieces).__name__} {pieces!r}")) from None


def rows_of(updates: Sequence[Pieces], n: int) -> Tensor:
    """The rows of updates of equal sizes, a row of the result for each.

    Args:
        updates: the numbers of the rows, in pieces; negative ones count from the end.
        n: the number of examples.

    Raises:
        TypeError: for what is no tensor of integers.
        ValueError: for an update without examples.
        IndexError: for a row that does not exist.
    """
    if not any(map(len, updates[0])):
        raise ValueError(
            "Backprop: an update must have an example. Got one without; leave it out of the order."
        )
    try:
        rows = torch.stack([pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in updates])
    except TypeError:
        raise TypeError(
            _no_rows(f"a {type(updates[0]).__name__} of {type(updates[0][0]).__name__}")
        ) from None
    if rows.dim() != 2 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(_no_rows(f"shape {tuple(rows.shape[1:])} and {rows.dtype}"))
    rows = rows.long()
    first, last = (int(end) for end in rows.aminmax())
    if first < -n or last >= n:
        wrong = first if first < -n else last
        raise IndexError(f"Backprop: a row of an update must be one of the {n} examples. Got row {wrong}.")
    return rows if first >= 0 else rows % n


def _no_rows(found: str) -> str:
    return (
        "Backprop: an update must be a tuple of tensors with the numbers of its rows, as descent.updates(n) yields it. "
        f"Got {found}; write (rows,) for the rows in one piece."
    )


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
        if len(x) != len(target):
            raise ValueError(
                f"Backprop: each example must have a target. Got {len(x)} examples and {len(target)} targets."
            )
        losses = [torch.empty(0, dtype=torch.float64)]
        outputs: list[Tensor] = []
        for rows, whole in self._groups(x, target, order):
            made = self._in_one(x, target, rows) if whole else None
            if made is None:
                made = self._by_steps(x, target, rows, before=sum(map(len, losses)))
            losses.append(made.losses)
            outputs.append(made.outputs)
        return Epoch(torch.cat(losses), torch.cat(outputs) if outputs else x.new_empty(0))

    def _groups(self, x: Tensor, target: Tensor, order: Iterable[Pieces]) -> Iterator[tuple[Tensor, bool]]:
        """The rows of updates that follow each other, and whether they may be one program."""
        for updates in portions(order, x.shape[1:].numel()):
            rows = rows_of(updates, len(x)).to(x.device)
            whole = len(updates[0]) == 1 and self._suits(rows)
            if whole and not self.plan.has_buffers():
                if len(rows) > 1:  # what refuses a program does so before the first update
                    self.prepare(x[rows[0]], target[rows[0]])
                yield rows[:1], False  # a step, which makes the momentum buffers
                rows = rows[1:]
            if len(rows):
                yield rows, whole

    def prepare(self, x: Tensor, target: Tensor) -> None:
        """Load or compile the program for updates on inputs of this shape."""
        if self.scanned is not None and self.plan.is_small:
            self.scanned.program(x, target, form_of(self.plan.groups))

    def _in_one(self, x: Tensor, target: Tensor, rows: Tensor) -> Epoch | None:
        """The updates as one program; None, and nothing has changed, if steps must make them."""
        assert self.scanned is not None
        self.plan.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers check this
        schedule, found = Schedule(self.plan, self.scheduler), None
        try:
            numbers = schedule.of(len(rows))
            if numbers is not None:
                found = self.scanned(taken(x, rows), taken(target, rows), *numbers)
        finally:
            if found is None:
                schedule.take_back()
        if found is None:
            return None
        losses, outputs = found
        self._rows, self.output = rows.shape[1], outputs[-1]
        return Epoch(losses.double(), outputs.flatten(0, 1))

    def _suits(self, rows: Tensor) -> bool:
        """Whether a program can make the updates, and is worth it."""
        updates, examples = rows.shape
        if self.scanned is None or not self.scanned.pays(examples):
            return False
        if isinstance(self.plan.descent, Stochastic) and examples != 1:  # the step says what is wrong
            return False
        return updates > 1 or examples >= self._rows  # no program for the last, smaller batch of an epoch

    def _by_steps(self, x: Tensor, target: Tensor, rows: Tensor, before: int) -> Epoch:
        losses: list[float] = []
        outputs = []
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

    Args:
        plan: the plan of the steps.

    Raises:
        ValueError: for updates that cannot be one program.
    """

    updates_too = True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, Graphs(compile=True, capture=False))
        self._scans: dict[Any, tuple[Scan, list[int]]] = {}
        self._programs: dict[Any, Program] = {}
        if not plan.folds:
            raise ValueError(
                _refused(
                    "the update must be plain or momentum gradient descent, without clipping, and without hooks of "
                    f"the optimizer. Got {plan.unfolded()}"
                )
            )
        devices = sorted({p.device.type for p in plan.parameters})
        if devices != ["cpu"]:
            raise ValueError(_refused(f"the model must be on the CPU. Got one on {', '.join(devices)}"))

    def pays(self, examples: int) -> bool:
        """Whether a program of updates on so many examples is faster than steps, for a network of this size."""
        plan = self.plan
        kernels = examples > 1 and has_micro_kernels(plan.parameters[0].dtype)
        return plan.is_small or (kernels and plan.weights <= LARGEST)

    def is_kept(self, x: Tensor, target: Tensor) -> bool:
        """Whether the program for the updates on inputs of this shape is on disk.

        Raises:
            TypeError: for a model that draws random numbers.
        """
        return self.pays(len(x)) and self._scan(x, target, form_of(self.plan.groups)).is_kept()

    def __call__(
        self, x: Tensor, target: Tensor, form: Form, numbers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Make one update for each entry of x, of target and of the numbers; return the losses and the outputs.

        None if a loss is not finite, or if the program refuses a target: then nothing has changed.
        """
        x, target = x.contiguous(), target.contiguous()
        scan, run = self._scan(x[0], target[0], form), self.program(x[0], target[0], form)
        try:
            found = run([*scan.carried, x, target, *numbers, *scan.fixed])
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

    def program(self, x: Tensor, target: Tensor, form: Form) -> Program:
        """The program for updates on inputs of this shape, loaded or compiled."""
        key = self._key(x, target, form)
        if key not in self._programs:
            with ONE_AT_A_TIME:
                self._programs[key] = self._scan(x, target, form).program()
        return self._programs[key]

    def _key(self, x: Tensor, target: Tensor, form: Form) -> Any:
        return form, self.settings(), x.shape, x.dtype, target.shape, target.dtype

    def _scan(self, x: Tensor, target: Tensor, form: Form) -> Scan:
        key, held = self._key(x, target, form), self.held()
        scan, its = self._scans.get(key, (None, None))
        if scan is None or its != held:
            scan = self._traced(x, target)
            self._scans[key] = scan, held
        return scan

    def _traced(self, x: Tensor, target: Tensor) -> Scan:
        x, target = x.contiguous(), target.contiguous()  # the layout is part of a program
        plan, criterion = self.plan, self.plan.criterion
        numbers = [torch.zeros((), dtype=torch.float64) for _ in effective(plan.groups)]
        lacking = [p for p, d in plan.descend.items() if d.group["momentum"] and d.buffer is None]
        self.stand_ins = {p: torch.zeros_like(p) for p in lacking}
        try:
            with undone(self.changed()), ONE_AT_A_TIME:
                rehearse(self._step, [x, target, *numbers])
                criterion.traced = True
                return scanned(self._step, [x, target, *numbers])
        except RandomGraphError as error:
            why = f"the model must draw no random numbers. It does, by {error}"
            raise TypeError(_refused(why)) from None
        finally:
            criterion.traced, self.stand_ins = False, {}

    def _step(self, x: Tensor, target: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        loss, output, updates = self.updates(x, target, numbers)
        for update in updates:
            update.commit()
        return loss, output


def _refused(why: str) -> str:
    return (
        f"Backprop: for compile='epoch', {why}. Use compile=False, where epoch() makes the updates by steps."
    )
