"""Rows of a large tensor, some at a time: what the cross-entropies use that do not run by ``_execution`` yet."""

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._rule import plain_eager

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
