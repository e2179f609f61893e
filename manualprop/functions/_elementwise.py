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

from manualprop.functions import _kernels
from manualprop.functions._kernels import by_parts
from manualprop.functions._rule import HALF, Rule, at_every_level, in_full_precision, plain_eager, times

ZERO = torch.zeros(
    (), dtype=torch.float64, device="cpu"
)  # without axes: compared in the other tensor's dtype


class Elementwise(Rule):
    """Base of all rules ``y = f(x)``.  A subclass states the mathematics and nothing else.

    - ``f(x, *p)``    the function.
    - ``df(s, *p)``   f'(x), written in the saved tensor ``s``; a fresh tensor, which may be overwritten.
      Of a rule that blocks of layers use and that saves x, ``df(x, y)`` writes y = f(x) into ``y`` by the way.
    - ``ddf(s, *p)``  d df / d s; hence f''(x) is ``ddf`` if ``s`` is x, and ``ddf * df`` if ``s`` is y.
      Left out where f is piecewise linear: then f'' = 0.
    - ``saves``       what ``s`` is: ``"input"`` or ``"output"``.

    ``f`` and ``df`` always run without recording, so they may work in place on tensors they made themselves.
    ``ddf`` is recorded when a third derivative is asked for, so it may not.
    """

    saves: ClassVar[Literal["input", "output"]] = "input"
    f: ClassVar[Callable[..., Tensor]]
    df: ClassVar[Callable[..., Tensor]]
    ddf: ClassVar[Callable[..., Tensor] | None] = None
    exact_slope: ClassVar[bool] = False  # slopes 0 and 1 need no float32 detour in half precision
    one_step: ClassVar[bool] = False  # df is one operation: nothing to keep in the cache from step to step
    chain: ClassVar[type["Chain"]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        f, saves_output = cls.f, cls.saves == "output"
        cls.chain = chain = _chain(cls)

        def forward(x: Tensor, *p: float) -> Tensor:
            return f(x, *p)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, *ctx.p = inputs
            s = output if saves_output else x
            ctx.save_for_backward(s)
            ctx.save_for_forward(s)

        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            (s,) = ctx.saved_tensors
            # Only when somebody will differentiate this gradient is the product itself recorded.
            product = chain.apply if torch.is_grad_enabled() else chain.product
            return (product(g, s, *ctx.p), *[None] * len(ctx.p))

        def jvp(ctx: Any, t: Tensor, *_: None) -> Tensor:
            (s,) = ctx.saved_tensors
            tangent: Tensor = chain.apply(t, s, *ctx.p)
            return tangent

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (forward, setup_context, backward, at_every_level(jvp)):
            setattr(cls, method.__name__, staticmethod(method))


def indicator(compare: Callable[..., Tensor], s: Tensor, bound: float, overwrite: bool = False) -> Tensor:
    """1 where ``compare(s, bound)`` holds, else 0, in the dtype of ``s``: a fresh tensor, or ``s`` overwritten.

    ATen compares a whole vector at a time only into a tensor of the same dtype: by way of booleans, a ReLU's
    backward takes 4 to 7 times as long.  ``vmap`` has no rule for ``out=``.
    """
    if not plain_eager():
        return compare(s, bound).to(s.dtype)
    out = s if overwrite else torch.empty_like(s)
    return compare(s, _bound(bound) if _takes_constants(s) else bound, out=out)


def inside(y: Tensor, a: float, b: float) -> Tensor:
    """1 where ``y``, which stays within its bounds ``a`` and ``b``, is neither of them; else 0, in the dtype of ``y``."""
    if not plain_eager():
        return ((y != a) & (y != b)).to(y.dtype)  # inductor keeps it as one mask of bytes
    if a == -b:
        return indicator(torch.ne, y.abs(), b, overwrite=True)
    if (a, b) == (0, 1):  # the two are integers, nothing between them is
        return indicator(torch.ne, y.frac(), 0, overwrite=True)
    if a == 0 and b >= 1:  # never rounded to 0 between them: b - y is b where y is tiny
        return indicator(torch.ne, (b - y).mul_(y), 0, overwrite=True)
    return indicator(torch.ne, y, a).mul_(indicator(torch.ne, y, b))


def _takes_constants(s: Tensor) -> bool:
    """Whether ``s`` mixes with a constant of :func:`_bound`: a fake or distributed tensor does not.

    Against a tensor without axes, the constant would decide the dtype.
    """
    return type(s) is Tensor and s.dim() > 0


_bounds: dict[float, Tensor] = {}


def _bound(value: float) -> Tensor:
    """``value`` as a tensor without axes, made once: making one takes longer than comparing a small layer."""
    found = _bounds.get(value)
    if found is None:
        found = torch.tensor(value, dtype=torch.float64, device="cpu")
        if type(found) is Tensor:  # no fake one, which would outlive its mode
            _bounds[value] = found
    return found


_ones = {dtype: torch.ones((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def one_minus(a: Tensor, b: Tensor) -> Tensor:
    """``1 - a * b``, a fresh tensor: one pass over the memory, and one rounding where the processor can."""
    one = _ones.get(a.dtype)
    if one is None or type(a) is not Tensor or type(b) is not Tensor or not (a.is_cpu and plain_eager()):
        return 1 - a * b
    return torch.addcmul(one, a, b, value=-1)


class Chain(Rule):
    """``dx = g * df(s)``: linear in ``g``, with slope ``g * ddf(s)`` in ``s``.  One subclass for each rule."""

    product: ClassVar[Callable[..., Tensor]]
    product_over: ClassVar[Callable[..., Tensor]]  # the same, written over g where that saves a tensor
    with_value: ClassVar[Callable[..., Tensor]]  # the same, and the value into one more tensor


def _chain(rule: type[Elementwise]) -> type[Chain]:
    df, ddf, exact_slope, blocks = rule.df, rule.ddf, rule.exact_slope, not rule.one_step

    def formula(g: Tensor, s: Tensor, *p: float, out: Tensor | None = None) -> Tensor:
        if s.dtype in HALF and not exact_slope:
            dx = g.float() * df(s.float(), *p)
            return dx.to(g.dtype) if out is None else out.copy_(dx)
        return times(df(s, *p), g) if out is None else torch.mul(df(s, *p), g, out=out)

    def product(g: Tensor, s: Tensor, *p: float) -> Tensor:
        if s.numel() < _kernels.SMALLEST:
            return formula(g, s, *p)
        return by_parts(formula, p, g, s, blocks=blocks)

    def product_over(g: Tensor, s: Tensor, *p: float) -> Tensor:
        if s.numel() < _kernels.SMALLEST and s.dtype not in HALF:
            return g.mul_(df(s, *p))
        return by_parts(formula, p, g, s, out=g)  # in blocks: without a tensor for the slope

    def value_and_product(y: Tensor, g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(df(x, y), g, out=out)

    def with_value(y: Tensor, g: Tensor, x: Tensor) -> Tensor:
        return by_parts(value_and_product, (), y, g, x, out=g)

    def curvature(g: Tensor, s: Tensor, t: Tensor, *p: float) -> Tensor:
        if ddf is None:
            return torch.zeros_like(s)
        full = in_full_precision
        return (full(g) * full(t) * ddf(full(s), *p)).to(s.dtype)

    def forward(g: Tensor, s: Tensor, *p: float) -> Tensor:
        return product(g, s, *p)

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
        return sum(rest, first)

    methods = (product, product_over, with_value, forward, setup_context, backward, jvp)
    cls: type[Chain] = type(
        f"{rule.__name__}Chain",
        (Chain,),
        {method.__name__: staticmethod(method) for method in methods} | {"__module__": rule.__module__},
    )
    return cls
