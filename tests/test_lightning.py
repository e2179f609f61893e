"""What Lightning's users call, as its documentation calls it: Tuner, loggers, callbacks, other modules on our data."""

from __future__ import annotations

import csv
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelSummary
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

import manualprop
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic
from manualprop.training import (
    DescentModule,
    DivergedError,
    MultilayerPerceptron,
    NonFiniteLossError,
    TensorDataModule,
    UserError,
    WholeCheckpointIO,
)
from manualprop.training.cli import quieten

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
]

N = 120


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quieten()


def examples(n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(7))
    return x, (x.sum(dim=1) > 0).long() + (x[:, 0] > 1).long()


def data() -> TensorDataModule:
    return TensorDataModule(examples(), examples(20), batch_size=40)


def module(descent: Descent, engine: Any = "auto") -> DescentModule:
    torch.manual_seed(0)
    return DescentModule(
        MultilayerPerceptron([4, 5, 3]), manualprop.nn.CrossEntropyLoss(), descent, engine=engine
    )


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return Trainer(**(quiet | options))


class Plain(LightningModule):
    """A module as Lightning's first page writes it, with automatic optimisation."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.learning_rate = MultilayerPerceptron([4, 5, 3]), learning_rate
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, target = batch
        self.seen.append(len(x))
        return nn.functional.cross_entropy(self.model(x), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


# --- data for any module ----------------------------------------------------------------------------------------------


def test_data_for_any_module() -> None:
    plain, job = Plain(), trainer(max_epochs=2)
    job.fit(plain, data())
    assert plain.seen == [40] * 6
    assert "val_loss" in job.callback_metrics


# --- Tuner ------------------------------------------------------------------------------------------------------------

SEARCHED: dict[str, Descent] = {
    "minibatch": MiniBatch(learning_rate=0.1, batch_size=40),
    "stochastic": Stochastic(learning_rate=0.01),
    "batch": Batch(learning_rate=0.5),
    "batch-pieces": Batch(learning_rate=0.5, micro_batch_size=50),
    "Adam": MiniBatch(optimizer=functools.partial(torch.optim.Adam, lr=0.1), batch_size=40),
    "scheduled": MiniBatch(
        learning_rate=0.1, lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    ),
}


@pytest.fixture(scope="module")
def lightnings_rates() -> list[float]:
    """The rates that Lightning tries with a module of automatic optimisation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.pytorch.tuner.lr_finder.tqdm", lambda **options: None)
        found = Tuner(trainer(max_epochs=40)).lr_find(Plain(), datamodule=data(), num_training=30)
    assert found is not None
    return list(found.results["lr"])


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
@pytest.mark.parametrize("name", SEARCHED)
def test_lr_find_tries_one_rate_per_update(
    name: str, engine: str, lightnings_rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.tuner.lr_finder.tqdm", lambda **options: None)
    trained = module(SEARCHED[name], engine)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    job = trainer(max_epochs=60)
    found = Tuner(job).lr_find(trained, datamodule=data(), num_training=30)
    assert found is not None
    of_updates = [
        rate
        for rate, loss in zip(found.results["lr"], found.results["loss"], strict=True)
        if math.isfinite(loss)
    ]
    assert of_updates == pytest.approx(lightnings_rates[: len(of_updates)])
    assert len(of_updates) == 30
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert trained.learning_rate == found.suggestion()
    job = trainer(max_epochs=1)
    job.fit(trained, data())
    scheduled = 0.1 if name == "scheduled" else 1.0
    assert job.optimizers[0].param_groups[0]["lr"] == pytest.approx(scheduled * trained.learning_rate)


def test_lr_find_ends_where_the_loss_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.tuner.lr_finder.tqdm", lambda **options: None)
    tuner = Tuner(trainer(max_epochs=60))
    found = tuner.lr_find(
        module(SEARCHED["minibatch"]), datamodule=data(), max_lr=1e38, early_stop_threshold=None
    )
    assert found is not None
    assert len(found.results["lr"]) < 100


def test_lr_find_does_not_change_the_run() -> None:
    """A run after a search makes the same updates as one without."""
    states = []
    for searches in (True, False):
        trained = module(MiniBatch(learning_rate=0.1, batch_size=40))
        if searches:
            Tuner(trainer(max_epochs=60)).lr_find(
                trained, datamodule=data(), num_training=20, update_attr=False
            )
        trainer(max_epochs=2).fit(trained, data())
        states.append(trained.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_scale_batch_size(mode: Any) -> None:
    trained = module(MiniBatch(learning_rate=0.1, batch_size=7))
    found = Tuner(trainer(max_epochs=3)).scale_batch_size(trained, datamodule=data(), mode=mode, margin=0.0)
    assert found == trained.batch_size == N  # there is memory enough for all of them
    job = trainer(max_epochs=3)
    job.fit(trained, data())
    assert job.global_step == 3


@pytest.mark.parametrize("descent", [Stochastic(learning_rate=0.1), Batch(learning_rate=0.1)])
def test_scale_batch_size_is_mini_batch_descents(descent: Descent) -> None:
    text = f"batch_size is a number of MiniBatch alone. Got the descent {type(descent).__name__}"
    with pytest.raises(UserError, match=text):
        Tuner(trainer(max_epochs=3)).scale_batch_size(module(descent), datamodule=data())


# --- loggers and callbacks --------------------------------------------------------------------------------------------


def test_loggers_monitors_and_summary(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO)
    logger = CSVLogger("logs", name="my_exp_name")
    watched = module(
        MiniBatch(
            learning_rate=0.1,
            batch_size=40,
            lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        )
    )
    callbacks = [LearningRateMonitor(logging_interval="epoch"), ModelSummary(max_depth=-1)]
    job = trainer(max_epochs=3, logger=logger, callbacks=callbacks, log_every_n_steps=1)
    job.fit(watched, data())
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr-SGD"]) for row in rows if row["lr-SGD"]] == [0.1, 0.05, 0.025]
    assert len([row for row in rows if row["train_loss"]]) == 3
    assert len([row for row in rows if row["val_loss"]]) == 3
    assert any("model.linear1" in text for text in caplog.messages)


def test_tensorboard_says_what_it_needs() -> None:
    try:
        logger = TensorBoardLogger(save_dir="logs")
    except ModuleNotFoundError as error:
        assert "Neither `tensorboard` nor `tensorboardX` is available" in str(error)
        return
    trainer(max_epochs=1, logger=logger).fit(module(MiniBatch(learning_rate=0.1)), data())
    assert list(Path(logger.log_dir).glob("events.out.tfevents.*"))


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
def test_early_stopping(engine: str) -> None:
    early = EarlyStopping(monitor="val_loss", mode="min", min_delta=10.0, patience=2)
    job = trainer(max_epochs=20, callbacks=[early])
    job.fit(module(MiniBatch(learning_rate=0.1), engine), data())
    assert (job.current_epoch, early.stopped_epoch) == (3, 2)


def test_whole_checkpoints_with_a_trainer_of_ones_own() -> None:
    job = trainer(max_epochs=1, plugins=[WholeCheckpointIO()])
    trained = module(MiniBatch(learning_rate=0.1))
    job.fit(trained, data())
    job.save_checkpoint("a/new/place/example.ckpt")
    assert [path.name for path in Path("a/new/place").iterdir()] == ["example.ckpt"]
    assert DescentModule.load_from_checkpoint("a/new/place/example.ckpt").descent == trained.descent


# --- runs that diverge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
@pytest.mark.parametrize(
    "descent",
    [
        MiniBatch(learning_rate=1e10, batch_size=40),
        Stochastic(learning_rate=1e10),
        Batch(learning_rate=1e10),
        Batch(learning_rate=1e10, micro_batch_size=50),
    ],
    ids=lambda descent: repr(descent)[:20],
)
def test_a_run_that_diverges_names_update_and_range(descent: Descent, engine: str) -> None:
    text = r"The loss must stay between 0 and 1\d\d, .* It left that range at update (2|3), and epoch (1|2) ends with"
    with pytest.raises(DivergedError, match=text):
        trainer(max_epochs=4).fit(module(descent, engine), data())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_run_that_learns_does_not_diverge(reduction: str) -> None:
    """Neither large targets nor a sum over examples, nor a single bad example, is a divergence."""
    x, _ = examples()
    y = 1e6 * x.sum(dim=1, keepdim=True)
    y[3] = 1e8
    descent = Batch(learning_rate=1e-3 / (N if reduction == "sum" else 1))
    trained = DescentModule(manualprop.nn.Linear(4, 1), manualprop.nn.MSELoss(reduction=reduction), descent)
    job = trainer(max_epochs=5)
    job.fit(trained, TensorDataModule((x, y)))
    assert job.global_step == 5


def loader(x: Tensor, target: Tensor) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, target), batch_size=40)


