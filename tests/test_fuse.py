"""swap(fuse=True): what runs as one, that it is the same and keeps less, and when the parts run one by one again."""

import copy
import operator
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_models import MLP, MODELS, Block, ConvNeXt, ResNet, X, classes, fused_rows, made
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import manualprop
from manualprop import functional as F
from manualprop.nn import fusing


@pytest.mark.parametrize("name", MODELS)
def test_runs_as_one_is_the_same_and_restores(name: str) -> None:
    model = made(name)
    before, state = classes(model), model.state_dict()
    attributes = [list(vars(module)) for module in model.modules()]
    report = manualprop.swap(model, fuse=True, check=torch.randn(X))
    rows = fused_rows(report)
    assert [row.after.partition(": ")[2] for row in rows] == MODELS[name][1]
    assert all(row.after.startswith(("manualprop.nn.Fused", "Fused")) for row in rows)
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
    of_convolutions = fusing.batch_norm_activation_conv
    monkeypatch.setattr(
        fusing, "batch_norm_activation_conv", lambda *args: called.append("conv") or of_convolutions(*args)
    )
    return called


@pytest.mark.parametrize(
    "name", ["gelu, linear", "layer norm", "mlp", "gated", "encoder", "batch norm", "block"]
)
def test_whoever_listens_to_a_part_hears_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = counted(monkeypatch)
    model, x = manualprop.swap(made(name), fuse=True).model.eval(), torch.randn(X)
    expected = model(x)
    assert len(called) == 1
    kinds = manualprop.nn.Linear, manualprop.nn.Conv1d
    linears = [module for module in model.modules() if type(module) in kinds]
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


def test_an_in_place_activation_after_a_layer_that_may_return_its_input_writes_to_it() -> None:
    """The sum of a residual container reads what the activation has written."""
    torch.manual_seed(0)
    layers = nn.Dropout(0.5), nn.SiLU(inplace=True), nn.Linear(6, 6)
    plain, x = manualprop.nn.Residual(*layers).eval(), torch.randn(X)
    expected = plain(x.clone())
    torch.testing.assert_close(manualprop.swap(plain, fuse=True).model(x), expected)


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


# ----- convnets -----


def test_a_residual_network_across_its_modules() -> None:
    """Its stem ends in its first block.  Bytes, three updates and running statistics, and evaluation."""
    torch.manual_seed(0)
    theirs, x, t = ResNet(), torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    ours, one_by_one = copy.deepcopy(theirs), manualprop.swap(copy.deepcopy(theirs)).model
    before = classes(ours)
    report = manualprop.swap(ours, fuse=True, check=x[:3, :, :8, :8])
    assert report.check is not None and len(fused_rows(report)) == 9
    (whole,) = (row for row in fused_rows(report) if row.path == "")
    assert whole.after == (
        "FusedResNet: bn1+relu+layer1.0.conv1, layer1.0.bn1+layer1.0.relu+layer1.0.conv2, "
        "layer1.1.bn1+layer1.1.relu+layer1.1.conv2 and 6 more"
    )
    as_one, in_torch, by_layers = (manualprop.receipt(m, x).kept for m in (ours, theirs, one_by_one))
    assert as_one <= 0.75 * in_torch and by_layers <= in_torch
    x, t, losses = x[:4, :, ::4, ::4].double(), t[:4], []
    for model in (ours.double(), theirs.double()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(model(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-9)
    torch.testing.assert_close(
        [*ours.state_dict().values()], [*theirs.state_dict().values()], rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    manualprop.unswap(ours)
    assert classes(ours) == before and "_manualprop_program" not in str([*vars(ours), *vars(ours.layer1[0])])


def test_a_hook_inside_lets_every_module_run_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    called = counted(monkeypatch)
    torch.manual_seed(0)
    model, x = manualprop.swap(ResNet(2, 1), fuse=True).model.eval(), torch.randn(2, 3, 8, 8)
    expected, heard = model(x), []
    assert len(called) == 5
    handle = model.layer2[0].register_forward_hook(lambda *_: heard.append(1))
    called.clear()
    torch.testing.assert_close(model(x), expected)
    assert heard == [1] and len(called) == 4  # the stem runs by itself, and every block as before
    handle.remove()
    model.layer3[0].bn1.register_forward_hook(lambda *_: heard.append(2))
    called.clear()
    torch.testing.assert_close(model(x), expected)
    assert heard == [1, 2] and len(called) == 4


def test_a_skipped_block_is_called() -> None:
    report = manualprop.swap(ResNet(2, 1), fuse=True, skip=Block)
    assert fused_rows(report) == []
    (row,) = (row for row in report.left if row.path == "")
    assert row.reason == "not fused: 'layer1.0', inside, is skipped"


class Normed(nn.Module):
    """Batch norm, activation and convolution, but for what a test adds."""

    def __init__(self, of: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.bn, self.act, self.conv = nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 5, 1)
        self.other, self.of, self.seen = nn.Conv1d(5, 5, 1), of, []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        n = self.bn(x)
        return self.of(self, n, self.act(n))


def overwritten(self: Any, n: Tensor, h: Tensor) -> Tensor:
    y: Tensor = self.conv(h)
    h += y
    return h


LESS = "its parts would keep no less as one"


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (lambda self, n, h: self.conv(h) + n, LESS),
        (lambda self, n, h: self.conv(h) + self.other(h), LESS),
        (overwritten, "it writes over a value that something else may read"),
        (lambda self, n, h: (h.clamp_(max=1), self.conv(h))[1], "its forward calls clamp_"),
        (lambda self, n, h: self.conv(operator.imul(h, 2)), "its forward calls imul"),
        (lambda self, n, h: self.conv(h) * torch.rand(()), "its forward draws random numbers"),
        (lambda self, n, h: (setattr(self, "last", h), self.conv(h))[1], "its forward changes last"),
        (lambda self, n, h: (self.seen.append(h), self.conv(h))[1], "its forward changes seen"),
        (lambda self, n, h: (self.count.add_(1), self.conv(h))[1], "its forward changes count"),
        (lambda self, n, h: self.conv(h + torch.ones(())), "its forward makes a tensor"),
        (lambda self, n, h: self.conv(h[0]), "its forward calls getitem"),
        (lambda self, n, h: self.conv(h.to(self.conv.weight.dtype)), "its forward reads .dtype"),
    ],
)
def test_a_value_that_others_keep_or_an_effect_is_in_the_way(of: Any, reason: str) -> None:
    model = Normed(of)
    before = {name: str(value) for name, value in vars(model).items()}
    report = manualprop.swap(model, fuse=True)
    assert fused_rows(report) == [] and f"not fused: {reason}" in [row.reason for row in report.left]
    manualprop.unswap(model)
    assert {name: str(value) for name, value in vars(model).items()} == before


def test_values_are_freed_as_in_forward() -> None:
    """A program of many steps must not hold what the method itself would have dropped."""
    model = manualprop.swap(ResNet(2, 1), fuse=True).model.eval()
    alive: list[weakref.ref[Tensor]] = []

    class Watch(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            assert sum(old() is not None for old in alive) <= 1
            alive.append(weakref.ref(y))
            return y

    for path in ("layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"):
        model.get_submodule(path).__class__ = Watch
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8))
    assert len(alive) == 3


