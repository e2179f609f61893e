"""The mathematics: one hand-derived :class:`torch.autograd.Function` for each function, by family."""

from manualprop import _torch as _torch  # warns of an untested version
from manualprop.functions._elementwise import Elementwise as Elementwise
from manualprop.functions._rule import Rule as Rule
from manualprop.functions.activation import *
from manualprop.functions.averaging import *
from manualprop.functions.binary_cross_entropy import *
from manualprop.functions.convolution import *
from manualprop.functions.cross_entropy import *
from manualprop.functions.dropout import *
from manualprop.functions.embedding import *
from manualprop.functions.fused import *
from manualprop.functions.gated import *
from manualprop.functions.interpolation import *
from manualprop.functions.likelihood import *
from manualprop.functions.linear import *
from manualprop.functions.local_response import *
from manualprop.functions.loss import *
from manualprop.functions.margin import *
from manualprop.functions.norm import *
from manualprop.functions.packed import *
from manualprop.functions.padding import *
from manualprop.functions.piecewise import *
from manualprop.functions.pooling import *
from manualprop.functions.shuffle import *
from manualprop.functions.softmax import *
