"""The chain rule for an elementwise function ``y = f(x)``, stated once.

Every activation in :mod:`manualprop.functions.activation` is a class with three formulas; this module turns
them into a :class:`torch.autograd.Function`.

Symbols
    x   input                       g   dL/dy, the gradient that arrives
    y   output, f(x)                t   tangent of x (forward mode)
    s   the saved tensor, x or y    v   dL/d(dx), the gradient of the gradient
    p   parameters: Python numbers, never differentiated
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions import _kernels
from manualprop.functions._declaration import (
    parameters,
    refuse_unknown,
    require_choice,
    require_methods,
    require_number,
    require_parameters,
)
from manualprop.functions._kernels import by_parts
from manualprop.functions._rule import HALF, Rule, in_full_precision, plain_eager, times

LOG2_E = 1 / math.log(2)  # e^x = 2^(x log2 e): exp2 works on vectors everywhere, exp only where MKL does


class Elementwise(Rule):
    """Base of all rules ``y = f(x)``.  A subclass states the mathematics and nothing else.

    - ``f(x, *p)``    the function.
    - ``df(s, *p)``   f'(x), written in the saved tensor ``s``; a fresh tensor, which may be overwritten.
      With a parameter ``out``, it may be written into that tensor, if there is one.
      Of a rule that blocks of layers use and that saves x, ``df(x, y)`` writes y = f(x) into ``y`` by the way.
    - ``ddf(s, *p)``  d df / d s; hence f''(x) is ``ddf`` if ``s`` is x, and ``ddf * df`` if ``s`` is y.
      Left out where f is piecewise linear: then f'' = 0.
    - ``saves``       what ``s`` is: ``"input"`` or ``"output"``.
    - ``slope``       of a function whose slope is this number or 0: ``df`` then tells where it is not 0, by
      :func:`differs`, and dx = slope g there.  Elsewhere dx is 0, whatever g is: it is chosen, not multiplied, as
      0 times an infinite g would be NaN.  (sqrt(relu(x)) has one at x = 0.)

    - ``chooses``     whether dx is 0 where ``df`` is 0, and f'' g where ``ddf`` is 0, whatever g is: chosen, as above.

    ``f`` and ``df`` always run without recording, so they may work in place on tensors they made themselves.
    ``ddf`` is recorded when a third derivative is asked for, so it may not.
    """

    abstract = True
    saves: ClassVar[Literal["input", "output"]] = "input"
    f: ClassVar[Callable[..., Tensor]]
    df: ClassVar[Callable[..., Tensor]]
    ddf: ClassVar[Callable[..., Tensor] | None] = None
    slope: ClassVar[float | None] = None
    chooses: ClassVar[bool] = False
    one_step: ClassVar[bool] = False  # df is one operation: nothing to keep in the cache from step to step
    chain: ClassVar[type["Chain"]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        _check(cls)
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
        for method in (forward, setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def _check(rule: type[Elementwise]) -> None:
    """The declarations of a rule, before anything is made of them."""
    refuse_unknown(rule, DECLARATIONS, helpers=False)
    require_choice(rule, "saves", ("input", "output"))
    require_choice(rule, "chooses", (False, True))
    require_choice(rule, "one_step", (False, True))
    require_number(rule, "slope")
    require_methods(rule, "f", "df", *(() if rule.ddf is None else ("ddf",)))
    if rule.slope is not None and rule.ddf is not None:
        raise ValueError(
            f"{rule.__name__}: a slope that is a number or 0 leaves no ddf to state. Got slope = {rule.slope} and ddf."
        )
    other = {"input": "y", "output": "x"}[rule.saves]
    for name in ("df", "ddf"):
        given = None if getattr(rule, name) is None else parameters(getattr(rule, name))
        if given and given[0] == other:
            raise ValueError(
                f"{rule.__name__}: {name} is written in the tensor that is saved. Got {name}({', '.join(given)}) "
                f"and saves = {rule.saves!r}."
            )
    require_parameters(rule, "df", "f", optional=("y", "out") if rule.saves == "input" else ("out",))
    if rule.ddf is not None:
        require_parameters(rule, "ddf", "f")


DECLARATIONS = {"saves", "f", "df", "ddf", "slope", "chooses", "one_step"}

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a float


def differs(s: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """Where ``s`` is not ``bound``, as a NaN never is: for :func:`chosen`, which multiplies g's bits by it.

    Integers 0 and 1, as wide as the floats of ``s``, in the memory of ``out`` if given, which may be ``s``; or
    booleans where the compiler or a transform watches, and on a GPU.  ``s`` is not -0, unless ``bound`` is.
    (ATen chooses by booleans one element at a time on the CPU, 40 times as slowly.)
    """
    if not (s.is_cpu and type(s) is Tensor and plain_eager() and s.dtype.is_floating_point):
        return s != bound
    integers = BITS[s.itemsize]
    out = torch.empty_like(s) if out is None else out
    return torch.ne(s.view(integers), constant(bound, s, integers), out=out.view(integers))


def chosen(g: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """``g`` where ``k``, made by :func:`differs`, and 0 elsewhere: a fresh tensor, or ``out``."""
    if k.dtype is torch.bool:
        dx = g.masked_fill(~k, 0)  # inductor's kernel for g.where(k, 0) takes 1.3 times as long
        return dx if out is None else out.copy_(dx)
    if is_legacy_batchedtensor(g):
        return g * k
    k = k if k.itemsize == g.itemsize else k.to(BITS[g.itemsize])
    bits = g.view(k.dtype)
    if out is not None:
        torch.mul(k, bits, out=out.view(k.dtype))
        return out
    return k.mul_(bits).view(g.dtype)


def indicator(compare: Callable[..., Tensor], s: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """1 where ``compare(s, bound)`` holds, else 0, in the dtype of ``s``: a fresh tensor, or ``out``, which may be ``s``.

    ATen compares a whole vector at a time only into a tensor of the same dtype: by way of booleans, a ReLU's
    backward takes 4 to 7 times as long.  ``vmap`` has no rule for ``out=``.
    """
    if not plain_eager():
        return compare(s, bound).to(s.dtype)
    return compare(s, constant(bound, s), out=torch.empty_like(s) if out is None else out)


def inside(y: Tensor, a: float, b: float, out: Tensor | None = None) -> Tensor:
    """Where ``y``, which stays within its bounds ``a`` and ``b``, is neither of them: as :func:`differs`."""
    if not plain_eager():
        return (y != a) & (y != b)  # inductor keeps it as one mask of bytes
    up = torch.threshold(y, a, b, out=out)  # y = a becomes b, too
    return differs(up if b != 0 else up.add_(0), b, up)  # -0 becomes 0


_constants: dict[tuple[float, torch.dtype, torch.dtype | None], Tensor] = {}


def constant(value: float, like: Tensor, view: torch.dtype | None = None) -> Tensor | float:
    """``value`` as a tensor without axes in the dtype of ``like``, made once, where such a one may stand for it.

    ATen makes one of every number that it is given, which takes as long as the work on a small layer.  With ``view``,
    it is what that dtype makes of its bits.
    """
    if type(like) is not Tensor or not plain_eager():  # a fake or distributed one mixes with its kind alone
        return value
    found = _constants.get((value, like.dtype, view))
    if found is None:
        with torch.inference_mode(False):  # it outlives the mode
            found = torch.tensor(value, dtype=like.dtype, device="cpu")
        if type(found) is not Tensor:  # made within somebody's fake mode, which it would outlive
            return value
        found = found if view is None else found.view(view)
        _constants[value, like.dtype, view] = found
    return found


def affine(a: float, b: float, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``a + b x``, a fresh tensor or ``out``, which may be ``x``: one pass over the memory."""
    offset = constant(a, x)
    return torch.add(offset, x, alpha=b, out=out) if isinstance(offset, Tensor) else x * b + a


