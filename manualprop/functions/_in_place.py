"""A rule that writes y over x and keeps no more than that one tensor of them, made of any rule of one tensor."""

import functools
from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import plain_eager
from manualprop.functions._rule import Rule, is_recorded


def write_over(rule: type[Rule], x: Tensor, *p: Any) -> Tensor:
    """``x``, after y = f(x) was written into it.

    A rule that needs y in backward finds it in ``x``; for one that needs x, as for torch's, x is copied first.
    """
    if not plain_eager() or is_recorded():
        return x.copy_(_first(rule.apply(x.clone(), *p)))  # the compiler drops the copy
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.copy_(_first(rule.apply(x, *p)))
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        return x.copy_(x)  # which torch refuses
    source = x.clone() if getattr(rule, "saves", "output") == "input" else x
    return _first(_in_place(rule).apply(x, (source,), *p))


@functools.cache
def _in_place(rule: type[Rule]) -> type[Rule]:
    """f(source) written over x, which is ``source`` or what it is a copy of.

    For eager code: ``vmap`` and the compiler know no rule that writes over its input.  ``source`` comes in a tuple: the
    gradient is that of x alone, and second derivatives reach x through the history of what is saved.
    """

    def forward(ctx: Any, x: Tensor, sources: tuple[Tensor], *p: Any) -> Any:
        (source,) = sources
        y, *others = _several(rule.forward(source, *p))
        x.data.copy_(y)  # mark_dirty counts the version up
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
    # Not a rule of its own statement: its forward does what setup_context does elsewhere.
    return type(
        f"{rule.__name__}InPlace", (Rule,), methods | {"abstract": True, "__module__": rule.__module__}
    )


def _several(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


def _first(made: Any) -> Tensor:
    first: Tensor = _several(made)[0]
    return first
