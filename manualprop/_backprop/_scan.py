"""An epoch as one graph: the step, traced from the stages, and repeated by torch's ``scan``.

    (weights, momentum), (x_k, target_k, lr_k ...)  ->  (weights, momentum), (loss_k, output_k)      for k = 1 ... K

A scan carries what one update leaves to the next: weights, momentum buffers, running statistics.  The graph is
functional: it returns the carry, and whoever runs it copies the carry into the model once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from manualprop._backprop._graph import Body, random_operation, traced_body
from manualprop._backprop._programs import Program, compiled_program, is_kept
from manualprop._torch import scan, with_any_length

aten = torch.ops.aten


class Scan(NamedTuple):
    """K updates, for any K: their program reads ``carried``, the inputs of the step for all updates, and ``fixed``.

    It returns the new ``carried``, then what the step returns, for all updates.  What is one for each update is stacked.
    """

    step: GraphModule  # the functional step, with these inputs and outputs
    inputs: list[Tensor]  # examples of the step's own inputs
    carried: list[Tensor]  # the tensors of the model and of the optimizer that an update changes
    fixed: list[Tensor]  # the others that it reads

    def is_kept(self) -> bool:
        """Whether the program is on disk."""
        return is_kept(self.step)

    def program(self) -> Program:
        """The program, loaded or compiled."""
        return compiled_program(self.step, [*self.carried, *self.inputs, *self.fixed], self._repeated)

    def _repeated(self, step: GraphModule, inputs: Sequence[Tensor]) -> tuple[GraphModule, Sequence[Tensor]]:
        """The graph that repeats the step, and examples of its inputs: the compiler learns no K from them."""
        c, end = len(self.carried), len(self.carried) + len(self.inputs)

        def updates(*tensors: Tensor) -> list[Tensor]:
            return scan(step, list(tensors[:c]), list(tensors[c:end]), tensors[end:])

        examples = with_any_length(inputs[:c], inputs[c:end], inputs[end:])
        with torch.no_grad():
            return make_fx(updates)(*examples), examples


class RandomGraphError(TypeError):
    """A graph draws random numbers."""


def scanned(step: Body, inputs: Sequence[Tensor]) -> Scan:
    """The scan of a step.

    Args:
        step: makes one update, in place, and returns tensors.
        inputs: examples of its inputs.

    Raises:
        RandomGraphError: for a step that draws random numbers: a program would draw the same in each update.
    """
    graph, held = _functional(step, inputs)
    n = len(inputs)
    given = list(graph.graph.find_nodes(op="placeholder"))
    final = _final_values(graph)
    carry = [k for k, node in enumerate(given[n:]) if node in final]
    rest = [k for k in range(len(held)) if k not in carry]
    order = [*(given[n + k] for k in carry), *given[:n], *(given[n + k] for k in rest)]
    functional = _rearranged(graph, order, [final[given[n + k]] for k in carry])
    return Scan(functional, [*inputs], [held[k] for k in carry], [held[k] for k in rest])


def _functional(step: Body, inputs: Sequence[Tensor]) -> tuple[GraphModule, list[Tensor]]:
    """The graph of a step without writes, except for the last value of each input, and the tensors it holds."""
    graph, held = traced_body(step, inputs)
    random = random_operation(graph)
    if random is not None:
        raise RandomGraphError(random)
    functional = torch.func.functionalize(graph, remove="mutations")
    with torch.no_grad():
        return make_fx(functional, tracing_mode="fake")(*inputs, *held), held


def _final_values(graph: GraphModule) -> Mapping[Node, Node]:
    """The last value of each input that the graph writes to.  The writes are removed from the graph."""
    final = {}
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy_.default):
        final[node.args[0]] = node.args[1]
        graph.graph.erase_node(node)
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy.default):
        source = node.args[1]
        if (
            source.meta["val"].dtype == node.meta["val"].dtype
            and source.meta["val"].shape == node.meta["val"].shape
        ):
            final = {given: source if value is node else value for given, value in final.items()}
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    return final


def _rearranged(graph: GraphModule, order: Sequence[Node], carry: Sequence[Node]) -> GraphModule:
    """The graph with its inputs in another order, and with ``carry`` before what it returns."""
    new, copies = Graph(), {}
    for node in order:
        copies[node] = new.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    returned: Any = graph.graph.output_node().args[0]
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = new.node_copy(node, copies.__getitem__)
    new.output(tuple(copies[node] for node in [*carry, *returned]))
    new.eliminate_dead_code()
    return GraphModule(graph, new)
