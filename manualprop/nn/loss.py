"""Losses: each subclasses its torch twin and replaces ``forward`` only."""

from torch import Tensor, nn

from manualprop import functional as F


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` by :class:`manualprop.functions.CrossEntropy`, or ``SoftCrossEntropy``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(nn.MSELoss):
    """:class:`torch.nn.MSELoss` by :class:`manualprop.functions.MSE`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)
