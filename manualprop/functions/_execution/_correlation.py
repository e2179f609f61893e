"""How the correlation of :mod:`manualprop.functions.convolution` runs, in its letters.

As a convolution (``Correlation.as_convolution``) it takes 1.5 to 15 times as long as it should: the kernel is as
large as the image.  Here are two faster forms, for any number of axes:

- with one channel of x in each group, a convolution again, of each pair of example and channel by itself;
- else a product of y with columns: for each kernel position the entries of x that it meets.  The columns are made
  for some examples, or a band of one, at a time, so that they stay in the cache, and multiplied by oneDNN, which is up to twice as fast
  as the BLAS library on some CPUs.

Half precision is computed in float32 and rounded once.  In compiled code the form is one operation of its own:
the examples would make the graph long.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manualprop._torch import product_of_rows
from manualprop.functions._execution._convolution import Sizes, convolution, framed, reach, untraced
from manualprop.functions._execution._formula import full

COLUMNS = 2**20  # about as many entries of the columns are made at a time
LARGE_RESULT = 2**17  # entries of W in a group from which the order of its product is the order of W
WIDE = 128  # rows of columns in a group from which several products by oneDNN are faster than one of the BLAS library


def correlation(
    plain: Callable[..., Tensor], y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes
) -> Tensor:
    """W by a fast form; by ``plain`` if something traces each step, or if there is nothing to sum."""
    if not untraced(y, x) or not (y.numel() and x.numel()):
        # In the strides of a weight: a scan over updates demands them, of axes of length 1 too.
        return plain(y, x, s, p, d, G, K).clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling():
        W: Tensor = torch.ops.manualprop.correlate.default(y, x, s, p, d, G, K)
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
    x = framed(x, p, reach(Q, K, s, d)).contiguous()
    entries = windows(x, s, d, Q, K)  # (C, K, N, Q)
    rows, place = x.shape[1] * math.prod(K), 1 + len(K)
    few, band = size_of_parts(N, rows * math.prod(Q)), size_of_parts(Q[0], rows * math.prod(Q[1:]))
    buffer = x.new_empty(rows * few * band * math.prod(Q[1:]))  # new memory takes longer than the product
    W = None
    for of_some, y_of_some in zip(entries.split(few, place), y.split(few), strict=True):
        for some, some_y in zip(of_some.split(band, place + 1), y_of_some.split(band, 2), strict=True):
            columns = buffer[: some.numel()].view(some.shape).copy_(some)
            # (G, O, n Q), (G, C K, n Q) -> (G, O, C K)
            part = products(some_y.transpose(0, 1).reshape(G, O // G, -1), columns.view(G, rows // G, -1))
            W = part if W is None else W.add_(part)
    assert W is not None
    return W.contiguous().view(O, x.shape[1] // G, *K)


def size_of_parts(length: int, entries: int) -> int:
    """The length of equal parts of an axis, each with about COLUMNS entries of columns."""
    return math.ceil(length / math.ceil(length / max(COLUMNS // entries, 1)))


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
    # oneDNN is faster with the columns, of which there are usually more, as the rows of its product.  But then the
    # result must be transposed, which takes longer for a large one.
    if y.shape[1] * columns.shape[1] < LARGE_RESULT:
        each = [product_of_rows(some, of_y).mT for some, of_y in zip(columns, y, strict=True)]
    else:
        each = [product_of_rows(of_y, some) for some, of_y in zip(columns, y, strict=True)]
    return each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each)


# ----- in compiled code -----


def _shape(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    return y.new_empty(y.shape[1], x.shape[1] // G, *K)


# Defined at import: a compiled program that is read from a file needs it before anything is traced.
_LIBRARY = torch.library.Library("manualprop", "FRAGMENT")  # its definitions last as long as this object
_LIBRARY.define(
    "correlate(Tensor y, Tensor x, SymInt[] s, SymInt[] p, SymInt[] d, SymInt G, SymInt[] K) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
_LIBRARY.impl("correlate", correlate, "CompositeExplicitAutograd")
torch.library.register_fake("manualprop::correlate", _shape, lib=_LIBRARY)
