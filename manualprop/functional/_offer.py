"""Functions offer themselves to the arguments that override torch's functions, as those of torch.nn.functional do.

An argument overrides them if its class has a ``__torch_function__`` of its own (``torch.overrides``).  It is handed
torch's function, with torch's arrangement of the arguments, so that it finds in its tables what it looks for; or ours,
where torch has none.  If it only passes the call on, as a class that logs does, the hand-derived rule still runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from manualprop._torch import no_torch_function, torch_function_enabled

NONE_OF_ITS_OWN = (no_torch_function, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]

OFFERING = 1  # frames between a public function and its caller, for the stack level of a warning


def offered(ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours``, which is first offered to those of its arguments that override torch's functions.

    A mode (``torch.overrides.TorchFunctionMode``) is offered nothing: it sees the calls of torch within.
    """
    torchs = getattr(torch.nn.functional, ours.__name__, None)

    @functools.wraps(ours)
    def offering(*args: Any, **kwargs: Any) -> Any:
        if not (has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values())))):
            return ours(*args, **kwargs)
        # True also where a mode is active, and for a subclass that has the method of every subclass alone.
        enabled = torch_function_enabled()
        overriding = tuple(a for a in (*args, *kwargs.values()) if enabled and overrides(type(a)))
        if not overriding:
            return ours(*args, **kwargs)
        if torchs is None or any(isinstance(a, fx.Proxy) for a in overriding):  # a graph is to hold ours
            return handle_torch_function(offering, overriding, *args, **kwargs)
        with _HandOver(offering, overriding):
            return torchs(*args, **kwargs)

    offering.__module__ = __package__  # where it is found: for pickle, and for the code of a graph
    return offering


def overrides(cls: type) -> bool:
    """Whether a class has a ``__torch_function__`` of its own, not only that of every subclass of Tensor."""
    method = getattr(cls, "__torch_function__", None)
    return method is not None and getattr(method, "__func__", method) not in NONE_OF_ITS_OWN


class _HandOver(TorchFunctionMode):
    """Hands what torch's function offers first to the arguments that override it; to call that is to call ours.

    So an argument gets the very function and arrangement that torch would give it, and one that only passes the call
    on gets the hand-derived rule.
    """

    def __init__(self, ours: Callable[..., Any], overriding: tuple[Any, ...]) -> None:
        super().__init__()
        self.ours, self.by_type = ours, {type(a): a for a in overriding}
        self.torchs: Any = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.torchs is not None:
            return (self.ours if func == self.torchs else func)(*args, **kwargs)
        self.torchs = func
        for argument in (self.by_type[cls] for cls in types if cls in self.by_type):
            with self:
                answer = argument.__torch_function__(func, types, args, kwargs)
            if answer is not NotImplemented:
                return answer
        raise TypeError(
            f"no implementation found for {func.__name__!r} on types that implement __torch_function__: {list(types)}"
        )
