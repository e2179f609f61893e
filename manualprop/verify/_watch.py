"""Wrap a Function's backward: see what it takes and returns, before the engine casts, sums and checks it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Backward = Callable[..., Any]
Seen = Callable[[Backward, tuple[Any, ...], tuple[Any, ...]], None]


def watched(
    functions: Sequence[type[torch.autograd.Function]], see: Seen
) -> contextlib.AbstractContextManager[None]:
    """Call ``see(backward, arguments, results)`` for each backward of ``functions`` that runs inside the block."""
    return wrapped(functions, lambda backward: _seeing(backward, see))


@contextlib.contextmanager
def wrapped(
    functions: Sequence[type[torch.autograd.Function]], wrapper: Callable[[Backward], Backward]
) -> Iterator[None]:
    """Inside the block each of ``functions`` has ``wrapper(backward)`` as its backward."""
    changed = []
    for cls in functions:
        name = "vjp" if cls.vjp is not torch.autograd.Function.vjp else "backward"
        own = cls.__dict__.get(name)
        changed.append((cls, name, own))
        setattr(cls, name, staticmethod(wrapper(getattr(cls, name))))
    try:
        yield
    finally:
        for cls, name, own in changed:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


def _seeing(backward: Backward, see: Seen) -> Backward:
    def run(ctx: Any, *grads: Any) -> Any:
        results = backward(ctx, *grads)
        flat = results if isinstance(results, tuple | list) else (results,)
        see(backward, (ctx, *grads), tuple(flat))
        return results

    return run
