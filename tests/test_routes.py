"""Every route runs the hand rule: a rule tripled on purpose comes out tripled, on each of them."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, IN_PLACE, Case, real
from routes import (
    COMPILED,
    COMPILED_SECOND,
    FORWARD,
    REVERSE,
    SECOND,
    Route,
    compiled,
    direction,
    forward_of_reverse,
    nested_forward,
)
from torch import Tensor

from manualprop import functional as F
from manualprop import functions as rules
from manualprop.functions import Rule, _rule


def tripled(rule: type[Rule]) -> type[Rule]:
    """``rule`` with every derivative, backward and forward, three times too large."""
    wrong = type(f"Tripled{rule.__name__}", (rule,), {"__module__": __name__})
    backward, jvp = wrong.backward, wrong.jvp

    def three(d: Any) -> Any:
        if isinstance(d, tuple):
            return tuple(three(part) for part in d)
        return None if d is None else 3 * d

    def backward3(ctx: Any, *g: Tensor) -> Any:
        found = backward(ctx, *g)
        return tuple(three(d) for d in found) if isinstance(found, tuple) else three(found)

    def jvp3(ctx: Any, *tangents: Any) -> Any:
        found = jvp(ctx, *tangents)
        return tuple(three(d) for d in found) if isinstance(found, tuple) else three(found)

    wrong.backward, wrong.jvp = staticmethod(backward3), staticmethod(jvp3)  # type: ignore[method-assign]
    return wrong


X = torch.linspace(-0.9, 0.8, 12, dtype=torch.float64).reshape(4, 3)
W, B = real(3, 3, seed=1, grad=False), real(3, seed=2, grad=False)
KERNEL = real(2, 2, 2, seed=3, grad=False)
TARGETS = torch.tensor([0, 2, 1, 1])

# One rule of each form: saved output, saved input, several inputs, rows, losses, in place with either saved.
FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Tanh": ("tanh", F.tanh),
    "GELU": ("gelu", F.gelu),
    "Linear": ("linear", lambda x: F.linear(x, W, B)),
    "Convolution": ("conv1d", lambda x: F.conv1d(x.reshape(2, 2, 3), KERNEL, padding=1)),
    "TransposedConvolution": ("conv_transpose1d", lambda x: F.conv_transpose1d(x.reshape(2, 2, 3), KERNEL)),
    "Softmax": ("softmax", lambda x: F.softmax(x, -1) * X),
    "CrossEntropy": ("cross_entropy", lambda x: F.cross_entropy(x, TARGETS, reduction="none")),
    "LinearCrossEntropy": (
        "linear_cross_entropy",
        lambda x: F.linear_cross_entropy(x, W, TARGETS, reduction="none"),
    ),
    "ReLU": ("relu", lambda x: F.relu(x * 1, inplace=True)),
    "SiLU": ("silu", lambda x: F.silu(x * 1, inplace=True)),
    "AvgPool": ("avg_pool1d", lambda x: F.avg_pool1d(x, 2, 1)),
    "MaxPool": ("max_pool1d", lambda x: F.max_pool1d(x, 2, 1)),
    "LPPool": ("lp_pool1d", lambda x: F.lp_pool1d(x + 1, 3.0, 2, 1)),
    "MSE": ("mse_loss", lambda x: F.mse_loss(x, X.flip(0), reduction="none")),
}


QUICK = ("Linear", "SiLU", "Tanh")


def assert_tripled(route: Route, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = FORMS[name][1]
    torch._dynamo.reset()
    right = route(f, X)
    monkeypatch.setattr(rules, name, tripled(getattr(rules, name)))
    torch._dynamo.reset()
    wrong = route(f, X)
    assert right.abs().max() > 0.01
    if name == "CrossEntropy" and right.dtype == torch.bfloat16:
        right = right.double()
    torch.testing.assert_close(wrong, 3 * right)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("route", REVERSE | FORWARD)
def test_eager_routes_run_the_hand_rule(route: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_tripled((REVERSE | FORWARD)[route], name, monkeypatch)


# Compiled autograd looks at .grad of every tensor a rule saved, outputs too, and torch warns about that.
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@looks_at_grad
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("route", COMPILED)
def test_compiled_routes_run_the_hand_rule(route: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_tripled(COMPILED[route], name, monkeypatch)


@looks_at_grad
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FORMS) - set(QUICK)))
@pytest.mark.parametrize("route", COMPILED)
def test_compiled_routes_run_every_form(route: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_tripled(COMPILED[route], name, monkeypatch)


class TripledCurvature(rules.GELU):
    """GELU whose second derivative is three times too large; its first is right."""

    ddf = staticmethod(lambda x, ddf=rules.GELU.ddf: 3 * ddf(x))


@pytest.mark.parametrize("route", SECOND | COMPILED_SECOND)
def test_second_order_routes_run_the_hand_rule(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    right = (SECOND | COMPILED_SECOND)[route](F.gelu, X)
    monkeypatch.setattr(rules, "GELU", TripledCurvature)
    torch._dynamo.reset()
    torch.testing.assert_close((SECOND | COMPILED_SECOND)[route](F.gelu, X), 3 * right)


@pytest.mark.parametrize("route", ["compile(func.grad)", "compile(func.jvp)", "compile(vmap(grad))"])
def test_without_registration_the_rule_would_be_bypassed(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the registration is for, and the proof that the tests above would notice its absence."""
    monkeypatch.setattr(_rule, "_register", lambda cls: None)
    with pytest.raises((AssertionError, torch._dynamo.exc.TorchDynamoException)):
        assert_tripled(COMPILED[route], "Tanh", monkeypatch)


