"""The chain rule for a loss ``l = f(x, t, ...)`` that pairs its arguments element by element, stated once.

The losses of :mod:`manualprop.functions.loss`, ``likelihood`` and part of ``cross_entropy`` and ``margin`` are
classes with a few formulas; this module turns them into a :class:`torch.autograd.Function`.

Symbols
    x   prediction or logits          g   dL/dl, the gradient that arrives
    t   target                        v   dL/d(g dl/dx), the gradient of the gradient
    l   loss, before reduction        p   parameters: Python numbers, never differentiated
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from manualprop.functions._declaration import (
    parameters,
    refuse_unknown,
    require_choice,
    require_methods,
    require_parameters,
)
from manualprop.functions._kernels import LARGE, by_parts
from manualprop.functions._rule import Rule, in_full_precision, plain_eager, times

# The second derivatives, a row for each argument; a number where an entry is constant.
Curvature = tuple[tuple[Tensor | float, ...], ...]


class ElementwiseLoss(Rule):
    """Base of all rules ``l = f(x, t, *p)``, or of further tensors.  A subclass states the mathematics only.

    - ``f(x, t, *p)``                  the loss.
    - ``output_gradient(x, t, *p)``    dl/dx: the gradient of the loss with respect to the network's output.
    - ``target_gradient(x, t, *p)``    dl/dt.  Both are fresh tensors, which may be overwritten.
    - ``curvature(x, t, *p)``          ((d2l/dx2, d2l/dxdt), (d2l/dtdx, d2l/dt2)).
    - ``partials``                     the names of the first derivatives, one for each tensor argument; None
                                       for an argument that l does not depend on smoothly, such as a label.

    - ``chooses``                      whether a gradient is 0 where its partial derivative is, whatever g is: it is
                                       chosen, not multiplied, as 0 times an infinite g would be NaN.

    The tensors have one shape.  ``f`` and the first derivatives always run without recording, so they may work
    in place on tensors they made themselves; ``curvature`` is recorded when a third derivative is asked for.
    Half precision is computed in float32 and the loss returned so: the reduction rounds once.
    """

    abstract = True
    partials: ClassVar[tuple[str | None, ...]] = ("output_gradient", "target_gradient")
    # Whether output_gradient takes ``g``, too, and returns g dl/dx with no dl/dx on the way.  The compiler would keep
    # that for backward: a tensor more to write, where x and t are alive anyway.
    takes_g: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    f: ClassVar[Callable[..., Tensor]]
    curvature: ClassVar[Callable[..., Curvature]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        _check(cls)
        f, count = cls.f, len(cls.partials)
        slopes = [
            None if name is None else _slope(cls, i, getattr(cls, name))
            for i, name in enumerate(cls.partials)
        ]

        def forward(*inputs: Any) -> Tensor:
            return f(*map(in_full_precision, inputs[:count]), *inputs[count:])

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors, ctx.p = inputs[:count], inputs[count:]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            recorded = torch.is_grad_enabled()  # somebody will differentiate this gradient
            gradients: list[Tensor | None] = [None] * (count + len(ctx.p))
            for i, (slope, needed) in enumerate(zip(slopes, ctx.needs_input_grad, strict=False)):
                if slope is not None and needed:
                    product = slope.apply if recorded else slope.product
                    gradients[i] = product(g, *tensors, *ctx.p).to(tensors[i].dtype)
            return tuple(gradients)

        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            tensors = ctx.saved_tensors
            return _sum(
                (
                    slope.apply(in_full_precision(dt), *tensors, *ctx.p)
                    for slope, dt in zip(slopes, tangents, strict=False)
                    if slope is not None and dt is not None
                ),
                in_full_precision(tensors[0]),
            )

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (forward, setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _check(rule: type[ElementwiseLoss]) -> None:
    """The declarations of a rule, before anything is made of them."""
    refuse_unknown(rule, {"partials", "takes_g", "chooses", "f", "curvature"}, helpers=True)
    require_choice(rule, "takes_g", (False, True))
    require_choice(rule, "chooses", (False, True))
    named = rule.partials
    if not isinstance(named, tuple) or not named or not all(n is None or isinstance(n, str) for n in named):
        raise TypeError(
            f"{rule.__name__}: partials must be a tuple of a method's name, or None, for each tensor of f. "
            f"Got partials = {named!r}."
        )
    methods = [n for n in named if n is not None]
    require_methods(rule, "f", "curvature", *methods)
    for i, name in enumerate(named):
        if name is not None:
            require_parameters(rule, name, "f", optional=("g",) if rule.takes_g and i == 0 else ())
    require_parameters(rule, "curvature", "f")
    first = None if named[0] is None else parameters(getattr(rule, named[0]))
    if rule.takes_g and first is not None and "g" not in first:
        raise TypeError(
            f"{rule.__name__}: takes_g is True, so {named[0]} must have a parameter g. Got {first}."
        )
    _check_curvature(rule)


def _check_curvature(rule: type[ElementwiseLoss]) -> None:
    """A row of d2l for each derivative that is named, up to the last, and no more entries than there are tensors."""
    count, given = len(rule.partials), parameters(rule.f)
    if given is None or len(given) < count:
        raise TypeError(
            f"{rule.__name__}: f must have a parameter for each of {count} partials. Got f({given})."
        )
    try:
        rows = rule.curvature(*[torch.full((1,), 0.5)] * count, *[1.0] * (len(given) - count))
    except Exception:  # not defined there: what it returns is seen where it is used
        return
    needed = 1 + max((i for i, name in enumerate(rule.partials) if name is not None), default=-1)
    smooth = sum(name is not None for name in rule.partials)
    if len(rows) < needed or any(not smooth <= len(row) <= count for row in rows):
        raise ValueError(
            f"{rule.__name__}: curvature must have a row for each of {needed} derivatives, and in each an entry for each "
            f"of the tensors. Got rows of {[len(row) for row in rows]}."
        )


class Slope(Rule):
    """``b = g dl/dx``: linear in ``g``, with slopes ``g d2l/dx2`` and ``g d2l/dxdt``.  One subclass for each dl/dx."""

    abstract = True
    product: ClassVar[Callable[..., Tensor]]


def _slope(rule: type[ElementwiseLoss], i: int, partial: Callable[..., Tensor]) -> type[Slope]:
    """The rule of ``g dl/d(argument i)``."""
    count, curvature, takes_g = len(rule.partials), rule.curvature, rule.takes_g and i == 0
    chooses = rule.chooses

    def formula(g: Tensor, *inputs: Any) -> Tensor:
        if takes_g and torch.compiler.is_compiling():
            return partial(*map(in_full_precision, inputs[:count]), *inputs[count:], g)
        return product_of(partial(*map(in_full_precision, inputs[:count]), *inputs[count:]), g)

    def product_of(slope: Tensor, g: Tensor) -> Tensor:
        if not chooses:
            return times(slope, g)
        flat = slope == 0
        return times(slope, g).masked_fill(flat, 0)

    def part(g: Tensor, *inputs: Any, out: Tensor | None = None) -> Tensor:
        *rest, x = inputs[:count]
        if out is None:
            return formula(g, x, *rest, *inputs[count:])
        full = map(in_full_precision, (x, *rest))
        slope = partial(*full, *inputs[count:])
        return out.copy_(product_of(slope, g)) if chooses else torch.mul(slope, g, out=out)

    def product(g: Tensor, *inputs: Any) -> Tensor:
        x, *rest = inputs[:count]
        if x.numel() < LARGE:
            return formula(g, *inputs)
        return by_parts(part, inputs[count:], g, *rest, x)  # x last: the result is laid out as it is

    def forward(g: Tensor, *inputs: Any) -> Tensor:
        return formula(g, *inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        saved, ctx.p = inputs[: count + 1], inputs[count + 1 :]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, *tensors = ctx.saved_tensors
        needs_g, *needs = ctx.needs_input_grad
        dg = cls.apply(v, *tensors, *ctx.p) if needs_g else None
        gradients: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            row = curvature(*map(in_full_precision, tensors), *ctx.p)[i]
            for j, tensor in enumerate(tensors):
                if needs[j] and j < len(row):
                    gradients[j] = _bent(g * v, row[j], chooses).to(tensor.dtype)
        return dg, *gradients

    def jvp(ctx: Any, dg: Tensor | None, *tangents: Tensor | None) -> Tensor:
        g, *tensors = ctx.saved_tensors
        row = curvature(*map(in_full_precision, tensors), *ctx.p)[i]
        terms = [] if dg is None else [cls.apply(dg, *tensors, *ctx.p)]
        terms += [_bent(g * dt, k, chooses) for k, dt in zip(row, tangents, strict=False) if dt is not None]
        return _sum(terms, g)

    methods = (product, forward, setup_context, backward, jvp)
    cls: type[Slope] = type(
        f"{rule.__name__}Slope{i}",
        (Slope,),
        {method.__name__: staticmethod(method) for method in methods} | {"__module__": rule.__module__},
    )
    return cls


def _bent(product: Tensor, k: Tensor | float, chooses: bool) -> Tensor:
    """``product * k``; zeros, whatever the product is, where ``k`` is constantly 0, or a rule ``chooses``."""
    if not isinstance(k, Tensor):
        return torch.zeros_like(product) if k == 0 else product * k
    return (product * k).masked_fill(k == 0, 0) if chooses else product * k


def _sum(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    """The sum of the terms, zeros without any."""
    first, *rest = [*terms] or [torch.zeros_like(like)]
    return sum(rest, first)


def minus(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh - other``, written into ``fresh`` unless ``vmap`` may have batched ``other`` alone."""
    return fresh.sub_(other) if plain_eager() else fresh - other


def clamped(fresh: Tensor, low: float, high: float) -> Tensor:
    """``fresh`` within [low, high], in place where ``vmap``, which has no rule for that, does not look."""
    return fresh.clamp_(low, high) if plain_eager() else fresh.clamp(low, high)
