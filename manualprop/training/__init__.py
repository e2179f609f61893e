"""Training under Lightning: modules, data modules, callbacks and the command line (extra "training").

Each name is imported on first use (PEP 562): `manualprop explain` takes the digits from here without Lightning, which
takes two seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manualprop.training._errors import DivergedError as DivergedError
    from manualprop.training._errors import NonFiniteLossError as NonFiniteLossError
    from manualprop.training._errors import UserError as UserError
    from manualprop.training._files import WholeCheckpointIO as WholeCheckpointIO
    from manualprop.training.datamodules import DigitsDataModule as DigitsDataModule
    from manualprop.training.datamodules import LinearRegressionDataModule as LinearRegressionDataModule
    from manualprop.training.datamodules import TensorDataModule as TensorDataModule
    from manualprop.training.module import DescentModule as DescentModule
    from manualprop.training.networks import ConvolutionalNetwork as ConvolutionalNetwork
    from manualprop.training.networks import MultilayerPerceptron as MultilayerPerceptron

_HOMES = {
    "DivergedError": "_errors",
    "NonFiniteLossError": "_errors",
    "UserError": "_errors",
    "WholeCheckpointIO": "_files",
    "DigitsDataModule": "datamodules",
    "LinearRegressionDataModule": "datamodules",
    "TensorDataModule": "datamodules",
    "DescentModule": "module",
    "ConvolutionalNetwork": "networks",
    "MultilayerPerceptron": "networks",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'manualprop.training' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
