"""Activations with a second argument: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["GLU", "PReLU", "RReLU"]


class GLU(nn.GLU):
    """:class:`torch.nn.GLU` by :class:`manualprop.functions.GLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)


class PReLU(nn.PReLU):
    """:class:`torch.nn.PReLU` by :class:`manualprop.functions.PReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight)


class RReLU(nn.RReLU):
    """:class:`torch.nn.RReLU` by :class:`manualprop.functions.RReLU`, or in evaluation ``LeakyReLU``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.rrelu(input, self.lower, self.upper, self.training, self.inplace)
