"""Two processes that share a batch do what one does with the whole of it: DDP and FSDP2, gloo on the CPU.

The processes meet in a file, not at a port, so any number of runs may go side by side; each has a time limit, and
both are ended when the test does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import INPUTS, TARGETS, WORLD, model, train
from test_routes import tripled
from torch import Tensor, nn

import manualprop
from manualprop import functions as rules

WORKER = Path(__file__).parent / "distributed_worker.py"
LIMIT = 300  # seconds, for a crowded machine; a run takes 3


def run(kind: str, folder: Path, *rule: str) -> dict[str, Tensor]:
    """What both processes arrived at."""
    store, result = folder / "store", folder / "result.pt"
    paths = [str(Path(manualprop.__file__).parents[1]), str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), store, result, *rule],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [worker.communicate(timeout=LIMIT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()  # closes the pipe too
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(said)
    found: dict[str, Tensor] = torch.load(result)
    return found


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_torch_nn_does_in_one(kind: str, tmp_path: Path) -> None:
    alone = train(model(), nn.CrossEntropyLoss(), INPUTS, TARGETS)
    together = run(kind, tmp_path)
    assert len(alone) == 2 * len(list(model().parameters()))
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", ["GELU", "Linear"])
def test_two_processes_run_the_hand_rule(
    kind: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tripled on purpose, a rule gives together what it gives alone, and not what the right one gives."""
    loss = manualprop.nn.CrossEntropyLoss()
    right = train(manualprop.swap(model()).model, loss, INPUTS, TARGETS)
    monkeypatch.setattr(rules, rule, tripled(getattr(rules, rule)))
    alone = train(manualprop.swap(model()).model, loss, INPUTS, TARGETS)
    assert not torch.allclose(alone["0.weight"], right["0.weight"])
    torch.testing.assert_close(run(kind, tmp_path, rule), alone, rtol=1e-12, atol=1e-12)
