"""The loss, and its gradient with respect to the network's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from manualprop import functions as rules
from manualprop import nn
from manualprop._backprop._context import applications
from manualprop._backprop._stages import WAY_OUT, refusal
from manualprop.descent import denominator
from manualprop.functions._narrow import log_softmax
from manualprop.functions._rule import HALF

MEAN, SUM = 1, 2  # ATen's numbers of the reductions

nll_loss: Any = (
    torch._C._nn.nll_loss_nd
)  # what torch.nn.functional.nll_loss calls; its stub names other types

# (loss, its divisor, gradient), from (output, target, whether to divide)
Evaluate = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | float", Tensor]]


class Criterion:
    """A loss: its value, what its mean divides by, and its gradient with respect to the network's output.

    The three come from ``criterion(output, target, divide)``, where ``divide=False`` asks for the sum over the
    examples and its gradient: those add up over pieces, as the divisors do.
    """

    def __init__(self, loss: Module) -> None:
        _check(loss)
        self.loss, self.unreduced = loss, copy.copy(loss)
        self.unreduced.reduction = "none"  # type: ignore[assignment]
        self.is_sum = loss.reduction == "sum"
        self.traced = False  # whether a graph is made of it: then no number may be read
        self._minus_ones = self._count = torch.empty(0, 1)
        self._evaluate: Evaluate = self._by_rule
        if type(loss) is nn.CrossEntropyLoss and loss.label_smoothing == 0:
            self._evaluate = self._cross_entropy
            self._ignored = loss.ignore_index
            self._counts_all = loss.weight is None and loss.ignore_index < 0

    def __call__(
        self, output: Tensor, target: Tensor, divide: bool = True
    ) -> tuple[Tensor, Tensor | float, Tensor]:
        return self._evaluate(output, target, divide and not self.is_sum)

    def _by_rule(self, output: Tensor, target: Tensor, divide: bool) -> tuple[Tensor, Tensor | float, Tensor]:
        """Any loss whose forward is one application of one rule."""
        losses, found = applications(self.unreduced.forward, output, target)
        if len(found) != 1 or found[0].arguments[0].shape != output.shape:
            raise TypeError(
                refusal("loss", self.loss, "its forward is more than one application of one rule")
            )
        application = found[0]
        divisor = 1.0 if self.is_sum else self._divisor(output, target)
        application.context.needs_input_grad = (True, *[False] * (len(application.arguments) - 1))
        scale = (1 / divisor if self.traced or divisor else math.nan) if divide else 1.0
        dx = application.backward(torch.ones_like(application.output) * scale)[0]
        assert dx is not None
        return losses.sum() * scale, divisor, dx.to(output.dtype)

    def _divisor(self, output: Tensor, target: Tensor) -> Tensor | float:
        indices = isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point()
        if not (self.traced and indices):
            return denominator(self.loss, output, target)
        w, ignored = self.loss.weight, self.loss.ignore_index
        return rules.NLL.class_and_weight(output, target, w, ignored)[1].sum()  # type: ignore[arg-type]

    def _cross_entropy(self, x: Tensor, t: Tensor, divide: bool) -> tuple[Tensor, Tensor | float, Tensor]:
        """Class indices: value and gradient share one softmax."""
        if x.dim() != 2 or t.dim() != 1 or t.dtype != torch.int64:
            return self._by_rule(x, t, divide)
        if not self._counts_all or self.traced or not x.is_cpu:
            return self._weighted_cross_entropy(x, t, divide)
        log_p = log_softmax(x.float() if x.dtype in HALF else x)
        loss = nll_loss(log_p, t, None, MEAN if divide else SUM, self._ignored)
        p, rows = log_p.exp_(), t.shape[0]
        try:
            dx = rules.CrossEntropy.minus_target(p, t.unsqueeze(1), self._minus(p))
        except RuntimeError:  # out of bounds: an ignored target, whose number is negative here
            return self._weighted_cross_entropy(x, t, divide)
        if divide and rows != 1:
            dx.div_(self._count)
        return loss, rows, dx if dx.dtype == x.dtype else dx.to(x.dtype)

    def _weighted_cross_entropy(
        self, x: Tensor, t: Tensor, divide: bool
    ) -> tuple[Tensor, Tensor | float, Tensor]:
        """The same, where not every target counts 1: it may be weighted or ignored."""
        w, ignored = self.loss.weight, self.loss.ignore_index
        log_p = log_softmax(x.float() if x.dtype in HALF else x)
        loss, divisor = torch.ops.aten.nll_loss_forward.default(log_p, t, w, MEAN if divide else SUM, ignored)
        index, M = rules.NLL.class_and_weight(log_p, t, w, ignored)  # type: ignore[arg-type]
        dx = rules.CrossEntropy.minus_target(log_p.exp_().mul_(M), index, -M)
        return loss, divisor, (dx.div_(divisor) if divide else dx).to(x.dtype)

    def _minus(self, p: Tensor) -> Tensor:
        """-1 for every row; kept, because making it takes as long as using it."""
        kept = self._minus_ones
        if kept.shape[0] != p.shape[0] or kept.dtype != p.dtype:
            kept = self._minus_ones = torch.full((len(p), 1), -1.0, dtype=p.dtype)
            self._count = torch.tensor(
                len(p), dtype=p.dtype
            )  # as a tensor: a number would become one each time
        return kept


def _check(loss: Module) -> None:
    if not type(loss).__module__.startswith("manualprop.nn."):
        twin = getattr(nn, type(loss).__name__, None)
        way = f"Use manualprop.nn.{twin.__name__}" if twin else WAY_OUT
        raise TypeError(
            f"Backprop: the loss must be one of manualprop.nn, whose gradient is known. Got {type(loss).__name__}. {way}."
        )
    if getattr(loss, "reduction", None) not in ("mean", "sum", "batchmean"):
        raise ValueError(
            "Backprop: the loss must be one number. Got reduction="
            f"{getattr(loss, 'reduction', None)!r}; use 'mean' or 'sum'."
        )
