"""Drop-in modules: torch's names, constructors, ``state_dict`` and ``repr``; gradients derived by hand.

The containers of :mod:`torch.nn` are here too, so that ``from manualprop import nn`` can stand where
``from torch import nn`` stood.  A layer that has no hand-derived twin is not: take it from ``torch.nn``.
"""

from torch.nn import Flatten as Flatten
from torch.nn import Module as Module
from torch.nn import ModuleDict as ModuleDict
from torch.nn import ModuleList as ModuleList
from torch.nn import Parameter as Parameter
from torch.nn import ParameterDict as ParameterDict
from torch.nn import ParameterList as ParameterList
from torch.nn import Sequential as Sequential
from torch.nn import Unflatten as Unflatten

from manualprop.nn.activation import CELU as CELU
from manualprop.nn.activation import ELU as ELU
from manualprop.nn.activation import GELU as GELU
from manualprop.nn.activation import SELU as SELU
from manualprop.nn.activation import Hardshrink as Hardshrink
from manualprop.nn.activation import Hardsigmoid as Hardsigmoid
from manualprop.nn.activation import Hardswish as Hardswish
from manualprop.nn.activation import Hardtanh as Hardtanh
from manualprop.nn.activation import LeakyReLU as LeakyReLU
from manualprop.nn.activation import LogSigmoid as LogSigmoid
from manualprop.nn.activation import LogSoftmax as LogSoftmax
from manualprop.nn.activation import Mish as Mish
from manualprop.nn.activation import ReLU as ReLU
from manualprop.nn.activation import ReLU6 as ReLU6
from manualprop.nn.activation import Sigmoid as Sigmoid
from manualprop.nn.activation import SiLU as SiLU
from manualprop.nn.activation import Softmax as Softmax
from manualprop.nn.activation import Softmax2d as Softmax2d
from manualprop.nn.activation import Softmin as Softmin
from manualprop.nn.activation import Softplus as Softplus
from manualprop.nn.activation import Softshrink as Softshrink
from manualprop.nn.activation import Softsign as Softsign
from manualprop.nn.activation import Tanh as Tanh
from manualprop.nn.activation import Tanhshrink as Tanhshrink
from manualprop.nn.activation import Threshold as Threshold
from manualprop.nn.container import Parallel as Parallel
from manualprop.nn.container import Residual as Residual
from manualprop.nn.dropout import AlphaDropout as AlphaDropout
from manualprop.nn.dropout import Dropout as Dropout
from manualprop.nn.dropout import Dropout1d as Dropout1d
from manualprop.nn.dropout import Dropout2d as Dropout2d
from manualprop.nn.dropout import Dropout3d as Dropout3d
from manualprop.nn.dropout import FeatureAlphaDropout as FeatureAlphaDropout
from manualprop.nn.embedding import Embedding as Embedding
from manualprop.nn.gated import GLU as GLU
from manualprop.nn.gated import PReLU as PReLU
from manualprop.nn.gated import RReLU as RReLU
from manualprop.nn.linear import Bilinear as Bilinear
from manualprop.nn.linear import Identity as Identity
from manualprop.nn.linear import LazyLinear as LazyLinear
from manualprop.nn.linear import Linear as Linear
from manualprop.nn.loss import BCELoss as BCELoss
from manualprop.nn.loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from manualprop.nn.loss import CosineEmbeddingLoss as CosineEmbeddingLoss
from manualprop.nn.loss import CrossEntropyLoss as CrossEntropyLoss
from manualprop.nn.loss import GaussianNLLLoss as GaussianNLLLoss
from manualprop.nn.loss import HingeEmbeddingLoss as HingeEmbeddingLoss
from manualprop.nn.loss import HuberLoss as HuberLoss
from manualprop.nn.loss import KLDivLoss as KLDivLoss
from manualprop.nn.loss import L1Loss as L1Loss
from manualprop.nn.loss import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from manualprop.nn.loss import MarginRankingLoss as MarginRankingLoss
from manualprop.nn.loss import MSELoss as MSELoss
from manualprop.nn.loss import MultiLabelMarginLoss as MultiLabelMarginLoss
from manualprop.nn.loss import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
from manualprop.nn.loss import MultiMarginLoss as MultiMarginLoss
from manualprop.nn.loss import NLLLoss as NLLLoss
from manualprop.nn.loss import NLLLoss2d as NLLLoss2d
from manualprop.nn.loss import PoissonNLLLoss as PoissonNLLLoss
from manualprop.nn.loss import SmoothL1Loss as SmoothL1Loss
from manualprop.nn.loss import SoftMarginLoss as SoftMarginLoss
from manualprop.nn.loss import TripletMarginLoss as TripletMarginLoss
from manualprop.nn.loss import TripletMarginWithDistanceLoss as TripletMarginWithDistanceLoss
from manualprop.nn.norm import BatchNorm1d as BatchNorm1d
from manualprop.nn.norm import BatchNorm2d as BatchNorm2d
from manualprop.nn.norm import BatchNorm3d as BatchNorm3d
from manualprop.nn.norm import GroupNorm as GroupNorm
from manualprop.nn.norm import InstanceNorm1d as InstanceNorm1d
from manualprop.nn.norm import InstanceNorm2d as InstanceNorm2d
from manualprop.nn.norm import InstanceNorm3d as InstanceNorm3d
from manualprop.nn.norm import LayerNorm as LayerNorm
from manualprop.nn.norm import LazyBatchNorm1d as LazyBatchNorm1d
from manualprop.nn.norm import LazyBatchNorm2d as LazyBatchNorm2d
from manualprop.nn.norm import LazyBatchNorm3d as LazyBatchNorm3d
from manualprop.nn.norm import RMSNorm as RMSNorm

LinearCrossEntropy = LinearCrossEntropyLoss  # its short name
