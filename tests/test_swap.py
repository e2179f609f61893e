"""swap and unswap: what they change, what they leave alone, what they say, and the proof on the user's own input."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import manualprop
from manualprop._swap._twins import TORCHS, TWINS


class Block(nn.Module):
    """A residual block as the libraries of convolutional networks write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.drop_path = nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.drop_path(self.bn2(self.conv2(out)))
        out += self.downsample(x)
        return self.act2(out)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block(4), Block(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation=nn.GELU(), batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Sequential(nn.Linear(4, 4), nn.GELU("tanh")), nn.Linear(4, 2)
    )


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits, "loss": self.loss(logits, logits.argmax(-1))}


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(mlp())


class Recurrent(nn.Module):
    """Holds what has no twin, and a weight that a sibling shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.lstm = nn.LSTM(5, 5, batch_first=True)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        y, state = self.lstm(self.embed(tokens))
        return self.head(y), state


IMAGES, ROWS, SEQUENCES = (2, 3, 8, 8), (6, 3), (2, 5, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, lambda: torch.randn(ROWS)),
    "convnet": (convnet, lambda: torch.randn(IMAGES)),
    "encoder": (encoder, lambda: torch.randn(SEQUENCES)),
    "lightning": (Lit, lambda: (torch.randn(ROWS),)),
    "graph": (graph, lambda: {"input": torch.randn(ROWS)}),
    "recurrent": (Recurrent, lambda: torch.randint(7, (2, 4))),
}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make(), inputs()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ------------------------------------------------------------------------------------------- what it changes


@pytest.mark.parametrize("name", MODELS)
def test_only_classes_change_and_unswap_restores_them(name: str) -> None:
    model, _ = made(name)
    before = classes(model)
    parts = [dict(vars(module)) for module in model.modules()]
    report = manualprop.swap(model)
    assert report.model is model
    assert len(report.swapped) == sum(c in TWINS for c in before) > 0
    assert classes(model) == [TWINS.get(c, c) for c in before]
    for module, attributes in zip(model.modules(), parts, strict=True):
        assert list(vars(module)) == list(attributes)
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert manualprop.swap(model).swapped == () and classes(model) == [TWINS.get(c, c) for c in before]
    taken_back = manualprop.unswap(model)
    assert classes(model) == before and len(taken_back.swapped) == len(report.swapped)
    assert manualprop.unswap(model).rows == ()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_in_value(name: str, dtype: torch.dtype, mode: str) -> None:
    model, inputs = made(name)
    getattr(model.to(dtype), mode)()
    inputs = torch.utils._pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    report = manualprop.swap(model, check=inputs)
    assert report.check is not None and 0 <= report.check.ratio < 1
    assert report.check.tensors > len(list(model.parameters()))
    assert model.training == (mode == "train")


@pytest.mark.parametrize("name", ["mlp", "encoder", "convnet"])
def test_twenty_steps_of_training_are_the_same(name: str) -> None:
    losses: dict[bool, list[float]] = {}
    for swapped in (False, True):
        model, x = made(name)
        model.double()
        x = x.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if swapped:
            manualprop.swap(model)  # the optimizer keeps the parameters
        torch.manual_seed(1)
        losses[swapped] = []
        for _ in range(20):
            loss = model(x).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[swapped].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-9)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_in_place_activation_may_follow_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=bias), nn.ReLU(inplace=True), nn.Linear(8, 3), nn.SiLU(inplace=True)
    )
    report = manualprop.swap(model, check=torch.randn(shape))
    assert report.check is not None and len(report.swapped) == 4
    model(torch.randn(shape)).sum().backward()


def test_hooks_of_every_kind_stay_and_run() -> None:
    model, x = mlp(), torch.randn(ROWS, requires_grad=True)
    said: list[str] = []
    layer = model[0]
    layer.register_forward_pre_hook(lambda *_: said.append("pre"))
    layer.register_forward_hook(lambda module, inputs, output: said.append("forward") or output * 2)
    layer.register_full_backward_hook(lambda *_: said.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: said.append("backward pre"))
    layer.register_state_dict_post_hook(lambda *_: said.append("state"))
    layer.register_load_state_dict_post_hook(lambda *_: said.append("load"))
    layer.weight.register_hook(lambda g: said.append("weight"))
    expected = model(x)
    said.clear()
    assert type(manualprop.swap(model).model[0]) is manualprop.nn.Linear
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    model.load_state_dict(model.state_dict())
    assert sorted(said) == sorted(["pre", "forward", "backward pre", "backward", "weight", "state", "load"])


def test_tied_weights_buffers_optimizers_and_the_mode_stay() -> None:
    model, tokens = made("recurrent")
    model.eval()
    optimizer = torch.optim.Adam(model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    manualprop.swap(model)
    assert model.head.weight is model.embed.weight and not model.training
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, model.parameters())
    )
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model(tokens)[0].sum().backward()
    assert model.head.weight.grad is model.embed.weight.grad is not None


def test_a_layer_that_is_used_twice_has_one_row_and_counts_under_each_name() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert [row.path for row in manualprop.swap(model, only="second").rows] == ["first"]
    assert type(shared) is manualprop.nn.Linear
    assert [row.reason for row in manualprop.swap(model, skip="second").rows] == ["already manualprop's"]


def test_a_graph_module_can_be_copied_and_pickled_after_the_swap() -> None:
    model, inputs = made("graph")
    manualprop.swap(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(c in TORCHS for c in classes(again)) == 5
        torch.testing.assert_close(again(**inputs), model(**inputs))
        assert "LinearBackward" in type(again(**inputs).grad_fn).__name__


def test_a_compiled_model_runs_the_hand_rules_after_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3)
    expected = compiled(x)
    manualprop.swap(compiled)
    assert type(model[1]) is manualprop.nn.Tanh
    torch.testing.assert_close(compiled(x), expected)
    monkeypatch.setattr(manualprop.nn.Tanh, "forward", lambda self, x: 3 * x)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(x), 3 * model[0](x))


def test_the_fast_path_of_the_encoder_gives_the_same() -> None:
    model, x = made("encoder")
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nested tensors are in prototype stage"
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        expected = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(manualprop.swap(model).model(x, src_key_padding_mask=mask), expected)


def test_per_sample_gradients_of_torch_func() -> None:
    model, x = made("mlp")
    model.double()
    x = x.double()
    t = torch.tensor([0, 1, 1, 0, 1, 0])

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        y = torch.func.functional_call(model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(y, t[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = per_sample(parameters, x, t)
    manualprop.swap(model)
    torch.testing.assert_close(per_sample(parameters, x, t), expected, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------- what it leaves


class Lora(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.a, self.b = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.b(self.a(input))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrized: weight"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrized: weight"),
        (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), "parametrized: weight"),
        (
            lambda: nn.utils.weight_norm(nn.Linear(3, 3)),
            "",
        ),  # a hook makes the weight: the class is torch's own
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), ""),
        (Lora, "a subclass of torch.nn.Linear, which may compute something else"),
    ],
)
def test_reparametrised_layers_survive(layer: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.Tanh())
    before = classes(model)
    first, *_ = manualprop.swap(model, check=torch.randn(4, 3)).rows
    assert (first.path, first.before.endswith("Linear") or first.before == "Lora", first.reason) == (
        "0",
        True,
        reason,
    )
    assert type(model[0]) is before[1] if reason else manualprop.nn.Linear
    model(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    manualprop.unswap(model)
    assert classes(model) == before


def test_what_is_parametrized_after_the_swap_is_listed_by_unswap() -> None:
    model = manualprop.swap(nn.Sequential(nn.Linear(3, 3))).model
    parametrizations.weight_norm(model[0])
    assert [row.reason for row in manualprop.unswap(model).left] == ["parametrized: weight"]
    parametrize.remove_parametrizations(model[0], "weight")
    manualprop.unswap(model)
    assert type(model[0]) is nn.Linear


def test_a_layer_whose_forward_is_replaced_is_left() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model[1].forward = torch.sin  # as accelerate does it
    (row,) = manualprop.swap(model).left
    assert (row.path, row.reason) == ("1", "its forward is replaced on the instance")


def test_what_has_no_twin_is_listed_and_containers_are_not() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    assert {(row.path, row.before, row.reason) for row in manualprop.swap(model).left} == {
        ("layers.0.self_attn", "torch.nn.MultiheadAttention", "no hand-derived twin"),
        (
            "layers.0.self_attn.out_proj",
            "NonDynamicallyQuantizableLinear",
            "a subclass of torch.nn.Linear, which may compute something else",
        ),
        ("layers.0.activation", "function relu", "a function, not a layer: build the model with a layer"),
    }


# --------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("arguments", "swapped"),
    [
        ({}, ["0", "1", "2.0", "2.1", "3"]),
        ({"only": nn.Linear}, ["0", "2.0", "3"]),
        ({"only": (nn.GELU, nn.LeakyReLU)}, ["1", "2.1"]),
        ({"only": "2"}, ["2.0", "2.1"]),
        ({"only": "*.0"}, ["2.0"]),
        ({"only": "[01]"}, ["0", "1"]),
        ({"only": lambda path, module: getattr(module, "out_features", 0) == 4}, ["0", "2.0"]),
        ({"only": [nn.GELU, "3"]}, ["2.1", "3"]),
        ({"skip": "2"}, ["0", "1", "3"]),
        ({"skip": nn.Linear}, ["1", "2.1"]),
        ({"only": nn.Linear, "skip": ("2", lambda path, module: path == "3")}, ["0"]),
        ({"only": nn.Conv2d}, []),
        ({"only": []}, []),
    ],
)
def test_selection(arguments: dict[str, Any], swapped: list[str]) -> None:
    model = mlp()
    report = manualprop.swap(model, **arguments)
    assert [row.path for row in report.swapped] == swapped
    assert {row.reason for row in report.left} <= {"not selected"} and len(report.rows) == 5
    manualprop.swap(model)
    taken_back = [row.path for row in manualprop.unswap(model, **arguments).swapped]
    assert taken_back == swapped


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"only": "2.00"}, ValueError, r"only='2\.00' matches no module of the model; the nearest is '2\.0'"),
        ({"skip": ["0", "encoder.*"]}, ValueError, r"skip='encoder\.\*' matches no module"),
        ({"only": 3}, TypeError, r"only must be a class of modules, a pattern .*\. Got int\."),
        ({"skip": [int]}, TypeError, r"skip must be a class of modules.*\. Got int\."),
        ({"only": [None]}, TypeError, r"Got NoneType\."),
    ],
)
def test_wrong_selections_are_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    model = mlp()
    for function in (manualprop.swap, manualprop.unswap):
        with pytest.raises(kind, match=text):
            function(model, **arguments)
    assert not any(c in TORCHS for c in classes(model))


def test_a_single_layer_is_a_model_and_a_function_is_none() -> None:
    layer = nn.Tanh()
    report = manualprop.swap(layer, check=torch.randn(3))
    assert type(layer) is manualprop.nn.Tanh and "(the model)" in str(report)
    for function in (manualprop.swap, manualprop.unswap):
        with pytest.raises(TypeError, match=r"swap: model must be a torch\.nn\.Module\. Got function\."):
            function(mlp)  # type: ignore[type-var]


def test_the_report_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ChannelShuffle(2), nn.Linear(2, 2), nn.Linear(2, 2))
    lines = str(manualprop.swap(model, skip="2")).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["layers", "path", "from", "to", "why", "not"],
        ["2", "*", "torch.nn.Linear", "manualprop.nn.Linear"],
        ["1", "1", "torch.nn.ChannelShuffle", "-", "no", "hand-derived", "twin"],
    ]
    assert lines[3].split() == ["1", "2", "torch.nn.Linear", "-", "not", "selected"]
    assert lines[4] == "2 of 4 layers swapped."
    report = manualprop.swap(model)
    assert repr(report) == str(report)


def test_a_layer_without_a_twin_confuses_nothing() -> None:
    """Its base is torch.nn.Module: neither that nor another subclass of it has a twin for it."""

    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    assert nn.Module not in TWINS and manualprop.nn.ReLUSquared not in TWINS.values()
    model = nn.Sequential(nn.Linear(3, 3), manualprop.nn.ReLUSquared(), Foreign(), nn.Module())
    report = manualprop.swap(model, fuse=True)
    kinds = [manualprop.nn.Linear, manualprop.nn.ReLUSquared, Foreign, nn.Module]
    assert [type(layer) for layer in model] == kinds
    assert {row.path: row.reason for row in report.left} == {
        "1": "already manualprop's", "2": "no hand-derived twin", "3": "no hand-derived twin",
    }  # fmt: skip
    manualprop.unswap(model)
    assert [type(layer) for layer in model] == [nn.Linear, *kinds[1:]]


# --- calls that a swap passes by ------------------------------------------------------------------------------------


def squash(x: Tensor) -> Tensor:
    return torch.tanh(x)


class Calls(nn.Module):
    """Layers, and functions in every form in which a forward may call them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.softmin = nn.Linear(3, 3), nn.Softmin(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([F.relu(self.linear(part)) for part in x])
        return self.head(squash(x)).softmax(dim=-1)

    def head(self, x: Tensor) -> Tensor:
        return self.softmin(torch.nn.functional.gelu(x, approximate="tanh"))


class Layers(nn.Module):
    """Layers alone, under the names of functions; our own function; a function of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.part = nn.ReLU(), nn.ModuleDict({"tanh": nn.Tanh()})

    def forward(self, x: Tensor) -> Tensor:
        return manualprop.functional.relu(self.part.tanh(self.relu(x))) + math.tanh(1.0)


def test_the_report_ends_with_the_calls_in_forward() -> None:
    report = manualprop.swap(nn.Sequential(Calls(), Calls(), Layers()))
    found = {"relu in Calls", "tanh in Calls", "gelu in Calls", "softmax in Calls"}
    assert len(report.calls) == 4 and set(report.calls) == found
    assert str(report).splitlines()[-1].startswith("Called in forward, where torch's rules still run: ")
    assert str(report).endswith(" Use manualprop.functional there, or swap(model, functions=True).")


class InPlace(nn.Module):
    """Functions that write over their input, or return places too, and one that has no rule here."""

    def forward(self, x: Tensor) -> Tensor:
        y, _ = F.max_pool1d_with_indices(F.relu_(x), 2)
        return F.normalize(torch.celu_(y).sigmoid_()) * F.one_hot(torch.tensor(0), 1)


def test_the_report_names_every_form_of_a_function_and_what_has_no_rule() -> None:
    report = manualprop.swap(InPlace())
    names = "max_pool1d_with_indices", "relu_", "celu_", "sigmoid_"
    assert set(report.calls) == {f"{name} in InPlace" for name in names}
    assert report.without_rule == ("normalize in InPlace",)
    assert str(report).endswith("\nCalled in forward, without a rule here: normalize in InPlace.")
    ours = manualprop.swap(report.model, functions=True)
    assert ours.calls == ("sigmoid_ in InPlace",), "ours never writes over its input"
    assert set(ours.functions) == set(report.calls) - set(ours.calls)
    assert ours.without_rule == report.without_rule


@pytest.mark.parametrize("model", [Layers, convnet, encoder, mlp])
def test_a_model_of_layers_has_no_such_line(model: Callable[[], nn.Module]) -> None:
    report = manualprop.swap(model())
    assert report.calls == report.without_rule == () and "in forward" not in str(report)
