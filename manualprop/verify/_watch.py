"""See what a Function's backward takes and returns, before the engine casts, sums and checks it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Seen = Callable[[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]], None]


@contextlib.contextmanager
def watched(functions: Sequence[type[torch.autograd.Function]], see: Seen) -> Iterator[None]:
    """Call ``see(backward, arguments, results)`` for each backward of ``functions`` that runs inside the block."""
    changed = []
    for cls in functions:
        name = "vjp" if cls.vjp is not torch.autograd.Function.vjp else "backward"
        own = cls.__dict__.get(name)
        changed.append((cls, name, own))
        setattr(cls, name, staticmethod(_seeing(getattr(cls, name), see)))
    try:
        yield
    finally:
        for cls, name, own in changed:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


def _seeing(backward: Callable[..., Any], see: Seen) -> Callable[..., Any]:
    def run(ctx: Any, *grads: Any) -> Any:
        results = backward(ctx, *grads)
        flat = results if isinstance(results, tuple | list) else (results,)
        see(backward, (ctx, *grads), tuple(flat))
        return results

    return run
