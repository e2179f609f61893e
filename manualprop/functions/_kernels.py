"""How an elementwise formula runs over a large tensor: as it stands, block by block, or as a compiled kernel.

Nothing here knows any mathematics: a formula is a function of tensors of one shape and of numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._execution._kernels import backend
from manualprop.functions._rule import plain_eager

Formula = Callable[..., Tensor]

# Elements from which a way pays, measured: a block takes 10 us of Python, a compiled kernel 70 us to start.
LARGE = 2**18
LARGE_COMPILED = 2**18
SMALLEST = min(LARGE, LARGE_COMPILED)  # below, there is nothing to choose
BLOCK = 2**17  # elements of a block, for each thread: it and its temporaries stay in a core's cache


def by_parts(
    formula: Formula,
    p: tuple[float, ...],
    *tensors: Tensor,
    blocks: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """``formula(*tensors, *p)`` of tensors of one shape; if they are large, compiled or in ``blocks``, if these help.

    ``formula`` takes ``out=``, a tensor for its result, if given.  So may this: one of the tensors may be given away.

    A large temporary costs a page fault every few kilobytes, which takes longer than the arithmetic on it: in
    blocks, what a formula makes on its way stays in the cache.
    """
    last = tensors[-1]
    count, kernel = last.numel(), backend() != "eager"
    if count < (LARGE_COMPILED if kernel else LARGE) or (flat := flattened(*tensors)) is None:
        return formula(*tensors, *p) if out is None else formula(*tensors, *p, out=out)
    if kernel:
        if out is None:
            return _compiled(formula, p, flat, torch.empty_like(last))
        over = next(i for i, t in enumerate(tensors) if t is out)
        _compiled(formula, p, flat, flat[over], over)
        return out
    block = BLOCK * torch.get_num_threads()
    if not blocks or not last.is_cpu or count < 2 * block:
        return formula(*tensors, *p) if out is None else formula(*tensors, *p, out=out)
    out = torch.empty_like(last) if out is None else out
    target = out.as_strided((out.numel(),), (1,))
    for piece, *pieces in zip(*(t.split(block) for t in (target, *flat)), strict=True):
        formula(*pieces, *p, out=piece)
    return out


def in_rows(formula: Formula, dim: int, *tensors: Tensor) -> Tensor:
    """``formula(*tensors, dim)`` of tensors of one shape, some rows at a time if they are large.

    ``formula`` takes ``out=``, a tensor for its result, if given, and may not mix rows: places of the axes before ``dim``.
    """
    last = tensors[-1]
    if last.numel() < LARGE or not last.is_contiguous() or flattened(*tensors) is None:
        return formula(*tensors, dim)
    dim %= last.dim()
    out, shape = torch.empty_like(last), (last.shape[:dim].numel(), last.shape[dim], -1)
    rows = [t.reshape(shape) for t in (out, *tensors)]
    count = rows_of_a_block(*rows)
    if count == shape[0]:
        return formula(*tensors, dim)
    for piece, *pieces in zip(*(t.split(count) for t in rows), strict=True):
        formula(*pieces, 1, out=piece)
    return out


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


# ----- compiled kernels -----

_made: dict[tuple[object, ...], Callable[..., None]] = {}


def _compiled(
    formula: Formula, p: tuple[float, ...], flat: list[Tensor], out: Tensor, over: int | None = None
) -> Tensor:
    """``formula`` on one-dimensional tensors, into ``out``, number ``over`` of them, in one kernel for all sizes."""
    key = (formula, p, over, out.dtype, out.device, torch.is_inference_mode_enabled())
    kernel = _made.get(key)
    arguments = flat if over is not None else [out.as_strided((out.numel(),), (1,)), *flat]
    with torch.no_grad():
        if kernel is not None:
            kernel(*arguments)
        else:
            _made[key] = _first_use(_compile(formula, p, over), *arguments)
    return out


def _compile(formula: Formula, p: tuple[float, ...], over: int | None) -> Callable[..., None]:
    def kernel(*arguments: Tensor) -> None:
        if over is None:
            out, *tensors = arguments
            out.copy_(formula(*tensors, *p))
        else:
            arguments[over].copy_(formula(*arguments, *p))

    # Rules share this function's code, and Dynamo would count their kernels as recompilations of one.
    apart = {"isolate_recompiles": True}
    compiled: Callable[..., None] = torch.compile(  # type: ignore[call-overload]
        kernel, backend="inductor", fullgraph=True, **apart
    )
    return compiled


def _first_use(kernel: Callable[..., None], *arguments: Tensor) -> Callable[..., None]:
    try:
        for t in arguments:
            # The size alone: dynamic=True would take a formula's constants for variables, too.
            torch._dynamo.maybe_mark_dynamic(t, 0)
        kernel(*arguments)
    except Exception as error:
        # What follows the first paragraph is advice on debugging Dynamo.
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise RuntimeError(
            f"kernels: inductor could not compile a kernel for {arguments[0].device.type}. "
            "It needs a C++ compiler (g++ or clang++) on the CPU and Triton on a GPU; "
            f'manualprop.kernels("eager") does without. {type(error).__name__}: {reason}'
        ) from error
    return kernel
