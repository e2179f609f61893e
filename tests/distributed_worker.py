"""One process of test_distributed.py: ``python distributed_worker.py KIND RANK STORE RESULT [RULE]``.

Trains its half of the batch for three steps; the first process writes what came out to RESULT.  With RULE, that
rule's derivative is tripled, to show that it is the one that ran.

A process leaves by ``os._exit``: the destructor of gloo's connections was seen to wait for ever in one of twenty
runs, when the other process had already left.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import manualprop
from manualprop import functions as rules

WORLD = 2
INPUTS = torch.linspace(-2.0, 2.1, 48, dtype=torch.float64).reshape(8, 6)
TARGETS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def train(network: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of the first and weights after the third step of momentum gradient descent."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.5)
    found = {}
    for step in range(3):
        optimizer.zero_grad()
        loss(network(inputs), targets).backward()
        if step == 0:
            found |= {f"gradient of {n}": whole(p.grad) for n, p in network.named_parameters()}
        optimizer.step()
    found |= {n: whole(p) for n, p in network.named_parameters()}
    return {name.replace("module.", ""): t for name, t in found.items()}


def whole(t: Tensor | None) -> Tensor:
    assert t is not None
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def distributed(kind: str, network: nn.Sequential) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(network)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in network:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def main(kind: str, rank: str, store: str, result: str, rule: str = "") -> None:
    if rule:
        from test_routes import tripled

        setattr(rules, rule, tripled(getattr(rules, rule)))
    dist.init_process_group(
        "gloo",
        init_method=Path(store).as_uri(),
        rank=int(rank),
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    try:
        half = slice(int(rank), None, WORLD)
        network = distributed(kind, manualprop.swap(model()).model)
        found = train(network, manualprop.nn.CrossEntropyLoss(), INPUTS[half], TARGETS[half])
        if rank == "0":
            torch.save(found, result)
        dist.barrier()  # neither leaves while the other still needs it
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
