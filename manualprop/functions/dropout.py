r"""Hand-derived rules of dropout: products with random numbers, which are constants to the derivative.

Symbols
    x   input               k   1 where x is kept, else 0: drawn before the rule is applied
    y   output              p   probability that an element is dropped
    g   dL/dy, the gradient that arrives                  q = 1 - p
The numbers are drawn in :mod:`manualprop.functional`, where ``vmap`` sees it and heeds its ``randomness``.
"""

from typing import Any

from torch import Tensor

from manualprop.functions._rule import Rule


class Dropout(Rule):
    r"""$y = k x / q$ with $k = 1$ with probability $q$, else 0

    Derivation
        E[k / q] = q / q = 1                                       so the mean of y is x
        dL/dx = g k / q                                            k does not depend on x
        dy = dx k / q                                              forward mode
    Second order
        dx is the product of g and a constant: autograd differentiates it as written.
    Shape
        k is like x; where whole channels are dropped it is (N, C, 1, ...) and broadcasts.
    Memory
        k as bytes, 1 per element: torch keeps k / q, 4 in float32.
    Accuracy
        Exact but for the rounding of 1 / q.
    Reference
        Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    @staticmethod
    def forward(x: Tensor, k: Tensor, q: float) -> Tensor:
        return x * k.to(x.dtype).div_(q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, k, ctx.q = inputs
        ctx.save_for_backward(k)
        ctx.save_for_forward(k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (k,) = ctx.saved_tensors
        return g * k.to(g.dtype).div_(ctx.q), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (k,) = ctx.saved_tensors
        dy: Tensor = dx * k.to(dx.dtype).div_(ctx.q)
        return dy


class AlphaDropout(Rule):
    r"""$y = a x$ where $k = 1$, else $-a s$, plus $a p s$; SELU saturates at $-s$, and $a = (q (1 + s^2 p))^{-1/2}$

    Derivation
        y = a k x + a s (k - 1 + p)                                k = 1 with probability q, else 0
        E[y] = a q E[x] + a s (q - 1 + p) = a q E[x]               so a mean of 0 stays 0, since q = 1 - p
        Var[y] = a^2 (q + s^2 p q)                                 for E[x] = 0 and Var[x] = 1
               = 1                                                 so a variance of 1 stays 1
        dL/dx = a k g                                              k does not depend on x
        dy = a k dx                                                forward mode
    Second order
        dx is the product of g and a constant: autograd differentiates it as written.
    Shape
        k is like x; where whole channels are dropped it is (N, C, 1, ...) and broadcasts.
    Memory
        k as bytes, 1 per element: torch keeps a k, 4 in float32.
    Accuracy
        Exact but for the rounding of a and of the offset.
    Reference
        Klambauer et al., 2017, https://arxiv.org/abs/1706.02515
    """

    @staticmethod
    def forward(x: Tensor, k: Tensor, a: float, p: float, s: float) -> Tensor:
        k = k.to(x.dtype)
        offset = (k - 1).mul_(a * s).add_(a * s * p)
        return (x * k.mul_(a)).add_(offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, k, ctx.a, *_ = inputs
        ctx.save_for_backward(k)
        ctx.save_for_forward(k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (k,) = ctx.saved_tensors
        return g * k.to(g.dtype).mul_(ctx.a), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (k,) = ctx.saved_tensors
        dy: Tensor = dx * k.to(dx.dtype).mul_(ctx.a)
        return dy
