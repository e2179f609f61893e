"""Layers of other libraries that have a twin: transformers' Conv1D, written here, since the library is not installed.

The real ones are in test_transformers.py.
"""

import copy
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import manualprop
from manualprop import functional as F
from manualprop.nn.foreign import FORWARDS, TransposedLinear

HOME, ACTIVATIONS = "transformers.pytorch_utils", "transformers.activations"


class Conv1D(nn.Module):
    """transformers' layer, line for line in what it computes."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def __repr__(self) -> str:
        return "Conv1D(nf={nf}, nx={nx})".format(**self.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class NewGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class MLP(nn.Module):
    """GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(16, 6), Conv1D(6, 16)
        self.act, self.dropout = NewGELUActivation(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.c_proj(self.act(self.c_fc(x))))
        return y


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the classes the names by which the twins are found, and by which pickle finds them."""
    for cls, home in ((Conv1D, HOME), (NewGELUActivation, ACTIVATIONS)):
        monkeypatch.setattr(cls, "__module__", home)
    module = types.ModuleType(HOME)
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, HOME, module)
    yield


def made(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return model().to(dtype)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


X = (2, 5, 6)


@pytest.mark.parametrize("shape", [(5, 6), X, (6,), (0, 6), (2, 3, 4, 6)])
def test_values_gradients_and_their_layout(shape: tuple[int, ...]) -> None:
    found = []
    for swapped in (False, True):
        layer = made(lambda: Conv1D(4, 6))
        if swapped:
            manualprop.swap(layer)
        x = torch.linspace(-1, 1, math.prod(shape)).double().reshape(shape).requires_grad_()
        y = layer(x)
        y.mul(torch.linspace(0, 1, y.numel()).double().reshape(y.shape)).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.stride() == layer.weight.stride()
        found.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=1e-13)


def test_all_but_the_class_stays_and_unswap_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Conv1D(4, 6), nn.Tanh())
    layer, shown, state, attributes = model[0], repr(model), model.state_dict(), dict(vars(model[0]))
    report = manualprop.swap(model, check=torch.randn(5, 6))
    assert report.swapped[0] == ("0", "Conv1D", "manualprop's Conv1D", "")
    assert isinstance(layer, Conv1D) and isinstance(layer, TransposedLinear) and type(layer) is not Conv1D
    assert repr(model) == shown and vars(layer) == attributes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    called: list[Any] = []
    right = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args) or right(*args))
    model(torch.randn(5, 6))
    assert len(called) == 1 and called[0][1].data_ptr() == layer.weight.data_ptr()  # a view, no copy
    again = manualprop.swap(model)
    assert again.swapped == () and {row.reason for row in again.left} == {"already manualprop's"}
    taken = manualprop.unswap(model)
    assert taken.swapped[0] == ("0", "manualprop's Conv1D", "Conv1D", "") and type(layer) is Conv1D
    assert manualprop.unswap(model).rows == ()


def test_no_more_is_kept_than_the_input() -> None:
    layer, x = manualprop.swap(made(lambda: Conv1D(4, 6))).model, torch.randn(5, 6).double().requires_grad_()
    receipt = manualprop.receipt(layer, x)
    assert receipt.kept == 0 and receipt.inputs == 5 * 6 * 8 and receipt.parameters == 4 * 6 * 8


def test_a_wrong_twin_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransposedLinear.forward
    monkeypatch.setattr(TransposedLinear, "forward", lambda self, x: right(self, x) * (1 + 1e-6))
    model = nn.Sequential(nn.Linear(6, 6), Conv1D(4, 6))
    with pytest.raises(RuntimeError, match=r"with manualprop's Conv1D at '1' the model differs"):
        manualprop.swap(model, check=torch.randn(5, 6))
    assert classes(model)[1:] == [nn.Linear, Conv1D]


class Subclass(Conv1D):
    pass


def test_what_only_looks_like_one_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rebound, parametrized = Conv1D(4, 6), parametrizations.weight_norm(Conv1D(4, 6))
    rebound.forward = rebound.forward  # type: ignore[method-assign]
    model = nn.ModuleList([Subclass(4, 6), rebound, parametrized])
    assert [row.reason for row in manualprop.swap(model).left if row.path in "012"] == [
        "a subclass of Conv1D, which may compute something else",
        "its forward is replaced on the instance",
        "parametrized: weight",
    ]
    monkeypatch.setattr(Conv1D, "__module__", "elsewhere")
    assert [row.reason for row in manualprop.swap(Conv1D(4, 6)).left] == ["no hand-derived twin"]


def test_gpt2s_mlp_runs_as_one_and_keeps_less() -> None:
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    model = made(MLP)
    before = classes(model)
    plain = manualprop.receipt(model, x).kept
    report = manualprop.swap(model, fuse=True, check=x)
    assert report.swapped[-1].after == "FusedMLP: act+c_proj"
    assert {row.path for row in report.swapped} == {"", "c_fc", "c_proj", "dropout"}
    widest, bits = 2 * 5 * 16 * 8, 2 * 5 * 6 // 8 + 1
    assert manualprop.receipt(model, x).kept == widest + bits < plain / 4
    assert classes(manualprop.unswap(model).model) == before


@pytest.mark.parametrize(
    ("layers", "run"),
    [
        (lambda: [nn.GELU(), Conv1D(4, 6)], "0+1"),
        (lambda: [nn.SiLU(), nn.Dropout(0.5), Conv1D(4, 6)], "0+1+2"),
        (lambda: [nn.LayerNorm(6), Conv1D(4, 6)], "0+1"),
        (lambda: [nn.RMSNorm(6), Conv1D(4, 6)], "0+1"),
    ],
)
def test_neighbours_in_a_sequential_run_as_one(layers: Callable[[], list[nn.Module]], run: str) -> None:
    model = nn.Sequential(*layers())
    report = manualprop.swap(model, fuse=True, check=torch.randn(X))
    assert report.swapped[-1].after == f"manualprop.nn.FusedSequential: {run}"


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = Conv1D(16, 6), Conv1D(16, 6), Conv1D(6, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


def test_a_gated_mlp_runs_as_one() -> None:
    report = manualprop.swap(Gated(), fuse=True, check=torch.randn(X))
    assert report.swapped[-1].after == "FusedGated: act+down"


def test_whoever_listens_to_it_hears_it() -> None:
    model, x = manualprop.swap(made(MLP).eval(), fuse=True).model, torch.randn(X).double()
    expected, heard = model(x), []
    handle = model.c_proj.register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(model(x), expected)
    assert heard == [1]
    handle.remove()
    parametrizations.weight_norm(model.c_proj)
    torch.testing.assert_close(model(x), expected)
    assert heard == [1]


def test_copies_and_pickles() -> None:
    model, x = manualprop.swap(nn.Sequential(Conv1D(4, 6), nn.Tanh())).model, torch.randn(5, 6)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(again) == classes(model) and again[0].weight is not model[0].weight
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("fuse", [False, True])
def test_compiles(fuse: bool) -> None:
    torch._dynamo.reset()
    model, x = manualprop.swap(made(MLP).eval(), fuse=fuse).model, torch.randn(X).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(f(x).sum(), [*model.parameters()]) for f in (model, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_no_library_is_imported_for_the_names() -> None:
    assert set(FORWARDS) == {(HOME, "Conv1D")}
    assert (
        sys.modules["transformers"].__spec__ is None
    )  # the stand-in: nobody has imported the real one over it
