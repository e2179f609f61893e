"""Losses: each subclasses its torch twin and replaces only ``forward``."""

import warnings

from torch import Tensor, nn

from manualprop import _torch
from manualprop import functional as F

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelMarginLoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "NLLLoss2d",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
]


class BCELoss(nn.BCELoss):
    """:class:`torch.nn.BCELoss` by :class:`manualprop.functions.BCE`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss` by ``BCEWithLogits``, or ``BCEWithPosWeight``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class CosineEmbeddingLoss(nn.CosineEmbeddingLoss):
    """:class:`torch.nn.CosineEmbeddingLoss` by :class:`manualprop.functions.CosineEmbedding`."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` by :class:`manualprop.functions.CrossEntropy`, or ``SoftCrossEntropy``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """:class:`torch.nn.GaussianNLLLoss` by :class:`manualprop.functions.GaussianNLL`."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return F.gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)


class HingeEmbeddingLoss(nn.HingeEmbeddingLoss):
    """:class:`torch.nn.HingeEmbeddingLoss` by :class:`manualprop.functions.HingeEmbedding`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class HuberLoss(nn.HuberLoss):
    """:class:`torch.nn.HuberLoss` by :class:`manualprop.functions.Huber`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class KLDivLoss(nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss` by :class:`manualprop.functions.KLDiv`, or ``KLDivLogTarget``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class L1Loss(nn.L1Loss):
    """:class:`torch.nn.L1Loss` by :class:`manualprop.functions.L1`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class LinearCrossEntropyLoss(_torch.LinearCrossEntropyLoss):
    """:class:`torch.nn.LinearCrossEntropyLoss` by :class:`manualprop.functions.LinearCrossEntropy`.

    With ``options``, the gradient is made in the forward pass, by ``LinearCrossEntropyOnce``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape((*shape, self.linear.in_features)),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )


class MSELoss(nn.MSELoss):
    """:class:`torch.nn.MSELoss` by :class:`manualprop.functions.MSE`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class MarginRankingLoss(nn.MarginRankingLoss):
    """:class:`torch.nn.MarginRankingLoss` by :class:`manualprop.functions.MarginRanking`."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.margin_ranking_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class MultiLabelMarginLoss(nn.MultiLabelMarginLoss):
    """:class:`torch.nn.MultiLabelMarginLoss` by :class:`manualprop.functions.MultiLabelMargin`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.multilabel_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """:class:`torch.nn.MultiLabelSoftMarginLoss` by :class:`manualprop.functions.MultiLabelSoftMargin`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.multilabel_soft_margin_loss(input, target, weight=self.weight, reduction=self.reduction)


class MultiMarginLoss(nn.MultiMarginLoss):
    """:class:`torch.nn.MultiMarginLoss` by :class:`manualprop.functions.MultiMargin`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction
        )


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss` by :class:`manualprop.functions.NLL`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


with warnings.catch_warnings():
    # torch warns when its class is subclassed; ours warns when it is used.
    warnings.simplefilter("ignore", FutureWarning)

    class NLLLoss2d(nn.NLLLoss2d):
        """``torch.nn.NLLLoss2d`` (deprecated in favour of ``NLLLoss``) by :class:`manualprop.functions.NLL`."""

        # Without annotations, like the signature that torch's decorator leaves.
        def __init__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            warnings.warn(
                "`NLLLoss2d` has been deprecated. Please use `NLLLoss` instead as a drop-in replacement.",
                FutureWarning,
                stacklevel=2,
            )
            super().__init__(*args, **kwargs)

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return F.nll_loss(
                input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
            )


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """:class:`torch.nn.PoissonNLLLoss` by :class:`manualprop.functions.PoissonNLL`, or ``PoissonNLLFromRate``."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return F.poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )


class SmoothL1Loss(nn.SmoothL1Loss):
    """:class:`torch.nn.SmoothL1Loss` by :class:`manualprop.functions.SmoothL1`, or ``L1``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class SoftMarginLoss(nn.SoftMarginLoss):
    """:class:`torch.nn.SoftMarginLoss` by :class:`manualprop.functions.SoftMargin`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.soft_margin_loss(input, target, reduction=self.reduction)


class TripletMarginLoss(nn.TripletMarginLoss):
    """:class:`torch.nn.TripletMarginLoss` by ``PairwiseDistance`` and :class:`manualprop.functions.TripletMargin`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class TripletMarginWithDistanceLoss(nn.TripletMarginWithDistanceLoss):
    """:class:`torch.nn.TripletMarginWithDistanceLoss` by :class:`manualprop.functions.TripletMargin`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


LinearCrossEntropy = LinearCrossEntropyLoss  # a shorter name
