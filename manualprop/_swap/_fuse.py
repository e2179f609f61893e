"""Fusing: finds containers, MLPs and convnets that can run neighbours as one block, and makes their classes."""

import functools
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualprop import functional as F
from manualprop._swap._functions import own_forward
from manualprop._swap._method import (
    FOREIGN,
    KEEP_NOTHING,
    PRODUCTS,
    MethodStep,
    Through,
    Unfusable,
    attribute,
    filled,
    steps_of,
)
from manualprop._swap._twins import CONTAINERS
from manualprop.nn import convolution, norm
from manualprop.nn._heard import has_hooks, is_heard
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
# In the place of a batch norm, or of the convolution after it, these have no block.
OTHER_NORMS = (norm.GroupNorm, norm.InstanceNorm1d, norm.InstanceNorm2d, norm.InstanceNorm3d)
OTHER_CONVOLUTIONS = tuple(getattr(convolution, f"ConvTranspose{axes}d") for axes in (1, 2, 3))
CHAINS: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: FusedSequential, Residual: FusedResidual}
LISTED = 3  # neighbours that a row of the report names
PROGRAM = "_manualprop_program"


class TracedMethod(NamedTuple):
    """The steps of a method, and the runs of steps that can be one: an activation or a norm comes first."""

    steps: tuple[MethodStep, ...]
    sites: tuple[tuple[int, ...], ...]
    dead: tuple[tuple[int, ...], ...]  # for each step, the values that no later step needs
    # Inner modules whose forward is replaced by these steps.
    through: Through


class Fusion(NamedTuple):
    """The class that runs neighbours as one, the attributes it needs, and the names of the neighbours."""

    after: type[nn.Module]
    attributes: dict[str, Any]
    runs: str


def fusion(module: nn.Module, kept: Container[nn.Module] = ()) -> Fusion | str | None:
    """How to fuse the layers of ``module``, or why not; None if there is nothing to fuse.

    Args:
        kept: the modules whose own forward must run.
    """
    if fused_from(type(module)) is not None:
        return "already fused"
    if isinstance(module, nn.Sequential) and type(module) in CHAINS:
        found = runs(module)
        if found:
            return Fusion(CHAINS[type(module)], {}, _listed(found))
        parts = list(module)
        reasons = (_without_block(parts[at : at + 3]) for at in range(len(parts)))
        return next((f"not fused: {reason}" for reason in reasons if reason), None)
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
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join("+".join(names) for names in found[:LISTED]) + more


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
    convolutions = (*CONVOLUTIONS, *OTHER_CONVOLUTIONS)
    return not kinds.isdisjoint((*BATCH_NORMS, *OTHER_NORMS)) and not kinds.isdisjoint(convolutions)


def _holds_neighbours(module: nn.Module) -> bool:
    """Whether a reader of the report expects ``module`` itself, not only modules inside it, to be fused."""
    own = {type(child) for child in module.children()}
    return _is_mlp(module) or not own.isdisjoint((*BATCH_NORMS, *OTHER_NORMS)) or not _is_convnet(module)


def _without_block(parts: Sequence[Part]) -> str:
    """Why norm, activation and convolution do not run as one, if one of them is of another kind; else ""."""
    if len(parts) != 3 or activation_name(parts[1]) is None:
        return ""
    if is_plain(parts[0], *OTHER_NORMS) and is_plain(parts[2], *CONVOLUTIONS, *OTHER_CONVOLUTIONS):
        return f"a {type(parts[0]).__name__} comes before the activation, where a BatchNorm must"
    if is_plain(parts[0], *BATCH_NORMS) and is_plain(parts[2], *OTHER_CONVOLUTIONS):
        return f"a {type(parts[2]).__name__} follows the activation, where a convolution must"
    return ""


# --------------------------------------------------------------------------------------------- reading a method


def _traced(module: nn.Module, method: str) -> TracedMethod:
    """The steps of ``module.method(x)``; they must be the same in training and in evaluation."""
    programs = []
    training = [(m, m.training) for m in module.modules()]
    try:
        for mode in (True, False):
            module.train(mode)
            steps, through = steps_of(module, method)
            sites = _sites(module, steps)
            programs.append(TracedMethod(steps, sites, _dead(steps, sites), through))
    finally:
        for m, its in training:
            m.training = its
    if programs[0] != programs[1]:
        raise Unfusable(f"its {method} does not do in evaluation what it does in training")
    return programs[0]


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
        chain = _chain(first, following)
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
        chains = (_chain(first, following) for first in range(len(steps)))
        others = (_without_block([_part(module, steps[n]) for n in chain]) for chain in chains)
        raise Unfusable(next(filter(None, others), wanted) or "its parts would keep no less as one")
    return tuple(found)


def _chain(first: int, following: Mapping[int, int]) -> list[int]:
    """Up to three steps, each the only user of the value before it."""
    chain = [first]
    while chain[-1] in following and len(chain) < 3:
        chain.append(following[chain[-1]])
    return chain


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
    if len(convs) != 1 or any(step.function not in (*KEEP_NOTHING, Tensor.size) for step in others):
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
    return part in KEEP_NOTHING | PRODUCTS


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
            arguments, keywords = filled(step.arguments, values), dict(filled(step.keywords, values))
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
        (fused_from(type(part)) or type(part)) is cls and _does_as_steps(part, module)
        for path, cls in program.through
        for part in (module.get_submodule(path),)
    )


def _does_as_steps(part: nn.Module, within: nn.Module) -> bool:
    """Whether the forward of the class is all that runs, and torch's functions in it run the same rules as outside."""
    inner, outer = own_forward(part), own_forward(within)
    if inner is None or outer is None:
        return not is_heard(part)
    return inner.on == outer.on and not has_hooks(part)


def _single(module: nn.Module, step: MethodStep) -> Callable[..., Tensor]:
    if step.function is attribute:
        return functools.partial(attribute, module)
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
