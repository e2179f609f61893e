"""Reads a method of a module as a list of steps, which can then run in its place."""

import inspect
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import Tensor, fx, nn

from manualprop.functional.fused import ACTIVATIONS, _activate
from manualprop.nn.fusing import FUNCTIONS


class Pool(NamedTuple):
    """A pooling function of torch, by name: some of these functions cannot be pickled."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = getattr(torch_F, self.name)(*args, **kwargs)
        return y


KINDS = ("max", "avg", "adaptive_max", "adaptive_avg")
POOLS = {
    getattr(torch_F, name): Pool(name)
    for name in (f"{kind}_pool{axes}d" for kind in KINDS for axes in (1, 2, 3))
}
# What a method may call: all these do the same at each call.
KEEP_NOTHING = {operator.add, operator.iadd, torch.add, torch.cat}  # not even their inputs, for backward
PRODUCTS = {operator.mul, torch.mul}  # keep their factors, not their results
CALLED = {
    *(*FUNCTIONS, *KEEP_NOTHING, *PRODUCTS, *POOLS, torch.flatten, torch.mean),
    *(torch.permute, torch.transpose, torch_F.interpolate, torch_F.pad),
}
PURE = {*CALLED, getattr, operator.getitem} - {operator.iadd}
METHODS_CALLED = (
    "contiguous",
    "flatten",
    "mean",
    "permute",
    "reshape",
    "size",
    "transpose",
    "unsqueeze",
    "view",
)
FOREIGN = "transformers.activations"  # its own classes for the same functions


class Value(NamedTuple):
    """The number of a value: 0 for the input, n + 1 for the result of step n."""

    number: int


Through = tuple[tuple[str, type[nn.Module]], ...]  # path and class


class MethodStep(NamedTuple):
    """One step of a method: a layer or a function, and its arguments, of values and constants."""

    path: str
    function: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    name: str | None  # the name of the activation that a foreign class computes

    @property
    def inputs(self) -> tuple[int, ...]:
        return tuple(_values_in((*self.arguments, *(value for _, value in self.keywords))))


class Unfusable(Exception):
    """The reason why a candidate is not fused."""


def attribute(module: nn.Module, path: str) -> Any:
    """The parameter or buffer that a method itself uses, as it is now."""
    return operator.attrgetter(path)(module)


class _Method(nn.Module):
    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner, self.method = owner, method

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.owner, self.method)(x)
        return output


class _Proxy(fx.Proxy):
    """A symbol that records ``x += y`` as such; torch's records an ordinary sum."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.through: dict[str, type[nn.Module]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.through[path.removeprefix("owner.")] = type(m)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # An identity is walked through as well: what it returns is its input, so neighbours around it may run as one.
        is_identity = isinstance(m, nn.Identity) and type(m).forward is nn.Identity.forward
        return next(m.children(), None) is None and not is_identity


def steps_of(module: nn.Module, method: str) -> tuple[tuple[MethodStep, ...], Through]:
    """The steps of ``module.method(x)`` in its present mode, and the inner modules whose forward they stand for.

    Raises:
        Unfusable: if the steps would not do at each call what the method does.
    """
    if not _takes_one_value(getattr(module, method)):
        raise Unfusable(f"its {method} does not take one value")
    tracer = _Tracer()
    with _without_traces(module, method):
        try:
            graph = tracer.trace(_Method(module, method))
        except Exception as error:  # a foreign forward may raise anything when it gets a symbol
            raise Unfusable(f"its {method} cannot be traced ({type(error).__name__})") from None
    graph.eliminate_dead_code(lambda node: not _is_pure(node))
    values: dict[fx.Node, Value] = {}
    steps: list[MethodStep] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = Value(0)
        elif node.op == "output":
            if node.args[0] is not next(reversed(values)):
                raise Unfusable(f"its {method} returns more than the last result")
        else:
            steps.append(_step(module, node, values, method))
            values[node] = Value(len(steps))
    return tuple(steps), tuple(tracer.through.items())


def _takes_one_value(method: Callable[..., Any]) -> bool:
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    return True


def _is_pure(node: fx.Node) -> bool:
    """Whether a step may be left out if nothing uses its result."""
    if node.op == "call_function":
        return node.target in PURE
    return node.op == "get_attr" or (node.op == "call_method" and node.target in METHODS_CALLED)


