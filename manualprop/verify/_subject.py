"""The function under test, as a function of a flat list of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from manualprop._torch import run_backward
from manualprop.verify._case import Case
from manualprop.verify._meant import Detaching, straight
from manualprop.verify._module import exchange
from manualprop.verify._numeric import Evaluate, flat, noise
from manualprop.verify._random import normals, normals_again


class BadUse(Exception):
    """The check was called in a way that can show nothing.  ``kind`` is the type that the caller sees."""

    def __init__(self, kind: type[Exception], text: str) -> None:
        super().__init__(kind, text)  # both, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


class OutsideDomain(ValueError):
    """The case's domain excludes these arguments."""


class Point(NamedTuple):
    """A differentiated tensor, and its place in the call."""

    name: str  # as in "args[0]", "weight"
    slot: int | str  # position among the leaves of (args, kwargs), or name of a parameter
    tensor: Tensor  # real, detached, in the working dtype
    complex: bool  # whether the function sees it as a complex tensor


V = TypeVar("V")


class remembered(Generic[V]):
    """A cached property that a subject and its fresh copies share: computed once, whichever probe asks first."""

    def __init__(self, make: Callable[[Any], V]) -> None:
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, subject: Subject, owner: type[Subject]) -> V:
        if self.name not in subject._shared:
            subject._shared[self.name] = self.make(subject)
        found: V = subject._shared[self.name]
        return found


