"""`swap(check=)`: the proof on the user's own input, what it finds, what it leaves alone, and what it cannot compare."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_swap import classes, made, mlp
from torch import Tensor, nn

import manualprop
from manualprop._swap import _check


class Off(torch.autograd.Function):
    """tanh with an error of the size ``forward_error`` in its value, ``backward_error`` in its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_error: float, backward_error: float) -> Tensor:
        ctx.save_for_backward(x.tanh())
        ctx.factor = 1 + backward_error
        return x.tanh() * (1 + forward_error)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y) * ctx.factor, None, None


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh()
    )


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    def plant(forward_error: float, backward_error: float) -> None:
        forward = lambda self, input: Off.apply(input, forward_error, backward_error)  # noqa: E731
        monkeypatch.setattr(manualprop.nn.Tanh, "forward", forward)

    return plant


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("forward_error", "backward_error"), [(1e-9, 0.0), (0.0, 1e-9), (0.1, 0.0), (0.0, 0.1)]
)
def test_a_wrong_twin_is_refused_by_name(
    wrong: Callable[[float, float], None], dtype: torch.dtype, forward_error: float, backward_error: float
) -> None:
    """Of two wrong layers the first is named; errors far below the precision of the model are found in float64."""
    wrong(forward_error, backward_error)
    model, x = deep().to(dtype), torch.randn(6, 3, dtype=dtype)
    before = classes(model)
    text = r"with manualprop\.nn\.Tanh at '3' the model differs: .* is off by .* where rounding explains"
    with pytest.raises(RuntimeError, match=text):
        manualprop.swap(model, check=x)
    assert classes(model) == before
    report = manualprop.swap(model, check=x, skip=nn.Tanh)
    assert len(report.swapped) == 5


def test_an_error_in_one_precision_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in float64, and off by ten units of rounding in the model's own float32."""
    scale = {torch.float32: 1 + 3e-4, torch.float64: 1.0}
    monkeypatch.setattr(manualprop.nn.Tanh, "forward", lambda self, x: x.tanh() * scale[x.dtype])
    with pytest.raises(RuntimeError, match=r"Tanh at '3' the model differs: .* in torch.float32"):
        manualprop.swap(deep(), check=torch.randn(6, 3))


def test_the_first_layer_is_first_in_the_order_of_execution(wrong: Callable[[float, float], None]) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.never, self.first = nn.Tanh(), nn.Tanh(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * 2)

    wrong(0.0, 0.01)
    with pytest.raises(RuntimeError, match=r"Tanh at 'first'"):
        manualprop.swap(Backwards(), check=torch.randn(5))


def test_a_twin_that_fails_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: nn.Module, input: Tensor) -> Tensor:
        raise TypeError("inputs must be small")

    monkeypatch.setattr(manualprop.nn.Tanh, "forward", fails)
    model = deep()
    before = classes(model)
    with pytest.raises(
        RuntimeError, match=r"Tanh at '3' the model fails .*TypeError: inputs must be small"
    ) as caught:
        manualprop.swap(model, check=torch.randn(6, 3))
    assert isinstance(caught.value.__cause__, TypeError) and classes(model) == before


