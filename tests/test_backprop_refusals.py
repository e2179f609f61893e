"""What a step without a tape refuses, and what the error says to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backprop_rows import CLASSES, FEATURES, ROWS, examples, fused, twins
from torch import Tensor

from manualprop import Backprop, descent, nn
from manualprop._backprop import _graph
from manualprop._backprop._criterion import Criterion


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    ours, _ = twins(ROWS[0])
    x, t = examples(ROWS[0])
    before = copy.deepcopy(ours.state_dict())
    x[0, 0] = torch.nan
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1, momentum=0.9))
    with pytest.raises(
        FloatingPointError, match=r"must stay finite. Got loss=nan with learning rate 0.1; no weight"
    ):
        step(x, t)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    step(*examples(ROWS[0]))  # and the next step is a good one


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bad_target_is_refused_in_every_step(rows: int) -> None:
    ours, _ = twins(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    x, good = torch.ones(rows, FEATURES).double(), torch.zeros(rows, dtype=torch.long)
    for _ in range(3):
        step(x, good)
        before = copy.deepcopy(ours.state_dict())
        for bad in (CLASSES, -1):
            with pytest.raises(IndexError, match="out of bounds"):
                step(x, good + bad)
        with pytest.raises(FloatingPointError, match="Got loss=nan"):
            step(x, good - 100)
        with pytest.raises(FloatingPointError, match="Got loss=nan"):
            step(x * torch.nan, good)
        torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


class Unknown(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def hooked() -> torch.nn.Module:
    layer = nn.Tanh()
    layer.register_forward_hook(lambda module, inputs, output: output)
    return layer


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: torch.nn.Tanh(),
            r"layer '1.0' \(Tanh\) .* it is torch's; call manualprop.swap\(model\) first",
        ),
        (
            lambda: Unknown(),
            r"layer '1.0' \(Unknown\) .* its forward is not known here. Train this model with autograd",
        ),
        (lambda: torch.nn.Conv1d(1, 1, 1), r"layer '1.0' \(Conv1d\)"),
        (hooked, r"layer '1.0' \(Tanh\) .* it has hooks"),
        (
            lambda: nn.LazyLinear(2),
            r"layer '1.0' \(LazyLinear\) .* no parameters yet. Call the model on an input",
        ),
    ],
)
def test_what_it_cannot_run_is_refused_by_name(layer: Callable[[], torch.nn.Module], text: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer()))
    with pytest.raises(TypeError, match=text):
        Backprop(model, nn.MSELoss(), descent.MiniBatch(learning_rate=0.1))


@pytest.mark.parametrize(
    ("inner", "path"),
    [
        (lambda first: nn.Residual(first, nn.Linear(2, 2)), "1.0"),
        (lambda first: nn.Residual(nn.Flatten(), nn.Identity(), first), "1.2"),
        (lambda first: nn.Parallel(nn.Linear(2, 2), nn.Sequential(first)), "1.1.0"),
        (lambda first: fused([nn.Residual(first, nn.Linear(2, 2))])[0], "1.0"),
    ],
)
@pytest.mark.parametrize("first", [nn.ReLU, nn.SiLU, nn.Dropout, torch.nn.Dropout])
def test_a_branch_that_writes_over_what_others_read_is_refused(
    inner: Callable[..., torch.nn.Module], path: str, first: Any
) -> None:
    """The model would add what was written; without a tape nothing is written."""
    plan = descent.MiniBatch(learning_rate=0.1)
    model = nn.Sequential(nn.Linear(2, 2), inner(first(inplace=True)))
    with pytest.raises(
        TypeError, match=rf"layer '{path}' .* writes over its input.*\. Give it inplace=False"
    ):
        Backprop(model, nn.MSELoss(), plan)
    Backprop(nn.Sequential(nn.Linear(2, 2), inner(first())), nn.MSELoss(), plan)


def test_a_convolution_that_pads_by_other_than_zeros_says_what_to_do() -> None:
    """Padding by the layer that the error names, it runs."""
    x, t = torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")
    text = r"layer '0' \(Conv1d\) .* it pads by 'reflect'.*padding=0, and put the nn.ReflectionPad of"
    with pytest.raises(TypeError, match=text):
        Backprop(nn.Sequential(layer), nn.MSELoss(), descent.Batch(learning_rate=0.1))(x, t)
    model = nn.Sequential(nn.ReflectionPad1d(1), nn.Conv1d(1, 1, 3))
    assert Backprop(model, nn.MSELoss(), descent.Batch(learning_rate=0.1))(x, t) > 0


def test_other_misuse_is_refused() -> None:
    model, plan = nn.Sequential(nn.Linear(2, 2)), descent.MiniBatch(learning_rate=0.1)
    with pytest.raises(TypeError, match=r"one of manualprop.nn.* Got MSELoss. Use manualprop.nn.MSELoss"):
        Backprop(model, torch.nn.MSELoss(), plan)
    with pytest.raises(ValueError, match="Got reduction='none'"):
        Backprop(model, nn.MSELoss(reduction="none"), plan)
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        Backprop(nn.Sequential(nn.Tanh()), nn.MSELoss(), plan)
    step = Backprop(model, nn.MSELoss(), plan)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="Got an enabled autocast"):
        step(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step(torch.ones(1, 3), torch.ones(1, 2))


@pytest.mark.parametrize("compile", [False, True, "epoch"])
def test_what_is_no_example_is_refused(
    compile: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In words of its own or of torch's layers, and without the trace that torch's tracing would print."""
    monkeypatch.setattr(_graph, "make", lambda graph, inputs: graph)
    plan = descent.MiniBatch(learning_rate=0.1)
    x, t = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    step = Backprop(nn.Sequential(nn.Linear(2, 2)), nn.CrossEntropyLoss(), plan, compile=compile)
    for given, target, error, text in (
        (x.tolist(), t, TypeError, "inputs must be a tensor. Got list; convert it with torch.as_tensor"),
        (x, t.numpy(), TypeError, "targets must be a tensor. Got ndarray"),
        (x.double(), t, RuntimeError, "must have the same dtype"),
        (x, t.int(), RuntimeError, "expected target dtype to be Long or Byte"),
        (x, t + 1, IndexError, "Target 2 is out of bounds"),
    ):
        with pytest.raises(error, match=text):
            step(given, target)  # type: ignore[arg-type]
        with pytest.raises(error, match=text):
            step.epoch(given, target, [(torch.arange(4),)] * 2)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="The update has no example: leave it out"):
        step(x[:0], t[:0])
    assert capfd.readouterr().err == ""


