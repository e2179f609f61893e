"""Make our layers known to libraries that look a layer up by its exact class, one call each.

Such a library finds the rule for ``torch.nn.Linear`` in a table, and finds nothing for a subclass, however alike.
Ours have the inputs, outputs and parameters of their torch twins, so what the library knows of the twin holds.
Each call may be made any number of times, and leaves alone what somebody registered for our classes before.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from manualprop._swap import TWINS

Classes = tuple[type[nn.Module], ...]


def register_opacus() -> Classes:
    """Give Opacus, for our layers, the samplers of per-sample gradients and norms of their torch twins.

    The validators and fixers too: without them Opacus would let our batch norm pass, which mixes the examples of a
    batch and so voids the privacy that is promised.

    Returns:
        our classes that Opacus has a sampler for.

    Raises:
        ImportError: if Opacus is not installed.
    """
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.validators import ModuleValidator

    fast = GradSampleModuleFastGradientClipping
    for table in (ModuleValidator.VALIDATORS, ModuleValidator.FIXERS, fast.GRAD_SAMPLERS, fast.NORM_SAMPLERS):
        _give_ours(table)
    return _give_ours(GradSampleModule.GRAD_SAMPLERS)


def register_backpack() -> Classes:
    """Give every BackPACK extension that is made from now on, for our layers, what it has for their torch twins.

    Returns:
        our classes that BackPACK's ``BatchGrad`` knows from now on; other extensions know others.

    Raises:
        ImportError: if BackPACK is not installed.
    """
    from backpack.extensions import BatchGrad
    from backpack.extensions.backprop_extension import BackpropExtension

    make: Callable[..., None] = BackpropExtension.__init__
    if not hasattr(make, "knows_manualprop"):

        @functools.wraps(make)
        def make_with_ours(
            self: Any, savefield: str, module_exts: dict[Any, Any], *args: Any, **kwargs: Any
        ) -> None:
            module_exts = dict(module_exts)
            self.manualprop_classes = _give_ours(module_exts)
            make(self, savefield, module_exts, *args, **kwargs)

        make_with_ours.knows_manualprop = True  # type: ignore[attr-defined]
        BackpropExtension.__init__ = make_with_ours
    classes: Classes = BatchGrad().manualprop_classes
    return classes


def _give_ours(table: dict[Any, Any]) -> Classes:
    """Enter our class beside each torch class that ``table`` knows; return ours that it knows then."""
    for torchs, ours in TWINS.items():
        if torchs in table:
            table.setdefault(ours, table[torchs])
    return tuple(ours for ours in TWINS.values() if ours in table)
