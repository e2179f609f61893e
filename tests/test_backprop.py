"""The tape-free step against torch.nn, autograd and torch.optim: the same weights, step after step."""

import copy
import gc
from typing import Any

import pytest
import torch
from backprop_rows import CLASSES, FEATURES, ROWS, Row, autograd_step, distance, examples, made_descent, twins
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import manualprop
from manualprop import Backprop, descent, nn


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_weights_are_those_of_autograd(row: Row) -> None:
    ours, theirs = twins(row)
    x, t = examples(row)
    step, reference = Backprop(ours, row.loss(), made_descent(row)), autograd_step(theirs, row)
    start = copy.deepcopy(ours)
    for k in range(row.steps):
        torch.manual_seed(k)  # dropout draws the same numbers
        loss = step(x, t)
        torch.manual_seed(k)
        assert loss == pytest.approx(reference(x, t), rel=row.within)
    assert distance(ours, theirs) <= row.within
    torch.testing.assert_close(
        dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=row.within, atol=1e-12
    )
    assert distance(ours, start) > 1e-4, "nothing was learnt"


@pytest.mark.parametrize("row", [r for r in ROWS if r.name.startswith(("loss", "descent", "rows"))], ids=str)
def test_in_float32_within_the_noise_of_a_reordered_sum(row: Row) -> None:
    """Against the float64 run, ours is no further off than four times autograd in float32, plus rounding."""
    (ours, theirs), (_, exact) = twins(row, torch.float32), twins(row)
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    x, t = examples(row, torch.float32)
    loss = row.loss().float()
    step, reference = Backprop(ours, loss, made_descent(row)), autograd_step(theirs, row)
    truth = autograd_step(exact, row)
    if getattr(loss, "weight", None) is not None:
        reference = autograd_step(theirs, Row("", loss=lambda: row.loss().float()))
    for _ in range(20):
        step(x, t)
        reference(x, t)
        truth(x.double(), t.double() if t.is_floating_point() else t)
    assert distance(ours.double(), exact) <= 4 * distance(theirs.double(), exact) + 1e-6


@pytest.mark.parametrize("row", [r for r in ROWS if r.rows == 16], ids=str)
def test_gradients_are_those_of_autograd(row: Row) -> None:
    ours, theirs = twins(row)
    x, t = examples(row)
    before = copy.deepcopy(dict(ours.named_parameters()))
    torch.manual_seed(0)
    found = Backprop(ours, row.loss(), made_descent(row)).gradients(x, t)
    torch.manual_seed(0)
    manualprop.unswap(row.loss()).model(theirs(x), t).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=row.within, atol=1e-12)
    torch.testing.assert_close(dict(ours.named_parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 16, 100])
@pytest.mark.parametrize(
    "name", ["loss-MSE", "loss-ignoring", "loss-weighted", "loss-cross-entropy-sum", "descent-nesterov"]
)
def test_micro_batches_are_one_batch(name: str, micro_batch_size: int) -> None:
    row = next(r for r in ROWS if r.name == name)
    (ours, _), (whole, _) = twins(row), twins(row)
    x, t = examples(row)
    options = {"learning_rate": 0.05} | row.descent
    small = Backprop(ours, row.loss(), descent.Batch(micro_batch_size=micro_batch_size, **options))
    large = Backprop(whole, row.loss(), descent.Batch(**options))
    for _ in range(20):
        assert small(x, t) == pytest.approx(large(x, t), rel=1e-12)
    assert distance(ours, whole) <= 1e-12