def test_an_optimizer_without_a_parameter_is_refused() -> None:
    """Autograd would not train what the optimizer does not hold."""
    model, plan = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), descent.MiniBatch(learning_rate=0.1)
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    text = r"optimizer must hold every parameter that requires a gradient\. Got one without 0\.weight, 0\.bias; call"
    with pytest.raises(ValueError, match=text):
        Backprop(model, nn.MSELoss(), plan, optimizer=optimizer)
    model[0].requires_grad_(False)
    Backprop(model, nn.MSELoss(), plan, optimizer=optimizer)(torch.ones(1, 2), torch.ones(1, 2))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_refused(register: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    getattr(model[0].weight, register)(lambda gradient: None)
    with pytest.raises(TypeError, match=r"layer '0' \(Linear\) .*: its weight has hooks, which would not"):
        Backprop(model, nn.MSELoss(), descent.MiniBatch(learning_rate=0.1))


class OwnForward(torch.nn.Module):
    """A module of our layers, whose forward is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return x + y


def test_advice_fits_the_mistake() -> None:
    model, plan = nn.Sequential(nn.Linear(2, 1)), descent.MiniBatch(learning_rate=0.1)
    with pytest.raises(
        TypeError, match=r"descent must be one of manualprop\.descent\. Got 0\.1; give .*MiniBatch\("
    ):
        Backprop(model, nn.MSELoss(), 0.1)  # type: ignore[arg-type]
    text = r"\(OwnForward\) .*: its forward is Python code of its own.* write it as nn\.Sequential of its layers, with nn\.Residual"
    with pytest.raises(TypeError, match=text):
        Backprop(OwnForward(), nn.MSELoss(), plan)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.HuberLoss])
def test_a_target_that_would_be_broadcast_is_refused(loss: Callable[[], torch.nn.Module], steps: int) -> None:
    """In the first step and, prepared for one shape, in a later one."""
    model = nn.Sequential(nn.Linear(2, 1))
    step = Backprop(model, loss(), descent.MiniBatch(learning_rate=0.1))
    for _ in range(steps):
        step(torch.ones(5, 2), torch.ones(5, 1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"of one shape\. Got \(5, 1\) and \(5,\), which would be broadcast"):
        step(torch.ones(5, 2), torch.ones(5))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


NOT_FINITE: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "inputs": (lambda x, t: x[3].fill_(torch.nan), r"The inputs hold nan in row 3, column 0 \(and 1 more\)"),
    "ignored": (lambda x, t: t.fill_(-100), r"Every target of the update is -100 \(ignore_index\), and a mean over none"),
    "huge": (lambda x, t: x[:2].fill_(3e38), r"Try a smaller learning rate\."),
}  # fmt: skip


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_loss_that_is_not_finite_is_explained(name: str, micro: int | None, steps: int) -> None:
    spoil, text = NOT_FINITE[name]
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [-9.0, -9.0], [0.0, 0.0]]))
    plan = descent.Batch(learning_rate=0.1, micro_batch_size=micro)
    step = Backprop(model, nn.CrossEntropyLoss(), plan)
    x, t = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        step(x, t)
    before = copy.deepcopy(model.state_dict())
    spoil(x, t)
    # In pieces, the rows are those of a piece.
    with pytest.raises(FloatingPointError, match=text.replace("row 3", "row [13]")):
        step(x, t)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_branches_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Residual: what is added must have one shape. Got \(3, 2\) and \(3, 4\)"
    ):
        nn.Residual(nn.Linear(2, 4))(torch.ones(3, 2))
    with pytest.raises(ValueError, match="Parallel: there must be at least one branch"):
        nn.Parallel()(torch.ones(3, 2))


def test_a_target_out_of_range_is_an_index_error() -> None:
    ours, _ = twins(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    with pytest.raises(IndexError, match="out of bounds"):
        step(torch.ones(2, FEATURES).double(), torch.tensor([0, CLASSES]))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss])
@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_in_a_graph_a_class_that_does_not_exist_makes_the_loss_nan(
    loss: Callable[[], torch.nn.Module], bad: int
) -> None:
    """A graph cannot raise: the step that reads the loss does, by running once more outside of it."""
    criterion = Criterion(loss())
    criterion.traced = True
    x, t = torch.randn(2, CLASSES).double(), torch.tensor([0, CLASSES - 1])
    assert criterion(x, t)[0].isfinite()
    t[1] = bad
    assert criterion(x, t)[0].isnan()


def test_inputs_that_do_not_fit_are_refused_without_a_trace_of_the_graph(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = twins(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1), compile=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(torch.ones(2, FEATURES + 1).double(), torch.tensor([0, 1]))
    assert capfd.readouterr().err == "" and not caplog.records


def test_an_ignored_target_exists_in_a_graph_too() -> None:
    criterion = Criterion(nn.CrossEntropyLoss(ignore_index=-1))
    x, t = torch.randn(2, CLASSES).double(), torch.tensor([0, -1])
    outside = criterion(x, t)[0]
    criterion.traced = True
    torch.testing.assert_close(criterion(x, t)[0], outside)


def test_only_ignored_targets_are_not_finite() -> None:
    ours, _ = twins(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.MiniBatch(learning_rate=0.1))
    for rows in (1, 3):
        with pytest.raises(FloatingPointError, match="Got loss=nan"):
            step(torch.ones(rows, FEATURES).double(), torch.full((rows,), -100))


@pytest.mark.parametrize("rows", [0, 2, 6])
def test_an_update_of_stochastic_descent_sees_one_example(rows: int) -> None:
    """Six rows were one update of six: not what the descent says."""
    model = nn.Sequential(nn.Linear(3, 2))
    step = Backprop(model, nn.CrossEntropyLoss(), descent.Stochastic(learning_rate=0.1))
    before = copy.deepcopy(model.state_dict())
    x, target = torch.randn(rows, 3), torch.zeros(rows, dtype=torch.long)
    with pytest.raises(
        ValueError, match=rf"Stochastic must see one example\. Got {rows}; make one call for each"
    ):
        step(x, target)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
