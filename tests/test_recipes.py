"""Each recipe for two steps, and the main job."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
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
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6
    assert shown[4].startswith("Backprop in a plain loop")
    times = {line[:47].strip(): float(line[47:55]) for line in shown[:5]}
    assert len(times) == 5
    automatic, _, _, tape_free, _ = times.values()
    assert tape_free < automatic


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
    assert "same final weights without a tape and by autograd, to float32 rounding" in shown
    assert not list(Path("runs/short").glob("tmp*"))
    for name in ("descents.png", "history.csv", "curves.csv", "config.yaml", "checkpoints/best.ckpt"):
        assert Path("runs/short", name).stat().st_size > 0
    with Path("runs/short/history.csv").open() as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["1", "1297", "41"]
    assert descents.main(["--epochs=1", "--name=short"]) == 2
    refusal = capsys.readouterr().err
    assert "Give --overwrite to replace it" in refusal and "--resume" not in refusal  # it has no such option


@pytest.mark.slow
def test_main_job_reaches_its_accuracy(descents: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert descents.main([]) == 0
    shown = capsys.readouterr().out
    assert (
        "gradients right against finite differences in float64, first and second order: linear1 Linear"
        in shown
    )
    (row,) = [line for line in shown.splitlines() if line.startswith("│minibatch")]
    _, _, updates, _, seconds, autograd, ratio, _, accuracy, _ = row.split("│")
    assert updates.strip() == "1,230"
    assert float(autograd) / float(seconds) == pytest.approx(float(ratio), rel=0.1)
    assert float(accuracy.strip(" %")) > 96


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


def test_wrong_gradient_is_refused(descents: ModuleType) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(2, 3), torch.tensor([0, 1])
    right = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    worst = descents.verify(right, nn.CrossEntropyLoss(), x, target)
    assert list(worst) == ["0 Linear", "1 Tanh", "2 Linear", "loss CrossEntropyLoss"]
    assert max(worst.values()) < 1e-8
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
