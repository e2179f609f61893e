"""Runs one forward and backward pass of a model in a chosen precision, without a trace in the model."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from manualprop._receipt import Receipt, receipt
from manualprop._torch import TorchDispatchMode, tree_map

Named = dict[str, Tensor]


def run_model(model: nn.Module, inputs: Any, dtype: torch.dtype | None) -> Named:
    """Outputs, loss, gradients and the buffers after the pass, by name.

    Args:
        model: stays as it is: parameters, buffers, gradients, attributes, random state.
        inputs: a tensor, positional arguments, or keyword arguments; they are not written to.
        dtype: of all floating tensors, also those that the model makes itself.  None: the model's own.
    """
    parameters, buffers = _copies(model, dtype)
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)  # the model may write to it, such as to a cache
        value = _copy(value, dtype)
        if not value.is_floating_point():
            return value
        leaves.append(value.requires_grad_())
        return value.clone()  # the model may write to its input, which autograd forbids for a leaf

    everywhere = nullcontext() if dtype is None else _In(dtype)
    with left_as_found(model), torch.enable_grad(), everywhere:
        positional, keywords = tree_map(leaf, as_call(inputs))
        named: Named = functional_call(_Step(model), _within(parameters | buffers), positional, keywords)
    for number, value in enumerate(leaves):
        named[f"gradient of floating input {number}"] = _gradient(value)
    for name, value in parameters.items():
        if value.requires_grad:
            named[f"gradient of {name}"] = _gradient(value)
    for name, value in buffers.items():
        named[f"buffer {name}"] = value
    return named


def kept(model: nn.Module, inputs: Any) -> Receipt:
    """The receipt of one forward pass, also without a trace."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    parameters, buffers = _copies(model, None)
    with left_as_found(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other runs show the model's warnings
        positional, keywords = tree_map(copied, as_call(inputs))
        report: Receipt = functional_call(
            _Measured(model), _within(parameters | buffers), positional, keywords
        )
    return report


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _Step(nn.Module):
    """Forward and backward pass in one call, so that checkpointed layers run again on the same parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *positional: Any, **keywords: Any) -> Named:
        named = dict(_tensors("output", self.model(*positional, **keywords)))
        projected = [_project(y, seed) for seed, y in enumerate(named.values()) if is_floating(y)]
        loss = torch.stack(projected).sum() if projected else torch.zeros(())
        if loss.requires_grad:
            loss.backward()
        return {name: y.detach() for name, y in named.items()} | {"loss": loss.detach()}


class _Measured(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *positional: Any, **keywords: Any) -> Receipt:
        return receipt(self.model, *positional, **keywords)


def _copies(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, nn.Parameter], Named]:
    """Copies of the parameters and of the buffers, by all their names."""
    parameters = {
        name: nn.Parameter(_copy(p, dtype), p.requires_grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    buffers = {name: _copy(b, dtype) for name, b in model.named_buffers(remove_duplicate=False)}
    _tie(model.named_parameters(remove_duplicate=False), parameters)
    _tie(model.named_buffers(remove_duplicate=False), buffers)
    return parameters, buffers


def _within(values: Mapping[str, Tensor]) -> Named:
    """The values under the names that they have in a module whose attribute ``model`` is the model."""
    return {f"model.{name}": value for name, value in values.items()}


def _tensors(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, mappings and dataclasses, by name."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(f"{name}.{key}", value)
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from _tensors(f"{name}[{number}]", value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(f"{name}.{field.name}", getattr(output, field.name))


def is_floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _project(y: Tensor, seed: int) -> Tensor:
    """A fixed random projection to a scalar: every element of y counts, with its own weight.

    The weights are odd multiples of 1/32, which are exact in every precision.  They are drawn as integers, so
    they are the same in each precision.
    """
    y = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
    drawn = torch.randint(-32, 32, y.shape, generator=torch.Generator().manual_seed(seed))
    return (y.double() * (2 * drawn + 1).to(y.device).double().div(32)).sum()


def _copy(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return value.detach().to(wanted, copy=True)


def _tie(originals: Iterator[tuple[str, Tensor]], copies: dict[str, Any]) -> None:
    """Make the copies of one tensor one tensor."""
    first: dict[Tensor, str] = {}
    for name, original in originals:
        copies[name] = copies[first.setdefault(original, name)]


def _gradient(value: Tensor) -> Tensor:
    if value.grad is None:
        return torch.zeros_like(value)
    return value.grad.to_dense() if value.grad.layout != torch.strided else value.grad


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore what a forward pass may change: attributes, lazily made buffers, states of generators."""
    before = [(values, dict(values)) for module in model.modules() for values in _dictionaries(module)]
    accelerator = torch.accelerator.current_accelerator()
    kind, count = accelerator.type if accelerator else "cuda", torch.accelerator.device_count()
    with torch.random.fork_rng(range(count), device_type=kind):
        try:
            yield
        finally:
            for values, shallow in before:
                values.clear()
                values.update(shallow)


def _dictionaries(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module), module._parameters, module._buffers, module._modules]


def _hardsigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, g / 6, 0.0)


def _elu_backward(
    g: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    if abs(alpha * input_scale - 1) < 1e-6:  # CELU
        input_scale = 1 / alpha
    dx: Tensor = torch.ops.aten.elu_backward(g, alpha, scale, input_scale, is_result, x)
    return dx


# In float64 too, ATen rounds 1 / 6 and the 1 / alpha of CELU to float32.  That would hide an error of 1e-9, or look
# like one of our exact rules.
EXACT = {
    torch.ops.aten.hardsigmoid_backward.default: _hardsigmoid_backward,
    torch.ops.aten.elu_backward.default: _elu_backward,
}


class _In(TorchDispatchMode):
    """Keeps every floating tensor in one dtype, even if the model asks for another or makes constants."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A view of the bits must stay a view, and an in-place operation must write to the same tensor.
        if func is not torch.ops.aten.view.dtype and not func._schema.is_mutable:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        result = EXACT.get(func, func)(*args, **kwargs)
        return result if func._schema.is_mutable else tree_map(self._cast, result)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point else value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value
