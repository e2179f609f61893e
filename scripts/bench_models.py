#!/usr/bin/env python3
"""A training step of whole models (forward, loss, backward), swapped and fused, against the same model of torch.nn.

Then the layers of convolutional networks by kind, each against its torch twin.
Run it as `python3 scripts/run.py bench models`. A cell that misses its target is marked with !.
GPT-2, BERT, Llama and ViT are transformers', small and random; without that library the other models are measured.
"""

import argparse
import copy
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import benchmarking
import convnet_layers
import torch
from benchmarking import Ratio, interleaved
from convnets import ResNet18
from torch import Tensor, nn

import manualprop
from manualprop._swap._fuse import fused_from

# ----- the models -----

Inputs = dict[str, Any]


class Model(NamedTuple):
    """How to make a model that returns its loss, and its inputs; the highest ratios to torch.nn promised.

    - ``swap``, ``fuse``  of the times.
    - ``kept``            of the bytes kept when fused; 1 promises fewer than torch's, if neighbours run as one.
    """

    make: Callable[[], tuple[nn.Module, Inputs]]
    swap: float = 1.05
    fuse: float = 1.1
    kept: float = 1.0
    of_transformers: bool = True


def tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape)


def gpt2() -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 2000}
    plain = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 1}
    words = tokens(2000, 4, 128)
    return GPT2LMHeadModel(GPT2Config(**sizes, **plain)), {"input_ids": words, "labels": words}


SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}


def bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(intermediate_size=1024, **SIZES))
    return model, {"input_ids": tokens(2000, 8, 64), "labels": torch.randint(2, (8,))}


def llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokens(2000, 4, 128)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=688, **SIZES))
    return model, {"input_ids": words, "labels": words}


def vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTForImageClassification(ViTConfig(image_size=64, patch_size=8, num_labels=10, **sizes))
    return model, {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(10, (8,))}


class WithLoss(nn.Module):
    """A classifier that returns its loss, as those of transformers do; the loss itself is torch's on both sides."""

    class Output(NamedTuple):
        loss: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Output:
        return self.Output(nn.functional.cross_entropy(self.model(x), labels))