def test_a_parameter_of_the_forward_is_read_at_each_call() -> None:
    """Also after it was replaced, or parametrized; its gradient arrives."""
    torch.manual_seed(0)
    theirs, x = ConvNeXt().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    ours = manualprop.swap(copy.deepcopy(theirs), fuse=True).model
    for change in (
        lambda model: None,
        lambda model: setattr(model, "scale", nn.Parameter(torch.full((5,), 0.3, dtype=torch.float64))),
        lambda model: parametrize.register_parametrization(model, "scale", nn.Tanh()),
    ):
        found = []
        for model in (theirs, ours):
            change(model)
            y = model(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.GroupNorm(1, 5), nn.SiLU(), nn.Conv1d(5, 5, 1)), "a GroupNorm comes before the activation, where a BatchNorm must"),
        ((nn.BatchNorm1d(5), nn.ReLU(), nn.ConvTranspose1d(5, 5, 1)), "a ConvTranspose1d follows the activation, where a convolution must"),
        ((nn.Conv1d(5, 5, 1), nn.ReLU(), nn.Conv1d(5, 5, 1)), None),
    ],
)  # fmt: skip
def test_a_container_of_other_layers_says_which_is_in_the_way(
    layers: tuple[nn.Module, ...], reason: str | None
) -> None:
    class InOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = copy.deepcopy(layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    for model in (nn.Sequential(*copy.deepcopy(layers)), InOrder()):
        told = [row.reason for row in manualprop.swap(model, fuse=True).left]
        if reason is None:
            assert all("BatchNorm" not in why for why in told)
        else:
            assert told == [f"not fused: {reason}"]


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


class OfTwo(MLP):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc2(self.act(self.fc1(x + y)))


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Convolved, "a Conv1d follows the activation, where a Linear must"),
        (lambda: Branching(nn.GELU()), r"its forward cannot be traced (TraceError)"),
        (lambda: OfTwo(nn.GELU()), "its forward does not take one value"),
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


@pytest.mark.parametrize(("name", "fused"), [("mlp", "FusedMLP"), ("block", "FusedBlock")])
def test_a_wrong_fusion_is_refused_by_name(name: str, fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, normed = F.activation_linear, fusing.batch_norm_activation_conv
    monkeypatch.setattr(F, "activation_linear", lambda *args: right(*args) * (1 + 1e-7))
    monkeypatch.setattr(
        fusing, "batch_norm_activation_conv", lambda *args: tuple(t * (1 + 1e-7) for t in normed(*args))
    )
    model = nn.Sequential(nn.Linear(6, 6), made(name))
    before = classes(model)
    with pytest.raises(RuntimeError, match=rf"with {fused} at '1' the model differs"):
        manualprop.swap(model, fuse=True, check=torch.randn(X))
    assert classes(model) == before and not any(
        "program" in name for m in model.modules() for name in vars(m)
    )


@pytest.mark.parametrize("name", ["several", "mlp", "gated", "strided block", "dense"])
def test_compiles(name: str) -> None:
    model = manualprop.swap(made(name), fuse=True).model.eval()
    x = torch.randn(X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
