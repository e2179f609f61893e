"""The chain rule for an elementwise function ``y = f(x)``, stated once.

Every activation in :mod:`manualprop.functions.activation` is a class with three formulas; this module turns
them into a :class:`torch.autograd.Function`.

Symbols
    x   input                       g   dL/dy, the gradient that arrives
    y   output, f(x)                t   tangent of x (forward mode)
    s   the saved tensor, x or y    v   dL/d(dx), the gradient of the gradient
    p   parameters: Python numbers, never differentiated
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from manualprop.functions._declaration import (
    parameters,
    refuse_unknown,
    require_choice,
    require_methods,
    require_parameters,
)
from manualprop.functions._execution import Runner, chosen, formula, recorded
from manualprop.functions._rule import Rule


class Elementwise(Rule):
    """Base of all rules ``y = f(x)``.  A subclass states the mathematics and nothing else.

    - ``f(x, *p)``    the function.
    - ``df(s, *p)``   f'(x), written in the saved tensor ``s``.
    - ``ddf(s, *p)``  d df / d s; hence f''(x) is ``ddf`` if ``s`` is x, and ``ddf * df`` if ``s`` is y.
      A piecewise linear f leaves it out: f'' = 0.
    - ``saves``       what ``s`` is: ``"input"`` or ``"output"``.
    - ``chooses``     whether g f' is 0 where f' is 0, even if g is infinite or NaN; the same for g f''.
      Example: sqrt(relu(x)) sends an infinite g to x = 0.
    - ``exact``       whether g f'(x) is free of rounding: f' is 0 or 1.
    - ``fuses``       its name in fused blocks; a rule without a name is not fused.
    """

    abstract = True
    saves: ClassVar[Literal["input", "output"]] = "input"
    chooses: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    fuses: ClassVar[str] = ""
    f: ClassVar[Callable[..., Tensor]]
    df: ClassVar[Callable[..., Tensor]]
    ddf: ClassVar[Callable[..., Tensor] | None] = None
    chain: ClassVar[type["Chain"]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        _check(cls)
        f, saves_output = cls.f, cls.saves == "output"
        cls.chain = chain = _chain(cls)
        gradient = chain.gradient

        def forward(x: Tensor, *p: float) -> Tensor:
            return f(x, *p)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, *ctx.p = inputs
            s = output if saves_output else x
            ctx.save_for_backward(s)
            ctx.save_for_forward(s)

        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            (s,) = ctx.saved_tensors
            return (gradient(g, s, *ctx.p), *[None] * len(ctx.p))

        def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
            (s,) = ctx.saved_tensors
            tangent: Tensor = chain.apply(t, s, *ctx.p)
            return tangent

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (forward, setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _check(rule: type[Elementwise]) -> None:
    """Check the declarations of a rule, before anything is built from them."""
    refuse_unknown(rule, DECLARATIONS, helpers=False)
    require_choice(rule, "saves", ("input", "output"))
    require_choice(rule, "chooses", (False, True))
    require_choice(rule, "exact", (False, True))
    if not isinstance(rule.fuses, str) or (rule.fuses and len(parameters(rule.f) or "x") > 1):
        raise TypeError(
            f"{rule.__name__}: fuses must be a name, of a function f(x) without parameters. Got {rule.fuses!r}."
        )
    require_methods(rule, "f", "df", *(() if rule.ddf is None else ("ddf",)))
    other = {"input": "y", "output": "x"}[rule.saves]
    for name in ("df", "ddf"):
        given = None if getattr(rule, name) is None else parameters(getattr(rule, name))
        if given and given[0] == other:
            raise ValueError(
                f"{rule.__name__}: {name} is written in the tensor that is saved. Got {name}({', '.join(given)}) "
                f"and saves = {rule.saves!r}."
            )
    require_parameters(rule, "df", "f")
    if rule.ddf is not None:
        require_parameters(rule, "ddf", "f")


DECLARATIONS = {"saves", "f", "df", "ddf", "chooses", "exact", "fuses"}


class Chain(Rule):
    """``dx = g * df(s)``: linear in ``g``, with slope ``g * ddf(s)`` in ``s``.  One subclass for each rule."""

    abstract = True
    gradient: ClassVar[Callable[..., Tensor]]  # the same, recorded only in grad mode
    product: ClassVar[Runner]  # the same, never recorded
    value_and_gradient: ClassVar[
        Callable[..., tuple[Tensor, Tensor]]
    ]  # f(x) and dx, recorded only in grad mode


def _chain(rule: type[Elementwise]) -> type[Chain]:
    f, df, ddf, chooses = rule.f, rule.df, rule.ddf, rule.chooses
    saves_output = rule.saves == "output"

    def product_of(g: Tensor, slope: Tensor) -> Tensor:
        return chosen(slope, g) if chooses else g * slope

    @formula("g (N), s (N) -> dx like g", lift=not rule.exact)
    def product(g: Tensor, s: Tensor, *p: float) -> Tensor:
        return product_of(g, df(s, *p))

    @formula("g (N), x (N) -> y like x, dx like g")
    def value_and_product(g: Tensor, x: Tensor, *p: float) -> tuple[Tensor, Tensor]:
        y = f(x, *p)
        s = y if saves_output else x
        return y, product_of(g, df(s, *p))

    @formula("g (N), s (N), t (N) -> ds like s")
    def curvature(g: Tensor, s: Tensor, t: Tensor, *p: float) -> Tensor:
        if ddf is None:
            return torch.zeros_like(s)
        return product_of(g * t, ddf(s, *p))

    def forward(g: Tensor, s: Tensor, *p: float) -> Tensor:
        dx: Tensor = product(g, s, *p)
        return dx

    def both(g: Tensor, x: Tensor, *p: float) -> tuple[Tensor, Tensor]:
        y = rule.apply(x, *p)
        return y, cls.apply(g, y if saves_output else x, *p)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, s, *ctx.p = inputs
        ctx.save_for_backward(g, s)
        ctx.save_for_forward(g, s)

    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, s = ctx.saved_tensors
        needs_g, needs_s, *_ = ctx.needs_input_grad
        dg = cls.apply(v, s, *ctx.p) if needs_g else None
        ds = curvature(g, s, v, *ctx.p) if needs_s else None
        return dg, ds, *(None for _ in ctx.p)

    def jvp(ctx: Any, dg: Tensor | None, ds: Tensor | None, *_: None) -> Tensor:
        g, s = ctx.saved_tensors
        terms = (
            None if dg is None else cls.apply(dg, s, *ctx.p),
            None if ds is None else curvature(g, s, ds, *ctx.p),
        )
        first, *rest = (term for term in terms if term is not None)
        db: Tensor = sum(rest, first)
        return db

    methods: tuple[Any, ...] = (product, forward, setup_context, backward, jvp)
    cls: type[Chain] = type(
        f"{rule.__name__}Chain",
        (Chain,),
        {method.__name__: staticmethod(method) for method in methods} | {"__module__": rule.__module__},
    )
    cls.gradient = staticmethod(recorded(cls.apply, product))
    cls.value_and_gradient = staticmethod(recorded(both, value_and_product))
    return cls
