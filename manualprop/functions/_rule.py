"""What every hand-derived rule shares: how it is applied, and how the compiler keeps it."""

import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from manualprop._torch import DYNAMO
from manualprop.functions._declaration import parameters, require_methods
from manualprop.functions._execution import recorded
from manualprop.functions._execution._transforms import applied, at_every_level, without_views

# ----- gradients and tangents that do not exist -----
#
# By default torch passes zeros to backward and jvp for a gradient or tangent that does not exist.  A rule
# would multiply them, and 0 times infinity is NaN.


def without_zeros(setup_context: Callable[..., None]) -> Callable[..., None]:
    """``setup_context`` that makes an absent gradient or tangent None."""

    @functools.wraps(setup_context)
    def absent_as_none(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    return absent_as_none


def of_a_gradient(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` that is skipped when no gradient arrives."""

    @functools.wraps(backward)
    def of_some(ctx: Any, *g: Tensor | None) -> Any:
        if g[0] is None and all(one is None for one in g):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *g)

    return of_some


# ----- the rule -----


class _Local(threading.local):
    recorder: Callable[[type["Rule"], tuple[Any, ...]], Any] | None = None


_local = _Local()


@contextmanager
def recording(recorder: Callable[[type["Rule"], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside, a rule applied in this thread calls ``recorder(rule, arguments)`` instead; no tape is kept."""
    if not callable(recorder):
        raise TypeError(
            f"recording: recorder must be a function of a rule and its arguments. Got {recorder!r}."
        )
    outer, _local.recorder = _local.recorder, recorder
    try:
        yield
    finally:
        _local.recorder = outer


def is_recorded() -> bool:
    """Whether :func:`recording` encloses this call."""
    return _local.recorder is not None


# The wrapper that the base puts around each method of a rule.
COMPLETED = {
    "forward": without_views,
    "setup_context": without_zeros,
    "backward": of_a_gradient,
    "jvp": at_every_level,
}


class Rule(Function):
    """Base of every hand-derived rule: a :class:`torch.autograd.Function` that no transform bypasses.

    A subclass states ``forward``, ``setup_context``, ``backward`` and ``jvp`` in ordinary tensor arithmetic.
    Batching (``vmap``) follows from these, and :func:`torch.compile` keeps them.  A gradient or a tangent
    that does not exist is None; at least one of them is always a tensor.
    """

    generate_vmap_rule = True
    abstract = False  # True in a base class of rules, which is no rule itself
    apply_in_cpp: ClassVar[Callable[..., Any]]  # the C++ apply under Function.apply

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.apply_in_cpp = super(Function, cls).apply  # type: ignore[misc]
        if not vars(cls).get("abstract", False):
            require_methods(cls, "forward", "setup_context", "backward")
            _require_tangents(cls)
        for name, completed in COMPLETED.items():
            if name in vars(cls):
                setattr(cls, name, staticmethod(completed(getattr(cls, name))))
        _register(cls)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Apply the rule, and record it for differentiation."""
        if _local.recorder is not None:
            return _local.recorder(cls, args)
        return applied(cls, super().apply, args)


def _require_tangents(rule: type[Rule]) -> None:
    """Raise unless jvp(ctx, *tangents) has one tangent for each argument of forward."""
    if "jvp" not in vars(rule):
        return
    arguments, tangents = parameters(rule.forward), parameters(rule.jvp)
    if arguments is not None and tangents is not None and len(tangents) != len(arguments) + 1:
        raise TypeError(
            f"{rule.__name__}: jvp must have ctx and a tangent for each of forward({', '.join(arguments)}). "
            f"Got jvp({', '.join(tangents)})."
        )


# ----- torch.compile -----
#
# Without ``torch.compiler.allow_in_graph``, Dynamo refuses a Function that has a ``jvp`` and, worse, under
# ``torch.compile(torch.func.grad(...))`` silently differentiates the forward instead of running the hand rule
# (pytorch/pytorch#192985, #193279).  The registration needs ``torch._dynamo``, whose import costs about 2 s
# and 70 MB.  So a new rule waits, and is registered when something imports Dynamo.

_waiting: list[type[Rule]] = []


def _register(cls: type[Rule]) -> None:
    if DYNAMO in sys.modules:
        torch.compiler.allow_in_graph(cls)
    else:
        _waiting.append(cls)


class _AfterDynamo(importlib.abc.MetaPathFinder):
    """Registers the waiting rules as soon as any code has imported ``torch._dynamo``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != DYNAMO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_then_register(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)
                while _waiting:
                    _register(_waiting.pop())

            spec.loader.exec_module = load_then_register  # type: ignore[method-assign]
        return spec


if DYNAMO not in sys.modules:
    sys.meta_path.insert(0, _AfterDynamo())


# ----- gradients that do not change -----


class Flat(Rule):
    """``d`` as a function of ``x`` with derivative 0."""

    @staticmethod
    def forward(d: Tensor, x: Tensor) -> Tensor:
        return d.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        return v, torch.zeros_like(ctx.saved_tensors[1])

    @staticmethod
    def jvp(ctx: Any, dd: Tensor | None, dx: Tensor | None) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0]) if dd is None else dd.clone()


# A gradient ``d`` that does not depend on ``x``, flat(d, x): its second derivative is zeros, as in torch, instead of the
# error that ``x`` was not used.
flat: Callable[[Tensor, Tensor], Tensor] = recorded(Flat.apply, lambda d, x: d)
