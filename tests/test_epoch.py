"""An epoch as one program: the same weights as by steps, under Lightning too."""

import copy
import functools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backprop_rows import CLASSES, FEATURES, ROWS, Row, distance, examples, head, made_descent, twins
from lightning.pytorch import Trainer
from test_routes import tripled
from torch import Tensor

from manualprop import Backprop, descent, functions, nn
from manualprop._backprop import _graph, _programs, _scan
from manualprop._backprop._epoch import portions, taken
from manualprop.functions._execution import _products
from manualprop.training import (
    DescentModule,
    DigitsDataModule,
    MultilayerPerceptron,
    NonFiniteLossError,
    _engine,
)

RANDOM = [row for row in ROWS if "dropout" in row.name]
UNFOLDED = [row for row in ROWS if row.name.startswith(("descent-Adam", "descent-RMSprop", "descent-clip"))]
# One activation stands for all: they are one stage.
ALIKE = [row for row in ROWS if row.name.startswith("activation-") and row.name != "activation-GELU"]
FOLDED = [row for row in ROWS if row not in RANDOM + UNFOLDED + ALIKE]

Updates = list[tuple[Tensor, ...]]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[_scan.Scan]:
    """Run the very step of a program again and again, without compiling it; collects what would be compiled."""
    made: list[_scan.Scan] = []

    def program(scan: _scan.Scan) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        made.append(scan)
        c, end = len(scan.carried), len(scan.carried) + len(scan.inputs)

        def run(given: Sequence[Tensor]) -> list[Tensor]:
            carry, returned = list(given[:c]), []
            for inputs in zip(*given[c:end], strict=True):
                found = scan.step(*carry, *inputs, *given[end:])
                carry = list(found[:c])
                returned.append(found[c:])
            return [*carry, *map(torch.stack, zip(*returned, strict=True))]

        return run

    monkeypatch.setattr(_scan.Scan, "program", program)
    return made


def pair(row: Row, **options: Any) -> tuple[Backprop, Backprop]:
    """The same model twice: its epochs as programs, and by steps."""
    (ours, _), (other, _) = twins(row), twins(row)
    plan = made_descent(row) if not options else descent.MiniBatch(**{"learning_rate": 0.05} | options)
    return Backprop(ours, row.loss(), plan, compile="epoch"), Backprop(other, row.loss(), plan)


def order(n: int, size: int, seed: int = 0) -> Updates:
    generator = torch.Generator().manual_seed(seed)
    return [(rows,) for rows in torch.randperm(n, generator=generator).split(size)]


def agree(ours: Backprop, other: Backprop, within: float = 1e-10) -> None:
    assert distance(ours.model, other.model) <= within
    torch.testing.assert_close(dict(ours.model.named_buffers()), dict(other.model.named_buffers()))
    states = [step.optimizer.state_dict()["state"] for step in (ours, other)]
    torch.testing.assert_close(*states, rtol=1e-8, atol=1e-10)


# ----- the same as by steps -----


