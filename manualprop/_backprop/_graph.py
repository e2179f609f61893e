"""The step as one graph: compiled, or captured on a GPU.

A graph cannot read a number or raise.  So the hyperparameters come as tensors, and the update is kept only if
the loss is finite.  The graph is traced from the stages, which run once on tensors without data.  So there is
no second implementation.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from manualprop._backprop._destinations import HYPERPARAMETERS, on
from manualprop._backprop._programs import compiled_program
from manualprop._torch import inductor

Body = Callable[..., tuple[Tensor, ...]]
Groups = list[dict[str, Any]]  # of an optimizer
Form = tuple[tuple[Any, ...], ...]

ONE_AT_A_TIME = threading.RLock()  # torch traces and compiles for one thread

OFTEN = 8  # steps of further inputs, after which a graph of their own is worth about ten seconds


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
        self._made: dict[Any, tuple[Body, list[int]]] = {}
        self._come: Counter[Any] = Counter()  # how often inputs came before they have a graph

    def run(
        self,
        body: Body,
        key: Any,
        inputs: list[Tensor],
        changed: Callable[[], list[Tensor]],
        held: list[int],
    ) -> tuple[Tensor, ...]:
        """``body(*inputs)``, run by its own graph, which is made anew for other ``held``.

        The first inputs of all have a graph at once, others when they come again and again: the last, smaller
        batch of an epoch does not wait for the compiler.
        """
        key = (key, *[(i.shape, i.stride(), i.dtype, i.device) for i in inputs])
        graph, its = self._made.get(key, (None, None))
        with torch.no_grad():
            if graph is None and self._made and self.compile and not self.capture and self._come[key] < OFTEN:
                self._come[key] += 1
                return body(*inputs)
            if graph is None or its != held:
                graph = self._make(body, inputs, changed())
                self._made[key] = graph, held
            return graph(*inputs)

    def _make(self, body: Body, inputs: list[Tensor], changed: list[Tensor]) -> Body:
        with undone(changed), ONE_AT_A_TIME:
            rehearse(body, inputs)
            graph = compiled_graph(body, inputs) if self.compile else body
            return captured(graph, inputs) if self.capture else graph


@contextmanager
def undone(changed: Sequence[Tensor]) -> Iterator[None]:
    """Inside, changes of these tensors do not count: tracing and warming up are no steps."""
    before = [c.clone() for c in changed]
    try:
        yield
    finally:
        with torch.no_grad():
            for c, b in zip(changed, before, strict=True):
                c.copy_(b)


def rehearse(body: Body, inputs: Sequence[Tensor]) -> None:
    """Run a body without tracing it: it raises for inputs that do not fit; under tracing torch logs a trace as well."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        body(*inputs)


class Hyperparameters:
    """The hyperparameters that have an effect, as tensors; they follow the optimizer's groups."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[tuple[int, str], tuple[float, Tensor]] = {}

    def of(self, groups: Groups) -> tuple[Form, list[Tensor]]:
        """What decides the form of the update, and its hyperparameters as tensors."""
        tensors = [self._tensor((i, name), groups[i][name]) for i, name in effective(groups)]
        return form_of(groups), tensors

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


def form_of(groups: Groups) -> Form:
    """What decides the form of the update."""
    return tuple(
        (group["maximize"], group["nesterov"], *[on(group[name]) for name in HYPERPARAMETERS])
        for group in groups
    )


def effective(groups: Groups) -> list[tuple[int, str]]:
    """The hyperparameters that have an effect: the number of the group, and the name."""
    return [(i, name) for i, group in enumerate(groups) for name in HYPERPARAMETERS if on(group[name])]


def with_tensors(groups: Groups, tensors: Iterable[Tensor]) -> list[Mapping[str, Any]]:
    """The groups, with tensors for their hyperparameters, in the order of :func:`effective`."""
    given = iter(tensors)
    return [group | {name: next(given) for name in HYPERPARAMETERS if on(group[name])} for group in groups]


def traced_body(body: Body, inputs: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The graph of ``body``, and the tensors that it holds (weights, buffers), which are its last inputs."""
    # Not Dynamo: it would trace through the machinery of the rules, and check many guards in every step.
    with torch.no_grad():
        trace = make_fx(
            lambda *given: body(*given),
            decomposition_table=LOWERED,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )
        graph = trace(*inputs)
    _declare_writes(graph)
    return graph, tensors_as_inputs(graph)