def test_is_the_same_from_run_to_run() -> None:
    row = ROWS[0]
    runs = []
    for _ in range(2):
        ours, _ = twins(row, torch.float32)
        step = Backprop(ours, row.loss(), made_descent(row))
        x, t = examples(row, torch.float32)
        losses = [step(x, t) for _ in range(50)]
        runs.append((losses, [p.detach().clone() for p in ours.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_leaves_requires_grad_and_grad_alone() -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))(x, t)
    assert all(
        p.grad is None and p.requires_grad and p.is_leaf and not p.is_inference() for p in ours.parameters()
    )
    loss = nn.CrossEntropyLoss()(ours(x), t)  # autograd goes on where the step stopped
    loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_another_optimizer_gets_the_gradients_in_grad() -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    step = Backprop(
        ours, nn.CrossEntropyLoss(), descent.MiniBatch(optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    )
    expected = step.gradients(x, t)
    step(x, t)
    torch.testing.assert_close({n: p.grad for n, p in ours.named_parameters()}, expected)


@pytest.mark.parametrize("register", ["one", "all"])
def test_who_watches_the_optimizer_is_called_with_gradients(register: str) -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    plan = descent.MiniBatch(learning_rate=0.1, momentum=0.9)
    step, reference = (Backprop(m, nn.CrossEntropyLoss(), plan) for m in (ours, copy.deepcopy(ours)))
    step(x, t)
    reference(x, t)
    seen: list[float] = []

    def watch(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(sum(p.grad.norm().item() for p in ours.parameters() if p.grad is not None))

    handles = (
        [step.optimizer.register_step_pre_hook(watch), step.optimizer.register_step_post_hook(watch)]
        if register == "one"
        else [register_optimizer_step_pre_hook(watch), register_optimizer_step_post_hook(watch)]
    )
    expected = sum(g.norm().item() for g in step.gradients(x, t).values())
    step(x, t)
    for handle in handles:
        handle.remove()
    assert seen == pytest.approx([expected] * 2)
    step(x, t)
    assert len(seen) == 2
    for _ in range(2):
        reference(x, t)
    assert distance(ours, reference.model) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_the_optimizer_keeps_what_torch_keeps(options: dict[str, float]) -> None:
    """A checkpoint has the same entries, and either may go on from the other's."""
    row = Row("", descent=options)
    (ours, theirs), (x, t) = twins(row), examples(row)
    step, plan = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), made_descent(row)
    optimizer = plan.make_optimizer(theirs.parameters())

    def reference() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), t).backward()
        optimizer.step()

    for k in range(6):
        step(x, t)
        reference()
        states = step.optimizer.state_dict(), optimizer.state_dict()
        torch.testing.assert_close(*(s["state"] for s in states), rtol=1e-10, atol=1e-12)
        assert states[0]["param_groups"] == states[1]["param_groups"]
        if k == 3:
            step.optimizer.load_state_dict(copy.deepcopy(states[1]))
            optimizer.load_state_dict(copy.deepcopy(states[0]))
    assert distance(ours, theirs) <= 1e-10


def test_frozen_parameters_stay_and_cost_nothing() -> None:
    ours, theirs = twins(ROWS[0])
    for model in (ours, theirs):
        for p in list(model.parameters())[:3]:  # the first layer, and the second's weight
            p.requires_grad_(False)
    x, t = examples(ROWS[0])
    start = copy.deepcopy(ours)
    plan = descent.MiniBatch(learning_rate=0.1, momentum=0.9)
    step = Backprop(ours, nn.CrossEntropyLoss(), plan)
    optimizer = plan.make_optimizer(p for p in theirs.parameters() if p.requires_grad)
    for _ in range(30):
        step(x, t)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), t).backward()
        optimizer.step()
    assert distance(ours, theirs) <= 1e-10
    pairs = list(zip(ours.parameters(), start.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs[:3]) and not torch.equal(*pairs[3])
    assert not step.stage.chain[0].needs_dx and not step.stage.chain[2].needs_dx  # type: ignore[attr-defined]


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    def tied() -> torch.nn.Sequential:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)
        ).double()
        model[2].weight = model[0].weight
        return model

    ours, theirs = tied(), manualprop.unswap(tied()).model
    row = Row("tied", descent={"momentum": 0.9})
    x, t = examples(row)
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for _ in range(50):
        step(x, t)
        reference(x, t)
    assert distance(ours, theirs) <= 1e-10 and ours[2].weight is ours[0].weight


def test_a_layer_used_twice_keeps_both_of_its_inputs() -> None:
    shared = nn.Linear(6, 6).double()
    act = nn.Tanh()
    ours = nn.Sequential(shared, act, shared, act, nn.Linear(6, 4).double())
    theirs = manualprop.unswap(copy.deepcopy(ours)).model
    row = Row("twice")
    x, t = examples(row)
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for _ in range(30):
        step(x, t)
        reference(x, t)
    assert distance(ours, theirs) <= 1e-10


