"""What every hand-derived rule shares: how it is applied, and how the compiler is told to keep it."""

import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    is_legacy_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
    unwrap_if_dead,
)
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

HALF = frozenset({torch.float16, torch.bfloat16})


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp, ...) encloses this call."""
    return torch._C._are_functorch_transforms_active()


def plain_eager() -> bool:
    """Whether neither a ``torch.func`` transform nor the compiler watches, which both refuse some in-place forms."""
    return not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling())


def times(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh * other``, written into ``fresh`` unless ``vmap`` may have batched ``other`` alone."""
    if plain_eager() and not is_legacy_batchedtensor(other):
        return fresh.mul_(other)
    return fresh * other


def in_full_precision(x: Tensor) -> Tensor:
    """``x``, or its float32 copy where ``x`` is half precision: a formula then rounds once, not at each step."""
    return x.float() if x.dtype in HALF else x


def full_dtype(x: Tensor) -> torch.dtype:
    """The dtype of :func:`in_full_precision`."""
    return torch.float32 if x.dtype in HALF else x.dtype


# ----- forward mode -----


def at_every_level(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """``jvp``, differentiated in its turn where forward mode is nested: ``jacfwd(jacfwd(f))``, jvp of jvp.

    torch calls a Function's jvp with forward mode switched off altogether, so that the outer levels would take its
    arithmetic for constant, and without an error.  Here they see it: forward mode is on, and what the rule saved
    comes without the tangents of this level, which are the arguments.
    """

    @functools.wraps(jvp)
    def every_level(ctx: Any, *tangents: Any) -> Any:
        if not transforms_active():
            return jvp(ctx, *tangents)
        with _set_fwd_grad_enabled(True):
            return jvp(_WithPrimals(ctx), *tangents)

    return every_level


class _WithPrimals:
    """A rule's context whose saved tensors have lost the tangents of the innermost level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, tuple(map(_primal, ctx.saved_tensors))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _primal(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    if is_batchedtensor(t):  # vmap within forward mode: the tangents lie under the batch
        inner: Any = _primal(get_unwrapped(t))
        batched: Tensor = _add_batch_dim(inner, maybe_get_bdim(t), maybe_get_level(t))
        return batched
    primal: Tensor = torch._VF._unpack_dual(t, level=0)[0]
    return primal


# ----- the rule -----


class _Local(threading.local):
    recorder: Callable[[type["Rule"], tuple[Any, ...]], Any] | None = None


_local = _Local()


@contextmanager
def recording(recorder: Callable[[type["Rule"], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Within, every application of a rule in this thread is ``recorder(rule, arguments)`` instead: no tape is kept."""
    outer, _local.recorder = _local.recorder, recorder
    try:
        yield
    finally:
        _local.recorder = outer


def is_recorded() -> bool:
    """Whether :func:`recording` encloses this call."""
    return _local.recorder is not None


class Rule(Function):
    """Base of every hand-derived rule: a :class:`torch.autograd.Function` that no transform bypasses.

    A subclass states ``forward``, ``setup_context``, ``backward`` and ``jvp``, written in ordinary tensor
    arithmetic; batching (``vmap``) follows from these, and :func:`torch.compile` keeps them.
    """

    generate_vmap_rule = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "jvp" in vars(cls):
            cls.jvp = staticmethod(at_every_level(cls.jvp))  # type: ignore[method-assign]
        _register(cls)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Apply the rule, recording it for differentiation.

        ``Function.apply`` binds the arguments to forward's signature on every call, 12 of its 17 us.  Rules
        are called with every argument in place, so outside of transforms that step is skipped.
        """
        if _local.recorder is not None:
            return _local.recorder(cls, args)
        if transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*[_usable(a, cls) if isinstance(a, Tensor) else a for a in args])  # type: ignore[misc]


def _usable(a: Tensor, rule: type[Rule]) -> Tensor:
    """``a``, or the real tensor where it outlived its transform and is a dead wrapper around that one."""
    if a.is_nested and a.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{rule.__name__}: the hand-derived gradients are those of ordinary tensors, without ragged axes. Got a "
            f"nested tensor of layout {a.layout} that requires a gradient. Apply the layer to its values() or to a "
            "padded tensor (torch.nested.to_padded_tensor), or take torch's layers back by manualprop.unswap(model)."
        )
    return unwrap_if_dead(a)


# ----- torch.compile -----
#
# Without ``torch.compiler.allow_in_graph``, Dynamo refuses a Function that has a ``jvp`` and, worse, under
# ``torch.compile(torch.func.grad(...))`` silently differentiates the forward instead of running the hand rule
# (pytorch/pytorch#192985, #193279).  The registration needs ``torch._dynamo``, whose import costs about 2 s
# and 70 MB; so a rule made before anybody needed the compiler waits, and is registered when Dynamo is imported.

_waiting: list[type[Rule]] = []


def _register(cls: type[Rule]) -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.allow_in_graph(cls)
    else:
        _waiting.append(cls)


class _AfterDynamo(importlib.abc.MetaPathFinder):
    """Registers the waiting rules as soon as ``torch._dynamo`` has been imported, by whomever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch._dynamo":
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


if "torch._dynamo" not in sys.modules:
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


def flat(d: Tensor, x: Tensor) -> Tensor:
    """A gradient ``d`` that does not change with ``x``: recorded as such, where it is recorded.

    The second derivative is then zeros, as in torch, and not the error that ``x`` was not used.
    """
    recorded: Tensor = Flat.apply(d, x) if torch.is_grad_enabled() else d
    return recorded
