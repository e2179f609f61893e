"""The console command: help, errors without tracebacks, run directories, interruption."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import manualprop
from manualprop import _command, _invocation
from manualprop.training import DescentModule, _help
from manualprop.training.callbacks import TrainingProgress

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:Checkpoint directory:UserWarning"
)

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits" / "minibatch.yaml"
FIT = ["fit", "--config", str(RECIPE), "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(_invocation.COMMAND, "manualprop")
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal while it winds up


def fit(*words: str) -> int:
    return _command.main([*FIT, *words])


def test_help_and_version_need_no_torch() -> None:
    script = (
        "import sys; from manualprop._command import main; main(['--help']); main(['--version']);"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in _command.COMMANDS)
    assert f"manualprop {manualprop.__version__}" in result.stdout


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _command.main(["fti"]) == 2
    assert capsys.readouterr().err == "manualprop: unknown command 'fti'. Did you mean 'fit'?\n"


def test_extra_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else name)
    assert fit() == 2
    assert 'fit needs rich, which is not installed. Get it with: pip install "manualprop[training]"' in (
        capsys.readouterr().err
    )


def test_python_m_is_the_console_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "manualprop", "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"manualprop {manualprop.__version__}\n"), done.stderr


# --- help -----------------------------------------------------------------------------------------------------------

WITH_SHIPPED_HELP = [name for name, command in _command.COMMANDS.items() if command.home == _command._CLI]
# Sphinx's markup, what Lightning praises, and the modules of torch by the hundred.
NOT_OURS = (
    ":class:",
    ":meth:",
    ":paramref:",
    "``",
    "main advantage",
    "every aspect",
    "torch.ao",
    "gradient_clip_val",
)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return _help.texts()


@pytest.mark.parametrize("command", WITH_SHIPPED_HELP)
def test_shipped_help_is_what_the_parser_says(command: str, made: dict[str, str]) -> None:
    shipped = (_command._HELP / f"{command}.txt").read_text(encoding="utf-8")
    assert shipped == made[command], (
        "an option has changed. Write the text anew: python3 scripts/run.py docs help"
    )


@pytest.mark.parametrize("command", WITH_SHIPPED_HELP)
def test_shipped_help_is_short_and_names_what_there_is(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command.main([command, "--name=x", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.startswith(f"usage: manualprop {command} [--config RECIPE] [--name NAME]")
    assert not [words for words in NOT_OURS if words in text]
    known = [
        "Batch",
        "Stochastic",
        "MiniBatch",
        "MultilayerPerceptron",
        "CrossEntropyLoss",
        "max_epochs",
        "--print_config",
    ]
    known += ["DigitsDataModule", "LinearRegressionDataModule", "--help=all"]
    known += ["--resume", "--overwrite"] if command == "fit" else ["--checkpoint"]
    assert not [name for name in known if name not in text]


def test_shipped_help_needs_no_torch() -> None:
    script = (
        "import sys; from manualprop._command import main\n"
        f"for command in {WITH_SHIPPED_HELP}: main([command, '--help'])\n"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_all_asks_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _command.main(["fit", "--help=all"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--trainer.{key}" in shown for key in (*_help._COMMON, "barebones", "sync_batchnorm"))
    assert not [words for words in NOT_OURS if words in shown]


# --- what is printed can be pasted ----------------------------------------------------------------------------------


def test_how_to_call_the_console_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _invocation.console_command() == "manualprop"  # as scripts/run.py says
    monkeypatch.delenv(_invocation.COMMAND)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "an environment" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    there = shlex.quote(str(tmp_path / "an environment" / "python"))
    assert _invocation.console_command() == f"{there} -m manualprop"
    for folder in ("elsewhere", "an environment"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manualprop").write_text("#!/bin/sh\n")
        (tmp_path / folder / "manualprop").chmod(0o755)
    assert _invocation.console_command() == f"{there} -m manualprop"  # that one is another environment's
    monkeypatch.setenv("PATH", str(tmp_path / "an environment"))
    assert _invocation.console_command() == "manualprop"


def test_paths_are_whole_for_who_stands_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("runs/x/history.csv")
    assert _invocation.shown(path) == "runs/x/history.csv"
    monkeypatch.setenv(_invocation.FOLDER, str(tmp_path))
    assert _invocation.shown(path) == "runs/x/history.csv"
    monkeypatch.setenv(_invocation.FOLDER, str(tmp_path.parent))
    assert _invocation.shown(path) == str(tmp_path / "runs/x/history.csv")


@pytest.mark.slow
def test_what_fit_prints_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(_invocation.COMMAND)
    assert fit("--trainer.max_epochs=1") == 0
    *_, last = capsys.readouterr().out.splitlines()
    title, _, command = last.partition(":")
    assert title == "to test it"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "test_accuracy 0." in done.stdout, done.stderr


# --- what a run shows -----------------------------------------------------------------------------------------------

STATES = ["epoch 300/300, 1234567 updates, loss 0.003, val. 100.0 %", "epoch 1/15, 9 updates, loss nan", ""]


@pytest.mark.parametrize("width", [72, 80, 120])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("title", ["run", "a-name-of-more-than-forty-characters-is-long"])
@pytest.mark.parametrize(("elapsed", "time_shown"), [(5.0, "00:05"), (7384.0, "2:03:04")])
def test_the_progress_line_keeps_its_time(
    width: int, state: str, title: str, elapsed: float, time_shown: str
) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    progress = TrainingProgress(title, console)._progress
    task = progress.add_task(title, total=1.0, state=state)
    progress.update(task, completed=1.0)
    progress.tasks[0].finished_time = elapsed
    with console.capture() as capture:
        console.print(progress.get_renderable())
    (line,) = capture.get().splitlines()
    assert line.rstrip().endswith(time_shown) and len(line) <= width
    assert width < 80 or state in line  # and nothing of the state is lost where there are 80 columns


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.max_epochs=0"], "No update was made, and nothing was written but the configuration: max_epochs=0"),
        (["--trainer.max_steps=0"], "No update was made, and nothing was written but the configuration: .*max_steps=0"),
        (["--trainer.fast_dev_run=true"], r"1 epoch, 1 update, [\d.]+ s\ntrain_accuracy .*\nNothing was kept: this was a trial"),
        (["--trainer.max_epochs=1"], r"1 epoch, 41 updates, [\d.]+ s\ntrain_accuracy .*\nbest checkpoint: runs/"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_every_run_ends_with_a_summary(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*words) == 0
    shown = capsys.readouterr().out
    assert re.match(said, shown), shown
    assert max(map(len, shown.splitlines())) <= 100


MISTAKES: list[tuple[str, str]] = [
    # keys and values
    ("--descent.batch_sise=9", "unknown option 'descent.batch_sise' of manualprop.descent.MiniBatch. Did you mean 'batch_size'?"),
    ("--trainer.max_epoch=9", "unknown key 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?"),
    ("--trainer.gradient_clip_val=1", "unknown key 'trainer.gradient_clip_val': use --descent.clip_gradient_norm"),
    ("--descent=Minibatch", "descent: unknown class 'Minibatch'. Did you mean 'MiniBatch'?"),
    ("--model.loss=manualprop.nn.CrossEntropyLos", "unknown class 'manualprop.nn.CrossEntropyLos'. Did you mean 'CrossEntropyLoss'?"),
    ("--descent.batch_size=x", "descent.batch_size must be of type int. Got 'x'."),
    ("--trainer.max_epochs=many", "trainer.max_epochs must be of type int or null. Got 'many'."),
    ("--trainer.max_epochs=-5", "`max_epochs` must be a non-negative integer or -1. You passed in -5."),
    ("--trainer.limit_train_batches=0", "data must give at least one batch of training examples. Got none"),
    ("--trainer.val_check_interval=1000", "`val_check_interval` (1000) must be less than or equal to the number of the training batches (41)"),
    ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be at least 1. Got 0"),
    ("--trainer.devices=-3", "should be an int > 0"),
    ("--trainer.accelerator=gpu --trainer.devices=99", ""),
    ("--trainer.strategy=nosuch", "invalid strategy name: `strategy='nosuch'`"),
    ("--trainer.callbacks+=LearningRateMonitor", "Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger."),
    ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_los", "EarlyStopping must watch a value that is logged in every epoch. Got monitor='val_los'; choose one of train_accuracy, train_loss, val_accuracy, val_loss."),
    ("--threads=0", "threads must be above 0. Got 0."),
    ("--seed=-1", "seed_everything must be at least 0 and at most 4294967295. Got -1."),
    ("--name=a/b", "name must be a plain directory name"),
    ("--config=nosuch.yaml", "the file given as --config must exist. Got "),
    ("--overwrite --resume", "Give --overwrite or --resume, not both"),
    ("--resume", "checkpoints/last.ckpt does not exist; start the run without --resume."),
    # descents
    ("--descent.learning_rate=-1", "MiniBatch: learning_rate must be a positive number. Got learning_rate=-1.0."),
    ("--descent.optimizer=Adam", "Got an optimizer and learning_rate=0.1, momentum=0.9"),
    ("--descent.batch_size=5000", "Got batch_size=5000 and 1297 training examples"),
    ("--descent.lr_scheduler=StepLR", "step_size"),
    # models, losses, engines
    ("--model.model.sizes=[32,10]", "the model takes 32 features per example. Got inputs of shape (200, 64)"),
    ("--model.model.sizes=[64,7]", "class numbers must lie from 0 to 6, because the model has 7 outputs. Got 9 in row 5"),
    ("--model.model.sizes=[64,a]", "model.model.sizes must be of type"),
    ("--model.model.activation=Tonh", "activation must be a class of manualprop.nn"),
    ("--model.engine=fast", "model.engine must be one of 'tape-free', 'autograd', 'auto'. Got 'fast'."),
    ("--model.engine=tape-free --model.model.activation=torch.nn.Tanh", "layer 'activation1' (Tanh) cannot be run without a tape: it is torch's"),
    ("--model.engine=tape-free --trainer.precision=bf16-mixed", "Got precision='bf16-mixed'. Set engine='auto' or 'autograd'"),
    ("--model.model=mistaken.TwoOutputs", "the model must return one tensor. Got tuple"),
    ("--model.model=mistaken.OneOutput", "CrossEntropyLoss must be given one output per class, of shape (examples, classes). Got an output of shape"),
    ("--model.model=mistaken.Misshapen", "the model must take inputs of shape (200, 64). Got RuntimeError: shape '[3, 1000]' is invalid"),
    ("--model.model=mistaken.Frozen", "the model must have a parameter that requires a gradient. Got none"),
    ("--model.model=mistaken.NoParameters", "the model must have a parameter that requires a gradient. Got none"),
    ("--model.loss=mistaken.ManyNumbers", "the loss must be one number. Got a tensor of shape (200,)"),
    ("--model.loss=manualprop.nn.MSELoss", "MSELoss must be given an output and a target of one shape. Got (N, 10) and (N,), which would be broadcast"),
    # data
    ("--data=mistaken.FloatLabels", "must be class numbers, of dtype torch.int64. Got targets of shape (32,) and torch.float32; convert them with target.long()"),
    ("--data=mistaken.Int32Labels", "must be class numbers, of dtype torch.int64. Got dtype=torch.int32"),
    ("--data=mistaken.OneHot", "must be given one class number per example, of shape (N,). Got targets of shape (32, 10); for one-hot rows use target.argmax(dim=1)"),
    ("--data=mistaken.Column", "Got targets of shape (32, 1); use target.squeeze(1)."),
    ("--data=mistaken.FromOne", "class numbers must lie from 0 to 9, because the model has 10 outputs. Got 10 in row"),
    ("--data=mistaken.Negative", "Got -1 in row 3; number the classes from 0 on"),
    ("--data=mistaken.NumPy", "the inputs of train must be a tensor. Got numpy.ndarray; convert it with torch.as_tensor"),
    ("--data=mistaken.Nan", "the inputs of train must be finite. Got nan in row 5, column 7; remove such rows"),
    ("--data=mistaken.NanInValidation", "the inputs of val must be finite. Got nan in row 5, column 7"),
    ("--data=mistaken.Ignored", "an update must see at least one target that is not ignored: a mean over none is nan. Got -100"),
    ("--data=mistaken.Images", "Got inputs of shape (32, 8, 8); flatten them: put torch.nn.Flatten() before the first layer"),
    ("--data=mistaken.Double", "model and inputs must be of one dtype. Got a model of torch.float32 and inputs of torch.float64"),
    ("--data=mistaken.Integers", "the inputs of train must be floating point. Got dtype=torch.int64"),
    ("--data=mistaken.Three", "train must be a pair of tensors (inputs, targets). Got tuple of 3."),
    ("--data=mistaken.Shorter", "train must hold one target per input. Got 64 inputs and 60 targets."),
    ("--data=mistaken.WideValidation", "the model takes 64 features per example. Got inputs of shape (64, 32)"),
    ("--data=mistaken.LabelsOfValidation", "Got 10 in row"),
    ("--data=mistaken.Loader", "must be class numbers, of dtype torch.int64. Got targets of shape (16,) and torch.float32"),
    ("--data=mistaken.Dicts", "a batch must be a pair of tensors (inputs, targets). Got dict"),
    ("--data=mistaken.EmptyLoader", "data must give at least one batch of training examples. Got none"),
    ("--data=mistaken.NoFile", "every file that the configuration names must be there. Got No such file or directory: nosuch.pt"),
    ("--data=lightning.pytorch.LightningDataModule", "`train_dataloader` must be implemented"),
    # packages and places
    ("--trainer.logger=TensorBoardLogger", "TensorBoardLogger: Neither `tensorboard` nor `tensorboardX` is available"),
    ("--trainer.logger.save_dir=elsewhere", "trainer.logger"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero:UserWarning")
@pytest.mark.parametrize(("words", "text"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_are_one_line(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused command says in a line or two what to do, and leaves the disk as it was."""
    assert fit("--trainer.max_epochs=1", *words.split()) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert shown.startswith("manualprop fit: ")
    assert len(shown.splitlines()) <= 2
    assert list(Path().iterdir()) == []


