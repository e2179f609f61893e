"""Each recipe for two steps, and the main job."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manualprop.training.cli import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANUALPROP_COMMAND", "manualprop")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / "digits" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its classes say they are from
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def descents() -> ModuleType:
    return load("descents")


@pytest.mark.slow
def test_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    overhead = load("overhead")
    assert overhead.main(["--rounds=1"]) == 0
    head, *shown, last = capsys.readouterr().out.splitlines()
    assert head.startswith("medians of 1 rounds") and last.startswith("automatic / tape-free: ")
    times = {line[:47].strip(): float(line[47:61]) for line in shown}
    assert len(times) == 5 and "Backprop in a plain loop" in times
    automatic, _, _, tape_free, _ = times.values()
    assert tape_free < automatic


def test_a_ratio_of_overheads_is_the_median_of_pairs() -> None:
    """The machine was twice as slow in one round: the quotient of the medians would be 1.5."""
    found = [{"a": 2.0, "b": 1.0}, {"a": 6.0, "b": 3.0}, {"a": 3.0, "b": 2.0}]
    assert load("overhead").ratio(found, "a", "b") == 2.0


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_two_steps(path: Path) -> None:
    job = load_recipe(
        path, ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.enable_progress_bar=false"]
    )
    job.trainer.fit(job.model, job.datamodule)
    assert job.trainer.global_step == 2
    assert {"train_loss", "val_loss"} <= set(job.trainer.callback_metrics)
    assert job.model.engine_taken == "tape-free"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_convolutional_network_reaches_its_accuracy(seed: int) -> None:
    options = [f"--seed={seed}", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    job = load_recipe(RECIPES / "digits" / "convnet.yaml", options)
    job.trainer.fit(job.model, job.datamodule)
    (found,) = job.trainer.test(job.model, job.datamodule, verbose=False)
    assert found["test_accuracy"] > 0.985


def test_linear_regression_arrives_at_the_normal_equation() -> None:
    job = load_recipe(RECIPES / "linear_regression" / "batch.yaml", ["--trainer.enable_progress_bar=false"])
    job.trainer.fit(job.model, job.datamodule)
    x, y = (part.double() for part in job.datamodule.train)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    linear = job.model.model
    found = torch.cat([linear.weight.detach().T, linear.bias.detach()[:, None]]).double()
    torch.testing.assert_close(found, torch.linalg.solve(x.T @ x, x.T @ y), rtol=0, atol=1e-5)


def test_main_job(
    descents: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(descents, "_gradients_are_right", lambda job: True)  # on its own below
    assert descents.main(["--epochs=1", "--name=short"]) == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("batch", "1,297", "accuracy", "autograd", "runs/short/descents.png")
    )
    *_, last = shown.splitlines()
    assert last == "to test it:   manualprop test --name short"
    assert max(map(len, shown.splitlines())) <= 80
    assert "same final weights without a tape and by autograd, to float32 rounding" in shown
    assert not list(Path("runs/short").glob("tmp*"))
    for name in ("descents.png", "history.csv", "curves.csv", "config.yaml", "checkpoints/best.ckpt"):
        assert Path("runs/short", name).stat().st_size > 0
    last_updates = {"batch": "1", "stochastic": "1297", "minibatch": "41"}
    for name in ("history.csv", "curves.csv"):
        with Path("runs/short", name).open() as file:
            rows = list(csv.DictReader(file))
        ends = {(row["descent"], row["engine"]): row["update"] for row in rows}
        assert ends == {(d, e): n for d, n in last_updates.items() for e in ("tape-free", "autograd")}
    assert descents.main(["--epochs=1", "--name=short"]) == 2
    refusal = capsys.readouterr().err
    assert "Give --overwrite to replace it" in refusal and "--resume" not in refusal  # it has no such option


@pytest.mark.slow
def test_main_job_reaches_its_accuracy(descents: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert descents.main([]) == 0
    shown = capsys.readouterr().out
    assert "gradients right, first and second order" in shown and "linear1 Linear, activation1 Tanh" in shown
    (row,) = [line for line in shown.splitlines() if line.strip().startswith("minibatch")]
    _, updates, seconds, _, accuracy, tape_free, autograd, ratio = row.split()
    assert updates == "1,230" and float(seconds) > 0
    assert float(autograd) / float(tape_free) == pytest.approx(float(ratio), rel=0.3)
    assert float(accuracy.strip(" %")) > 96


RESULT = {
    "updates": 1234567, "seconds": 10000.0, "train loss": 0.0, "test accuracy": 1.0,
    "tape-free (us)": 123456.0, "autograd (us)": 123456.0, "ratio": 10.0,
}  # fmt: skip


def test_the_table_fits_80_columns_with_room_between(
    descents: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    descents._print_table(dict.fromkeys(descents.RECIPES, RESULT))
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    (row,) = [line for line in shown.splitlines() if "stochastic" in line]
    assert row.split() == [
        "stochastic", "1,234,567", "10000.0", "0.0000", "100.00%", "123,456", "123,456", "10.0"
    ]  # fmt: skip


def test_ratios_are_medians_of_pairs_that_took_turns(
    descents: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one round the machine stalls for one engine, and in one for both: neither moves the ratio."""
    turns: list[int] = []

    def microseconds(updates: Any, count: int) -> float:
        k = engines.index(updates)
        if count == descents.WARM:
            return 1000.0
        turns.append(k)
        number = (len(turns) - 1) // 2
        return (100.0, 300.0)[k] * {2: 50.0, 4: 50.0 if k else 1.0}.get(number, 1.0)

    engines: list[Any] = []
    monkeypatch.setattr(descents, "_updates", lambda *_: engines.append(object()) or engines[-1])
    monkeypatch.setattr(descents, "_microseconds", microseconds)
    job = load_recipe(RECIPES / "digits" / "batch.yaml")
    assert descents.time_updates(job) == {"tape-free (us)": 100.0, "autograd (us)": 300.0, "ratio": 3.0}
    pairs = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    assert len(pairs) == descents.ROUNDS >= 5
    assert set(pairs) == {(0, 1), (1, 0)}  # and each goes first in turn


