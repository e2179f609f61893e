"""Training under Lightning: counting, exactness, resuming, metrics, data, and what is refused."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import logging
import math
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import manualprop
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic, gradient
from manualprop.training import (
    ConvolutionalNetwork,
    DescentModule,
    LinearRegressionDataModule,
    MultilayerPerceptron,
    NonFiniteLossError,
    TensorDataModule,
    UserError,
)
from manualprop.training._engine import obstacle
from manualprop.training.callbacks import History, checkpoint_callbacks
from manualprop.training.cli import quieten
from manualprop.training.datamodules import Rows
from manualprop.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:Checkpoint directory:UserWarning"
)

N = 300  # more than one chunk of stochastic descent


@pytest.fixture(autouse=True)
def quiet_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quieten()


def examples(n: int = N, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, features, generator=generator)
    return x, (x.sum(dim=1) > 0).long() + (x[:, 0] > 1).long()


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return MultilayerPerceptron([4, 5, 3], dropout=dropout)


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(**{"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **options})


def fit(
    descent: Descent, loss: nn.Module | None = None, engine: Any = "auto", **options: Any
) -> tuple[DescentModule, Trainer]:
    module = DescentModule(network(), loss or manualprop.nn.CrossEntropyLoss(), descent, engine=engine)
    job = trainer(**{"max_epochs": 2, **options})
    job.fit(module, TensorDataModule(examples(), examples(50), examples(40)))
    return module, job


def plain(descent: Descent, epochs: int = 2) -> nn.Module:
    model, loss, (x, target) = network(), manualprop.nn.CrossEntropyLoss(), examples()
    optimizer = descent.make_optimizer(model.parameters())
    for epoch in range(epochs):
        for pieces in descent.updates(len(x), seed=0, epoch=epoch):
            optimizer.zero_grad()
            gradient(model, loss, [(x[rows], target[rows]) for rows in pieces])
            descent.clip_gradients(model.parameters())
            optimizer.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


DESCENTS = [
    Batch(learning_rate=0.5, micro_batch_size=128),
    Stochastic(learning_rate=0.01, clip_gradient_norm=0.5),
    MiniBatch(learning_rate=0.1, momentum=0.9, batch_size=64),
]
UPDATES = [1, N, 5]
ENGINES = ("tape-free", "autograd")


@pytest.mark.parametrize(("descent", "updates"), list(zip(DESCENTS, UPDATES, strict=True)))
def test_is_the_plain_loop_and_counts_updates(descent: Descent, updates: int) -> None:
    module, job = fit(descent, engine="autograd")
    assert job.global_step == 2 * updates
    assert same(module.model, plain(descent))


def test_batch_in_one_piece_equals_pieces() -> None:
    models = [fit(Batch(learning_rate=0.5, micro_batch_size=size), max_epochs=5)[0] for size in (None, 77)]
    for a, b in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 100, 256, 257, 299, 300, 301, 400])
def test_max_steps_is_honoured_inside_a_chunk(limit: int) -> None:
    for engine in ENGINES:
        _, job = fit(Stochastic(learning_rate=0.01), engine=engine, max_steps=limit, max_epochs=-1)
        assert job.global_step == limit
    assert "val_loss" in job.callback_metrics


def test_limit_train_batches() -> None:
    _, job = fit(MiniBatch(learning_rate=0.1, batch_size=64), limit_train_batches=2, max_epochs=3)
    assert job.global_step == 6


def test_metrics_are_means_over_examples() -> None:
    module, job = fit(MiniBatch(learning_rate=0.1, batch_size=64))
    x, target = examples(50)
    data = TensorDataModule(examples(), (x, target), evaluation_batch_size=7)
    values = job.validate(module, data, verbose=False)[0]
    output = module.model(x)
    assert values["val_loss"] == pytest.approx(nn.functional.cross_entropy(output, target).item(), rel=1e-5)
    assert values["val_accuracy"] == pytest.approx((output.argmax(1) == target).float().mean().item())


def test_weighted_loss_is_a_weighted_mean() -> None:
    weight = torch.tensor([1.0, 5.0, 0.1])
    module, job = fit(Batch(learning_rate=0.1), nn.CrossEntropyLoss(weight=weight))
    x, target = examples(50)
    values = job.validate(
        module, TensorDataModule(examples(), (x, target), evaluation_batch_size=7), verbose=False
    )
    assert values[0]["val_loss"] == pytest.approx(module.loss(module.model(x), target).item(), rel=1e-5)


def test_validate_before_fit() -> None:
    data = TensorDataModule(examples(), examples(50))
    module = DescentModule(network(), nn.CrossEntropyLoss(), MiniBatch(learning_rate=0.1))
    job = trainer(max_epochs=1)
    job.validate(module, data, verbose=False)
    job.fit(module, data)
    assert job.global_step == 10


def test_predicts_probabilities() -> None:
    module, job = fit(Batch(learning_rate=0.1))
    outputs: Any = job.predict(module, TensorDataModule(examples(), None, examples(40)))
    torch.testing.assert_close(torch.cat(outputs).sum(dim=1), torch.ones(40))


# --- engines --------------------------------------------------------------------------------------------------------

HALF: Any = functools.partial(StepLR, step_size=1, gamma=0.5)
EXACT = {
    "batch": Batch(learning_rate=0.5, momentum=0.9),
    "batch-pieces": Batch(learning_rate=0.5, momentum=0.9, micro_batch_size=77, weight_decay=0.01),
    "batch-pieces-clipped": Batch(learning_rate=0.5, micro_batch_size=128, clip_gradient_value=0.01),
    "stochastic": Stochastic(learning_rate=0.01),
    "stochastic-nesterov": Stochastic(
        learning_rate=0.01, momentum=0.8, nesterov=True, lr_scheduler=HALF, lr_scheduler_interval="epoch"
    ),
    "stochastic-clipped": Stochastic(learning_rate=0.05, clip_gradient_norm=0.5),
    "minibatch": MiniBatch(learning_rate=0.1, momentum=0.9, weight_decay=0.01, batch_size=64),
    "minibatch-by-update": MiniBatch(
        learning_rate=0.5,
        batch_size=64,
        lr_scheduler=functools.partial(StepLR, step_size=3, gamma=0.5),
        lr_scheduler_interval="update",
    ),
    "minibatch-Adam": MiniBatch(optimizer=functools.partial(torch.optim.Adam, lr=0.01), batch_size=64),
}


@pytest.mark.parametrize("descent", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_engines_make_the_same_updates(descent: Descent, reduction: str) -> None:
    if reduction == "sum":
        descent = dataclasses.replace(
            descent, learning_rate=descent.learning_rate and descent.learning_rate / 50
        )
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    if isinstance(descent, Stochastic) and reduction == "mean":
        weight = None  # type: ignore[assignment]
    jobs = [
        in_float64(descent, manualprop.nn.CrossEntropyLoss(weight, reduction=reduction), engine)
        for engine in ENGINES
    ]
    (ours, job), (theirs, other) = jobs
    assert (ours.engine_taken, theirs.engine_taken) == ENGINES
    assert job.global_step == other.global_step
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    values, expected = ({k: float(v) for k, v in t.callback_metrics.items()} for t in (job, other))
    assert values == pytest.approx(expected, rel=1e-6)
    assert rate(job) == rate(other)


def in_float64(descent: Descent, loss: nn.Module, engine: Any) -> tuple[DescentModule, Trainer]:
    module = DescentModule(network(), loss, descent, engine=engine).double()
    x, target = examples()
    if not isinstance(descent, Stochastic):  # where it would be an update without an example
        target[::7] = -100
    job = trainer(max_epochs=3)
    job.fit(module, TensorDataModule((x.double(), target), (x.double(), target)))
    return module, job


def test_pieces_without_a_single_target() -> None:
    """The first pieces of the batch hold nothing but ignored targets."""
    x, target = examples()
    target[:200] = -100
    models = []
    for engine in ENGINES:
        loss = manualprop.nn.CrossEntropyLoss()
        module = DescentModule(network(), loss, Batch(learning_rate=0.5, micro_batch_size=100), engine=engine)
        trainer(max_epochs=2).fit(module, TensorDataModule((x, target)))
        models.append(module.model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("engine: ")]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_auto_says_what_it_took(heard: pytest.LogCaptureFixture) -> None:
    module, _ = fit(MiniBatch(learning_rate=0.1), max_steps=2)
    assert (module.engine_taken, said(heard)) == ("tape-free", ["engine: tape-free"])
    fit(MiniBatch(learning_rate=0.1), engine="tape-free", max_steps=2)
    fit(MiniBatch(learning_rate=0.1), engine="autograd", max_steps=2)
    assert len(said(heard)) == 1  # who chooses needs not be told


class OwnForward(DescentModule):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class OwnHook(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pass


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def swapped_in(layer: nn.Module) -> nn.Module:
    return nn.Sequential(manualprop.nn.Linear(4, 3), layer)


REFUSED: dict[str, Any] = {
    "layer": (swapped_in(Unknown()), {}, r"layer '1' \(Unknown\) cannot be run without a tape: its forward is not known here"),
    "torch": (swapped_in(nn.Tanh()), {}, r"it is torch's; call manualprop\.swap\(model\) first"),
    "late": (swapped_in(manualprop.nn.Softmin(dim=-1)), {}, r"layer '1' \(Softmin\) .* more than one application of one rule"),
    "precision": (network(), {"precision": "bf16-mixed"}, r"precision is the model's own\. Got precision='bf16-mixed'"),
    "anomaly": (network(), {"detect_anomaly": True}, "detect_anomaly=True looks at autograd's tape"),
    "strategy": (network(), {"strategy": "ddp", "devices": 2}, r"one device trains without a tape\. Got 2 with DDPStrategy"),
    "callback": (network(), {"callbacks": [OwnHook()]}, "OwnHook has its own on_before_optimizer_step, which is not called"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*detect_anomaly:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_where_there_is_no_way_without_a_tape(name: str, heard: pytest.LogCaptureFixture) -> None:
    model, options, text = REFUSED[name]
    before = copy.deepcopy(model.state_dict())
    parts = (model, manualprop.nn.CrossEntropyLoss(), MiniBatch(learning_rate=0.1))
    if name == "strategy":  # without starting processes
        module = DescentModule(*parts)
        module._trainer = types.SimpleNamespace(strategy=DDPStrategy(), world_size=2)  # type: ignore[assignment]
        assert re.search(text, obstacle(module) or "")
        return
    module = DescentModule(*parts, engine="tape-free")
    with pytest.raises(UserError, match=f"engine='tape-free' must be able .*{text}.*engine='auto'"):
        trainer(max_epochs=1, **options).fit(module, TensorDataModule(examples()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    module = DescentModule(*parts)
    trainer(max_epochs=1, **options).fit(module, TensorDataModule(examples()))
    assert module.engine_taken == "autograd"
    assert re.search(f"^engine: autograd, because .*{text}", said(heard)[-1])
    assert "autograd, where" not in said(heard)[-1]
    assert not same(model, type("Before", (), {"state_dict": lambda self: before})())


def test_losses_and_modules_of_ones_own_go_through_autograd(heard: pytest.LogCaptureFixture) -> None:
    fit(MiniBatch(learning_rate=0.1), nn.CrossEntropyLoss(), max_epochs=1)
    assert said(heard)[-1] == (
        "engine: autograd, because the loss must be one of manualprop.nn, whose gradient is known. "
        "Got CrossEntropyLoss. Use manualprop.nn.CrossEntropyLoss."
    )
    own = OwnForward(network(), manualprop.nn.CrossEntropyLoss(), MiniBatch(learning_rate=0.1))
    trainer(max_epochs=1).fit(own, TensorDataModule(examples()))
    assert said(heard)[-1].startswith("engine: autograd, because OwnForward has its own forward")


def test_looking_for_late_refusals_leaves_no_trace() -> None:
    """Batch normalisation's running means and dropout's random numbers are those of a run that did not look."""
    layers = [
        manualprop.nn.Linear(4, 5),
        manualprop.nn.BatchNorm1d(5),
        nn.Dropout(0.5),
        manualprop.nn.Linear(5, 3),
    ]
    states = []
    for looks in (True, False):
        torch.manual_seed(0)
        module = DescentModule(
            nn.Sequential(*copy.deepcopy(layers)),
            manualprop.nn.CrossEntropyLoss(),
            MiniBatch(learning_rate=0.1),
        )
        if not looks:
            module._rehearse = lambda x, target: None  # type: ignore[method-assign]
        trainer(max_steps=3).fit(module, TensorDataModule(examples()))
        states.append(module.model)
    assert same(*states)


def test_observers_see_every_update() -> None:
    for engine in ENGINES:
        module = DescentModule(
            network(), manualprop.nn.CrossEntropyLoss(), Stochastic(learning_rate=0.1), engine=engine
        )
        job, seen = trainer(max_steps=270), []  # type: ignore[var-annotated]
        module.observers.append(lambda job=job, seen=seen: seen.append(job.global_step))
        job.fit(module, TensorDataModule(examples()))
        assert seen == list(range(270))


def test_engine_must_be_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"one of 'tape-free', 'autograd', 'auto'\. Got engine='fast'"):
        DescentModule(network(), nn.CrossEntropyLoss(), MiniBatch(learning_rate=0.1), engine="fast")  # type: ignore[arg-type]


# --- learning rate schedules ----------------------------------------------------------------------------------------


def rate(job: Trainer) -> float:
    return float(job.optimizers[0].param_groups[0]["lr"])


def test_schedule_by_epoch_and_by_update() -> None:
    _, by_epoch = fit(MiniBatch(learning_rate=1.0, batch_size=100, lr_scheduler=HALF))
    _, by_update = fit(
        MiniBatch(learning_rate=1.0, batch_size=100, lr_scheduler=HALF, lr_scheduler_interval="update")
    )
    assert (rate(by_epoch), rate(by_update)) == (0.5**2, 0.5**6)


def test_plateau_watches_a_logged_value() -> None:
    plateau: Any = functools.partial(ReduceLROnPlateau, patience=0, threshold=10.0, threshold_mode="abs")
    _, job = fit(Batch(learning_rate=1.0, lr_scheduler=plateau), max_epochs=3)
    assert rate(job) == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"Got lr_scheduler_monitor='val_los'; choose one of .*val_loss"):
        fit(Batch(learning_rate=1.0, lr_scheduler=plateau, lr_scheduler_monitor="val_los"))


# --- resuming -------------------------------------------------------------------------------------------------------


def run(
    name: str,
    descent: Descent,
    engine: Any = "auto",
    resume: bool = False,
    dropout: float = 0.3,
    **options: Any,
) -> tuple[DescentModule, list[dict[str, float]]]:
    torch.manual_seed(3)
    module = DescentModule(network(dropout), manualprop.nn.CrossEntropyLoss(), descent, engine=engine)
    directory, history = RunDirectory(name), History(RunDirectory(name).history)
    torch.manual_seed(4 if resume else 5)  # dropout must go on as the checkpoint says, not as the seed does
    job = trainer(
        enable_checkpointing=True,
        callbacks=[history, *checkpoint_callbacks(directory, "val_loss")],
        **options,
    )
    data = TensorDataModule(examples(), examples(50))
    job.fit(module, data, ckpt_path=directory.last if resume else None, weights_only=True)
    return module, history.rows


@pytest.mark.parametrize("descent", [*DESCENTS, EXACT["stochastic-nesterov"]])
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_for_bit(descent: Descent, engine: str) -> None:
    whole, expected = run("whole", descent, engine, max_epochs=4)
    run("parts", descent, engine, max_epochs=2)
    resumed, rows = run("parts", descent, engine, resume=True, max_epochs=4)
    assert same(whole, resumed)
    assert whole.engine_taken == resumed.engine_taken == engine
    assert same_state(whole.trainer.optimizers[0].state_dict(), resumed.trainer.optimizers[0].state_dict())
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in expected
    ]
    with RunDirectory("parts").history.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    buffers = [[values.get("momentum_buffer") for values in s["state"].values()] for s in (a, b)]
    equal = all(
        p is q if p is None or q is None else torch.equal(p, q) for p, q in zip(*buffers, strict=True)
    )
    return equal and a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize(
    "descent", [EXACT[name] for name in ("batch-pieces", "stochastic-nesterov", "minibatch")]
)
@pytest.mark.parametrize("engines", [ENGINES, ENGINES[::-1]])
def test_resume_with_the_other_engine(descent: Descent, engines: tuple[str, str]) -> None:
    whole, expected = run("whole", descent, engines[1], dropout=0.0, max_epochs=4)
    run("parts", descent, engines[0], dropout=0.0, max_epochs=2)
    resumed, rows = run("parts", descent, engines[1], resume=True, dropout=0.0, max_epochs=4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [row["update"] for row in rows] == [row["update"] for row in expected]


@pytest.mark.parametrize(("descent", "cut"), [(DESCENTS[1], 400), (DESCENTS[1], 300), (DESCENTS[2], 7)])
@pytest.mark.parametrize(
    ("engine", "limit"), [*((engine, None) for engine in ENGINES), (ENGINES[0], "steps")]
)
def test_resume_inside_an_epoch(descent: Descent, cut: int, engine: str, limit: str | None) -> None:
    scheduled = dataclasses.replace(descent, lr_scheduler=HALF)
    whole, _ = run("whole", scheduled, engine, max_epochs=4)
    run("parts", scheduled, engine, max_steps=cut, max_epochs=-1)
    limits: dict[str, int] = (
        {"max_epochs": 4} if limit is None else {"max_epochs": -1, "max_steps": whole.trainer.global_step}
    )
    resumed, rows = run("parts", scheduled, engine, resume=True, **limits)
    assert same(whole, resumed)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_history_drops_rows_that_the_checkpoint_does_not_know() -> None:
    descent = DESCENTS[2]
    run("killed", descent, max_epochs=2)
    path = RunDirectory("killed").history
    # Written, but killed before the checkpoint was.
    path.write_text(path.read_text() + "3,15,9.9,0.1,0,0,0,0\n")
    run("killed", descent, resume=True, max_epochs=3)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert rows[-1]["seconds"] != "9.9"


def test_last_is_written_when_it_is_not_the_best() -> None:
    diverging = Batch(learning_rate=1e-9, momentum=0.5)
    run("last", diverging, max_epochs=3)
    assert torch.load(RunDirectory("last").last, weights_only=True)["global_step"] == 3


def test_other_architecture_is_refused() -> None:
    run("arch", DESCENTS[2], max_epochs=1)
    module = DescentModule(MultilayerPerceptron([4, 6, 3]), nn.CrossEntropyLoss(), DESCENTS[2])
    with pytest.raises(ValueError, match=r"same architecture.*linear1\.weight \(5, 4\) there, \(6, 4\) here"):
        trainer(max_epochs=2).fit(
            module, TensorDataModule(examples()), ckpt_path=RunDirectory("arch").last, weights_only=True
        )


# --- refusals -------------------------------------------------------------------------------------------------------


class Poison(Callback):
    """Makes the weights nan before the third epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            with torch.no_grad():
                pl_module.model.linear1.weight[0, 0] = math.nan


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("descent", DESCENTS)
def test_non_finite_loss_stops_and_the_checkpoint_stays(descent: Descent, engine: Any) -> None:
    directory = RunDirectory("nan")
    job = trainer(
        max_epochs=5,
        enable_checkpointing=True,
        callbacks=[*checkpoint_callbacks(directory, "train_loss"), Poison()],
    )
    module = DescentModule(network(), manualprop.nn.CrossEntropyLoss(), descent, engine=engine)
    text = r"Got loss=nan at update \d+ \(epoch 3\), which was not made, with learning rate .*clip_gradient_norm.*checkpoint: .*last\.ckpt"
    with pytest.raises(NonFiniteLossError, match=text):
        job.fit(module, TensorDataModule(examples()))
    saved = torch.load(directory.last, weights_only=True)
    assert saved["global_step"] == job.global_step
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    module.model.linear1.weight.data[0, 0] = 0.0  # type: ignore[union-attr,operator,index]
    assert all(value.isfinite().all() for value in module.model.state_dict().values())  # no other was touched


