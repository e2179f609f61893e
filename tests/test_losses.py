"""What the table of cases can not express about the losses: misuse, legacy options, extremes, large tensors."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from torch import Tensor

import manualprop
from manualprop import functional as F
from manualprop import nn
from manualprop.descent import denominator

pytestmark = pytest.mark.quick

INF, NAN = math.inf, math.nan


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(f: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


ONES, LABELS, CLASSES = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2])
NEEDS = torch.ones(3, requires_grad=True)

MISUSE = {
    "bce size": (
        ValueError,
        "different to the input size",
        lambda M: M.binary_cross_entropy(ONES, torch.ones(2, 1)),
    ),
    "bce range": (RuntimeError, "between 0 and 1", lambda M: M.binary_cross_entropy(2 * ONES, ONES)),
    "bce logits size": (
        ValueError,
        "must be the same as input size",
        lambda M: M.binary_cross_entropy_with_logits(ONES, torch.ones(2, 1)),
    ),
    "var negative": (ValueError, "negative", lambda M: M.gaussian_nll_loss(ONES, ONES, -ONES)),
    "var number": (ValueError, "negative", lambda M: M.gaussian_nll_loss(ONES, ONES, -1.0)),
    "var size": (ValueError, "incorrect size", lambda M: M.gaussian_nll_loss(ONES, ONES, torch.ones(3))),
    "gaussian reduction": (
        ValueError,
        "not valid",
        lambda M: M.gaussian_nll_loss(ONES, ONES, ONES, reduction="avg"),
    ),
    "kl integers": (RuntimeError, "Integral", lambda M: M.kl_div(CLASSES, CLASSES, reduction="sum")),
    "kl complex": (RuntimeError, "Complex", lambda M: M.kl_div(ONES + 1j, ONES, reduction="sum")),
    "delta": (RuntimeError, "delta", lambda M: M.huber_loss(ONES, ONES, delta=0.0)),
    "beta": (RuntimeError, "beta", lambda M: M.smooth_l1_loss(ONES, ONES, beta=-1.0)),
    "weight size": (ValueError, "same size", lambda M: M.l1_loss(ONES, ONES, weight=torch.ones(3))),
    "ranking axes": (
        RuntimeError,
        "same dimension",
        lambda M: M.margin_ranking_loss(ONES, ONES, torch.ones(3)),
    ),
    "cosine target": (RuntimeError, "target", lambda M: M.cosine_embedding_loss(ONES, ONES, ONES)),
    "triplet margin": (
        ValueError,
        "greater than 0",
        lambda M: M.triplet_margin_loss(ONES, ONES, ONES, margin=0.0),
    ),
    "triplet axes": (
        RuntimeError,
        "same number of dimensions",
        lambda M: M.triplet_margin_loss(ONES, ONES, torch.ones(3)),
    ),
    "distance reduction": (
        ValueError,
        "not a valid value",
        lambda M: M.triplet_margin_with_distance_loss(ONES, ONES, ONES, reduction="avg"),
    ),
    "p": (ValueError, "p == 1 and p == 2", lambda M: M.multi_margin_loss(ONES, CLASSES, p=3)),
    "weight axes": (ValueError, "one-dimensional", lambda M: M.multi_margin_loss(ONES, CLASSES, weight=ONES)),
    "class": (IndexError, "out of bounds", lambda M: M.nll_loss(ONES, torch.tensor([0, 3]))),
    "classes": (ValueError, "batch_size", lambda M: M.nll_loss(ONES, torch.zeros(3).long())),
    "class dtype": (RuntimeError, "Half", lambda M: M.nll_loss(ONES, CLASSES, torch.ones(3).half())),
    "weight of ce": (RuntimeError, "weight", lambda M: M.cross_entropy(ONES, CLASSES, NEEDS)),
    "weight of nll": (RuntimeError, "weight", lambda M: M.nll_loss(ONES, CLASSES, NEEDS)),
    "weight of bce": (RuntimeError, "weight", lambda M: M.binary_cross_entropy(ONES, ONES, NEEDS)),
    "weight of logits": (
        RuntimeError,
        "weight",
        lambda M: M.binary_cross_entropy_with_logits(ONES, ONES, NEEDS),
    ),
    "pos_weight": (
        RuntimeError,
        "pos_weight",
        lambda M: M.binary_cross_entropy_with_logits(ONES, ONES, pos_weight=NEEDS),
    ),
    "weight of margin": (RuntimeError, "weight", lambda M: M.multi_margin_loss(ONES, CLASSES, weight=NEEDS)),
    "labels": (RuntimeError, "target", lambda M: M.soft_margin_loss(ONES[0], NEEDS)),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_raises_what_torch_raises(name: str) -> None:
    kind, text, misuse = MISUSE[name]
    for module in (torch_F, F):
        with pytest.raises(kind, match=text):
            misuse(module)


@pytest.mark.parametrize(
    "name", ["l1_loss", "mse_loss", "huber_loss", "poisson_nll_loss", "soft_margin_loss"]
)
def test_complex_inputs_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: inputs must be real"):
        getattr(F, name)(ONES + 1j, ONES)


@pytest.mark.parametrize(
    ("size_average", "reduce", "reduction"),
    [(True, None, "mean"), (False, None, "sum"), (None, False, "none"), (True, False, "none")],
)
def test_legacy_reductions(size_average: bool | None, reduce: bool | None, reduction: str) -> None:
    with pytest.warns(UserWarning, match=f"please use reduction='{reduction}'"):
        legacy = F.l1_loss(ONES, 0 * ONES, size_average, reduce)
    torch.testing.assert_close(legacy, torch_F.l1_loss(ONES, 0 * ONES, reduction=reduction))


def test_warnings_are_torchs() -> None:
    for module in (torch_F, F):
        with pytest.warns(UserWarning, match="Using a target size"):
            module.l1_loss(ONES, torch.ones(3))
        with pytest.warns(UserWarning, match="'batchmean' divides only by the batch size"):
            module.kl_div(ONES, ONES)
    with pytest.warns(FutureWarning, match="NLLLoss2d"):
        loss = manualprop.nn.NLLLoss2d()
    x, t = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long()
    torch.testing.assert_close(loss(x, t), torch_F.nll_loss(x, t))


def test_labels_get_no_gradient_as_in_torch() -> None:
    labels = torch.ones(2, requires_grad=True)
    for module in (torch_F, F):
        assert not module.hinge_embedding_loss(torch.ones(2), labels).requires_grad
        assert not module.cosine_embedding_loss(ONES, ONES, labels).requires_grad


def test_derivatives_stay_finite_where_torchs_do_not() -> None:
    x, t = double(-1000, 1000, 3), double(1, -1, 1)
    assert F.soft_margin_loss(x, t).isfinite() and not torch_F.soft_margin_loss(x, t).isfinite()
    torch.testing.assert_close(
        gradient(lambda z: F.soft_margin_loss(z, t, reduction="sum"), x)[:2], double(-1, 1)
    )
    edge = gradient(lambda z: F.binary_cross_entropy(double(0, 1), z, reduction="sum"), double(0, 1))
    torch.testing.assert_close(edge, double(100, -100))
    full = gradient(lambda z: F.poisson_nll_loss(double(0.5), z, full=True), double(0))
    torch.testing.assert_close(full, double(-0.5))


def test_a_nan_variance_instead_of_a_branch_under_transforms() -> None:
    one = torch.ones(2)
    losses = torch.func.vmap(lambda v: F.gaussian_nll_loss(one[0], one[0], v))(torch.tensor([1.0, -1.0]))
    assert losses[0] == 0 and losses[1].isnan()


def test_a_variance_below_eps_can_rise_again() -> None:
    v = double(1e-9, 0.5)
    ours, torchs = (
        gradient(lambda z, M=M: M.gaussian_nll_loss(double(1, 1), double(0, 2), z), v) for M in (F, torch_F)
    )
    torch.testing.assert_close(ours, torchs)
    assert ours[0] < 0


@pytest.mark.parametrize("p", [1, 2])
def test_multi_margin_overlooks_nan_as_torch_does(p: int) -> None:
    x, t = double(1, 2, NAN, 3, 2, 3).reshape(2, 3), torch.tensor([1, 2])
    ours, torchs = (gradient(lambda z, M=M: M.multi_margin_loss(z, t, p=p), x) for M in (F, torch_F))
    torch.testing.assert_close(ours, torchs)


def test_multi_label_margin_with_ties_duplicates_and_nan() -> None:
    x = double(1, 0, 0, 0.5, 1, 2, NAN, 3, 3, 2, 3, -INF).reshape(3, 4)
    t = torch.tensor([[0, 0, 2, -1], [0, -1, 1, 2], [3, 1, -1, 0]])
    ours, torchs = (gradient(lambda z, M=M: M.multilabel_margin_loss(z, t), x) for M in (F, torch_F))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0, 3.0, INF])
@pytest.mark.parametrize("swap", [False, True])
def test_triplets_of_equal_points(p: float, swap: bool) -> None:
    """Zero distances and ties: torch's first derivative, and a second that is finite."""
    a, b, c = double(0, 0, 1, -1), double(0, 0, 1, -1), double(0, 1, 1, 2)
    a, b, c = (v.reshape(2, 2) for v in (a, b, c))
    options = {"margin": 1.5, "p": p, "swap": swap, "eps": 0.0}
    ours, torchs = (
        gradient(lambda z, M=M: M.triplet_margin_loss(z, b, c, **options), a) for M in (F, torch_F)
    )
    torch.testing.assert_close(ours, torchs)
    assert torch.func.hessian(lambda z: F.triplet_margin_loss(z, b, c, **options))(a).isfinite().all()


