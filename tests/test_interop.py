"""Libraries that wrap, extend or watch layers, on swapped models: Opacus, BackPACK, PEFT.

They are installed by `scripts/run.py test --full` alone: 330 MB, and seconds to import.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manualprop
from manualprop._swap import TWINS

MISSING = [name for name in ("opacus", "backpack", "peft") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason="`scripts/run.py test --full` installs it"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # Both hook layers whose input needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # Opacus runs layers in float64 under a float64 autocast.
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning"),
]


@pytest.fixture(autouse=True)
def backend_flags_may_be_set() -> Iterator[None]:
    """Opacus sets cudnn's for an embedding; torch's own test utilities, once another test has loaded them, forbid it."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


def mixed() -> nn.Sequential:
    """Every family of layers with parameters that Opacus has a sampler for."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.RMSNorm(8), nn.Flatten(),
        nn.Linear(32, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3),
    ).double()  # fmt: skip


TOKENS, CLASSES = torch.arange(20).reshape(5, 4) % 9, torch.tensor([0, 1, 2, 0, 1])


# ----------------------------------------------------------------------------------------------------- Opacus


def grad_samples(model: nn.Module, mode: str) -> dict[str, Tensor]:
    from opacus.grad_sample.utils import wrap_model

    wrapped = wrap_model(model, mode, batch_first=True, loss_reduction="mean")
    nn.functional.cross_entropy(wrapped(TOKENS), CLASSES).backward()
    return {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}


def expected_samples(model: nn.Module) -> dict[str, Tensor]:
    """One example at a time, by autograd of torch's own layers; Opacus scales each by the size of the batch."""
    rows = []
    for tokens, label in zip(TOKENS, CLASSES, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens[None]), label[None]).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_opacus_takes_the_very_sampler_of_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleModule, functorch
    from opacus.validators import ModuleValidator

    classes = manualprop.interop.register_opacus()
    assert {c.__name__ for c in classes} >= {"Linear", "Embedding", "LayerNorm", "GroupNorm", "RMSNorm"}
    assert manualprop.interop.register_opacus() == classes
    samplers = GradSampleModule.GRAD_SAMPLERS
    assert all(samplers[c] is samplers[c.__bases__[0]] for c in classes)
    # The slow way: it must not be taken.
    monkeypatch.setattr(functorch, "ft_compute_per_sample_gradient", None)
    expected = expected_samples(mixed())
    for mode in ("hooks", "functorch"):
        if mode == "functorch":
            monkeypatch.undo()
        found = grad_samples(manualprop.swap(mixed()).model, mode)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found, grad_samples(mixed(), mode), rtol=1e-12, atol=1e-15)
    batch_normed = manualprop.swap(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))).model
    assert not ModuleValidator.is_valid(batch_normed)
    assert type(ModuleValidator.fix(batch_normed)[1]) is nn.GroupNorm


def test_opacus_takes_expanded_weights_through_our_layers() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Flatten(),
            nn.Linear(32, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3),
        ).double()  # fmt: skip

    found = grad_samples(manualprop.swap(model()).model, "ew")
    torch.testing.assert_close(found, grad_samples(model(), "ew"), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, expected_samples(model()), rtol=1e-10, atol=1e-14)


PLUGIN = """
import hypothesis, torch
import opacus.grad_sample
import manualprop
from manualprop._swap import TWINS

manualprop.interop.register_opacus()
for ours in TWINS.values():
    setattr(torch.nn, ours.__name__, ours)
hypothesis.settings.register_profile("few", max_examples=12, deadline=None)
hypothesis.settings.load_profile("few")
"""


@pytest.mark.parametrize(
    "layer",
    [
        "linear", "layer_norm", "group_norm", "instance_norm1d", "instance_norm2d", "instance_norm3d",
        "embedding", "rms_norm", "dp_multihead_attention",
    ],
)  # fmt: skip
def test_opacus_own_tests_pass_with_our_layers(layer: str, tmp_path: Path) -> None:
    """Its tests of per-sample gradients, in the modes hooks, functorch and ew, with our classes in the place of torch's."""
    import opacus

    (tmp_path / "ours_for_torchs.py").write_text(PLUGIN)
    tests = Path(opacus.__file__).parent / "tests" / "grad_samples" / f"{layer}_test.py"
    environment = _environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    words = ["-m", "pytest", "-q", "-p", "ours_for_torchs", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, *words, "--rootdir", str(tmp_path), "-c", os.devnull, str(tests)],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_opacus_ghost_clipping_takes_the_norms_of_the_twin() -> None:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    manualprop.interop.register_opacus()
    norms = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        if swapped:
            manualprop.swap(model)
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)
        wrapped(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)).pow(2).sum(1).mean().backward()
        assert all(hasattr(p, "_norm_sample") for p in wrapped.parameters())
        norms.append(wrapped.get_norm_sample())
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning")
def test_private_training_is_the_same() -> None:
    """The whole of Opacus: validation, clipping, noise, accountant."""
    from opacus import PrivacyEngine

    manualprop.interop.register_opacus()
    trained = []
    for swapped in (False, True):
        model = mixed()
        if swapped:
            manualprop.swap(model)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(TOKENS, CLASSES), batch_size=5)
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data,
            noise_multiplier=0.5, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip
        torch.manual_seed(3)
        for _ in range(3):
            for tokens, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(tokens), labels).backward()
                optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- BackPACK


