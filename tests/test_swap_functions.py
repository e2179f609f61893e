"""``swap(model, functions=True)``: torch's functions that a forward calls run our rules."""

import copy
import gc
import inspect
import io
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from routes import COMPILED, FORWARD, REVERSE, Route
from test_routes import tripled
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import manualprop
from manualprop import functional
from manualprop import functions as rules
from manualprop._swap._functions import COUNTERPARTS, NAMES, own_forward

D = torch.float64
X = torch.linspace(-0.9, 0.8, 12, dtype=D).reshape(4, 3)


class Block(nn.Module):
    """Functions in each of their forms."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=D)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.tanh(F.gelu(self.linear(x)).sigmoid() * scale)
        return F.layer_norm(y, (3,)).softmax(dim=-1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


FUNCTIONS = ("GELUBackward", "SigmoidBackward", "TanhBackward", "LayerNormBackward", "SoftmaxBackward")


def nodes(y: Tensor) -> list[str]:
    """The names of the nodes of y's history."""
    found, waiting = {}, [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = type(node).__name__
            waiting += [before for before, _ in node.next_functions]
    return list(found.values())


def made(cls: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def runs_ours(y: Tensor) -> bool:
    """Whether all the functions of a history are ours, or none is."""
    ours = {name in nodes(y) for name in FUNCTIONS}
    assert len(ours) == 1, nodes(y)
    return ours.pop()


# ----- the table -----


def test_every_function_of_torch_nn_functional_has_its_counterpart() -> None:
    for name in NAMES:
        if hasattr(F, name):
            assert COUNTERPARTS[getattr(F, name)] is getattr(functional, name)
    assert COUNTERPARTS.keys() >= {
        torch.relu,
        Tensor.relu,
        torch.sigmoid,
        Tensor.softmax,
        torch.relu_,
        F.elu_,
    }
    assert not COUNTERPARTS.keys() & {
        torch.embedding,
        torch.kl_div,
        torch.add,
        torch.flatten,
        Tensor.sigmoid_,
    }


W, b = torch.linspace(0.5, 1.5, 3, dtype=D), torch.linspace(-1, 1, 3, dtype=D)
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "torch.softmax": lambda x: torch.softmax(x, -1, torch.float32),
    "torch.softmax by name": lambda x: torch.softmax(input=x, dim=-1),
    "Tensor.softmax": lambda x: x.softmax(-1, dtype=torch.float32),
    "Tensor.log_softmax": lambda x: x.log_softmax(0),
    "torch.layer_norm": lambda x: torch.layer_norm(x, [3], W, b, 1e-3, False),
    "torch.group_norm": lambda x: torch.group_norm(x, 3, W, b),
    "torch.batch_norm": lambda x: torch.batch_norm(x, W, b, None, None, True, 0.1, 1e-3, False),
    "torch.rms_norm": lambda x: torch.rms_norm(x, [3], W),
    "torch.celu": lambda x: torch.celu(x, 0.7),
    "torch.threshold": lambda x: torch.threshold(x, 0.1, 2.0),
    "torch.prelu": lambda x: torch.prelu(x, W),
    "torch.hardshrink": lambda x: torch.hardshrink(x, 0.2),
    "torch.dropout": lambda x: torch.dropout(x, p=0.4, train=True),
    "torch.max_pool1d": lambda x: torch.max_pool1d(x, 2, stride=1),
    "torch.adaptive_max_pool1d": lambda x: torch.adaptive_max_pool1d(x, 2)[0],
    "F.max_pool1d_with_indices": lambda x: F.max_pool1d_with_indices(x, 2)[0],
    "places": lambda x: F.max_pool1d(x, 2, 1, return_indices=True)[0],
    "Tensor.relu_": lambda x: (x * 1).relu_(),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x * 1, 0.3),
    "F.tanh": F.tanh,
    "F.softmax": lambda x: F.softmax(x, -1, _stacklevel=5),
    "torch.kl_div": lambda x: torch.kl_div(x, X.softmax(-1), 1),
    "torch.relu into": lambda x: torch.sigmoid(x.detach(), out=torch.empty_like(x)) + x,
}
TORCHS = ("torch.kl_div", "torch.relu into")  # whose arguments ours does not have


