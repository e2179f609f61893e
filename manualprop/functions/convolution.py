r"""Hand-derived rules of the convolution, the transposed convolution and the correlation: one family, for any axes.

Symbols
    x   the wide side, at positions i          n   example in the batch
    y   the narrow side, at positions q        c   channel of x in its group, o   channel of y
    W   the kernel, at positions k             u   group; o is short for the pair (group, channel of y in it)
    s, p, d   stride, padding and dilation     X, Q, K   the sizes: 0 <= i < X, 0 <= q < Q, 0 <= k < K
    Positions, sizes, s, p and d have one number for each axis, for any number of axes.

The family
    All three maps are parts of one sum, in which x is 0 outside of 0 <= i < X:
        T(x, W, y) = sum_{n,o,c,q,k} y[n,o,q] W[o,c,k] x[n,c,i]    with i = s q + d k - p
    Each map leaves out one of the three factors, and is the derivative of T in this factor:
        convolution    y[n,o,q] = sum_{c,k} W[o,c,k] x[n,c,i]      dT/dy, for chosen Q
        transposed     x[n,c,i] = sum_{o,q,k} y[n,o,q] W[o,c,k]    dT/dx, for chosen X; over q, k with s q + d k - p = i
        correlation    W[o,c,k] = sum_{n,q} y[n,o,q] x[n,c,i]      dT/dW, for chosen K
    T is linear in each factor.  So the gradient of one map, with g arriving, is T with g in the place of its
    result, and its derivatives in the two others: the other two maps.  The family is closed: derivatives of
    every order are these three maps again.
    Groups: c runs over the channels of o's group only, and x[n,c] is x[n,u,c] for o in group u.
    Complex numbers: each map is analytic, so torch's gradient has the complex conjugate, written *, of the
    other factor.

Shape legend
    N   batch            C   channels of x        O   channels of y        G   groups
    X, Q, K   the sizes of all axes of x, y and W
"""

from typing import Any

from torch import Tensor

from manualprop.functions._execution import _convolution as run
from manualprop.functions._execution import _correlation as execution
from manualprop.functions._execution import recorded
from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule

__all__ = ["Convolution", "Correlation", "TransposedConvolution"]

Sizes = tuple[int, ...]


