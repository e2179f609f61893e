"""Checkpoints and run directories: whole or not at all, gone on from with other settings, loaded without a word more."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import manualprop
from manualprop import _command
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic
from manualprop.training import (
    DescentModule,
    MultilayerPerceptron,
    TensorDataModule,
    UserError,
)
from manualprop.training.callbacks import History, checkpoint_callbacks
from manualprop.training.cli import quieten
from manualprop.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:Checkpoint directory:UserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
)

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits" / "minibatch.yaml"
FIT = ["fit", "--config", str(RECIPE), "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    quieten()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- whole or not at all ----------------------------------------------------------------------------------------------

# Trains, again and again, in processes that end themselves at one moment of writing: in the middle of the data, before
# and after each of them is on the disk, before and after the renaming. Forked, so that torch is imported once.
KILLED = """
import csv, os, random, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import torch
from manualprop.training import WholeCheckpointIO
from test_checkpoints import PLAIN, RunDirectory, quieten, train
torch.set_num_threads(1)
quieten()

def child(work):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 70
    try:
        work()
        code = 0
    finally:
        os._exit(code)

def go_on(epochs, resume=True):
    train(PLAIN, resume=resume, plugins=[WholeCheckpointIO()], max_epochs=epochs)

def killed_at(moment):
    left = moment
    def count(original, half=False):
        def function(file, *arguments):
            nonlocal left
            left -= 1
            if left == 0 and half:
                original(file, arguments[0][: len(arguments[0]) // 2])
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(file, *arguments)
        return function
    for name in ("write", "fsync", "replace", "close"):
        setattr(os, name, count(getattr(os, name), name == "write"))
    go_on(1000)

assert child(lambda: go_on(1, resume=False)) == 0
draw = random.Random(0)
for _ in range(10):
    moment = draw.randint(1, 40)
    status = child(lambda: killed_at(moment))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
    for name in ("last", "best"):
        checkpoint = torch.load(f"runs/run/checkpoints/{name}.ckpt", weights_only=True)
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
made = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)["global_step"] // 3
assert child(lambda: go_on(made + 1)) == 0
epochs = [int(row["epoch"]) for row in csv.DictReader(open("runs/run/history.csv"))]
assert epochs == list(range(1, made + 2)), (epochs, made)
run = RunDirectory("run")
run.claim(resume=True)
run.begin()
left = [name for _, _, names in os.walk("runs") for name in names if "partial" in name]
assert left == [], left
"""


@pytest.mark.slow
def test_killed_at_ten_moments_of_writing() -> None:
    """After each, both checkpoints can be read and training goes on; what was half written is gone in the end."""
    words = [sys.executable, "-c", KILLED, str(Path(__file__).parent)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB that is not that of the temporary directory."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(
            f"this user may not mount a file system; see the limit of a process below: {mounted.stderr}"
        )
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_disk)
    assert _command.main([*FIT, "--trainer.max_epochs=1"]) == 0
    last = Path("runs/digits-minibatch/checkpoints/last.ckpt")
    before = last.read_bytes()
    free = os.statvfs(".").f_bavail * os.statvfs(".").f_bsize
    Path("filler").write_bytes(bytes(free - len(before) // 2))
    assert _command.main(
        ["fit", "--name=digits-minibatch", "--resume", "--trainer.max_epochs=3", *FIT[3:]]
    ) == (1)
    shown = capsys.readouterr().err
    assert "checkpoints/last.ckpt must be written. Got No space left on device" in shown
    assert len(shown.splitlines()) <= 2  # and what has changed
    assert last.read_bytes() == before
    assert not list(Path("runs").rglob("*.partial"))
    Path("filler").unlink()
    assert (
        _command.main(["fit", "--name=digits-minibatch", "--resume", "--trainer.max_epochs=3", *FIT[3:]]) == 0
    )


def test_largest_file_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert _command.main([*FIT, "--trainer.max_epochs=1"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().err
    assert (
        "checkpoints/last.ckpt must be written. Got File too large; what stood there before is unchanged"
        in shown
    )
    assert "Traceback" not in shown
    assert not [path for path in Path("runs").rglob("*") if "ckpt" in path.name]


# --- going on with other settings -------------------------------------------------------------------------------------


def examples(n: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(7))
    return x, (x.sum(dim=1) > 0).long() + (x[:, 0] > 1).long()


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(quiet | options))


def network() -> nn.Module:
    torch.manual_seed(0)
    return MultilayerPerceptron([4, 5, 3])


def train(descent: Descent, resume: bool = False, callbacks: Any = (), **options: Any) -> DescentModule:
    engine = options.pop("engine", "auto")
    module = DescentModule(network(), manualprop.nn.CrossEntropyLoss(), descent, engine=engine)
    run = RunDirectory("run")
    kept = [History(run.history), *checkpoint_callbacks(run, "val_loss"), *callbacks]
    job = trainer(**{"max_epochs": 2, "enable_checkpointing": True, "callbacks": kept, **options})
    data = TensorDataModule(examples(), examples(20))
    job.fit(module, data, ckpt_path=run.last if resume else None, weights_only=True)
    return module


PLAIN = MiniBatch(learning_rate=0.1, batch_size=20)
MOMENTUM = dataclasses.replace(PLAIN, momentum=0.5)
STEP: Any = functools.partial(StepLR, step_size=1, gamma=0.5)
FASTER: Any = functools.partial(StepLR, step_size=1, gamma=0.1)
COSINE: Any = functools.partial(CosineAnnealingLR, T_max=4)
ADAM = MiniBatch(batch_size=20, optimizer=functools.partial(torch.optim.Adam, lr=0.01))


@dataclasses.dataclass
class Taken:
    """What a run goes on with: before, after; the rate of the epochs 3 and 4, the updates made by then."""

    before: Descent
    after: Descent
    says: list[str]
    rates: list[float]
    updates: list[int] = dataclasses.field(default_factory=lambda: [9, 12])
    group: dict[str, Any] = dataclasses.field(default_factory=dict)


TAKEN = {
    "nothing": Taken(PLAIN, PLAIN, [], [0.1, 0.1]),
    "rate": Taken(PLAIN, MiniBatch(learning_rate=0.001, batch_size=20), ["descent.learning_rate 0.1 -> 0.001"], [0.001, 0.001]),
    "momentum": Taken(PLAIN, MOMENTUM, ["descent.momentum 0.0 -> 0.5"], [0.1, 0.1], group={"momentum": 0.5}),
    "nesterov": Taken(MOMENTUM, dataclasses.replace(MOMENTUM, nesterov=True), ["descent.nesterov False -> True"], [0.1, 0.1], group={"nesterov": True}),
    "no momentum": Taken(MOMENTUM, PLAIN, ["descent.momentum 0.5 -> 0.0"], [0.1, 0.1], group={"momentum": 0.0}),
    "decay": Taken(PLAIN, dataclasses.replace(PLAIN, weight_decay=0.1), ["descent.weight_decay 0.0 -> 0.1"], [0.1, 0.1], group={"weight_decay": 0.1}),
    "clipping": Taken(PLAIN, dataclasses.replace(PLAIN, clip_gradient_norm=0.01), ["descent.clip_gradient_norm None -> 0.01"], [0.1, 0.1]),
    "batch size": Taken(PLAIN, dataclasses.replace(PLAIN, batch_size=30), ["descent.batch_size 20 -> 30"], [0.1, 0.1], [8, 10]),
    "a schedule": Taken(PLAIN, dataclasses.replace(PLAIN, lr_scheduler=STEP), ["descent.lr_scheduler none -> StepLR(step_size=1, gamma=0.5) by epoch, from its start"], [0.1, 0.05]),
    "no schedule": Taken(dataclasses.replace(PLAIN, lr_scheduler=STEP), PLAIN, ["descent.lr_scheduler StepLR(step_size=1, gamma=0.5) by epoch -> none, from its start"], [0.1, 0.1]),
    "faster": Taken(dataclasses.replace(PLAIN, lr_scheduler=STEP), dataclasses.replace(PLAIN, lr_scheduler=FASTER), ["descent.lr_scheduler StepLR(step_size=1, gamma=0.5) by epoch -> StepLR(step_size=1, gamma=0.1) by epoch, from its start"], [0.1, 0.01]),
    "another": Taken(dataclasses.replace(PLAIN, lr_scheduler=STEP), dataclasses.replace(PLAIN, lr_scheduler=COSINE), ["descent.lr_scheduler StepLR(step_size=1, gamma=0.5) by epoch -> CosineAnnealingLR(T_max=4, eta_min=0.0) by epoch, from its start"], [0.1, 0.05 * (1 + math.cos(math.pi / 4))]),
    "rate of a schedule": Taken(dataclasses.replace(PLAIN, lr_scheduler=STEP), dataclasses.replace(PLAIN, learning_rate=0.4, lr_scheduler=STEP), ["descent.learning_rate 0.1 -> 0.4"], [0.1, 0.05]),
    "Adam's": Taken(ADAM, dataclasses.replace(ADAM, optimizer=functools.partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.9))), ["descent.optimizer.lr 0.01 -> 0.02", "descent.optimizer.betas (0.9, 0.999) -> (0.5, 0.9)"], [0.02, 0.02], group={"betas": (0.5, 0.9)}),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
@pytest.mark.parametrize("name", TAKEN)
def test_settings_are_taken_up_from_there_on(name: str, engine: str) -> None:
    row = TAKEN[name]
    train(row.before, engine=engine)
    module = train(row.after, resume=True, max_epochs=4, engine=engine)
    assert module.changes == row.says
    with Path("runs/run/history.csv").open() as file:
        rows = [(float(r["learning_rate"]), int(r["update"])) for r in csv.DictReader(file)][2:]
    scheduled = row.after.lr_scheduler is not None  # the row shows the rate after the schedule has moved on
    assert [update for _, update in rows] == row.updates
    assert [rate for rate, _ in rows][: 1 if scheduled else 2] == pytest.approx(
        row.rates[: 1 if scheduled else 2]
    )
    group = module.trainer.optimizers[0].param_groups[0]
    assert {key: group[key] for key in row.group} == row.group


@pytest.mark.parametrize("engine", ["tape-free", "autograd"])
def test_what_is_taken_up_makes_the_updates(engine: str) -> None:
    """The weights are those of a plain loop that changes its settings after the second epoch."""
    after = MiniBatch(
        learning_rate=0.02, momentum=0.8, weight_decay=0.1, clip_gradient_norm=0.05, batch_size=15
    )
    train(MOMENTUM, engine=engine)
    module = train(after, resume=True, max_epochs=4, engine=engine)
    model, loss, (x, target) = network(), manualprop.nn.CrossEntropyLoss(), examples()
    optimizer = MOMENTUM.make_optimizer(model.parameters())
    for epoch, descent in enumerate([MOMENTUM, MOMENTUM, after, after]):
        options = {"lr": descent.learning_rate, "momentum": descent.momentum}
        optimizer.param_groups[0].update(options, weight_decay=descent.weight_decay)
        for (rows,) in descent.updates(len(x), seed=0, epoch=epoch):
            optimizer.zero_grad()
            loss(model(x[rows]), target[rows]).backward()
            descent.clip_gradients(model.parameters())
            optimizer.step()
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_batch_size_inside_an_epoch() -> None:
    """Every example of an epoch is seen once, where the batch size changes inside it."""
    train(PLAIN, max_steps=4, max_epochs=-1)  # 20 rows into the second epoch
    seen: list[Tensor] = []
    step = DescentModule.training_step

    def watched(self: DescentModule, batch: Any, batch_idx: int) -> Any:
        seen.append(batch[0])
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DescentModule, "training_step", watched)
        module = train(dataclasses.replace(PLAIN, batch_size=15), resume=True, max_epochs=3)
    sizes = [len(x) for x in seen]
    assert sizes == [0, 10, 15, 15, 15, 15, 15, 15]
    assert module.trainer.global_step == 4 + 7
    order = torch.cat([rows for (rows,) in PLAIN.updates(60, seed=0, epoch=1)])
    assert torch.equal(torch.cat(seen[:4]), examples()[0][order[20:]])


def test_callbacks_and_limits_are_taken_up() -> None:
    train(PLAIN, callbacks=[EarlyStopping("val_loss", patience=1)])
    stopping = EarlyStopping("val_loss", patience=50)
    module = train(PLAIN, resume=True, callbacks=[stopping], max_steps=8, max_epochs=-1)
    assert (stopping.patience, module.trainer.global_step) == (50, 8)


REFUSED: dict[str, tuple[Descent, dict[str, Any], str]] = {
    "optimizer": (ADAM, {}, r"descent\.optimizer must be the one whose state .* Got torch\.Adam, and torch\.SGD"),
    "descent": (Batch(learning_rate=0.1), {}, r"descent must be that of the run\. Got Batch, and MiniBatch in the"),
    "stochastic": (Stochastic(learning_rate=0.1), {}, r"Got Stochastic, and MiniBatch in the checkpoint"),
    "epochs": (PLAIN, {"max_epochs": 1}, r"max_epochs must be at least the epochs that have been made\. Got 1, and 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_up_is_refused_by_name(name: str) -> None:
    descent, options, text = REFUSED[name]
    train(PLAIN)
    with pytest.raises(UserError, match=text):
        train(descent, resume=True, **options)


def test_options_that_ask_for_another_state_are_refused() -> None:
    train(ADAM)
    amsgrad = dataclasses.replace(ADAM, optimizer=functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True))
    text = r"optimizer\.amsgrad must be as it was, because it asks for a state .*\(max_exp_avg_sq\)\. Got True, and False"
    with pytest.raises(UserError, match=text):
        train(amsgrad, resume=True)


def test_config_and_log_say_from_which_update_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = ["fit", "--name=digits-minibatch", "--resume", *FIT[3:]]
    assert _command.main([*FIT, "--trainer.max_epochs=1", "--descent.batch_size=500"]) == 0
    monkeypatch.setattr(__import__("logging").getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level("INFO"):
        changed = ["--trainer.max_epochs=2", "--descent.learning_rate=0.01"]
        changed += ["--model.engine=autograd", "--trainer.logger=CSVLogger", "--trainer.log_every_n_steps=1"]
        assert _command.main([*resume, *changed]) == 0
        assert _command.main([*resume, "--trainer.max_epochs=3", "--descent.batch_size=800"]) == 0
    said = [text for text in caplog.messages if text.startswith("resumed at update")]
    assert said[0].startswith(
        "resumed at update 3 with descent.learning_rate 0.1 -> 0.01; model.engine auto -> autograd"
    )
    assert said[1] == "resumed at update 6 with descent.batch_size 500 -> 800; trainer.max_epochs 2 -> 3"
    config = Path("runs/digits-minibatch/config.yaml").read_text().splitlines()
    for line in (
        "# from update 3 on: descent.learning_rate 0.1 -> 0.01",
        "# from update 3 on: model.engine auto -> autograd",
        "# from update 3 on: trainer.max_epochs 1 -> 2",
        "# from update 6 on: descent.batch_size 500 -> 800",
        "    learning_rate: 0.01",
        "    batch_size: 800",
    ):
        assert line in config
    assert any(
        line.startswith("# from update 3 on: trainer.logger False -> lightning.pytorch.loggers.CSVLogger")
        for line in config
    )
    logs = list(Path("runs/digits-minibatch/lightning_logs").glob("version_*/metrics.csv"))
    assert len(logs) == 2  # each part of the run has its own


# --- load_from_checkpoint ---------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A network that a checkpoint cannot make."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x)
        return output


def saved(model: nn.Module, descent: Descent, loss: nn.Module | None = None) -> DescentModule:
    module = DescentModule(
        model, loss or manualprop.nn.CrossEntropyLoss(), descent, seed=3, engine="autograd"
    )
    job = trainer(max_epochs=1)
    job.fit(module, TensorDataModule(examples()))
    job.save_checkpoint("example.ckpt")
    return module


def assert_same(ours: DescentModule, theirs: DescentModule) -> None:
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "torch": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)),
    "ours": lambda: manualprop.nn.Sequential(manualprop.nn.Linear(4, 4), manualprop.nn.Residual(manualprop.nn.GELU()), manualprop.nn.Linear(4, 3)),
}  # fmt: skip


@pytest.mark.parametrize(
    "descent", [PLAIN, dataclasses.replace(ADAM, lr_scheduler=STEP), Batch(learning_rate=0.1)]
)
@pytest.mark.parametrize("name", MODELS)
def test_load_from_checkpoint_needs_the_path_alone(name: str, descent: Descent) -> None:
    module = saved(MODELS[name](), descent, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    loaded = DescentModule.load_from_checkpoint("example.ckpt")
    assert_same(loaded, module)
    assert (loaded.seed, loaded.engine, repr(loaded.model)) == (3, "autograd", repr(module.model))
    assert repr(loaded.descent) == repr(descent)
    trainer(max_epochs=1).fit(loaded, TensorDataModule(examples()))


def test_load_from_checkpoint_of_a_command() -> None:
    assert _command.main([*FIT, "--trainer.max_epochs=1"]) == 0
    module = DescentModule.load_from_checkpoint(
        "runs/digits-minibatch/checkpoints/best.ckpt", map_location="cpu"
    )
    assert isinstance(module.model, MultilayerPerceptron)
    assert module.descent == MiniBatch(learning_rate=0.1, momentum=0.9, batch_size=32)


def test_a_class_of_ones_own_is_given_or_allowed() -> None:
    module = saved(Own(), PLAIN)
    with pytest.raises(
        UserError, match=r"model must be given, because it is made of \S*\.Own, which is not one of"
    ):
        DescentModule.load_from_checkpoint("example.ckpt")
    assert_same(DescentModule.load_from_checkpoint("example.ckpt", model=Own()), module)
    with torch.serialization.safe_globals([Own]):
        assert_same(DescentModule.load_from_checkpoint("example.ckpt"), module)


def test_weights_are_stored_once() -> None:
    saved(nn.Sequential(nn.Linear(4, 30_000), nn.Linear(30_000, 3)), PLAIN)
    weights = 4 * (30_000 * 4 + 30_000 + 3 * 30_000 + 3)
    assert Path("example.ckpt").stat().st_size < 1.1 * weights


def test_a_checkpoint_of_something_else_is_refused() -> None:
    torch.save({"state_dict": {}}, "foreign.ckpt")
    with pytest.raises(UserError, match="one that a training run of manualprop has written"):
        DescentModule.load_from_checkpoint("foreign.ckpt")
