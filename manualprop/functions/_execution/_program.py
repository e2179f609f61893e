"""A formula as a program for eager mode: the same arithmetic in fewer passes over the memory.

A formula is traced once by :mod:`torch.fx`, run on small tensors to learn the shape of each value, and
written out as straight-line Python.  The mathematics stays.  Four things change:

- ``a + k b c`` is one ``addcmul``, ``a + k b`` one ``add``: one pass and one rounding.
- A value that is no longer needed is overwritten by the next value of its shape.  A new large tensor costs a
  page fault every few kilobytes, a new small one the time to make it.
- A number is a 0-d tensor, made once.  Otherwise ATen makes one at every call.
- Some steps have a faster form, such as a matrix product for a weighted sum: ``_lowering.py`` lists them.

Symbols
    node   a step of the formula        base   the node that owns a node's memory: itself unless it is a view
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from manualprop._torch import without_modes
from manualprop.functions._execution._lowering import lowered, where_not


class Program(NamedTuple):
    """A formula as straight-line Python."""

    run: Callable[..., Any]  # takes the formula's arguments, then an optional ``out`` for each result
    steps: int
    made: tuple[bool, ...]  # for each result, whether it is computed; the others are None
    code: str

    @property
    def scatters(self) -> bool:
        """Whether it writes at the classes of targets; a compiled kernel compares each target with every class."""
        return "scatter" in self.code or "put_on_class" in self.code


# Functions that take ``out``.
WRITES_OUT = frozenset(
    "abs add addcdiv addcmul ceil clamp cos div eq erf erfc exp exp2 expm1 ge gt le log log1p lt maximum minimum "
    "mm mul multiplied_or_chosen mv ne neg pow reciprocal rsqrt sigmoid sign sin softmax sqrt square sub tanh threshold where where_not xlogy".split()
)
# Methods that torch also has as functions with the same arguments.
METHODS = WRITES_OUT - {"multiplied_or_chosen", "where", "where_not"} | frozenset(
    "detach index_add masked_fill scatter scatter_add squeeze sum unsqueeze".split()
)
# Functions whose ``out`` must not be one of their inputs.  In where_not it may be the first input.
PRODUCTS = frozenset({"mm", "multiplied_or_chosen", "mv", "softmax"})
COMPARISONS = frozenset({"torch.eq", "torch.ge", "torch.gt", "torch.le", "torch.lt", "torch.ne"})
COMMUTES = frozenset({"add", "mul"})
# Functions whose numbers may be 0-d tensors.
TAKES_CONSTANTS = frozenset("add addcmul div eq ge gt le lt maximum minimum mul ne sub where".split())

OPERATORS = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.neg: "neg",
    operator.pow: "pow",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.lt: "lt",
    operator.le: "le",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.matmul: "matmul",
    operator.abs: "abs",
}


def program(
    formula: Callable[..., Any], arguments: Sequence[Tensor | None], given: frozenset[int]
) -> Program:
    """``formula`` as a program; it takes the same arguments, then an optional ``out`` tensor for each result.

    Args:
        formula: a function of tensors that returns a tensor, or a tuple of tensors and None.
        arguments: a sample for each argument; axes that may differ in length must differ in the samples.
        given: the indices of the arguments that may be overwritten.
    """
    with without_modes():  # an active torch mode must not count these steps or replace the samples
        graph = traced(formula, arguments)
        lowered(graph)
        measure(graph, arguments)
        return Writer(graph, len(arguments), given).program()


# ----- from a formula to a graph -----


def traced(formula: Callable[..., Any], arguments: Sequence[Tensor | None]) -> fx.Graph:
    """The formula as a graph of calls of torch's functions."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [
        None if a is None else fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i, a in enumerate(arguments)
    ]
    results = formula(*proxies)
    results = results if isinstance(results, tuple) else (results,)
    graph.output(tuple(r.node if isinstance(r, fx.Proxy) else r for r in results))
    for node in graph.nodes:
        if node.op == "call_function" and node.target in OPERATORS:
            node.target = getattr(torch, OPERATORS[node.target])
        elif node.op == "call_method" and node.target in METHODS:
            node.op, node.target = "call_function", getattr(torch, node.target)
    measure(graph, arguments)
    return graph


