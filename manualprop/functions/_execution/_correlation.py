"""How the correlation of :mod:`manualprop.functions.convolution` runs, in its letters.

As a convolution (``Correlation.as_convolution``) it may take 15 times as long as it should: the kernel is as large as
the image.  Here are forms for each kind of layer, for any number of axes:

- with one channel of x in each group, a convolution again, of each pair of example and channel by itself;
- of small images, the plain definition;
- where y is as large as x, a product of copies of y, one for each kernel position of the first axis, with copies of x,
  one for each of the others;
- else copies of x, one for each kernel position of the axes behind the first, and one convolution along the first;
- else a product of y with columns: for each kernel position the entries of x that it meets.

Copies and columns are made for some examples, or a band of one, at a time, so that they stay in the cache.  The
products are oneDNN's, which is up to twice as fast as the BLAS library on some CPUs.

Half precision is computed in float32 and rounded once.  In compiled code the form is one operation of its own:
the examples would make the graph long.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import product_of_rows
from manualprop.functions._execution._convolution import Sizes, convolution, framed, reach, untraced
from manualprop.functions._execution._formula import full

COLUMNS = 2**20  # about as many entries of the columns are made at a time
LARGE_RESULT = 2**17  # entries of W in a group from which the order of its product is the order of W
WIDE = 128  # rows of columns in a group from which several products by oneDNN are faster than one of the BLAS library
Index = tuple[Any, ...]
Form = Callable[[Tensor, Tensor, Sizes, Sizes, Sizes, int, Sizes], Tensor]


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
    y32, x32 = full(y).resolve_conj(), full(x).resolve_conj()
    return form_for(y32, x32, s, G, K)(y32, x32, s, p, d, G, K).to(y.dtype)


def form_for(y: Tensor, x: Tensor, s: Sizes, G: int, K: Sizes) -> Form:
    """The numbers are times over those of ``by_columns``, for kernels of 3 x 3 and float32."""
    C, O, Q = x.shape[1] // G, y.shape[1], y.shape[2:]
    terms = len(y) * Q.numel()
    # The first three leave W in another order.  If it is large, putting it right takes longer than the sums.
    if G == 1 and y.is_cpu and y.dtype == torch.float32 and C * O <= 64 * terms:
        if Q[-1] <= 8 and Q.numel() <= 64 and C * Q.numel() <= 2**12:
            return by_examples  # 4 x 4: 0.3-0.6, 8 x 8: 0.4-0.9
        if max(s) == 1 and Q == x.shape[2:] and shifts_pay(C, O, Q.numel(), terms, K):
            return by_shifts  # 16 x 16: 0.8-0.95, 32 x 32: 0.8-0.95; few channels of y: 0.4-0.7
        if len(K) > 1 and K[0] > s[0] and 8 <= C <= 64 // s[0] ** 2 and O < 4 * C:
            return by_rows  # 16 x 16: 0.8-1, 28 x 28: 0.9-1.1; three axes: 0.5-0.9
    return by_channels if C == 1 else by_columns


def shifts_pay(C: int, O: int, Q: int, terms: int, K: Sizes) -> bool:
    """Whether ``by_shifts`` makes a quarter fewer copies than ``by_columns``, and neither few numbers nor too many."""
    copies, columns = O * K[0] + C * math.prod(K[1:]), O + C * math.prod(K)
    return 4 * copies <= 3 * columns and 2**16 < C * terms and C * O <= 16 * terms and copies * Q <= 2**23


def by_channels(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """With one channel of x in each group: W[o,k] = sum_n (sum_q y[n,o,q] x[n,i]), each (n, o) by itself."""
    N, O, *Q = y.shape
    if O > G:
        x = x.repeat_interleave(O // G, 1)  # (N, G, X) -> (N, O, X)
    x, y = x.reshape(1, N * O, *x.shape[2:]), y.reshape(N * O, 1, *Q)
    each = convolution(x, y, None, d, p, s, N * O, K)  # (1, N O, X), (N O, 1, Q) -> (1, N O, K)
    return each.reshape(N, O, 1, *K).sum(0)


def by_examples(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """The plain definition, without groups: the examples are the channels of a convolution with the kernel y."""
    if x.shape[1] >= 32:
        y, x = examples_last(y), examples_last(x)  # 0.7 of the time; 1.1 with 16 channels
    W = convolution(x.transpose(0, 1), y.transpose(0, 1), None, d, p, s, 1, K)
    return W.transpose(0, 1).contiguous()  # (C, N, X), (O, N, Q) -> (C, O, K)


def examples_last(t: Tensor) -> Tensor:
    """t in another order of memory."""
    return t.flatten(1).t().contiguous().t().view(t.shape)


def by_rows(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """W[o,c,k] = sum_{q,r} y[o,r,q] copies[k',r,i,c] without groups; q, k and i along the first axis.

    r is the pair of the example and the positions q' along the other axes, and k' their kernel position:
    copies[k',(n,q'),i,c] = x[n,c,i,i'].  So it is a convolution along i with r for its channels, and c beside i.
    """
    O, C, others = y.shape[1], x.shape[1], y.shape[3:]
    buffer = W = None
    order = (*range(2, 1 + len(K)), 1, 0, *range(1 + len(K), 2 + 2 * len(K)))
    # Several large examples together take 1.1 of the time.
    for some_y, some_x in bands(y, x, C * math.prod(K[1:]), s, p, d, K, alone=10**5):
        (n, _, q), (i,) = some_y.shape[:3], reach(some_y.shape[2:3], K[:1], s[:1], d[:1])
        # (C, X, K', n, 1, Q') -> (K', X, C, n, 1, Q'), with all i of the first axis in the place of its k
        some = windows(some_x, (1, *s[1:]), (1, *d[1:]), (1, *others), (i, *K[1:])).permute(order)
        copies = copied_into(buffer, some)
        buffer = copies if buffer is None else buffer
        copies = copies.view(-1, i, C, n * others.numel())
        kernel = some_y.movedim(0, 2).reshape(O, q, 1, -1)
        # (K', r, X, C), (O, r, Q, 1) -> (K', O, K, C), the channels last in memory
        part = torch.conv2d(copies.movedim(-1, 1), kernel.movedim(-1, 1), None, (d[0], 1), 0, (s[0], 1))
        W = part if W is None else W.add_(part)
    assert W is not None
    return W.permute(1, 3, 2, 0).contiguous().view(O, C, *K)


def by_shifts(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """W[o,k,c,k'] = sum_r of_y[o,k,r] of_x[c,k',r] without groups, at stride 1 and for a y as large as x.

    k is the kernel position along the first axis, k' that along the others.  r is the example n and the position: i along
    the first axis, q along the others.  Where y and x have positions, and 0 elsewhere,
        of_y[o,k,(n,i,q)] = y[n,o,i + p - d k,q],  of_x[c,k',(n,i,q)] = x[n,c,i,q + d k' - p'].
    So K + K' copies are made, not K K'.
    """
    O, C, X = y.shape[1], x.shape[1], x.shape[2:]
    first, *others = [[d * k - p for k in range(K)] for K, p, d in zip(K, p, d, strict=True)]
    to_y = [overlap((-a, *[0] * len(others)), X) for a in first]
    to_x = [overlap((0, *a), X) for a in itertools.product(*others)]
    few = size_of_parts(len(y), (O * len(to_y) + C * len(to_x)) * X.numel())
    of_y = of_x = W = None
    for some_y, some_x in zip(y.split(few), x.split(few), strict=True):
        of_y, of_x = shifted(some_y, to_y, of_y), shifted(some_x, to_x, of_x)
        # (1, O K, r), (1, C K', r) -> (1, O K, C K')
        part = products(of_y.view(1, O * len(to_y), -1), of_x.view(1, C * len(to_x), -1))
        W = part if W is None else W.add_(part)
    assert W is not None
    return W.view(O, K[0], C, *K[1:]).transpose(1, 2).contiguous()


def overlap(a: Sizes, X: Sizes) -> tuple[Index, Index]:
    """The positions i at which i + a is a position too, and these i + a."""
    here = [slice(max(-step, 0), max(n - step, 0)) for step, n in zip(a, X, strict=True)]
    there = [slice(max(step, 0), max(n + step, 0)) for step, n in zip(a, X, strict=True)]
    return (..., *here), (..., *there)


def shifted(t: Tensor, overlaps: Sequence[tuple[Index, Index]], copies: Tensor | None) -> Tensor:
    """t (n, C, X) shifted in each way (C, A, n, X), with zeros around it; in ``copies``, which have the zeros, if they fit."""
    if copies is None or copies.shape[2] != len(t):
        copies = t.new_zeros(t.shape[1], len(overlaps), *t.shape[:1], *t.shape[2:])
    t = t.contiguous().transpose(0, 1)
    for copy, (here, there) in zip(copies.unbind(1), overlaps, strict=True):
        copy[here] = t[there]
    return copies


def by_columns(y: Tensor, x: Tensor, s: Sizes, p: Sizes, d: Sizes, G: int, K: Sizes) -> Tensor:
    """W[o,ck] = sum_{n,q} y[o,nq] columns[ck,nq], with columns[ck,nq] = x[n,c,i]."""
    O, rows = y.shape[1], x.shape[1] * math.prod(K)
    buffer = W = None
    for some_y, some_x in bands(y, x, rows, s, p, d, K):
        some = windows(some_x, s, d, some_y.shape[2:], K)  # (C, K, n, Q)
        columns = copied_into(buffer, some)
        buffer = columns if buffer is None else buffer
        # (G, O, n Q), (G, C K, n Q) -> (G, O, C K)
        part = products(some_y.transpose(0, 1).reshape(G, O // G, -1), columns.view(G, rows // G, -1))
        W = part if W is None else W.add_(part)
    assert W is not None
    return W.contiguous().view(O, x.shape[1] // G, *K)


def bands(
    y: Tensor, x: Tensor, rows: int, s: Sizes, p: Sizes, d: Sizes, K: Sizes, alone: int = COLUMNS
) -> Iterator[tuple[Tensor, Tensor]]:
    """y and the padded x for some examples, or a band of the first axis of one.

    There are ``rows`` entries for each position of y.  An example of more than ``alone`` entries comes by itself.
    """
    N, Q = len(y), y.shape[2:]
    few = 1 if rows * Q.numel() > alone else size_of_parts(N, rows * Q.numel())
    band = size_of_parts(Q[0], rows * Q[1:].numel())
    for some_y, some_x in zip(y.split(few), x.split(few), strict=True):
        some_x = framed(some_x, p, reach(Q, K, s, d)).contiguous()
        for q in range(0, Q[0], band):
            yield some_y[:, :, q : q + band], some_x[:, :, s[0] * q :]


def size_of_parts(length: int, entries: int) -> int:
    """The length of equal parts of an axis, each with about COLUMNS entries of columns."""
    return math.ceil(length / math.ceil(length / max(COLUMNS // entries, 1)))


def copied_into(buffer: Tensor | None, some: Tensor) -> Tensor:
    """A copy without gaps, in the memory of the first one if it fits: new memory takes longer than the product."""
    if buffer is None or buffer.numel() < some.numel():
        return some.clone(memory_format=torch.contiguous_format)
    return buffer.view(-1)[: some.numel()].view(some.shape).copy_(some)


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
