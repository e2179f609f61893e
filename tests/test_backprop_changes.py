"""What may change between two steps without a tape: each next step follows it, as autograd would."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backprop_rows import (
    CLASSES,
    FEATURES,
    ROWS,
    Row,
    autograd_step,
    distance,
    examples,
    head,
    made_descent,
    mlp,
    twins,
)

from manualprop import Backprop, descent, nn
from manualprop._backprop import _graph


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss, nn.MSELoss, lambda: nn.CrossEntropyLoss(ignore_index=2)]
)
@pytest.mark.parametrize("rows", [1, 7, 32, 300])
def test_a_new_step_goes_on_to_the_last_bit(loss: Callable[[], torch.nn.Module], rows: int) -> None:
    """Its first steps on inputs of a shape are made otherwise than the later ones: a run may be resumed anywhere."""
    row = Row("", loss=loss, rows=rows)
    (ours, _), (theirs, _) = twins(row, torch.float32), twins(row, torch.float32)
    x, t = examples(row, torch.float32)
    step = Backprop(ours, loss(), made_descent(row))
    for _ in range(8):
        assert step(x, t) == Backprop(theirs, loss(), made_descent(row))(x, t)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_thawing_a_parameter_is_noticed() -> None:
    ours, _ = twins(ROWS[0])
    first = next(ours.parameters())
    first.requires_grad_(False)
    x, t = examples(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    step(x, t)
    frozen = first.detach().clone()
    first.requires_grad_(True)
    step(x, t)
    assert not torch.equal(first, frozen)


def test_a_scheduler_moves_the_learning_rate() -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    plan = descent.MiniBatch(
        learning_rate=0.1,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lr_scheduler_interval="update",
    )
    step = Backprop(ours, nn.CrossEntropyLoss(), plan)
    for k in range(4):
        assert step.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**k)
        step(x, t)


def test_shapes_dtypes_and_targets_may_change_from_step_to_step() -> None:
    row = Row("", descent={"momentum": 0.5})
    (ours, theirs), generator = twins(row), torch.Generator().manual_seed(0)
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for rows in (4, 4, 4, 1, 1, 1, 4, 2, 2, 2, 2):
        x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
        t = torch.randint(CLASSES, (rows,), generator=generator)
        if rows == 2:
            t[0] = -100
        assert step(x, t) == pytest.approx(reference(x, t), rel=1e-10)
        probabilities = torch.full((rows, CLASSES), 1 / CLASSES, dtype=torch.float64)
        assert step(x, probabilities) == pytest.approx(reference(x, probabilities), rel=1e-10)
    assert distance(ours, theirs) <= 1e-10


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.double(),
        lambda model: setattr(model[2].weight, "data", model[2].weight.data.clone() * 2),
    ],
)
def test_parameters_that_moved_are_noticed(move: Callable[[torch.nn.Module], Any]) -> None:
    ours, theirs = twins(ROWS[0], torch.float32)
    row = ROWS[0]
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for k in range(6):
        if k == 3:
            move(ours)
            move(theirs)
        x, t = examples(row, next(ours.parameters()).dtype)
        assert step(x, t) == pytest.approx(reference(x, t), rel=1e-5)
    assert distance(ours, theirs) <= 1e-5


def test_a_resumed_optimizer_is_the_one_that_steps() -> None:
    row = Row("resumed", descent={"momentum": 0.9})
    (ours, theirs), (x, t) = twins(row), examples(row)
    step, reference = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row)), autograd_step(theirs, row)
    for k in range(6):
        if k == 3:
            step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        step(x, t)
        reference(x, t)
    assert distance(ours, theirs) <= 1e-10


def changed(old: str, new: object) -> Callable[[torch.nn.Module], None]:
    """Set an attribute of the second layer, such as ``eps``."""
    return lambda model: setattr(model[1], old, new)


CHANGES: dict[str, tuple[Callable[[], list[torch.nn.Module]], Callable[[torch.nn.Module], object]]] = {
    "slope": (lambda: mlp(nn.LeakyReLU(0.1)), changed("negative_slope", 0.5)),
    "rule": (lambda: mlp(nn.GELU()), changed("approximate", "tanh")),
    "eps": (lambda: [nn.Linear(FEATURES, 8), nn.LayerNorm(8), *head()], changed("eps", 0.5)),
    "axis": (lambda: [nn.Linear(FEATURES, 8), nn.Softmax(1), *head()], changed("dim", 0)),
    "mode": (lambda: mlp(nn.RReLU()), lambda model: model.eval()),
    "other mode": (lambda: [layer.eval() for layer in mlp(nn.RReLU())], lambda model: model.train()),
    "layer": (lambda: mlp(nn.Tanh()), lambda model: setattr(model, "1", nn.Sigmoid())),
    "one layer more": (lambda: mlp(nn.Tanh()), lambda model: model.append(nn.Tanh())),
    "weights": (lambda: mlp(nn.Tanh()), lambda model: model[2].weight.requires_grad_(False)),
}


@pytest.mark.parametrize(
    ("name", "graph"), [*[(name, False) for name in CHANGES], ("slope", True), ("layer", True)]
)
def test_what_a_layer_has_is_read_in_each_step(
    name: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, after which buffers are kept, a change, three more steps."""
    monkeypatch.setattr(_graph, "make", lambda graph, inputs: graph)
    layers, change = CHANGES[name]
    row = Row("", layers)
    (ours, theirs), (x, t) = twins(row), examples(row)
    step, reference = (
        Backprop(ours, nn.CrossEntropyLoss(), made_descent(row), compile=graph),
        autograd_step(theirs, row),
    )
    for k in range(6):
        if k == 3:
            change(ours)
            change(theirs)
        torch.manual_seed(k)
        loss = step(x, t)
        torch.manual_seed(k)
        assert loss == pytest.approx(reference(x, t), rel=1e-9)
    assert distance(ours, theirs) <= 1e-9


