"""Our functions support arguments that override torch's functions, as torch.nn.functional does.

An argument overrides them if its class defines ``__torch_function__`` (``torch.overrides``).  It gets torch's
function in torch's argument order, so that it finds the function in its tables; or ours, if torch has none.
If it only passes the call on, as a class that logs does, the hand-derived rule still runs.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from manualprop._torch import no_torch_function, torch_function_enabled

NONE_OF_ITS_OWN = (no_torch_function, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]

OFFERING = 1  # frames between a public function and its caller, for the stack level of a warning


def offered(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``ours``: arguments that override torch's functions get the call first.

    A mode (``torch.overrides.TorchFunctionMode``) does not get the call; it sees the torch calls inside.
    """
    torchs = getattr(torch.nn.functional, ours.__name__, None)

    @functools.wraps(ours)
    def offering(*args: Any, **kwargs: Any) -> Any:
        if not (has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values())))):
            return ours(*args, **kwargs)
        # Also true if a mode is active, and for a subclass that only inherits the default method.
        enabled = torch_function_enabled()
        overriding = tuple(a for a in (*args, *kwargs.values()) if enabled and overrides(type(a)))
        if not overriding:
            with answering(False):
                return ours(*args, **kwargs)
        if torchs is None or any(isinstance(a, fx.Proxy) for a in overriding):  # a graph must hold ours
            return handle_torch_function(offering, overriding, *args, **kwargs)
        with _HandOver(offering, overriding):
            return torchs(*args, **kwargs)

    offering.__module__ = __package__  # its public place, for pickle and for the code of a graph
    return offering


class _Local(threading.local):
    def __init__(self) -> None:
        """Once in each thread: torch.compile guards on the attribute, which must not appear while it traces."""
        self.answering = True


_local = _Local()


@contextmanager
def answering(on: bool) -> Iterator[None]:
    """Whether, inside, a mode of ours may give our rule for a function of torch's: not within our own functions."""
    outer, _local.answering = _local.answering, on
    try:
        yield
    finally:
        _local.answering = outer


def is_answering() -> bool:
    """Whether :func:`answering` is on."""
    return _local.answering


def overrides(cls: type) -> bool:
    """Whether a class defines its own ``__torch_function__``, beyond the default of a Tensor subclass."""
    method = getattr(cls, "__torch_function__", None)
    return method is not None and getattr(method, "__func__", method) not in NONE_OF_ITS_OWN


class _HandOver(TorchFunctionMode):
    """Gives torch's call to the arguments that override it; if one then calls torch's function, ours runs.

    So an argument gets the same function and argument order as from torch.  If it only passes the call on, it
    gets the hand-derived rule.
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
        if not any(cls in self.by_type for cls in types):
            return func(*args, **kwargs)  # torch's function offers itself to other arguments only
        for argument in (self.by_type[cls] for cls in types if cls in self.by_type):
            with self:
                answer = argument.__torch_function__(func, types, args, kwargs)
            if answer is not NotImplemented:
                return answer
        raise TypeError(
            f"no implementation found for {func.__name__!r} on types that implement __torch_function__: {list(types)}"
        )