@pytest.mark.parametrize("row", FOLDED, ids=str)
def test_a_program_makes_the_same_weights(row: Row, interpreted: list[_scan.Scan]) -> None:
    x, t = examples(row)
    steps = pair(row)
    size = max(1, row.rows // 4)
    updates = order(len(x), size) + order(len(x), size, seed=1)
    ours, other = (step.epoch(x, t, updates) for step in steps)
    agree(*steps, within=max(row.within, 1e-10))
    assert len(interpreted) >= 1 and len(ours.losses) == len(updates) and ours.losses.dtype == torch.float64
    torch.testing.assert_close(ours.losses, other.losses)
    torch.testing.assert_close(ours.outputs, other.outputs)
    torch.testing.assert_close(steps[0].output, steps[1].output)


def test_a_descent_gives_the_order(interpreted: list[_scan.Scan]) -> None:
    row, x, t = ROWS[0], torch.randn(35, FEATURES).double(), torch.randint(CLASSES, (35,))
    for plan in (
        descent.Stochastic(learning_rate=0.1),
        descent.MiniBatch(
            learning_rate=0.1, batch_size=8, momentum=0.9
        ),  # the last update has three examples
        descent.Batch(learning_rate=0.1),
        descent.Batch(learning_rate=0.1, micro_batch_size=10),  # in pieces: by steps
    ):
        models = [twins(row)[0] for _ in range(2)]
        steps = [
            Backprop(m, row.loss(), plan, compile=how)
            for m, how in zip(models, ("epoch", False), strict=True)
        ]
        for epoch in range(2):
            ours, other = (step.epoch(x, t, plan.updates(35, epoch=epoch)) for step in steps)
            torch.testing.assert_close(ours, other)
        agree(*steps)
    assert len(interpreted) == 3


def test_calls_do_not_matter(interpreted: list[_scan.Scan]) -> None:
    row = Row("", descent={"momentum": 0.9})
    x, t = examples(Row("", rows=33))
    updates, weights = order(33, 2)[:-1], []
    for calls in (1, 3, 16):
        step, _ = pair(row)
        for k in range(0, len(updates), calls):
            step.epoch(x, t, updates[k : k + calls])
        weights.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_updates_are_grouped_by_their_sizes() -> None:
    rows = torch.arange(3000)
    updates = [*((r,) for r in rows.split(1)), (rows[:2], rows[2:4]), (rows[:2],)]
    assert [len(group) for group in portions(updates, 64)] == [1024, 1024, 952, 1, 1]
    assert [len(group) for group in portions(updates[:10], 2**20)] == [4, 4, 2], "bounded by the elements"
    assert list(portions([], 4)) == []


def test_the_mode_of_the_model_counts(interpreted: list[_scan.Scan]) -> None:
    row = Row("", lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), *head()])
    x, t = examples(row)
    steps = pair(row)
    for training in (True, False, True):
        for step in steps:
            step.model.train(training)
            step.epoch(x, t, order(16, 4))
        agree(*steps)
    training, _ = interpreted
    written = {b.data_ptr() for b in steps[0].model.buffers()}
    assert written <= {c.data_ptr() for c in training.carried}, "an operation writes to what is not carried"


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: float(k % 3 > 0)),  # 0: another form
    ],
)
def test_a_schedule_of_updates(
    scheduler: Callable[[torch.optim.Optimizer], Any], interpreted: list[_scan.Scan]
) -> None:
    options = {"momentum": 0.9, "lr_scheduler": scheduler, "lr_scheduler_interval": "update"}
    steps = pair(ROWS[0], **options)
    x, t = examples(Row("", rows=40))
    for step in steps:
        step.epoch(x, t, order(40, 4))
    agree(*steps)
    assert steps[0].lr_scheduler.state_dict() == steps[1].lr_scheduler.state_dict()


CHANGES: dict[str, Callable[[Backprop], object]] = {
    "buffers asked for": lambda step: step.has_program(X16[:4], T16[:4]),
    "no momentum buffer": lambda step: step.optimizer.state.clear(),
    "one momentum buffer": lambda step: next(iter(step.optimizer.state.values())).clear(),
    "eps": lambda step: setattr(step.model[1], "eps", 0.1),  # type: ignore[index]
    "running mean": lambda step: setattr(step.model[1], "running_mean", torch.ones(8).double()),  # type: ignore[index]
    "loss weight": lambda step: setattr(step.criterion.loss, "weight", torch.arange(1.0, 5.0).double()),
    "parameter": lambda step: setattr(
        step.model[0], "weight", torch.nn.Parameter(torch.ones(8, FEATURES).double())
    ),  # type: ignore[index]
    "assigned": lambda step: step.model.load_state_dict(copy.deepcopy(step.model.state_dict()), assign=True),
    "learning rate": lambda step: step.optimizer.param_groups[0].update(lr=0.02),
    "optimizer": lambda step: step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict())),
}
X16, T16 = examples(ROWS[0])


@pytest.mark.parametrize(
    "names", [["buffers asked for", "eps"], pytest.param(list(CHANGES), marks=pytest.mark.slow)], ids=len
)
def test_what_changes_between_epochs_counts(names: list[str], interpreted: list[_scan.Scan]) -> None:
    row = Row(
        "",
        lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), *head()],
        loss=lambda: nn.CrossEntropyLoss(torch.ones(CLASSES).double()),
    )
    steps = pair(row, momentum=0.9)
    for name in names:
        for step in steps:
            CHANGES[name](step)
            step.epoch(X16, T16, order(16, 4))
        assert distance(steps[0].model, steps[1].model) < 1e-9, name  # the norm, as in its row


