r"""Batch, stochastic and mini-batch gradient descent: which examples each update sees, and the update.

All three follow the gradient of a loss L averaged over examples, $\theta \leftarrow \theta - \eta \nabla L$.
They differ in how many of the N examples one update averages over: all (batch), one (stochastic), or some
(mini-batch).  This file needs only torch, so a plain PyTorch loop and Lightning can run the same descent:

    descent = MiniBatch(batch_size=32, learning_rate=0.1, momentum=0.9)
    optimizer = descent.make_optimizer(model.parameters())
    for epoch in range(20):
        for pieces in descent.updates(len(x), seed=0, epoch=epoch):
            optimizer.zero_grad()
            gradient(model, loss, [(x[rows], y[rows]) for rows in pieces])
            descent.clip_gradients(model.parameters())
            optimizer.step()
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from manualprop import _torch as _torch  # warns of an untested version
from manualprop._splitting import (
    check_splittable,
    denominator,
    finish_gradient,
    gradient,
    is_sum,
    sum_and_denominator,
)

__all__ = [
    "Batch",
    "Descent",
    "MiniBatch",
    "Stochastic",
    "check_splittable",
    "denominator",
    "finish_gradient",
    "gradient",
    "is_sum",
    "sum_and_denominator",
]


@dataclass(frozen=True, kw_only=True)
class Descent(ABC):
    """What the three descents share: the size of the step and how it is taken.

    Args:
        learning_rate: step size, above 0. Leave it out when `optimizer` is given.
        momentum: share of the last step that is kept, at least 0 and below 1.
        nesterov: look ahead along the momentum (needs a momentum above 0).
        weight_decay: factor of the L2 penalty on the weights, at least 0.
        optimizer: any torch.optim class instead of the above, with its own lr; not torch.optim.LBFGS.
        lr_scheduler: any torch.optim.lr_scheduler class.
        lr_scheduler_interval: step the schedule after every "epoch" or every "update".
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

        The order depends only on (seed, epoch), so a resumed run sees the same order.

        Args:
            n: number of training examples, at least 1.
            seed: the seed of the order.
            epoch: 0, 1, ...; each has its own order.
        """

    @abstractmethod
    def updates_per_epoch(self, n: int) -> int:
        """Return the number of updates in one pass over n examples."""

    def make_optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        """Return the optimizer that takes the step.

        Args:
            parameters: the parameters to train.

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
            ValueError: for ReduceLROnPlateau with interval "update": its value is known only once per epoch.
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
            parameters: the parameters whose `.grad` is limited.
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
        micro_batch_size: examples held in memory at once, at least 1; None for all. It bounds the memory and
            changes the gradient only by rounding.
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
    # torch's CPU generator uses only 32 bits of its seed: hash the pair, so that (0, 1) and (1, 0) differ.
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=4).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