class Subject:
    """A case, ready to be evaluated anywhere.

    Attributes:
        case: what was given.
        points: values of the differentiated tensors, in ``dtype``.
        names: of these.
        dtype: in which it is checked: float64, unless the function refuses it.
        outputs: the floating outputs at ``points``, detached.
        cotangents: one fixed random grad_output for each output.
        stateful: whether a module changes its buffers in forward.
        random: whether its forward draws random numbers.
    """

    settled = False  # whether its dtype has been decided
    note = ""  # the dtype in which it is judged, if not float64
    quick = False  # whether an expensive function gets fewer points, and not the largest sizes

    whole = 96  # entries of a tensor up to which each is one direction of numerical differentiation

    def __init__(self, case: Case, dtype: torch.dtype | None = torch.float64) -> None:
        self.case = case
        self.fn = case.fn
        self.module = case.fn if isinstance(case.fn, torch.nn.Module) else None
        self._exchange = exchange(self.module) if self.module is not None else None
        self.dtype = dtype
        self._leaves, self._spec = tree_flatten((tuple(case.args), dict(case.kwargs)))
        # Whether the arguments hold no containers, so that no call need unflatten them.
        self._flat = not case.kwargs and all(a is b for a, b in zip_longest(case.args, self._leaves))
        self._relative_noise = 0.0  # of the outputs, inherited by other sizes
        self._largest = 0.0  # output, inherited by other sizes
        self._multiples: list[float] = []  # known factors of wrong gradients, which sizes takes out
        self._not_leaf = False  # pass non-leaf tensors, for a function that writes into its input
        self._through: torch.dtype | None = None  # what is not differentiated is first rounded to it
        self._unique: frozenset[int] = frozenset()  # leaves found to hold no integer twice
        self._as_is: frozenset[int] = frozenset()  # leaves passed without a copy: their layout matters
        self._shared: dict[str, Any] = {}  # results that all copies of this subject share
        self._points = list(self._find_points())
        self.points = [p.tensor for p in self._points]
        self.names = [p.name for p in self._points]

    # ----- what is differentiated -----

    def _find_points(self) -> Iterator[Point]:
        tensors = [(i, t) for i, t in enumerate(self._leaves) if isinstance(t, Tensor)]
        floating = [(i, t) for i, t in tensors if t.is_floating_point() or t.is_complex()]
        wanted = [(i, t) for i, t in floating if t.requires_grad]
        if self.module is not None and not wanted:
            wanted = floating
        names = argument_names(self.case)
        for i, t in wanted:
            yield self._point(names[i], i, t)
        if self.module is not None:
            for name, p in self.own_parameters().items():
                if p.requires_grad and (p.is_floating_point() or p.is_complex()):
                    yield self._point(name, name, p)

    def own_parameters(self) -> dict[str, Tensor]:
        """The module's original parameters; empty without a module."""
        found = self._exchange
        return {} if found is None else {n: t for n, t in found.own.items() if n in found.parameters}

    def own_buffers(self) -> dict[str, Tensor]:
        """The module's original buffers; empty without a module."""
        found = self._exchange
        return {} if found is None else {n: t for n, t in found.own.items() if n not in found.parameters}

    def restore(self) -> None:
        """Put a module's original parameters and buffers back."""
        if self._exchange is not None:
            self._exchange.restore()

    def _point(self, name: str, slot: int | str, t: Tensor) -> Point:
        t = t.detach()
        is_complex = t.is_complex()
        value = torch.view_as_real(t.resolve_conj()) if is_complex else t
        return Point(name, slot, self._cast(value).clone(memory_format=torch.contiguous_format), is_complex)

    def _cast(self, t: Tensor) -> Tensor:
        if self.dtype is None or not (t.is_floating_point() or t.is_complex()):
            return t
        if self._through is not None:
            t = t.to(self._through.to_complex() if t.is_complex() else self._through)
        return t.to(self.dtype.to_complex() if t.is_complex() else self.dtype)

    # ----- evaluation -----

    def function(self, *points: Tensor) -> tuple[Tensor, ...]:
        """The floating outputs at ``points``.  The points are passed as they are; all else is copied.

        It does not touch the random generator, so it can be traced, batched and compiled.
        """
        return self.kept(self.raw(*points))

    def kept(self, result: Any) -> tuple[Tensor, ...]:
        """The floating tensors in the result of a call."""
        outputs = floating(result)
        if self._exchange is not None and not torch.compiler.is_compiling():
            self._exchange.remember(outputs)
        return outputs

    def __call__(self, *points: Tensor) -> tuple[Tensor, ...]:
        """:meth:`function`, with the random generator in the same state each time."""
        self.reseed()
        return self.function(*points)

    def reseed(self) -> None:
        """Put the default generators in the state in which every evaluation starts."""
        # Without accelerators torch.manual_seed still takes 0.8 ms, more than most functions.
        if torch.accelerator.is_available():
            torch.manual_seed(self.case.seed)
        else:
            torch.default_generator.manual_seed(self.case.seed)

    def raw(self, *points: Tensor) -> Any:
        """The callable's own result."""
        return self.called(*self.arguments(*points))

    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: dict[str, Tensor]) -> Any:
        """The callable's result for what :meth:`arguments` made."""
        around = self.case.around
        if around is not None:
            state.update({name: around.inward(t) for name, t in state.items() if name in self.names})
            args, kwargs = around.inward((args, kwargs))
        if self._exchange is not None:
            result = self._exchange.call(state, args, kwargs)
        else:
            result = self.fn(*args, **kwargs)
        return result if around is None else around.outward(result, self.reseed)

    def arguments(self, *points: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Positional and keyword arguments, and the parameters and buffers of a module, with ``points`` in place."""
        leaves = list(self._leaves)
        for i in self._fixed:
            leaves[i] = self._cast(leaves[i].detach()).clone()
        own = self._exchange.own if self._exchange is not None else {}
        state = {name: self._cast(t.detach()).clone() for name, t in own.items()}
        for p, value in zip(self._points, points, strict=True):
            value = torch.view_as_complex(value) if p.complex else value
            if self._not_leaf and not p.complex:
                value = value.clone()
            if isinstance(p.slot, str):
                state[p.slot] = value
            else:
                leaves[p.slot] = value
        if self._flat:
            return tuple(leaves), {}, state
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs, state

    @functools.cached_property
    def _fixed(self) -> list[int]:
        """The tensor arguments that are not differentiated, and that each call gets a copy of."""
        points = {p.slot for p in self._points}
        tensors = [i for i, t in enumerate(self._leaves) if isinstance(t, Tensor)]
        return [i for i in tensors if i not in points and i not in self._as_is]

    def named(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every tensor of what :meth:`arguments` made, by its name."""
        leaves = zip(argument_names(self.case), tree_leaves((args, kwargs)), strict=True)
        return {name: t for name, t in leaves if isinstance(t, Tensor)} | state

    def at(
        self, points: Sequence[Tensor] | None = None, subset: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """Fresh leaf tensors with the values of ``points``, of which ``subset`` (all) require grad."""
        points = self.points if points is None else points
        subset = [True] * len(points) if subset is None else subset
        return [p.detach().clone().requires_grad_(r) for p, r in zip(points, subset, strict=True)]

    def gradients(
        self,
        points: Sequence[Tensor] | None = None,
        cotangents: Sequence[Tensor | None] | None = None,
        subset: Sequence[bool] | None = None,
    ) -> list[Tensor | None]:
        """The vector-Jacobian product by the function's own backward: one gradient for each point, or None."""
        leaves = self.at(points, subset)
        outputs = self(*leaves)
        if cotangents is None:
            return self.pull_back(outputs, leaves, self.cotangents_for(outputs))
        return self.pull_back(outputs, leaves, [copied(c) for c in cotangents])

    @property
    def nonlinear(self) -> bool:
        """Whether its author has accepted that backward is not linear in grad_output: it clips, or adds a penalty."""
        return "linearity" in self.case.accept

    def linear_part(
        self, cotangents: Sequence[Tensor | None], points: Sequence[Tensor] | None = None
    ) -> list[Tensor | None]:
        """The gradients that differences can check.

        For a backward that is not linear: the gradient for a small grad_output, without that for a zero one.
        """
        if not self.nonlinear:
            return self.gradients(points, cotangents)
        h = 2.0**-20
        some = self.gradients(points, [None if c is None else h * c for c in cotangents])
        none = self.gradients(points, [None if c is None else 0 * c for c in cotangents])
        return [a if a is None or b is None else (a - b) / h for a, b in zip(some, none, strict=True)]

    def pull_back(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        *,
        create_graph: bool = False,
        retain_graph: bool | None = None,
    ) -> list[Tensor | None]:
        """``torch.autograd.grad`` of the outputs that require grad and have a cotangent."""
        pairs = [
            (y, v) for y, v in zip(outputs, cotangents, strict=True) if y.requires_grad and v is not None
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if self._exchange is not None:
            self._exchange.recall(outputs)
        if not pairs:
            return [None] * len(leaves)
        plain = all(type(y) is type(v) is Tensor and y.shape == v.shape for y, v in pairs)
        if plain and wanted:
            ys, vs = zip(*pairs, strict=True)
            keep = create_graph if retain_graph is None else retain_graph
            grads = run_backward(ys, vs, keep, create_graph, tuple(wanted), True, accumulate_grad=False)
        else:  # torch says what is wrong
            grads = torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [v for _, v in pairs],
                retain_graph,
                create_graph,
                allow_unused=True,
            )
        found = iter(grads)
        return [next(found) if leaf.requires_grad else None for leaf in leaves]

    def cotangents_for(self, outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
        """One random grad_output for each output, the same for the same shapes."""
        return self.random_like(outputs, seed)

    def random_like(self, tensors: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Standard normal numbers in the shapes of ``tensors``, without touching the global generator."""
        shapes, key = tuple(t.shape for t in tensors), ("like", self.case.seed, seed)
        small = sum(t.numel() for t in tensors) <= 4096
        drawn = normals_again(shapes, key) if small else normals(shapes, key)
        return [d.to(t.device, t.dtype, copy=small) for d, t in zip(drawn, tensors, strict=True)]

    # ----- the domain -----

    def allowed(self, points: Sequence[Tensor]) -> list[Tensor]:
        """The nearest points that the case allows.

        Raises:
            OutsideDomain: if ``domain`` says no even there.
        """
        points = [self._projected(p, value) for p, value in zip(self._points, points, strict=True)]
        domain = self.case.domain
        if domain is not None:
            args, kwargs, _ = self.arguments(*[p.detach() for p in points])
            if not domain(*args, **kwargs):
                raise OutsideDomain(f"{self.case.name}: domain says no")
        return points

    def _projected(self, p: Point, value: Tensor) -> Tensor:
        project = self.case.project
        if isinstance(project, Mapping):
            project = project.get(p.name)
        elif isinstance(p.slot, str):
            project = None  # a module's parameters are not its arguments
        if project is None:
            return value
        near = project(torch.view_as_complex(value.detach()) if p.complex else value.detach().clone())
        return torch.view_as_real(near.resolve_conj()) if p.complex else near.to(value.dtype)

    @property
    def projects(self) -> bool:
        """Whether some points may not be moved freely."""
        return self.case.project is not None

    def tangent(self, i: int, direction: Tensor, points: Sequence[Tensor] | None = None) -> Tensor:
        """The direction in which point ``i`` of ``points`` moves if it goes in ``direction`` and is projected.

        Zeros at the border of what is allowed, where it can move to one side only.
        """
        if not self.projects:
            return direction
        p, h = (self.points if points is None else points)[i], 1e-5
        here = self._projected(self._points[i], p)
        there, back = (self._projected(self._points[i], p + side * h * direction) for side in (1, -1))
        if not bool(((there - here) - (here - back)).abs().max() <= 1e-3 * h * direction.abs().max()):
            return torch.zeros_like(direction)
        return (there - back) / (2 * h)

    def along(self, directions: Sequence[Tensor | None], points: Sequence[Tensor] | None = None) -> Evaluate:
        """The outputs in one vector, as a function of the distance from ``points`` in ``directions``.

        If there is a surrogate, these are its outputs: backward is its gradient.
        """
        points = self.points if points is None else points
        if self.detaches:
            return straight(self.meant, points, directions)

        def evaluate(t: float) -> Tensor:
            moved = [p.clone() if d is None else p + t * d for p, d in zip(points, directions, strict=True)]
            if self.case.domain is not None or self.projects:
                moved = self.allowed(moved)
            with torch.no_grad():
                return flat(self.meant(*moved))

        return evaluate

    @property
    def detaches(self) -> bool:
        """Whether the surrogate detaches something: then autograd differentiates it, and not differences."""
        return isinstance(self.case.surrogate, Detaching)

    def meant(self, *points: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the function whose gradient backward should be: the surrogate, or the function itself."""
        surrogate = self.case.surrogate
        if surrogate is None:
            return self(*points)
        self.reseed()
        args, kwargs, _ = self.arguments(*points)
        return floating(surrogate(*args, **kwargs))

    # ----- the plain run -----

    @functools.cached_property
    def outputs(self) -> list[Tensor]:
        return [y.detach() for y in self(*self.at())]

    @property
    def output_names(self) -> list[str]:
        """What to call each floating output."""
        return [f"output {k}" for k in range(len(self.outputs))]

    @property
    def cotangents(self) -> list[Tensor]:
        return [c.clone() for c in self._drawn]  # copies: a backward may write into them

    @functools.cached_property
    def _drawn(self) -> list[Tensor]:
        return self.cotangents_for(self.outputs)

    @remembered
    def recorded(self) -> list[bool]:
        """Which outputs require grad in the plain run.  Others may be marked as not differentiable."""
        return [y.requires_grad for y in self(*self.at())]

    @property
    def plain(self) -> list[Tensor | None]:
        """The gradients of the plain run: contiguous, in ``dtype``, every point requiring grad."""
        if "plain" not in self._shared:
            self._shared["plain"] = self.gradients()
        return [None if g is None else g.clone() for g in self._shared["plain"]]

    @remembered
    def roughness(self) -> list[float]:
        """The absolute rounding error of each plain gradient, measured.

        Backward is linear: three times the grad_output gives three times the gradient, to rounding.  The rounding of
        terms that cancel shows too.
        """
        v = self.cotangents
        largest = max((c.abs().max().item() for c in v if c.numel()), default=0.0)
        worst = [8 * torch.finfo(p.dtype).eps * largest for p in self.points]
        for k in (3.0, 5.0, 7.0):
            try:
                scaled = self.gradients(cotangents=[k * c for c in v])
            except Exception:  # whatever the checked code raises: linearity reports it
                continue
            for i, (a, b) in enumerate(zip(scaled, self.plain, strict=True)):
                if a is not None and b is not None and a.numel():
                    off = (a / k - b).abs().nan_to_num(0, 0, 0).max().item()
                    scale = b.abs().nan_to_num(0, 0, 0).max().item()
                    # A backward that is not linear must not pass as rounding.
                    worst[i] = max(worst[i], min(off, max(1e-6 * scale, 1e-12 * largest)))
        return worst

    @remembered
    def noise(self) -> float:
        """The absolute rounding error of the outputs, in any dtype that the function uses inside."""
        found = []
        for seed in (11, 12, 13):
            aside = [
                p + 0.01 * d for p, d in zip(self.points, self.random_like(self.points, seed), strict=True)
            ]
            try:
                found.append(noise(self.along(self.random_like(self.points, seed + 10), self.allowed(aside))))
            except Exception:  # whatever the checked code raises: not defined there
                found.append(noise(self.along(self.random_like(self.points, seed + 10))))
        return sorted(found)[1]

    @remembered
    def precision(self) -> float:
        """The relative accuracy of the function's own arithmetic: about 1e-9 for float64."""
        scale = max(
            (y.abs().nan_to_num(0, 0, 0).max().item() for y in self.outputs if y.numel()), default=0.0
        )
        return max(1e-9, 100 * self.noise / scale) if scale else 1e-9

    @remembered
    def random(self) -> bool:
        state = torch.get_rng_state()
        self.reseed()
        before = torch.get_rng_state()
        self.function(*self.at())
        drawn = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(state)  # callers have set the generator: leave it as they did
        return drawn

    @remembered
    def functions(self) -> list[type[torch.autograd.Function]]:
        """The custom Functions in the graph of the plain run."""
        return list(dict.fromkeys(node._forward_cls for node in self.nodes(self(*self.at()))))

    @staticmethod
    def nodes(outputs: Sequence[Tensor]) -> list[Any]:
        """The nodes of custom Functions in the graph behind ``outputs``."""
        found, seen, todo = [], set(), [y.grad_fn for y in outputs]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "_forward_cls"):
                found.append(node)
            todo += [next_node for next_node, _ in node.next_functions]
        return found

    def with_points(
        self,
        points: Sequence[Tensor],
        *,
        others: Mapping[int, Tensor] | None = None,
        as_is: bool = False,
        dtype: torch.dtype | None = None,
        through: torch.dtype | None = None,
    ) -> Subject:
        """The same function with other values, sizes or dtypes.

        Args:
            points: of the differentiated arguments.
            others: other arguments that are tensors, by their place among :meth:`others`.
            as_is: pass ``others`` without a copy, so in their layout.
            dtype: of everything floating that is not differentiated.
            through: a dtype to which this is rounded first.
        """
        other = object.__new__(Subject)
        forgotten = ("outputs", "_drawn", "_fixed")
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k not in forgotten})
        other._shared = {}
        other.points = list(points)
        other._points = [p._replace(tensor=t) for p, t in zip(self._points, points, strict=True)]
        if others:
            other._leaves = [others.get(i, t) for i, t in enumerate(self._leaves)]
            other._as_is = self._as_is | frozenset(others) if as_is else self._as_is
        other.dtype = dtype or self.dtype
        other._through = through or self._through
        return other

    def fresh(self) -> Subject:
        """A copy that shares no tensor with this one: one probe cannot disturb the next."""
        other = self.with_points([p.clone() for p in self.points])
        other._shared = self._shared
        return other

    def others(self) -> dict[int, Tensor]:
        """The tensor arguments that are not differentiated, as they are passed: indices, masks, targets."""
        taken = {p.slot for p in self._points}
        return {
            i: t.detach() if i in self._as_is else self._cast(t.detach())
            for i, t in enumerate(self._leaves)
            if isinstance(t, Tensor) and i not in taken
        }

    def name_of_leaf(self, i: int) -> str:
        """The name of an argument by its place among the leaves of (args, kwargs)."""
        return argument_names(self.case)[i]


def copied(t: Tensor | None) -> Tensor | None:
    """A copy in the layout of ``t``, which a backward may write into.  An expanded tensor stays expanded."""
    if t is None or 0 in t.stride() or t.layout != torch.strided:
        return t
    return t.clone()


def is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def floating(result: Any) -> tuple[Tensor, ...]:
    """The floating tensors in a callable's result, complex ones as pairs of real numbers."""
    if isinstance(result, Tensor):  # the usual case, kept quick
        return (_real(result),) if is_float(result) else ()
    return tuple(_real(o) for o in tree_leaves(result) if is_float(o))


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def argument_names(case: Case) -> list[str]:
    """A name for each leaf of (args, kwargs): the parameter's name, if known."""
    positional = parameter_names(case.fn)
    names: list[str] = []
    for i, a in enumerate(case.args):
        base = positional[i] if i < len(positional) else f"args[{i}]"
        names += _numbered(base, len(tree_leaves(a)))
    for key, a in case.kwargs.items():
        names += _numbered(key, len(tree_leaves(a)))
    return names


def _numbered(base: str, count: int) -> list[str]:
    return [base] if count == 1 else [f"{base}[{j}]" for j in range(count)]


def parameter_names(fn: Callable[..., Any]) -> list[str]:
    import inspect

    owner = getattr(fn, "__self__", None)
    target: Any = fn
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        target = owner.forward
    elif isinstance(fn, torch.nn.Module):
        target = fn.forward
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_ctx = target is not fn and names[:1] == ["ctx"]
    return names[1:] if has_ctx else names
