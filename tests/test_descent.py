"""The three descents against numbers worked out on paper, against torch.optim.SGD, and the exactness of pieces."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from manualprop.descent import (
    Batch,
    Descent,
    MiniBatch,
    Stochastic,
    check_splittable,
    gradient,
    sum_and_denominator,
)

pytestmark = pytest.mark.quick

# On paper: one weight w = 0 and no bias, y = w x, L = (w x - t)^2, so dL/dw = 2 x (w x - t).
#   examples (x, t) = (1, 2), (2, 2), (3, 3);  learning rate 0.1
#   batch        mean gradient at w = 0: (2*1*(-2) + 2*2*(-2) + 2*3*(-3)) / 3 = (-4 - 8 - 18) / 3 = -10   w = 1
#   micro-batches of two: the pieces' means are -6 and -18, whose mean, -12, would give the wrong w = 1.2
#   in order 0, 1, 2, one at a time:
#     w = 0    + 0.1 * 2 * 1 * (2 - 0)        = 0.4
#     w = 0.4  + 0.1 * 2 * 2 * (2 - 0.8)      = 0.88
#     w = 0.88 + 0.1 * 2 * 3 * (3 - 2.64)     = 1.096
#   batches (0, 1), (2):
#     w = 0    - 0.1 * (-4 - 8) / 2           = 0.6
#     w = 0.6  + 0.1 * 2 * 3 * (3 - 1.8)      = 1.32      the last batch's mean is over its own size, one
X = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
T = torch.tensor([[2.0], [2.0], [3.0]], dtype=torch.float64)


def one_weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def train(
    descent: Descent, model: nn.Module, loss: nn.Module, x: Tensor, target: Tensor, epochs: int = 1
) -> nn.Module:
    optimizer = descent.make_optimizer(model.parameters())
    for epoch in range(epochs):
        for pieces in descent.updates(len(x), seed=0, epoch=epoch):
            optimizer.zero_grad()
            gradient(model, loss, [(x[rows], target[rows]) for rows in pieces])
            descent.clip_gradients(model.parameters())
            optimizer.step()
    return model


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manualprop.descent._order", lambda n, seed, epoch: torch.arange(n))


@pytest.mark.parametrize(
    ("descent", "expected"),
    [
        (Batch(learning_rate=0.1), 1.0),
        (Batch(learning_rate=0.1, micro_batch_size=2), 1.0),
        (Stochastic(learning_rate=0.1), 1.096),
        (MiniBatch(learning_rate=0.1, batch_size=2), 1.32),
    ],
)
def test_hand_worked(in_order: None, descent: Descent, expected: float) -> None:
    model = train(descent, one_weight(), nn.MSELoss(), X, T)
    assert model.weight.item() == pytest.approx(expected, abs=1e-15)


def test_sgd_options_are_torchs() -> None:
    torch.manual_seed(0)
    options = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.03}
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(12, 3), torch.randn(12, 2)
    train(MiniBatch(batch_size=5, learning_rate=0.1, **options), ours, nn.MSELoss(), x, t, epochs=3)
    sgd = SGD(theirs.parameters(), lr=0.1, **options)
    for epoch in range(3):
        for (rows,) in MiniBatch(batch_size=5, learning_rate=0.1).updates(12, seed=0, epoch=epoch):
            sgd.zero_grad()
            nn.functional.mse_loss(theirs(x[rows]), t[rows]).backward()
            sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_every_example_once_and_reshuffled() -> None:
    stochastic = Stochastic(learning_rate=0.1)
    epochs = [[rows.tolist() for (rows,) in stochastic.updates(50, seed=3, epoch=e)] for e in range(2)]
    for updates in epochs:
        assert len(updates) == stochastic.updates_per_epoch(50) == 50
        assert sorted(updates) == [[k] for k in range(50)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == [rows.tolist() for (rows,) in stochastic.updates(50, seed=3, epoch=0)]


def test_seed_and_epoch_are_not_interchangeable() -> None:
    first, second = (
        next(Stochastic(learning_rate=1.0).updates(99, seed=s, epoch=e)) for s, e in ((0, 1), (1, 0))
    )
    assert not torch.equal(first[0], second[0])


def test_last_smaller_batch_is_kept() -> None:
    sizes = [len(rows) for (rows,) in MiniBatch(batch_size=4, learning_rate=0.1).updates(10)]
    assert sizes == [4, 4, 2]
    assert MiniBatch(batch_size=4, learning_rate=0.1).updates_per_epoch(10) == 3


LABELS = torch.tensor([0, 2, 1, 1, -100, 0, 2, 2, 1, -100, 0])
WEIGHT = torch.tensor([0.2, 3.0, 1.1], dtype=torch.float64)
LOSSES = [
    (nn.CrossEntropyLoss(), LABELS),
    (nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), LABELS),
    (nn.CrossEntropyLoss(ignore_index=2, weight=WEIGHT), LABELS.clamp(min=0)),
    (nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT), LABELS),
    (nn.CrossEntropyLoss(weight=WEIGHT), torch.rand(11, 3, dtype=torch.float64)),
    (nn.MSELoss(), torch.rand(11, 3, dtype=torch.float64)),
    (nn.MSELoss(reduction="sum"), torch.rand(11, 3, dtype=torch.float64)),
    (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.rand(11, 3, dtype=torch.float64)),
    (nn.KLDivLoss(reduction="batchmean"), torch.rand(11, 3, dtype=torch.float64)),
]


@pytest.mark.parametrize(
    ("loss", "target"), LOSSES, ids=lambda value: repr(value) if isinstance(value, nn.Module) else ""
)
@pytest.mark.parametrize("size", [1, 4, 5, 11])
def test_pieces_give_the_whole_gradient(loss: nn.Module, target: Tensor, size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(11, 4, dtype=torch.float64)
    whole = loss(model(x), target)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    pieces = [
        (x[rows], target[rows]) for rows in next(Batch(learning_rate=1.0, micro_batch_size=size).updates(11))
    ]
    value = gradient(model, loss, pieces)
    assert value == pytest.approx(whole.item(), rel=1e-12)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-12)


def test_k_dimensional_cross_entropy_in_pieces() -> None:
    torch.manual_seed(0)
    model, loss = nn.Conv1d(2, 3, 1).double(), nn.CrossEntropyLoss(weight=WEIGHT)
    x, target = torch.randn(7, 2, 5, dtype=torch.float64), torch.randint(0, 3, (7, 5))
    (expected,) = torch.autograd.grad(loss(model(x), target), [model.weight])
    gradient(model, loss, list(zip(x.split(3), target.split(3), strict=True)))
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-12, atol=1e-12)


class Odd(nn.MSELoss):
    """Divides by something of its own."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        total = super().forward(input, target) if self.reduction == "sum" else (input - target).square().sum()
        return total / (1.0 if self.reduction == "sum" else len(input) + 1)


