"""Linear layers: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["Bilinear", "Identity", "LazyLinear", "Linear"]


class Bilinear(nn.Bilinear):
    """:class:`torch.nn.Bilinear` by :class:`manualprop.functions.Bilinear`."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return F.bilinear(input1, input2, self.weight, self.bias)


class Identity(nn.Identity):
    """:class:`torch.nn.Identity`: $y = x$, so $dy/dx = 1$ and the gradient passes unchanged.

    Like torch's it returns its input itself, so there is nothing to compute in either direction.
    """


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` by :class:`manualprop.functions.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LazyLinear(nn.LazyLinear):
    """:class:`torch.nn.LazyLinear`; it becomes :class:`Linear` at its first input."""

    cls_to_become = Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
