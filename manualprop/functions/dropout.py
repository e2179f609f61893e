r"""Hand-derived rules of dropout: products with random numbers, which the derivative treats as constants.

Symbols
    x   input               k   1 where x is kept, else 0: drawn before the rule is applied
    y   output              p   probability that an element is dropped
    g   dL/dy, the gradient that arrives                  q = 1 - p
The numbers are drawn in :mod:`manualprop.functional`, where ``vmap`` can apply its ``randomness``.
"""

from typing import Any

import torch
from torch import Tensor

from manualprop.functions._execution import chosen, formula, indicator
from manualprop.functions._execution._bits import keep_bits, kept_bytes
from manualprop.functions._rule import Rule, flat

__all__ = ["AlphaDropout", "Dropout", "ReLUDropout"]


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
        k as bits, 1/8 byte per element; compiled 1 byte.  torch keeps k / q, 4 bytes in float32; compiled 1.
    Accuracy
        Exact except for the rounding of 1 / q.
    Reference
        Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    @staticmethod
    def forward(x: Tensor, k: Tensor, q: float) -> Tensor:
        return scaled(x, k, q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, k, ctx.q = inputs
        save_bits(ctx, k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return scaled(g, kept_bytes(ctx, bits), ctx.q), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (bits,) = ctx.saved_tensors
        return scaled(dx, kept_bytes(ctx, bits), ctx.q)


class ReLUDropout(Rule):
    r"""$y = k \max(x, 0) / q$ with $k = 1$ with probability $q$, else 0: ReLU, then dropout

    Derivation
        dy/dx = k 1[x > 0] / q                                     chain rule; k does not depend on x
              = 1[y /= 0] / q                                      since y = x / q > 0 where k = 1 and x > 0, else 0
        dL/dx = g 1[y /= 0] / q
        dy = dx 1[y /= 0] / q                                      forward mode
    Kinks
        dy/dx = 0 at x = 0, as in PyTorch.
    Second order
        dx is the product of g and a constant: autograd differentiates it as written.
    Shape
        k, x and y alike
    Memory
        y, which the next layer keeps anyway: 4 bytes per element in float32.  torch keeps max(x, 0) and k / q
        too: 12 bytes.
    Accuracy
        Exact except for the rounding of 1 / q: x / q is at least x, so no y is rounded to 0.  A dropped inf
        or NaN gives y = NaN, as in PyTorch, and its gradient passes.
    """

    @staticmethod
    def forward(x: Tensor, k: Tensor, q: float) -> Tensor:
        return scaled(torch.relu(x), k, q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.q = inputs[2]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return flat(relu_dropout_slope(g, y.detach(), ctx.q), y), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        dy: Tensor = relu_dropout_slope(dx, y, ctx.q)
        return dy


@formula("g (N), y (N) -> dx like g")
def relu_dropout_slope(g: Tensor, y: Tensor, q: float) -> Tensor:
    """g 1[y /= 0] / q"""
    return chosen(indicator(y != 0, y) / q, g)


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
        k as bits, 1/8 byte per element; 1 byte if compiled.  torch keeps a k, 4 bytes in float32.
    Accuracy
        Exact except for the rounding of a and of the offset.
    Reference
        Klambauer et al., 2017, https://arxiv.org/abs/1706.02515
    """

    @staticmethod
    def forward(x: Tensor, k: Tensor, a: float, p: float, s: float) -> Tensor:
        k = k.to(x.dtype)
        return x * (a * k) + ((k - 1) * (a * s) + a * s * p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, k, ctx.a, *_ = inputs
        save_bits(ctx, k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return scaled(g, kept_bytes(ctx, bits), 1 / ctx.a), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (bits,) = ctx.saved_tensors
        return scaled(dx, kept_bytes(ctx, bits), 1 / ctx.a)


def scaled(x: Tensor, k: Tensor, q: float) -> Tensor:
    """x k / q; ``k`` is made of bytes and may broadcast."""
    k = k if k.shape == x.shape else k.expand(x.shape)
    y: Tensor = dropped(x, k, q)
    return y


@formula("x (N), k (N) -> y like x", lift=False)  # k / q in the precision of x, as in torch
def dropped(x: Tensor, k: Tensor, q: float) -> Tensor:
    return x * (indicator(k, x) / q)


def save_bits(ctx: Any, k: Tensor) -> None:
    """Save ``k`` for backward and for forward mode, packed by :func:`keep_bits`."""
    bits = keep_bits(ctx, k)
    ctx.save_for_backward(bits)
    ctx.save_for_forward(bits)
