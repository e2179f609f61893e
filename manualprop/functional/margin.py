"""Margin losses with the names, signatures and defaults of :mod:`torch.nn.functional`: checks and reductions."""

from collections.abc import Callable

import torch
from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex
from manualprop.functional._reduction import (
    alike,
    legacy_reduction,
    loss_dtype,
    promoted,
    reduced_loss,
    refuse_gradient,
)

__all__ = [
    "cosine_embedding_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.hinge_embedding_loss`, by :class:`manualprop.functions.HingeEmbedding`.

    Shape:
        ``input``, ``target`` alike, or broadcastable; ``target`` holds labels 1 and -1.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("hinge_embedding_loss", input, target)
    x, t = torch.broadcast_tensors(input, target.detach())
    return reduced_loss(rules.HingeEmbedding.apply(x, t, margin), reduction, loss_dtype(input))


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.soft_margin_loss`, by :class:`manualprop.functions.SoftMargin`.

    Shape:
        ``input``, ``target`` alike, or broadcastable; ``target`` holds labels 1 and -1.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("soft_margin_loss", input, target)
    refuse_gradient("soft_margin_loss", target=target)
    x, t = alike(input, target)
    return reduced_loss(rules.SoftMargin.apply(x, t), reduction, loss_dtype(x))


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.margin_ranking_loss`, by :class:`manualprop.functions.MarginRanking`.

    Shape:
        All alike, or broadcastable with the same number of axes; ``target`` holds labels 1 and -1.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if input1.dim() != input2.dim() or input1.dim() != target.dim():
        raise RuntimeError(
            f"margin_ranking_loss : All input tensors should have same dimension but got sizes: "
            f"input1: {input1.size()}, input2: {input2.size()}, target: {target.size()} "
        )
    refuse_complex("margin_ranking_loss", input1, input2, target)
    a, b, t = alike(input1, input2, target)
    return reduced_loss(rules.MarginRanking.apply(a, b, t, margin), reduction, loss_dtype(a))


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.cosine_embedding_loss`, by :class:`manualprop.functions.CosineEmbedding`.

    Shape:
        ``input1``, ``input2`` (N, D) and ``target`` (N,), or (D,) and (); ``target`` holds labels 1 and -1.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("cosine_embedding_loss", input1, input2)
    a, b = promoted(input1, input2)
    if a.shape != b.shape or a.shape[:-1] != target.shape:
        a, b = torch.broadcast_tensors(a, b)
        if target.dim() == 1 and a.dim() == 2:
            a, b = (v.expand(max(v.shape[0], target.shape[0]), -1) for v in (a, b))
    loss = rules.CosineEmbedding.apply(a, b, target.detach(), margin)
    return reduced_loss(loss, reduction, loss_dtype(a))


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.triplet_margin_loss`, by ``PairwiseDistance`` and ``TripletMargin``.

    Shape:
        All (N, D) or (D,), or broadcastable with the same number of axes.

    Raises:
        ValueError: if ``margin`` is not positive.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    if not anchor.dim() == positive.dim() == negative.dim():
        raise RuntimeError(
            "The anchor, positive, and negative tensors are expected to have the same number of dimensions, "
            f"but got: anchor {anchor.dim()}D, positive {positive.dim()}D, and negative {negative.dim()}D inputs"
        )
    refuse_complex("triplet_margin_loss", anchor, positive, negative)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        output: Tensor = rules.PairwiseDistance.apply(*alike(a, b), p, eps)
        return output

    loss, _ = _triplet_margin(distance, anchor, positive, negative, margin, swap)
    return reduced_loss(loss, reduction, loss_dtype(anchor))


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.triplet_margin_with_distance_loss`, by ``TripletMargin``.

    A given ``distance_function`` is differentiated by autograd; the default is ``PairwiseDistance``.

    Raises:
        ValueError: if ``margin`` is not positive.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if distance_function is None:
        return triplet_margin_loss(anchor, positive, negative, margin, swap=swap, reduction=reduction)
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    if not anchor.ndim == positive.ndim == negative.ndim:
        raise RuntimeError(
            "The anchor, positive, and negative tensors are expected to have the same number of dimensions, "
            f"but got: anchor {anchor.ndim}D, positive {positive.ndim}D, and negative {negative.ndim}D inputs"
        )
    loss, distance = _triplet_margin(distance_function, anchor, positive, negative, margin, swap)
    return reduced_loss(loss, reduction, loss_dtype(distance))  # real, even for complex input


def _triplet_margin(
    distance: Callable[[Tensor, Tensor], Tensor],
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    swap: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the distance between anchor and positive."""
    p, n = distance(anchor, positive), distance(anchor, negative)
    n2 = distance(positive, negative) if swap else n
    p, n, n2 = alike(p, n, n2)
    return rules.TripletMargin.apply(p, n, n2, margin), p


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.multi_margin_loss`, by :class:`manualprop.functions.MultiMargin`.

    Shape:
        ``input`` (N, C) or (C,); ``target`` classes (N,), () or (1,); ``weight`` (C,)

    Raises:
        ValueError: if ``p`` is not 1 or 2, or ``weight`` is not one-dimensional.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    if p not in (1, 2):
        raise ValueError("only p == 1 and p == 2 supported")
    if weight is not None and weight.dim() != 1:
        raise ValueError("weight must be one-dimensional")
    refuse_complex("multi_margin_loss", input)
    refuse_gradient("multi_margin_loss", weight=weight)
    if input.dim() == 0:
        input = input.reshape(1)
    loss = rules.MultiMargin.apply(input, target, p, margin, weight)
    return reduced_loss(loss, reduction, loss_dtype(input))


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.multilabel_margin_loss`, by :class:`manualprop.functions.MultiLabelMargin`.

    Shape:
        ``input`` and ``target`` (N, C) or (C,); ``target`` has the target classes first, then a -1.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("multilabel_margin_loss", input)
    if input.dim() == target.dim() == 0:
        input, target = input.reshape(1), target.reshape(1)
    return reduced_loss(rules.MultiLabelMargin.apply(input, target), reduction, loss_dtype(input))


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Like :func:`torch.nn.functional.multilabel_soft_margin_loss`, by :class:`manualprop.functions.MultiLabelSoftMargin`.

    It is the binary cross-entropy of each class, averaged over the classes.

    Shape:
        ``input``, ``target`` (N, ..., C), alike or broadcastable; ``weight`` (C,)
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    refuse_complex("multilabel_soft_margin_loss", input, target)
    x, t = alike(input, target)
    loss = rules.MultiLabelSoftMargin.apply(x, t)
    dtype = x.dtype
    if weight is not None:
        loss, dtype = loss * weight, torch.promote_types(dtype, weight.dtype)
    last = input.dim() - 1
    return reduced_loss(loss.sum(last) / input.size(last), reduction, dtype)
