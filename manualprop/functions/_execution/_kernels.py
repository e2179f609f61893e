"""Runs a formula as one kernel compiled by inductor: for large tensors, if :class:`kernels` chose it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import mark_dynamic

BACKENDS = ("eager", "inductor")

# One for the whole process: the backward of a CUDA tensor runs in one of autograd's threads.
_backend = "eager"
_made: dict[tuple[object, ...], Callable[..., Any]] = {}


def backend() -> str:
    """The chosen backend."""
    return _backend


class kernels:  # used as a function, like torch.set_grad_enabled
    """Choose how the rules run on large tensors in eager mode, from here on or inside a ``with``.

    ``"eager"`` runs a formula operation by operation.  ``"inductor"`` runs the same formula as one kernel, on
    CPU and GPU.  :func:`torch.compile` makes it on first use, which takes seconds once for each rule, dtype
    and device.  A forward stays one ATen kernel, which is usually the faster one.
    Under ``torch.func`` transforms and inside ``torch.compile`` the choice has no effect: the plain formulas
    run.  The choice holds for all threads.

    Args:
        backend: ``"eager"`` or ``"inductor"``.

    Raises:
        ValueError: if there is no such backend.

    Example:
        >>> import manualprop
        >>> with manualprop.kernels("inductor"):
        ...     pass  # train as ever
    """

    def __init__(self, backend: str) -> None:
        global _backend
        if backend not in BACKENDS:
            choices = " or ".join(map(repr, BACKENDS))
            raise ValueError(f"kernels: backend must be {choices}. Got {backend!r}.")
        self._before, _backend = _backend, backend

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _backend
        _backend = self._before


def in_one_kernel(
    runner: Any, tensors: Sequence[Any], numbers: tuple[Any, ...], needs: tuple[bool, ...] | None
) -> Any:
    """Run the formula of ``runner`` in one kernel, which serves all lengths of its axis N."""
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    # Inference mode and each device need their own compiled kernel.
    key = (runner, dtypes, numbers, needs, tensors[0].device, torch.is_inference_mode_enabled())
    kernel = _made.get(key)
    with torch.no_grad():
        if kernel is not None:
            return kernel(*tensors)
        kernel = _compiled(lambda *a: runner.plain((*a, *numbers), dtypes, needs))
        results = _first_use(
            kernel, tensors, [shape[:1] in (("N",), ("B",)) for shape in runner.legend.shapes]
        )
    _made[key] = kernel
    return results


def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*tensors: Tensor) -> Any:
        return formula(*tensors)

    # All rules share this function's code; Dynamo would count their kernels as recompilations of one.
    apart = {"isolate_recompiles": True}
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        kernel, backend="inductor", fullgraph=True, **apart
    )
    return compiled


def _first_use(kernel: Callable[..., Any], tensors: Sequence[Any], along: Sequence[bool]) -> Any:
    try:
        for t, n in zip(tensors, along, strict=True):
            if t is not None and n:
                # Only the length: dynamic=True would turn the formula's constants into variables too.
                mark_dynamic(t, 0)
        return kernel(*tensors)
    except Exception as error:
        # Keep the first paragraph; the rest is advice on debugging Dynamo.
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise RuntimeError(
            f"kernels: inductor could not compile a kernel for {tensors[0].device.type}. "
            "It needs a C++ compiler (g++ or clang++) on the CPU and Triton on a GPU; "
            f'manualprop.kernels("eager") does without. {type(error).__name__}: {reason}'
        ) from error