def test_the_corner_of_a_hinge() -> None:
    """The slope there is that of the side where the loss grows, on every torch; torch's own is 0 from 2.14 on."""
    a, b, c = double(0, 0).reshape(1, 2), double(0, 0).reshape(1, 2), double(0, 1).reshape(1, 2)
    corner = gradient(lambda z: F.triplet_margin_loss(z, b, c, margin=1.0, eps=0.0), a)
    torch.testing.assert_close(corner, double(0, 1).reshape(1, 2))
    zero, one = double(0), double(1)
    torch.testing.assert_close(gradient(lambda z: F.margin_ranking_loss(z, zero, one, margin=1.0), one), -one)
    torch.testing.assert_close(gradient(lambda z: F.hinge_embedding_loss(z, -one, margin=1.0), one), -one)


def test_a_distance_of_ones_own() -> None:
    a, b, c = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )

    def distance(u: Tensor, v: Tensor) -> Tensor:
        return (u - v).square().sum(-1)

    ours, torchs = (
        gradient(
            lambda z, M=M: M.triplet_margin_with_distance_loss(
                z, b, c, distance_function=distance, swap=True
            ),
            a,
        )
        for M in (F, torch_F)
    )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy_with_logits", "hinge_embedding_loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_tensors_are_small_ones_in_blocks(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * torch.get_num_threads() + 2, 2**16 + 1, generator=generator).to(dtype)
    t = torch.randint(0, 2, x.shape, generator=generator).to(dtype)
    whole = gradient(lambda z: getattr(F, name)(z, t, reduction="sum"), x)
    rows = [
        gradient(lambda z, r=r: getattr(F, name)(z, r, reduction="sum"), row)
        for row, r in zip(x, t, strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(rows))


ROOM = 2**18  # numbers for two blocks of one thread: what is larger runs by other ways


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["rows", "images", "channels last"])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_class_losses_are_torchs(name: str, dtype: torch.dtype, size: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (
        (2 * torch.get_num_threads() + 2, ROOM)
        if size == "rows"
        else (4096 * torch.get_num_threads(), 8, 4, 4)
    )
    x = torch.randn(shape, generator=generator).to(dtype)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    t.view(-1)[::3] = 1  # ignored
    options: dict[str, Any] = {"ignore_index": 1}
    w = torch.rand(shape[1], generator=generator).to(dtype) if weighted else None
    if size == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    # Torch, in float64: in half precision it rounds log p before it picks from it, and fails on channels that are last.
    found = []
    for module, z, v in ((F, x, w), (torch_F, x.double().contiguous(), None if w is None else w.double())):
        z = z.clone().requires_grad_()
        losses = getattr(module, name)(z, t, weight=v, reduction="none", **options)
        g = torch.linspace(0.5, 1.5, t.numel()).view(t.shape)
        found.append((losses.detach(), *torch.autograd.grad(losses, z, g.to(losses.dtype))))
    (ours, dx), (torchs, torchs_dx) = found
    assert dx.dtype == dtype
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(ours, torchs.to(ours.dtype), **close)
    torch.testing.assert_close(dx, torchs_dx.to(dtype), **close)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_wrong_classes_of_large_images_raise_torchs_error(name: str, dtype: torch.dtype, wrong: int) -> None:
    t = torch.zeros(4096, 4, 4).long()
    t[17, 1, 2] = wrong
    for module in (torch_F, F):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            getattr(module, name)(torch.randn(4096, 8, 4, 4).to(dtype), t)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_a_batch_of_ignored_targets_alone_has_gradient_0(
    name: str, weight: Tensor | None, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, requires_grad=True)
    t = torch.full(shape[:1] * (len(shape) > 1) + shape[2:], -100)
    for module in (torch_F, F):
        loss = getattr(module, name)(x, t, weight=weight)
        assert loss.isnan()  # a mean of nothing
        assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0]).double()])
