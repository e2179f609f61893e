"""Leaving Python: torch.export and ONNX for inference, torch.fx, TorchScript; and what training there would lose."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_nn import make
from test_routes import tripled
from torch import Tensor, nn

import manualprop
from manualprop import functions as rules
from manualprop._swap import TWINS

X = torch.linspace(-2.0, 2.1, 20).reshape(5, 4)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.LeakyReLU(0.2), nn.Linear(8, 3), nn.Softmax(-1)]
    return manualprop.swap(nn.Sequential(*layers)).model


def exported(module: nn.Module, x: Tensor, strict: bool = False) -> nn.Module:
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)
    return program.module()


def traced(module: nn.Module, x: Tensor) -> nn.Module:
    script: nn.Module = torch.jit.trace(module, x)
    return script


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_for_inference_is_the_eager_model(strict: bool) -> None:
    eager = model().eval()
    program = exported(eager, X, strict)
    for x in (X, X[:3] * 2):
        torch.testing.assert_close(program(x), eager(x))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")  # by the exporter itself
def test_onnx_is_the_eager_model(tmp_path: Path) -> None:
    eager, path = model().eval(), tmp_path / "model.onnx"
    rows = torch.export.Dim("rows")
    program = torch.onnx.export(eager, (X,), dynamo=True, verbose=False, dynamic_shapes=({0: rows},))
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (X, X[:3] * 2):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, eager(x).detach().numpy(), rtol=1e-5, atol=1e-6)


# ----- training -----


def first_weight_gradient(module: nn.Module) -> Tensor:
    return torch.autograd.grad(module(X).pow(2).sum(), module.get_parameter("0.weight"))[0]


def linear_tanh() -> nn.Sequential:
    torch.manual_seed(0)
    return manualprop.swap(nn.Sequential(nn.Linear(4, 3), nn.Tanh())).model


def compiled(module: nn.Module, x: Tensor) -> nn.Module:
    optimized: nn.Module = torch.compile(module, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    return optimized


# How a model is carried elsewhere, and whether its backward is then still ours.
WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], nn.Module], bool]] = {
    "eager": (lambda module, x: module, True),
    "torch.compile": (compiled, True),
    "torch.fx": (lambda module, x: torch.fx.symbolic_trace(module), True),
    "torch.jit.trace": (traced, True),
    "torch.export": (exported, False),
    "torch.export(strict=True)": (lambda module, x: exported(module, x, strict=True), False),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("way", WAYS)
def test_who_keeps_the_rule(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule tripled on purpose comes out tripled, but not of an exported program: it differentiates the forward."""
    carry, keeps = WAYS[way]
    right = first_weight_gradient(linear_tanh())
    monkeypatch.setattr(rules, "Tanh", tripled(rules.Tanh))
    torch._dynamo.reset()
    found = first_weight_gradient(carry(linear_tanh(), X))
    torch.testing.assert_close(found, 3 * right if keeps else right)


# ----- TorchScript -----

# The forwards of layers that have no rule: they return their input, or a view of it.
VIEWS = (nn.Identity.forward, torch.nn.Flatten.forward, torch.nn.Unflatten.forward)

NOT_WARNED = pytest.mark.filterwarnings(
    "ignore:.*NLLLoss2d:FutureWarning", "ignore:Lazy modules are a new feature", "ignore:Implicit dimension"
)


@NOT_WARNED
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "ours", [pytest.param(c, id=c.__name__) for c in TWINS.values() if c.forward not in VIEWS]
)
def test_scripting_is_refused(ours: type[nn.Module]) -> None:
    """Loudly: TorchScript knows no autograd.Function."""
    # OSError: it finds no source of the options of torch's own linear cross-entropy.
    with pytest.raises((torch.jit.frontend.NotSupportedError, RuntimeError, TypeError, OSError)):
        torch.jit.script(make(ours))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_trace_runs_but_cannot_be_saved(tmp_path: Path) -> None:
    script = torch.jit.trace(model(), X)
    torch.testing.assert_close(script(X[:3]), model()(X[:3]))
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        torch.jit.save(script, tmp_path / "model.pt")


# ----- torch.fx -----

CHECKS_ITS_INPUT = "forward compares the input's shape, and counts batches, which a trace would not record"
NOT_TRACED = {
    **dict.fromkeys(
        ("Softmax2d", "CircularPad1d", "CircularPad2d", "CircularPad3d"), "forward compares the input's shape"
    ),
    **{f"{kind}Norm{d}d": CHECKS_ITS_INPUT for kind in ("Batch", "Instance") for d in (1, 2, 3)},
    **{
        c.__name__: "has no parameters before its first input" for c in TWINS.values() if "Lazy" in c.__name__
    },
}
UNTRACED = [pytest.param(c, id=c.__name__) for c in TWINS.values() if c.__name__ in NOT_TRACED]
TRACED = [
    pytest.param(c, id=c.__name__)
    for c in TWINS.values()
    if c.__name__ not in NOT_TRACED and c.forward not in VIEWS
]


@NOT_WARNED
@pytest.mark.parametrize("ours", TRACED)
def test_fx_records_a_layer_as_our_function(ours: type[nn.Module]) -> None:
    # An argument that has a default is an input of the graph too, and of a transposed convolution it is compared.
    fixed = {"output_size": None} if "output_size" in inspect.signature(ours.forward).parameters else None
    graph = torch.fx.symbolic_trace(make(ours), fixed).graph
    calls = [node.target for node in graph.nodes if node.op.startswith("call")]
    assert any(getattr(f, "__module__", "").startswith("manualprop.functional") for f in calls), calls


@NOT_WARNED
@pytest.mark.parametrize("ours", UNTRACED)
def test_fx_refuses_what_it_would_record_wrongly(ours: type[nn.Module]) -> None:
    with pytest.raises((torch.fx.proxy.TraceError, AssertionError), match=r"control flow|Uninitialized"):
        torch.fx.symbolic_trace(nn.Sequential(make(ours)))


def test_an_fx_graph_is_the_model(tmp_path: Path) -> None:
    eager = model()
    graph = torch.fx.symbolic_trace(eager)
    torch.save(graph, tmp_path / "graph.pt")
    for module in (graph, torch.load(tmp_path / "graph.pt", weights_only=False)):
        torch.testing.assert_close(module(X), eager(X))
        torch.testing.assert_close(first_weight_gradient(module), first_weight_gradient(eager))
