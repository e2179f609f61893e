"""Functions offer themselves to arguments that override torch's functions, as those of torch.nn.functional do."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from cases import CASES, IN_PLACE, Case, real
from torch import Tensor, fx, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import manualprop
from manualprop import functional as F


class Answering(Tensor):
    """Answers with what it was offered, for whatever function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, len(args), tuple(kwargs or {})


class Logging(Tensor):
    """Notes the function, and passes it on: the example of torch's documentation."""

    heard: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs)


class Silent(Tensor):
    """A subclass with the method of every subclass."""


def call(function: Callable[..., Any], case: Case, arguments: tuple[Any, ...]) -> Any:
    count = len(arguments) - len(case.by_name)
    return function(
        *arguments[:count], **dict(zip(case.by_name, arguments[count:], strict=True)), **case.kwargs
    )


def answer(function: Callable[..., Any], case: Case, arguments: tuple[Any, ...]) -> Any:
    """What the call gives, or the words of its refusal: torch's unpooling offers itself to one argument of two."""
    try:
        return call(function, case, arguments)
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES + IN_PLACE])
def test_offers_what_torch_offers(case: Case) -> None:
    """The same function and the same arrangement of the arguments, whichever of them overrides; ours where torch has none."""
    ours, torchs = getattr(F, case.name), getattr(torch_F, case.name, None)
    for place, argument in enumerate(case.made(grad=False)):
        if not isinstance(argument, Tensor):
            continue
        arguments = list(case.made(grad=False))
        arguments[place] = argument.as_subclass(Answering)
        found = answer(ours, case, tuple(arguments))
        if torchs is None:
            assert found[0] is ours and found[1] + len(found[2]) == len(arguments) + len(case.kwargs)
        else:
            assert found == answer(torchs, case, tuple(arguments))


def rule_of(y: Tensor) -> str:
    """The name of the node of ours in the history of ``y``."""
    node = y.grad_fn
    while node is not None and "torch.autograd.function" not in type(node).__module__:
        node = node.next_functions[0][0]
    return type(node).__name__


W = real(2, 3, seed=1)
PASSED_ON: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "tanh": ("TanhBackward", F.tanh),
    "linear": ("LinearBackward", lambda x: F.linear(x, W)),
    "softmin": ("SoftmaxBackward", lambda x: F.softmin(x, -1)),
    "layer_norm": ("LayerNormBackward", lambda x: F.layer_norm(x, (3,))),
    "relu_dropout": ("ReLUDropoutBackward", F.relu_dropout),
}


@pytest.mark.parametrize("name", PASSED_ON)
@pytest.mark.parametrize("kind", [Logging, Silent])
def test_what_is_only_passed_on_runs_the_hand_rule(kind: type[Tensor], name: str) -> None:
    rule, f = PASSED_ON[name]
    x = real(4, 3, grad=False).as_subclass(kind).requires_grad_()
    torch.manual_seed(0)
    y = f(x)
    assert type(y) is kind and rule_of(y) == rule
    torch.manual_seed(0)
    plain = real(4, 3)
    expected = torch.autograd.grad(f(plain).sum(), plain)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0].as_subclass(Tensor), expected)


def test_the_passing_subclass_hears_torchs_function() -> None:
    Logging.heard.clear()
    F.linear(real(4, 3, grad=False).as_subclass(Logging), W)
    assert Logging.heard[0] == torch_F.linear


def test_an_answer_from_torchs_function_on_other_tensors_runs_the_hand_rule() -> None:
    """As of a quantised weight, which multiplies by its own dequantised values."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch_F.linear:
                return func(args[0], 2 * args[1].as_subclass(Tensor), *args[2:])
            return super().__torch_function__(func, types, args, kwargs)

    x = real(4, 3)
    y = F.linear(x, W.detach().as_subclass(Doubled))
    assert type(y.grad_fn).__name__ == "LinearBackward"
    torch.testing.assert_close(y, torch_F.linear(x, 2 * W))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Passing, lambda: torch.device("cpu")], ids=["a mode", "a device"])
@pytest.mark.parametrize("kind", [Tensor, Logging, Silent])
def test_modes_keep_the_hand_rule(mode: Any, kind: type[Tensor]) -> None:
    x = real(4, 3, grad=False).as_subclass(kind).requires_grad_()
    with mode():
        y = F.linear(x, W)
        z = F.mlp(x, W, None, W.t(), None)
    assert rule_of(y) == "LinearBackward" and rule_of(z) == "ActivationLinearBackward"


def test_nobody_answers() -> None:
    class Mute:
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented

    for linear in (torch_F.linear, F.linear):
        with pytest.raises(TypeError, match="__torch_function__"):
            linear(real(4, 3), Mute())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no implementation found"):
        F.packed_relu(Mute())  # type: ignore[arg-type]


def test_the_public_functions_are_themselves() -> None:
    assert inspect.signature(F.relu) == inspect.signature(F.relu.__wrapped__)  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(F.relu)) is F.relu and copy.deepcopy(F.relu) is F.relu
    relu, x = F.relu, real(3)
    graph = fx.symbolic_trace(lambda x: relu(x))  # not looked up as an attribute while it traces
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [F.relu]
    assert type(graph(x).grad_fn).__name__ == "ReLUBackward"


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: F.softmax(torch.ones(2)),
        lambda: F.softmin(torch.ones(2)),
        lambda: F.log_softmax(torch.ones(2)),
        lambda: F.mse_loss(torch.ones(2, 1), torch.ones(2)),
        lambda: F.kl_div(torch.zeros(2), torch.ones(2)),
        lambda: F.dropout2d(torch.ones(2, 2)),
        lambda: F.dropout2d(torch.ones(2, 2, 2)),
        lambda: F.dropout3d(torch.ones(2, 2)),
    ],
)
def test_a_warning_points_at_the_caller(misuse: Callable[[], Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        misuse()
    assert [w.filename for w in caught] == [__file__]


# ----- torch's per-sample gradients by expanded weights, which Opacus' mode "ew" uses -----

PER_SAMPLE: dict[str, tuple[tuple[Any, ...], Callable[[], Tensor]]] = {
    "Linear": ((5, 2), lambda: real(4, 3, 5)),
    "LayerNorm": ((5,), lambda: real(4, 3, 5)),
    "GroupNorm": ((1, 3), lambda: real(4, 3, 5)),
    "InstanceNorm1d": ((3, 1e-5, 0.1, True), lambda: real(4, 3, 5)),
    "InstanceNorm2d": ((3, 1e-5, 0.1, True), lambda: real(4, 3, 5, 2)),
    "InstanceNorm3d": ((3, 1e-5, 0.1, True), lambda: real(4, 3, 5, 2, 1)),
    "Embedding": ((9, 4), lambda: torch.arange(12).view(4, 3) % 9),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_expanded_weights(name: str) -> None:
    given, inputs = PER_SAMPLE[name]
    found = []
    for package in (nn, manualprop.nn):
        torch.manual_seed(0)
        layer = getattr(package, name)(*given).double()
        call_for_per_sample_grads(layer)(inputs()).pow(2).sum().backward()
        found.append([p.grad_sample for p in layer.parameters()])
        assert found[-1] and all(len(g) == 4 for g in found[-1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
