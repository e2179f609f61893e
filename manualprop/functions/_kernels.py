"""Rows of a large tensor, some at a time: what the cross-entropies use that do not run by ``_execution`` yet."""

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._rule import HALF, full_dtype, in_full_precision, plain_eager

LARGE = SMALLEST = 2**18  # elements from which blocks pay, measured: a block takes 10 us of Python
BLOCK = 2**17  # elements of a block, for each thread: it and its temporaries stay in a core's cache


def rows_of_a_block(*tensors: Tensor) -> int:
    """How many rows of tensors (N, ...) of one shape a block has: all of them, unless they are large."""
    last = tensors[-1]
    N, count = last.shape[0], last.numel()
    if not plain_eager() or count < LARGE or not last.is_cpu or any(map(_is_extraordinary, tensors)):
        return N
    block = BLOCK * torch.get_num_threads()  # which Dynamo cannot trace: only here
    return N if count < 2 * block else max(block * N // count, 1)


def flattened(*tensors: Tensor) -> list[Tensor] | None:
    """One-dimensional views of ordinary tensors in one order of their elements; None where there are none."""
    if not plain_eager() or any(map(_is_extraordinary, tensors)):  # first: vmap cannot be asked for a layout
        return None
    last = tensors[-1]
    dense = last.is_contiguous() or last.is_contiguous(memory_format=torch.channels_last)
    return _views(last, *tensors) if dense else None


def _is_extraordinary(t: Tensor) -> bool:
    """A subclass (a fake or distributed tensor, say), or a wrapper of the older ``vmap``."""
    return type(t) not in (Tensor, torch.nn.Parameter) or is_legacy_batchedtensor(t)


def _views(like: Tensor, *tensors: Tensor) -> list[Tensor] | None:
    views = []
    for t in tensors:
        if t.shape != like.shape:
            return None
        if t.stride() == like.stride():
            views.append(t.detach().as_strided((t.numel(),), (1,)))
        elif not any(t.stride()):  # one number, expanded: the gradient of a sum
            views.append(t.detach().as_strided((t.numel(),), (0,)))
        else:
            return None
    return views


def minus(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh - other``, written into ``fresh`` unless ``vmap`` may have batched ``other`` alone."""
    return fresh.sub_(other) if plain_eager() and not is_legacy_batchedtensor(other) else fresh - other


def class_dim(x: Tensor) -> int:
    """The axis of the classes: the second, or the only one."""
    return 0 if x.dim() == 1 else 1


def lifted(w: Tensor | None, x: Tensor) -> Tensor | None:
    """Class weights in full precision, if they are of x's dtype; if not, torch has its say on the mismatch."""
    return in_full_precision(w) if w is not None and w.dtype == x.dtype else w


def target_mass(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, e: float) -> Tensor:
    """m, the mass that class indices ``t`` put on each class: (N, C, ...)."""
    dim, classes = class_dim(x), x.shape[class_dim(x)]
    dtype = full_dtype(x)
    counted = t.ne(ignore_index).unsqueeze(dim)
    index = t.unsqueeze(dim).where(counted, 0)
    w = x.new_ones(classes, dtype=dtype) if w is None else w.to(dtype)
    axes = [1] * x.dim()
    axes[dim] = classes
    onehot = torch.arange(classes, device=x.device).view(axes) == index
    m = w.view(axes) * (onehot.to(dtype) * (1 - e) + e / classes)  # a bool times a float is float32
    return m * counted


def constant_zeros(x: Tensor) -> Tensor:
    """Zeros like ``x`` that autograd takes for a function of x: its derivative is zeros, and not an error."""
    if not torch.is_grad_enabled():
        return torch.zeros_like(x)
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def places(x: Tensor, index: Tensor) -> Tensor:
    """Where in memory a dense ``x`` (N, C, ...) has its numbers at the classes (N, 1, ...), one after the other."""
    N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    along_c, along_l = (L, 1) if x.is_contiguous() else (1, C)
    starts = torch.arange(0, x.numel(), C * L).view(N, 1) + torch.arange(0, L * along_l, along_l)  # (N, L)
    return starts.add_(index.reshape(N, L), alpha=along_c).view(-1)


def scattered(fresh: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """``fresh`` with ``values`` at ``index``, in place unless it is recorded, or ``vmap`` batches the index alone."""
    if torch.is_grad_enabled() or not plain_eager() or is_legacy_batchedtensor(values):
        return fresh.scatter(dim, index, values)
    one_each = dim == 1 and index.shape[1] == 1
    if one_each and fresh.is_cpu and fresh.dtype in HALF and (numbers := flattened(fresh)) is not None:
        # ATen's scatter lifts and lowers it all.
        numbers[0].index_copy_(0, places(fresh, index), values.reshape(-1))
        return fresh
    return fresh.scatter_(dim, index, values)


def classes(x: Tensor, t: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """t with the class axis, (N, 1, ...), 0 where it is ignored; and where it is not."""
    index = t.unsqueeze(class_dim(x))
    counted = index.ne(ignore_index)
    return index.where(counted, 0), counted


def class_and_weight(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """t with the class axis, (N, 1, ...), and w_t; both 0 where the target is ignored."""
    index, counted = classes(x, t, ignore_index)
    weight = counted.to(full_dtype(x))
    return index, weight if w is None else weight * w[index]


def minus_target(Mp: Tensor, index: Tensor, minus_M: Tensor) -> Tensor:
    """M p - m, written into M p, where the whole mass M is on the class ``index``; both (N, 1, ...)."""
    return Mp.scatter_add_(class_dim(Mp), index, minus_M)
