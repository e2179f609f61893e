"""Give the layers of an existing model their hand-derived twins, and take them back."""

from typing import TypeVar

import torch

from manualprop.nn import activation, dropout, embedding, gated, linear, loss, norm

Model = TypeVar("Model", bound=torch.nn.Module)


def _twins() -> dict[type[torch.nn.Module], type[torch.nn.Module]]:
    """{torch class: ours}, read off the base classes, so that no table can disagree with them."""
    classes = [
        c
        for family in (activation, dropout, embedding, gated, linear, loss, norm)
        for c in vars(family).values()
        if isinstance(c, type)
    ]
    ours = [c for c in classes if issubclass(c, torch.nn.Module) and c.__module__.startswith("manualprop.")]
    return {c.__bases__[0]: c for c in ours}


TWINS = _twins()


def swap(model: Model) -> Model:
    """Replace, in place, every layer of ``model`` that has a hand-derived twin in :mod:`manualprop.nn`.

    Only the class of a layer changes: parameters, buffers, hooks, names, training mode and everything that
    refers to the layer stay.  A subclass of a torch layer, and a parametrized one, is left as it is.  A model
    that is itself such a layer is swapped too.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    return _replace_classes(model, TWINS)


def unswap(model: Model) -> Model:
    """Undo :func:`swap`, in place: every layer of :mod:`manualprop.nn` becomes its torch twin.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    return _replace_classes(model, {ours: torchs for torchs, ours in TWINS.items()})


def _replace_classes(model: Model, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> Model:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module. Got {type(model).__name__}.")
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model
