"""How the losses of classes run: ATen's kernels of their values.

A loss is computed and returned in full precision; half precision is lifted some rows at a time, so that the copy stays
in the cache.  Of many numbers those at the targets are picked by their places in memory, which takes ATen's kernels two
to four times as long along an axis that is not the last.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import cross_entropy_loss, nll_loss
from manualprop.functions._execution import _formula
from manualprop.functions._execution._formula import HALF, flattened, formula, full, plain_eager, watched
from manualprop.functions._execution._lowering import kept_number

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # ATen's numbers
MANY = 2**15  # numbers from which finding their places in memory pays, measured


def occurring(ignored: int, t: Tensor) -> int | None:
    """``ignored``, the class number that stands for no class; None if a look at the targets shows that all count."""
    if ignored >= 0 or not t.is_cpu or watched((t,)) or not t.numel():
        return ignored
    return None if t.min().item() >= 0 else ignored


def counting(t: Tensor, ignored: int) -> tuple[Tensor, Tensor | None]:
    """The targets, 0 for an ignored one; and which of them count, None for all."""
    if occurring(ignored, t) is None:
        return t, None
    counted = t != ignored
    return t.where(counted, 0), counted


def where_counted(g: Tensor, counted: Tensor | None) -> Tensor:
    """g, and 0 for an ignored target, whatever g is."""
    return g if counted is None else g.where(counted, 0)


def divisor(t: Tensor, w: Tensor | None, counted: Tensor | None, dtype: torch.dtype) -> Tensor | int:
    """What a mean divides by: the sum of w_t over the targets that count; their number without weights.

    In the dtype of what is divided: inductor would convert an integer for each element.
    """
    if w is None:
        return t.numel() if counted is None else counted.sum(dtype=dtype)
    w_t = full(w)[t]
    return w_t.sum() if counted is None else (w_t * counted).sum()


def over(g: Tensor, D: Tensor | int) -> Tensor:
    """g / D, a number D as a tensor that is kept: ATen would make one of it each time."""
    return g / (D if isinstance(D, Tensor) else kept_number(float(D), g.dtype, g.dtype))


def examples(x: Tensor) -> int:
    """How many examples x (N, C, ...) or (C,) has."""
    return 1 if x.dim() == 1 else x.shape[0] * x.shape[2:].numel()


# ----- values -----


def cross_entropy(x: Tensor, t: Tensor, w: Tensor | None, ignored: int, e: float, reduction: str) -> Tensor:
    """The cross-entropy of logits with class indices or with the probability of each class."""
    number = REDUCTIONS[reduction]
    if x.dtype not in HALF:
        if e == 0 and _by_places(x, t, w):
            return nll(torch.log_softmax(x, 1), t, w, ignored, reduction)
        if t.is_floating_point() and torch.compiler.is_compiling():  # which sums row by row on its way
            return reduced(cross_entropy_loss(x, t, w, 0, ignored, e), t, w, ignored, reduction)
        loss: Tensor = cross_entropy_loss(x, t, w, number, ignored, e)
        return loss
    n = rows_to_lift(x, t)
    if n == len(x):
        return cross_entropy(x.float(), full(t), _lifted(w, x), ignored, e, reduction)
    parts = (
        cross_entropy(some_x, some_t, w, ignored, e, "none")
        for some_x, some_t in zip(x.split(n), t.split(n), strict=True)
    )
    return reduced(torch.cat([*parts]), t, w, ignored, reduction)


def nll(x: Tensor, t: Tensor, w: Tensor | None, ignored: int, reduction: str) -> Tensor:
    """-w_t x_t of log-probabilities x."""
    x_t = _picked(x, t, ignored) if _by_places(x, t, w) else None
    if x_t is None:
        loss: Tensor = nll_loss(full(x), t, _lifted(w, x), REDUCTIONS[reduction], ignored)
        return loss
    index, counted = counting(t, ignored)
    if w is not None:
        x_t *= full(w)[index]
    x_t.neg_()
    return reduced(where_counted(x_t, counted), t, w, ignored, reduction)


def reduced(l: Tensor, t: Tensor, w: Tensor | None, ignored: int, reduction: str) -> Tensor:
    """Losses, their sum, or their mean as ATen has it: over the weights of the targets that count."""
    if reduction == "none":
        return l
    if reduction == "sum":
        return l.sum()
    if t.is_floating_point():
        return l.mean()
    t, counted = counting(t, ignored)
    return over(l.sum(), divisor(t, w, counted, l.dtype))


def rows_to_lift(x: Tensor, t: Tensor) -> int:
    """How many rows of x (N, C, ...) and t (N, ...) a chunk has: all of them, unless they are large."""
    N = len(x)
    if x.numel() < _formula.LARGE or x.dim() < 2 or len(t) != N or not x.is_cpu or watched((x, t)):
        return N
    rows = max(_formula.CHUNK * torch.get_num_threads() * N // x.numel(), 1)
    return N if N < 2 * rows else rows


def _lifted(w: Tensor | None, x: Tensor) -> Tensor | None:
    """Class weights in full precision, if they are of x's dtype; if not, ATen has its say on the mismatch."""
    return full(w) if w is not None and w.dtype == x.dtype else w


