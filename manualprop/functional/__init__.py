"""Hand-derived functions with the names, signatures and defaults of :mod:`torch.nn.functional`.

Each function checks its arguments, applies a rule of :mod:`manualprop.functions`, and reduces the result or
writes it back.  A wrong call raises the same exception as in torch, often from torch's own forward.
"""

import inspect

import torch

from manualprop.functional._offer import offered as _offered
from manualprop.functional.activation import *
from manualprop.functional.averaging import *
from manualprop.functional.convolution import *
from manualprop.functional.dropout import *
from manualprop.functional.embedding import *
from manualprop.functional.fused import *
from manualprop.functional.gated import *
from manualprop.functional.interpolation import *
from manualprop.functional.linear import *
from manualprop.functional.linear_cross_entropy import *
from manualprop.functional.local_response import *
from manualprop.functional.loss import *
from manualprop.functional.margin import *
from manualprop.functional.norm import *
from manualprop.functional.padding import *
from manualprop.functional.pooling import *
from manualprop.functional.shuffle import *

for _name, _function in [(name, f) for name, f in globals().items() if inspect.isfunction(f)]:
    if not _name.startswith("_"):
        globals()[_name] = _offered(_function)
        # ``torch.fx.symbolic_trace`` records a call of any of these as one node, as for torch.nn.functional.
        # It must not trace inside, where shapes are compared.
        torch.fx.wrap(_name)
