"""Hand-derived backpropagation for PyTorch: drop-in layers whose gradients were worked out on paper."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if __name__ != "manualprop":  # the folder of the repository was found for the package
    _folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    raise ImportError(
        f"manualprop: the folder {_folder!r} holds the repository, and hides the package in it. "
        f"Run from another folder, or install it: pip install -e {_folder}"
    )

if TYPE_CHECKING:
    from manualprop import descent as descent
    from manualprop import functional as functional
    from manualprop import functions as functions
    from manualprop import interop as interop
    from manualprop import nn as nn
    from manualprop import verify as verify
    from manualprop._backprop import Backprop as Backprop
    from manualprop._explain import explain as explain
    from manualprop._practice import practice as practice
    from manualprop._receipt import receipt as receipt
    from manualprop._swap import swap as swap
    from manualprop._swap import unswap as unswap
    from manualprop.functions._execution._kernels import kernels as kernels

_MODULES = ("descent", "functional", "functions", "interop", "nn", "verify")
_NAMES = {
    "Backprop": "manualprop._backprop",
    "explain": "manualprop._explain",
    "kernels": "manualprop.functions._execution._kernels",
    "practice": "manualprop._practice",
    "receipt": "manualprop._receipt",
    "swap": "manualprop._swap",
    "unswap": "manualprop._swap",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): the command line and the pytest plugin answer without torch."""
    if name in _MODULES:
        return importlib.import_module(f"manualprop.{name}")
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return value
    raise AttributeError(f"module 'manualprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
