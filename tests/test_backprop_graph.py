"""The step without a tape as one graph, compiled or captured: the same weights, step after step."""

import copy
from typing import Any

import pytest
import torch
from backprop_rows import FEATURES, ROWS, Row, distance, examples, head, made_descent, twins

from manualprop import Backprop, descent, nn
from manualprop._backprop import _graph

GRAPHS = [
    row
    for row in ROWS
    if row.name.startswith(
        ("descent", "loss", "norm", "convnet", "PReLU", "residual", "parallel", "softmax", "flatten")
    )
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run the very graph without compiling it; counts the graphs."""
    made: list[int] = []
    monkeypatch.setattr(_graph, "make", lambda graph, inputs: made.append(len(inputs)) or graph)
    return made


@pytest.mark.parametrize("row", GRAPHS, ids=str)
def test_the_graph_makes_the_same_weights(row: Row, uncompiled: list[int]) -> None:
    (ours, _), (eager, _) = twins(row), twins(row)
    x, t = examples(row)
    step = Backprop(ours, row.loss(), made_descent(row), compile=True)
    plain = Backprop(eager, row.loss(), made_descent(row))
    for _ in range(5):
        assert step(x, t) == pytest.approx(plain(x, t), rel=1e-12)
    assert distance(ours, eager) <= 1e-12 and len(uncompiled) == 1
    torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))
    torch.testing.assert_close(step.output, plain.output)


def test_a_graph_with_a_loss_that_is_not_finite_changes_no_weight(uncompiled: list[int]) -> None:
    for options in ({"momentum": 0.9}, {"optimizer": torch.optim.Adam}, {}):
        row = Row("", descent=options)
        ours, _ = twins(row)
        x, t = examples(row)
        step = Backprop(ours, row.loss(), made_descent(row), compile=True)
        step(x, t)
        step(x, t)
        before = copy.deepcopy((ours.state_dict(), step.optimizer.state_dict()))
        x[0, 0] = torch.nan
        with pytest.raises(FloatingPointError, match="no weight was changed"):
            step(x, t)
        torch.testing.assert_close((ours.state_dict(), step.optimizer.state_dict()), before, rtol=0, atol=0)


def test_a_scheduler_makes_no_new_graph(uncompiled: list[int]) -> None:
    plan = descent.MiniBatch(
        learning_rate=0.1,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        lr_scheduler_interval="update",
    )
    (ours, _), (eager, _) = twins(ROWS[0]), twins(ROWS[0])
    x, t = examples(ROWS[0])
    steps = [Backprop(m, nn.CrossEntropyLoss(), plan, compile=m is ours) for m in (ours, eager)]
    for _ in range(5):
        for step in steps:
            step(x, t)
    assert distance(ours, eager) <= 1e-12 and len(uncompiled) == 1
    ours.eval()
    for _ in range(_graph.OFTEN + 1):
        steps[0](x, t)
    assert len(uncompiled) == 2, "a graph for each mode"


def test_another_shape_has_a_graph_when_it_comes_often(uncompiled: list[int]) -> None:
    """So the last, smaller batch of an epoch does not wait for the compiler; its steps are right all the same."""
    (ours, _), (eager, _) = twins(ROWS[0]), twins(ROWS[0])
    x, t = examples(ROWS[0])
    plan = descent.MiniBatch(learning_rate=0.1, momentum=0.9)
    steps = [Backprop(m, nn.CrossEntropyLoss(), plan, compile=m is ours) for m in (ours, eager)]
    for step in steps:
        step(x, t)  # makes the momentum buffers
    for i in range(_graph.OFTEN + 2):
        for rows in (len(x), 3):
            assert steps[0](x[:rows], t[:rows]) == pytest.approx(steps[1](x[:rows], t[:rows]), rel=1e-12)
        assert len(uncompiled) == (1 if i < _graph.OFTEN else 2)
    assert distance(ours, eager) <= 1e-12


def test_a_graph_takes_micro_batches(uncompiled: list[int]) -> None:
    (ours, _), (eager, _) = twins(ROWS[0]), twins(ROWS[0])
    x, t = examples(ROWS[0])
    plan = descent.Batch(learning_rate=0.1, micro_batch_size=5)
    steps = [Backprop(m, nn.CrossEntropyLoss(), plan, compile=m is ours) for m in (ours, eager)]
    for _ in range(_graph.OFTEN + 1):
        assert steps[0](x, t) == pytest.approx(steps[1](x, t), rel=1e-12)
    assert distance(ours, eager) <= 1e-12 and len(uncompiled) == 2


def test_autograd_notices_what_a_graph_changed(uncompiled: list[int]) -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1), compile=True)
    loss = nn.CrossEntropyLoss()(ours(x.clone().requires_grad_()), t)
    step(x, t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "nesterov": True}, {"optimizer": torch.optim.Adam}]
)
def test_compiled_by_inductor(options: dict[str, Any]) -> None:
    row = Row("", lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), *head()], descent=options)
    (ours, _), (eager, _) = twins(row), twins(row)
    x, t = examples(row)
    step = Backprop(ours, row.loss(), made_descent(row), compile=True)
    plain = Backprop(eager, row.loss(), made_descent(row))
    for _ in range(5):
        assert step(x, t) == pytest.approx(plain(x, t), rel=1e-10)
    assert distance(ours, eager) <= 1e-10
    torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))


CAPTURED = [
    row
    for row in ROWS
    if row.name.startswith(("descent", "norm-Batch", "convnet", "loss-ignoring", "loss-smoothed"))
]


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch, uncompiled: list[int]) -> None:
    """What a GPU would capture runs as it is: the guarded update, without the replaying."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Optimizers of a torch that was built with CUDA would ask the driver.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(_graph, "captured", lambda body, inputs: body)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("row", CAPTURED, ids=str)
def test_what_a_gpu_captures_makes_the_same_weights(row: Row, compile: bool, as_if_on_a_gpu: None) -> None:
    (ours, _), (eager, _) = twins(row), twins(row)
    x, t = examples(row)
    step = Backprop(ours, row.loss(), made_descent(row), compile=compile, capture=True)
    plain = Backprop(eager, row.loss(), made_descent(row))
    for k in range(5):
        step.optimizer.param_groups[0]["lr"] *= 0.9**k
        plain.optimizer.param_groups[0]["lr"] *= 0.9**k
        assert step(x, t) == pytest.approx(plain(x, t), rel=1e-12)
    assert distance(ours, eager) <= 1e-12
    torch.testing.assert_close(dict(ours.named_buffers()), dict(eager.named_buffers()))
    before = copy.deepcopy((dict(ours.named_parameters()), step.optimizer.state_dict()))
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        step(x * torch.nan, t)
    after = dict(ours.named_parameters()), step.optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_capture_needs_a_gpu() -> None:
    ours, _ = twins(ROWS[0])
    with pytest.raises(
        RuntimeError, match="capture=True replays the step as a CUDA graph, and must have a GPU"
    ):
        Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1), capture=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_captured_on_a_gpu(compile: bool) -> None:
    row = Row("", descent={"momentum": 0.9})
    (ours, _), (eager, _) = twins(row), twins(row)
    x, t = (a.cuda() for a in examples(row))
    step = Backprop(ours.cuda(), row.loss(), made_descent(row), compile=compile, capture=True)
    plain = Backprop(eager.cuda(), row.loss(), made_descent(row))
    for _ in range(5):
        assert step(x, t) == pytest.approx(plain(x, t), rel=1e-10)
    assert distance(ours, eager) <= 1e-10