def test_a_norm_over_all_batches_is_refused() -> None:
    row = Row("", lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, momentum=None), *head()])
    for how in ("epoch", True):
        step = Backprop(twins(row)[0], row.loss(), made_descent(row), compile=how)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"layer '1' \(BatchNorm1d\) must have a momentum"):
            step.epoch(X16, T16, order(16, 4))


@pytest.mark.parametrize("compile", [False, "epoch"])
def test_rows_may_count_from_the_end(compile: Any, interpreted: list[_scan.Scan]) -> None:
    (ours, _), (other, _) = twins(ROWS[0]), twins(ROWS[0])
    plan = descent.MiniBatch(learning_rate=0.1)
    ends = Backprop(ours, nn.CrossEntropyLoss(), plan, compile=compile)
    ends.epoch(X16, T16, [(torch.arange(-2, 1),), (torch.tensor([-16, 3, -1], dtype=torch.int32),)])
    Backprop(other, nn.CrossEntropyLoss(), plan).epoch(
        X16, T16, [(torch.tensor([14, 15, 0]),), (torch.tensor([0, 3, 15]),)]
    )
    assert distance(ours, other) < 1e-12


@pytest.mark.parametrize(
    ("updates", "error", "match"),
    [
        ([(torch.arange(14, 18),)], IndexError, r"one of the 16 examples\. Got row 17"),
        ([(torch.tensor([-17, 3]),)], IndexError, r"Got row -17"),
        ([(torch.arange(4.0),)], TypeError, r"a tuple of tensors .* Got shape \(4,\) and torch.float32"),
        ([(torch.arange(16) < 4,)], TypeError, r"Got shape \(16,\) and torch.bool"),
        ([(torch.arange(4).view(2, 2),)], TypeError, r"Got shape \(2, 2\) and torch.int64"),
        ([([0, 1],)], TypeError, r"Got tuple \(\[0, 1\],\)"),
        ([(torch.arange(4).numpy(),)], TypeError, r"Got a tuple of ndarray"),
        ([torch.arange(4)], TypeError, r"Got Tensor tensor\(\[0, 1, 2, 3\]\); write \(rows,\)"),
        ([(torch.arange(0),)], ValueError, r"must have an example. Got one without"),
        ([()], ValueError, r"must have an example. Got one without"),
    ],
)
def test_updates_that_are_none_are_refused(updates: Any, error: type[Exception], match: str) -> None:
    for step in pair(ROWS[0], momentum=0.9):
        before = copy.deepcopy(step.model.state_dict())
        with pytest.raises(error, match=match):
            step.epoch(X16, T16, updates * 2)
        torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)


def test_an_example_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a target\. Got 16 examples and 15 targets"):
        pair(ROWS[0])[0].epoch(X16, T16[:15], order(15, 4))


