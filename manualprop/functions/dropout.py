r"""Hand-derived rules of dropout: products with random numbers, which are constants to the derivative.

Symbols
    x   input               n   random factor, drawn before the rule is applied
    y   output              c   random offset
    g   dL/dy, the gradient that arrives
    p   probability that an element is dropped; q = 1 - p
The numbers are drawn in :mod:`manualprop.functional`, where ``vmap`` sees them drawn and heeds its ``randomness``.
"""

from typing import Any

from torch import Tensor

from manualprop.functions._rule import Rule


class RandomlyScaled(Rule):
    r"""$y = n x + c$ with random constants $n$ and $c$: the base of the rules that differ in these alone

    Derivation
        dL/dx = n g                                                n and c do not depend on x
        dy = n dx                                                  forward mode
    Second order
        dx is the product of n and g: autograd differentiates it as written.  In x it is constant.
    Memory
        n.
    """

    @staticmethod
    def forward(x: Tensor, n: Tensor, *c: Tensor) -> Tensor:
        y = x * n
        return y.add_(*c) if c else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        n = inputs[1]
        ctx.arguments = len(inputs)
        ctx.save_for_backward(n)
        ctx.save_for_forward(n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (n,) = ctx.saved_tensors
        return g * n, *(None for _ in range(1, ctx.arguments))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (n,) = ctx.saved_tensors
        dy: Tensor = dx * n
        return dy


class Dropout(RandomlyScaled):
    r"""$y = n x$ with $n = 1/q$ with probability $q$, else 0

    Derivation
        dL/dx = n g                                                :class:`RandomlyScaled`
        E[n] = q / q = 1                                           so the mean of y is x
    Second order
        Of :class:`RandomlyScaled`.
    Shape
        n is like x; where whole channels are dropped it is (N, C, 1, ...) and broadcasts.
    Memory
        n, as torch: 4 bytes per element in float32; one number for each channel where these are dropped.
    Accuracy
        Exact but for the rounding of 1/q.
    Reference
        Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """


class AlphaDropout(RandomlyScaled):
    r"""$y = a x$ with probability $q$, else $-a \alpha'$, plus $a p \alpha'$, where $\alpha' = \lambda \alpha$ of SELU

    Derivation, with k = 1 where x is kept, else 0
        y = a (k x - (1 - k) alpha' + p alpha') = n x + c          dropped: the value SELU saturates at
        n = a k,  c = a alpha' (k - 1 + p)
        E[y] = a q E[x] + a alpha' (q - 1 + p) = a q E[x]          so a mean of 0 stays 0, since q = 1 - p
        Var[y] = a^2 (q + alpha'^2 p q)                            for E[x] = 0, Var[x] = 1
        a = (q (1 + alpha'^2 p))^(-1/2)                            so a variance of 1 stays 1
        dL/dx = n g                                                :class:`RandomlyScaled`
    Second order
        Of :class:`RandomlyScaled`.
    Shape
        n and c are like x; where whole channels are dropped they are (N, C, 1, ...) and broadcast.
    Memory
        n, as torch: 4 bytes per element in float32; one number for each channel where these are dropped.
    Accuracy
        Exact but for the rounding of a and c.
    Reference
        Klambauer et al., 2017, https://arxiv.org/abs/1706.02515
    """