def extensions() -> dict[str, Callable[[], Any]]:
    from backpack import extensions

    names = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNExact", "BatchDiagGGNExact"]
    names += ["DiagHessian", "KFLR", "KFRA"]
    return {name: getattr(extensions, name) for name in names}


def quantities(model: nn.Module, loss: nn.Module, make: Callable[[], Any]) -> list[Any]:
    from backpack import backpack, extend

    model, loss = extend(model), extend(loss)
    torch.manual_seed(1)
    x = torch.randn(5, 4, dtype=torch.float64)
    extension = make()
    with backpack(extension):
        loss(model(x), CLASSES).backward()
    return [getattr(p, extension.savefield) for p in model.parameters()]


def test_backpack_gives_what_it_gives_for_the_twin() -> None:
    """Run apart: BackPACK keeps the hooks of every model it has extended in one list."""
    script = """
import copy, torch, warnings
warnings.simplefilter("ignore")
from torch import nn
import manualprop
from test_interop import extensions, quantities
classes = manualprop.interop.register_backpack()
assert classes == manualprop.interop.register_backpack()
assert {c.__name__ for c in classes} >= {"Linear", "Embedding", "BatchNorm1d"}, classes
torch.manual_seed(0)
layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
model = nn.Sequential(*layers).double()
for name, make in extensions().items():
    torchs = quantities(copy.deepcopy(model), nn.CrossEntropyLoss(), make)
    swapped, loss = manualprop.swap(copy.deepcopy(model)).model, manualprop.nn.CrossEntropyLoss()
    ours = quantities(swapped, loss, make)
    assert type(swapped[0]) is manualprop.nn.Linear and ours and type(loss) is manualprop.nn.CrossEntropyLoss
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-15, msg=lambda text: f"{name}: {text}")
print("compared", len(extensions()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0 and done.stdout == "compared 9\n", done.stderr


def test_backpack_does_not_know_ours_unless_told() -> None:
    """It says nothing and leaves the quantity out: the call is needed, and the test above proves something."""
    script = """
import warnings
warnings.simplefilter("ignore")
from torch import nn
import manualprop
from test_interop import extensions, quantities
try:
    quantities(manualprop.swap(nn.Sequential(nn.Linear(4, 3)).double()).model, nn.CrossEntropyLoss(), extensions()["BatchGrad"])
except AttributeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.stdout == "'Parameter' object has no attribute 'grad_batch'\n", done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


# ----------------------------------------------------------------------------------------------------- PEFT


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.up, self.act, self.down = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(self.norm(self.embed(tokens))))).mean(1)
        return y


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config"])
@pytest.mark.parametrize("swapped_first", [False, True])
def test_peft_wraps_and_unwraps(kind: str, swapped_first: bool) -> None:
    """A swap before or after the wrapping gives torch's values and gradients; the adapters merge as they would."""
    import peft

    arguments: dict[str, Any] = {"target_modules": ["up", "down"]}
    arguments |= {"feedforward_modules": ["down"]} if kind == "IA3Config" else {"init_weights": False, "r": 2}
    if kind == "LoraConfig":
        arguments = {"target_modules": ["up", "down", "embed"], "r": 2, "init_lora_weights": False}

    def wrapped(model: nn.Module) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, getattr(peft, kind)(**arguments)).double()

    reference, ours = wrapped(Small()), Small()
    if swapped_first:
        manualprop.swap(ours)
    ours = wrapped(ours)
    report = manualprop.swap(ours, check=TOKENS)
    assert report.check is not None
    assert sum(type(module) in TWINS.values() for module in ours.modules()) >= 5
    results = []
    for model in (reference, ours):
        loss = nn.functional.cross_entropy(model(TOKENS), CLASSES)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert results[0][1] and results[0][1].keys() == results[1][1].keys()
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-14)
    merged, merged_reference = ours.merge_and_unload(), reference.merge_and_unload()
    assert type(merged.up) is manualprop.nn.Linear
    torch.testing.assert_close(merged(TOKENS), merged_reference(TOKENS), rtol=1e-11, atol=1e-14)
    manualprop.unswap(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in Small().modules()]
    torch.testing.assert_close(
        copy.deepcopy(merged)(TOKENS), merged_reference(TOKENS), rtol=1e-11, atol=1e-14
    )