class Calling(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


@pytest.mark.filterwarnings("ignore:nn.functional.tanh is deprecated", "ignore:reduction. '?mean")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_call_has_torchs_arguments(name: str) -> None:
    x = X.clone().requires_grad_()
    model, found = Calling(FORMS[name]), []
    for _ in range(2):
        torch.manual_seed(1)
        y = model(x)
        ours = any("torch.autograd.function" in type(n).__module__ for n in history(y))
        found.append((y.detach(), *torch.autograd.grad(y.sum() + (y * y).sum(), x)))
        assert ours == (len(found) == 2 and name not in TORCHS)
        manualprop.swap(model, functions=True)
    torch.testing.assert_close(found[0], found[1])


def history(y: Tensor) -> list[Any]:
    found: list[Any] = [y.grad_fn]
    for node in found:
        found += [before for before, _ in node.next_functions if before is not None and before not in found]
    return found


# ----- every route -----


def of_one_function(x: Tensor) -> Tensor:
    return F.gelu(x) + torch.tanh(x) * 0


@pytest.mark.parametrize(
    "route",
    [
        pytest.param(
            r, id=name, marks=[pytest.mark.slow] if name in COMPILED and name != "compile(backward)" else []
        )
        for name, r in (REVERSE | FORWARD | COMPILED).items()
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_every_route_runs_the_hand_rule(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    model = manualprop.swap(Calling(F.gelu), functions=True).model
    torch._dynamo.reset()
    right = route(model, X)
    monkeypatch.setattr(rules, "GELU", tripled(rules.GELU))
    torch._dynamo.reset()
    torch.testing.assert_close(route(model, X), 3 * right)
    manualprop.unswap(model)
    torch._dynamo.reset()
    torch.testing.assert_close(route(model, X), right)


def test_a_compiled_model_compiles_again() -> None:
    """Whole, with parts that are switched off too."""
    model = made()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert not runs_ours(compiled(X))
    manualprop.swap(model, functions=True)
    assert runs_ours(compiled(X))
    manualprop.unswap(model)
    manualprop.swap(model, functions=True, skip="second")
    eager, traced = (sorted(nodes(f(X))) for f in (model, compiled))
    assert eager == traced and "GELUBackward" in eager and "GeluBackward0" in eager


def test_models_that_run_only_compiled() -> None:
    """One after the other, in a new thread, which stands for a new process: nothing has run eagerly in it before."""
    found: list[Tensor] = []

    def run() -> None:
        for _ in range(2):
            torch._dynamo.reset()
            model = manualprop.swap(made(), functions=True).model
            found.append(
                torch.compile(model, fullgraph=True, backend="aot_eager")(X.clone().requires_grad_())
            )

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(found, 2 * [made()(X)])


# ----- what it leaves alone -----


def test_our_own_functions_see_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule's forward calls torch's relu: it must not get our rule again."""
    seen = []
    f = rules.ReLU.forward
    monkeypatch.setattr(rules.ReLU, "forward", staticmethod(lambda x: seen.append(1) or f(x)))
    model = manualprop.swap(
        nn.Sequential(Calling(functional.relu), nn.ReLU(), Calling(F.relu)), functions=True
    ).model
    model(X.clone().requires_grad_())
    assert len(seen) == 3


def test_it_ends_with_the_forward() -> None:
    """Also after an exception, in another thread, and for a model beside it."""
    model, beside = manualprop.swap(made(), functions=True).model, made()
    x = X.clone().requires_grad_()
    assert runs_ours(model(x)) and not runs_ours(beside(x))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(X[:, :2])
    assert nodes(F.gelu(x))[0] == "GeluBackward0" and torch.overrides._get_current_function_mode_stack() == []
    seen: list[str] = []

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: seen.extend(nodes(F.gelu(x))))
            thread.start()
            thread.join()
            return F.gelu(x)

    assert "GELUBackward" in nodes(manualprop.swap(Asking(), functions=True).model(x))
    assert seen[0] == "GeluBackward0"


def test_class_repr_and_state_stay() -> None:
    model, before = made(), made()
    manualprop.swap(model, functions=True)
    assert type(model) is Net and repr(model) == repr(manualprop.swap(before).model)
    assert inspect.signature(model.first.forward) == inspect.signature(before.first.forward)
    assert list(model.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(model.first(X, scale=0.3), before.first(X, scale=0.3))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    before.load_state_dict(torch.load(buffer))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_on_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = manualprop.swap(made(), functions=True).model
    clone: Any = copied(model)
    assert all(own_forward(m).module is m for m in clone.modules() if own_forward(m) is not None)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(clone(X), made()(X))
    manualprop.unswap(model)
    assert runs_ours(clone(X)) and not runs_ours(model(X))


def test_nothing_keeps_the_model() -> None:
    gc.disable()
    try:
        model = manualprop.swap(made(), functions=True).model
        forward, watched = model.forward, weakref.ref(model)
        del model
        assert watched() is None
        with pytest.raises(ReferenceError, match="keep the model"):
            forward(X)
    finally:
        gc.enable()


def test_unswap_takes_it_away() -> None:
    model = made()
    before = [dict(vars(m)) for m in model.modules()]
    manualprop.swap(model, functions=True)
    manualprop.unswap(model)
    assert [dict(vars(m)) for m in model.modules()] == before and not runs_ours(model(X))


def test_a_checkpoint_of_a_part_recomputes_by_our_rules() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(
                self.second, F.relu(checkpoint(self.first, x, use_reentrant=True)), use_reentrant=False
            )

    plain, model = (manualprop.swap(made(cls), functions=True).model for cls in (Net, Checkpointed))
    assert own_forward(model.first).on
    found = []
    for each in (plain, model):
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_other_modes_still_see_the_calls() -> None:
    class Counting(TorchFunctionMode):
        seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    model = manualprop.swap(Calling(F.gelu), functions=True).model
    with Counting():
        assert "GELUBackward" in nodes(model(X.clone().requires_grad_()))
    assert F.gelu in Counting.seen


def test_an_argument_that_overrides_is_offered_torchs_function() -> None:
    class Answering(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func

    assert manualprop.swap(Calling(F.gelu), functions=True).model(X.as_subclass(Answering)) is F.gelu


# ----- which modules, and the report -----


def test_only_and_skip_select_modules() -> None:
    model = made()
    report = manualprop.swap(model, functions=True, only="first")
    assert runs_ours(model.first(X)) and not runs_ours(model.second(X))
    assert "ReluBackward0" in nodes(model(X))
    assert report.functions == report.calls[1:] and len(report.functions) == 5
    manualprop.swap(model, functions=True, skip="first.linear")
    assert runs_ours(model.second(X)) and "ReLUBackward" in nodes(model(X))
    manualprop.unswap(model, only="second")
    assert not runs_ours(model.second(X)) and runs_ours(model.first(X))
    again = manualprop.swap(model)
    assert again.functions and again.calls


def test_a_layer_that_is_skipped_calls_torchs_function() -> None:
    model = manualprop.swap(made(Block), functions=True, skip=nn.Linear).model
    assert runs_ours(model(X)) and "AddmmBackward0" in nodes(model(X))
    manualprop.swap(model, functions=True)
    assert "LinearBackward" in nodes(model(X)) and own_forward(model.linear) is None


def test_a_forward_that_someone_replaced_stays() -> None:
    model = made(Block)
    model.forward = types.MethodType(lambda self, x: F.gelu(x), model)
    replaced = model.forward
    manualprop.swap(model, functions=True)
    assert model.forward is replaced
    manualprop.unswap(model)
    assert model.forward is replaced


def test_the_report_and_the_check() -> None:
    report = manualprop.swap(made(), functions=True, check=X)
    names = ("tanh in Block", "gelu in Block", "sigmoid in Block", "layer_norm in Block", "softmax in Block")
    assert report.calls == () and set(report.functions) == {"relu in Net", *names}
    assert "Called in forward, where our rules run: " in str(report)
    assert report.check is not None and report.check.kept.after.kept <= report.check.kept.before.kept
    assert runs_ours(report.model(X))


def test_a_function_that_is_an_attribute() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = manualprop.swap(encoder, functions=True)
    row = next(row for row in report.rows if row.path == "activation")
    assert row.after == "manualprop.functional.relu, in forward"
    assert "ReLUBackward" in nodes(encoder(torch.randn(2, 3, 8)))


def test_a_wrong_rule_is_refused_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model is as it was, functions included."""
    monkeypatch.setattr(rules, "Tanh", tripled(rules.Tanh))
    model = made()
    with pytest.raises(RuntimeError, match="our rules in the forward of Block at 'first'"):
        manualprop.swap(model, functions=True, check=X)
    assert not runs_ours(model(X)) and all("forward" not in vars(m) for m in model.modules())


def test_fused_blocks_call_functions_too() -> None:
    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(3, 6, dtype=D), nn.GELU(), nn.Linear(6, 3, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.down(self.act(self.up(x))))

    model = made(MLP)
    expected = model(X)
    report = manualprop.swap(model, functions=True, fuse=True, check=X)
    assert "TanhBackward" in nodes(model(X)) and report.functions == ("tanh in FusedMLP",)
    torch.testing.assert_close(model(X), expected)
    manualprop.unswap(model)
    assert type(model) is MLP and "TanhBackward0" in nodes(model(X))


def test_exports_for_inference() -> None:
    model = manualprop.swap(made(), functions=True).model
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


def test_a_graph_is_swapped_after_its_trace() -> None:
    graph = torch.fx.symbolic_trace(made(Block))
    assert runs_ours(manualprop.swap(graph, functions=True).model(X))


def test_per_sample_gradients() -> None:
    model = manualprop.swap(made(), functions=True).model
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X)
    (one,) = torch.autograd.grad(model(X[1]).square().sum(), model.first.linear.weight)
    torch.testing.assert_close(found["first.linear.weight"][1], one)
