"""The in-place form of a rule of one tensor: it writes y over x, so only one of the two stays in memory."""

import functools
from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import plain_eager, written_over
from manualprop.functions._rule import Rule, is_recorded


def write_over(rule: type[Rule], x: Tensor, *p: Any) -> Tensor:
    """Write y = f(x) into ``x`` and return it.

    If backward needs y, it reads ``x``.  If it needs x, x is copied first, as in torch.  A recorded rule writes nothing:
    who records it runs its backward, and that of the rules before, which may have kept x.
    """
    if is_recorded():
        return _first(rule.apply(x, *p))
    if not plain_eager():
        return x.copy_(_first(rule.apply(x.clone(), *p)))  # the compiler drops the copy
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.copy_(_first(rule.apply(x, *p)))
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        return x.copy_(x)  # torch raises its own error for a leaf
    source = x.clone() if getattr(rule, "saves", "output") == "input" else x
    return _first(_in_place(rule).apply(x, (source,), *p))


@functools.cache
def _in_place(rule: type[Rule]) -> type[Rule]:
    """A rule that writes f(source) over x; ``source`` is x itself or a copy of it.

    For eager code only: ``vmap`` and the compiler do not support a rule that writes over its input.
    ``source`` comes in a tuple, so that x alone gets a gradient.  Second derivatives reach x through the
    saved tensors.
    """

    def forward(ctx: Any, x: Tensor, sources: tuple[Tensor], *p: Any) -> Any:
        (source,) = sources
        f, others = getattr(rule, "f", None), []
        if f is not None and source is x:
            written_over(f, x.data, *p)  # .data, because mark_dirty increments the version
        else:
            y, *others = _several(rule.forward(source, *p))
            x.data.copy_(y)
        ctx.mark_dirty(x)
        rule.setup_context(ctx, (source, *p), (x, *others) if others else x)
        return (x, *others) if others else x

    def backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, *rest = _several(rule.backward(ctx, *g))
        return dx, None, *rest

    def jvp(ctx: Any, t: Tensor, _: None, *rest: None) -> Any:
        dy, *others = _several(rule.jvp(ctx, t, *rest))
        return (t.copy_(dy), *others) if others else t.copy_(dy)

    methods = {method.__name__: staticmethod(method) for method in (forward, backward, jvp)}
    # Abstract, because this forward already does the work of setup_context.
    return type(
        f"{rule.__name__}InPlace", (Rule,), methods | {"abstract": True, "__module__": rule.__module__}
    )


def _several(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


def _first(made: Any) -> Tensor:
    first: Tensor = _several(made)[0]
    return first
