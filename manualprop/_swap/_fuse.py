"""Fusing: finds containers, MLPs and convnets that can run neighbours as one block, and makes their classes."""

import functools
import operator
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_F
from torch import Tensor, fx, nn

from manualprop import functional as F
from manualprop._swap._twins import CONTAINERS
from manualprop.functional.fused import ACTIVATIONS, _activate
from manualprop.nn import norm
from manualprop.nn._heard import is_heard
from manualprop.nn.container import Residual
from manualprop.nn.fused import BATCH_NORMS, CONVOLUTIONS
from manualprop.nn.fusing import (
    FUNCTIONS,
    FusedResidual,
    FusedSequential,
    Part,
    activation_name,
    batch_norm_parts,
    is_plain,
    linear_parameters,
    match,
    runs,
    with_activation,
)

# Of BERT and similar models, of torch's transformer, of an MLP.
METHODS = (
    "feed_forward_chunk",
    "_ff_block",
    "forward",
)
CHAINS: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: FusedSequential, Residual: FusedResidual}
PROGRAM = "_manualprop_program"
# What a method may call: all these do the same at each call.
KEEP_NOTHING = {operator.add, operator.iadd, torch.add, torch.cat}  # not even their inputs, for backward
CALLED = {
    *(*FUNCTIONS, *KEEP_NOTHING, operator.mul, torch.mul, torch.flatten, torch.mean),
    *(torch_F.adaptive_avg_pool2d, torch_F.avg_pool2d),
}
PURE = {*CALLED, getattr, operator.getitem} - {operator.iadd}
METHODS_CALLED = ("flatten", "mean", "reshape", "size", "view")
FOREIGN = "transformers.activations"  # its own classes for the same functions


class Value(NamedTuple):
    """The number of a value: 0 for the input, n + 1 for the result of step n."""

    number: int


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


class TracedMethod(NamedTuple):
    """The steps of a method, and the runs of steps that can be one: an activation or a norm comes first."""

    steps: tuple[MethodStep, ...]
    sites: tuple[tuple[int, ...], ...]
    dead: tuple[tuple[int, ...], ...]  # for each step, the values that no later step needs
    # Inner modules whose forward is replaced by these steps.
    through: tuple[tuple[str, type[nn.Module]], ...]


class Fusion(NamedTuple):
    """The class that runs neighbours as one, the attributes it needs, and the names of the neighbours."""

    after: type[nn.Module]
    attributes: dict[str, Any]
    runs: str


class Unfusable(Exception):
    """The reason why a candidate is not fused."""


def fusion(module: nn.Module, kept: Container[nn.Module] = ()) -> Fusion | str | None:
    """How to fuse the layers of ``module``, or why not; None if there is nothing to fuse.

    Args:
        kept: the modules whose own forward must run.
    """
    if fused_from(type(module)) is not None:
        return "already fused"
    if isinstance(module, nn.Sequential) and type(module) in CHAINS:
        found = runs(module)
        return Fusion(CHAINS[type(module)], {}, _listed(found)) if found else None
    method = next((name for name in METHODS if _is_candidate(module, name)), None)
    if method is None:
        return None
    try:
        program = _traced(module, method)
        skipped = next((path for path, _ in program.through if module.get_submodule(path) in kept), None)
        if skipped is not None:
            raise Unfusable(f"{skipped!r}, inside, is skipped")
    except Unfusable as reason:
        return f"not fused: {reason}" if _holds_neighbours(module) else None
    found = [tuple(program.steps[n].path for n in site if program.steps[n].path) for site in program.sites]
    after = fused_class(type(module), method)  # type: ignore[arg-type]
    return Fusion(after, {PROGRAM: program}, _listed(found))