def spoilt(x: Tensor) -> Tensor:
    x = x.clone()
    x[50, 2] = math.nan
    return x


x, target = examples()
NOT_FINITE: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "training": (lambda: (loader(spoilt(x), target), loader(x, target)), r"The inputs hold nan in row 10, column 2: remove such rows.* Last good"),
    "validation": (lambda: (loader(x, target), loader(spoilt(x), target)), r"val_loss must be finite\. Got nan after 3 updates, and nan in row 10, column 0"),
    "ignored": (lambda: (loader(x, torch.cat([target[:40], torch.full((80,), -100)])), loader(x, target)), r"Every target of the update is -100 \(ignore_index\), and a mean over none is nan"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_a_loader_of_ones_own_hands_over(name: str, engine: str) -> None:
    loaders, text = NOT_FINITE[name]
    train, val = loaders()
    with pytest.raises(NonFiniteLossError, match=text):
        trainer(max_epochs=2, num_sanity_val_steps=0).fit(
            module(MiniBatch(learning_rate=0.1), engine), train, val
        )


def test_ignored_targets_of_stochastic_descent() -> None:
    labels = target.clone()
    labels[17] = -100
    with pytest.raises(
        UserError, match=r"every example must have a target.*Got -100 \(ignore_index\) in row 17"
    ):
        trainer(max_epochs=1).fit(module(Stochastic(learning_rate=0.1)), TensorDataModule((x, labels)))
