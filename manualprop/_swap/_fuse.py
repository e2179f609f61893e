"""Fusing: finds containers and MLPs that can run neighbours as one block, and makes their classes."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from manualprop import functional as F
from manualprop._swap._twins import CONTAINERS
from manualprop.functional.fused import ACTIVATIONS, _activate
from manualprop.nn import norm
from manualprop.nn._heard import is_heard
from manualprop.nn.fusing import (
    FUNCTIONS,
    FusedSequential,
    Part,
    activation_name,
    is_plain,
    linear_parameters,
    match,
    runs,
)

# Of BERT and similar models, of torch's transformer, of an MLP.
METHODS = (
    "feed_forward_chunk",
    "_ff_block",
    "forward",
)
PROGRAM = "_manualprop_program"
CALLED = {*FUNCTIONS, operator.add, operator.mul, torch.add, torch.mul}
FOREIGN = "transformers.activations"  # its own classes for the same functions


class MethodStep(NamedTuple):
    """One step of a method: a layer or a function, and the numbers of its input values (0: the input)."""

    path: str
    function: Callable[..., Tensor] | None
    inputs: tuple[int, ...]
    name: str | None  # the name of the activation that a foreign class computes


class TracedMethod(NamedTuple):
    """The steps of a method, and the runs of steps that can be one: an activation or a norm comes first."""

    steps: tuple[MethodStep, ...]
    sites: tuple[tuple[int, ...], ...]
    # Inner modules whose forward is replaced by these steps.
    through: tuple[tuple[str, type[nn.Module]], ...]


class Fusion(NamedTuple):
    """The class that runs neighbours as one, the attributes it needs, and the names of the neighbours."""

    after: type[nn.Module]
    attributes: dict[str, Any]
    runs: str


class Unfusable(Exception):
    """The reason why a candidate is not fused."""


def fusion(module: nn.Module) -> Fusion | str | None:
    """How to fuse the layers of ``module``, or why not; None if there is nothing to fuse."""
    if fused_from(type(module)) is not None:
        return "already fused"
    if type(module) is nn.Sequential:
        found = runs(module)
        return Fusion(FusedSequential, {}, _listed(found)) if found else None
    method = next((name for name in METHODS if _is_candidate(module, name)), None)
    if method is None:
        return None
    try:
        program = _traced(module, method)
        found = [
            tuple(program.steps[n].path for n in site if program.steps[n].path) for site in program.sites
        ]
    except Unfusable as reason:
        return f"not fused: {reason}"
    after = fused_class(type(module), method)  # type: ignore[arg-type]
    return Fusion(after, {PROGRAM: program}, _listed(found))


def fused_from(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a fused class was made from."""
    if cls is FusedSequential:
        return nn.Sequential
    original: type[nn.Module] | None = cls.__dict__.get("fused_from")
    return original


def _listed(found: Sequence[tuple[str, ...]]) -> str:
    return ", ".join("+".join(names) for names in found)


def _is_candidate(module: nn.Module, method: str) -> bool:
    """Whether ``module`` looks like an MLP, by its children, or like a transformer layer, by its method."""
    if method != "forward":
        return hasattr(type(module), method)
    children = list(module.children())
    leaves = not any(True for child in children for _ in child.children())
    weighted = sum(1 for child in children if child._parameters)
    activated = any(activation_name(c) or type(c).__module__ == FOREIGN for c in children)
    activated = activated or any(value is f for value in vars(module).values() for f in FUNCTIONS)
    return leaves and weighted > 1 and activated and not isinstance(module, CONTAINERS)


# --------------------------------------------------------------------------------------------- reading a method


class _Method(nn.Module):
    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner, self.method = owner, method

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self.owner, self.method)(x)
        return output


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.through: dict[str, type[nn.Module]] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.through[path.removeprefix("owner.")] = type(m)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


def _traced(module: nn.Module, method: str) -> TracedMethod:
    """The steps of ``module.method(x)``; they must be the same in training and in evaluation."""
    programs = []
    training = [(m, m.training) for m in module.modules()]
    try:
        for mode in (True, False):
            module.train(mode)
            programs.append(_read(module, method))
    finally:
        for m, its in training:
            m.training = its
    if programs[0] != programs[1]:
        raise Unfusable(f"its {method} does not do in evaluation what it does in training")
    return programs[0]


def _read(module: nn.Module, method: str) -> TracedMethod:
    try:
        tracer = _Tracer()
        graph = tracer.trace(_Method(module, method))
    except Exception as error:  # a foreign forward may raise anything when it gets a symbol
        raise Unfusable(f"its {method} cannot be traced ({type(error).__name__})") from None
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    numbers: dict[fx.Node, int] = {}
    steps: list[MethodStep] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            numbers[node] = 0
        elif node.op == "output":
            if node.args[0] is not next(reversed(numbers)):
                raise Unfusable(f"its {method} returns more than the last result")
        else:
            steps.append(_step(module, node, numbers, method))
            numbers[node] = len(steps)
    return TracedMethod(tuple(steps), _sites(module, steps), tuple(tracer.through.items()))


