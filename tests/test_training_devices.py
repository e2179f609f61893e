"""Training under Lightning on two devices: exact for batch and mini-batch descent, refused for stochastic descent."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

DDP = """
import sys, torch
from lightning.pytorch import Trainer
from torch import nn
from manualprop.descent import Batch, MiniBatch, Stochastic
from manualprop.training import DescentModule, MultilayerPerceptron, TensorDataModule
from manualprop.training.cli import quieten

quieten()
kind, devices, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
descent = {
    "batch": Batch(learning_rate=0.5, micro_batch_size=5),
    "minibatch": MiniBatch(learning_rate=0.5, batch_size=4),
    "stochastic": Stochastic(learning_rate=0.5),
}[kind]
torch.manual_seed(0)
x, y = torch.randn(13, 4, dtype=torch.float64), torch.randint(0, 3, (13,))
y[::5] = -100
loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64))
if kind == "stochastic":
    loss = nn.CrossEntropyLoss()
module = DescentModule(MultilayerPerceptron([4, 3, 3]), loss, descent).double()
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=3, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(module, TensorDataModule((x, y), (x, y)))
if trainer.is_global_zero:
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    torch.save([module.state_dict(), trainer.global_step, values], path)
"""


def ddp(kind: str, devices: int, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(DDP)
    words = [sys.executable, str(script), kind, str(devices), str(tmp_path / f"{devices}.pt")]
    return subprocess.run(words, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch", "minibatch"])
def test_two_processes_are_exact(kind: str, tmp_path: Path) -> None:
    for devices in (1, 2):
        result = ddp(kind, devices, tmp_path)
        assert result.returncode == 0, result.stderr
    (one, steps, values), (two, steps_two, values_two) = (torch.load(tmp_path / f"{d}.pt") for d in (1, 2))
    assert steps == steps_two
    assert values == pytest.approx(values_two, rel=1e-5)
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_stochastic_on_two_processes_is_refused(tmp_path: Path) -> None:
    result = ddp("stochastic", 2, tmp_path)
    assert result.returncode != 0
    assert "an update sees one example, so one device trains. Got 2 devices" in result.stderr
