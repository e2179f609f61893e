"""How a rule meets torch's transforms: applied inside and outside of them, in forward mode, with what it saves."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import (
    add_batch_dim,
    forward_mode,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
    transforms_active,
    unpack_dual,
    unsafe_view,
    unwrap_if_dead,
)

# ----- apply -----


def applied(rule: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The rule of ``args``: by torch's own ``apply`` inside of transforms, else by the C++ function under it.

    ``Function.apply`` binds the arguments to forward's signature on every call: 12 of its 17 us.  Calls of rules
    always pass every argument by position, so outside of transforms this step is skipped.
    """
    if transforms_active():
        return apply(*[_whole(a) if isinstance(a, tuple | list) else a for a in args])
    return rule.apply_in_cpp(*[_usable(a, rule) if isinstance(a, Tensor) else a for a in args])


class Whole(tuple[Any, ...]):
    """A tuple that torch.func takes for one argument; it has the attributes of a named tuple.

    torch.func takes other tuples apart into their entries, and under vmap it then finds more arguments than tangents.
    """

    kind: type

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind(*self), name)


def _whole(argument: tuple[Any, ...] | list[Any]) -> Whole:
    whole = argument if isinstance(argument, Whole) else Whole(argument)
    whole.kind = getattr(argument, "kind", type(argument))
    return whole


def _usable(a: Tensor, rule: type) -> Tensor:
    """``a``; the tensor inside if ``a`` is a dead wrapper, which outlived its transform."""
    if not a.is_nested:
        return unwrap_if_dead(a)
    if a.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{rule.__name__}: the hand-derived gradients are those of ordinary tensors, without ragged axes. Got a "
            f"nested tensor of layout {a.layout} that requires a gradient. Apply the layer to its values() or to a "
            "padded tensor (torch.nested.to_padded_tensor), or take torch's layers back by manualprop.unswap(model)."
        )
    return unwrap_if_dead(a)


# ----- vmap -----


def without_views(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Under vmap, results of ``forward`` that may be written to in place, as by ReLU(inplace=True).

    vmap moves the batch axis, which makes a result a view.  Autograd refuses to write into a view that a Function
    returned.
    """

    @functools.wraps(forward)
    def owned(*args: Any) -> Any:
        y = forward(*args)
        if not transforms_active():
            return y
        return tuple(map(_without_view, y)) if isinstance(y, tuple) else _without_view(y)

    return owned


def _without_view(y: Any) -> Any:
    inner = y
    while isinstance(inner, Tensor) and is_batchedtensor(inner):
        inner = get_unwrapped(inner)
    return unsafe_view(y, y.shape) if inner is not y and inner._is_view() else y


# ----- forward mode -----


def at_every_level(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``jvp`` differentiable in nested forward mode: ``jacfwd(jacfwd(f))``, jvp of jvp.

    torch switches forward mode off while it calls a Function's jvp.  Outer levels would then silently see its
    arithmetic as constant.  Here forward mode is on, and the saved tensors come without the tangents of this
    level: those are the arguments of jvp.
    """

    @functools.wraps(jvp)
    def every_level(ctx: Any, *tangents: Any) -> Any:
        if not transforms_active():
            return jvp(ctx, *tangents)
        with forward_mode(True):
            return jvp(_WithPrimals(ctx), *tangents)

    return every_level


class _WithPrimals:
    """A rule's context, whose saved tensors come without the tangents of the innermost level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, tuple(map(_primal, ctx.saved_tensors))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _primal(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    if is_batchedtensor(t):  # vmap inside forward mode: the tangents are inside the batched tensor
        inner: Any = _primal(get_unwrapped(t))
        batched: Tensor = add_batch_dim(inner, maybe_get_bdim(t), maybe_get_level(t))
        return batched
    primal: Tensor = unpack_dual(t, level=0)[0]
    return primal


# ----- what is kept -----


def save(ctx: Any, *tensors: tuple[Tensor | None, bool]) -> None:
    """Save tensors for forward mode, and for backward those that it needs.

    Under vmap both must save the same tensors: torch has one list of their batch axes.
    """
    every = transforms_active()
    ctx.save_for_backward(*[t if needed or every else None for t, needed in tensors])
    ctx.save_for_forward(*[t for t, _ in tensors])
