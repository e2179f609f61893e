"""The step as one graph: compiled, or captured on a GPU.

A graph cannot read a number or raise.  So the hyperparameters come as tensors, and the update is kept only if
the loss is finite.  The graph is traced from the stages, which run once on tensors without data.  So there is
no second implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from manualprop._backprop._destinations import HYPERPARAMETERS, on
from manualprop._torch import inductor

Body = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """One graph for each combination of shapes, modes and hyperparameters that have an effect.

    Args:
        compile: compile each graph.
        capture: replay each graph on the GPU as a CUDA graph, without work on the CPU.
    """

    def __init__(self, compile: bool, capture: bool) -> None:
        if capture and not torch.cuda.is_available():
            raise RuntimeError(
                "Backprop: capture=True replays the step as a CUDA graph, and must have a GPU. Got none: "
                "torch.cuda.is_available() is False. Use compile=True, or neither."
            )
        self.compile, self.capture = compile, capture
        self._made: dict[Any, Body] = {}

    def run(
        self, body: Body, key: Any, inputs: list[Tensor], changed: Callable[[], list[Tensor]]
    ) -> tuple[Tensor, ...]:
        """``body(*inputs)``, run by its own graph; the first call makes it."""
        key = (key, *[(i.shape, i.dtype, i.device) for i in inputs])
        graph = self._made.get(key)
        with torch.no_grad():
            if graph is None:
                graph = self._made[key] = self._make(body, inputs, changed())
            return graph(*inputs)

    def _make(self, body: Body, inputs: list[Tensor], changed: list[Tensor]) -> Body:
        before = [c.clone() for c in changed]
        graph = compiled_graph(body, inputs) if self.compile else body
        graph = captured(graph, inputs) if self.capture else graph
        for c, b in zip(changed, before, strict=True):  # undo: tracing and warm-up must not count as steps
            c.copy_(b)
        return graph


class Hyperparameters:
    """The hyperparameters that have an effect, as tensors; they follow the optimizer's groups."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[int, str], tuple[float, Tensor]] = {}

    def of(self, groups: list[dict[str, Any]]) -> tuple[tuple[Any, ...], list[Tensor]]:
        """What decides the form of the update, and its hyperparameters as tensors."""
        form, tensors = [], []
        for i, group in enumerate(groups):
            form.append(
                (group["maximize"], group["nesterov"], *[on(group[name]) for name in HYPERPARAMETERS])
            )
            tensors += [self._tensor((i, name), group[name]) for name in HYPERPARAMETERS if on(group[name])]
        return tuple(form), tensors

    def _tensor(self, name: tuple[int, str], value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        known, tensor = self._tensors.get(name, (None, None))
        if tensor is None:
            tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        elif known != value:
            tensor.fill_(value)
        self._tensors[name] = (value, tensor)
        return tensor


def with_tensors(groups: list[dict[str, Any]], tensors: Iterable[Tensor]) -> list[Mapping[str, Any]]:
    """The groups, with tensors for their hyperparameters, in the order of ``Hyperparameters.of``."""
    given = iter(tensors)
    return [group | {name: next(given) for name in HYPERPARAMETERS if on(group[name])} for group in groups]


def compiled_graph(body: Body, inputs: list[Tensor]) -> Body:
    """``body`` as one compiled graph for inputs of these shapes."""
    # Not Dynamo: it would trace through the machinery of the rules, and check many guards in every step.
    graph = make_fx(lambda *given: body(*given), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    constants = tensors_as_inputs(graph)
    run = make(graph, [*inputs, *constants])

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*arguments, *constants))

    return replay


def make(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph."""
    return inductor(graph, [*inputs])


def tensors_as_inputs(graph: GraphModule) -> list[Tensor]:
    """Turn the tensors that a graph holds (weights, buffers) into inputs, and return them.

    A tensor that is changed in place must be an input, and equal memory must be one input.  The graph's own
    references are removed: the compiler would take them for further inputs.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    found: dict[Any, tuple[Any, Tensor]] = {}
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, node.target).data  # not detach(): it gives a view, which the compiler copies
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in found:
            with graph.graph.inserting_after(inputs[-1]):
                inputs.append(graph.graph.placeholder(f"held_{len(found)}"))
            found[key] = (inputs[-1], tensor)
            inputs[-1].meta = dict(node.meta)
        node.replace_all_uses_with(found[key][0])
        graph.graph.erase_node(node)
    held = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name, _ in held:
        delattr(graph, name)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return [tensor for _, tensor in found.values()]


def captured(body: Body, inputs: list[Tensor]) -> Body:
    """``body`` as a CUDA graph for inputs of these shapes.

    The graph reads and writes fixed addresses: inputs are copied there, and the next replay overwrites the
    outputs.  CUDA needs a few warm-up runs on a separate stream first.
    """
    static = [i.clone() for i in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = body(*static)

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        for s, argument in zip(static, arguments, strict=True):
            s.copy_(argument)
        graph.replay()
        return outputs

    return replay
