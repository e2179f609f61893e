"""swap(fuse=True): what runs as one, that it is the same and keeps less, and when the parts run one by one again."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import manualprop
from manualprop import functional as F


class MLP(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], drop: float = 0.3) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(6, 16), act, nn.Dropout(drop), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.drop(self.act(self.fc1(x))))
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def layer(kind: type[nn.Module], **options: Any) -> nn.Module:
    module = kind(6, 2, 16, batch_first=True, **options)
    return module


class Decoder(nn.TransformerDecoderLayer):
    """Its class is not torch's own, but the method that holds the MLP is."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


# {name: (model, what runs as one)}
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gelu, linear": (lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)), ["1+2"]),
    "dropout between": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Dropout(0.5), nn.Linear(16, 6)),
        ["1+2+3"],
    ),
    "activation first": (lambda: nn.Sequential(nn.Mish(), nn.Linear(6, 16)), ["0+1"]),
    "relu, dropout": (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.5)), ["1+2"]),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 16)), ["0+1"]),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 16, bias=False)), ["0+1"]),
    "several": (
        lambda: nn.Sequential(
            nn.LayerNorm(6), nn.Linear(6, 16), nn.GELU("tanh"), nn.Linear(16, 6), nn.Tanh(), nn.Dropout(0.1),
            nn.Linear(6, 6),
        ),
        ["0+1, 2+3, 4+5+6"],
    ),
    "nested": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.GELU(), nn.Linear(6, 6))), ["0+1"]),
    "mlp": (lambda: MLP(nn.GELU()), ["act+drop+fc2"]),
    "mlp, function": (lambda: MLP(torch.nn.functional.silu), ["drop+fc2"]),
    "gated": (Gated, ["act_fn+down_proj"]),
    "encoder": (lambda: layer(nn.TransformerEncoderLayer, activation=nn.GELU()), ["activation+dropout+linear2"]),
    "encoder, function": (lambda: layer(nn.TransformerEncoderLayer), ["dropout+linear2"]),
    "decoder": (lambda: layer(Decoder, activation=nn.GELU()), ["activation+dropout+linear2"]),
}  # fmt: skip
X = (2, 5, 6)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def fused_rows(report: Any) -> list[Any]:
    return [row for row in report.swapped if "Fused" in row.after]