def test_classes_may_be_bytes(name: str, weight: Tensor | None) -> None:
    x, t = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2], dtype=torch.uint8)
    ours, theirs = (getattr(kit, name) for kit in (F, torch_F))
    torch.testing.assert_close(
        gradient(lambda x: ours(x, t, weight, ignore_index=1), x),
        gradient(lambda x: theirs(x, t, weight, ignore_index=1), x),
    )
    loss = nn.CrossEntropyLoss(weight, ignore_index=1)
    assert denominator(loss, x, t) == denominator(loss, x, t.long())


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "huber_loss", "nll_loss", "kl_div"])
def test_empty_batches(name: str) -> None:
    x = torch.empty(0, 3, requires_grad=True)
    t = torch.empty(0).long() if name == "nll_loss" else torch.empty(0, 3)
    for reduction in ("none", "sum", "mean" if name != "kl_div" else "sum"):
        ours, torchs = (getattr(M, name)(x, t, reduction=reduction) for M in (F, torch_F))
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        assert torch.autograd.grad(ours.sum(), x)[0].shape == x.shape


def test_distances_of_single_numbers() -> None:
    """torch takes tensors without an axis for vectors of one number."""
    found = []
    for function in (F.triplet_margin_loss, torch.nn.functional.triplet_margin_loss):
        leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0, 4.0)]
        y = function(*leaves, margin=2.5, reduction="none")
        found.append((y.detach(), torch.autograd.grad(y, leaves)))
    torch.testing.assert_close(found[0], found[1])