def measure(graph: fx.Graph, arguments: Sequence[Tensor | None]) -> None:
    """Run the graph on the samples; give each node its value and its base."""
    rest = iter([a for a in arguments if a is not None])
    with torch.inference_mode(False), torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                value: Any = next(rest)
            elif node.op == "output":
                continue
            elif "known" in node.meta:
                value = node.meta["known"]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
                if node.target is torch.addcmul and not isinstance(args[0], Tensor):
                    args = (args[1].new_empty(()), *args[1:])
                call = node.target if node.op == "call_function" else getattr(Tensor, node.target)
                value = call(*args, **kwargs)
            node.meta["value"], node.meta["base"] = value, node
            for source in node.all_input_nodes:
                if _shares_memory(value, source.meta["value"]):
                    node.meta["base"] = source.meta["base"]


def _shares_memory(value: Any, source: Any) -> bool:
    both = isinstance(value, Tensor) and isinstance(source, Tensor)
    return both and value.untyped_storage()._cdata == source.untyped_storage()._cdata


# ----- from a graph to a program -----


class Writer:
    """Writes a graph as Python, line by line, and names the memory of each value."""

    def __init__(self, graph: fx.Graph, count: int, given: frozenset[int]) -> None:
        self.nodes = [n for n in graph.nodes if n.op != "output"]
        self.results = next(n for n in graph.nodes if n.op == "output").args[0]
        self.count, self.given = count, given
        self.constants: dict[tuple[str, torch.dtype], str] = {}
        self.environment: dict[str, Any] = {"torch": torch}
        self.names: dict[fx.Node, str] = {}
        self.buffers: dict[fx.Node, str] = {}  # base -> the name of its memory
        self.free: list[tuple[str, torch.Size, torch.dtype]] = []
        self.lines: list[str] = []
        self.last_use = self._last_uses()
        self.born: dict[str, int] = {}  # name of memory -> the line whose call allocates it

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            for source in (node, *node.all_input_nodes):
                last[source.meta["base"]] = i
        for result in self.results:
            if result is not None:
                last[result.meta["base"]] = len(self.nodes)
        return last

    def program(self) -> Program:
        for i, node in enumerate(self.nodes):
            if node.op == "placeholder":
                self.names[node] = node.name
                if int(node.name[1:]) in self.given:
                    self.buffers[node] = node.name
            else:
                self._write(i, node)
            self._let_go(i, node)
        arguments = [f"a{i}" for i in range(self.count)]
        head = f"def run({', '.join([*arguments, *self._outs()])}):"
        code = "\n    ".join([head, *self._with_outs(), f"return {self._returned()}"])
        exec(compile(code, "<program>", "exec"), self.environment)
        made = tuple(r is not None for r in self.results)
        return Program(self.environment["run"], len(self.lines), made, code)

    def _write(self, i: int, node: fx.Node) -> None:
        value, name = node.meta["value"], f"v{i}"
        self.names[node] = name
        function, args = self._call(node)
        base = node.meta["base"]
        if base is not node or not isinstance(value, Tensor):  # a view, or not a tensor
            self.lines.append(f"{name} = {function}({', '.join(args)})")
            return
        plain, room = function.removeprefix("torch."), self._dying(i, node)
        if room is None and plain in WRITES_OUT:
            room = self._unused(value)
        if plain in COMMUTES and not node.kwargs and args[1] == room:
            args.reverse()
        if room is not None and args[0] == room and hasattr(Tensor, f"{plain}_"):
            call = f"{room}.{plain}_({', '.join(args[1:])})"
        elif room is not None and plain in WRITES_OUT:
            call = f"{function}({', '.join([*args, f'out={room}'])})"
        else:
            room, call = name, f"{function}({', '.join(args)})"
            self.born[name] = len(self.lines)
            if function in COMPARISONS and "known" in node.meta:  # without ``out`` it would give booleans
                self.lines.append(f"{name} = torch.empty_like({args[0]})")
                call = f"{call[:-1]}, out={name})"
            else:
                call = f"{name} = {call}"
        self.names[node] = self.buffers[node] = room
        self.lines.append(call)

    def _call(self, node: fx.Node) -> tuple[str, list[str]]:
        """The function's name, and its arguments as text."""
        if node.op == "call_method":
            name = f"torch.Tensor.{node.target}"
        else:
            target: Any = node.target
            name = target.__name__
            if getattr(torch, name, None) is target:
                name = f"torch.{name}"
            elif self.environment.setdefault(name, target) is not target:
                name = f"{name}{len(self.environment)}"
                self.environment[name] = target
        tensors = [a.meta["value"] for a in node.all_input_nodes if isinstance(a.meta["value"], Tensor)]
        like = tensors[0].dtype if tensors and name.removeprefix("torch.") in TAKES_CONSTANTS else None
        like = None if like is not None and like.itemsize < 4 else like  # half precision would round it
        args = [self._text(a, like) for a in node.args]
        return name, args + [f"{k}={self._text(v)}" for k, v in node.kwargs.items()]

    def _text(self, a: Any, like: torch.dtype | None = None) -> str:
        if isinstance(a, fx.Node):
            return self.names[a]
        if isinstance(a, tuple | list):
            return f"({''.join(self._text(b) + ', ' for b in a)})"
        if like is not None and like.is_floating_point and type(a) in (int, float):
            return self._constant(float(a), like)
        if a is None or type(a) in (int, bool) or (type(a) is float and math.isfinite(a)):
            return repr(a)
        name = f"k{len(self.environment)}"
        self.environment[name] = a
        return name

    def _constant(self, value: float, dtype: torch.dtype) -> str:
        key = (repr(value), dtype)  # repr tells 0.0 from -0.0
        if key not in self.constants:
            name = self.constants[key] = f"c{len(self.constants)}"
            with torch.inference_mode(False):  # the tensor is cached and outlives inference mode
                self.environment[name] = torch.tensor(value, dtype=dtype, device="cpu")
        return self.constants[key]

    # ----- memory -----

    def _dying(self, i: int, node: fx.Node) -> str | None:
        """The memory of an argument of this node's shape that no later node reads."""
        value, sources = node.meta["value"], node.all_input_nodes
        if getattr(node.target, "__name__", "") in PRODUCTS:
            return None
        for source in sources[:1] if node.target is where_not else sources:
            if sum(other.meta["base"] is source for other in sources) > 1:  # the node also reads a view of it
                continue
            whole = source.meta["base"] is source and _alike(source.meta["value"], value)
            if whole and source in self.buffers and self.last_use[source] == i:
                return self.buffers[source]
        return None

    def _unused(self, value: Tensor) -> str | None:
        for entry in self.free:
            if entry[1:] == (value.shape, value.dtype):
                self.free.remove(entry)
                return entry[0]
        return None

    def _let_go(self, i: int, node: fx.Node) -> None:
        """Free the memory that node i used last, unless the node writes its own value there."""
        taken = {self.buffers.get(other) for other, last in self.last_use.items() if last > i}
        for source in {n.meta["base"] for n in (node, *node.all_input_nodes)}:
            name = self.buffers.get(source)
            if name is not None and self.last_use[source] == i and name not in taken:
                value = source.meta["value"]
                entry = (name, value.shape, value.dtype)
                if isinstance(value, Tensor) and entry not in self.free:
                    self.free.append(entry)

    # ----- results -----

    def _outs(self) -> list[str]:
        return [f"out{j}=None" for j, r in enumerate(self.results) if r is not None]

    def _with_outs(self) -> list[str]:
        """The lines, changed so that each result goes into its ``out`` if it is given."""
        lines, copies = list(self.lines), []
        for j, result in enumerate(self.results):
            if result is None:
                continue
            name = self.names[result]
            line = lines[self.born[name]] if name in self.born else ""
            plain = line.partition(" = ")[2].partition("(")[0].removeprefix("torch.")
            if plain == "empty_like":
                lines[self.born[name]] = f"{line} if out{j} is None else out{j}"
            elif plain in WRITES_OUT and result.meta["base"] is result:
                lines[self.born[name]] = f"{line[:-1]}, out=out{j})"
            else:
                copies.append(f"{name} = {name} if out{j} is None else out{j}.copy_({name})")
        return lines + copies

    def _returned(self) -> str:
        texts = ["None" if r is None else self.names[r] for r in self.results]
        return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"


def _alike(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