def test_data_that_do_not_fit() -> None:
    module = DescentModule(network(), nn.CrossEntropyLoss(), MiniBatch(learning_rate=0.1))
    with pytest.raises(ValueError, match=r"takes 4 features per example\. Got inputs of shape \(32, 6\)"):
        trainer(max_epochs=1).fit(module, TensorDataModule(examples(features=6)))
    with pytest.raises(ValueError, match="batch_size=32 and 10 training examples"):
        trainer(max_epochs=1).fit(module, TensorDataModule(examples(10)))
    with pytest.raises(TypeError, match=r"must be a pair of tensors.*Got Tensor"):
        trainer(max_epochs=1).fit(module, InputsAlone(examples(), 3), Rows(examples(), 3))
    integers = (torch.zeros(3, 4, dtype=torch.long), torch.zeros(3))
    with pytest.raises(TypeError, match=r"Linear layer must be floating point\. Got dtype=torch\.int64"):
        trainer(max_epochs=1).fit(module, Rows(integers, 3), Rows(examples(), 3))


class InputsAlone(Rows):
    def take(self, rows: Tensor) -> Any:
        return self.x[rows]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TensorDataModule(examples(0)), ValueError, r"train must hold at least one example.*\(0, 4\)"),
        (lambda: TensorDataModule((torch.ones(3, 2), torch.ones(2))), ValueError, "Got 3 inputs and 2 targets"),
        (lambda: TensorDataModule((torch.ones(3, 2).int(), torch.ones(3))), TypeError, r"Got dtype=torch\.int32; convert"),
        (lambda: LinearRegressionDataModule(features=0), ValueError, "features=0"),
        (lambda: MultilayerPerceptron([3]), ValueError, r"two or more positive integers\. Got sizes=\[3\]"),
        (lambda: MultilayerPerceptron([3, 2], "Tonh"), ValueError, "activation must be a class.*'Tonh'"),
        (lambda: MultilayerPerceptron([3, 2], dropout=1.0), ValueError, r"below 1\. Got dropout=1\.0"),
        (lambda: ConvolutionalNetwork([1]), ValueError, r"channels must be two or more.*Got channels=\[1\]"),
        (lambda: ConvolutionalNetwork(classes=0), ValueError, "classes=0"),
        (lambda: ConvolutionalNetwork([1, 2, 2], image=(8, 3)), ValueError, r"at least 4 x 4.*image=\(8, 3\)"),
        (lambda: ConvolutionalNetwork(activation="Relu"), ValueError, "ConvolutionalNetwork: activation.*'Relu'"),
        (lambda: ConvolutionalNetwork(dropout=-0.1), ValueError, r"ConvolutionalNetwork.*Got dropout=-0\.1"),
        (lambda: RunDirectory("a/b"), ValueError, "Got name='a/b'; try 'a-b'"),
        (lambda: module_for(Stochastic(learning_rate=0.1), weight=torch.ones(3)), ValueError, "class weights cancel"),
        (lambda: module_for(Batch(learning_rate=0.1), reduction="none"), ValueError, "must be one number"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def module_for(descent: Descent, **loss: Any) -> DescentModule:
    return DescentModule(network(), nn.CrossEntropyLoss(**loss), descent)