def fused_from(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a fused class was made from."""
    if cls in CHAINS.values():
        return next(chain for chain, fused in CHAINS.items() if fused is cls)
    original: type[nn.Module] | None = cls.__dict__.get("fused_from")
    return original


def _listed(found: Sequence[tuple[str, ...]]) -> str:
    return ", ".join("+".join(names) for names in found)


def _is_candidate(module: nn.Module, method: str) -> bool:
    """Whether ``module`` looks like an MLP or convnet, by its layers, or like a transformer layer, by its method."""
    if method != "forward":
        return hasattr(type(module), method)
    if isinstance(module, CONTAINERS) or next(module.children(), None) is None:
        return False
    return _is_mlp(module) or _is_convnet(module)


def _is_mlp(module: nn.Module) -> bool:
    children = list(module.children())
    leaves = not any(True for child in children for _ in child.children())
    weighted = sum(1 for child in children if child._parameters)
    activated = any(activation_name(c) or type(c).__module__ == FOREIGN for c in children)
    activated = activated or any(value is f for value in vars(module).values() for f in FUNCTIONS)
    return leaves and weighted > 1 and activated


def _is_convnet(module: nn.Module) -> bool:
    kinds = {type(part) for part in module.modules()}
    return not kinds.isdisjoint(BATCH_NORMS) and not kinds.isdisjoint(CONVOLUTIONS)


def _holds_neighbours(module: nn.Module) -> bool:
    """Whether a reader of the report expects ``module`` itself, not only modules inside it, to be fused."""
    own = {type(child) for child in module.children()}
    return _is_mlp(module) or not own.isdisjoint(BATCH_NORMS) or not _is_convnet(module)


# --------------------------------------------------------------------------------------------- reading a method


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
    sites = _sites(module, steps)
    return TracedMethod(tuple(steps), sites, _dead(steps, sites), tuple(tracer.through.items()))


def _is_pure(node: fx.Node) -> bool:
    """Whether a step may be left out if nothing uses its result."""
    if node.op == "call_function":
        return node.target in PURE
    return node.op == "call_method" and node.target in METHODS_CALLED


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
    if node.op == "call_method" and function in METHODS_CALLED:
        function = getattr(Tensor, function)
    elif node.op != "call_function" or function not in CALLED:
        raise Unfusable(f"its {method} calls {getattr(function, '__name__', function)}")
    return MethodStep("", function, arguments, keywords, None)


def _values_in(arguments: Any) -> Iterator[int]:
    """The numbers of the values in nested arguments."""
    if isinstance(arguments, Value):
        yield arguments.number
    elif isinstance(arguments, tuple | list):
        for argument in arguments:
            yield from _values_in(argument)


def _filled(arguments: Any, values: Sequence[Any]) -> Any:
    """Nested arguments, with each value in its place."""
    if isinstance(arguments, Value):
        return values[arguments.number]
    if isinstance(arguments, tuple | list):
        return type(arguments)([_filled(argument, values) for argument in arguments])
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


def _sites(module: nn.Module, steps: Sequence[MethodStep]) -> tuple[tuple[int, ...], ...]:
    """The runs of steps that can be one function; each value inside is used only once."""
    users: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for value in step.inputs:
            users.setdefault(value, []).append(number)
    if not all(_is_fresh(module, steps, users, s.inputs[0]) for s in steps if s.function is operator.iadd):
        raise Unfusable("it writes over a value that something else may read")
    following = {n: users[n + 1][0] for n in range(len(steps)) if len(users.get(n + 1, [])) == 1}
    found: list[tuple[int, ...]] = []
    taken: set[int] = set()
    conv = ""
    for first, step in enumerate(steps):
        if first in taken:
            continue
        chain = [first]
        while chain[-1] in following and len(chain) < 3:
            chain.append(following[chain[-1]])
        part = _part(module, step)
        if is_plain(part, *BATCH_NORMS):
            sites = _with_skip(module, steps, users, chain)
        elif activation_name(part) is not None or is_plain(part, norm.LayerNorm, norm.RMSNorm):
            sites = [tuple(chain[:length]) for length in (3, 2) if len(chain) >= length]
            in_place = _writes(module, step) and not _is_fresh(module, steps, users, step.inputs[0])
            sites = [] if in_place else sites
        else:
            continue
        site = next((site for site in sites if _call(module, steps, site) is not None), None)
        if site is not None:
            found.append(site)
            taken.update(site)
        else:
            after = [_part(module, steps[n]) for n in chain[1:]]
            conv = next((type(p).__name__ for p in after if isinstance(p, nn.Module) and p._parameters), conv)
    if not found:
        of_mlp = conv not in ("", "Linear") and not _is_convnet(module)
        wanted = f"a {conv} follows the activation, where a Linear must" if of_mlp else ""
        raise Unfusable(wanted or "its parts would keep no less as one")
    return tuple(found)


Users = Mapping[int, Sequence[int]]


def _with_skip(
    module: nn.Module, steps: Sequence[MethodStep], users: Users, chain: Sequence[int]
) -> list[tuple[int, ...]]:
    """Batch norm, activation and convolution; of the activation, sums may be users too, which do not keep it."""
    if len(chain) < 2 or len(users.get(chain[0] + 1, ())) != 1:
        return []
    norm, activation = chain[:2]
    value = activation + 1
    convs = [n for n in users.get(value, ()) if is_plain(_part(module, steps[n]), *CONVOLUTIONS)]
    others = [steps[n] for n in users.get(value, ()) if n not in convs]
    if len(convs) != 1 or any(step.function not in KEEP_NOTHING for step in others):
        return []
    return [(norm, activation, convs[0])]


def _writes(module: nn.Module, step: MethodStep) -> bool:
    """Whether an activation writes to its input."""
    option = dict(step.keywords).get("inplace", False)
    return bool(option or getattr(_part(module, step), "inplace", False))


def _is_fresh(module: nn.Module, steps: Sequence[MethodStep], users: Users, value: int) -> bool:
    """Whether a value was made by its step and is used once, so that nobody sees if it is written over."""
    if value == 0 or len(users[value]) != 1:
        return False
    step = steps[value - 1]
    part = _part(module, step)
    if activation_name(part) is not None:
        return not _writes(module, step) or _is_fresh(module, steps, users, step.inputs[0])
    if isinstance(part, nn.Module):
        known = type(part).__module__.startswith(("manualprop.nn.", "torch.nn."))
        return known and bool(part._parameters)
    return part in KEEP_NOTHING


def _dead(steps: Sequence[MethodStep], sites: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """For each step, the values that are not needed after it; a site may run at its last step."""
    end = {number: max(site) for site in sites for number in site}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        for value in step.inputs:
            last[value] = max(last.get(value, 0), end.get(number, number))
    return tuple(tuple(value for value, at in last.items() if at == n) for n in range(len(steps)))


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
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """The one function for the steps of ``site``, which returns their values; None if they must run one by one.

    The value of a step that only the site uses is None.
    """
    parts = [_part(module, steps[n]) for n in site]
    if not all(_takes_values_alone(steps[n]) for n in site):
        return None
    if len(site) == 3 and parts[1] in (operator.mul, torch.mul):
        name, linear = activation_name(parts[0]), linear_parameters(parts[2])
        if name is None or linear is None:
            return None
        return lambda gate, up: (None, None, F.gated_linear(gate, up, *linear, name))
    normed = batch_norm_parts(parts)
    if normed is not None:
        return lambda x: (None, *reversed(with_activation(*normed, x)))
    if any(steps[n].function is not None for n in site[1:]):
        return None
    found = match(parts)
    if found is None or found.length != len(site):
        return None
    return lambda x: (*[None] * (len(site) - 1), found.call(x))


def _takes_values_alone(step: MethodStep) -> bool:
    """Whether a step is of one value, or of two for a product, without options but ``inplace``."""
    count = 2 if step.function in (operator.mul, torch.mul) else 1
    return len(step.arguments) == len(step.inputs) == count and {*dict(step.keywords)} <= {"inplace"}


def execute(module: nn.Module, program: TracedMethod, x: Tensor) -> Tensor:
    """Run the steps; those of a site as one if its layers still allow it."""
    steps = program.steps
    calls = {site: _call(module, steps, site) for site in program.sites}
    at = {_when(module, steps, site): (site, call) for site, call in calls.items() if call is not None}
    within = {number for site, _ in at.values() for number in site}
    values: list[Any] = [x, *[None] * len(steps)]
    for number, step in enumerate(steps):
        if number in at:
            site, call = at[number]
            entering = [values[v] for n in site for v in steps[n].inputs if v - 1 not in site]
            for inner, value in zip(site, call(*entering), strict=True):
                values[inner + 1] = value
        elif number not in within:
            arguments, keywords = _filled(step.arguments, values), dict(_filled(step.keywords, values))
            values[number + 1] = _single(module, step)(*arguments, **keywords)
        for dead in program.dead[number]:
            values[dead] = None
    output: Tensor = values[-1]
    return output


def _when(module: nn.Module, steps: Sequence[MethodStep], site: tuple[int, ...]) -> int:
    """The step at which a site runs: at its first for a batch norm, whose activation others may use; else its last."""
    return site[0] if is_plain(_part(module, steps[site[0]]), *BATCH_NORMS) else site[-1]


def _stands(module: nn.Module, program: TracedMethod) -> bool:
    """Whether the steps are still valid: no inner module has been replaced or has got hooks."""
    return all(
        (fused_from(type(part)) or type(part)) is cls and not is_heard(part)
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
