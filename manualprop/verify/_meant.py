"""A surrogate that detaches: ``x + (x.round() - x).detach()``.  Its derivative is autograd's; differences find another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manualprop.verify._numeric import Evaluate, flat

Function = Callable[..., Sequence[Tensor]]


class Detaching:
    """A surrogate whose derivative is autograd's."""

    def __init__(self, surrogate: Callable[..., Any]) -> None:
        self.surrogate = surrogate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.surrogate(*args, **kwargs)


def pushed(fn: Function, points: Sequence[Tensor], directions: Sequence[Tensor | None]) -> Tensor:
    """The derivative of ``fn`` in ``directions`` by autograd, flat.

    The gradients are linear in grad_output, u: the derivative in u of their product with the directions is it.
    """
    with torch.enable_grad():
        x = [p.detach().clone().requires_grad_() for p in points]
        y = list(fn(*x))
        u = [torch.zeros_like(t, requires_grad=True) for t in y]
        live = [(t, w) for t, w in zip(y, u, strict=True) if t.requires_grad]
        if not live:
            return torch.zeros_like(flat(y))
        outputs, weights = zip(*live, strict=True)
        found = torch.autograd.grad(outputs, x, weights, create_graph=True, allow_unused=True)
        terms = [
            (g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None and d is not None
        ]
        total = sum(terms, torch.zeros(()))
        if not total.requires_grad:
            return torch.zeros_like(flat(y))
        return flat(torch.autograd.grad(total, u, materialize_grads=True, allow_unused=True))


def straight(fn: Function, points: Sequence[Tensor], directions: Sequence[Tensor | None]) -> Evaluate:
    """A line that has the slope of ``fn`` in ``directions``, and its value at 0."""
    with torch.no_grad():
        here = flat(fn(*points))
    slope = pushed(fn, points, directions)
    return lambda t: here + t * slope