def test_registration_waits_for_the_compiler() -> None:
    """``import manualprop`` leaves Dynamo alone; whoever imports it later finds every rule registered."""
    script = """
import sys, torch, manualprop
from manualprop import functions, nn
assert "torch._dynamo" not in sys.modules, "import manualprop imported the compiler"
model = manualprop.swap(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())).model
model(torch.ones(1, 2)).sum().backward()
assert "torch._dynamo" not in sys.modules, "an eager backward imported the compiler"
import torch._dynamo
from torch._dynamo.trace_rules import is_callable_allowed
assert all(is_callable_allowed(r) for r in (functions.ReLU, functions.ReLU.chain, functions.Linear))
class Later(functions.ReLU): pass
assert is_callable_allowed(Later) and is_callable_allowed(Later.chain)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def first_wanted(case: Case) -> tuple[int, tuple[Any, ...]]:
    arguments = case.made()
    return case.differentiable(arguments)[0], arguments


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES + IN_PLACE if not c.random])
def test_every_row_takes_the_eager_routes(case: Case) -> None:
    """All reverse routes agree with backward, all forward ones with each other, on every row."""
    i, arguments = first_wanted(case)

    def f(x: Tensor) -> Tensor:
        y: Tensor = case(
            *arguments[:i], x, *(a.detach() if isinstance(a, Tensor) else a for a in arguments[i + 1 :])
        )
        return y

    x = arguments[i].detach()
    reverse = {name: route(f, x) for name, route in REVERSE.items() if name != "autocast"}
    for name, found in reverse.items():
        torch.testing.assert_close(
            found, reverse["backward"], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    forward = {name: route(f, x) for name, route in FORWARD.items()}
    for name, found in forward.items():
        torch.testing.assert_close(
            found, forward["func.jvp"], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    if "first_derivative" not in case.except_for:  # a gradient that is not the derivative has no forward mode
        torch.testing.assert_close(forward["func.jvp"].sum(), (reverse["backward"] * direction(x)).sum())


@pytest.mark.parametrize("name", sorted({c.name for c in CASES if not c.random}))
def test_every_function_has_a_hessian_beneath_a_curve(name: str) -> None:
    """Forward over reverse mode, batched, where the second derivative reaches the arriving gradient."""
    case = next(c for c in CASES if c.name == name and not c.random)
    i, arguments = first_wanted(case)
    rest = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def f(x: Tensor) -> Tensor:
        y: Tensor = case(*rest[:i], x, *rest[i + 1 :])
        return (y * y).sum()

    expected = torch.autograd.functional.hessian(f, rest[i])
    torch.testing.assert_close(torch.func.hessian(f)(rest[i]), expected, rtol=1e-9, atol=1e-9)


def nested_agrees(case: Case) -> None:
    i, arguments = first_wanted(case)
    rest = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def f(x: Tensor) -> Tensor:
        y: Tensor = case(*rest[:i], x, *rest[i + 1 :])
        return y

    found, expected = nested_forward(f, rest[i]).sum(), forward_of_reverse(f, rest[i]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(c))
        for c in CASES + IN_PLACE
        if not c.random and "first_derivative" not in c.except_for
    ],
)
def test_every_row_nests_forward_mode(case: Case) -> None:
    nested_agrees(case)


def test_nested_forward_mode_would_be_wrong_without_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch switches forward mode off inside of a jvp; the test above sees what that does."""

    class Careless(rules.MSE):
        pass

    def jvp(ctx: Any, dx: Tensor | None, dt: Tensor | None) -> Tensor:
        x, t = ctx.saved_tensors
        return 2 * (x - t) * dx

    Careless.jvp = staticmethod(jvp)  # type: ignore[method-assign]
    monkeypatch.setattr(rules, "MSE", Careless)
    with pytest.raises(AssertionError):
        nested_agrees(next(c for c in CASES if c.name == "mse_loss"))


