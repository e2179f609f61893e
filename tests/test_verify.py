"""``manualprop.verify``: the calls, the derivatives, the diagnosis, and that nothing gets out."""

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import manualprop
from manualprop.verify import Case, check
from manualprop.verify._formats import html, junit


def real(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def by_hand(f: Callable[..., Any], df: Callable[..., Any]) -> Callable[..., Any]:
    """A Function with value ``f(*inputs)`` and gradient ``df(*inputs, *grad_outputs)``."""

    class ByHand(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            ctx.save_for_backward(*inputs)
            return f(*inputs)

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Any:
            return df(*ctx.saved_tensors, *g)

    return ByHand.apply


sine = by_hand(torch.sin, lambda x, g: g * x.cos())


# ----- the diagnosis -----

X, SQUARE, ROWS, VECTOR = real(3, 4), real(3, 3), real(5, 4), real(4)


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


# fmt: off
WRONG: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "sign": (by_hand(torch.sin, lambda x, g: -g * x.cos()), (X,), "wrong sign"),
    "factor": (by_hand(torch.sin, lambda x, g: 1.5 * g * x.cos()), (X,), "constant factor 3/2"),
    "doubled": (by_hand(torch.sin, lambda x, g: 2 * g * x.cos()), (X,), "constant factor 2: doubled"),
    "a mean's divisor": (by_hand(lambda x: (x * x).mean(), lambda x, g: 2 * g * x), (X,), "constant factor 12: a mean's divisor"),
    "divided twice": (by_hand(lambda x: (x * x).sum(), lambda x, g: 2 * g * x / x.numel()), (X,), "1/12: a mean's divisor"),
    "zero": (by_hand(torch.sin, lambda x, g: 0 * g), (X,), "zero"),
    "None": (by_hand(torch.mul, lambda x, w, g: (g * w, None)), (X, real(3, 4)), "zero: no gradient at all"),
    "NaN": (by_hand(torch.sin, lambda x, g: g * x.cos() / 0), (X,), "not finite"),
    "transposed": (by_hand(torch.matmul, lambda a, b, g: (g @ b.T, g.T @ a)), (SQUARE, real(3, 3)), "transposed"),
    "shape transposed": (by_hand(torch.matmul, lambda a, b, g: (g @ b.T, g.T @ a)), (X, real(4, 2)), "transposed"),
    "reversed": (by_hand(torch.matmul, lambda a, b, g: ((g @ b.T).flip(1), (g.T @ a).T)), (X, real(4, 2)), "reversed along dim 1: its entries come from the other end"),
    "exchanged": (by_hand(torch.mul, lambda a, b, g: (g * a, g * b)), (X, real(3, 4) + 1), "exchanged: this is the gradient of"),
    "missing sum": (by_hand(torch.add, lambda x, b, g: (g, g[0])), (ROWS, VECTOR), "missing sum over dim 0 of output 0"),
    "mean for sum": (by_hand(torch.add, lambda x, b, g: (g, g.mean(0))), (ROWS, VECTOR), "1/5: mean for sum over a broadcast"),
    "mean over two rows": (by_hand(torch.add, lambda x, b, g: (g, g.mean(0))), (real(2, 4), VECTOR), "1/2: half, .* or a mean for a sum over dim 0 of output 0, of length 2"),
    "mean over pairs": (by_hand(lambda x: x.repeat_interleave(2, 1), lambda x, g: g.unflatten(1, (-1, 2)).mean(2)), (X,), "or a mean for a sum over pairs along dim 1 of output 0"),
    "no axis of two": (by_hand(torch.sin, lambda x, g: g * x.cos() / 2), (real(2, 4),), "1/2: half, a factor 2 missing[?]"),
    "nearly a factor": (by_hand(torch.sin, lambda x, g: g * x.cos() * (0.9 + 1e-5 * x)), (X,), "nearly a constant factor, 0.9, but not quite"),
    "grad_output ignored": (by_hand(torch.sin, lambda x, g: x.cos()), (X,), "grad_output is ignored"),
    "overwritten": (by_hand(torch.tanh, lambda x, g: g * (1 - x.tanh().tanh() ** 2)), (X,), "^this is the right gradient for .* = output 0$"),
    "sum term of softmax": (by_hand(softmax, lambda x, g: g * softmax(x)), (X,), "one path of a sum is wrong"),
    "residual path": (by_hand(lambda x: x + x.sin(), lambda x, g: g * x.cos()), (X,), "one path .* residual connection.*: it is missing"),
    "block beside it": (by_hand(lambda x: x + x.sin(), lambda x, g: g + 2 * g * x.cos()), (X,), "the block beside a residual.* constant factor 2"),
    "second output": (by_hand(lambda x: (x.sin(), x.cos()), lambda x, g, h: g * x.cos()), (X,), "one path .* output 1, which is missing"),
    "where negative": (by_hand(lambda x: x.where(x > 0, 0.1 * x), lambda x, g: g.where(x > 0, 0.2 * g)), (X,), "where it is negative: constant factor 2"),
    "extra factor": (by_hand(torch.exp, lambda x, g: g * x * x.exp()), (X,), "an extra factor"),
    "path of a formula": (by_hand(lambda x: x.tanh() + x.sin(), lambda x, g: g * (x.cos() + 2 / x.cosh() ** 2)), (X,), "one path of a sum inside"),
}
# fmt: on


@pytest.mark.parametrize(
    ("fn", "inputs", "diagnosis"), [pytest.param(*row, id=name) for name, row in WRONG.items()]
)
def test_says_how_a_gradient_is_wrong(
    fn: Callable[..., Any], inputs: tuple[Tensor, ...], diagnosis: str
) -> None:
    outcome = check(fn, *inputs, only="first_order", isolate=False)["first_order"]
    assert outcome.verdict == "finding"
    assert re.search(diagnosis, outcome.diagnosis), outcome.diagnosis


def test_shows_the_worst_element_and_the_nearest_kink() -> None:
    leaky = by_hand(lambda x: x.where(x > 0.5, 0.1 * x), lambda x, g: g.where(x > 0.5, 0.2 * g))
    x = torch.tensor([1.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    outcome = check(leaky, x, only="first_order", isolate=False)["first_order"]
    (worst,) = outcome.details["worst"]
    assert (worst["index"], worst["value"]) == ([1], 0.25)
    assert worst["hand"] == pytest.approx(0.2)
    assert worst["numeric"] == pytest.approx(0.1)
    assert worst["kink"] == pytest.approx(0.5, abs=1e-3)
    assert "nearest kink at 0.5" in outcome.evidence


def test_large_inputs_are_seen_through_random_directions() -> None:
    wrong_in_one = by_hand(torch.sin, lambda x, g: g * x.cos().index_fill(0, torch.tensor([4321]), 0.0))
    assert check(sine, real(5000), only="first_order", isolate=False).passed
    assert not check(wrong_in_one, real(5000), only="first_order", isolate=False).passed


def test_complex_inputs_follow_torchs_convention() -> None:
    z = torch.randn(3, 2, dtype=torch.complex128).requires_grad_()
    assert check(torch.fft.fft, z, only=["first_order", "forward_mode"], isolate=False).passed
    unconjugated = by_hand(lambda z, w: z * w, lambda z, w, g: (g * w, g * z.conj()))
    assert not check(
        unconjugated, z, z.detach().clone().requires_grad_(), only="first_order", isolate=False
    ).passed


# ----- orders and modes -----


class DetachedSlope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.detach().exp()


class Once(DetachedSlope):
    backward = staticmethod(once_differentiable(DetachedSlope.backward))  # type: ignore[assignment]


class WrongTangent(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Any:
        return 0 * t


def test_silent_second_order_is_a_finding_and_a_loud_one_a_limit() -> None:
    silent = check(DetachedSlope.apply, X, only="second_order", isolate=False)["second_order"]
    assert (silent.verdict, silent.diagnosis[:4]) == ("finding", "zero")
    loud = check(Once.apply, X, only="second_order", isolate=False)["second_order"]
    assert loud.verdict == "limit"
    assert "once_differentiable" in loud.evidence


def test_a_zero_tangent_is_a_finding() -> None:
    report = check(WrongTangent.apply, X, only=["first_order", "forward_mode"], isolate=False)
    assert [o.probe for o in report.findings] == ["forward_mode"]
    assert report["forward_mode"].diagnosis == "zero"


def test_torchs_own_third_derivative_of_layer_norm_is_found_and_ours_passes() -> None:
    x = real(3, 4)
    wrong = check(torch.nn.LayerNorm(4), x, only="third_order", isolate=False)
    right = check(manualprop.nn.LayerNorm(4), x, only="third_order", isolate=False)
    assert not wrong.passed
    assert right.passed, right


def test_torchs_chunked_linear_cross_entropy_is_silent_in_second_order_and_in_forward_mode() -> None:
    chunked = {"options": torch.nn.LinearCrossEntropyOptions()}
    inputs = (real(6, 4), real(7, 4), torch.tensor([0, 3, 6, 1, 1, 2]))
    only = ["first_order", "second_order", "forward_mode"]
    report = check(
        torch.nn.functional.linear_cross_entropy, *inputs, kwargs=chunked, only=only, isolate=False
    )
    assert [(o.probe, o.diagnosis[:4]) for o in report.findings] == [
        ("second_order", "zero"),
        ("forward_mode", "zero"),
    ]
    ours = check(manualprop.functional.linear_cross_entropy, *inputs, only=only, isolate=False)
    assert [o.verdict for o in ours] == ["passed"] * 3


def test_a_reference_decides_on_value_and_gradient() -> None:
    only = "reference"
    assert check(sine, X, reference=torch.sin, only=only, isolate=False)[only].verdict == "passed"
    other_value = check(sine, X, reference=lambda x: x.sin() + 1e-7, only=only, isolate=False)[only]
    assert "output 0: off by 1e-07" in other_value.evidence
    steep = by_hand(torch.sin, lambda x, g: g * x.cos() * 1.001)
    assert "gradient of" in check(steep, X, reference=torch.sin, only=only, isolate=False)[only].evidence


@pytest.mark.parametrize(
    ("df", "text"),
    [
        (lambda x, g: x.cos(), "grad_output is ignored"),
        (lambda x, g: g * g * x.cos(), "not linear"),
        (lambda x, g: (g + 1e-3) * x.cos(), "not linear"),
        (lambda x, g: (g.half() * x.cos()).double(), "not linear"),
    ],
)
def test_backward_that_is_not_linear(df: Callable[..., Tensor], text: str) -> None:
    outcome = check(by_hand(torch.sin, df), X, only="linearity", isolate=False)["linearity"]
    assert outcome.verdict == "finding"
    assert text in outcome.diagnosis


# ----- what is declared, and what is accepted -----


def test_what_is_declared_must_be_supported() -> None:
    def outcome(fn: Callable[..., Any]) -> Any:
        return check(fn, X, declare={"double_backward": True}, only="second_order", isolate=False)[
            "second_order"
        ]

    assert "declared as supported, but it is not" in outcome(Once.apply).evidence
    assert outcome(torch.sin).verdict == "passed"


def test_what_is_accepted_keeps_its_reason_and_is_strict() -> None:
    def outcome(fn: Callable[..., Any]) -> Any:
        accept = {"second_order": "a kernel"}
        return check(fn, X, accept=accept, only="second_order", isolate=False)["second_order"]

    for fn in (Once.apply, DetachedSlope.apply):  # a limit, and a finding
        accepted = outcome(fn)
        assert accepted.verdict == "accepted" and accepted.evidence.startswith("a kernel ("), accepted
    assert outcome(torch.sin).verdict == "finding"
    assert (
        "accepted because of 'a kernel', but it passes: take 'second_order' out of accept"
        in outcome(torch.sin).evidence
    )


def test_a_group_is_accepted_if_one_of_it_needs_it() -> None:
    transforms = ["vmap", "func_grad", "jacrev", "jacfwd", "vmap_grad"]

    def verdicts(fn: Callable[..., Any], only: list[str]) -> set[str]:
        report = check(fn, X, accept={"transforms": "old"}, only=only, isolate=False)
        return {o.verdict for o in report}

    assert verdicts(Once.apply, transforms) == {"accepted"}
    assert verdicts(torch.sin, transforms) == {"finding", "passed"}
    assert verdicts(torch.sin, transforms[:1]) == {"passed"}, "of a part of the group nothing can be said"


def test_a_surrogate_is_what_backward_is_held_against() -> None:
    first = "first_order"
    straight_through = by_hand(torch.round, lambda x, g: g)
    assert not check(straight_through, X, only=first, isolate=False).passed
    meant = check(straight_through, X, surrogate=lambda x: x, level="quick")
    assert meant.passed, meant
    steep = by_hand(torch.round, lambda x, g: 2 * g)
    assert "constant factor 2" in check(steep, X, surrogate=lambda x: x, only=first)[first].diagnosis
    bent = by_hand(torch.sign, lambda x, g: g / (1 + x.abs()) ** 2)
    softsign = torch.nn.functional.softsign
    assert check(bent, X, surrogate=softsign, only=[first, "second_order", "sizes"], isolate=False).passed
    detached = by_hand(torch.sign, lambda x, g: g / (1 + x.detach().abs()) ** 2)
    assert not check(detached, X, surrogate=softsign, only="second_order", isolate=False).passed
    with pytest.raises(ValueError, match="surrogate must return what ByHand does"):
        check(straight_through, X, surrogate=torch.sum)


# ----- bad use -----


class NotDeterministic(torch.nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        NotDeterministic.calls += 1
        return x * NotDeterministic.calls


# fmt: off
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no grad": (lambda: check(torch.sin, torch.randn(3)), ValueError, "no input requires a gradient. Got torch.float32"),
    "no tensor": (lambda: check(torch.sin, 3.0), ValueError, "no input requires a gradient. Got no tensor"),
    "integers": (lambda: check(torch.sin, torch.arange(3)), ValueError, "only floating inputs have gradients. Got torch.int64"),
    "no tensor out": (lambda: check(lambda x: "text", X), TypeError, "must return a floating tensor.* Got str"),
    "chance": (lambda: check(NotDeterministic(), X), ValueError, "NotDeterministic must give the same output .* differ by"),
    "no callable": (lambda: check(X, X), TypeError, "fn must be callable. Got Tensor"),  # type: ignore[arg-type]
    "the class": (lambda: check(Once, X), TypeError, "Give Once.apply"),
    "unknown probe": (lambda: check(torch.sin, X, only="secnd_order"), ValueError, "Did you mean 'second_order'"),
    "unknown declaration": (lambda: check(torch.sin, X, declare={"vmapp": True}), ValueError, "declare must name probes. Got 'vmapp'"),
    "false declaration": (lambda: check(torch.sin, X, declare={"vmap": False}), ValueError, "Give accept={'vmap': 'the reason'}"),
    "unknown acceptance": (lambda: check(torch.sin, X, accept={"vmapp": "no"}), ValueError, "accept must name probes. Got 'vmapp'"),
    "no reason": (lambda: check(torch.sin, X, accept={"vmap": ""}), TypeError, "accept must say why. Got 'vmap': ''"),
    "outside": (lambda: check(torch.sin, X, domain=lambda x: bool((x > 0).all())), ValueError, "domain must hold at the given inputs"),
    "moved": (lambda: check(torch.sin, X, project=torch.abs), ValueError, "project must not change the given inputs. It moves args"),
    "inputs twice": (lambda: check(torch.sin, X, inputs=lambda: X), TypeError, "inputs makes the positional arguments"),
    "level": (lambda: check(torch.sin, X, level="slow"), ValueError, "level must be one of 'quick'"),  # type: ignore[arg-type]
    "Case and inputs": (lambda: check(Case(torch.sin, (X,)), X), TypeError, "a Case already holds its arguments"),
}
# fmt: on


@pytest.mark.parametrize(("call", "kind", "text"), [pytest.param(*row, id=name) for name, row in BAD.items()])
def test_bad_use_gets_a_clear_error(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


# ----- nothing gets out -----


def test_a_crash_is_a_finding_and_the_other_probes_go_on() -> None:
    crashing = by_hand(torch.sin, lambda x, g: os.abort())
    report = check(crashing, X, only=["first_order", "forward_mode", "reference"])
    assert "crashes the process: signal 6 (SIGABRT)" in report["first_order"].evidence
    assert report["forward_mode"].verdict == "limit"
    assert report["reference"].verdict == "skipped"


def test_a_hang_is_a_finding() -> None:
    hanging = by_hand(torch.sin, lambda x, g: time.sleep(60))
    start = time.perf_counter()
    report = check(hanging, X, only=["first_order", "linearity"], time_limit=0.5)
    assert time.perf_counter() - start < 20
    assert "gave up after 0.5 s in which it computed nothing" in report["first_order"].evidence
    assert report["linearity"].evidence == "first_order was given up", (
        "each would wait for its own time limit"
    )


def test_an_endless_loop_is_given_up_by_its_processor_time() -> None:
    def loops(x: Tensor, g: Tensor) -> Tensor:
        while True:
            g = g + 0

    report = check(by_hand(torch.sin, loops), X, only="first_order", time_limit=0.5)
    assert "gave up after 0.5 s of processor time" in report["first_order"].evidence


def test_an_exception_in_backward_is_a_finding_with_its_message() -> None:
    def df(x: Tensor, g: Tensor) -> Tensor:
        raise KeyError("weights")

    assert (
        "KeyError: 'weights'" in check(by_hand(torch.sin, df), X, only="first_order")["first_order"].evidence
    )


def test_a_function_that_cannot_be_called_is_one_finding() -> None:
    def f(x: Tensor) -> Tensor:
        raise ArithmeticError("no")

    (outcome,) = check(f, X)
    assert (outcome.probe, outcome.verdict) == ("call", "finding")
    assert "ArithmeticError: no" in outcome.evidence


@pytest.mark.parametrize("isolate", [True, False])
def test_nothing_global_is_changed(isolate: bool) -> None:
    def meddling(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)
        return x.sin()

    module = torch.nn.BatchNorm1d(4)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    x = X.detach().clone().requires_grad_()
    check(meddling, x, only=["first_order", "linearity"], isolate=isolate)
    check(module, x, only=["first_order", "linearity"], isolate=isolate)
    assert torch.equal(torch.randn(2), expected)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert x.grad is None
    assert torch.equal(x, X)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


# ----- the report -----


@pytest.fixture(scope="module")
def report() -> Any:
    return check(WRONG["factor"][0], X, only=["first_order", "second_order", "forward_mode"], isolate=False)


def test_the_report_reads_well(report: Any) -> None:
    lines = str(report).splitlines()
    assert lines[0].startswith("ByHand: 1 finding; 1 passed, 1 limit, 0 not applicable"), (
        "the result comes first"
    )
    assert lines[1].startswith("FINDING  first_order: wrong for args[0]")
    assert lines[2:4] == [
        "    diagnosis: constant factor 3/2 (in all paths)",
        "    again:     check(ByHand, *inputs, only='first_order', seed=0)",
    ]
    assert lines[4].startswith("limit    forward_mode: NotImplementedError: You must implement the jvp")
    assert len(lines) == 5
    assert "first_order   FINDING   wrong for args[0]" in report.table()
    assert "second_order  ok " in report.table()
    with pytest.raises(AssertionError, match="constant factor 3/2"):
        report.assert_passed()
    with pytest.raises(KeyError, match="'vmap' did not run"):
        report["vmap"]


def test_the_report_as_json_junit_and_html(report: Any) -> None:
    data = json.loads(report.to_json())
    assert (data["passed"], data["outcomes"][0]["verdict"]) == (False, "finding")
    (suite,) = ElementTree.fromstring(junit([report]).partition("\n")[2])
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    page = html([report])
    heat = data["outcomes"][0]["details"]["heat_maps"]["args[0]"]["error"]
    assert page.count("<rect") == len(heat) * len(heat[0]) == 144
    assert page.count('fill="#ffffff"') == 144 - 12, "the error is on the diagonal"
    assert "constant factor 3/2" in page
    shown, folded, rest = page.partition("<details><summary>2 probes without a finding</summary>")
    assert folded and "constant factor 3/2" in shown and "<rect" not in rest


def test_what_was_not_verified_stands_in_junit_and_html(report: Any) -> None:
    missed = [("ops.missed<1>", "no inputs were found")]
    _, suite = ElementTree.fromstring(junit([report], missed).partition("\n")[2])
    assert (suite.get("name"), suite.get("skipped")) == ("ops.missed<1>", "1")
    (skipped,) = suite.iter("skipped")
    assert skipped.get("message") == "not verified: no inputs were found"
    page = html([report], missed)
    assert "1 of 1 with findings, 1 not verified" in page
    section = page.partition("<h2>Not verified</h2>")[2]
    assert "missed&lt;1&gt;<td>no inputs were found" in section
    assert "Not verified" not in html([report])


def softmax_gradient(x: Tensor, g: Tensor, dim: int) -> Tensor:
    y = x.softmax(-1)
    return y * (g - (g * y).sum(dim, keepdim=True))


def unit(x: Tensor) -> Tensor:
    """x over its root mean square."""
    return x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt()


def unit_gradient(x: Tensor, g: Tensor, eps: float) -> Tensor:
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return r * (g - x * r * (g * x * r).mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("f", "wrong", "right", "words"),
    [
        pytest.param(
            lambda x: x.softmax(-1),
            lambda x, g: softmax_gradient(x, g, 0),
            lambda x, g: softmax_gradient(x, g, -1),
            "softmax over the wrong axis: over dim 0 in backward, over dim 1 in forward",
            id="axis",
        ),
        pytest.param(
            lambda x: x * x.sigmoid(),
            lambda x, g: g * x.sigmoid(),
            lambda x, g: g * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid())),
            "a detached factor: the output is x times a factor, and the factor is taken for a constant",
            id="factor",
        ),
        pytest.param(
            lambda x: x * x.sigmoid(),
            lambda x, g: g * x * x.sigmoid() * (1 - x.sigmoid()),
            lambda x, g: g * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid())),
            "a detached factor: the output is x times a factor, and x is taken for a constant",
            id="other factor",
        ),
        pytest.param(
            unit,
            lambda x, g: unit_gradient(x, g, 0.0),
            lambda x, g: unit_gradient(x, g, 0.01),
            "a missing eps: the error is",
            id="eps",
        ),
    ],
)
def test_common_mistakes_get_their_own_words(
    f: Callable[[Tensor], Tensor], wrong: Any, right: Any, words: str
) -> None:
    def named(x: Tensor, df: Any) -> Tensor:
        y: Tensor = by_hand(f, df)(x)
        return y

    first = "first_order"
    found = check(lambda x: named(x, wrong), X, only=first, isolate=False)
    assert not found.passed and words in found[first].diagnosis, found[first].diagnosis
    assert check(lambda x: named(x, right), X, only=first, isolate=False).passed


# ----- a diagnosis is true, or there is none -----

# fmt: off
REFUSED_SHAPES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "no broadcast": (by_hand(lambda x: x.sum(-1), lambda x, g: g.reshape(1, 1, -1).expand(2, 3, 4)), (real(4, 3),), "gradient of shape [2, 3, 4] for an input of shape [4, 3]"),
    "exchanged": (by_hand(lambda a, b: a.sum() * b.sum(), lambda a, b, g: (g * a.sum() * torch.ones_like(b), g * b.sum() * torch.ones_like(a))), (real(3, 2), real(4, 5)), "exchanged: [4, 5] is the shape of args[1]"),
    "missing sum": (by_hand(lambda x, b: x + b.view(3, 1), lambda x, b, g: (g, g)), (real(2, 3, 4), real(3)), "missing sum over a dimension of output 0"),
    "another sum": (by_hand(lambda x, b: x + b.view(3, 1), lambda x, b, g: (g, g.sum((0, 1)))), (real(2, 3, 4), real(3)), "summed over other dimensions of output 0 than it should be"),
    "an axis": (by_hand(lambda x, b: x + b.view(3, 1), lambda x, b, g: (g, g.sum((0, 2), keepdim=True).squeeze(0))), (real(2, 3, 4), real(3)), "an axis of length 1 too many"),
}
# fmt: on


