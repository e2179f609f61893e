r"""Batch, stochastic and mini-batch gradient descent: which examples each update sees, and the update.

All three follow the gradient of a loss L averaged over examples, $\theta \leftarrow \theta - \eta \nabla L$, and
differ in how many of the N examples one update averages over: all (batch), one (stochastic), or some (mini-batch).
This file needs torch only, so that a plain PyTorch loop and Lightning run the same descent:

    descent = MiniBatch(batch_size=32, learning_rate=0.1, momentum=0.9)
    optimizer = descent.make_optimizer(model.parameters())
    for epoch in range(20):
        for pieces in descent.updates(len(x), seed=0, epoch=epoch):
            optimizer.zero_grad()
            gradient(model, loss, [(x[rows], y[rows]) for rows in pieces])
            descent.clip_gradients(model.parameters())
            optimizer.step()

Why a gradient computed in pieces is exact here. A mean loss is a quotient, $L = \sum_i w_i l_i / \sum_i w_i$, where
w is 1, a class weight, or 0 for an ignored target. Neither the mean of the pieces' means nor their mean weighted by
the number of examples equals L. The numerator and the denominator do add up over pieces, so both are summed and the
gradient is divided once, at the end (`sum_and_denominator`, `finish_gradient`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manualprop import _torch as _torch  # warns of an untested version

__all__ = [
    "Batch",
    "Descent",
    "MiniBatch",
    "Stochastic",
    "check_splittable",
    "compares_elements",
    "denominator",
    "finish_gradient",
    "gradient",
    "is_sum",
    "sum_and_denominator",
]

Loss = Callable[[Tensor, Tensor], Tensor]

# Losses of torch whose mean divides by the number of elements compared, whatever their weights are.
_MEAN_OVER_ELEMENTS = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)


@dataclass(frozen=True, kw_only=True)
class Descent(ABC):
    """What the three descents share: the size of the step and how it is taken.

    Args:
        learning_rate: step size, above 0. Leave it out when `optimizer` is given.
        momentum: share of the last step that is kept, 0 to below 1.
        nesterov: look ahead along the momentum (needs a momentum above 0).
        weight_decay: factor of the L2 penalty on the weights, at least 0.
        optimizer: any torch.optim class instead of the above, with its own lr; not torch.optim.LBFGS.
        lr_scheduler: any torch.optim.lr_scheduler class.
        lr_scheduler_interval: move the schedule on after every "epoch" or every "update".
        lr_scheduler_monitor: logged value that ReduceLROnPlateau watches, once per epoch.
        clip_gradient_norm: scale the gradient down to this total norm, above 0.
        clip_gradient_value: clamp each entry of the gradient to plus or minus this, above 0.

    Raises:
        ValueError: for a value out of its range, or for `optimizer` together with an option that it replaces.
        TypeError: for a size that is not an integer.
    """

    learning_rate: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    optimizer: Callable[[Iterable[Parameter]], Optimizer] | None = None
    lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None
    lr_scheduler_interval: Literal["epoch", "update"] = "epoch"
    lr_scheduler_monitor: str = "val_loss"
    clip_gradient_norm: float | None = None
    clip_gradient_value: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer is not None:
            self._refuse_what_the_optimizer_replaces()
        elif self.learning_rate is None:
            raise ValueError(f"{self._name}: give learning_rate, or an optimizer with its lr. Got neither.")
        else:
            self._require("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        self._require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self._require("nesterov", not self.nesterov or self.momentum > 0, "False without a momentum above 0")
        intervals = ("epoch", "update")
        self._require("lr_scheduler_interval", self.lr_scheduler_interval in intervals, "'epoch' or 'update'")
        for name in ("clip_gradient_norm", "clip_gradient_value"):
            limit = getattr(self, name)
            self._require(name, limit is None or 0 < limit < math.inf, "a positive number or None")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _require(self, option: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(
                f"{self._name}: {option} must be {what}. Got {option}={getattr(self, option)!r}."
            )

    def _require_positive_integer(self, option: str) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self._name}: {option} must be a positive integer. Got {option}={value!r}.")
        self._require(option, value > 0, "a positive integer")

    def _refuse_what_the_optimizer_replaces(self) -> None:
        replaced = {"learning_rate": None, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        given = [
            f"{name}={getattr(self, name)!r}" for name in replaced if getattr(self, name) != replaced[name]
        ]
        if given:
            raise ValueError(
                f"{self._name}: an optimizer brings its own step, so give either the optimizer or learning_rate, "
                f"momentum, nesterov and weight_decay. Got an optimizer and {', '.join(given)}. Set the latter back "
                "(learning_rate=None, momentum=0.0, ...) and pass them to the optimizer."
            )

    @abstractmethod
    def updates(self, n: int, *, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for every update of one epoch, the row numbers of its pieces.

        The order is a pure function of (seed, epoch), so that a resumed run sees what it would have seen.

        Args:
            n: number of training examples, at least 1.
            seed: of the order.
            epoch: 0, 1, ...; each has its own order.
        """

    @abstractmethod
    def updates_per_epoch(self, n: int) -> int:
        """Return the number of updates in one pass over n examples."""

    def make_optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        """Return the optimizer that takes the step.

        Args:
            parameters: what is trained.

        Raises:
            ValueError: for an optimizer that evaluates the loss itself, as LBFGS does.
        """
        if self.optimizer is None:
            assert self.learning_rate is not None
            return SGD(
                parameters,
                lr=self.learning_rate,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        optimizer = self.optimizer(parameters)
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{self._name}: the optimizer must take a step from a gradient. Got torch.optim.LBFGS, which evaluates "
                "the loss again and again; use torch.optim.SGD, Adam or another first-order optimizer."
            )
        return optimizer

    def make_lr_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """Return the learning rate schedule of an optimizer, or None.

        Args:
            optimizer: made by `make_optimizer`.

        Raises:
            ValueError: for ReduceLROnPlateau with interval "update": its value is known once per epoch.
        """
        if self.lr_scheduler is None:
            return None
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau) and self.lr_scheduler_interval == "update":
            raise ValueError(
                f"{self._name}: ReduceLROnPlateau watches {self.lr_scheduler_monitor!r}, which is known once per "
                "epoch. Got lr_scheduler_interval='update'; set it to 'epoch'."
            )
        return scheduler

    def clip_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Limit the gradients in place: each entry first, then the total norm.

        Args:
            parameters: whose `.grad` is limited.
        """
        if self.clip_gradient_value is None and self.clip_gradient_norm is None:
            return
        trained = list(parameters)
        if self.clip_gradient_value is not None:
            nn.utils.clip_grad_value_(trained, self.clip_gradient_value)
        if self.clip_gradient_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.clip_gradient_norm)


@final
@dataclass(frozen=True, kw_only=True)
class Batch(Descent):
    """Follow the exact gradient over the whole training set: one update per epoch.

    Args:
        micro_batch_size: examples held in memory at once, at least 1; all of them when None. It bounds the
            memory and changes the gradient by rounding only.
    """

    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            self._require_positive_integer("micro_batch_size")

    def updates(self, n: int, *, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the one update of the epoch: all rows, in pieces of `micro_batch_size`; see `Descent.updates`."""
        _check_count(self._name, n)
        yield torch.arange(n).split(self.micro_batch_size or n)

    def updates_per_epoch(self, n: int) -> int:
        """Return 1."""
        _check_count(self._name, n)
        return 1