def test_wrong_running_statistics_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = manualprop.nn.BatchNorm1d.forward

    def counts_twice(self: Any, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return right(self, input)

    monkeypatch.setattr(manualprop.nn.BatchNorm1d, "forward", counts_twice)
    with pytest.raises(RuntimeError, match=r"at '4' .*buffer 4\.num_batches_tracked is off by 1\.0e\+00"):
        manualprop.swap(deep(), check=torch.randn(6, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_check_leaves_no_trace() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Embedding(4, 2, max_norm=0.1),
    )  # fmt: skip
    model.forward = lambda x: model[3](model[2](model[1](model[0](x)))) @ model[4](torch.arange(4))
    model(torch.randn(5, 3)).sum().backward()
    x = torch.randn(5, 3, requires_grad=True)
    hooked: list[int] = []
    model[1].weight.register_hook(lambda g: hooked.append(1))
    tensors = {n: (t, t._version, t.clone()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    attributes = [dict(vars(module)) for module in model.modules()]
    state = torch.get_rng_state()
    assert manualprop.swap(model, check=x).check is not None
    assert torch.equal(state, torch.get_rng_state()) and x.grad is None and not hooked
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kept, version, value = tensors[name]
        assert tensor is kept and tensor._version == version and torch.equal(tensor, value), name
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    for module, before in zip(model.modules(), attributes, strict=True):
        assert list(vars(module)) == list(before)
        assert all(vars(module)[name] is value for name, value in before.items())


def test_the_check_runs_under_no_grad_autocast_and_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.net, self.reentrant = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.GELU()), reentrant

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=self.reentrant)
            return y

    for reentrant in (False, True):
        for autocast in (False, True):
            model = Checkpointed(reentrant)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                report = manualprop.swap(model, check=torch.randn(5, 3))
            assert len(report.swapped) == 3 and report.check is not None and report.check.ratio < 1
            assert all(p.grad is None for p in model.parameters())


def test_half_precision_that_overflows_is_compared_where_it_does_not() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).half()
    x = torch.randn(4, 3).half()
    x[0] = 60000.0
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    assert model[0](x).isinf().any()
    assert manualprop.swap(model, check=x).check is not None


@pytest.mark.parametrize("layer", [nn.Hardsigmoid(), nn.CELU(0.3), nn.CELU(0.3, inplace=True)])
def test_constants_that_torch_rounds_are_no_difference(layer: nn.Module) -> None:
    """torch's float64 gradient has an error of 1e-8 there; ours is exact."""
    report = manualprop.swap(nn.Sequential(nn.Linear(3, 4), layer), check=torch.randn(5, 3))
    assert report.check is not None and report.check.ratio < 1


def test_frozen_parameters_and_unused_ones() -> None:
    model, x = made("mlp")
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    report = manualprop.swap(model, check=x)
    assert report.check is not None and len(report.swapped) == 6
    assert report.check.tensors == 2 + 1 + 4 + 2  # output and loss, input, two layers, the unused one


def test_the_check_says_what_it_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "DRAWS_ALIKE_ON", "somewhere else")
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    report = manualprop.swap(model, check=torch.randn(4, 3))
    assert type(model[1]) is manualprop.nn.Dropout
    assert report.check is not None and report.check.not_compared == ("1",)
    assert "draw other random numbers: 1." in str(report)


class Restless(nn.Module):
    """Gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Tanh(), iter(range(100))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * next(self.calls)
        return y


class Index(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).argmax(-1)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("model", "inputs", "kind", "text"),
    [
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            torch.ones(2, 3),
            ValueError,
            "needs initialised parameters",
        ),
        (lambda: Index(nn.Linear(3, 3)), torch.ones(2, 3), ValueError, "returns a floating tensor. Got none"),
        (Restless, torch.ones(2), ValueError, "needs a model that gives the same twice"),
        (mlp, torch.ones(2, 5), RuntimeError, "cannot be multiplied"),
        (mlp, (), TypeError, "missing 1 required positional argument"),
    ],
)
def test_what_cannot_be_checked_is_refused_and_left(
    model: Callable[[], nn.Module], inputs: Any, kind: type[Exception], text: str
) -> None:
    built = model()
    before = classes(built)
    with pytest.raises(kind, match=text):
        manualprop.swap(built, check=inputs)
    assert classes(built) == before


class Shared(nn.Module):
    """A layer and an activation read one tensor: torch's activation keeps it, which costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(4, 8), nn.Linear(8, 8), nn.Softplus(threshold=40)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        y: Tensor = self.second(hidden) + self.act(hidden)
        return y


def test_the_check_names_the_layer_that_keeps_more() -> None:
    x = torch.randn(5, 4)
    check = manualprop.swap(Shared(), check=x).check
    assert check is not None and check.keeps_more == {"act": 5 * 8 * 4}
    assert check.kept.after.kept - check.kept.before.kept == 5 * 8 * 4
    assert "Kept for backward: 160 B before, 320 B after. More is kept at act +160 B:" in str(check)


def test_the_check_says_what_is_saved() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Softsign(), nn.Linear(8, 2))
    check = manualprop.swap(model, check=torch.randn(5, 4)).check
    assert check is not None and check.keeps_more == {}
    assert str(check).endswith("Kept for backward: 480 B before, 160 B after.")
