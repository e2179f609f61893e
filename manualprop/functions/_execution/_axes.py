"""How a matrix acts on one axis of a tensor: M^T along an axis, for M (o, n) stated by its rows.

A row is {j: M_ij} without zeros, so nothing multiplies a zero with an infinity.  Plain eager mode adds slices where M is
regular: entries (i, j), (i + a, j + b), ... of one weight make one slice of g that is added to one slice of dx.  Where it
is not, a finite g is multiplied by the whole matrix.  What is traced gathers the terms of each element of dx.
"""

import cmath
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manualprop._torch import transforms_active, unsafe_view, without_modes
from manualprop.functions._execution._formula import full, watched

Row = Callable[..., dict[int, float]]

MOST_RUNS = 24  # more slices than this cost more than gathering
MOST_TERMS = 8  # for more terms than this an element is summed by its index
MOST_PARTS = 8  # slices that the compiler adds in one loop
FEW_ELEMENTS = 2**12  # below, each step costs its call
MOST_TIMES = 4  # more repeats than this are one copy
SHORT, LONG = 2**5, 2**8  # a copy of runs of fewer elements is slow; one of runs of more is fast as it is
CACHED = 2**20  # a result of fewer elements than this stays in the caches
STEPS = [(a, b) for a in range(5) for b in range(-1, 9) if (a, b) not in ((0, 0), (0, -1))]


