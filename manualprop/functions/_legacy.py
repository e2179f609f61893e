"""What families of rules that do not run by the executor yet still use.  It goes when the last of them does."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from manualprop.functions._rule import plain_eager

LOG2_E = 1 / math.log(2)

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a float


def differs(s: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """Where ``s`` is not ``bound``, as a NaN never is: for :func:`chosen`, which multiplies g's bits by it.

    Integers 0 and 1, as wide as the floats of ``s``, in the memory of ``out`` if given, which may be ``s``; or
    booleans where the compiler or a transform watches, and on a GPU.  ``s`` is not -0, unless ``bound`` is.
    (ATen chooses by booleans one element at a time on the CPU, 40 times as slowly.)
    """
    if not (s.is_cpu and type(s) is Tensor and plain_eager() and s.dtype.is_floating_point):
        return s != bound
    integers = BITS[s.itemsize]
    out = torch.empty_like(s) if out is None else out
    return torch.ne(s.view(integers), constant(bound, s, integers), out=out.view(integers))


def chosen(g: Tensor, k: Tensor, out: Tensor | None = None) -> Tensor:
    """``g`` where ``k``, made by :func:`differs`, and 0 elsewhere: a fresh tensor, or ``out``."""
    if k.dtype is torch.bool:
        dx = g.masked_fill(~k, 0)  # inductor's kernel for g.where(k, 0) takes 1.3 times as long
        return dx if out is None else out.copy_(dx)
    if is_legacy_batchedtensor(g):
        return g * k
    k = k if k.itemsize == g.itemsize else k.to(BITS[g.itemsize])
    bits = g.view(k.dtype)
    if out is not None:
        torch.mul(k, bits, out=out.view(k.dtype))
        return out
    return k.mul_(bits).view(g.dtype)


def indicator(compare: Callable[..., Tensor], s: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """1 where ``compare(s, bound)`` holds, else 0, in the dtype of ``s``: a fresh tensor, or ``out``, which may be ``s``.

    ATen compares a whole vector at a time only into a tensor of the same dtype: by way of booleans, a ReLU's
    backward takes 4 to 7 times as long.  ``vmap`` has no rule for ``out=``.
    """
    if not plain_eager():
        return compare(s, bound).to(s.dtype)
    return compare(s, constant(bound, s), out=torch.empty_like(s) if out is None else out)


_constants: dict[tuple[float, torch.dtype, torch.dtype | None], Tensor] = {}


def constant(value: float, like: Tensor, view: torch.dtype | None = None) -> Tensor | float:
    """``value`` as a tensor without axes in the dtype of ``like``, made once, where such a one may stand for it.

    ATen makes one of every number that it is given, which takes as long as the work on a small layer.  With ``view``,
    it is what that dtype makes of its bits.
    """
    if type(like) is not Tensor or not plain_eager():  # a fake or distributed one mixes with its kind alone
        return value
    found = _constants.get((value, like.dtype, view))
    if found is None:
        with torch.inference_mode(False):  # it outlives the mode
            found = torch.tensor(value, dtype=like.dtype, device="cpu")
        if type(found) is not Tensor:  # made within somebody's fake mode, which it would outlive
            return value
        found = found if view is None else found.view(view)
        _constants[value, like.dtype, view] = found
    return found


def affine(a: float, b: float, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``a + b x``, a fresh tensor or ``out``, which may be ``x``: one pass over the memory."""
    offset = constant(a, x)
    return torch.add(offset, x, alpha=b, out=out) if isinstance(offset, Tensor) else x * b + a


def one_minus(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``1 - a * b``, a fresh tensor or ``out``: one pass over the memory, and one rounding where the processor can."""
    one = constant(1, a)
    if not (isinstance(one, Tensor) and type(b) is Tensor and a.is_cpu):
        return 1 - a * b if out is None else torch.sub(1, a * b, out=out)
    return torch.addcmul(one, a, b, value=-1, out=out)


def minus(fresh: Tensor, other: Tensor) -> Tensor:
    return fresh.sub_(other) if plain_eager() and not is_legacy_batchedtensor(other) else fresh - other