def test_autograd_notices_what_a_program_changed(interpreted: list[_scan.Scan]) -> None:
    step, _ = pair(ROWS[0])
    x, t = examples(ROWS[0])
    loss = nn.CrossEntropyLoss()(step.model(x.clone().requires_grad_()), t)
    step.epoch(x, t, order(16, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_program_runs_the_rules(interpreted: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    row, (x, t) = Row("", lambda: [nn.Linear(FEATURES, 8), nn.LayerNorm(8), *head()]), examples(ROWS[0])
    right, _ = pair(row)
    right.epoch(x, t, order(16, 4))
    monkeypatch.setattr(functions, "LayerNorm", tripled(functions.LayerNorm))
    wrong, by_steps = pair(row)
    for step in (wrong, by_steps):
        step.epoch(x, t, order(16, 4))
    agree(wrong, by_steps)
    assert distance(wrong.model, right.model) > 1e-3
    assert _programs._path(interpreted[0].step) != _programs._path(interpreted[1].step), "another program"


@pytest.mark.parametrize("threads", [1, 2])
def test_products_in_another_way_are_the_same(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kernels = threads == 1
    for n, inner, m, other in ((1, 5, 3, True), (4, 1, 3, True), (20, 5, 3, True), (20, 5, 17, kernels)):
        a, b, c = torch.randn(inner, n).t(), torch.randn(inner, m), torch.randn(m)
        found, total = _graph.quick_product(a, b), _graph.product_and_sum(c, a, b, beta=2, alpha=3)
        assert (found is not NotImplemented) is (total is not NotImplemented) is other
        if other:
            torch.testing.assert_close(found, a @ b)
            torch.testing.assert_close(total, 2 * c + 3 * (a @ b))
    assert _graph.quick_product(torch.randn(20, 5).double(), torch.randn(5, 17).double()) is NotImplemented


def test_a_comparison_replaces_one_of_each_row() -> None:
    x, index = torch.randn(4, 3), torch.tensor([2, 0, 1, 1])[:, None]
    for dim in (1, -1):
        assert torch.equal(_graph.one_of_each_row(x, dim, index, 2.0), x.scatter(dim, index, 2.0))
    assert torch.equal(_graph.one_of_each_row(x, 0, index[:3].t(), 2.0), x.scatter(0, index[:3].t(), 2.0))
    for other in (index[:2], index.expand(4, 2)):
        assert _graph.one_of_each_row(x, 1, other, 2.0) is NotImplemented


def test_the_quick_tanh_is_as_accurate() -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 400_001), torch.logspace(-38, 0, 10_001), torch.tensor([-0.0, 1e9])]
    )
    found, exact = _graph.quick_tanh(x), x.double().tanh()
    unit = torch.nextafter(exact.abs().float(), torch.tensor(math.inf)).double() - exact.abs().float()
    assert ((found - exact).abs() / unit).max() < 1.2  # torch's own: 0.52
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    assert (
        _graph.quick_tanh(ends).view(torch.int32).tolist()[:4] == ends.tanh().view(torch.int32).tolist()[:4]
    )
    assert _graph.quick_tanh(ends).isnan().tolist() == ends.isnan().tolist()
    assert _graph.quick_tanh(x.double()) is NotImplemented


def test_rows_that_follow_each_other_are_not_copied() -> None:
    x = torch.arange(24.0).view(12, 2)
    for rows, copied in ((torch.arange(2, 8).view(3, 2), False), (torch.arange(8).flip(0).view(4, 2), True)):
        found = taken(x, rows)
        assert torch.equal(found, x[rows])
        assert (found.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) is copied


def test_products_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = pair(ROWS[0])
    x, t = examples(ROWS[0])
    steps[1].epoch(x, t, order(16, 4))
    monkeypatch.setattr(_products, "SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    plain = Backprop(twins(ROWS[0])[0], ROWS[0].loss(), made_descent(ROWS[0]))
    plain.epoch(x, t, order(16, 4))
    agree(plain, steps[1])


# ----- what goes wrong -----


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loss_that_is_not_finite_ends_the_epoch(momentum: float, interpreted: list[_scan.Scan]) -> None:
    plan = {
        "momentum": momentum,
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        "lr_scheduler_interval": "update",
    }
    steps = pair(ROWS[0], **plan)
    x, t = examples(Row("", rows=40))
    x[25, 2] = torch.nan
    for step in steps:
        with pytest.raises(FloatingPointError, match=r"nan in row 1, column 2: remove such rows") as raised:
            step.epoch(x, t, [(rows,) for rows in torch.arange(40).split(4)])
        assert raised.value.made == 6  # type: ignore[attr-defined]
        assert step.lr_scheduler.last_epoch == 6  # type: ignore[union-attr]
    agree(*steps)


def test_a_class_that_does_not_exist_is_refused_as_by_steps(interpreted: list[_scan.Scan]) -> None:
    x, t = examples(ROWS[0])
    t[9] = CLASSES
    steps = pair(ROWS[0])
    for step in steps:
        with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
            step.epoch(x, t, [(rows,) for rows in torch.arange(16).split(4)])
    agree(*steps)


def test_more_than_one_example_with_stochastic(interpreted: list[_scan.Scan]) -> None:
    ours, _ = twins(ROWS[0])
    step = Backprop(ours, nn.CrossEntropyLoss(), descent.Stochastic(learning_rate=0.1), compile="epoch")
    with pytest.raises(ValueError, match=r"an update of Stochastic must see one example\. Got 4"):
        step.epoch(*examples(ROWS[0]), order(16, 4))


# The fused row draws by the same rule.
@pytest.mark.parametrize("row", [row for row in RANDOM if row.name != "dropout-fused"], ids=str)
def test_random_layers_are_refused(row: Row, interpreted: list[_scan.Scan]) -> None:
    step, _ = pair(row)
    x, t = examples(row)
    with pytest.raises(TypeError, match=r"the model must draw no random numbers. It does, by aten.bernoulli"):
        step.epoch(x, t, order(len(x), 4))
    step.model.eval()
    step.epoch(x, t, order(len(x), 4))
    assert len(interpreted) == 1


def test_a_refusal_changes_nothing(interpreted: list[_scan.Scan]) -> None:
    plan = {
        "momentum": 0.9,
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        "lr_scheduler_interval": "update",
    }
    step, _ = pair(RANDOM[0], **plan)
    before = copy.deepcopy(step.model.state_dict())
    for _ in range(2):  # the second time with momentum buffers
        with pytest.raises(TypeError, match="must draw no random numbers"):
            step.epoch(X16, T16, order(16, 4))
        torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
        made = step.lr_scheduler.last_epoch  # type: ignore[union-attr]
        assert step.optimizer.param_groups[0]["lr"] == 0.05 * 0.5**made
        step(X16, T16)
        before = copy.deepcopy(step.model.state_dict())


@pytest.mark.parametrize("row", UNFOLDED, ids=str)
def test_updates_that_cannot_be_one_program_are_refused(row: Row) -> None:
    with pytest.raises(
        ValueError, match="for compile='epoch', the update must be plain or momentum gradient descent"
    ):
        pair(row)
    model = twins(row)[0]
    step, x_t = Backprop(model, row.loss(), made_descent(row)), examples(row)
    assert step.epoch(*x_t, order(16, 4)).losses.shape == (4,), "by steps they can"


def test_what_compile_may_be() -> None:
    for options in ({"compile": "all"}, {"compile": "epoch", "capture": True}):
        with pytest.raises(
            ValueError, match="compile must be False, True or 'epoch', and 'epoch' goes without"
        ):
            Backprop(twins(ROWS[0])[0], nn.CrossEntropyLoss(), made_descent(ROWS[0]), **options)


def test_a_large_network_goes_by_steps(interpreted: list[_scan.Scan]) -> None:
    row = Row("", lambda: [nn.Linear(FEATURES, 12000), nn.Tanh(), nn.Linear(12000, CLASSES)])
    step, _ = pair(row)
    step.epoch(*examples(row), order(16, 8))
    assert not interpreted


def test_micro_kernels_run_larger_networks(
    interpreted: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("", lambda: [nn.Linear(FEATURES, 12000), nn.Tanh(), nn.Linear(12000, CLASSES)])
    for size, threads, programs in ((8, 1, 1), (1, 1, 0), (8, 2, 0)):
        monkeypatch.setattr(torch, "get_num_threads", functools.partial(int, threads))
        plan = descent.MiniBatch(learning_rate=0.05)
        step = Backprop(twins(row, torch.float32)[0], row.loss(), plan, compile="epoch")
        step.epoch(*examples(row, torch.float32), order(16, size))
        assert len(interpreted) == programs
        interpreted.clear()


def test_threads_build_their_programs_one_after_the_other(interpreted: list[_scan.Scan]) -> None:
    """torch traces for one thread: it raised an AssertionError."""
    row, losses = Row("", lambda: [nn.Linear(FEATURES, CLASSES)]), []
    x, t = examples(row)

    def train(step: Backprop) -> None:
        losses.append(step.epoch(x, t, order(16, 8)).losses)

    threads = [threading.Thread(target=train, args=pair(row)[:1]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == len(interpreted) == 4 and all(torch.equal(one, losses[0]) for one in losses)


def test_an_epoch_without_updates() -> None:
    step, _ = pair(ROWS[0])
    losses, outputs = step.epoch(*examples(ROWS[0]), [])
    assert losses.shape == (0,) and outputs.shape == (0,)


# ----- under Lightning -----


def trained(**options: Any) -> DescentModule:
    """A run of stochastic descent on the digits."""
    torch.manual_seed(0)
    resumed = options.pop("resumed", None)
    module = DescentModule(
        MultilayerPerceptron([64, 8, 10], activation="Tanh"),
        nn.CrossEntropyLoss(),
        descent.Stochastic(**{"learning_rate": 0.02} | options.pop("descent", {})),
    )
    module.observers = options.pop("observers", [])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", limit_val_batches=0, **quiet | {"enable_checkpointing": False} | options
    )
    trainer.fit(module, DigitsDataModule(), ckpt_path=resumed, weights_only=True)
    return module


def weights(module: DescentModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


@pytest.fixture
def pays(interpreted: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch) -> list[_scan.Scan]:
    """A program pays from the first update on."""
    monkeypatch.setattr(_engine, "COMPILING", 0.0)
    monkeypatch.setattr(_engine, "LOADING", 0.0)
    return interpreted


def test_the_engine_takes_a_program_where_it_pays(
    pays: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with_program = trained(max_steps=300)
    assert with_program.has_program and with_program.trainer.global_step == 300 and len(pays) == 1
    said = "engine: tape-free, the updates of a portion as one program (compiled now, in about ten seconds, and kept"
    assert any(text.startswith(said) for text in caplog.messages)
    for name, value in (("LOADING", 0.2), ("COMPILING", 20.0)):  # the run is too short for either
        monkeypatch.setattr(_engine, name, value)
        caplog.clear()
        by_steps = trained(max_steps=300)
        assert not by_steps.has_program and not any("program" in text for text in caplog.messages)
        torch.testing.assert_close(weights(with_program), weights(by_steps))
        monkeypatch.setattr(_engine, "LOADING", 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"observers": [lambda: None]},
        {"descent": {"clip_gradient_norm": 1.0}},
        {
            "descent": {
                "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
                "lr_scheduler_interval": "update",
            }
        },
    ],
)
def test_the_engine_takes_steps_where_it_must(options: dict[str, Any], pays: list[_scan.Scan]) -> None:
    assert not trained(max_steps=20, **options).has_program and not pays


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You're resuming from a checkpoint that ended",
)
def test_a_resumed_run_does_as_the_interrupted_one_did(
    pays: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = trained(max_steps=700)
    part = trained(max_steps=257, enable_checkpointing=True, default_root_dir=tmp_path)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    monkeypatch.setattr(_engine, "LOADING", 10.0)  # a new run would not take it any more
    keeping = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    rest = trained(max_steps=700, resumed=tmp_path / "part.ckpt", **keeping)
    assert rest.has_program and torch.equal(weights(rest), weights(whole))


def test_a_run_goes_on_without_a_compiler_that_works(
    pays: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def fails(scan: _scan.Scan) -> None:
        raise RuntimeError(
            "Backprop: the C++ compiler must be able to compile the program. It failed: no g++."
        )

    monkeypatch.setattr(_scan.Scan, "program", fails)
    module = trained(max_steps=300, descent={"momentum": 0.9})
    assert not module.has_program and module.trainer.global_step == 300
    said = "engine: tape-free, the updates one by one, because the C++ compiler must be able to compile the program."
    assert any(text.startswith(said) for text in caplog.messages)


def test_a_run_with_momentum(pays: list[_scan.Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    momentum = {"momentum": 0.5}
    with_program = trained(max_steps=300, descent=momentum)
    assert with_program.has_program
    monkeypatch.setattr(_engine, "LOADING", 10.0)
    torch.testing.assert_close(weights(with_program), weights(trained(max_steps=300, descent=momentum)))


def test_a_run_that_diverges_says_where(pays: list[_scan.Scan]) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"at update \d+ \(epoch 1\), which was not made, with learning"
    ):
        trained(max_steps=300, descent={"learning_rate": 1e38})