@pytest.mark.parametrize(
    ("fn", "inputs", "diagnosis"), [pytest.param(*row, id=name) for name, row in REFUSED_SHAPES.items()]
)
def test_a_refused_shape_is_said_to_be_no_more_than_it_is(
    fn: Callable[..., Any], inputs: tuple[Tensor, ...], diagnosis: str
) -> None:
    outcome = check(fn, *inputs, only="first_order", isolate=False)["first_order"]
    assert outcome.diagnosis == diagnosis


def test_a_grad_output_of_ones_tells_nothing_where_it_sends_nothing_back() -> None:
    wrong = by_hand(softmax, lambda x, g: g - g.mean(-1, keepdim=True))
    assert "ones" not in check(wrong, X, only="first_order", isolate=False)["first_order"].diagnosis


def test_a_simple_fraction_is_written_once() -> None:
    fn, inputs, _ = WRONG["mean for sum"]
    diagnosis = check(fn, *inputs, only="first_order", isolate=False)["first_order"].diagnosis
    assert diagnosis.startswith("constant factor 1/5: mean for sum"), diagnosis
    negative = by_hand(torch.add, lambda x, b, g: (g, -g.mean(0)))
    diagnosis = check(negative, *inputs, only="first_order", isolate=False)["first_order"].diagnosis
    assert diagnosis.startswith("constant factor -1/5: mean for sum"), diagnosis
    assert diagnosis.endswith("and wrong sign (in all paths)")
    long = by_hand(torch.add, lambda x, b, g: (g, g.mean(0)))
    inputs = (real(80, 1), real(1))
    diagnosis = check(long, *inputs, only="first_order", isolate=False)["first_order"].diagnosis
    assert diagnosis.startswith("constant factor 0.0125 = 1/80: mean for sum"), diagnosis


def test_a_dropout_without_its_mask_in_backward() -> None:
    def dropped(x: Tensor) -> Tensor:
        mask = torch.rand_like(x).gt(0.4).to(x.dtype) / 0.6
        y: Tensor = by_hand(lambda x, mask: x * mask, lambda x, mask, g: (g, None))(x, mask)
        return y

    diagnosis = check(dropped, X, only="first_order", isolate=False)["first_order"].diagnosis
    assert diagnosis.startswith("grad_output is handed on as it is: the mask and the scale"), diagnosis


def test_a_larger_gradient_that_autograd_sums_is_told_and_no_finding() -> None:
    fn = by_hand(torch.mul, lambda x, b, g: (g * b, g * x))
    outcome = check(fn, ROWS, VECTOR, only="first_order", isolate=False)["first_order"]
    assert outcome.verdict == "passed"
    assert outcome.evidence.endswith("autograd sums a gradient of shape [5, 4] to its input's [4]")
