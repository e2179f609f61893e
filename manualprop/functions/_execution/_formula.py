"""Decides how a formula runs, for all rules.

A rule states its mathematics as plain functions of tensors, marked with :func:`formula`.  A call runs

- the function as written, if something traces each step: in grad mode, under ``torch.func`` and forward mode,
  within :func:`torch.compile`, for tensor subclasses;
- else a program (``_program.py``), made once from the function: the same steps with fewer passes over memory;
- for large tensors that program chunk by chunk, so that intermediate results stay in the cache, or one kernel
  compiled by inductor (``_kernels.py``).

For half-precision tensors all of these compute in float32 and round each result once, unless ``lift`` is off.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from manualprop._torch import forward_level, is_legacy_batchedtensor, transforms_active
from manualprop.functions._execution import _kernels
from manualprop.functions._execution._program import Program
from manualprop.functions._execution._program import program as make

HALF = frozenset({torch.float16, torch.bfloat16})
ORDINARY = frozenset({Tensor, torch.nn.Parameter})
# From this many elements a compiled kernel pays: it takes 70 us to start.  Below, programs run whole.
LARGE = 2**18
CHUNK = 2**17  # elements of a chunk for each thread: a chunk and its intermediate results fit a core's cache
INNER_CHUNK = 2**19  # the same along another axis than the first, where a chunk has gaps
FEWEST = 8  # fewer chunks than this fit the larger caches whole; a chunk takes 10 us of Python
STEPS = 3  # shorter programs gain nothing from chunks
SIZES = (11, 13, 17, 19, 23)  # lengths of the axes of samples: all different
MOST = 512  # programs kept for one formula; then all are dropped

Formula = Callable[..., Any]
FORMULAS: list["Runner"] = []  # every formula, in the order of definition


class Legend(NamedTuple):
    """The shapes of a formula's tensors, in letters."""

    names: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]
    results: tuple[
        int | tuple[str, ...], ...
    ]  # the argument whose shape and dtype a result has, or its shape
    along: str = "N"  # the axis that is split into chunks

    @property
    def axes(self) -> list[int | None]:
        """For each argument its axis ``along``, or None."""
        return [shape.index(self.along) if self.along in shape else None for shape in self.shapes]

    @property
    def elementwise(self) -> bool:
        return all(shape == ("N",) for shape in self.shapes)

    def samples(self, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """A small tensor for each argument.

        Not on the device "meta": its kernels load the compiler, which takes seconds.
        """
        letters = dict.fromkeys(letter for shape in self.shapes for letter in shape if letter != "1")
        sizes = {"1": 1} | dict(zip(letters, SIZES, strict=False))
        return [
            None if d is None else torch.zeros([sizes[s] for s in shape], dtype=d, device="cpu")
            for shape, d in zip(self.shapes, dtypes, strict=True)
        ]


def read_legend(legend: str) -> Legend:
    """``"g (N, D), W (D) -> dx like g"`` as a :class:`Legend`."""
    left, _, right = legend.partition(" -> ")
    tensors = dict(re.findall(r"(\w+) \(([^)]*)\)", left))
    names, shapes = tuple(tensors), tuple(tuple(re.findall(r"\w+", shape)) for shape in tensors.values())
    found = re.findall(r"\w+ (?:like (\w+)|\(([^)]*)\))", right)
    if not names or not found or not {like for like, _ in found if like} <= {*names}:
        raise ValueError(f"formula: a legend is written 'g (N, D), W (D) -> dx like g'. Got {legend!r}.")
    results = [names.index(like) if like else tuple(re.findall(r"\w+", shape)) for like, shape in found]
    return Legend(names, shapes, tuple(results))


def formula(legend: str, lift: bool = True, along: str = "N") -> Callable[[Formula], "Runner"]:
    """Mark a function of tensors, then of numbers, as a formula.

    Args:
        legend: the shapes of the tensors and of the results, as in ``"g (N, D), W (D) -> dx like g"``.
            A result that is like a tensor gets its shape and dtype.  A result with its own shape stays in
            full precision; if it has no axis ``along``, the results of the chunks are added up.
        lift: whether half precision is computed in float32.
        along: the axis that large tensors are split along, into chunks.
    """

    def marked(function: Formula) -> Runner:
        run = Runner(function, read_legend(legend)._replace(along=along), lift)
        FORMULAS.append(run)
        return run

    return marked


def recorded(
    apply: Callable[..., Any], plain: Callable[..., Any], compiled: bool = False
) -> Callable[..., Any]:
    """A function that calls ``apply``, which is recorded, in grad mode, and ``plain`` otherwise.

    With ``compiled`` the compiler gets ``apply`` too, and does not trace into ``plain``.
    """

    def either(*arguments: Any) -> Any:
        records = torch.is_grad_enabled() or (compiled and torch.compiler.is_compiling())
        return apply(*arguments) if records else plain(*arguments)

    return either


def eagerly(kernel: Callable[..., Any], formula: Callable[..., Any]) -> Any:
    """What ``kernel()`` returns in plain eager mode, and ``formula()`` where a transform or a compiler looks on."""
    return kernel() if plain_eager() else formula()


def full(t: Tensor) -> Tensor:
    """``t`` in float32 if it is in half precision."""
    return t.float() if t.dtype in HALF else t


def written_over(function: Formula, x: Tensor, *numbers: Any) -> Tensor:
    """Write ``function(x, *numbers)`` into ``x`` and return it; one pass if ATen has this step in place."""
    run = _one_step_over(function, x.dtype, numbers)
    return x.copy_(function(x, *numbers)) if run is None else run(x)


@functools.lru_cache(maxsize=MOST)
def _one_step_over(
    function: Formula, dtype: torch.dtype, numbers: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """``function`` as a program that overwrites x, if it is one step: several may round differently."""
    sample = torch.zeros(SIZES[0], dtype=dtype, device="cpu")
    made = make(lambda x: function(x, *numbers), [sample], frozenset({0}))
    return made.run if made.steps == 1 and made.run(sample) is sample else None


class Runner:
    """Runs one formula; takes the same arguments."""

    def __init__(self, function: Formula, legend: Legend, lift: bool) -> None:
        functools.update_wrapper(self, function)
        self.function, self.legend, self.count, self.lift = function, legend, len(legend.names), lift
        self.programs: dict[Any, Program] = {}

    def __call__(
        self, *arguments: Any, over: int | None = None, needs: tuple[bool, ...] | None = None
    ) -> Any:
        """The results.

        Args:
            arguments: the tensors, where None is allowed, then the numbers.
            over: the index of a tensor that may be overwritten.
            needs: for each result, whether it is needed; the others are None.
        """
        tensors, numbers = arguments[: self.count], arguments[self.count :]
        dtypes = tuple([None if t is None else t.dtype for t in tensors])
        if watched(tensors):
            return self.plain(arguments, dtypes, needs)
        if tensors[0].numel() >= LARGE:
            return self._large(tensors, numbers, over, needs)
        found = self.programs.get((dtypes, numbers, over, needs))
        return (found or self.program(tensors, numbers, over, needs)).run(*tensors)

    def plain(
        self,
        arguments: Sequence[Any],
        dtypes: Sequence[torch.dtype | None],
        needs: tuple[bool, ...] | None = None,
    ) -> Any:
        """The formula as written; half precision is computed in float32, and each result is rounded once."""
        lift = self.lift and not HALF.isdisjoint(dtypes)
        if not lift and needs is None:
            return self.function(*arguments)
        tensors = [t.float() if lift and d in HALF else t for t, d in zip(arguments, dtypes, strict=False)]
        results = self.function(*tensors, *arguments[self.count :])
        several = list(_several(results))
        for j, like in enumerate(self.legend.results):
            if needs is not None and not needs[j]:
                several[j] = None
            elif lift and isinstance(like, int) and several[j] is not None:
                several[j] = several[j].to(dtypes[like])
        return tuple(several) if isinstance(results, tuple) else several[0]

    def program(
        self,
        tensors: Sequence[Any],
        numbers: tuple[Any, ...],
        over: int | None = None,
        needs: tuple[bool, ...] | None = None,
    ) -> Program:
        """The program for tensors of these dtypes and for these numbers."""
        dtypes = tuple([None if t is None else t.dtype for t in tensors])
        key = (dtypes, numbers, over, needs)
        found = self.programs.get(key)
        if found is None:
            if len(self.programs) >= MOST:
                self.programs.clear()
            given = frozenset(() if over is None else (over,))
            samples = self.legend.samples(dtypes)
            found = make(lambda *a: self.plain((*a, *numbers), dtypes, needs), samples, given)
            self.programs[key] = found
        return found

    # ----- large tensors -----

    def _large(
        self,
        tensors: Sequence[Any],
        numbers: tuple[Any, ...],
        over: int | None,
        needs: tuple[bool, ...] | None,
    ) -> Any:
        like = None
        if self.legend.elementwise:
            flat = flattened(*tensors)
            if flat is None:
                return self.program(tensors, numbers, over, needs).run(*tensors)
            like, *tensors = flat
        program = self.program(tensors, numbers, over, needs)
        if _kernels.backend() == "inductor" and not program.scatters:
            results = _kernels.in_one_kernel(self, tensors, numbers, needs)
        else:
            results = self._in_chunks(program, tensors, over)
        if like is None:
            return results
        views = [r.as_strided(like.shape, like.stride()) for r in _several(results)]
        return tuple(views) if isinstance(results, tuple) else views[0]

    def _in_chunks(self, program: Program, tensors: Sequence[Any], over: int | None) -> Any:
        first, axes = tensors[0], self.legend.axes
        N = 1 if axes[0] is None else first.shape[axes[0]]
        entries = CHUNK if axes[0] == 0 else INNER_CHUNK
        rows = max(entries * torch.get_num_threads() * N // first.numel(), 1)
        if not first.is_cpu or N < FEWEST * rows or program.steps < STEPS:
            return program.run(*tensors)
        if axes[0] != 0 and not all(t is None or t.is_contiguous() for t in tensors):  # chunks of short runs
            return program.run(*tensors)
        kinds = [kind for kind, made in zip(self.legend.results, program.made, strict=True) if made]
        wholes = [
            None
            if not isinstance(k, int) or axes[k] is None
            else tensors[k]
            if k == over
            else torch.empty(tensors[k].shape, dtype=tensors[k].dtype)
            for k in kinds
        ]
        pieces = [_pieces(t, rows, axis) for t, axis in zip(tensors, axes, strict=True)]
        pieces += [
            itertools.repeat(None) if not isinstance(k, int) or k == over else _pieces(whole, rows, axes[k])
            for k, whole in zip(kinds, wholes, strict=True)
        ]
        parts = []
        for chunk in zip(*pieces, strict=False):
            parts.append([r for r in _several(program.run(*chunk)) if r is not None])
            for k, result in zip(kinds, parts[-1], strict=True):
                if k == over is not None and result is not chunk[over]:
                    chunk[over].copy_(result)
        for j, (kind, whole) in enumerate(zip(kinds, wholes, strict=True)):
            if whole is None:
                part, letters = [p[j] for p in parts], () if isinstance(kind, int) else kind
                of_rows = self.legend.along in letters
                # From the end: a sum may have kept axes of length 1 in front.
                axis = letters.index(self.legend.along) - len(letters) if of_rows else 0
                wholes[j] = torch.cat(part, axis) if of_rows else torch.stack(part).sum(0)
        results = iter(wholes)
        several = tuple(next(results) if made else None for made in program.made)
        return several if len(several) > 1 else several[0]


def _pieces(t: Tensor | None, rows: int, axis: int | None) -> Iterable[Tensor | None]:
    return itertools.repeat(t) if t is None or axis is None else t.split(rows, axis)


def _several(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


# ----- which tensors -----


def watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something traces each step of a formula (grad mode, a transform, the compiler, a subclass)."""
    if is_grad_enabled() or is_compiling() or transforms_active():
        return True
    if forward_level() >= 0:
        return True
    for t in tensors:
        if t is not None and (type(t) not in ORDINARY or is_legacy_batchedtensor(t)):
            return True
    return False


def plain_eager() -> bool:
    """Whether no transform or compiler is active: under one, no number is read and no own kernel called."""
    return not (transforms_active() or is_compiling())


def flattened(*tensors: Tensor) -> list[Tensor] | None:
    """A reference tensor, then flat views of all tensors in its memory order; None if one view is missing."""
    like = next((t for t in tensors if any(t.stride())), tensors[0])
    if not (like.is_contiguous() or like.is_contiguous(memory_format=torch.channels_last)):
        return None
    views = [like]
    for t in tensors:
        if t.shape != like.shape:
            return None
        if t.stride() == like.stride():
            views.append(t.detach().as_strided((t.numel(),), (1,)))
        elif not any(t.stride()):  # one expanded number, such as the gradient of a sum
            views.append(t.detach().as_strided((t.numel(),), (0,)))
        else:
            return None
    return views
