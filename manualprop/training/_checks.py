"""Checks before the first update: data, model and loss must fit together, and the data must be finite.

Each error names the place (row and column of the data, layer of the model) and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manualprop._backprop import not_finite
from manualprop._splitting import compares_elements, is_sum
from manualprop.descent import Descent, MiniBatch, Stochastic
from manualprop.training._errors import InputTypeError, InputValueError, UserError

Examples = tuple[Tensor, Tensor]

# The exceptions of torch's layers and losses for tensors that do not fit.
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)

# The loss may rise to this many times the loss of a network that has learnt nothing.
DIVERGED = 100.0


def check_examples(split: str, examples: Any) -> None:
    """Refuse data on which no network can be trained.

    Args:
        split: "train", "val" or "test".
        examples: (inputs, targets).

    Raises:
        TypeError: for anything but a pair of tensors, and for inputs that are not floating point.
        ValueError: for an empty set, inputs and targets of different lengths, nan and infinite numbers.
    """
    x, target = _pair(split, examples)
    if x.dim() == 0 or target.dim() == 0 or len(x) == 0:
        raise InputValueError(
            f"TensorDataModule: {split} must hold at least one example. Got inputs of shape {tuple(x.shape)} and "
            f"targets of shape {tuple(target.shape)}; check the file and the selection that they come from."
        )
    if len(x) != len(target):
        raise InputValueError(
            f"TensorDataModule: {split} must hold one target per input. Got {len(x)} inputs and {len(target)} targets."
        )
    if not x.is_floating_point():
        raise InputTypeError(
            f"TensorDataModule: the inputs of {split} must be floating point. Got dtype={x.dtype}; convert them, for "
            "example with x.float() / x.max()."
        )
    for name, tensor in (("inputs", x), ("targets", target)):
        place = not_finite(tensor)
        if place:
            raise InputValueError(
                f"TensorDataModule: the {name} of {split} must be finite. Got {place}; remove such rows, or put in a "
                "value, for example the mean of the column."
            )


def _pair(split: str, examples: Any) -> Examples:
    if not isinstance(examples, tuple | list) or len(examples) != 2:
        got = type(examples).__name__
        if isinstance(examples, tuple | list):
            got += f" of {len(examples)}"
        raise InputTypeError(
            f"TensorDataModule: {split} must be a pair of tensors (inputs, targets). Got {got}."
        )
    for name, part in zip(("inputs", "targets"), examples, strict=True):
        if not isinstance(part, Tensor):
            raise InputTypeError(
                f"TensorDataModule: the {name} of {split} must be a tensor. Got {type(part).__module__}."
                f"{type(part).__name__}; convert it with torch.as_tensor(...)."
            )
    return examples[0], examples[1]


class Fit:
    """Checks that examples, model and loss fit together.

    Args:
        model: called on the inputs, without a trace.
        loss: called on (output, target).
        descent: decides which examples an update sees.
        features: the number of inputs of the model's first layer, if that is Linear.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, descent: Descent, features: int | None) -> None:
        self.model, self.loss, self.descent, self.features = model, loss, descent, features
        self.indices = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)

    def check_inputs(self, x: Tensor) -> None:
        """Refuse inputs that the model's first layer does not take."""
        if self.features is None:
            return
        if not x.is_floating_point():
            raise InputTypeError(
                f"DescentModule: the inputs of a Linear layer must be floating point. Got dtype={x.dtype}; convert "
                "them, for example with x.float()."
            )
        if x.dim() and x.shape[-1] == self.features:
            return
        remedy = f"change the first size of the model to {x.shape[-1] if x.dim() else 1}, or the data"
        if x.dim() > 2 and x[0].numel() == self.features:
            remedy = "flatten them: put torch.nn.Flatten() before the first layer, or hand over x.flatten(start_dim=1)"
        raise InputValueError(
            f"DescentModule: the model takes {self.features} features per example. Got inputs of "
            f"shape {tuple(x.shape)}; {remedy}."
        )

    def check(self, x: Tensor, target: Tensor, whole: bool = True) -> Tensor:
        """Run model and loss on examples, without a trace, and return the output.

        Args:
            x: the inputs of an update.
            target: their targets.
            whole: whether these are all examples of the update.

        Raises:
            TypeError: for a dtype that model or loss does not take, and an output that is not a tensor.
            ValueError: for shapes that do not fit, classes that do not exist, and targets that are all ignored.
        """
        self.check_inputs(x)
        self._check_place(x)
        with untouched(self.model, x), torch.no_grad():
            output: Tensor = attempt(lambda: self.model(x), f"the model must take inputs {_described(x)}")
            self.check_targets(output, target, whole)
            what = f"the loss must take an output {_described(output)} and targets {_described(target)}"
            one_number(attempt(lambda: self.loss(output, target), what))
        return output

    def _check_place(self, x: Tensor) -> None:
        first = next(self.model.parameters(), None)
        if first is None or not first.is_floating_point() or not x.is_floating_point():
            return
        if first.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputTypeError(
                f"DescentModule: model and inputs must be of one dtype. Got a model of {first.dtype} and inputs of "
                f"{x.dtype}; convert one, for example with x.to({first.dtype})."
            )

    def check_targets(self, output: Tensor, target: Tensor, whole: bool = True) -> None:
        """Refuse targets that the loss would misread, or from which nothing can be learnt.

        Args:
            output: the model's output; it shows the number of classes, or the shape of one example's output.
            target: the targets of any number of examples.
            whole: whether these are all targets of an update or a set; in a mere piece all may be ignored.
        """
        if self.indices:
            self._check_labels(output, target)
            if whole and not target.is_floating_point():
                self._check_ignored(target)
        elif compares_elements(self.loss) and output.shape[1:] != target.shape[1:]:
            raise InputValueError(
                f"DescentModule: {type(self.loss).__name__} must be given an output and a target of one shape. Got "
                f"{_per_example(output)} and {_per_example(target)}, which would be broadcast against each other; "
                f"{_reshape(output, target)}."
            )

    def _check_labels(self, output: Tensor, target: Tensor) -> None:
        name = type(self.loss).__name__
        if output.dim() < 2:
            raise InputValueError(
                f"DescentModule: {name} must be given one output per class, of shape (examples, classes). Got an "
                f"output of shape {tuple(output.shape)}; give the model's last layer as many outputs as there are classes."
            )
        if target.is_floating_point():
            if isinstance(self.loss, nn.CrossEntropyLoss) and target.shape[1:] == output.shape[1:]:
                return  # a probability for every class
            raise InputTypeError(
                f"DescentModule: the targets of {name} must be class numbers, of dtype torch.int64. Got targets "
                f"{_described(target)}; convert them with target.long()."
            )
        if target.dtype != torch.int64:
            raise InputTypeError(
                f"DescentModule: the targets of {name} must be class numbers, of dtype torch.int64. Got "
                f"dtype={target.dtype}; convert them with target.long()."
            )
        if target.shape[1:] != output.shape[2:]:
            raise InputValueError(
                f"DescentModule: {name} must be given one class number per example, of shape "
                f"{_per_example(output[:, 0])}. Got targets of shape {tuple(target.shape)}; "
                + (
                    "use target.squeeze(1)."
                    if target.dim() > 1 and target.shape[1] == 1
                    else "for one-hot rows use target.argmax(dim=1), or target.float() as probabilities."
                )
            )
        self._check_range(target, output.shape[1])

    def _check_ignored(self, target: Tensor) -> None:
        ignored: Any = self.loss.ignore_index
        if self.loss.reduction == "sum":
            return
        if isinstance(self.descent, Stochastic) and bool((target == ignored).any()):
            row = int((target == ignored).nonzero()[0, 0])
            raise InputValueError(
                f"Stochastic: every example must have a target, since each is an update of its own. Got {ignored} "
                f"(ignore_index) in row {row}; remove such rows, or use MiniBatch or reduction='sum'."
            )
        if bool((target == ignored).all()):
            raise all_ignored(len(target), ignored, self.descent)

    def _check_range(self, target: Tensor, classes: int) -> None:
        ignored: Any = self.loss.ignore_index
        wrong = ((target < 0) | (target >= classes)) & (target != ignored)
        if not bool(wrong.any()):
            return
        place = wrong.nonzero()[0]
        remedy = f"give the model's last layer {int(target.max()) + 1} outputs, or correct the labels"
        if bool((target[wrong] < 0).any()):
            remedy = f"number the classes from 0 on; {ignored} stands for a target that is ignored"
        raise InputValueError(
            f"DescentModule: class numbers must lie from 0 to {classes - 1}, because the model has {classes} outputs. "
            f"Got {int(target[tuple(place)])} in row {int(place[0])}; {remedy}."
        )


