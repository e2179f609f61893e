r"""A linear map and its adjoint, stated once for all rules y = A x.

Symbols
    x   input               A   the map, a matrix that is never stored        A^T   its adjoint
    y   output              M   the matrix of one axis of a separable map
    g   dL/dy, the gradient that arrives              p   options: Python values, never differentiated
    t   tangent of x        v   dL/d(dx), the gradient of the gradient
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from manualprop.functions._declaration import require_methods
from manualprop.functions._execution import recorded
from manualprop.functions._execution._axes import Like, Row, laid_out, owned, transposed_along
from manualprop.functions._rule import Rule, flat


class LinearMap(Rule):
    r"""$y = A x + c$ with a constant $c$, most often 0.  A subclass states the map and its adjoint.

    - ``f(x, *p)``                     y.
    - ``transposed(g, like, *p)``      A^T g, for an x of the shape ``like.shape``.
    - ``without_constant(*p)``         the options of the map without c; the options themselves where c is 0.

    Derivation
        y_i = sum_j A_ij x_j + c_i
        dL/dx_j = sum_i g_i dy_i/dx_j = sum_i g_i A_ij             so dx = A^T g
        dy = A t                                                   forward mode
        <A x, g> = sum_ij g_i A_ij x_j = <x, A^T g>                the property by which an adjoint is tested
    Second order
        dx = A^T g, and the adjoint of A^T is A: :class:`LinearMap` and :class:`Adjoint` are each other's
        backward, so derivatives of every order are made of these two.  dx does not depend on x: the rule has
        a second output, without elements, which carries this zero derivative, so x is not kept.
    Memory
        Nothing but the shape of x.
    Accuracy
        That of the sums; half precision is rounded once.
    """

    abstract = True
    f: ClassVar[Callable[..., Tensor]]
    transposed: ClassVar[Callable[..., Tensor]]
    adjoint: ClassVar[type["Adjoint"]]

    @staticmethod
    def without_constant(*p: Any) -> tuple[Any, ...]:
        return p

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if vars(cls).get("abstract", False):
            super().__init_subclass__(**kwargs)
            return
        require_methods(cls, "f", "transposed")
        f, without_constant = cls.f, cls.without_constant
        cls.adjoint = _adjoint(cls)
        # The compiler must not trace into the making of a matrix.
        transposed = recorded(cls.adjoint.apply, cls.adjoint.forward, compiled=True)

        def forward(x: Tensor, *p: Any) -> tuple[Tensor, Tensor]:
            return owned(f(x, *p)), x.new_empty(0)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            x, *ctx.p = inputs
            ctx.like = Like.of(x)
            ctx.save_for_backward(output[1])
            ctx.save_for_forward(output[1])

        def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
            (nothing,) = ctx.saved_tensors
            if g is None:  # a second derivative
                return nothing.new_zeros(ctx.like.shape), *[None] * len(ctx.p)
            return flat(transposed(g, ctx.like, *ctx.p), nothing), *[None] * len(ctx.p)

        def jvp(ctx: Any, t: Tensor, *_: None) -> tuple[Tensor, Tensor]:
            tangent: tuple[Tensor, Tensor] = cls.apply(t, *without_constant(*ctx.p))
            return tangent

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (forward, setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def mapped(rule: type[LinearMap], x: Tensor, *p: Any) -> Tensor:
    """y = A x + c."""
    y: Tensor = rule.apply(x, *p)[0]
    return y


class Adjoint(Rule):
    """``dx = A^T g``, whose adjoint is A.  One subclass for each linear map."""

    abstract = True


def _adjoint(rule: type[LinearMap]) -> type[Adjoint]:
    transposed, without_constant = rule.transposed, rule.without_constant

    def forward(g: Tensor, like: Like, *p: Any) -> Tensor:
        if g.numel() == 0 or 0 in like.shape:  # for some empty tensors torch's shapes are wrong
            return g.new_zeros(like.shape)
        return laid_out(transposed(g, like, *p), like)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, ctx.like, *ctx.p = inputs
        ctx.shape = g.shape

    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if 0 in ctx.like.shape:  # dx has no elements, whatever g is; the mean of none would be NaN
            dg = v.new_zeros(ctx.shape)
        else:
            dg = rule.apply(v, *without_constant(*ctx.p))[0]
        return dg, None, *[None] * len(ctx.p)

    def jvp(ctx: Any, dg: Tensor, *_: None) -> Tensor:
        tangent: Tensor = cls.apply(dg, ctx.like, *ctx.p)
        return tangent

    methods: tuple[Any, ...] = (forward, setup_context, backward, jvp)
    cls: type[Adjoint] = type(
        f"{rule.__name__}Adjoint",
        (Adjoint,),
        {method.__name__: staticmethod(method) for method in methods} | {"__module__": rule.__module__},
    )
    return cls


class Separable(LinearMap):
    r"""$y = x \times_1 M_1 \times_2 M_2 \dots$: each of the last axes is mapped by a small matrix of its own.

    - ``f(x, *p)``                     y.
    - ``row(i, n, o, *options)``       row i of the matrix M (o, n) of one axis, as {j: M_ij} without its zeros.
    - ``along(*p)``                    for each of the last axes, in their order, its ``options``.

    Derivation, for two axes
        y_ij = sum_kl M1_ik M2_jl x_kl
        dL/dx_kl = sum_ij g_ij M1_ik M2_jl                         so dx = M1^T g M2: each axis by its transpose
    Memory
        Nothing but the shape of x.
    Accuracy
        That of the sums; half precision is summed in float32 and rounded once.
    """

    abstract = True
    row: ClassVar[Row]
    along: ClassVar[Callable[..., Sequence[tuple[Any, ...]]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        require_methods(cls, "row", "along")
        row, along = cls.row, cls.along

        def transposed(g: Tensor, like: Like, *p: Any) -> Tensor:
            return transposed_along(row, along(*p), g, like)

        cls.transposed = staticmethod(transposed)
        super().__init_subclass__(**kwargs)