def _declare_writes(graph: GraphModule) -> None:
    """Replace native_batch_norm, which writes to its running statistics, by the form whose schema says so."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.native_batch_norm.default):
        *_, running_mean, running_var, _training, _momentum, _eps = node.args
        if running_mean is not None and running_var is not None:
            node.target = torch.ops.aten._native_batch_norm_legit.default


def compiled_graph(body: Body, inputs: list[Tensor]) -> Body:
    """``body`` as one compiled graph for inputs of these shapes."""
    graph, constants = traced_body(body, inputs)
    run = make(graph, [*inputs, *constants])

    def replay(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*arguments, *constants))

    return replay


def make(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph: on the CPU into a package, which is called without Python's wrapper."""
    if random_operation(graph) is not None or any(not i.is_cpu for i in inputs):
        return inductor(graph, [*inputs])
    run = compiled_program(graph, inputs)
    return lambda *given: run(given)


def random_operation(graph: GraphModule) -> str | None:
    """The name of an operation that draws random numbers; None if a graph has none."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return str(node.target)
    return None


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


# ----- what compiled code spells in another way -----

NARROW = 16  # columns: the numbers in a vector of the processor
PRODUCT = 2**26  # multiplications of a product up to which micro-kernels are faster


def has_micro_kernels(dtype: torch.dtype) -> bool:
    """Whether the compiler makes products itself.  Several threads would wait for each other at each of them."""
    return dtype == torch.float32 and torch.get_num_threads() == 1


def quick_product(a: Tensor, b: Tensor) -> Any:
    """A product as loops, or as a micro-kernel of the compiler's.

    One row makes a matrix and a vector of it, or two vectors: elementwise products and a sum, which the compiler fuses
    with what comes before and after: the step of one example is a few loops.  The compiler has
    micro-kernels for batches of products only, and on one thread they are twice as fast as a library for small
    ones.  A narrow product is stored column by column: its rows would not fill a vector of the processor.
    """
    (n, inner), m = a.shape, b.shape[1]
    if n == 1:
        return (a.t() * b).sum(0, keepdim=True)  # (1, I) (I, O) -> (1, O)
    if inner == 1:
        return a * b  # (O, 1) (1, I) -> (O, I)
    if a.is_cpu and m < min(n, NARROW):
        return torch.mm(b.t(), a.t()).t()
    if a.is_cpu and has_micro_kernels(a.dtype) and n * inner * m <= PRODUCT:
        return torch.bmm(a.contiguous().unsqueeze(0), b.unsqueeze(0)).squeeze(0)
    return NotImplemented


def product_and_sum(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
    """beta c + alpha a b, by :func:`quick_product`."""
    made = quick_product(a, b)
    if made is NotImplemented:
        return made
    return (c if beta == 1 else beta * c) + (made if alpha == 1 else alpha * made)


def one_of_each_row(x: Tensor, dim: int, index: Tensor, value: float) -> Any:
    """x with one number of each row replaced, as a comparison, which the compiler fuses; scattering is a pass of its own.

    It takes any index.  A loss reads the chosen class as well, and that refuses one that does not exist.
    """
    places = [1] * x.dim()
    places[dim] = x.shape[dim]
    if [k * n for k, n in zip(places, index.shape, strict=True)] != [*x.shape] or index.shape[dim] != 1:
        return NotImplemented
    at = torch.arange(x.shape[dim], device=x.device).view(places)
    return torch.where(at == index, x.new_full((), value), x)


def quick_tanh(x: Tensor) -> Any:
    """tanh in float32 in half the time of the compiler's own, with an error of 1.2 units in the last place at most.

    With s = x^2, Lambert's continued fraction x / (1 + s/(3 + s/(5 + s/(7 + s/(9 + s/11))))) to that term, for small x:
        tanh x = x (1 - s (3465 + 189 s + s^2) / (10395 + 4725 s + 210 s^2 + s^3))
    and beyond 0.8, where the difference from 1 is small, 1 - 2 / (e^(2|x|) + 1) with the sign of x.
    """
    if x.dtype != torch.float32:
        return NotImplemented
    s = x * x
    near = x * (1 - s * (3465 + s * (189 + s)) / (10395 + s * (4725 + s * (210 + s))))
    far = torch.copysign(1 - 2 / ((2 * x.abs()).exp() + 1), x)
    return torch.where(x.abs() < 0.8, near, far)


LOWERED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: quick_product,
    torch.ops.aten.addmm.default: product_and_sum,
    torch.ops.aten.scatter.value: one_of_each_row,
    torch.ops.aten.tanh.default: quick_tanh,
}


# ----- on a GPU -----


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