def test_both_engines_make_the_same_updates_when_timed(descents: ModuleType) -> None:
    job = load_recipe(RECIPES / "digits" / "minibatch.yaml")
    x, target = job.datamodule.train
    pieces = [[(x[rows], target[rows]) for rows in update] for update in job.model.descent.updates(len(x))]
    ours, theirs = (
        list(itertools.islice(descents._updates(job.model, pieces, e), 50)) for e in descents.ENGINES
    )
    assert ours == pytest.approx(theirs, rel=1e-3) and ours[-1] < ours[0]


@pytest.mark.parametrize("recipe", ["batch", "stochastic", "minibatch"])
def test_engines_that_differ_are_not_reported(
    recipe: str, descents: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that is 0.1 % off is found after one epoch."""
    job = descents._job

    def planted(recipe: str, engine: str, words: list[str]) -> Any:
        made = job(recipe, engine, words)
        if engine == "autograd":
            made.model.descent = dataclasses.replace(
                made.model.descent, learning_rate=made.model.descent.learning_rate * 1.001
            )
        return made

    monkeypatch.setattr(descents, "RECIPES", {recipe: recipe})
    monkeypatch.setattr(descents, "_gradients_are_right", lambda job: True)
    monkeypatch.setattr(descents, "_job", planted)
    assert descents.main(["--epochs=1", "--name=planted"]) == 1
    assert f"refusing to report. After {'1' if recipe == 'batch' else ''}" in capsys.readouterr().err
    assert not Path("runs/planted/descents.png").exists()


class WrongTanh(nn.Module):
    """A rule that is 0.1 % off, which gradcheck's own tolerances would let pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return y.detach() + 1.001 * (y - y.detach())


def test_wrong_gradient_is_refused(descents: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(2, 3), torch.tensor([0, 1])
    right = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    worst = descents.verify(right, nn.CrossEntropyLoss(), x, target)
    assert list(worst) == ["0 Linear", "1 Tanh", "2 Linear", "loss CrossEntropyLoss"]
    assert max(worst.values()) < 1e-8
    # Nothing is checked in silence: a line before each of the checks, some of which take long.
    assert capsys.readouterr().err.splitlines() == [
        f"checking the {order} of {layer} against finite differences"
        for layer in worst
        for order in ("gradient", "second derivative")
    ]
    wrong = nn.Sequential(nn.Linear(3, 3), WrongTanh(), nn.Linear(3, 2))
    with pytest.raises(descents.GradientError, match="The gradient of 1 WrongTanh is not that of its values"):
        descents.verify(wrong, nn.CrossEntropyLoss(), x, target)


def test_refuses_to_train(
    descents: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise descents.GradientError("The gradient of linear1 Linear is not that of its values.")

    monkeypatch.setattr(descents, "verify", fail)
    assert descents.main(["--name=wrong"]) == 1
    assert "refusing to train. The gradient of linear1" in capsys.readouterr().err
