"""The local response norm: subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["LocalResponseNorm"]


class LocalResponseNorm(nn.LocalResponseNorm):
    """:class:`torch.nn.LocalResponseNorm` by :class:`manualprop.functions.LocalResponseNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