@contextmanager
def _without_traces(module: nn.Module, method: str) -> Iterator[None]:
    """Undo what a trace does to ``module``; refuse a method that has effects, which its steps would not have.

    Such are an attribute that it sets, and random numbers that it draws.
    """
    attributes = [(part, name, value, _contents(value)) for part, name, value in _attributes(module)]
    buffers = [(name, buffer, buffer._version, buffer.clone()) for name, buffer in module.named_buffers()]
    states = _random_states()
    try:
        yield
    finally:
        found = {(part, name): value for part, name, value in _attributes(module)}
        changed = [
            name for part, name, *old in attributes if not _is_same(found.pop((part, name), None), *old)
        ]
        changed += [name for _, name in found]
        changed += [name for name, buffer, version, _ in buffers if buffer._version != version]
        for part, name in found:
            del vars(part)[name]
        for part, name, value, contents in attributes:
            vars(part)[name] = value
            _restore(value, contents)
        for _, buffer, version, value in buffers:
            if buffer._version != version:
                buffer.copy_(value)
        now = _random_states()
        drawn = not torch.equal(now[0], states[0]) or now[1] != states[1]
        torch.set_rng_state(states[0])
        random.setstate(states[1])
    if changed:
        raise Unfusable(f"its {method} changes {changed[0]}")
    if drawn:
        raise Unfusable(f"its {method} draws random numbers")


def _random_states() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), random.getstate()


def _attributes(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [(part, name, value) for part in module.modules() for name, value in vars(part).items()]


def _contents(value: Any) -> list[Any] | dict[Any, Any] | None:
    """What a list or dictionary holds."""
    return value.copy() if isinstance(value, list | dict) else None


def _is_same(value: Any, old: Any, contents: Any) -> bool:
    if value is not old or contents is None:
        return value is old
    now, then = ([*held.values()] if isinstance(held, dict) else held for held in (value, contents))
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _restore(value: Any, contents: Any) -> None:
    if isinstance(contents, dict):
        value.clear()
        value.update(contents)
    elif contents is not None:
        value[:] = contents


def _step(module: nn.Module, node: fx.Node, values: Mapping[fx.Node, Value], method: str) -> MethodStep:
    given: Any = (node.args, tuple(node.kwargs.items()))
    found: Any = fx.node.map_arg(given, lambda n: values[n])
    arguments, keywords = found
    if node.op == "call_module":
        path = str(node.target).removeprefix("owner.")
        return MethodStep(path, None, arguments, keywords, _foreign_name(module.get_submodule(path)))
    function: Any = node.target
    if node.op == "get_attr":
        owner, _, path = function.partition(".")
        if owner != "owner":  # the trace keeps it, but the method makes it anew
            raise Unfusable(f"its {method} makes a tensor")
        return MethodStep("", attribute, (path,), (), None)
    if function is getattr and node.args[1] == "shape":
        return MethodStep("", Tensor.size, arguments[:1], (), None)
    if function is getattr:
        raise Unfusable(f"its {method} reads .{node.args[1]}")
    if node.op == "call_method" and function in METHODS_CALLED:
        function = getattr(Tensor, function)
    elif function is operator.getitem and _is_part_of_a_shape(node):
        pass
    elif node.op != "call_function" or function not in CALLED:
        raise Unfusable(f"its {method} calls {getattr(function, '__name__', function)}")
    return MethodStep("", POOLS.get(function, function), arguments, keywords, None)


def _is_part_of_a_shape(node: fx.Node) -> bool:
    """Whether a step takes a number, or several, out of the shape of a value."""
    whole, index = node.args
    bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    is_constant = all(bound is None or isinstance(bound, int) for bound in bounds)
    is_shape = isinstance(whole, fx.Node) and (
        (whole.target is getattr and whole.args[1] == "shape")
        or (whole.target == "size" and len(whole.args) == 1 and not whole.kwargs)
    )
    return is_shape and is_constant


def _values_in(arguments: Any) -> Iterator[int]:
    """The numbers of the values in nested arguments."""
    if isinstance(arguments, Value):
        yield arguments.number
    elif isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _values_in(argument)


def filled(arguments: Any, values: Sequence[Any]) -> Any:
    """Nested arguments, with each value in its place."""
    if isinstance(arguments, Value):
        return values[arguments.number]
    if isinstance(arguments, tuple | list):  # fx has its own list, which the compiler cannot trace
        kind = list if isinstance(arguments, list) else tuple
        return kind(filled(argument, values) for argument in arguments)
    return arguments


def _foreign_name(part: nn.Module) -> str | None:
    """The activation that a class of another library computes, found by its values in float64."""
    if type(part).__module__ != FOREIGN:
        return None
    x = torch.cat([torch.linspace(-20, 20, 161), torch.tensor([-1e4, -1e2, 1e2, 1e4])]).double()
    with torch.no_grad():
        y = part(x)
        for name in ACTIVATIONS:
            if torch.allclose(y, _activate(x, name), rtol=1e-12, atol=1e-14):
                return name
    return None