def all_ignored(count: int, ignored: int, descent: Descent) -> InputValueError:
    """Return the error for an update whose targets are all ignored.

    Args:
        count: the number of its examples.
        ignored: the number that stands for an ignored target.
        descent: the descent of the update.
    """
    remedy = "give some examples a class, or set ignore_index to a number that is not one of them"
    if isinstance(descent, MiniBatch):
        remedy = "remove the examples without a class, choose a larger batch_size, or use reduction='sum'"
    examples = "the one target" if count == 1 else f"all {count} targets"
    return InputValueError(
        f"DescentModule: an update must see at least one target that is not ignored: a mean over none is nan. Got "
        f"{ignored} (ignore_index) for {examples} of an update; {remedy}."
    )


def one_number(value: Any) -> Tensor:
    """Return the loss of an update, which must be one number.

    Args:
        value: the return value of the loss.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputValueError(
            f"DescentModule: the loss must be one number. Got {got}; return its mean or its sum."
        )
    return value


def attempt(call: Callable[[], Any], what: str) -> Any:
    """Return the result of a model or a loss; an error of theirs becomes one line.

    Args:
        call: calls the model or the loss.
        what: what must hold, for the error.
    """
    try:
        return call()
    except UserError:
        raise
    except _MISFITS as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise InputValueError(
            f"DescentModule: {what}. Got {type(error).__name__}: {reason}; change the layer or the data."
        ) from error


@contextmanager
def untouched(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Inside, buffers and random states may change; afterwards they are restored.

    Args:
        model: the model whose buffers are restored.
        x: on the device where the model draws its random numbers.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def highest_loss(loss: nn.Module, output: Tensor, target: Tensor) -> float | None:
    """Return the loss above which a network has diverged: a hundred times that of one that has learnt nothing.

    A network that has learnt nothing is the untrained one, or one whose output is 0: the one with the higher
    loss.

    Args:
        loss: called on (output, target).
        output: the output of the untrained network.
        target: the targets.

    Returns:
        That loss, for one example if `loss` is a sum; None if it is no limit, as for a negative loss.
    """
    with torch.no_grad():
        count = len(output) if is_sum(loss) else 1
        losses = [float(loss(guess, target)) / count for guess in (output, torch.zeros_like(output))]
    known = [value for value in losses if 0 < value < float("inf")]
    return DIVERGED * max(known) if known and min(losses) >= 0 else None


def check_architecture(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse the weights of another network, naming the layers that differ.

    Args:
        state: the weights of a checkpoint.
        module: the module that will get them.

    Raises:
        ValueError: for a name or a shape that differs.
    """
    saved = {name: str(tuple(tensor.shape)) for name, tensor in state.items()}
    own = {name: str(tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
    differing = [name for name in dict.fromkeys([*saved, *own]) if saved.get(name) != own.get(name)]
    if not differing:
        return
    listed = [
        f"{name} {saved.get(name, 'absent')} there, {own.get(name, 'absent')} here" for name in differing
    ]
    more = f"; and {len(listed) - 4} more" if len(listed) > 4 else ""
    raise InputValueError(
        f"The checkpoint must be of the same architecture. Got {'; '.join(listed[:4])}{more}. Give the configuration "
        "that it was trained with (config.yaml in its run directory), or another checkpoint."
    )


def _per_example(tensor: Tensor) -> str:
    return f"(N, {', '.join(map(str, tensor.shape[1:]))})" if tensor.dim() > 1 else "(N,)"


def _described(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} and {tensor.dtype}"


def _reshape(output: Tensor, target: Tensor) -> str:
    if output.shape[1:] == (1,) and target.dim() == 1:
        return "use target.unsqueeze(1)"
    if target.shape[1:] == (1,) and output.dim() == 1:
        return "use target.squeeze(1)"
    if target[0].numel() == output[0].numel():
        return f"use target.reshape({('-1, ' + ', '.join(map(str, output.shape[1:]))).rstrip(', ')})"
    return "give the model's last layer as many outputs as a target has entries"


def features(model: nn.Module) -> int | None:
    """Return in_features of the model's first layer; None if that is not a linear layer.

    Args:
        model: a layer, or layers in a row.
    """
    while isinstance(model, nn.Sequential) and len(model):
        model = model[0]
    return model.in_features if isinstance(model, nn.Linear) else None


def examples_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the inputs and the targets of a batch.

    Args:
        batch: the batch from a data loader.

    Raises:
        TypeError: for anything but a pair of tensors.
    """
    if (
        isinstance(batch, list | tuple)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        return batch[0], batch[1]
    raise InputTypeError(
        f"DescentModule: a batch must be a pair of tensors (inputs, targets). Got {type(batch).__name__}; hand your "
        "data over through TensorDataModule, or make your data loader return such pairs."
    )
