"""A backward pass that gives away, or writes over, what was saved: it serves once, and is not differentiated."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once(refusal: Callable[[str], str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a rule's backward run one time, and not in grad mode; ``refusal`` makes the error of what was asked for.

    Raises:
        RuntimeError: by the backward, for a second pass and for ``create_graph=True``.
    """

    def marked(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def first(ctx: Any, *g: Any) -> Any:
            if getattr(ctx, "served", False):
                raise RuntimeError(refusal("a second pass"))
            if torch.is_grad_enabled():
                raise RuntimeError(refusal("create_graph=True"))
            ctx.served = True
            return backward(ctx, *g)

        return first

    return marked