class OddButSaysSo(Odd):
    def denominator(self, output: Tensor, target: Tensor) -> float:
        return len(output) + 1


def test_unknown_loss_is_refused_in_pieces_only() -> None:
    model = one_weight()
    gradient(model, Odd(), [(X, T)])
    with pytest.raises(
        TypeError, match=r"not known what the mean of Odd divides by.*reduction='mean'.*denominator"
    ):
        gradient(model, Odd(), [(X[:2], T[:2]), (X[2:], T[2:])])
    with pytest.raises(TypeError, match=r"mean of mse_loss divides by.*reduction=None"):
        check_splittable(nn.functional.mse_loss)


def test_a_loss_that_names_its_denominator_is_split() -> None:
    total, divisor = sum_and_denominator(OddButSaysSo(), X, T)
    assert (total.item(), divisor) == (1.0, 4.0)


def test_batch_normalisation_is_refused_in_pieces() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).double()
    with pytest.raises(ValueError, match=r"Got BatchNorm1d at '1' in training mode\. Use LayerNorm"):
        gradient(model, nn.MSELoss(), [(X[:2], T[:2]), (X[2:], T[2:])])
    gradient(model.eval(), nn.MSELoss(), [(X[:2], T[:2]), (X[2:], T[2:])])


def test_all_targets_ignored_is_nan_as_in_torch() -> None:
    model = nn.Linear(1, 3, dtype=torch.float64)
    ignored = torch.full((3,), -100)
    value = gradient(model, nn.CrossEntropyLoss(), [(X[:2], ignored[:2]), (X[2:], ignored[2:])])
    assert value != value


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MiniBatch(batch_size=0, learning_rate=0.1), ValueError, r"MiniBatch: batch_size must be a positive integer\. Got batch_size=0\."),
        (lambda: MiniBatch(batch_size=2.5, learning_rate=0.1), TypeError, r"batch_size must be a positive integer\. Got batch_size=2\.5"),
        (lambda: Batch(micro_batch_size=-1, learning_rate=0.1), ValueError, "Batch: micro_batch_size must be a positive"),
        (lambda: Stochastic(), ValueError, "Stochastic: give learning_rate, or an optimizer"),
        (lambda: Stochastic(learning_rate=-1.0), ValueError, "learning_rate must be a positive number. Got learning_rate=-1.0"),
        (lambda: Stochastic(learning_rate=float("nan")), ValueError, "learning_rate must be a positive number. Got learning_rate=nan"),
        (lambda: Batch(learning_rate=1.0, momentum=1.0), ValueError, "momentum must be at least 0 and below 1"),
        (lambda: Batch(learning_rate=1.0, weight_decay=-0.1), ValueError, "weight_decay must be at least 0"),
        (lambda: Batch(learning_rate=1.0, nesterov=True), ValueError, "nesterov must be False without a momentum"),
        (lambda: Batch(learning_rate=1.0, clip_gradient_norm=0.0), ValueError, "clip_gradient_norm must be a positive number or None"),
        (lambda: Batch(learning_rate=1.0, lr_scheduler_interval="step"), ValueError, "must be 'epoch' or 'update'"),
        (lambda: Batch(learning_rate=0.1, momentum=0.9, optimizer=Adam), ValueError, r"Got an optimizer and learning_rate=0\.1, momentum=0\.9"),
        (lambda: MiniBatch(learning_rate=0.1, batch_size=11).updates_per_epoch(10), ValueError, r"batch_size=11 and 10 training examples; choose"),
        (lambda: Stochastic(learning_rate=0.1).updates_per_epoch(0), ValueError, r"at least one training example\. Got n=0"),
        (lambda: Batch(optimizer=torch.optim.LBFGS).make_optimizer(one_weight().parameters()), ValueError, "Got torch.optim.LBFGS"),
    ],
)  # fmt: skip
def test_bad_input(make: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()  # type: ignore[operator]


def test_any_optimizer_and_schedule() -> None:
    descent = MiniBatch(optimizer=lambda p: Adam(p, lr=0.3), lr_scheduler=lambda o: StepLR(o, 1, 0.5))
    optimizer = descent.make_optimizer(one_weight().parameters())
    scheduler = descent.make_lr_scheduler(optimizer)
    assert isinstance(optimizer, Adam)
    assert isinstance(scheduler, StepLR)
    assert Batch(learning_rate=0.1).make_lr_scheduler(optimizer) is None


def test_plateau_counts_epochs() -> None:
    descent = Batch(learning_rate=0.1, lr_scheduler=ReduceLROnPlateau, lr_scheduler_interval="update")
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau watches 'val_loss'.*set it to 'epoch'"):
        descent.make_lr_scheduler(descent.make_optimizer(one_weight().parameters()))


def test_clipping() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 40.0]])
    Batch(learning_rate=1.0, clip_gradient_value=4.0, clip_gradient_norm=1.0).clip_gradients(
        model.parameters()
    )
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_needs_torch_only() -> None:
    script = "import sys, manualprop.descent; print({'lightning', 'pytest', 'numpy'} & set(sys.modules) - {'numpy'})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_one_example_is_not_a_range_of_batch_sizes() -> None:
    text = "Got batch_size=32 and 1 training example; choose batch_size=1, or the descent Batch"
    with pytest.raises(ValueError, match=text):
        MiniBatch(learning_rate=0.1).updates_per_epoch(1)
