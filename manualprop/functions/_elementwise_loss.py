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
from manualprop.functions._execution import chosen, formula, full, recorded
from manualprop.functions._rule import Rule

# The second derivatives, one row for each argument.  A constant entry is a number.
Curvature = tuple[tuple[Tensor | float, ...], ...]


class ElementwiseLoss(Rule):
    """Base of all rules ``l = f(x, t, *p)``; f may take more tensors.  A subclass states only mathematics.

    - ``f(x, t, *p)``                  the loss.
    - ``output_gradient(x, t, *p)``    dl/dx: the gradient of the loss with respect to the network's output.
    - ``target_gradient(x, t, *p)``    dl/dt.
    - ``curvature(x, t, *p)``          ((d2l/dx2, d2l/dxdt), (d2l/dtdx, d2l/dt2)).
    - ``partials``                     the names of the first derivatives, one for each tensor argument; None
                                       for an argument without a derivative, such as a label.
    - ``chooses``                      whether a gradient is 0 where its partial derivative is 0, for every g.

    The tensors have one shape.  Half precision is computed in float32, and the loss stays in float32: only
    the reduction rounds.
    """

    abstract = True
    partials: ClassVar[tuple[str | None, ...]] = ("output_gradient", "target_gradient")
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
            return f(*map(full, inputs[:count]), *inputs[count:])

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors, ctx.p = inputs[:count], inputs[count:]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors
            gradients: list[Tensor | None] = [None] * (count + len(ctx.p))
            for i, (slope, needed) in enumerate(zip(slopes, ctx.needs_input_grad, strict=False)):
                if slope is not None and needed:
                    gradients[i] = slope.gradient(g, *tensors, *ctx.p).to(tensors[i].dtype)
            return tuple(gradients)

        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            tensors = ctx.saved_tensors
            return _sum(
                (
                    slope.apply(full(dt), *tensors, *ctx.p)
                    for slope, dt in zip(slopes, tangents, strict=False)
                    if slope is not None and dt is not None
                ),
                full(tensors[0]),
            )

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (forward, setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _check(rule: type[ElementwiseLoss]) -> None:
    """Check the declarations of a rule, before anything is built from them."""
    refuse_unknown(rule, {"partials", "chooses", "f", "curvature"}, helpers=True)
    require_choice(rule, "chooses", (False, True))
    named = rule.partials
    if not isinstance(named, tuple) or not named or not all(n is None or isinstance(n, str) for n in named):
        raise TypeError(
            f"{rule.__name__}: partials must be a tuple of a method's name, or None, for each tensor of f. "
            f"Got partials = {named!r}."
        )
    methods = [n for n in named if n is not None]
    require_methods(rule, "f", "curvature", *methods)
    for name in named:
        if name is not None:
            require_parameters(rule, name, "f")
    require_parameters(rule, "curvature", "f")
    _check_curvature(rule)


def _check_curvature(rule: type[ElementwiseLoss]) -> None:
    """Check that ``curvature`` has a row, of a right length, for each derivative up to the last named one."""
    count, given = len(rule.partials), parameters(rule.f)
    if given is None or len(given) < count:
        raise TypeError(
            f"{rule.__name__}: f must have a parameter for each of {count} partials. Got f({given})."
        )
    try:
        rows = rule.curvature(*[torch.full((1,), 0.5)] * count, *[1.0] * (len(given) - count))
    except Exception:  # not defined at 0.5: an error then shows at the first use
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
    gradient: ClassVar[Callable[..., Tensor]]  # the same, recorded only in grad mode


def _slope(rule: type[ElementwiseLoss], i: int, partial: Callable[..., Tensor]) -> type[Slope]:
    """The rule of ``g dl/d(argument i)``."""
    count, curvature, chooses = len(rule.partials), rule.curvature, rule.chooses
    tensors = ", ".join(f"a{j} (N)" for j in range(count))

    @formula(f"g (N), {tensors} -> da like g")
    def product(g: Tensor, *inputs: Any) -> Tensor:
        return chosen(partial(*inputs), g) if chooses else g * partial(*inputs)

    @formula(f"g (N), v (N), {tensors} -> {', '.join(f'd{j} like g' for j in range(count))}")
    def bent(g: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
        terms: list[Tensor | None] = [None] * count
        for j, k in enumerate(curvature(*inputs)[i]):
            if isinstance(k, int | float):  # constant; a constant 0 gives 0 for every product
                terms[j] = g * v * k if k else torch.zeros_like(g)
            else:
                terms[j] = chosen(k, g * v) if chooses else g * v * k
        return tuple(terms)

    def forward(g: Tensor, *inputs: Any) -> Tensor:
        dx: Tensor = product(g, *inputs)
        return dx

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
            row = zip(bent(g, v, *tensors, *ctx.p), tensors, needs, strict=False)
            gradients[:count] = [d.to(t.dtype) if need and d is not None else None for d, t, need in row]
        return dg, *gradients

    def jvp(ctx: Any, dg: Tensor | None, *tangents: Tensor | None) -> Tensor:
        g, *tensors = ctx.saved_tensors
        terms = [] if dg is None else [cls.apply(dg, *tensors, *ctx.p)]
        for j, dt in enumerate(tangents):
            term = None if dt is None else bent(g, dt, *tensors, *ctx.p)[j]
            terms += [] if term is None else [term]
        return _sum(terms, g)

    methods = (forward, setup_context, backward, jvp)
    cls: type[Slope] = type(
        f"{rule.__name__}Slope{i}",
        (Slope,),
        {method.__name__: staticmethod(method) for method in methods} | {"__module__": rule.__module__},
    )
    cls.gradient = staticmethod(recorded(cls.apply, product))
    return cls


def _sum(terms: Iterable[Tensor], like: Tensor) -> Tensor:
    """The sum of the terms; zeros if there are none."""
    first, *rest = [*terms] or [torch.zeros_like(like)]
    return sum(rest, first)