def replaced(old: str, new: str) -> bytes:
    return RECIPE.read_text().replace(old, new).encode()


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (replaced("batch_size", "batch_sise"), "unknown option 'descent.batch_sise'"),
        (replaced("max_epochs", "max_epoch"), "unknown key 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?"),
        (replaced("\ndata:", "\ndta:"), "unknown key 'dta.class_path'. Did you mean 'data'?"),
        (replaced("    momentum", "   momentum"), "the file given as --config must be YAML. Got "),
        (replaced("[64, 64, 10]", "3"), "model.model.sizes must be of type list. Got '3'."),
        (replaced("class_path: manualprop.descent.MiniBatch", "class: MiniBatch"), "descent must name a class of the kind Descent, by class_path"),
        (b"", "must hold the keys of a run, such as name, descent, model, data and trainer. Got an empty file"),
        (b"- 1\n- 2\n", "must hold the keys of a run, such as name, descent, model, data and trainer. Got - 1 - 2"),
        (b"name: a\n\tdescent: b\n", "must be YAML. Got while scanning"),
        (b"name: 'a\n", "must be YAML. Got while scanning a quoted scalar"),
        (bytes(range(256)), "must be text in UTF-8. Got "),
        (b"descent: !!python/object:os.system x\n", "must be YAML. Got could not determine a constructor"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes_in_the_recipe(recipe: bytes, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_bytes(recipe)
    assert _command.main(["fit", "--config", "bad.yaml"]) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 2
    assert [path.name for path in Path().iterdir()] == ["bad.yaml"]


# --- a run that is there already ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of runs after one epoch; copied where it may change."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fit("--trainer.max_epochs=1") == 0
    return home / "runs"


LAST = Path("runs/digits-minibatch/checkpoints/last.ckpt")
RESUME = ["fit", "--name=digits-minibatch", "--resume", "--trainer.enable_progress_bar=false"]


def truncate() -> None:
    LAST.write_bytes(LAST.read_bytes()[:1000])


def make_a_folder() -> None:
    LAST.unlink()
    LAST.mkdir()


def other_version() -> None:
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["manualprop"]["version"] = 7
    torch.save(checkpoint, LAST)


def spoil_config() -> None:
    Path("runs/digits-minibatch/config.yaml").write_text("x: [")


WITH_A_RUN: dict[str, tuple[Callable[[], object], str, str]] = {
    "truncated": (truncate, "fit --resume", "last.ckpt cannot be read as one (RuntimeError); copy runs/digits-minibatch/checkpoints/best.ckpt there"),
    "empty": (lambda: LAST.write_bytes(b""), "fit --resume", "last.ckpt cannot be read as one (EOFError)"),
    "folder": (make_a_folder, "fit --resume", "last.ckpt cannot be read as one (IsADirectoryError)"),
    "foreign": (lambda: torch.save({"state_dict": {}}, LAST), "fit --resume", "Got one without optimizer_states, lr_schedulers, loops, callbacks, manualprop"),
    "a list": (lambda: torch.save([1, 2], LAST), "fit --resume", "Got one without state_dict"),
    "a module": (lambda: torch.save(torch.nn.Linear(2, 2), LAST), "fit --resume", "last.ckpt cannot be read as one (UnpicklingError)"),
    "version": (other_version, "fit --resume", "must be of version 1. Got version 7; go on with the version of manualprop that wrote it"),
    "config": (spoil_config, "fit --resume", "must be YAML. Got while parsing a flow node"),
    "foreign to test": (lambda: torch.save({"state_dict": {"a": torch.ones(1)}}, LAST), "test --checkpoint=last", "same architecture. Got a (1,) there, absent here"),
    "list to predict": (lambda: torch.save([1, 2], LAST), "predict --checkpoint=last", "last.ckpt holds no weights (state_dict)"),
    "folder to validate": (lambda: None, "validate --checkpoint=runs", "runs is a directory; give"),
    "labels of test": (lambda: None, "test --data=mistaken.LabelsOfTest", "class numbers must lie from 0 to 9, because the model has 10 outputs. Got 10 in row 5"),
    "data": (lambda: None, "fit --resume --data=mistaken.Column", "data must hold as many training examples as the run has seen. Got 64 examples, and 1297 in the checkpoint"),
    "optimizer": (lambda: None, "fit --resume --descent.optimizer=torch.optim.Adam --descent.learning_rate=null --descent.momentum=0", "descent.optimizer must be the one whose state the checkpoint holds. Got torch.Adam, and torch.SGD in the checkpoint"),
    "descent": (lambda: None, "fit --resume --descent=Stochastic", "descent must be that of the run. Got Stochastic, and MiniBatch in the checkpoint"),
    "sizes": (lambda: None, "fit --resume --model.model.sizes=[64,32,10]", "same architecture. Got model.linear1.weight (64, 64) there, (32, 64) here"),
    "activation": (lambda: None, "fit --resume --model.model.activation=ReLU", "model.model must be the network whose weights the checkpoint holds. Got (activation1): ReLU(), and (activation1): Tanh() in"),
    "loss": (lambda: None, "fit --resume --model.loss.label_smoothing=0.1", "model.loss must be that of the run, by which its best checkpoint is chosen"),
    "seed": (lambda: None, "fit --resume --seed=7", "seed must be that of the run"),
    "past": (lambda: None, "fit --resume --trainer.max_epochs=0", "trainer.max_epochs must be at least the epochs that have been made. Got 0, and 1 in the checkpoint"),
    "batch size": (lambda: None, "fit --resume --descent.batch_size=5000", "Got batch_size=5000 and 1297 training examples"),
    "engine": (lambda: None, "fit --resume --model.engine=tape-free --trainer.precision=bf16-mixed", "Got precision='bf16-mixed'"),
    "overwrite": (lambda: None, "fit --overwrite --model.model.sizes=[64,7]", "class numbers must lie from 0 to 6"),
    "log": (lambda: Path("runs/digits-minibatch/lightning_logs/a").mkdir(parents=True), "fit --resume --trainer.logger=CSVLogger --trainer.logger.version=a", "trainer.logger must write to a directory of its own"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # the run is a copy
@pytest.mark.parametrize("name", WITH_A_RUN)
def test_mistakes_with_a_run_leave_it_as_it_was(
    name: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "runs")
    prepare, words, text = WITH_A_RUN[name]
    prepare()
    before = contents()
    command, *rest = words.split()
    limit = ["--trainer.max_epochs=2"] if command == "fit" and "max_epochs" not in words else []
    assert _command.main([command, "--name=digits-minibatch", *config_for(rest), *limit, *rest]) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) <= 2
    assert contents() == before


def config_for(words: list[str]) -> list[str]:
    return ["--config", str(RECIPE)] if "--overwrite" in words else []


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda: Path("runs").write_text(""), "runs/digits-minibatch must be a directory that can be written to. Got Not a directory"),
        (lambda: (Path("runs").mkdir(), Path("runs/digits-minibatch").write_text("")), "must be a directory that can be written to. Got File exists"),
        (lambda: (Path("runs").mkdir(), Path("runs/digits-minibatch").symlink_to("/nosuch/x")), "must be a directory that can be written to"),
    ],
)  # fmt: skip
def test_directories_that_cannot_be_written_to(
    prepare: Callable[[], object], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    before = contents()
    assert fit() == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert len(shown.splitlines()) == 1
    assert contents() == before


def test_a_read_only_directory(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """root may write anywhere, so the refusal of the system is put in its place."""

    def refuse(path: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert fit() == 2
    shown = capsys.readouterr().err
    assert "must be a directory that can be written to. Got Permission denied: runs" in shown
    assert len(shown.splitlines()) == 1


def test_nothing_to_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert _command.main(["test", "--name", "nosuch"]) == 2
    assert "runs/nosuch/config.yaml does not exist; give its --name" in capsys.readouterr().err
    assert _command.main(["test", "--config", str(RECIPE)]) == 2
    assert "checkpoints/best.ckpt does not exist" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DescentModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit()


def test_fit_evaluate_predict_resume_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs=2", "--descent.batch_size=64", "--seed=5") == 0
    run = Path("runs/digits-minibatch")
    for name in (
        "config.yaml",
        "history.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "plots/history.png",
    ):
        assert (run / name).stat().st_size > 0
    saved = (run / "config.yaml").read_text()
    assert "batch_size: 64" in saved
    assert "seed_everything: 5" in saved
    assert not any(flag in saved for flag in ("resume", "overwrite"))
    assert _command.main(["test", "--name=digits-minibatch"]) == 0
    assert _command.main(["validate", "--name=digits-minibatch", "--checkpoint=last"]) == 0
    assert _command.main(["predict", "--name=digits-minibatch"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("test_accuracy 0.", "val_accuracy 0.", "300 predictions: runs/"))
    assert len((run / "predictions.csv").read_text().splitlines()) == 301
    assert fit("--trainer.max_epochs=2") == 2
    assert "Give --resume to go on with it, --overwrite to replace it" in capsys.readouterr().err
    assert _command.main(["fit", "--name=digits-minibatch", "--resume", "--trainer.max_epochs=3"]) == 0
    assert len((run / "history.csv").read_text().splitlines()) == 4
    assert _command.main(["fit", "--name=digits-minibatch", "--resume"]) == 0
    assert "Nothing left to train; raise --trainer.max_epochs" in capsys.readouterr().out
    Path(run, "notes.txt").write_text("mine")
    assert fit("--trainer.max_epochs=1", "--overwrite") == 0
    assert len((run / "history.csv").read_text().splitlines()) == 2
    assert Path(run, "notes.txt").exists()
    assert _command.main(["test", "--name=digits-minibatch", "--model.model.sizes=[64,10]"]) == 2
    assert "same architecture" in capsys.readouterr().err
    Path("junk.ckpt").write_text("junk")
    assert _command.main(["test", "--name=digits-minibatch", "--checkpoint=junk.ckpt"]) == 2
    assert "junk.ckpt cannot be read as one" in capsys.readouterr().err


def test_two_runs_in_one_directory(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/digits-minibatch").mkdir(parents=True)
    with FileLock("runs/digits-minibatch/.lock"):
        assert fit() == 2
    assert "runs/digits-minibatch is in use by another training run" in capsys.readouterr().err


def test_non_finite_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--descent.learning_rate=1e38", "--trainer.max_epochs=2") == 1
    shown = capsys.readouterr().err
    assert "The loss must stay finite" in shown
    assert len(shown.splitlines()) == 1


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step = DescentModule.training_step

    def interrupted(self: DescentModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.current_epoch == 1 and batch_idx == 3:
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    monkeypatch.setattr(DescentModule, "training_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        fit()
    assert stop.value.code == 130
    assert capsys.readouterr().err == (
        "Interrupted at update 44 (epoch 2). Last checkpoint: runs/digits-minibatch/checkpoints/last.ckpt. "
        "Go on with: manualprop fit --name digits-minibatch --resume\n"
    )


def test_says_which_engine_it_took(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert fit("--trainer.max_epochs=1") == 0
        assert fit("--trainer.max_epochs=1", "--overwrite", "--model.model.activation=torch.nn.Tanh") == 0
    first, second = caplog.messages  # and nothing that Lightning announces
    assert first == "engine: tape-free"
    assert second.startswith("engine: autograd, because layer 'activation1' (Tanh) cannot be run without a")


@pytest.mark.slow
def test_ctrl_c_for_real(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "manualprop", *FIT, "--trainer.max_epochs=-1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while (
            not Path("runs/digits-minibatch/checkpoints/last.ckpt").exists() and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        second = subprocess.run(words, capture_output=True, text=True)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert second.returncode == 2
    assert "in use by another training run" in second.stderr
    assert process.returncode == 130
    assert "--resume" in shown.splitlines()[-1]
    assert "Traceback" not in shown
