"""Rows of the losses."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases._case import Case, real

REDUCTIONS = ("none", "sum", "mean")
FLOATS = 8  # bytes


def classes(*shape: int, high: int = 4) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def labels(*shape: int) -> Tensor:
    """1 and -1."""
    return classes(*shape, high=2) * 2.0 - 1


def weights(*shape: int) -> Tensor:
    shape = shape or (4,)
    return torch.linspace(0.3, 1.9, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def share(*shape: int, seed: int = 1, grad: bool = True) -> Tensor:
    """Probabilities clear of 0 and 1."""
    return real(*shape, low=0.07, high=0.93, seed=seed, grad=grad)


def ignoring(t: Tensor, index: int) -> Tensor:
    return t.index_fill(0, torch.tensor([1]), index)


ORDER = "torch sums within its kernel, in another order"
LOG_SUM = "from the logarithm of a sum, as the logits are never whole in memory"
BROADCAST = "the variance is expanded first, and the sum is in another order"
LOG_SIGMOID = "-log sigmoid, which never overflows"
ONE_LOGARITHM = "one logarithm of |x| where torch takes two: half the time, and as good at infinities"
ANOTHER_FORM = {
    "linear_cross_entropy": LOG_SUM,
    "soft_margin_loss": LOG_SIGMOID,
    "multilabel_soft_margin_loss": ONE_LOGARITHM,
}
ANOTHER_MEAN = {
    "multi_margin_loss": ORDER,
    "multilabel_margin_loss": ORDER,
}


def rows(
    name: str, arguments: Callable[[], tuple[Any, ...]], *options: dict[str, Any], **fields: Any
) -> list[Case]:
    """A row for each reduction of each set of options."""
    return [
        Case(
            name,
            arguments,
            {"reduction": reduction, **option},
            **{"another_form": another_form(name, reduction)} | fields,
        )
        for option, reduction in itertools.product(options or ({},), REDUCTIONS)
    ]


def another_form(name: str, reduction: str) -> str:
    return ANOTHER_FORM.get(name, "") or (ANOTHER_MEAN.get(name, "") if reduction == "mean" else "")


def pair() -> tuple[Tensor, Tensor]:
    return real(3, 4), real(3, 4, low=-3.1, high=3.9, seed=1)


def counts() -> tuple[Tensor, Tensor]:
    return real(3, 4, low=0.2), real(3, 4, low=0.3, high=4.2, seed=1)


def triple() -> tuple[Tensor, Tensor, Tensor]:
    return real(5, 3), real(5, 3, low=-3.17, high=3.41, seed=1), real(5, 3, low=-2.93, high=3.63, seed=2)


def leading_classes() -> Tensor:
    return torch.tensor([[0, 2, -1, 3], [1, -1, 0, 2], [3, 0, 2, 1], [-1, 1, 2, 3], [2, 2, -1, 0]])


def masked_logits() -> tuple[Tensor, Tensor]:
    """A class that is left out: probability 0 as a target, too."""
    x, t = real(3, 4).detach(), share(3, 4).detach()
    x[:, 2], t[:, 2] = -torch.inf, 0
    return x.requires_grad_(), t.requires_grad_()


def masked_bias() -> tuple[Tensor, ...]:
    t, b = share(5, 4, grad=False), real(4, seed=2).detach()
    t[:, 1], b[1] = 0, -torch.inf
    return real(5, 3), real(4, 3, seed=1), t, b.requires_grad_()


NO_HALF = {
    "half_precision_is_as_good_as_torchs": "torch has no kernel for half precision; ours computes in float32"
}
NO_SECOND = "torch has no second or forward derivative here"

CASES = [
    # ----- regression -----
    *rows("l1_loss", pair, keeps=(0, 1)),
    *rows("l1_loss", pair, {"weight": weights(3, 4)}, keeps=(0, 1), keeps_new=13 * FLOATS),
    *rows("mse_loss", pair, keeps=(0, 1)),
    *rows("mse_loss", pair, {"weight": weights(3, 4)}, keeps=(0, 1), keeps_new=13 * FLOATS),
    *rows("smooth_l1_loss", pair, {}, {"beta": 0.4}, {"beta": 0.0}, {"beta": 2}, keeps=(0, 1)),
    *rows("huber_loss", pair, {}, {"delta": 0.4}, {"delta": 2}, keeps=(0, 1)),
    *rows("huber_loss", pair, {"weight": weights(3, 4)}, keeps=(0, 1)),
    # ----- likelihood -----
    *rows("poisson_nll_loss", counts, {}, {"full": True}, {"eps": 1e-3}, keeps=(0, 1)),
    *rows("poisson_nll_loss", counts, {"log_input": False}, {"log_input": False, "full": True}, keeps=(0, 1)),
    *rows(
        "gaussian_nll_loss",
        lambda: (*pair(), real(3, 4, low=0.3, high=2.1, seed=2)),
        {},
        {"full": True},
        {"eps": 0.02},
        keeps=(0, 1, 2),
    ),
    *rows(
        "gaussian_nll_loss",
        lambda: (*pair(), real(3, low=0.3, seed=2)),
        keeps=(0, 1, 2),
        label="one for a row",
    ),
    *rows(
        "gaussian_nll_loss",
        lambda: (*pair(), real(3, 1, low=0.3, seed=2)),
        keeps=(0, 1, 2),
        label="last axis 1",
    ),
    *rows(
        "gaussian_nll_loss",
        lambda: (*pair(), 0.7),
        keeps=(0, 1),
        keeps_new=FLOATS,
        label="a number",
        another_form=BROADCAST,
    ),
    *[
        Case(
            "kl_div",
            arguments,
            {"reduction": reduction, "log_target": log},
            keeps=(0, 1),
        )
        for reduction in ("none", "sum", "batchmean")
        for log, arguments in ((True, pair), (False, lambda: (real(3, 4), share(3, 4))))
    ],
    # ----- cross-entropy -----
    *rows("cross_entropy", lambda: (real(5, 4), classes(5)), keeps=(0, 1)),
    *rows(
        "cross_entropy",
        lambda: (real(5, 4), ignoring(classes(5), -100)),
        {"weight": weights()},
        keeps=(0, 1),
        label="ignored",
    ),
    *rows(
        "cross_entropy",
        lambda: (real(5, 4), ignoring(classes(5), 2)),
        {"weight": weights(), "label_smoothing": 0.2, "ignore_index": 2},
        keeps=(0, 1),
    ),
    *rows(
        "cross_entropy",
        lambda: (real(2, 4, 3), ignoring(classes(2, 3), 2)),
        {"label_smoothing": 0.1},
        {"weight": weights(), "ignore_index": 2},
        keeps=(0, 1),
        label="K-dimensional",
    ),
    *rows("cross_entropy", lambda: (real(4), classes()), keeps=(0, 1), label="one example"),
    *rows(
        "cross_entropy",
        lambda: (real(3, 4), share(3, 4)),
        {"weight": weights(), "label_smoothing": 0.1},
        keeps=(0, 1),
        label="probabilities",
        edges=(masked_logits,),
    ),
    *rows(
        "cross_entropy",
        lambda: (real(2, 4, 3), share(2, 4, 3)),
        keeps=(0, 1),
        label="K-dimensional probabilities",
        edges=(masked_logits,),
    ),
    *rows(
        "linear_cross_entropy",
        lambda: (real(5, 3), real(4, 3, seed=1), classes(5), real(4, seed=2)),
        keeps=(0, 1, 2, 3),
        keeps_new=(5 + 1) * FLOATS,  # the log-sum-exp of each row, and what a mean divides by
        by_name=("linear_bias",),
        label="bias",
    ),
    *rows(
        "linear_cross_entropy",
        lambda: (real(5, 3), real(4, 3, seed=1), ignoring(classes(5), 2)),
        {"weight": weights(), "label_smoothing": 0.2, "ignore_index": 2},
        keeps=(0, 1, 2),
        keeps_new=(5 + 5) * FLOATS,
    ),
    *rows(
        "linear_cross_entropy",
        lambda: (real(5, 3), real(4, 3, seed=1), share(5, 4), real(4, seed=2)),
        {"weight": weights(), "label_smoothing": 0.1},
        keeps=(0, 1, 2, 3),
        keeps_new=5 * FLOATS,
        by_name=("linear_bias",),
        label="probabilities",
        edges=(masked_bias,),
    ),
    *rows(
        "linear_cross_entropy",
        lambda: (real(2, 3), real(4, 2, 3, seed=1), ignoring(classes(2, 2), -100), real(4, 2, seed=2)),
        {"label_smoothing": 0.1},
        keeps=(0, 1, 2, 3),
        keeps_new=(4 + 1) * FLOATS,
        by_name=("linear_bias",),
        label="K-dimensional",
    ),
    *rows(
        "linear_cross_entropy",
        lambda: (real(3), real(4, 3, seed=1), classes()),
        keeps=(0, 1, 2),
        keeps_new=2 * FLOATS,
        label="one example",
    ),
    *rows(
        "nll_loss",
        lambda: (real(5, 4), classes(5)),
        {},
        {"weight": weights()},
        keeps=(0, 1),
    ),
    *rows(
        "nll_loss",
        lambda: (real(5, 4), ignoring(classes(5), 2)),
        {"weight": weights(), "ignore_index": 2},
        keeps=(0, 1),
    ),
    *rows("nll_loss", lambda: (real(4), classes()), keeps=(0, 1), label="one example"),
    *rows(
        "nll_loss",
        lambda: (real(2, 4, 3, 2), classes(2, 3, 2)),
        {"weight": weights()},
        keeps=(0, 1),
        label="K-dimensional",
    ),
    *rows("binary_cross_entropy", lambda: (share(3, 4, seed=0), share(3, 4)), keeps=(0, 1)),
    *rows(
        "binary_cross_entropy",
        lambda: (share(3, 4, seed=0), share(3, 4)),
        {"weight": weights()},
        keeps=(0, 1),
    ),
    *rows(
        "binary_cross_entropy_with_logits",
        lambda: (real(3, 4), share(3, 4)),
        {},
        {"weight": weights()},
        {"pos_weight": weights()},
        {"weight": weights(3, 4), "pos_weight": weights(3, 1)},
        keeps=(0, 1),
    ),
    # ----- margin -----
    *rows("hinge_embedding_loss", lambda: (real(3, 4), labels(3, 4)), {}, {"margin": 0.3}, keeps=(0, 1)),
    *rows(
        "soft_margin_loss",
        lambda: (real(3, 4), labels(3, 4).double()),
        keeps=(0, 1),
    ),
    *rows(
        "margin_ranking_loss",
        lambda: (real(5), real(5, seed=1), real(5, low=-1, high=1.3, seed=2)),
        {"margin": 0.3},
        {"margin": -0.3},
        keeps=(0, 1, 2),
    ),
    *rows(
        "margin_ranking_loss",
        lambda: (real(5, 1), real(1, 3, low=-3.07, seed=1), labels(5, 3)),
        {"margin": 0.3},
        keeps=(0, 1),
        keeps_new=15 * FLOATS,
        label="broadcast",
    ),
    *rows("cosine_embedding_loss", lambda: (*triple()[:2], labels(5)), {}, {"margin": -0.4}, keeps=(0, 1, 2)),
    *rows(
        "cosine_embedding_loss", lambda: (real(3), real(3, seed=1), labels()), keeps=(0, 1, 2), label="one"
    ),
    *rows(
        "triplet_margin_loss",
        triple,
        {"margin": 2.5},
        {"margin": 2.5, "swap": True},
        {"margin": 3.0, "p": 1, "swap": True},
        {"margin": 2.5, "p": 3.5},
        {"margin": 2.5, "p": 1.5, "eps": 0.1},
        {"margin": 2.5, "p": float("inf")},
        keeps=(0, 1, 2),
        keeps_new=3 * 5 * FLOATS,
    ),
    *rows(
        "triplet_margin_with_distance_loss",
        triple,
        {"margin": 2.5, "swap": True},
        keeps=(0, 1, 2),
        keeps_new=3 * 5 * FLOATS,
    ),
    *rows(
        "multi_margin_loss",
        lambda: (real(5, 4), classes(5)),
        {},
        {"p": 2, "margin": 0.7, "weight": weights()},
        {"weight": weights()},
        keeps=(0, 1),
        except_for=NO_HALF,
    ),
    *rows(
        "multi_margin_loss",
        lambda: (real(4), classes()),
        {"p": 2},
        keeps=(0, 1),
        label="one",
        except_for=NO_HALF,
    ),
    *rows(
        "multilabel_margin_loss", lambda: (real(5, 4), leading_classes()), keeps=(0, 1), except_for=NO_HALF
    ),
    *rows(
        "multilabel_margin_loss",
        lambda: (real(4), torch.tensor([2, 0, -1, 1])),
        keeps=(0, 1),
        label="one",
        except_for=NO_HALF,
    ),
    *rows(
        "multilabel_soft_margin_loss",
        lambda: (real(3, 4), share(3, 4)),
        {},
        {"weight": weights()},
        keeps=(0, 1),
        keeps_new=12 * FLOATS,
    ),
]