@dataclass(frozen=True)
class Like:  # no tuple: torch.func would take it apart
    """The shape and the memory format of an input, which its gradient gets."""

    shape: torch.Size
    format: torch.memory_format

    @staticmethod
    def of(x: Tensor) -> "Like":
        return Like(x.shape, memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last where ``x`` is, as torch's kernels see it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or transforms_active():
        return torch.contiguous_format
    if x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def owned(y: Tensor) -> Tensor:
    """``y``, as a tensor to which an in-place activation may write: autograd refuses a view from a Function."""
    view: Tensor = unsafe_view(y, y.shape) if y._is_view() else y
    return view


def laid_out(dx: Tensor, like: Like) -> Tensor:
    """``dx``, or dL/dy, in the memory format of the input, unless it is a few numbers repeated."""
    return dx if 0 in dx.stride() else dx.contiguous(memory_format=like.format)


# ----- the matrix of an axis -----


class Run(NamedTuple):
    """Entries (i + r a, j + r b) for r < length, all of one weight; ``fresh`` if no run before touches their j."""

    i: int
    j: int
    a: int
    b: int
    length: int
    weight: float
    fresh: bool


class Matrix:
    """M (o, n), sparse."""

    def __init__(self, rows: Sequence[dict[int, float]], n: int) -> None:
        self.rows, self.o, self.n = rows, len(rows), n
        self.columns: list[list[tuple[int, float]]] = [[] for _ in range(n)]  # for each j its terms (i, M_ij)
        for i, row in enumerate(rows):
            for j, weight in row.items():
                self.columns[j].append((i, weight))
        self.most_terms, self.entries = max(map(len, self.columns)), sum(map(len, rows))
        # k and w where each row has k entries w, beside those of the row before: then dx is w g, each element k times.
        self.block = (n // self.o, rows[0][0]) if n % self.o == 0 and 0 in rows[0] else None
        if self.block is not None:
            k, w = self.block
            if any(row != dict.fromkeys(range(i * k, (i + 1) * k), w) for i, row in enumerate(rows)):
                self.block = None


@functools.lru_cache(maxsize=512)
def matrix(row: Row, n: int, o: int, options: tuple[Any, ...]) -> Matrix:
    return Matrix([row(i, n, o, *options) for i in range(o)], n)


class Runs(NamedTuple):
    """The entries of a matrix as few runs; ``covered`` if the fresh ones write every j."""

    runs: tuple[Run, ...]
    covered: bool


@functools.lru_cache(maxsize=512)
def runs_of(M: Matrix) -> Runs | None:
    """None if they are many."""
    left = {(i, j): weight for i, row in enumerate(M.rows) for j, weight in row.items()}
    found: list[Run] = []
    while left:
        if len(found) == MOST_RUNS:
            return None
        found.append(taken_out(left))
    found.sort(key=lambda run: -run.length)
    touched: set[int] = set()
    written = 0
    for place, run in enumerate(found):
        own = {run.j + r * run.b for r in range(run.length)}
        if own.isdisjoint(touched):
            found[place] = run._replace(fresh=True)
            written += len(own)
        touched |= own
    return Runs(tuple(found), written == M.n)


def taken_out(left: dict[tuple[int, int], float]) -> Run:
    """The longest run from the first entry of ``left``, which is taken out."""
    i, j = next(iter(left))
    weight = left[i, j]

    def count(a: int, b: int) -> int:
        r = 1
        while left.get((i + r * a, j + r * b)) == weight:
            r += 1
        return r

    a, b = max(STEPS, key=lambda step: count(*step))
    run = Run(i, j, a, b, count(a, b), weight, False)
    for r in range(run.length):
        del left[i + r * a, j + r * b]
    return run


# ----- the adjoint -----


def transposed_along(row: Row, along: Sequence[tuple[Any, ...]], g: Tensor, like: Like) -> Tensor:
    """g x_1 M_1^T x_2 M_2^T ... for the matrices of the last axes."""
    axes = range(-len(along), 0)
    if len(along) > len(like.shape) - 2:  # the second axis is mapped too, so it is not that of the channels
        like = Like(like.shape, torch.contiguous_format)
    g = laid_out(g, like)
    matrices = [
        (axis, matrix(row, int(like.shape[axis]), int(g.shape[axis]), tuple(map(fixed, options))))
        for axis, options in zip(axes, along, strict=True)
    ]
    blocks = [M.block for _, M in matrices]
    others = [pair for pair, block in zip(matrices, blocks, strict=True) if block is None]
    dx = full(g) if others else g
    for axis, M in in_order(others):
        dx = transposed(M, dx, axis, like.format)
    scale = math.prod(block[1] for block in blocks if block is not None)
    dx = repeated_along([1 if block is None else block[0] for block in blocks], dx, scale, like.format)
    dx = dx.to(g.dtype)
    return g.clone() if dx is g else dx


def fixed(option: Any) -> Any:
    """``option``; the number of one that varies under the compiler, because the matrix depends on it."""
    if isinstance(option, torch.SymInt):
        return int(option)
    return float(option) if isinstance(option, torch.SymFloat) else option


def repeated_along(times: Sequence[int], g: Tensor, scale: float, layout: torch.memory_format) -> Tensor:
    """Each element times ``scale``, so often along each of the last axes; a view where it has one."""
    if all(k == 1 for k in times):
        return g if scale == 1 else g * scale
    last = layout is not torch.contiguous_format
    g, times = (g.movedim(1, -1), [*times, 1]) if last else (g, times)  # in the order of memory
    if pays_by_parts(times, g):
        dx = repeated_by_parts(times, g, scale)
        return dx.movedim(-1, 1) if last else dx
    if scale != 1:
        g = g * scale
    if g.numel() >= FEW_ELEMENTS and not watched((g,)):
        g, times = alternating(g, times)
    before = g.dim() - len(times)
    shape, wide = list(g.shape[:before]), list(g.shape[:before])
    for n, k in zip(g.shape[before:], times, strict=True):
        shape, wide = [*shape, n, 1], [*wide, n, k]
    final = [*g.shape[:before], *[n * k for n, k in zip(g.shape[before:], times, strict=True)]]
    dx = g.reshape(shape).expand(wide).reshape(final)
    return dx.movedim(-1, 1) if last else dx


def pays_by_parts(times: Sequence[int], g: Tensor) -> bool:
    """Whether ``repeated_by_parts`` is faster: the result stays in the caches, and the copies have long runs."""
    if not FEW_ELEMENTS <= g.numel() <= CACHED // math.prod(times) or watched((g,)):
        return False
    sizes = g.shape[-len(times) :]
    few = all(k == 1 or (k <= MOST_TIMES and n > 1) for k, n in zip(times, sizes, strict=True))
    return few and (times[-1] > 1 or SHORT <= sizes[-1] <= LONG // max(times))


def repeated_by_parts(times: Sequence[int], g: Tensor, scale: float) -> Tensor:
    """Writes each element once; then copies what is written to the places that repeat it, the innermost axis first.

    2 x 2 of 14 x 14 elements in 64 channels: 0.6 of the time of one copy in channels-last, 0.75 in contiguous format.
    """
    lead, sizes = g.shape[: -len(times)], g.shape[-len(times) :]
    dx = g.new_empty([*lead, *itertools.chain.from_iterable(zip(sizes, times, strict=True))])
    repeats: list[tuple[Tensor, ...]] = []
    first = dx
    for axis in range(1 - 2 * len(times), 0, 2):
        repeats.append(first.unbind(axis))
        first = repeats[-1][0]
    torch.mul(g, scale, out=first)
    for written, *others in reversed(repeats):
        for other in others:
            other.copy_(written)
    return dx.view([*lead, *[n * k for n, k in zip(sizes, times, strict=True)]])


def alternating(g: Tensor, times: Sequence[int]) -> tuple[Tensor, list[int]]:
    """g repeated along axes where a copy would have short runs, by slices; the times that are left.

    2 x 2 x 2 of 8 x 2 x 2 elements: 0.2 of the time of a copy; 2 x 2 of 14 x 14: 0.4.
    """
    left = list(times)
    for axis in range(-1, -1 - len(times), -1):
        k, behind = left[axis], g.dim() + axis + 1
        if 1 < k <= MOST_TIMES and g.shape[axis] > 1 and g.shape[behind:].numel() < SHORT:
            wide = g.new_empty((*g.shape[:behind], k, *g.shape[behind:]))
            for part in wide.unbind(behind):
                part.copy_(g)
            g, left[axis] = wide.flatten(behind - 1, behind), 1
    return g, left


def in_order(matrices: Sequence[tuple[int, Matrix]]) -> Iterator[tuple[int, Matrix]]:
    """First the axes that become shorter, from the outermost; then the others from the innermost: fewer elements."""
    yield from ((axis, M) for axis, M in matrices if M.n < M.o)
    yield from ((axis, M) for axis, M in reversed(matrices) if M.n >= M.o)


def transposed(M: Matrix, g: Tensor, axis: int, layout: torch.memory_format) -> Tensor:
    """M^T along one axis of g."""
    runs = runs_of(M)
    if watched((g,)):
        step = None if runs is None else common_step(runs)
        if runs is not None and step is not None:
            return interleaved(M, runs, step, g, axis)
        return gathered(M, g, axis) if M.most_terms <= MOST_TERMS else added_by_index(M, g, axis)
    is_innermost = axis == -1 and layout is torch.contiguous_format
    if product_pays(M, runs, is_innermost) and g.is_cpu and cmath.isfinite(g.sum().item()):
        return multiplied(M, g, axis, layout)
    return added_by_index(M, g, axis) if runs is None else sliced(M, runs, g, axis, layout)


def product_pays(M: Matrix, runs: Runs | None, is_innermost: bool) -> bool:
    """Whether the whole product, a fortieth of a nanosecond for each of its o n terms on one core, is faster.

    A slice takes 0.4 ns a term along the innermost axis and 0.2 along others, an index 2.5.
    """
    if runs is None:
        return M.o * M.n < 100 * M.entries
    return is_innermost and M.o * M.n < 15 * M.entries


def sliced(M: Matrix, runs: Runs, g: Tensor, axis: int, layout: torch.memory_format) -> Tensor:
    """Every run as one slice of g, added to one slice of dx."""
    shape = list(g.shape)
    shape[axis] = M.n
    dx = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)
    if not runs.covered:
        dx.zero_()
    for run in runs.runs:
        part, into = part_of(g, run, axis), place(dx, axis, run.j, run.b, run.length)
        if not run.fresh:
            into.add_(part, alpha=run.weight)
        elif run.weight == 1:
            into.copy_(part)
        else:
            torch.mul(part if run.a else part.expand_as(into), run.weight, out=into)
    return dx


def common_step(runs: Runs) -> int | None:
    """The distance of the places that a run writes, if it is the same for every run and they are few."""
    steps = {abs(run.b) for run in runs.runs if run.length > 1 and run.b} or {1}
    return steps.pop() if len(steps) == 1 and len(runs.runs) <= MOST_PARTS else None


def interleaved(M: Matrix, runs: Runs, step: int, g: Tensor, axis: int) -> Tensor:
    """Every run as one slice of g, put between zeros and added; then the places 0, step, ... and 1, 1 + step, ... mixed.

    Nothing is written in place and nothing looked up by index: the compiler makes one loop of it.
    """
    long = -(-M.n // step)
    sums: list[Tensor | None] = [None] * step
    for run in runs.runs:
        part = part_of(g, run, axis)
        length = run.length if run.b else 1
        start = min(run.j, run.j + (length - 1) * run.b)
        if part.shape[axis] != length:
            part = part.expand(*part.shape[:axis], length, *part.shape[axis:][1:])
        part = part if run.weight == 1 else part * run.weight
        before = start // step
        part = F.pad(part, [*[0, 0] * (-1 - axis), before, long - before - length])
        total = sums[start % step]
        sums[start % step] = part if total is None else total + part
    if step == 1 and sums[0] is not None:
        return sums[0]
    empty = [*g.shape[:axis], long, *g.shape[axis:][1:]]
    mixed = torch.stack([g.new_zeros(empty) if total is None else total for total in sums], axis)
    return mixed.reshape(*g.shape[:axis], long * step, *g.shape[axis:][1:]).narrow(axis, 0, M.n)


def part_of(g: Tensor, run: Run, axis: int) -> Tensor:
    """The terms of a run."""
    part = place(g, axis, run.i, run.a, run.length)
    if run.b == 0:
        return part.sum(axis, keepdim=True)
    return part.flip(axis) if run.b < 0 else part


def place(t: Tensor, axis: int, start: int, step: int, count: int) -> Tensor:
    """Places start, start + step, ... along an axis, in ascending order; one place for step 0."""
    if step < 0:
        start, step = start + (count - 1) * step, -step
    count = count if step else 1
    if step <= 1:
        return t.narrow(axis, start, count)
    index: tuple[Any, ...] = (
        ...,
        slice(start, start + (count - 1) * step + 1, step),
        *[slice(None)] * (-1 - axis),
    )
    return t[index]


def multiplied(M: Matrix, g: Tensor, axis: int, layout: torch.memory_format) -> Tensor:
    """The product with the whole matrix, zeros included: only for a finite g."""
    whole = dense(M, g.dtype)
    last = layout is not torch.contiguous_format
    g = g.movedim(1, -1) if last else g  # in the order of memory
    axis = axis - 1 if last else axis
    outer, inner = g.shape[:axis].numel(), g.shape[axis + 1 :].numel() if axis < -1 else 1
    shape = [*g.shape]
    shape[axis] = M.n
    g = g.reshape(outer, M.o) if inner == 1 else g.reshape(outer, M.o, inner)
    dx = g.matmul(whole) if inner == 1 else whole.mT.matmul(g)  # (K, o) (o, n) or (n, o) (K, o, L)
    dx = dx.view(shape)
    return dx.movedim(-1, 1) if last else dx


@functools.lru_cache(maxsize=64)
def dense(M: Matrix, dtype: torch.dtype) -> Tensor:
    """M (o, n) with its zeros, on the CPU."""
    with without_modes():
        whole = torch.zeros(M.o, M.n, dtype=dtype)
        for i, row in enumerate(M.rows):
            for j, weight in row.items():
                whole[i, j] = weight
        return whole


def gathered(M: Matrix, g: Tensor, axis: int) -> Tensor:
    """dx_j = sum_k w_jk g_{i_jk}: each j gathers its terms."""
    terms = [term(M, g, axis, k) for k in range(M.most_terms)]
    return functools.reduce(torch.add, terms)


def term(M: Matrix, g: Tensor, axis: int, k: int) -> Tensor:
    """The k-th term of every j; 0 where it has fewer."""
    own = [column[k] if k < len(column) else (0, 0.0) for column in M.columns]
    absent = [k >= len(column) for column in M.columns]
    weights = {weight for (_, weight), no in zip(own, absent, strict=True) if not no}
    part = g.index_select(axis, torch.tensor([i for i, _ in own], device=g.device))
    shape = (M.n, *[1] * (-1 - axis))
    if len(weights) == 1:
        (weight,) = weights
        part = part if weight == 1 else part * weight
    else:
        part = part * torch.tensor([weight for _, weight in own], dtype=g.dtype, device=g.device).view(shape)
    return part.masked_fill(torch.tensor(absent, device=g.device).view(shape), 0) if any(absent) else part


def added_by_index(M: Matrix, g: Tensor, axis: int) -> Tensor:
    """All products M_ij g_i, each added to its j."""
    entries = [(i, j, weight) for j, column in enumerate(M.columns) for i, weight in column]
    shape = list(g.shape)
    shape[axis] = M.n
    if not entries:
        return g.new_zeros(shape)
    i, j = (torch.tensor([entry[k] for entry in entries], device=g.device) for k in (0, 1))
    weight = torch.tensor([entry[2] for entry in entries], dtype=g.dtype, device=g.device)
    terms = g.index_select(axis, i) * weight.view(-1, *[1] * (-1 - axis))
    return g.new_zeros(shape).index_add(axis, j, terms)