def _step(module: nn.Module, node: fx.Node, numbers: dict[fx.Node, int], method: str) -> MethodStep:
    known = node.op == "call_module" or (node.op == "call_function" and node.target in CALLED)
    plain = not node.kwargs or node.kwargs == {"inplace": False}
    if not known or not plain or not all(isinstance(a, fx.Node) and a in numbers for a in node.args):
        raise Unfusable(f"its {method} calls {getattr(node.target, '__name__', node.target)}")
    inputs = tuple(numbers[arg] for arg in node.args if isinstance(arg, fx.Node))
    if not isinstance(node.target, str):
        return MethodStep("", node.target, inputs, None)
    path = node.target.removeprefix("owner.")
    return MethodStep(path, None, inputs, _foreign_name(module.get_submodule(path)))


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


def _sites(module: nn.Module, steps: Sequence[MethodStep]) -> tuple[tuple[int, ...], ...]:
    """The runs of steps that can be one function; each value inside is used only once."""
    users: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for value in step.inputs:
            users.setdefault(value, []).append(number)
    following = {n: users[n + 1][0] for n in range(len(steps)) if len(users.get(n + 1, [])) == 1}
    found, conv = [], ""
    for first, step in enumerate(steps):
        chain = [first]
        while chain[-1] in following and len(chain) < 3:
            chain.append(following[chain[-1]])
        part = _part(module, step)
        if activation_name(part) is None and not is_plain(part, norm.LayerNorm, norm.RMSNorm):
            continue
        in_place = step.inputs == (0,) and getattr(part, "inplace", False)  # it must write to the input
        for length in (3, 2):
            site = tuple(chain[:length])
            if len(site) == length and not in_place and _call(module, steps, site) is not None:
                found.append(site)
                break
        else:
            after = [_part(module, steps[n]) for n in chain[1:]]
            conv = next((type(p).__name__ for p in after if isinstance(p, nn.Module) and p._parameters), conv)
    if not found:
        wanted = f"a {conv} follows the activation, where a Linear must" if conv not in ("", "Linear") else ""
        raise Unfusable(wanted or "its parts would keep no less as one")
    return tuple(found)


# --------------------------------------------------------------------------------------------- running it


def _part(module: nn.Module, step: MethodStep) -> Part:
    """The current layer, function or activation name of a step."""
    if step.function is not None:
        return step.function
    part = module
    for name in step.path.split("."):
        part = getattr(part, name)
    if step.name is not None and type(part).__module__ == FOREIGN and not is_heard(part):
        return step.name
    return part


def _call(
    module: nn.Module, steps: Sequence[MethodStep], site: tuple[int, ...]
) -> Callable[..., Tensor] | None:
    """The one function for the steps of ``site``; None if they must run one by one."""
    parts = [_part(module, steps[n]) for n in site]
    if len(site) == 3 and parts[1] in (operator.mul, torch.mul):
        name, linear = activation_name(parts[0]), linear_parameters(parts[2])
        if name is None or linear is None:
            return None
        return lambda gate, up: F.gated_linear(gate, up, *linear, name)
    if any(steps[n].function is not None for n in site[1:]):
        return None
    found = match(parts)
    return found.call if found is not None and found.length == len(site) else None


def execute(module: nn.Module, program: TracedMethod, x: Tensor) -> Tensor:
    """Run the steps; those of a site as one if its layers still allow it."""
    steps = program.steps
    calls = {site: _call(module, steps, site) for site in program.sites}
    last = {site[-1]: (site, call) for site, call in calls.items() if call is not None}
    within = {number for site, _ in last.values() for number in site[:-1]}
    values: list[Any] = [x]
    for number, step in enumerate(steps):
        if number in within:
            values.append(None)
        elif number in last:
            site, call = last[number]
            entering = [values[v] for n in site for v in steps[n].inputs if v - 1 not in site]
            values.append(call(*entering))
        else:
            values.append(_single(module, step)(*(values[v] for v in step.inputs)))
    output: Tensor = values[-1]
    return output


def _stands(module: nn.Module, program: TracedMethod) -> bool:
    """Whether the steps are still valid: no inner module has been replaced or has got hooks."""
    return all(
        type(part) is cls and not is_heard(part)
        for path, cls in program.through
        for part in (module.get_submodule(path),)
    )


def _single(module: nn.Module, step: MethodStep) -> Callable[..., Tensor]:
    return step.function if step.function is not None else module.get_submodule(step.path)


@functools.cache
def fused_class(cls: type[nn.Module], method: str) -> type[nn.Module]:
    """``cls`` with a ``method`` that runs neighbours as one; made once, and again when it is unpickled."""
    original = getattr(cls, method)

    @functools.wraps(original)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program: TracedMethod = vars(self)[PROGRAM]
        if len(args) + len(kwargs) != 1 or not _stands(self, program):
            return original(self, *args, **kwargs)
        return execute(self, program, *args, *kwargs.values())

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _unpickled, (cls, method), dict(vars(self))

    members = {
        method: run,
        "__reduce_ex__": reduce,
        "fused_from": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(f"Fused{cls.__name__}", (cls,), members)


def _unpickled(cls: type[nn.Module], method: str) -> nn.Module:
    fused = fused_class(cls, method)  # type: ignore[arg-type]
    return fused.__new__(fused)