def one_minus(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``1 - a * b``, a fresh tensor or ``out``: one pass over the memory, and one rounding where the processor can."""
    one = constant(1, a)
    if not (isinstance(one, Tensor) and type(b) is Tensor and a.is_cpu):
        return 1 - a * b if out is None else torch.sub(1, a * b, out=out)
    return torch.addcmul(one, a, b, value=-1, out=out)


class Chain(Rule):
    """``dx = g * df(s)``: linear in ``g``, with slope ``g * ddf(s)`` in ``s``.  One subclass for each rule."""

    abstract = True
    product: ClassVar[Callable[..., Tensor]]
    product_over: ClassVar[Callable[..., Tensor]]  # the same, written over g where that saves a tensor
    with_value: ClassVar[Callable[..., Tensor]]  # the same, and the value into one more tensor


def _chain(rule: type[Elementwise]) -> type[Chain]:
    df, ddf, height, blocks, chooses = rule.df, rule.ddf, rule.slope, not rule.one_step, rule.chooses
    takes_out = "out" in inspect.signature(df).parameters

    def formula(g: Tensor, s: Tensor, *p: float, out: Tensor | None = None) -> Tensor:
        if height is not None:
            k = df(s, *p) if out is None or out is g else df(s, *p, out=out)
            dx = chosen(g, k, out)
            if height == 1:
                return dx
            return dx.mul_(
                height if dx.dtype in HALF else constant(height, dx)
            )  # which half precision would round
        if chooses:
            slope = df(in_full_precision(s), *p)
            flat = slope == 0
            dx = times(slope, in_full_precision(g)).masked_fill(flat, 0).to(g.dtype)
            return dx if out is None else out.copy_(dx)
        if s.dtype in HALF:
            dx = times(df(s.float(), *p), g.float())
            return dx.to(g.dtype) if out is None else out.copy_(dx)
        if out is None:
            return times(df(s, *p), g)
        slope = df(s, *p, out=out) if takes_out and out is not g else df(s, *p)
        return torch.mul(slope, g, out=out)

    def product(g: Tensor, s: Tensor, *p: float) -> Tensor:
        if s.numel() < _kernels.SMALLEST:
            return formula(g, s, *p)
        return by_parts(formula, p, g, s, blocks=blocks)

    def product_over(g: Tensor, s: Tensor, *p: float) -> Tensor:
        if s.numel() < _kernels.SMALLEST and s.dtype not in HALF and height is None and not chooses:
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
        k = ddf(full(s), *p)
        bent = full(g) * full(t) * k
        return (bent.masked_fill(k == 0, 0) if chooses else bent).to(s.dtype)

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