def test_settings_of_the_loss_are_read_in_each_step() -> None:
    row = ROWS[0]
    (ours, theirs), (x, t) = twins(row), examples(row)
    losses = nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    step, optimizer = (
        Backprop(ours, losses[0], made_descent(row)),
        made_descent(row).make_optimizer(theirs.parameters()),
    )
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
    settings = {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "sum"}
    for name, value in settings.items():
        for _ in range(3):
            optimizer.zero_grad()
            loss = losses[1](theirs(x), t)
            loss.backward()
            optimizer.step()
            assert step(x, t) == pytest.approx(loss.item(), rel=1e-10)
        for one in losses:
            setattr(one, name, value)
    assert step(x, t) == pytest.approx(losses[1](theirs(x), t).item(), rel=1e-10)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_that_come_later_are_refused(register: str) -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), made_descent(ROWS[0]))
    step(x, t)
    handle = getattr(ours[0].bias, register)(lambda given: None)
    before = ours[0].weight.detach().clone()
    with pytest.raises(TypeError, match="its bias has hooks, which would not be called"):
        step(x, t)
    torch.testing.assert_close(ours[0].weight, before, rtol=0, atol=0)
    handle.remove()
    step(x, t)
    assert not torch.equal(ours[0].weight, before)


def test_hooks_that_come_later_are_refused() -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), made_descent(ROWS[0]))
    step(x, t)
    handle = ours[1].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(TypeError, match=r"layer '1' .* it has hooks, which would not be called"):
        step(x, t)
    handle.remove()
    step(x, t)


def test_parameters_that_replace_others_take_their_place_in_the_optimizer() -> None:
    """With their momentum, and with the learning rate that the schedule has reached."""
    row = Row(
        "",
        descent={
            "momentum": 0.9,
            "lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
            "lr_scheduler_interval": "update",
        },
    )
    (ours, other), (x, t) = (twins(row)[0], twins(row)[0]), examples(row)
    steps = [Backprop(model, nn.CrossEntropyLoss(), made_descent(row)) for model in (ours, other)]
    for k in range(6):
        if k == 3:
            kept = {name: value * 0.5 for name, value in ours.state_dict().items()}
            ours.load_state_dict(kept, assign=True)
            other.load_state_dict(kept)
        assert steps[0](x, t) == steps[1](x, t)
    assert distance(ours, other) == 0 and len(steps[0].optimizer.state) == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
def test_a_copy_goes_on_by_itself(copied: Callable[[Backprop], Backprop]) -> None:
    row = Row("", descent={"momentum": 0.9})
    (ours, _), (x, t) = twins(row), examples(row)
    step = Backprop(ours, nn.CrossEntropyLoss(), made_descent(row))
    for _ in range(3):
        step(x, t)
    other, before = copied(step), copy.deepcopy(ours)
    losses = [other(x, t) for _ in range(3)]
    assert distance(ours, before) == 0
    assert losses == [step(x, t) for _ in range(3)] and distance(ours, other.model) == 0
