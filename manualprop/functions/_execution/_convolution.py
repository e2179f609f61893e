"""How the three maps of :mod:`manualprop.functions.convolution` run, in its letters.

Convolution and transposed convolution are torch's own forward kernels, for any sizes.  ``_correlation.py`` has the
forms of the correlation.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._torch import transforms_active
from manualprop.functions._execution._axes import memory_format
from manualprop.functions._execution._formula import watched

Sizes = Sequence[int]

CONVOLUTIONS = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
TRANSPOSED = {3: torch.conv_transpose1d, 4: torch.conv_transpose2d, 5: torch.conv_transpose3d}


def reach(Q: Sizes, K: Sizes, s: Sizes, d: Sizes) -> list[int]:
    """For each axis the length that Q positions of a kernel cover."""
    return [s * (q - 1) + d * (k - 1) + 1 for q, k, s, d in zip(Q, K, s, d, strict=True)]


def framed(x: Tensor, before: Sizes, lengths: Sizes) -> Tensor:
    """x with ``before`` zeros in front of each axis of positions, and zeros behind, or cut, to ``lengths``."""
    ends = [(a, length - a - n) for a, length, n in zip(before, lengths, x.shape[2:], strict=True)]
    pads = [number for end in reversed(ends) for number in end]  # torch's pad starts at the last axis
    if any(a > length for a, length in zip(before, lengths, strict=True)):  # nothing of x is left
        return x.new_zeros(*x.shape[:2], *lengths)
    return F.pad(x, pads) if any(pads) else x


def convolution(
    x: Tensor, W: Tensor, b: Tensor | None, s: Sizes, p: Sizes, d: Sizes, G: int, Q: Sizes | None
) -> Tensor:
    """y at Q positions, or at all at which the kernel lies within the padded x."""
    if Q is not None:
        K = W.shape[2:]
        spans = reach([1] * len(K), K, s, d)
        sizes = zip(x.shape[2:], p, spans, s, strict=True)
        found = [(n + 2 * before - span) // step + 1 for n, before, span, step in sizes]
        if found != list(Q) or 0 in x.shape[2:]:  # torch's kernels refuse an x without positions
            x, p = framed(x, p, reach(Q, K, s, d)), [0] * len(K)
    return CONVOLUTIONS[x.dim()](x, with_usual_strides(W, G), b, s, p, d, G)


def with_usual_strides(W: Tensor, G: int) -> Tensor:
    """W; oneDNN (torch 2.13) misreads the groups if an axis of length 1 has another stride than in channels-last."""
    if G == 1 or 1 not in W.shape[2:] or W.is_contiguous():
        return W
    C, *K = W.shape[1:]
    steps = [C * math.prod(K[i + 1 :]) for i in range(len(K))]
    return W if list(W.stride()[2:]) == steps else W.clone(memory_format=torch.contiguous_format)


def transposed_convolution(
    y: Tensor, W: Tensor, b: Tensor | None, s: Sizes, p: Sizes, d: Sizes, G: int, X: Sizes
) -> Tensor:
    """x at X positions."""
    covered = reach(y.shape[2:], W.shape[2:], s, d)
    behind = [max(x - length + 2 * a, 0) for x, length, a in zip(X, covered, p, strict=True)]
    x = TRANSPOSED[y.dim()](y, with_usual_strides(W, G), b, s, p, behind, G, d)
    if x.shape[2:] == tuple(X):
        return x
    ends: tuple[Any, ...] = (..., *[slice(n) for n in X])
    return x[ends].clone()  # not a view: a rule that returns one has no forward mode


def input_gradient(y: Tensor, W: Tensor, b: None, s: Sizes, p: Sizes, d: Sizes, G: int, X: Sizes) -> Tensor:
    """:func:`transposed_convolution`; of small kernels as a convolution, where this is faster.

    With one position and no padding, i = s q: the results at stride 1, and zeros between them.
    At stride 1, q = i + p - d k.  With the kernel reversed, k' = K - 1 - k, this is i + d k' - p', the position of a
    convolution with p' = d (K - 1) - p.
    """
    K = W.shape[2:]
    if K.numel() == 1 and max(s) > 1 and not any(p) and not torch.compiler.is_compiling() and untraced(y, W):
        # 64 to 128 channels at 28 x 28: 0.6 of the time of a transposed convolution.
        return between_zeros(input_gradient(y, W, None, [1] * len(K), p, d, G, y.shape[2:]), s, X)
    reversed_p = [d * (k - 1) - p for k, p, d in zip(K, p, d, strict=True)]
    if any(step != 1 for step in s) or min(reversed_p) < 0 or not untraced(y, W):
        return transposed_convolution(y, W, b, s, p, d, G, X)
    one_position, one_channel = G == 1 and K.numel() == 1, W.shape[1] == 1
    if torch.compiler.is_compiling():
        # inductor's convolutions are channels-last: for one position the copies take longer than the product.
        if one_position and y.is_contiguous():
            x: Tensor = W.flatten(1).mT.expand(len(y), -1, -1).bmm(y.flatten(2)).unflatten(2, X)
            return x  # (C, O) (N, O, Q) -> (N, C, X)
    elif one_position or one_channel:
        W = W.unflatten(0, (G, -1)).transpose(1, 2).flatten(0, 1).flip(list(range(2, W.dim())))
        return convolution(y, W.contiguous(), None, s, reversed_p, d, G, X)
    return transposed_convolution(y, W, b, s, p, d, G, X)


def between_zeros(y: Tensor, s: Sizes, X: Sizes) -> Tensor:
    """x[s q] = y[q], for the q with s q < X, and 0 elsewhere; in the layout of y."""
    shape = (*y.shape[:2], *X)
    x = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format(y)).zero_()
    of_x: tuple[Any, ...] = (..., *[slice(0, step * q, step) for q, step in zip(y.shape[2:], s, strict=True)])
    of_y: tuple[Any, ...] = (..., *[slice(-(-n // step)) for n, step in zip(X, s, strict=True)])
    x[of_x] = y[of_y]
    return x


def untraced(*tensors: Tensor) -> bool:
    """Whether nothing but the compiler traces each step."""
    return not (transforms_active() if torch.compiler.is_compiling() else watched(tensors))
