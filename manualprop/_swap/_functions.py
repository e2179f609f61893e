"""Torch's functions run our rules within a model's ``forward``: the mode, and how a model gets it.

An attribute ``forward`` on the instance, which is picklable, calls the forward of the class in the mode.  So the class
and the ``repr`` stay, an exception leaves nothing behind, and a copy of the model gets an attribute of its own.  Hooks
would not enclose a call of ``model.forward`` itself, and ``Backprop`` refuses them.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Container
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manualprop import functional
from manualprop._torch import arguments_of_aten, results_of_aten
from manualprop.functional._offer import answering, is_answering

FORWARD = "forward"
NAMES = [name for name, f in vars(functional).items() if isinstance(f, types.FunctionType) and name[0] != "_"]

# ----- which function of torch is which of ours -----

# torch.relu and Tensor.relu have the arguments of ATen's operator: some have other names than in torch.nn.functional.
OTHER_NAMES = {"self": "input", "train": "training"}
OF_A_LIBRARY = ("cudnn_enable", "cudnn_enabled")  # which kernel to take


def _counterparts() -> dict[Any, Callable[..., Any]]:
    """{torch's function: ours that takes its place}, from the names of :mod:`manualprop.functional` alone."""
    found: dict[Any, Callable[..., Any]] = {}
    for name in NAMES:
        ours = getattr(functional, name)
        options = inspect.signature(ours).parameters
        forms = {name: ours}
        if "return_indices" in options:
            forms[f"{name}_with_indices"] = _with_places(ours)
        for form, its in forms.items():
            _add(found, torch.nn.functional, form, its)
        for home in (torch, Tensor):
            if hasattr(home, name) and _has_arguments_of_aten(ours, name):
                _add(found, home, name, _by_arguments_of_aten(ours, name, getattr(home, name)))
        if "inplace" in options:
            in_place = functools.partial(ours, inplace=True)
            for home in (torch.nn.functional, torch, Tensor):
                _add(found, home, f"{name}_", in_place)
    return found


def _add(found: dict[Any, Callable[..., Any]], home: Any, name: str, ours: Callable[..., Any]) -> None:
    if hasattr(home, name):
        found.setdefault(getattr(home, name), ours)


def _with_places(ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` with the places of the maxima; torch's functions hand ``return_indices=False`` on, their default."""

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs | {"return_indices": True})

    return call


def _has_arguments_of_aten(ours: Callable[..., Any], name: str) -> bool:
    """Not where ATen's are others: the weight before the indices, a number for a reduction."""
    arguments, known = arguments_of_aten(name), inspect.signature(ours).parameters
    needed = {OTHER_NAMES.get(argument, argument) for argument, is_needed in arguments if is_needed}
    return bool(arguments) and "reduction" not in dict(arguments) and needed <= {*known, *OF_A_LIBRARY}


def _by_arguments_of_aten(
    ours: Callable[..., Any], name: str, torchs: Callable[..., Any]
) -> Callable[..., Any]:
    """``ours``, called with ATen's arguments; ``torchs`` for a call with others (``out``, a generator)."""
    if results_of_aten(name) == 2:
        ours = _with_places(ours)
    names = [OTHER_NAMES.get(argument, argument) for argument, _ in arguments_of_aten(name)]
    known = {*inspect.signature(ours).parameters, *OF_A_LIBRARY}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | {OTHER_NAMES.get(k, k): v for k, v in kwargs.items()}
        if not given.keys() <= known or len(args) > len(names):
            return torchs(*args, **kwargs)
        return ours(**{k: v for k, v in given.items() if k not in OF_A_LIBRARY})

    return call


COUNTERPARTS = _counterparts()

# ----- the mode -----


class HandRules(TorchFunctionMode):
    """Inside, torch's functions run our rules, except where :func:`answering` is off: within our own functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = COUNTERPARTS.get(func) if is_answering() else None
        return (func if ours is None else ours)(*args, **(kwargs or {}))


class Forward:
    """The forward of a module's class, in which torch's functions run our rules if ``on``, or torch's own."""

    def __init__(self, module: nn.Module, on: bool) -> None:
        self._module, self.on = (
            weakref.ref(module),
            on,
        )  # a reference would be a cycle, which frees memory late

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        with HandRules() if self.on else nullcontext(), answering(self.on):
            return type(module).forward(module, *args, **kwargs)

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(
                "forward: its model must be alive. Got none: keep the model, not its forward."
            )
        return module

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's forward, for libraries that look."""
        return inspect.signature(types.MethodType(type(self.module).forward, self.module))

    def __getattr__(self, name: str) -> Any:
        """What else belongs to a method, such as the ``__code__`` that torch.export reads."""
        return getattr(types.MethodType(type(self.module).forward, self.module), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.module, self.on)  # a copy of the module is what the copy refers to


def own_forward(module: nn.Module) -> Forward | None:
    """The attribute of :class:`Forward`, if the module has one."""
    found = vars(module).get(FORWARD)
    return found if isinstance(found, Forward) else None


# ----- where it applies -----


def switches(
    model: nn.Module, chosen: Container[nn.Module], is_plain: Callable[[nn.Module], bool]
) -> dict[nn.Module, bool]:
    """The modules that get a :class:`Forward`, and whether it is on.

    Each chosen module gets one, not the outermost alone: a checkpoint calls a part of the model again, and a user may.
    ``is_plain`` says of which module the forward calls nothing, or our functions only.  A module that is not
    chosen, inside one that is, gets one that is off.
    """
    within: dict[nn.Module, bool] = {}
    for module in model.modules():
        for child in module.children():
            within[child] = within.get(child, False) or module in chosen
    found = {}
    for module in model.modules():
        if own_forward(module) is None and FORWARD in vars(module):
            continue  # replaced by someone else
        if module in chosen and not is_plain(module):
            found[module] = True
        elif module not in chosen and within.get(module, False):
            found[module] = False
    return found


def running_ours(model: nn.Module) -> set[nn.Module]:
    """The modules in whose forward torch's functions run our rules, wherever in the model they are called."""
    found: set[nn.Module] = set()
    others: set[nn.Module] = set()
    waiting = [(model, False)]
    while waiting:
        module, on = waiting.pop()
        own = own_forward(module)
        on = on if own is None else own.on
        if module not in (where := found if on else others):
            where.add(module)
            waiting += [(child, on) for child in module.children()]
    return found - others
