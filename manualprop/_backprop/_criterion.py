"""The loss, and its gradient with respect to the network's output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from manualprop import nn
from manualprop._backprop._context import Application, applications
from manualprop._backprop._stages import WAY_OUT, refusal
from manualprop._splitting import compares_elements, denominator, is_known
from manualprop._torch import nll_loss
from manualprop.functions._elementwise_loss import ElementwiseLoss
from manualprop.functions._execution import HALF, LARGE
from manualprop.functions._execution._classes import REDUCTIONS, counting, divisor, log_softmax, where_counted
from manualprop.functions.cross_entropy import gradient_of_all, gradient_of_log

OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)  # their targets may be numbers of classes

# (loss, gradient), from (output, target)
Evaluated = Callable[[Tensor, Tensor], tuple[float, Tensor]]
# (loss, its divisor, gradient), from (output, target, whether to divide)
Evaluate = Callable[[Tensor, Tensor, bool], tuple[Tensor, "Tensor | float", Tensor]]


class Criterion:
    """A loss: its value, the divisor of its mean, and its gradient with respect to the network's output.

    ``criterion(output, target, divide)`` returns the three.  ``divide=False`` gives the sum over the examples
    and its gradient: sums and divisors of pieces can be added up.
    """

    def __init__(self, loss: Module) -> None:
        _check(loss)
        self.loss, self.unreduced = loss, copy.copy(loss)
        self.unreduced.reduction = "none"  # type: ignore[assignment]
        self.is_sum = loss.reduction == "sum"
        self.traced = False  # whether a graph is being made: then no number may be read
        self._evaluate: Evaluate = self._by_rule
        if type(loss) is nn.CrossEntropyLoss and loss.label_smoothing == 0:
            self._evaluate = self._cross_entropy
            self._ignored: int = loss.ignore_index
            self._counts_all = loss.weight is None and self._ignored < 0

    def __call__(
        self, output: Tensor, target: Tensor, divide: bool = True
    ) -> tuple[Tensor, Tensor | float, Tensor]:
        if not (self.traced and isinstance(self.loss, OF_CLASSES) and not target.is_floating_point()):
            return self._evaluate(output, target, divide and not self.is_sum)
        exist = (target >= 0) & (target < output.shape[min(1, output.dim() - 1)])
        if hasattr(self.loss, "ignore_index"):
            exist |= target == self.loss.ignore_index
        loss, divisor, g = self._evaluate(output, target.where(exist, 0), divide and not self.is_sum)
        return loss.where(exist.all(), math.nan), divisor, g  # a graph cannot raise

    def repeated(self, x: Tensor, t: Tensor) -> Evaluated:
        """A function that returns loss and gradient of further outputs and targets of these shapes."""
        if x.numel() >= LARGE or x.dtype in HALF:
            return self.evaluate
        if self._evaluate != self._cross_entropy:
            return self._repeated_elementwise(x, t)
        fits = x.dim() == 2 and t.dim() == 1 and t.dtype == torch.int64 and x.is_cpu
        if not (self._counts_all and fits):
            return self.evaluate
        return self._repeated_for_one(x) if len(x) == 1 else self._repeated_cross_entropy(x)

    def evaluate(self, x: Tensor, t: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient of any output and target."""
        loss, _, g = self(x, t)
        return loss.item(), g

    def _repeated_cross_entropy(self, x: Tensor) -> Evaluated:
        reduction, ignored, general = REDUCTIONS[self.loss.reduction], self._ignored, self.evaluate  # type: ignore[index]
        minus_ones = x.new_full((len(x), 1), -1.0)  # kept, because making it costs as much as using it
        g = x.new_ones(()) / (1 if self.is_sum else len(x))
        gradient: Any = None
        p: Any = None

        def evaluate(x: Tensor, t: Tensor) -> tuple[float, Tensor]:
            nonlocal gradient, p
            log_p, index = log_softmax(x), t.unsqueeze(1)
            loss = nll_loss(log_p, t, None, reduction, ignored).item()
            if p is None:
                with torch.inference_mode(False):
                    p = torch.empty_like(log_p)  # in the layout of log_p
                gradient = gradient_of_all.program((log_p, g, index, minus_ones), ()).run
            try:
                return loss, gradient(log_p, g, index, minus_ones, p)
            except RuntimeError:  # out of bounds: an ignored target, which is negative here
                return general(x, t)

        return evaluate

    def _repeated_for_one(self, x: Tensor) -> Evaluated:
        """For one example: its loss is just -log p of its class."""
        p, minus_one, general, classes = (
            torch.empty_like(x),
            x.new_full((1, 1), -1.0),
            self.evaluate,
            x.shape[1],
        )
        indices: dict[int, Tensor] = {}  # class -> (1, 1) tensor; making one costs as much as using it
        example = (x, None, torch.zeros(1, 1, dtype=torch.int64), minus_one)
        gradient = gradient_of_all.program(example, ()).run

        def evaluate(x: Tensor, t: Tensor) -> tuple[float, Tensor]:
            target = int(t.item())
            index = indices.get(target)
            if index is None:
                if not 0 <= target < classes:  # an ignored or a wrong target
                    return general(x, t)
                index = indices[target] = torch.tensor([[target]])
            log_p = log_softmax(x)
            gradient(log_p, None, index, minus_one, p)
            return -log_p.tolist()[0][target], p  # faster than a torch operation on one number

        return evaluate

    def _repeated_elementwise(self, x: Tensor, t: Tensor) -> Evaluated:
        """For a loss that pairs output and target element by element."""
        if x.shape != t.shape or x.dtype != t.dtype or not _divides_by_shape(self.loss):
            return self.evaluate
        losses, application = self._apply(x, t)
        rule, (output, target, *p) = application.rule, application.arguments
        plain = output is x and target is t and not any(isinstance(a, Tensor) for a in p)
        plain = plain and losses.shape == x.shape and getattr(self.loss, "weight", None) is None
        if not (plain and issubclass(rule, ElementwiseLoss) and rule.partials[0] == "output_gradient"):
            return self.evaluate
        f, gradient, shape, dtype, general = rule.f, rule.output_gradient, t.shape, t.dtype, self.evaluate  # type: ignore[attr-defined]
        # A tensor: torch would turn a number into one at every call.
        scale = x.new_tensor(1.0 if self.is_sum else 1 / denominator(self.loss, x, t))

        def evaluate(x: Tensor, t: Tensor) -> tuple[float, Tensor]:
            if t.shape != shape or t.dtype is not dtype:
                return general(x, t)
            return f(x, t, *p).sum().mul_(scale).item(), gradient(x, t, *p).mul_(scale)

        return evaluate

    def _by_rule(self, output: Tensor, target: Tensor, divide: bool) -> tuple[Tensor, Tensor | float, Tensor]:
        """Any loss whose forward is one application of one rule."""
        losses, application = self._apply(output, target)
        divisor = 1.0 if self.is_sum else self._divisor(output, target, losses)
        application.context.needs_input_grad = (True, *[False] * (len(application.arguments) - 1))
        scale = (1 / divisor if self.traced or divisor else math.nan) if divide else 1.0
        dx = application.backward(self._slope(losses, application) * scale)[0]
        assert dx is not None
        return losses.sum() * scale, divisor, dx.to(output.dtype)

    def _slope(self, losses: Tensor, application: Application) -> Tensor:
        """The gradient of the sum of the losses with respect to what the rule made."""
        made, weight = application.output, getattr(self.loss, "weight", None)
        slope = torch.ones_like(made)
        # A weight that the rule was not given weighs what it made; fewer losses than the rule made are means over classes.
        if weight is not None and all(a is not weight for a in application.arguments):
            slope = (slope * weight).to(made.dtype)
        return slope if losses.shape == made.shape else slope * (losses.numel() / made.numel())

    def _apply(self, output: Tensor, target: Tensor) -> tuple[Tensor, Application]:
        """The losses of the elements, and the application of a rule that made them."""
        if compares_elements(self.loss) and output.shape != target.shape:
            raise ValueError(
                f"Backprop: {type(self.loss).__name__} must be given an output and a target of one shape. Got "
                f"{tuple(output.shape)} and {tuple(target.shape)}, which would be broadcast against each other; reshape "
                "the target, for example with target.unsqueeze(1)."
            )
        losses, found = applications(self.unreduced.forward, output, target)
        if len(found) != 1 or found[0].arguments[0].shape != output.shape:
            raise TypeError(
                refusal("loss", self.loss, "its forward is more than one application of one rule")
            )
        return losses, found[0]

    def _divisor(self, output: Tensor, target: Tensor, losses: Tensor) -> Tensor | float:
        if not (is_known(self.loss) or hasattr(self.loss, "denominator")):
            return float(losses.numel())  # the mean of one loss for each example, or for each element
        indices = isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) and not target.is_floating_point()
        if not (self.traced and indices):
            return denominator(self.loss, output, target)
        index, counted = counting(target, self.loss.ignore_index)  # type: ignore[arg-type]
        return divisor(index, self.loss.weight, counted, torch.float64)  # type: ignore[arg-type]

    def _cross_entropy(self, x: Tensor, t: Tensor, divide: bool) -> tuple[Tensor, Tensor | float, Tensor]:
        """For class indices: value and gradient share one softmax."""
        if x.dim() != 2 or t.dim() != 1 or t.dtype != torch.int64:
            return self._by_rule(x, t, divide)
        w: Any = self.loss.weight
        log_p = log_softmax(x)
        loss = nll_loss(log_p, t, w, REDUCTIONS["mean" if divide else "sum"], self._ignored)
        index, counted = counting(t.unsqueeze(1), self._ignored)
        D = divisor(index, w, counted, log_p.dtype)
        g = log_p.new_ones(()) / D if divide else log_p.new_ones(())
        dx = gradient_of_log(log_p, where_counted(g, counted), index, w, over=0)
        return loss, D, dx if dx.dtype == x.dtype else dx.to(x.dtype)


def _divides_by_shape(loss: Module) -> bool:
    return not (hasattr(loss, "denominator") or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss))


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
