r"""Hand-derived rules of the normalisation layers.

Symbols
    x   input                         g        dL/dy, the gradient that arrives
    m   mean                          gm, gr   dL/dm and dL/dr: None, unless a second derivative is taken
    r   1 / sqrt(variance + eps)      u        g W = dL/dz
    z   r (x - m), normalised         W, b     weight and bias, each may be None
    mean(.) and sum(.) without an index run over the elements that share m
Shape legend
    N   batch: any number of leading axes            D   the last ``axes`` axes, flattened
    C   channels           L   all further axes, flattened
    G   groups             K   channels in a group, C / G
Statistics
    A rule also returns the statistics that it used, and *their* derivatives too.  So for autograd the saved m
    and r are no constants: derivatives of every order pass through them, and nothing is computed twice.  For
    half-precision input the statistics are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from manualprop.functions._execution import Runner, formula
from manualprop.functions._execution import _normalisation as aten
from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule, flat

__all__ = ["BatchNorm", "BatchNormEvaluation", "GroupNorm", "LayerNorm", "RMSNorm"]


class Axes(NamedTuple):
    """The axes of the mean, with and without W along them, and the axes left for the sums of dW and db."""

    weighted: tuple[int, ...]
    unweighted: tuple[int, ...]
    batch: tuple[int, ...]

    @property
    def mean(self) -> tuple[int, ...]:
        """All axes of the mean."""
        return (*self.weighted, *self.unweighted)


def total(a: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum over ``axes``, kept with length 1."""
    return a.sum(axes, keepdim=True) if axes else a


def weighted(a: Tensor, W: Tensor | None) -> Tensor:
    """W a."""
    return a if W is None else W * a


def normalised(x: Tensor, m: Tensor | None, r: Tensor) -> Tensor:
    """z."""
    return r * x if m is None else r * (x - m)