class Convolution(Rule):
    r"""$y_{noq} = \sum_{ck} W_{ock} \, x_{nci} + b_o$ with $i = s q + d k - p$

    Derivation, with g = dL/dy
        dL/dx[n,c,i] = sum_{o,q,k} g[n,o,q] W[o,c,k]               over s q + d k - p = i
                                                                   so dx = transposed(g, W*)
        dL/dW[o,c,k] = sum_{n,q} g[n,o,q] x[n,c,i]                 so dW = correlation(g, x*)
        dL/db[o]     = sum_{n,q} g[n,o,q]
        dy = convolution(dx, W) + convolution(x, dW) + db          forward mode: product rule
    Options
        Q: None takes all positions at which the kernel lies within the padded x.  Larger sizes read the
        zeros behind it: so padding="same" with an even kernel keeps no padded copy of x.
    Second order
        dx and dW are rules of this family.
    Shape
        x (N, C, X), W (O, C / G, K), b (O,) or None -> y (N, O, Q)
    Memory
        x if W needs a gradient, W if x does.
    Accuracy
        Sums over K C / G terms for y, K O / G for dx, N Q for dW.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, s: Sizes, p: Sizes, d: Sizes, G: int, Q: Sizes | None
    ) -> Tensor:
        return run.convolution(x, W, b, s, p, d, G, Q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, _, *ctx.options, _ = inputs
        ctx.X, ctx.K, ctx.Q = x.shape[2:], W.shape[2:], output.shape[2:]
        ctx.shape = output.shape
        save(ctx, (x, ctx.needs_input_grad[1]), (W, ctx.needs_input_grad[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        needs_x, needs_W, needs_b, *_ = ctx.needs_input_grad
        dx = transposed(g, W.conj(), None, *ctx.options, ctx.X) if needs_x else None
        dW = correlation(g, x.conj(), *ctx.options, ctx.K) if needs_W else None
        db = bias_gradient(g) if needs_b else None
        return dx, dW, db, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None, *options: None) -> Tensor:
        x, W = ctx.saved_tensors
        return sum_of(
            None if dx is None else Convolution.apply(dx, W, None, *ctx.options, ctx.Q),
            None if dW is None else Convolution.apply(x, dW, None, *ctx.options, ctx.Q),
            None if db is None else bias_tangent(db, ctx.shape),
        )


class TransposedConvolution(Rule):
    r"""$x_{nci} = \sum_{oqk} y_{noq} \, W_{ock} + b_c$ over all $q, k$ with $s q + d k - p = i$

    The input is called y and the output x: the letters of the family.

    Derivation, with g = dL/dx
        dL/dy[n,o,q] = sum_{c,k} W[o,c,k] g[n,c,i]                 so dy = convolution(g, W*)
        dL/dW[o,c,k] = sum_{n,q} y[n,o,q] g[n,c,i]                 so dW = correlation(y*, g)
        dL/db[c]     = sum_{n,i} g[n,c,i]
        dx = transposed(dy, W) + transposed(y, dW) + db            forward mode: product rule
    Second order
        dy and dW are rules of this family.
    Shape
        y (N, O, Q), W (O, C / G, K), b (C,) or None -> x (N, C, X); X is chosen
    Memory
        y if W needs a gradient, W if y does.
    Accuracy
        Sums over at most K O / G terms for x, K C / G for dy, N Q for dW.
    """

    @staticmethod
    def forward(
        y: Tensor, W: Tensor, b: Tensor | None, s: Sizes, p: Sizes, d: Sizes, G: int, X: Sizes
    ) -> Tensor:
        return run.transposed_convolution(y, W, b, s, p, d, G, X)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, W, _, *ctx.options, _ = inputs
        ctx.X, ctx.K, ctx.Q = output.shape[2:], W.shape[2:], y.shape[2:]
        ctx.shape = output.shape
        save(ctx, (y, ctx.needs_input_grad[1]), (W, ctx.needs_input_grad[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, W = ctx.saved_tensors
        needs_y, needs_W, needs_b, *_ = ctx.needs_input_grad
        dy = convolution(g, W.conj(), None, *ctx.options, ctx.Q) if needs_y else None
        dW = correlation(y.conj(), g, *ctx.options, ctx.K) if needs_W else None
        db = bias_gradient(g) if needs_b else None
        return dy, dW, db, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor | None, dW: Tensor | None, db: Tensor | None, *options: None) -> Tensor:
        y, W = ctx.saved_tensors
        return sum_of(
            None if dy is None else TransposedConvolution.apply(dy, W, None, *ctx.options, ctx.X),
            None if dW is None else TransposedConvolution.apply(y, dW, None, *ctx.options, ctx.X),
            None if db is None else bias_tangent(db, ctx.shape),
        )


class Correlation(Rule):
    r"""$W_{ock} = \sum_{nq} y_{noq} \, x_{nci}$ with $i = s q + d k - p$

    The weight gradient of both convolutions.

    Derivation, with g = dL/dW
        dL/dy[n,o,q] = sum_{c,k} g[o,c,k] x[n,c,i]                 so dy = convolution(x*, g)
        dL/dx[n,c,i] = sum_{o,q,k} y[n,o,q] g[o,c,k]               over s q + d k - p = i
                                                                   so dx = transposed(y*, g)
        dW = correlation(dy, x) + correlation(y, dx)               forward mode: product rule
    Second order
        dy and dx are rules of this family.
    Shape
        y (N, O, Q), x (N, C, X) -> W (O, C / G, K); K is chosen
    Memory
        x if y needs a gradient, y if x does.
    Accuracy
        Sums over N Q terms; in half precision summed in float32.
    """

    @staticmethod
    def forward(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
        return execution.correlation(Correlation.as_convolution, y, x, s, p, d, G, K)

    @staticmethod
    def as_convolution(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
        """The plain definition: a sum over q, so a convolution of x with the kernel y.

        i = s q + d k - p is symmetric in q and k: the position is now k with stride d, and the kernel's is q with
        dilation s.  The example n takes the part of the channel, and c that of the example.
        """
        N, X, C = x.shape[0], x.shape[2:], x.shape[1] // G
        if x.numel() == 0 or y.numel() == 0:
            return y.new_zeros(y.shape[1], C, *K)  # a sum without terms
        x = x.reshape(N, G, C, *X).movedim(2, 0).transpose(1, 2).reshape(C, G * N, *X)
        y = y.transpose(0, 1)  # (O, N, Q)
        W = run.convolution(x, y, None, d, p, s, G, K)  # (C, G N, X), (O, N, Q) -> (C, O, K)
        return W.transpose(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, x, *ctx.options, ctx.K = inputs
        ctx.X, ctx.Q = x.shape[2:], y.shape[2:]
        save(ctx, (y, ctx.needs_input_grad[1]), (x, ctx.needs_input_grad[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, x = ctx.saved_tensors
        needs_y, needs_x, *_ = ctx.needs_input_grad
        dy = convolution(x.conj(), g, None, *ctx.options, ctx.Q) if needs_y else None
        dx = transposed(y.conj(), g, None, *ctx.options, ctx.X) if needs_x else None
        return dy, dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor | None, dx: Tensor | None, *options: None) -> Tensor:
        y, x = ctx.saved_tensors
        return sum_of(
            None if dy is None else Correlation.apply(dy, x, *ctx.options, ctx.K),
            None if dx is None else Correlation.apply(y, dx, *ctx.options, ctx.K),
        )


# The three maps inside of a backward: as rules where something may differentiate them again.
convolution = recorded(Convolution.apply, run.convolution)
transposed = recorded(TransposedConvolution.apply, run.input_gradient)
correlation = recorded(Correlation.apply, Correlation.forward)


def bias_gradient(g: Tensor) -> Tensor:
    """The sum over the batch and all positions."""
    return g.sum((0, *range(2, g.dim())))  # (N, O, Q) -> (O,)


def bias_tangent(db: Tensor, shape: Sizes) -> Tensor:
    """db at every example and position."""
    return db.view(-1, *[1] * (len(shape) - 2)).expand(shape).clone()  # (O,) -> (N, O, Q)


def sum_of(*terms: Tensor | None) -> Tensor:
    """The sum of those of the terms that there are."""
    first, *rest = (term for term in terms if term is not None)
    return sum(rest, first)
