"""Embedding: subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = ["Embedding"]


class Embedding(nn.Embedding):
    """:class:`torch.nn.Embedding` by :class:`manualprop.functions.Embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