def convnet() -> tuple[nn.Module, Inputs]:
    layers: list[nn.Module] = []
    for channels in (3, 32, 32, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return WithLoss(model), {"x": torch.randn(16, 3, 32, 32), "labels": torch.randint(10, (16,))}


def resnet18() -> tuple[nn.Module, Inputs]:
    images = torch.randn(16, 3, 32, 32)
    return WithLoss(ResNet18()), {"x": images, "labels": torch.randint(10, (16,))}


def mlp() -> tuple[nn.Module, Inputs]:
    layers: list[nn.Module] = []
    for width in (64, 128):
        layers += [nn.Linear(width, 128), nn.LayerNorm(128), nn.GELU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    return WithLoss(model), {"x": torch.randn(32, 64), "labels": torch.randint(10, (32,))}


MODELS = {
    "GPT-2": Model(gpt2),
    "BERT": Model(bert),
    "Llama": Model(llama),
    "ViT": Model(vit),
    "convnet": Model(convnet, of_transformers=False),
    "ResNet-18": Model(resnet18, 1.15, 1.25, 0.75, of_transformers=False),
    "small MLP": Model(mlp, 1.5, 1.5, of_transformers=False),
}
INSTALL = (
    "without transformers (>= 5) the models of torch.nn alone are measured; the extra `interop` has it: "
    ".venv/bin/python -m pip install -c scripts/constraints.txt 'transformers>=5'"
)


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


# ----- measuring -----


class Row(NamedTuple):
    """What was measured of one model; times over torch's, bytes as the receipt counts them."""

    milliseconds: float  # of a step of torch's
    times: dict[str, Ratio]
    kept: dict[str, int]  # "torch" too
    targets: dict[str, float]
    fused: bool  # whether any neighbours run as one
    most_kept: float = 1.0  # the promised share of torch's bytes, if they do

    def slow(self, name: str) -> bool:
        return name in self.targets and self.times[name].median > self.targets[name]

    def large(self, name: str) -> bool:
        """Whether more is kept than promised; where neighbours run as one, it must be less than torch keeps."""
        ours, torchs = self.kept[name], self.kept["torch"]
        if name == "fuse" and (self.fused or self.most_kept < 1):
            return ours >= torchs or ours > self.most_kept * torchs
        return ours > torchs

    @property
    def misses(self) -> list[bool]:
        return [miss(name) for name in self.times for miss in (self.slow, self.large)]


def step(model: nn.Module, inputs: Inputs, kernels: str = "") -> Callable[[], object]:
    """A function that runs forward, loss and backward, for gradients that are made anew."""

    def run() -> None:
        with manualprop.kernels(kernels) if kernels else nullcontext():
            model.zero_grad()
            model(**inputs).loss.backward()

    return run


def measure(model: Model, rounds: int, seconds: float, compiler: bool) -> Row:
    torch.manual_seed(0)
    torchs, inputs = model.make()
    swapped = manualprop.swap(copy.deepcopy(torchs)).model
    fused = manualprop.swap(copy.deepcopy(torchs), fuse=True).model
    models = {"torch": torchs, "swap": swapped, "fuse": fused} | ({"kernels": swapped} if compiler else {})
    steps = [step(m, inputs, "inductor" if name == "kernels" else "") for name, m in models.items()]
    first, ratios = interleaved(steps, rounds, seconds)
    return Row(
        1e3 * first,
        dict(zip([*models][1:], ratios, strict=True)),
        {name: manualprop.receipt(m, **inputs).kept for name, m in models.items()},
        {"swap": model.swap, "fuse": model.fuse},
        any(fused_from(type(module)) for module in fused.modules()),
        model.kept,
    )


# ----- showing -----

COLUMNS = {"swap": "swap", "fuse": "swap(fuse=True)", "kernels": 'swap, kernels("inductor")'}
HEADER = ["model", "torch.nn, ms", *COLUMNS.values(), "MB kept: torch.nn", *COLUMNS.values()]
Results = dict[str, Row]


def cells(name: str, row: Row) -> list[str]:
    times = [_time(row, column) for column in COLUMNS]
    kept = [_kept(row, column) for column in COLUMNS]
    return [name, f"{row.milliseconds:.1f}", *times, f"{row.kept['torch'] / 1e6:.2f}", *kept]


def _time(row: Row, name: str) -> str:
    if name not in row.times:
        return ""
    target = f" ({row.targets[name]:g})" if name in row.targets else ""
    return f"{row.times[name].median:.2f}{target}{' !' if row.slow(name) else ''}"


def _kept(row: Row, name: str) -> str:
    if name not in row.kept:
        return ""
    most = f" ({row.most_kept * row.kept['torch'] / 1e6:.2f})" if name == "fuse" and row.most_kept < 1 else ""
    return f"{row.kept[name] / 1e6:.2f}{most}{' !' if row.large(name) else ''}"


def show(results: Results) -> None:
    title = "time of a training step / torch.nn's (target), and memory"
    benchmarking.show_table(HEADER, [cells(name, row) for name, row in results.items()], title)


def section(results: Results, command: str) -> str:
    flags = [miss for row in results.values() for miss in row.misses]
    return "\n\n".join(
        [
            f"## Whole models: {benchmarking.processor()}",
            "Time of a training step (forward, loss, backward) in float32 over that of the same model of torch.nn; in "
            "brackets the target, where there is one; `!` marks a miss. The transformers are the Hugging Face library's, "
            "in small random configurations; the ReLUs of the convnet and of ResNet-18 work in place. Functions that a model calls itself "
            "(attention, the loss) are torch's on both sides. Freed memory stays mapped for all (`mallopt`), so "
            "no page faults are counted. Memory is what the receipt says that backward keeps beside parameters and inputs; "
            "a `!` marks more than torch.nn keeps, no less where neighbours run as one, or more than the target in brackets.",
            f"`{command}`  \n{benchmarking.machine()}",
            benchmarking.markdown_table(HEADER, [cells(name, row) for name, row in results.items()]),
            f"{len(flags) - sum(flags)} of {len(flags)} promises are kept.",
        ]
    )


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py bench models",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, in which all take turns (default: 9)")
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="models whose name it finds, as in 'MLP|ViT'"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of one step, no compiler")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    return parser.parse_args(argv)


def chosen(only: str) -> list[str]:
    """The models whose names match and that can be made."""
    here = has_transformers()
    names = [name for name in MODELS if re.search(only, name)]
    if not here and any(MODELS[name].of_transformers for name in names):
        print(f"bench_models.py: {INSTALL}", file=sys.stderr)
    return [name for name in names if here or not MODELS[name].of_transformers]


def main(argv: list[str]) -> int:
    arguments = parsed(argv)
    names = chosen(arguments.only)
    layers = [name for name in convnet_layers.LAYERS if re.search(arguments.only, name)]
    if not names + layers:
        there = ", ".join([*MODELS, *convnet_layers.LAYERS])
        print(f"bench_models.py: --only {arguments.only!r} finds no model and no layer. There are: {there}")
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded: the models are random
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(arguments.threads)
    benchmarking.keep_freed_memory()
    rounds, shorter = (2, 1e-3) if arguments.quick else (arguments.rounds, 1.0)
    total, compiler = len(names) + len(layers), not arguments.quick
    results: Results = {}
    of_layers: convnet_layers.Results = {}
    for i, name in enumerate(names):
        benchmarking.progress(i, total, name)
        results[name] = measure(MODELS[name], rounds, 0.3 * shorter, compiler)
    for i, name in enumerate(layers, len(names)):
        benchmarking.progress(i, total, name)
        layer = convnet_layers.LAYERS[name]
        of_layers[name] = convnet_layers.measure(layer, rounds, 0.05 * shorter, compiler)
    benchmarking.progress(total, total, "done")
    if results:
        show(results)
    if of_layers:
        convnet_layers.show(of_layers)
    if arguments.write:
        write(results, of_layers, shlex.join(["python3", "scripts/run.py", "bench", "models", *argv]))
    return 0


def write(results: Results, of_layers: convnet_layers.Results, command: str) -> None:
    if results:
        benchmarking.write_section("models", section(results, command))
    if of_layers:
        benchmarking.write_section("convnet layers", convnet_layers.section(of_layers, command))
    print(f"written to {benchmarking.PAGE}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
