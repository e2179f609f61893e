"""The same formulas as one kernel each, which inductor compiles: on large tensors, if :class:`kernels` says so."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop._torch import mark_dynamic

BACKENDS = ("eager", "inductor")

# One for the process, not for the thread: the backward of a CUDA tensor runs in a thread of autograd's own.
_backend = "eager"
_made: dict[tuple[object, ...], Callable[..., Any]] = {}


def backend() -> str:
    """The backend that is chosen."""
    return _backend


class kernels:  # used as a function, as torch.set_grad_enabled is
    """Choose how the rules run on large tensors in eager mode, from here on or inside a ``with``.

    ``"eager"`` runs a formula operation by operation.  ``"inductor"`` runs the very same formula as one kernel that
    :func:`torch.compile` makes on its first use (seconds, once for each rule, dtype and device), on CPU and GPU.
    A forward is one kernel of ATen's anyway, most often the faster one.
    Under ``torch.func`` transforms and inside ``torch.compile`` the plain formulas run whatever is chosen.  The
    choice holds for all threads.

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


def run(runner: Any, tensors: Sequence[Any], numbers: tuple[Any, ...], needs: tuple[bool, ...] | None) -> Any:
    """The formula of ``runner`` in one kernel for all lengths of its axis N."""
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    # A compiled kernel is made anew in inference mode, and for another device.
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

    # Rules share this function's code, and Dynamo would count their kernels as recompilations of one.
    apart = {"isolate_recompiles": True}
    compiled: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
        kernel, backend="inductor", fullgraph=True, **apart
    )
    return compiled


def _first_use(kernel: Callable[..., Any], tensors: Sequence[Any], along: Sequence[bool]) -> Any:
    try:
        for t, n in zip(tensors, along, strict=True):
            if t is not None and n:
                # The length alone: dynamic=True would take a formula's constants for variables, too.
                mark_dynamic(t, 0)
        return kernel(*tensors)
    except Exception as error:
        # What follows the first paragraph is advice on debugging Dynamo.
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise RuntimeError(
            f"kernels: inductor could not compile a kernel for {tensors[0].device.type}. "
            "It needs a C++ compiler (g++ or clang++) on the CPU and Triton on a GPU; "
            f'manualprop.kernels("eager") does without. {type(error).__name__}: {reason}'
        ) from error
