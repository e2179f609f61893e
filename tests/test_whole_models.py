"""Whole convolutional networks: swapped, they compute, train and keep what they did, and every gradient is ours."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import convnets
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import manualprop
from manualprop import nn as hand
from manualprop._swap._fuse import fused_from
from manualprop.functions import convolution

D = torch.float64
NAMES = list(convnets.SMALL)
FUSED = pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
CONVOLUTIONS = (hand.Conv2d, hand.ConvTranspose2d)

# What ATen offers for the backward passes of these layers.  None of it may be reached; torch's own models show that
# the count sees it.
ATENS = {
    "ResNet-18, 32 x 32": {"convolution", "native_batch_norm", "threshold"},
    "ResNet-18, 224 x 224": {"convolution", "native_batch_norm", "threshold", "max_pool2d_with_indices"},
    "ResNet of functions": {"convolution", "native_batch_norm", "threshold", "max_pool2d_with_indices"},
    "ConvNeXt": {"convolution", "native_layer_norm", "gelu"},
    "U-Net": {
        "convolution", "native_group_norm", "silu", "max_pool2d_with_indices", "upsample_bilinear2d"
    },
    "DenseNet": {"convolution", "native_batch_norm", "threshold", "avg_pool2d"},
    "MobileNet": {"convolution", "native_batch_norm", "hardtanh"},
}  # fmt: skip


class Classifier(nn.Module):
    """A model and its loss; a model may give classes for every pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.model(x), labels)


def made(name: str) -> tuple[Classifier, Tensor, Tensor]:
    """The model in float64, images and labels."""
    make, side = convnets.SMALL[name]
    torch.manual_seed(0)
    model = Classifier(make()).double()
    x = torch.randn(4, 3, side, side, dtype=D)
    y = model.model(x)
    return model, x, torch.randint(10, (4, *y.shape[2:]))


def swapped(model: nn.Module, **options: Any) -> Any:
    return manualprop.swap(copy.deepcopy(model), functions=True, **options)


def differentiated(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The output, the loss, and its gradients with respect to the images and all parameters."""
    torch.manual_seed(1)  # of dropout
    x = x.clone().requires_grad_()
    y = model.model(x)
    value = model.loss(y, labels)
    return [y.detach(), value.detach(), *torch.autograd.grad(value, (x, *model.parameters()))]


def backwards(operations: Iterable[str]) -> set[str]:
    """ATen's backward passes among the names of operations, by the name of the forward."""
    aten = (name.removeprefix("aten.") for name in operations)
    return {name.partition("_backward")[0] for name in aten if "_backward" in name}


class Dispatched(TorchDispatchMode):
    """The names of the operations that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@FUSED
@pytest.mark.parametrize("name", NAMES)
def test_no_layer_is_left_and_the_proof_holds(name: str, fuse: bool) -> None:
    """Swap finds a twin for all, proves it on a batch, keeps no more, and unswap gives the model back."""
    model, x, labels = made(name)
    report = swapped(model, check=(x, labels), fuse=fuse)
    kinds = {type(m) for m in report.model.modules() if type(m).__module__.startswith("torch.nn")}
    assert kinds <= {nn.Sequential}
    assert report.calls == ()
    assert report.check.ratio <= 1 and report.check.tensors > len([*model.parameters()])
    assert 0 < report.check.kept.after.kept <= report.check.kept.before.kept
    assert report.check.keeps_more == {} and report.check.not_compared == ()
    if any(fused_from(type(m)) for m in report.model.modules()):
        assert report.check.kept.after.kept < 0.92 * report.check.kept.before.kept
    manualprop.unswap(report.model)
    assert [type(m) for m in report.model.modules()] == [type(m) for m in model.modules()]
    assert repr(report.model) == repr(model)
    for mine, theirs in zip(*(differentiated(m, x, labels) for m in (report.model, model)), strict=True):
        assert torch.equal(mine, theirs)


@FUSED
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_equal_and_all_ours(name: str, fuse: bool) -> None:
    """In training and in evaluation; no backward of ATen's is reached, for which torch's model has several."""
    model, x, labels = made(name)
    ours = swapped(model, fuse=fuse).model
    for training in (True, False):
        found = []
        for each in (model.train(training), ours.train(training)):
            with Dispatched() as dispatched:
                found.append(differentiated(each, x, labels))
            found[-1].append(backwards(dispatched.seen))
        (*exact, atens), (*mine, none) = found
        assert none == set()
        assert atens >= ATENS[name]
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("functions", [False, True])
def test_an_identity_between_the_stem_and_the_first_block_stops_no_fusion(functions: bool) -> None:
    """ResNet-18 for small images has one in the place of its pool; a hook on it puts the layers back."""
    model, x, labels = made("ResNet-18, 32 x 32")
    report = manualprop.swap(copy.deepcopy(model), functions=functions, fuse=True, check=(x, labels))
    assert any("bn1+relu+stages.0.0.conv1" in str(row.after) for row in report.rows)
    assert report.check.kept.after.kept <= 0.75 * report.check.kept.before.kept
    seen: list[Tensor] = []
    report.model.model.maxpool.register_forward_hook(lambda module, inputs, y: seen.append(y))
    torch.testing.assert_close(report.model(x, labels), model(x, labels), rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


def test_a_block_whose_functions_are_torchs_runs_them_in_a_fused_model() -> None:
    """The steps of the whole model would run ours there, so that block calls its own forward."""
    model = Outer().double()
    x = torch.randn(2, 3, 8, 8, dtype=D)
    found = []
    for only in (None, lambda path, module: module is model):
        manualprop.unswap(model)
        manualprop.swap(model, fuse=True)
        manualprop.swap(model, functions=True, only=only)
        y = model(x)
        kept = manualprop.receipt(model, x).kept
        with Dispatched() as dispatched:
            y.sum().backward()
        found.append((backwards(dispatched.seen), kept))
    (ours, fused), (theirs, by_layers) = found
    assert (ours, theirs) == (set(), {"threshold"}) and fused < by_layers


class Inner(nn.Module):
    """A forward that calls a function after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + 0.1)