ONE_ROW_PER_FUNCTION = {c.name: c for c in reversed(CASES) if not c.random} | {
    f"{c.name} in place": c for c in reversed(IN_PLACE) if not c.random
}


@pytest.mark.parametrize("name", ONE_ROW_PER_FUNCTION)
def test_every_function_compiles(name: str) -> None:
    case = ONE_ROW_PER_FUNCTION[name]
    i, arguments = first_wanted(case)
    rest = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def f(x: Tensor) -> Tensor:
        y: Tensor = case(*rest[:i], x, *rest[i + 1 :])
        return y

    torch._dynamo.reset()
    torch.testing.assert_close(COMPILED["compile(backward)"](f, rest[i]), REVERSE["backward"](f, rest[i]))


@looks_at_grad
@pytest.mark.slow
@pytest.mark.parametrize("route", [*COMPILED, *COMPILED_SECOND])
@pytest.mark.parametrize("name", ONE_ROW_PER_FUNCTION)
def test_every_function_takes_every_compiled_route(name: str, route: str) -> None:
    case = ONE_ROW_PER_FUNCTION[name]
    i, arguments = first_wanted(case)
    rest = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def f(x: Tensor) -> Tensor:
        y: Tensor = case(*rest[:i], x, *rest[i + 1 :])
        return y

    # Not double backward: of a function that is linear in x it has nothing to differentiate, as in torch.
    eager = SECOND["grad(grad)"] if route in COMPILED_SECOND else REVERSE["backward"]
    if route in ("compile(func.jvp)", "compile(jacfwd)"):
        eager = FORWARD["func.jvp"]
    torch._dynamo.reset()
    torch.testing.assert_close((COMPILED | COMPILED_SECOND)[route](f, rest[i]), eager(f, rest[i]))


SEVERAL = [c for c in CASES if not c.random and len(c.differentiable(c.made())) > 1]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # torch's huber, prelu
@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in SEVERAL])
def test_frozen_arguments_under_vmap(case: Case) -> None:
    """One argument batched, one alone requiring a gradient: what is saved for backward and for forward differs."""
    arguments = case.made()
    places = case.differentiable(arguments)
    for batched in places:
        stacked = torch.stack([arguments[batched].detach(), arguments[batched].detach()])
        for wanted in places:
            leaves = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
            leaves[batched] = stacked
            leaf = leaves[wanted].requires_grad_()

            def f(x: Tensor, leaves: list[Any] = leaves, batched: int = batched) -> Tensor:
                y: Tensor = case(*leaves[:batched], x, *leaves[batched + 1 :])
                return y

            mapped, one_by_one = torch.vmap(f)(leaves[batched]), torch.stack([f(x) for x in leaves[batched]])
            if one_by_one.requires_grad:
                grads = [
                    torch.autograd.grad(y.sum(), leaf, allow_unused=True)[0] for y in (mapped, one_by_one)
                ]
                torch.testing.assert_close(*grads)


BY_ANOTHER_FORMULA = (  # whose value or gradient is taken another way in compiled code
    "binary_cross_entropy",
    "cross_entropy",
    "huber_loss",
    "nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str(c), marks=[] if c.name in BY_ANOTHER_FORMULA else [pytest.mark.slow])
        for c in CASES + IN_PLACE
        if not c.random
    ],
)
def test_compiled_value_and_gradients_are_the_eager_ones(case: Case) -> None:
    found = []
    torch._dynamo.reset()
    for function in (compiled(case), case):
        arguments = case.made()
        y = function(*arguments)
        asked = [arguments[i] for i in case.differentiable(arguments)]
        g = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
        found.append((y.detach(), torch.autograd.grad(y, asked, g) if asked else ()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
