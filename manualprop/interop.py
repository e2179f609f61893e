"""Registers our layers with libraries that look a layer up by its exact class; one call for each library.

Such a library has a table with an entry for ``torch.nn.Linear``, but none for a subclass.  Our layers have
the inputs, outputs and parameters of their torch twins, so the entry of the twin is right for them.  A call
may be repeated, and does not change an entry that already exists for our classes.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from manualprop._swap import TWINS

Classes = tuple[type[nn.Module], ...]


def register_opacus() -> Classes:
    """Register our layers with Opacus, with their torch twins' samplers of per-sample gradients and norms.

    They get the validators and fixers too.  Without these, Opacus would accept our batch norm, which mixes
    the examples of a batch and so breaks the promised privacy.

    Returns:
        our classes that have a sampler in Opacus.

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
    """Register our layers with BackPACK: every extension made from now on treats them like their torch twins.

    Returns:
        our classes that BackPACK's ``BatchGrad`` now supports; other extensions support others.

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
    """Add our class for each torch class in ``table``; return our classes that are in it afterwards."""
    for torchs, ours in TWINS.items():
        if torchs in table:
            table.setdefault(ours, table[torchs])
    return tuple(ours for ours in TWINS.values() if ours in table)