@final
@dataclass(frozen=True, kw_only=True)
class Stochastic(Descent):
    """Follow the gradient of one example at a time, reshuffled every epoch: N updates per epoch."""

    def updates(self, n: int, *, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield every row once, alone, in a new order; see `Descent.updates`."""
        _check_count(self._name, n)
        for row in _order(n, seed, epoch).split(1):
            yield (row,)

    def updates_per_epoch(self, n: int) -> int:
        """Return n."""
        _check_count(self._name, n)
        return n


@final
@dataclass(frozen=True, kw_only=True)
class MiniBatch(Descent):
    """Follow the gradient of `batch_size` examples at a time, reshuffled every epoch.

    The last, smaller batch of an epoch is kept; its mean is over its own size.

    Args:
        batch_size: examples per update, at least 1, at most the number of training examples.
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive_integer("batch_size")

    def updates(self, n: int, *, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield every row once, `batch_size` at a time, in a new order; see `Descent.updates`."""
        self._check_batch_size(n)
        for rows in _order(n, seed, epoch).split(self.batch_size):
            yield (rows,)

    def updates_per_epoch(self, n: int) -> int:
        """Return n / batch_size, rounded up."""
        self._check_batch_size(n)
        return -(-n // self.batch_size)

    def _check_batch_size(self, n: int) -> None:
        _check_count(self._name, n)
        if self.batch_size > n:
            size = f"a batch_size up to {n}" if n > 1 else "batch_size=1"
            raise ValueError(
                f"MiniBatch: batch_size must be at most the number of training examples. Got "
                f"batch_size={self.batch_size} and {n} training example{'s' if n > 1 else ''}; choose {size}, or the "
                "descent Batch, which uses all of them in every update."
            )


def _check_count(name: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{name}: there must be at least one training example. Got n={n}.")


def _order(n: int, seed: int, epoch: int) -> Tensor:
    # torch's CPU generator looks at the low 32 bits of its seed only: hash the pair, so that (0, 1) and (1, 0) differ.
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def gradient(model: nn.Module, loss: Loss, pieces: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Add the exact gradient of one update to every `.grad` and return the loss.

    Args:
        model: called on the inputs of each piece.
        loss: called on (output, target); see `check_splittable` for what several pieces ask of it.
        pieces: (input, target) pairs that together are the examples of the update. The `.grad` must be None or zero
            where there are several, because the sum over all pieces is divided at the end.

    Raises:
        TypeError: when there are several pieces and the loss cannot be split exactly.
    """
    if len(pieces) == 1:
        x, target = pieces[0]
        value = loss(model(x), target)
        value.backward()
        return value.item()
    check_splittable(loss, model)
    total = divisor = 0.0
    for x, target in pieces:
        piece, weight = sum_and_denominator(loss, model(x), target)
        piece.backward()
        total, divisor = total + piece.item(), divisor + weight
    return finish_gradient(model.parameters(), loss, total, divisor)


def finish_gradient(parameters: Iterable[Parameter], loss: Loss, total: float, divisor: float) -> float:
    """Turn the gradient of the summed loss in every `.grad` into the gradient of the loss, which is returned.

    Args:
        parameters: whose `.grad` is divided where there is one; left alone when the loss is a sum.
        loss: of which `total` is the sum.
        total: sum of the loss over all pieces.
        divisor: sum of the pieces' denominators; 0 (nothing but ignored targets) gives nan, as it does in torch.
    """
    if is_sum(loss):
        return total
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
    return total / divisor if divisor else math.nan


def is_sum(loss: Loss) -> bool:
    """Return whether the loss is a sum over examples, which needs no division to add up over pieces.

    Args:
        loss: with or without an attribute `reduction`.
    """
    return getattr(loss, "reduction", None) == "sum"


def sum_and_denominator(loss: Loss, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Return a loss summed over a piece, and what its mean over the piece would divide by.

    Args:
        loss: with an attribute `reduction`; see `check_splittable`.
        output: of the model.
        target: to compare with.

    Raises:
        TypeError: when the loss cannot be split into pieces exactly.
    """
    check_splittable(loss)
    if is_sum(loss):
        return loss(output, target), float(len(output))
    summed: Any = copy.copy(loss)  # shallow: class weights and other buffers stay shared
    summed.reduction = "sum"
    return summed(output, target), denominator(loss, output, target)


def denominator(loss: Any, output: Tensor, target: Tensor) -> float:
    """Return what the mean of a loss over a piece divides by; it adds up over pieces.

    Args:
        loss: accepted by `check_splittable`, with reduction "mean" or "batchmean".
        output: of the model.
        target: to compare with.
    """
    # A Python float: as a bfloat16 tensor, 1297 examples would count as 1296.
    if hasattr(loss, "denominator"):
        return float(loss.denominator(output, target))
    if loss.reduction == "batchmean":
        return float(len(output))
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return float(math.prod(torch.broadcast_shapes(output.shape, target.shape)))
    if target.is_floating_point():  # class probabilities: their mean does not look at the class weights
        return output.numel() / output.shape[min(1, output.dim() - 1)]
    kept = target[target != loss.ignore_index]
    return float(kept.numel() if loss.weight is None else loss.weight[kept].sum())


def check_splittable(loss: Loss, model: nn.Module | None = None) -> None:
    """Refuse a loss or a model whose gradient over a whole does not follow from those over the pieces.

    Known are the losses of torch.nn and manualprop.nn with reduction "mean" or "sum". A loss of your own, module or
    other callable, is split when it has an attribute `reduction` that it follows, and this is "sum"; or "mean", with
    a method `denominator(output, target)` that returns what the mean divides by. A model must treat every example
    alone, which batch normalisation in training mode does not.

    Args:
        loss: called on (output, target).
        model: checked too when given.

    Raises:
        TypeError: for any other loss.
        ValueError: for a model with batch normalisation in training mode.
    """
    reduction = getattr(loss, "reduction", None)
    divides = _is_known(loss) or hasattr(loss, "denominator")
    if not (reduction == "sum" or (reduction in ("mean", "batchmean") and divides)):
        raise TypeError(
            "A gradient computed in pieces must be exact, and it is not known what the mean of "
            f"{getattr(loss, '__name__', type(loss).__name__)} divides by. Got reduction={reduction!r}. Give it an "
            "attribute reduction='sum', or reduction='mean' and a method denominator(output, target) that returns "
            "what its mean divides by; or compute each update in one piece (micro_batch_size=None, one process)."
        )
    for path, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                "A gradient computed in pieces must be exact, and batch normalisation makes every example depend on "
                f"its piece. Got {type(module).__name__} at {path!r} in training mode. Use LayerNorm or GroupNorm, or "
                "compute each update in one piece (micro_batch_size=None, one process)."
            )


def compares_elements(loss: Loss) -> bool:
    """Return whether a loss of torch.nn or manualprop.nn pairs output and target element by element.

    Args:
        loss: called on (output, target).
    """
    return _is_known(loss) and isinstance(loss, _MEAN_OVER_ELEMENTS)


def _is_known(loss: Loss) -> bool:
    # A subclass from elsewhere may have changed `forward`, so the class itself must come from torch or from us.
    home = type(loss).__module__.partition(".")[0]
    known = (*_MEAN_OVER_ELEMENTS, nn.CrossEntropyLoss, nn.NLLLoss)
    return home in ("torch", "manualprop") and isinstance(loss, known)
