"""Linear layers: each subclasses its torch twin and replaces ``forward`` only."""

from torch import Tensor, nn

from manualprop import functional as F


class Identity(nn.Identity):
    """:class:`torch.nn.Identity`: $y = x$, so $dy/dx = 1$ and the gradient that arrives is handed on as it is.

    Like torch's it returns the very tensor it was given, so there is nothing to compute in either direction.
    """


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` by :class:`manualprop.functions.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