@pytest.mark.parametrize("name", MODELS)
def test_runs_as_one_is_the_same_and_restores(name: str) -> None:
    model = made(name)
    before, state = classes(model), model.state_dict()
    attributes = [list(vars(module)) for module in model.modules()]
    report = manualprop.swap(model, fuse=True, check=torch.randn(X))
    rows = fused_rows(report)
    assert [row.after.partition(": ")[2] for row in rows] == MODELS[name][1]
    assert all(row.after.startswith(("manualprop.nn.FusedSequential", "Fused")) for row in rows)
    now = classes(model)
    again = manualprop.swap(model, fuse=True)
    assert again.swapped == () and classes(model) == now
    assert sum(row.reason == "already fused" for row in again.left) == len(rows)
    assert all(
        value is kept for value, kept in zip(model.state_dict().values(), state.values(), strict=True)
    ) or (list(model.state_dict()) == list(state))
    manualprop.unswap(model)
    assert classes(model) == before and [list(vars(module)) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bytes_are_kept(name: str) -> None:
    """Than by the same layers, swapped and run one by one; by the widest tensor between them, or more."""
    x = torch.randn(X, requires_grad=True)
    one_by_one = manualprop.receipt(manualprop.swap(made(name)).model, x).kept
    as_one = manualprop.receipt(manualprop.swap(made(name), fuse=True).model, x).kept
    assert as_one < one_by_one


# torch's own TransformerDecoderLayer forgets its activation when it is copied, and takes ReLU.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "decoder"])
def test_copies_and_pickles(name: str) -> None:
    model, x = manualprop.swap(made(name), fuse=True).model.eval(), torch.randn(X)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(again) == classes(model)
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
        assert all(a is not b for a, b in zip(again.parameters(), model.parameters(), strict=True))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused functions, as they are called."""
    called: list[str] = []
    for name in ("activation_linear", "gated_linear", "layer_norm_linear", "rms_norm_linear", "relu_dropout"):
        original = getattr(F, name)

        def spied(*args: Any, _name: str = name, _original: Any = original) -> Any:
            called.append(_name)
            return _original(*args)

        monkeypatch.setattr(F, name, spied)
    return called


@pytest.mark.parametrize("name", ["gelu, linear", "layer norm", "mlp", "gated", "encoder"])
def test_whoever_listens_to_a_part_hears_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = counted(monkeypatch)
    model, x = manualprop.swap(made(name), fuse=True).model.eval(), torch.randn(X)
    expected = model(x)
    assert len(called) == 1
    linears = [module for module in model.modules() if type(module) is manualprop.nn.Linear]
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        heard: list[int] = []
        handle = getattr(linears[-1], register)(lambda *_, heard=heard: heard.append(1))
        called.clear()
        y = model(x)
        y.sum().backward()
        assert heard and not called, register
        torch.testing.assert_close(y, expected)
        handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        model(x)
    assert not called
    model(x)
    assert len(called) == 1


@pytest.mark.parametrize("name", ["gelu, linear", "mlp", "gated"])
def test_a_part_that_is_replaced_or_parametrized_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = counted(monkeypatch)
    model, x = manualprop.swap(made(name), fuse=True).model.eval(), torch.randn(X)
    expected = model(x)
    path = next(
        path for path, module in reversed(list(model.named_modules())) if type(module) is manualprop.nn.Linear
    )
    called.clear()
    parametrizations.weight_norm(model.get_submodule(path))
    torch.testing.assert_close(model(x), expected)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    assert model(x).shape[-1] == 16 and not called


def test_an_in_place_activation_of_the_input_writes_to_it() -> None:
    model = manualprop.swap(nn.Sequential(nn.SiLU(inplace=True), nn.Linear(6, 2)), fuse=True).model
    assert type(model) is nn.Sequential
    x = torch.randn(X)
    before = x.clone()
    model(x)
    assert torch.equal(x, torch.nn.functional.silu(before))


def test_shared_weights_train_together() -> None:
    losses = []
    for fuse in (False, True):
        model = made("several").double()
        model[6].weight = model[3].weight = nn.Parameter(model[6].weight.detach().new_full((6, 16), 0.1))
        model[6] = nn.Linear(6, 6).double() if False else model[1]  # one layer at two places
        model[5] = nn.Identity()
        manualprop.swap(model, fuse=fuse)
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(X)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            loss = model(x).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


def test_what_is_skipped_runs_by_itself() -> None:
    model = made("several")
    report = manualprop.swap(model, fuse=True, skip=["3"])
    assert [row.after.partition(": ")[2] for row in fused_rows(report)] == ["0+1, 4+5+6"]
    manualprop.unswap(model)
    assert fused_rows(manualprop.swap(model, fuse=True, skip=nn.Sequential)) == []


class Convolved(MLP):
    def __init__(self) -> None:
        super().__init__(nn.GELU())
        self.fc2 = nn.Conv1d(5, 5, 1)


class Branching(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) if hidden.sum() > 0 else self.fc2(-hidden)


class OfTheMode(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(self.drop(hidden) if self.training else hidden)


class Reused(MLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden) + hidden.mean()


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Convolved, "a Conv1d follows the activation, where a Linear must"),
        (lambda: Branching(nn.GELU()), r"its forward cannot be traced (TraceError)"),
        (lambda: OfTheMode(nn.GELU()), "its forward does not do in evaluation what it does in training"),
        (lambda: Reused(nn.GELU()), "its parts would keep no less as one"),
        (lambda: Scaled(nn.GELU()), "its parts would keep no less as one"),
        (lambda: MLP(nn.ELU()), None),
        (lambda: MLP(nn.ReLU(), drop=0.0), ""),
    ],
)
def test_what_is_left_says_why(model: Callable[[], nn.Module], reason: str | None) -> None:
    built = model()
    report = manualprop.swap(built, fuse=True)
    if reason == "":
        assert len(fused_rows(report)) == 1
        return
    assert fused_rows(report) == [] and type(built).__name__ == type(model()).__name__
    told = [row.reason for row in report.left if row.reason.startswith("not fused")]
    assert told == ([] if reason is None else [f"not fused: {reason}"])
    assert all(module.training for module in built.modules())


def test_a_wrong_fusion_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.activation_linear
    monkeypatch.setattr(F, "activation_linear", lambda *args: right(*args) * (1 + 1e-7))
    model = nn.Sequential(nn.Linear(6, 6), made("mlp"))
    before = classes(model)
    with pytest.raises(RuntimeError, match=r"with FusedMLP at '1' the model differs"):
        manualprop.swap(model, fuse=True, check=torch.randn(X))
    assert classes(model) == before and not any(
        "program" in name for m in model.modules() for name in vars(m)
    )


@pytest.mark.parametrize("name", ["gelu, linear", "several", "mlp", "gated"])
def test_compiles(name: str) -> None:
    model = manualprop.swap(made(name), fuse=True).model.eval()
    x = torch.randn(X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))
