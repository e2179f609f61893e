"""Training under Lightning: modules, data modules, callbacks and the command line (extra "training")."""

from manualprop.training._errors import DivergedError as DivergedError
from manualprop.training._errors import NonFiniteLossError as NonFiniteLossError
from manualprop.training._errors import UserError as UserError
from manualprop.training._files import WholeCheckpointIO as WholeCheckpointIO
from manualprop.training.datamodules import DigitsDataModule as DigitsDataModule
from manualprop.training.datamodules import LinearRegressionDataModule as LinearRegressionDataModule
from manualprop.training.datamodules import TensorDataModule as TensorDataModule
from manualprop.training.module import DescentModule as DescentModule
from manualprop.training.networks import MultilayerPerceptron as MultilayerPerceptron