def affine(x: Tensor, m: Tensor | None, r: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
    """W z + b"""
    n = weighted(normalised(x, m, r), W)
    return n if b is None else n + b


def norm_gradients(
    g: Tensor,
    x: Tensor,
    m: Tensor | None,
    r: Tensor,
    W: Tensor | None,
    gm: Tensor | None,
    gr: Tensor | None,
    n: int,
    *,
    axes: Axes,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""dL/dx, dL/dW and dL/db of $y = W z + b$ with $z = r (x - m)$: the one gradient of all the norms.

    Derivation, with u = g W, for the n elements that share m and r
        dm/dx_i   = 1 / n
        dr/dx_i   = -1/2 r^3 (2 / n) (x_i - m) = -r^2 z_i / n      chain rule; sum_k (x_k - m) = 0
        dz_k/dx_i = r (1[k = i] - 1 / n) + (x_k - m) dr/dx_i       product rule
                  = r (1[k = i] - 1 / n - z_k z_i / n)             since x_k - m = z_k / r
        dL/dx_i   = sum_k u_k dz_k/dx_i + gm dm/dx_i + gr dr/dx_i  chain rule
                  = r (u_i - c1 - z_i c2) + gm / n - gr r^2 z_i / n
        c1 = sum_k u_k / n,  c2 = sum_k u_k z_k / n
        dL/dW = sum g z,  dL/db = sum g                            y is linear in W and b
    If W is constant along an axis, g and g z are summed over it first and weighted afterwards.  If W is
    constant along all axes of the mean, it is a factor of dx.  Without a mean, m = 0 and c1 = 0.
    """
    z = normalised(x, m, r)
    gz = g * z
    sum_g, sum_gz = total(g, axes.unweighted), total(gz, axes.unweighted)
    w, factor = (W, r) if axes.weighted else (None, weighted(r, W))
    c1, c2 = (total(weighted(s, w), axes.weighted) / n for s in (sum_g, sum_gz))
    u = weighted(g, w)
    dx = factor * (u - z * c2 if m is None else u - c1 - z * c2)
    if gm is not None:
        dx = dx + gm / n
    if gr is not None:
        dx = dx - gr * r * r * z / n
    dW, db = (s.sum(axes.batch) if axes.batch else s for s in (sum_gz, sum_g))
    return dx, dW, db


def norm_tangents(
    dx: Tensor | None,
    x: Tensor,
    m: Tensor | None,
    r: Tensor,
    W: Tensor | None,
    dW: Tensor | None,
    db: Tensor | None,
    n: int,
    *,
    axes: Axes,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""dy, dm and dr: forward mode of all the norms.

    Derivation
        dm = mean(dx),  dr = -r^2 mean(z dx)                       dm/dx and dr/dx as in :func:`norm_gradients`
        dz = r (dx - dm - z mean(z dx))
        dy = W dz + z dW + db                                      product rule
    """
    z, zero = normalised(x, m, r), torch.zeros_like(r)
    dy = torch.zeros_like(z)
    dm = dr = zero
    if dx is not None:
        dm, mean_zdx = total(dx, axes.mean) / n, total(z * dx, axes.mean) / n
        dr = -r * r * mean_zdx
        dz = dx - z * mean_zdx if m is None else dx - dm - z * mean_zdx
        dy = weighted(r * dz, W)
    if dW is not None:
        dy = dy + z * dW
    if db is not None:
        dy = dy + db
    return dy, dm, dr


Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """Shapes of x, statistics and weights that broadcast together; n elements share a mean."""

    x: Shape
    stats: Shape
    W: Shape
    n: int  # 1 if there are none: their sums are 0


class Normalisation(Rule):
    """Base of the norms with a mean.  A subclass states its value and its shapes.

    - ``shapes(x, *options)``     the shapes of x, statistics and weights that broadcast together.
    - ``letters``                 the same shapes in letters, as :func:`formula` reads them.
    - ``axes``                    the axes of the mean and of the sums.
    - ``along``                   the letter of an axis whose every position has means of its own.
    """

    abstract = True
    shapes: ClassVar[Callable[..., Shapes]]
    letters: ClassVar[tuple[str, str, str]]
    axes: ClassVar[Axes]
    along: ClassVar[str] = "N"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        shapes = cls.shapes
        backwards, forwards = formulas(*cls.letters, cls.axes, cls.along)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            x, W, b, *ctx.options = inputs
            ctx.like_b = None if b is None else (b.shape, b.dtype)
            ctx.save_for_backward(x, W, *output[1:])
            ctx.save_for_forward(x, W, *output[1:])

        def backward(
            ctx: Any, g: Tensor | None, gm: Tensor | None, gr: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            x, W, m, r = ctx.saved_tensors
            to = shapes(x, *ctx.options)
            rows = [shaped(t, to.x) for t in (torch.zeros_like(x) if g is None else g, x)]
            m, r, gm, gr = [shaped(t, to.stats) for t in (m, r, gm, gr)]
            needs = ctx.needs_input_grad[:3]
            dx, dW, db = backwards(*rows, m, r, shaped(W, to.W), gm, gr, to.n, needs=needs)
            dW = None if dW is None else shaped(dW, W.shape).to(W.dtype)
            db = None if db is None else shaped(db, ctx.like_b[0]).to(ctx.like_b[1])
            return shaped(dx, x.shape), dW, db, *[None] * len(ctx.options)

        def jvp(
            ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None
        ) -> tuple[Tensor, ...]:
            x, W, m, r = ctx.saved_tensors
            to = shapes(x, *ctx.options)
            dx, rows = shaped(dx, to.x), shaped(x, to.x)
            W, dW, db = (shaped(t, to.W) for t in (W, dW, db))
            moved = forwards(dx, rows, shaped(m, to.stats), shaped(r, to.stats), W, dW, db, to.n)
            return tuple(t.reshape(like.shape) for t, like in zip(moved, (x, m, r), strict=True))

        # Closures of plain functions, not classmethods: compiled autograd cannot trace those.
        for method in (setup_context, backward, jvp):
            setattr(cls, method.__name__, staticmethod(method))
        super().__init_subclass__(**kwargs)


def formulas(x: str, stats: str, W: str, axes: Axes, along: str = "N") -> tuple[Runner, Runner]:
    """:func:`norm_gradients` and :func:`norm_tangents` for tensors of these axes."""
    saved = f"x ({x}), m ({stats}), r ({stats}), W ({W})"
    backwards = f"g ({x}), {saved}, gm ({stats}), gr ({stats}) -> dx like x, dW ({W}), db ({W})"
    forwards = f"dx ({x}), {saved}, dW ({W}), db ({W}) -> dy like x, dm like m, dr like r"
    gradients, tangents = (partial(f, axes=axes) for f in (norm_gradients, norm_tangents))
    return formula(backwards, along=along)(gradients), formula(forwards, along=along)(tangents)


def shaped(t: Any, shape: Shape) -> Any:
    """``t`` in a shape, reshaped only if needed: on a small layer a view costs as much as the arithmetic."""
    return t if t is None or t.shape == shape else t.reshape(shape)


def of_rows(x: Tensor, axes: int, eps: float) -> Shapes:
    """The shapes of a norm over the last axes."""
    N, D = x.shape[:-axes].numel(), x.shape[-axes:].numel()
    return Shapes((N, D), (N, 1), (D,), D or 1)


# Outside the class: compiled autograd cannot read an attribute of a Function.
ROWS = Axes(weighted=(1,), unweighted=(), batch=(0,))


class LayerNorm(Normalisation):
    r"""$y = W z + b$ with $z = r (x - m)$, mean $m$ and $r = (\tfrac1D \sum_d (x_d - m)^2 + \epsilon)^{-1/2}$

    Derivation
        :func:`norm_gradients` and :func:`norm_tangents`, for one of the N rows: n = D.
    Second order
        m and r are outputs with their own derivatives: autograd differentiates the formulas as written, to
        every order.  (torch states its second derivative by hand, and its third is silently wrong.)
    Shape
        x (N, D), W and b (D,) -> y (N, D), m and r (N, 1)
    Memory
        x, m and r, as in torch.  The output could not replace x: z cannot be found from y where W = 0.
    Accuracy
        ATen takes the mean first and the variance about it.  x - m is exact where m is large against x - m.
    Reference
        Ba, Kiros, Hinton, 2016, https://arxiv.org/abs/1607.06450
    """

    letters = ("N, D", "N, 1", "D")
    axes = ROWS

    @staticmethod
    def shapes(x: Tensor, axes: int, eps: float) -> Shapes:
        return of_rows(x, axes, eps)

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, axes: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten.layer_norm(x, x.shape[-axes:], W, b, eps)


class RMSNorm(Rule):
    r"""$y = W z$ with $z = r x$ and $r = (\tfrac1D \sum_d x_d^2 + \epsilon)^{-1/2}$

    Derivation
        :func:`norm_gradients` and :func:`norm_tangents` without a mean, for one of the N rows: n = D.
    Second order
        As :class:`LayerNorm`: r is an output with its own derivative.
    Shape
        x (N, D), W (D,) -> y (N, D), r (N, 1)
    Memory
        x and r: 4 bytes per element in float32, 2 in half precision.  torch keeps 8 on the CPU.
    Accuracy
        For half-precision input everything is computed in float32; only the last product is rounded.
    Reference
        Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor | None, axes: int, eps: float) -> tuple[Tensor, Tensor]:
        return aten.rms_norm(x, axes, W, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, *ctx.options = inputs
        ctx.save_for_backward(x, W, output[1])
        ctx.save_for_forward(x, W, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gr: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, r = ctx.saved_tensors
        to = of_rows(x, *ctx.options)
        g, x_rows = (shaped(t, to.x) for t in (torch.zeros_like(x) if g is None else g, x))
        r, gr, needs = shaped(r, to.stats), shaped(gr, to.stats), (*ctx.needs_input_grad[:2], False)
        dx, dW, _ = rows_backwards(g, x_rows, None, r, shaped(W, to.W), None, gr, to.n, needs=needs)
        return shaped(dx, x.shape), None if dW is None else shaped(dW, W.shape).to(W.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        x, W, r = ctx.saved_tensors
        to = of_rows(x, *ctx.options)
        dx, x_rows, W, dW = shaped(dx, to.x), shaped(x, to.x), shaped(W, to.W), shaped(dW, to.W)
        dy, _, dr = rows_forwards(dx, x_rows, None, shaped(r, to.stats), W, dW, None, to.n)
        return dy.reshape(x.shape), dr.reshape(r.shape)


rows_backwards, rows_forwards = formulas(*LayerNorm.letters, ROWS)


class GroupNorm(Normalisation):
    r"""$y_c = W_c z_c + b_c$, where $z$ is normalised as in :class:`LayerNorm` over the channels of a group

    Derivation, for one example and one group, with n = K L elements
        :func:`norm_gradients` and :func:`norm_tangents`; W is constant within a channel: c1 = sum_k W_k sum_l g_kl / n
    Second order
        As :class:`LayerNorm`: m and r are outputs with their own derivatives.
    Shape
        x (N, C, L), W and b (C,) -> y (N, C, L), m and r (N, G);  inside, x is (N, G, K, L)
    Memory
        x, m and r, as in torch.
    Accuracy
        As :class:`LayerNorm`.
    Reference
        Wu and He, 2018, https://arxiv.org/abs/1803.08494
    """

    letters = ("N, G, K, L", "N, G, 1, 1", "G, K, 1")
    axes = Axes(weighted=(2,), unweighted=(3,), batch=(0,))

    @staticmethod
    def shapes(x: Tensor, G: int, eps: float) -> Shapes:
        N, K, L = x.shape[0], x.shape[1] // G, x.shape[2:].numel()
        return Shapes((N, G, K, L), (N, G, 1, 1), (G, K, 1), K * L or 1)

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, G: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten.group_norm(x, G, W, b, eps)


def of_channels(x: Tensor) -> Shapes:
    """The shapes of a norm over the batch."""
    B, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    return Shapes((B, C, L), (1, C, 1), (C, 1), B * L or 1)


class BatchNorm(Normalisation):
    r"""$y_c = W_c z_c + b_c$, where $z$ is normalised as in :class:`LayerNorm` over the batch: training

    Derivation, for one channel, with n = N L elements
        :func:`norm_gradients` and :func:`norm_tangents`, where W is constant
    Second order
        As :class:`LayerNorm`: m and r are outputs with their own derivatives.
    Running statistics
        ATen updates them in place, as in torch: running <- (1 - momentum) running + momentum batch,
        with the unbiased variance.  y does not depend on them, so no gradient passes through them.
    Shape
        x (N, C, L), all else (C,) -> y (N, C, L), m and r (C,)
    Memory
        x, m and r, as in torch.
    Accuracy
        As :class:`LayerNorm`.
    Reference
        Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167
    """

    letters = ("B, C, L", "1, C, 1", "C, 1")
    axes = Axes(weighted=(), unweighted=(0, 2), batch=())
    along = "C"

    @staticmethod
    def shapes(x: Tensor, *options: Any) -> Shapes:
        return of_channels(x)

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten.batch_norm(x, W, b, running_mean, running_var, momentum, eps)


channels_backwards, channels_forwards = formulas(*BatchNorm.letters, BatchNorm.axes, BatchNorm.along)


class BatchNormEvaluation(Rule):
    r"""$y_c = W_c r_c (x_c - m_c) + b_c$ with constant $m$ and $r = (v + \epsilon)^{-1/2}$: evaluation

    Derivation, for one channel
        dL/dx_i = g_i W r                                          y is affine in x
        dL/dW   = sum g_i r (x_i - m)                              and in W and b
        dL/db   = sum g_i
        dy = W r dx + r (x - m) dW + db                            forward mode
    Second order
        dx, dW and db are products and sums of g, x and W: autograd differentiates those as written.  dx does not
        depend on x: the empty output e carries this zero derivative, so x is not kept for it.
    Shape
        x (N, C, L), all else (C,) -> y (N, C, L), e (0,)
    Memory
        x if W needs a gradient; and tensors of C elements.
    Accuracy
        That of x - m.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, m: Tensor | None, v: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return aten.evaluated(x, W, b, m, v, eps), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, b, m, v, ctx.eps = inputs
        ctx.shape, ctx.like_b = x.shape, None if b is None else (b.shape, b.dtype)
        save(ctx, (x, ctx.needs_input_grad[1]), *[(t, True) for t in (W, m, v, output[1])])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, ge: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, m, v, e = ctx.saved_tensors
        if g is None:  # a second derivative: dx does not depend on x
            return e.new_zeros(ctx.shape), None, None, None, None, None
        to = of_channels(g)
        # x is needed for dW alone, and else not kept.
        rows = (shaped(t, to.x) for t in (g, x if ctx.needs_input_grad[1] else g))
        columns = (shaped(t, to.W) for t in (W, m, v))
        dx, dW, db = evaluation_gradients(*rows, *columns, ctx.eps, needs=ctx.needs_input_grad[:3])
        dx = None if dx is None else flat(shaped(dx, g.shape), e)
        dW = None if dW is None else shaped(dW, W.shape).to(W.dtype)
        db = None if db is None else shaped(db, ctx.like_b[0]).to(ctx.like_b[1])
        return dx, dW, db, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        x, W, m, v, e = ctx.saved_tensors
        to = of_channels(x)
        rows, columns = (shaped(t, to.x) for t in (dx, x)), (shaped(t, to.W) for t in (W, m, v, dW, db))
        dy: Tensor = evaluation_tangent(*rows, *columns, ctx.eps)
        return dy.reshape(x.shape), torch.zeros_like(e)


@formula("g (B, C, L), x (B, C, L), W (C, 1), m (C, 1), v (C, 1) -> dx like g, dW (C, 1), db (C, 1)")
def evaluation_gradients(
    g: Tensor, x: Tensor, W: Tensor | None, m: Tensor, v: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dx, dL/dW and dL/db of :class:`BatchNormEvaluation`."""
    r = (v + eps).rsqrt()
    dx = g * weighted(r, W)
    dW = r * total(g * (x - m), (0, 2))  # (B, C, L) -> (1, C, 1)
    return dx, dW, total(g, (0, 2))


@formula("dx (B, C, L), x (B, C, L), W (C, 1), m (C, 1), v (C, 1), dW (C, 1), db (C, 1) -> dy like x")
def evaluation_tangent(
    dx: Tensor | None,
    x: Tensor,
    W: Tensor | None,
    m: Tensor,
    v: Tensor,
    dW: Tensor | None,
    db: Tensor | None,
    eps: float,
) -> Tensor:
    """dy of :class:`BatchNormEvaluation`."""
    r = (v + eps).rsqrt()
    dy = torch.zeros_like(x) if dx is None else weighted(r, W) * dx
    dy = dy if dW is None else dy + r * (x - m) * dW
    return dy if db is None else dy + db
