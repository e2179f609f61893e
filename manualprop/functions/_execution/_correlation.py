"""How the correlation of :mod:`manualprop.functions.convolution` runs, in its letters.

As a convolution (``Correlation.as_convolution``) it takes 1.5 to 15 times as long as it should: the kernel is as
large as the image.  Here are two faster forms, for any number of axes:

- with one channel of x in each group, a convolution again, of each pair of example and channel by itself;
- else a product of y with columns: for each kernel position the entries of x that it meets.  The columns are made
  for some examples at a time, so that they stay in the cache, and multiplied by oneDNN, which is up to twice as fast
  as the BLAS library on some CPUs.

Half precision is computed in float32 and rounded once.  In compiled code the form is one operation of its own:
the examples would make the graph long.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import product_of_rows
from manualprop.functions._execution._convolution import Sizes, convolution, framed, reach, untraced
from manualprop.functions._execution._formula import full

COLUMNS = 2**20  # entries of the columns that are made at a time
WIDE = 128  # rows of columns in a group from which several products by oneDNN are faster than one of the BLAS library


def fast_correlation(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor | None:
    """W by a fast form; None if something traces each step, or if there is no fast form."""
    if not untraced(y, x) or not (y.numel() and x.numel()):
        return None
    if torch.compiler.is_compiling():
        W: Tensor = _operation()(y, x, s, p, d, G, K)
        return W
    return correlate(y, x, s, p, d, G, K)


def correlate(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """W by the form that fits."""
    form = by_channels if x.shape[1] == G else by_columns
    return form(full(y).resolve_conj(), full(x).resolve_conj(), s, p, d, G, K).to(y.dtype)


def by_channels(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """With one channel of x in each group: W[o,k] = sum_n (sum_q y[n,o,q] x[n,i]), each (n, o) by itself."""
    N, O, *Q = y.shape
    if O > G:
        x = x.repeat_interleave(O // G, 1)  # (N, G, X) -> (N, O, X)
    x, y = x.reshape(1, N * O, *x.shape[2:]), y.reshape(N * O, 1, *Q)
    each = convolution(x, y, None, d, p, s, N * O, K)  # (1, N O, X), (N O, 1, Q) -> (1, N O, K)
    return each.reshape(N, O, 1, *K).sum(0)


def by_columns(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """W[o,ck] = sum_{n,q} y[o,nq] columns[ck,nq], with columns[ck,nq] = x[n,c,i]."""
    (N, O), Q = y.shape[:2], y.shape[2:]
    C = x.shape[1] // G
    x = framed(x, p, reach(Q, K, s, d)).contiguous()
    rows, P = x.shape[1] * math.prod(K), math.prod(Q)
    # Not fewer columns than the result has: each part of it is added up.
    times = math.ceil(N / max(COLUMNS // (rows * P), O // (G * P), 1))
    few = math.ceil(N / times)
    buffer = x.new_empty(rows * few * P)  # one for all times: new memory takes longer than the product
    W = None
    for some_x, some_y in zip(x.split(few), y.split(few), strict=True):
        columns = buffer[: rows * len(some_x) * P].view(x.shape[1], *K, len(some_x), *Q)
        columns.copy_(windows(some_x, s, d, Q, K))
        # (G, O, n Q), (G, C K, n Q) -> (G, O, C K)
        part = products(some_y.transpose(0, 1).reshape(G, O // G, -1), columns.view(G, rows // G, -1))
        W = part if W is None else W.add_(part)
    assert W is not None
    return W.view(O, C, *K)


def windows(x: Tensor, s: Sizes, d: Sizes, Q: Sizes, K: Sizes) -> Tensor:
    """The entries s q + d k of x, as a view (C, K, N, Q)."""
    of_example, of_channel, *of_position = x.stride()
    along_k = [step * a for step, a in zip(of_position, d, strict=True)]
    along_q = [step * a for step, a in zip(of_position, s, strict=True)]
    shape, strides = (x.shape[1], *K, x.shape[0], *Q), (of_channel, *along_k, of_example, *along_q)
    return x.as_strided(shape, strides, x.storage_offset())


def products(y: Tensor, columns: Tensor) -> Tensor:
    """y columns^T for each group: (G, O, P), (G, C K, P) -> (G, O, C K)."""
    float32 = y.is_cpu and y.dtype == torch.float32
    if product_of_rows is None or not float32 or (len(y) > 1 and columns.shape[1] < WIDE):
        return y.bmm(columns.mT)
    if len(y) == 1:
        return product_of_rows(y[0], columns[0]).unsqueeze(0)  # type: ignore[no-any-return]  # without a copy
    return torch.stack([product_of_rows(*pair) for pair in zip(y, columns, strict=True)])


# ----- in compiled code -----


@functools.cache
def _library() -> Any:
    library = torch.library.Library("manualprop", "FRAGMENT")
    library.define(
        "correlate(Tensor y, Tensor x, SymInt[] s, SymInt[] p, SymInt[] d, SymInt G, SymInt[] K) -> Tensor",
        tags=(torch.Tag.flexible_layout,),
    )
    library.impl("correlate", correlate, "CompositeExplicitAutograd")
    torch.library.register_fake("manualprop::correlate", _shape, lib=library)
    return library  # its definitions last as long as this object


def _operation() -> Any:
    _library()
    return torch.ops.manualprop.correlate.default


def _shape(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    return y.new_empty(y.shape[1], x.shape[1] // G, *K)