class Outer(nn.Module):
    """A batch norm and an activation before the first convolution of the inner module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.act(self.norm(self.conv(x))))


def trained(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 20) -> list[float]:
    """The losses of some steps with momentum."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@FUSED
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_of_training_are_equal(name: str, fuse: bool) -> None:
    """Losses, weights and running statistics, to 1e-11 after the steps: they differ by 3e-14 at most here."""
    model, x, labels = made(name)
    ours = swapped(model, fuse=fuse).model
    losses, expected = trained(ours, x, labels), trained(model, x, labels)
    assert expected[-1] < 0.9 * expected[0]
    assert losses == pytest.approx(expected, rel=1e-11)
    for (key, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_the_first_layer_computes_no_gradient_of_its_input(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every convolution computes that of its input, but the first does if the images need one alone."""
    model, x, labels = made(name)
    ours = swapped(model).model
    weights = [m.weight for m in ours.modules() if isinstance(m, CONVOLUTIONS)]
    made_for: list[int] = []

    def counted(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda g, W, *rest: made_for.append(W.data_ptr()) or rule(g, W, *rest)

    for rule in ("transposed", "convolution"):  # dL/dx of a convolution, and of a transposed one
        monkeypatch.setattr(convolution, rule, counted(getattr(convolution, rule)))
    ours(x, labels).backward()
    assert sorted(made_for) == sorted(W.data_ptr() for W in weights[1:])
    made_for.clear()
    ours(x.requires_grad_(), labels).backward()
    assert sorted(made_for) == sorted(W.data_ptr() for W in weights)


# The first is quick to trace.
TRACED = ["ResNet of functions"] + [
    pytest.param(n, marks=pytest.mark.slow) for n in NAMES if "functions" not in n
]


@pytest.mark.parametrize("name", TRACED)
def test_compiled_whole_the_gradients_are_ours(name: str) -> None:
    """Dynamo traces the model in one graph, and the graph of its backward pass has none of ATen's."""
    model, x, labels = made(name)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    seen = []
    for each in (model, swapped(model).model):
        expected = differentiated(model, x, labels)
        graphs.clear()
        torch._dynamo.reset()
        compiled = torch.compile(each.model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        found = differentiated(Classifier(compiled), x, labels)
        assert len(graphs) == 2  # forward and backward
        seen.append(backwards(str(node.target) for graph in graphs for node in graph.graph.nodes))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * max(1, b.abs().max().item()))
    atens, ours = seen
    assert "convolution" in atens  # of torch's own model; some others are decomposed
    assert ours == set()
