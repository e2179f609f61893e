"""Drop-in modules: torch's names, constructors, ``state_dict`` and ``repr``; gradients derived by hand.

The containers of :mod:`torch.nn` are here too, so that ``from manualprop import nn`` can replace
``from torch import nn``.  A layer without a hand-derived twin is not here: take it from ``torch.nn``.
"""

from torch.nn import Module as Module
from torch.nn import ModuleDict as ModuleDict
from torch.nn import ModuleList as ModuleList
from torch.nn import Parameter as Parameter
from torch.nn import ParameterDict as ParameterDict
from torch.nn import ParameterList as ParameterList
from torch.nn import Sequential as Sequential

from manualprop.nn.activation import *
from manualprop.nn.averaging import *
from manualprop.nn.container import *
from manualprop.nn.convolution import *
from manualprop.nn.dropout import *
from manualprop.nn.embedding import *
from manualprop.nn.fused import *
from manualprop.nn.fusing import *
from manualprop.nn.gated import *
from manualprop.nn.interpolation import *
from manualprop.nn.linear import *
from manualprop.nn.local_response import *
from manualprop.nn.loss import *
from manualprop.nn.norm import *
from manualprop.nn.padding import *
from manualprop.nn.pooling import *
from manualprop.nn.shuffle import *