def test_keeps_nothing_large_after_the_step() -> None:
    ours, _ = twins(ROWS[0], torch.float32)
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    x, t = torch.randn(30_000, FEATURES), torch.randint(CLASSES, (30_000,))
    for _ in range(4):
        step(x, t)
    gc.collect()
    sizes = {x.numel(), 30_000 * 8}  # the output of the latest step is kept on purpose
    alive = [o for o in gc.get_objects() if type(o) is Tensor and o is not x and o.numel() in sizes]
    assert not alive


def test_an_output_stays_what_it_was() -> None:
    """Steps on inputs of one shape write where the last one wrote, but not into what was handed out."""
    for last in ([], [nn.Identity()], [torch.nn.Flatten()], [nn.Tanh()], [nn.Residual()]):
        torch.manual_seed(0)
        ours = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES), *last)
        step = Backprop(ours, nn.MSELoss(), descent.MiniBatch(learning_rate=0.1))
        outputs, expected = [], []
        for _ in range(5):
            x, t = torch.randn(3, FEATURES), torch.randn(3, CLASSES)
            expected.append(ours(x).detach())
            step(x, t)
            outputs.append(step.output)
        torch.testing.assert_close(outputs, expected)


def test_trace_names_every_step() -> None:
    ours, _ = twins(
        Row(
            "",
            lambda: [nn.Linear(FEATURES, 8), nn.Tanh(), nn.Residual(nn.Linear(8, 8)), nn.Linear(8, CLASSES)],
        )
    )
    x, t = examples(ROWS[0])
    before = copy.deepcopy(ours.state_dict())
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    records = list(step.trace(x, t))
    assert [(r.direction, r.path) for r in records] == [
        ("forward", "0"),
        ("forward", "1"),
        ("forward", "2.0"),
        ("forward", "3"),
        ("loss", "loss"),
        ("backward", "loss"),
        ("backward", "3"),
        ("backward", "2.0"),
        ("backward", "1"),
        ("backward", "0"),
    ]
    assert records[1].formula.startswith(r"$y = \tanh x") and "quotient rule" in records[8].formula
    assert records[0].shape == (16, 8) and records[6].shape == (16, 8) and records[4].norm > 0
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    step(x, t)


def test_an_embedding_may_come_first() -> None:
    row = Row("embedding")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Embedding(9, 3), torch.nn.Flatten(), nn.Linear(6, 4)).double()
    theirs = manualprop.unswap(copy.deepcopy(ours)).model
    x, t = torch.randint(9, (16, 2)), torch.randint(CLASSES, (16,))
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for _ in range(30):
        assert step(x, t) == pytest.approx(reference(x, t), rel=1e-10)
    assert distance(ours, theirs) <= 1e-10


@pytest.mark.parametrize(("classes", "rows"), [(3, 5), (10, 100), (20, 100), (10, 31), (2, 32)])
@pytest.mark.parametrize("ignored", [[], [0], [1, 3], "all but one"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_on_its_short_way(classes: int, rows: int, ignored: Any, reduction: str) -> None:
    """Value and gradient from one softmax, few or many classes, with and without ignored targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, classes).double())
    x, t = torch.randn(rows, 3).double(), torch.randint(classes, (rows,))
    t[1:] = t[1:] if isinstance(ignored, list) else -100
    t[ignored if isinstance(ignored, list) else []] = -100
    loss = nn.CrossEntropyLoss(reduction=reduction)
    step = Backprop(model, loss, descent.MiniBatch(learning_rate=0.1))
    loss(model(x), t).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(step.gradients(x, t), expected, rtol=1e-12, atol=1e-14)
    assert step(x, t) == pytest.approx(loss(model(x), t).item(), rel=0.5)


@pytest.mark.parametrize("lead", [(), (1,)])
def test_one_example_with_and_without_an_axis_of_examples(lead: tuple[int, ...]) -> None:
    step = Backprop(
        nn.Sequential(nn.Linear(3, 2)), nn.CrossEntropyLoss(), descent.Stochastic(learning_rate=0.1)
    )
    x, target = torch.randn(*lead, 3), torch.ones(lead, dtype=torch.long)
    losses = [step(x, target) for _ in range(5)]  # prepared from the third on
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ValueError, match="Got 4"):
        step(torch.randn(4, 3), torch.ones(4, dtype=torch.long))