def lifted(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``value``, whose tensors of the first one's precision come in full precision, if that is half."""

    @functools.wraps(value)
    def in_full(*arguments: Any) -> Tensor:
        half = arguments[0].dtype
        if half in HALF:
            arguments = tuple(
                a.float() if isinstance(a, Tensor) and a.dtype == half else a for a in arguments
            )
        return value(*arguments)

    return in_full


def kernel(aten: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Mark a function that ATen has a kernel for, but vmap no rule, and the compiler no quick form: these run the function."""

    def marked(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @lifted
        @functools.wraps(value)
        def either(*arguments: Any) -> Tensor:
            return aten(*arguments) if plain_eager() else value(*arguments)

        return either

    return marked


def longest(leading: Tensor) -> int:
    """The length of the longest of lists (N, K) whose entries lead; K where nobody may look."""
    if not leading.numel() or not plain_eager() or type(leading) is not Tensor:
        return leading.shape[-1]
    return int(leading.sum(-1).max())


WIDTH = 16  # float32 numbers in the widest vector of a CPU
FEW = 32  # fewer rows than these do not repay the copy


def log_softmax(x: Tensor) -> Tensor:
    """log p of rows x (N, C) in full precision, laid out column by column where that is quicker.

    ATen's kernel works along the axis a vector at a time, and one number at a time where the axis is shorter than
    a vector: 180 us for 1797 rows of 10 against 20 us for the same along the first axis, copy included.
    """
    x = full(x)
    if x.shape[0] >= FEW and x.shape[1] < WIDTH and x.is_cpu:
        return torch.log_softmax(x.t().contiguous(), 0).t()
    return torch.log_softmax(x, -1)


# ----- places in memory -----


def _by_places(x: Tensor, t: Tensor, w: Tensor | None) -> bool:
    """Whether the numbers at the targets are better picked by their places in memory: x (N, C, ...) is large, and
    has further axes or would have to be lifted as a whole.  Not where ATen has to say what is wrong with t or w.
    """
    return (
        x.numel() >= MANY
        and (x.dim() > 2 or (x.dim() == 2 and x.dtype in HALF))
        and x.is_cpu
        and t.dtype == torch.int64
        and t.shape == x.shape[:1] + x.shape[2:]
        and (w is None or (w.shape == x.shape[1:2] and w.dtype == x.dtype))
        and not watched((x, t))
        and flattened(x) is not None
        and flattened(t) is not None
    )


def _picked(x: Tensor, t: Tensor, ignored: int) -> Tensor | None:
    """x_t in full precision, anything for an ignored target; None if another one is out of range."""
    t = t.where(t != ignored, 0)
    lowest, highest = t.aminmax()
    if lowest < 0 or highest >= x.shape[1]:
        return None
    _, numbers = flattened(x) or (x, x)
    return full(numbers.index_select(0, _places(x, t)).view(t.shape))


def _places(x: Tensor, t: Tensor) -> Tensor:
    """Where in memory a dense ``x`` (N, C, ...) has its numbers at the classes (N, ...), one after the other."""
    N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    along_c, along_l = (L, 1) if x.is_contiguous() else (1, C)
    starts = torch.arange(0, x.numel(), C * L).view(N, 1) + torch.arange(0, L * along_l, along_l)  # (N, L)
    return starts.add_(t.reshape(N, L), alpha=along_c).view(-1)


# ----- shapes -----

LETTERS = {2: {"X": "N, C", "T": "N, 1", "W": "C"}, 3: {"X": "N, C, L", "T": "N, 1, L", "W": "C, 1"}}


def classwise(legend: str, lift: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as a formula of tensors (X), (T) and (W); the second may be (G): one number, or one for each loss."""

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        runs = {}
        for axes, letters in LETTERS.items():
            for G in ("", letters["T"]) if "(G)" in legend else (letters["T"],):
                text = legend.replace("(G)", f"({G})")
                for name, shape in letters.items():
                    text = text.replace(f"({name})", f"({shape})")
                runs[axes, bool(G)] = formula(text, lift)(function)

        def with_g(x: Tensor, g: Tensor, *others: Any, **options: Any) -> Any:
            return runs[min(x.dim(), 3), g.dim() > 0](x, g, *others, **options)

        def run(x: Tensor, *others: Any, **options: Any) -> Any:
            return runs[min(x.dim(), 3), True](x, *others, **options)

        return with_g if "(G)" in legend else run

    return marked


def in_rows(x: Tensor, *each: Any) -> tuple[Any, ...]:
    """``x`` as (N, C) or (N, C, L); with an axis of length 1 for its classes what has one number for each example.

    Further axes are not flattened for the compiler, which shares the maximum and the sum of exp x with the forward pass.
    """
    if x.dim() == 2 or (x.dim() > 2 and torch.compiler.is_compiling()):
        return x, *[t.unsqueeze(1) if t.dim() else t for t in each]
    if x.dim() == 1:
        return x.unsqueeze(0), *[t.view(1, 1) for t in each]
    N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    return x.reshape(N, C, L), *[t.reshape(N, 1, L) if t.dim() else t for t in each]


def weights(w: Tensor | None, x: Tensor) -> Tensor | None:
    """``w`` so that it broadcasts over rows ``x``."""
    return w if w is None or x.dim() < 3 else w.view(-1, *(1,) * (x.dim() - 2))


def shape_of_targets(x: Tensor) -> torch.Size:
    """That of one number for each example: (N, ...)."""
    return x.shape[:0] if x.dim() == 1 else x.shape[:1] + x.shape[2:]
