"""Formulas run as programs, in chunks and by compiled kernels: the same mathematics, the same values."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case
from routes import compiled_autograd
from torch import Tensor

import manualprop
from manualprop import functional as F
from manualprop.functions._execution import (
    FORMULAS,
    Runner,
    _classes,
    _formula,
    _kernels,
    _lowering,
    chosen,
    decay,
    formula,
    indicator,
    inside,
    less_on_class,
    of_class,
    on_class,
    read_legend,
    written_over,
)
from manualprop.functions._execution._program import program
from manualprop.functions.fused.mlp import ACTIVATIONS, activated_and_through, through

# The compiler loads parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

ONE_ROW = list({c.name: c for c in CASES if c.elementwise}.values())
COMPILED = [c for c in ONE_ROW if c.name in ("hardtanh", "selu", "softplus", "silu", "gelu")]


@pytest.fixture(autouse=True)
def large_is_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks and kernels from a few elements on, so that the tests are quick."""
    monkeypatch.setattr(_formula, "LARGE", 8)
    monkeypatch.setattr(_formula, "CHUNK", 5)
    monkeypatch.setattr(_formula, "INNER_CHUNK", 5)
    monkeypatch.setattr(_formula, "FEWEST", 2)
    monkeypatch.setattr(_formula, "STEPS", 1)
    monkeypatch.setattr(_lowering, "FEW", 4)
    yield
    manualprop.kernels("eager")


def gradient(function: Any, x: Tensor, g: Tensor | None = None) -> Tensor:
    x = x.detach().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y) if g is None else g)[0]


def points(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ONE_ROW, ids=str)
def test_chunks_change_nothing(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = points(7, 9, dtype=dtype), points(7, 9, dtype=dtype) + 1
    in_chunks = gradient(case, x, g)
    monkeypatch.setattr(_formula, "LARGE", 1000)
    torch.testing.assert_close(in_chunks, gradient(case, x, g))


# ----- programs -----


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """Each formula that runs as a program is held against the formula as it is written, and may change no argument."""
    ran: list[Runner] = []
    run = Runner.__call__

    def audit(self: Runner, *arguments: Any, over: int | None = None, needs: Any = None) -> Any:
        tensors = arguments[: self.count]
        if _formula.watched(tensors):
            return run(self, *arguments, over=over, needs=needs)
        sizes: dict[str, int] = {"1": 1}
        for t, shape in zip(tensors, self.legend.shapes, strict=True):
            if t is not None and not self.legend.elementwise:
                assert [sizes.setdefault(letter, n) for letter, n in zip(shape, t.shape, strict=True)] == [
                    *t.shape
                ]
        if self.legend.elementwise:
            assert len({t.shape for t in tensors if t is not None}) == 1, self.__name__
        before = [t if t is None else t.clone() for t in tensors]
        expected = self.plain(arguments, [t if t is None else t.dtype for t in tensors], needs)
        found = run(self, *arguments, over=over, needs=needs)
        for i, (t, old) in enumerate(zip(tensors, before, strict=True)):
            if t is not None and i != over:
                assert torch.equal(t.nan_to_num(), old.nan_to_num()), f"{self.legend.names[i]} was changed"
        for a, b in zip(_formula._several(found), _formula._several(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
        ran.append(self)
        return found

    monkeypatch.setattr(Runner, "__call__", audit)
    return ran


@pytest.mark.parametrize("large", [False, True], ids=["whole", "chunks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_program_gives_what_the_formula_says(
    case: Case, large: bool, audited: list[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_formula, "LARGE", 8 if large else 10**9)
    arguments = case.made()
    wanted = [arguments[i] for i in case.differentiable(arguments)]
    y = case(*arguments)
    if wanted and y.requires_grad:
        torch.autograd.grad(
            y,
            wanted,
            torch.linspace(0.3, 1.7, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape),
            allow_unused=True,
        )


def test_most_formulas_are_run_by_the_rows_of_the_table() -> None:
    """So that the test above is one of something."""
    used = sum(bool(f.programs) for f in FORMULAS)
    assert used == 0 or used > 20  # none where this test runs by itself


ONE, ROWS = [torch.empty(11, device="meta")], torch.empty(11, 13, device="meta")


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, y: x + 3 * x * y, ["addcmul(a0, a0, a1, value=3"]),
        (lambda x, y: 1 - x * y, ["addcmul(c0, a0, a1, value=-1"]),
        (lambda x, y: x - y / 4, ["add(a0, a1, alpha=-0.25"]),
        (lambda x, y: torch.tanh(x) * y, ["torch.tanh(a0", "v2.mul_(a1)"]),
        (lambda x, y: 2 * x * y * 3, ["mul(a0, a1", ".mul_(c0)"]),
        (lambda x, y: indicator(x > 1, x) * y, ["empty_like", "gt(a0, c0, out="]),
        (lambda x, y: decay(x) + y, [".exp2_()"]),
        (lambda x, y: chosen(indicator(x != 2, x), y), ["where_not(a0, a1, 2"]),
        (lambda x, y: chosen(inside(x.clamp(-1, 1), -1.0, 1.0), y), ["threshold(", "where_not("]),
        (lambda x, y: chosen(torch.tanh(x), y), ["multiplied_or_chosen("]),
    ],
)
def test_spellings(f: Any, expected: list[str]) -> None:
    run = program(f, ONE * 2, frozenset())
    for text in expected:
        assert text in run.code
    x, y = points(40).round(), points(40)
    torch.testing.assert_close(run.run(x, y), f(x, y))


CLASSES = torch.tensor([[2], [0], [4]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("f", "text"),
    [
        (lambda x, r: less_on_class(torch.exp(x), r, CLASSES), "scatter_add_(1"),
        (lambda x, r: less_on_class(torch.exp(x), 0.25, CLASSES), "scatter_(1"),
        (lambda x, r: on_class(-r, CLASSES, x), "put_on_class("),
        (lambda x, r: 1.0 * (x * on_class(1.0, CLASSES, x)), "on_class("),
        (lambda x, r: of_class(x, CLASSES) + of_class(x[0], CLASSES) * r, "of_class("),
    ],
)
def test_words_of_classes(f: Any, text: str, dtype: torch.dtype) -> None:
    """One-hot vectors by a comparison, and what a program makes of them."""
    x, r = points(3, 5, dtype=dtype), points(3, 1, dtype=dtype)
    run = program(f, [x, r], frozenset())
    assert text in run.code
    onehot = (torch.arange(5) == CLASSES).to(dtype)
    by_hand = {
        "scatter_add_(1": torch.exp(x) - r * onehot,
        "scatter_(1": torch.exp(x) - 0.25 * onehot,
        "put_on_class(": -r * onehot,
        "on_class(": x * onehot,
        "of_class(": (x * onehot).sum(1, keepdim=True) + x[0][CLASSES] * r,
    }[text]
    for found in (run.run(x, r), f(x, r)):
        torch.testing.assert_close(found, by_hand)


def test_a_look_at_the_targets() -> None:
    """Only where nobody watches, and where a negative number stands for an ignored one."""
    every, some = torch.tensor([0, 3]), torch.tensor([0, -100])
    with torch.no_grad():
        assert _classes.occurring(-100, every) is None
        assert _classes.occurring(-100, some) == -100 and _classes.occurring(3, every) == 3
    assert _classes.occurring(-100, every) == -100


@pytest.mark.parametrize(("axis", "weights", "text"), [(1, (13,), "mv(a0, a1)"), (0, (11, 1), "torch.t(a0)")])
def test_a_weighted_sum_is_a_product_of_matrices(axis: int, weights: tuple[int, ...], text: str) -> None:
    def f(a: Tensor, w: Tensor) -> Tensor:
        return (w * a).sum(axis, keepdim=True)

    run = program(f, [ROWS, torch.empty(weights, device="meta")], frozenset())
    assert text in run.code
    a, w = points(7, 5), points(*((5,) if axis else (7, 1)))
    torch.testing.assert_close(run.run(a, w), f(a, w))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.detach() * 2 + y,
        lambda x, y: x.view(-1) * y,
        lambda x, y: x.reshape(-1).mul(y),
        lambda x, y: torch.relu(x.squeeze()) + y,
        lambda x, y: (x.expand(x.shape) + y).exp() * x,
        lambda x, y: x.to(x.dtype) * y - x,
    ],
)
def test_memory_of_an_argument_is_never_written_to(f: Any) -> None:
    """Neither through a view, nor through what hands its argument on."""
    run = program(f, ONE * 2, frozenset())
    x, y = points(6), points(6) + 1
    before = x.clone(), y.clone()
    torch.testing.assert_close(run.run(x, y), f(x, y))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_an_argument_that_is_given_away_is_written_to() -> None:
    run = program(lambda g, y: g * (1 - y * y), ONE * 2, frozenset({0}))
    g, y = points(6), points(6)
    expected = g * (1 - y * y)
    assert run.run(g, y) is g
    torch.testing.assert_close(g, expected)


@pytest.mark.parametrize(
    ("f", "numbers", "one_step"),
    [
        (torch.relu, (), True),
        (lambda x: torch.sigmoid(x), (), True),
        (lambda x, a: torch.nn.functional.elu(x, a), (0.5,), False),  # one step, which makes another tensor
        (lambda x: x / (1 + x.abs()), (), False),  # several, of which a program may round fewer
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_function_is_written_over_its_argument(
    f: Any, numbers: tuple[float, ...], one_step: bool, dtype: torch.dtype
) -> None:
    x = points(4, 6, dtype=dtype)[:, ::2]
    expected = f(x, *numbers)
    assert written_over(f, x, *numbers) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert (_formula._one_step_over(f, dtype, numbers) is not None) == one_step


def test_results_are_written_where_they_are_asked_to() -> None:
    run = program(lambda x: (torch.tanh(x) * 2, x.sigmoid()), ONE, frozenset())
    x, a, b = points(6), torch.empty(6, dtype=torch.float64), torch.empty(6, dtype=torch.float64)
    found = run.run(x, a, b)
    assert found[0] is a and found[1] is b
    torch.testing.assert_close(found, (torch.tanh(x) * 2, x.sigmoid()))


def test_a_result_that_is_not_needed_is_not_made() -> None:
    @formula("g (N), x (N) -> a like g, b like g")
    def both(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return g * torch.tanh(x), g * torch.exp(x)

    g, x = points(6), points(6)
    with torch.no_grad():
        a, b = both(g, x, needs=(True, False))
    assert b is None and torch.equal(a, g * torch.tanh(x))
    (run,) = both.programs.values()
    assert "exp" not in run.code


def test_sums_over_chunks_are_added_up_and_rows_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    @formula("x (N, D), w (D) -> y like x, total (D), norms (N, 1)")
    def three(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * w, x.sum(0), (x * x).sum(1, keepdim=True)

    x, w = points(9, 4), points(4)
    with torch.no_grad():
        found, half = three(x, w), three(x.bfloat16(), w.bfloat16())
    torch.testing.assert_close(found, (x * w, x.sum(0), (x * x).sum(1, keepdim=True)))
    assert [t.dtype for t in half] == [torch.bfloat16, torch.float32, torch.float32]


def test_an_argument_that_is_given_away_is_written_to_chunk_by_chunk() -> None:
    """Whether a program ends in its memory or elsewhere; all else is left alone."""

    @formula("x (N, D), w (N, 1) -> y like x, norms (N, 1)")
    def in_place(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.exp(x)
        return y * w, y.sum(1, keepdim=True)

    @formula("x (N, D), w (N, 1) -> y like x, norms (N, 1)")
    def elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(x, 1) * w, x.sum(1, keepdim=True)

    for f in (in_place, elsewhere):
        x, w = points(9, 4), points(9, 1)
        expected, kept = f.function(x, w), w.clone()
        with torch.no_grad():
            y, norms = f(x, w, over=0)
        assert y is x and torch.equal(w, kept)
        torch.testing.assert_close((y, norms), expected)


@pytest.mark.parametrize("bad", ["", "g (N)", "g N -> dx like g", "-> dx like g"])
def test_a_legend_that_is_not_understood(bad: str) -> None:
    with pytest.raises(ValueError, match="a legend is written"):
        read_legend(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [0.0, -0.0, 1.0, -0.3])
@pytest.mark.parametrize("count", [3, 400])
def test_where_not_chooses_by_bits(count: int, bound: float, dtype: torch.dtype) -> None:
    """-0 is 0, a NaN of either sign is no bound, and any g is 0 there."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([bound, 0.0, -0.0, nan, -nan, inf, 1.0, 2.0, -2.0, 1e-7] * count, dtype=dtype)
    g = torch.tensor([inf, nan, -inf, 1.5, 2.5, -1.0, inf, 3.0, nan, -0.0] * count, dtype=dtype)
    expected = torch.where(x != torch.tensor(bound, dtype=dtype), g, 0)
    assert _lowering.where_not(x, g, bound).equal(expected) or torch.equal(
        _lowering.where_not(x, g, bound).nan_to_num(7.0), expected.nan_to_num(7.0)
    )
    k = (torch.arange(len(g)) % 3 == 0).to(torch.uint8)
    torch.testing.assert_close(
        _lowering.where_not(k, g, 0), g.where(k.bool(), 0), equal_nan=True, rtol=0, atol=0
    )


def test_nobodys_mode_sees_a_program_being_made() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    @formula("x (N, D), w (D) -> y (N, 1)")
    def f(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).sum(1, keepdim=True)

    x, w = points(3, 2), points(2)
    with FlopCounterMode(display=False) as mode, torch.device("meta"), torch.no_grad():
        y = f(x, w)
    torch.testing.assert_close(y, f(x, w))
    assert mode.get_total_flops() <= 2 * 2 * 3 * 2


# ----- layouts -----


@pytest.mark.parametrize("theta, kept", [(17, "x"), (20, "x"), (20.0, "x"), (38, "y")])
def test_softplus_keeps_the_output_where_its_threshold_is_lost_in_rounding(theta: float, kept: str) -> None:
    """At the threshold itself the output is beyond it, and the slope was 1: wrong by 2e-9 in float64."""
    x = torch.tensor([float(theta)], dtype=torch.float64)
    torch.testing.assert_close(
        gradient(lambda z: F.softplus(z, threshold=theta), x), x.sigmoid(), rtol=1e-15, atol=0
    )
    for dtype, keeps in ((torch.float64, kept), (torch.float32, "y" if theta >= 20 else "x")):
        y = F.softplus(x.to(dtype).requires_grad_(), threshold=theta)
        name = "SoftplusBackward" if keeps == "y" else "SoftplusFromInputBackward"
        assert type(y.grad_fn).__name__ == name


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_rows_in_chunks_change_nothing(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = points(3, 4, 6), points(3, 4, 6) + 1
    in_chunks = gradient(lambda z: getattr(F, name)(z, dim), x, g)
    torch.testing.assert_close(in_chunks, gradient(lambda z: getattr(torch, name)(z, dim), x, g))


@pytest.mark.parametrize(
    "wanted",  # which of x, W and b require a gradient; of x alone, there are no W and b
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True,)],
)
@pytest.mark.parametrize("g", ["full", "expanded"])
def test_a_layer_norm_in_chunks_of_rows(g: str, wanted: tuple[bool, ...]) -> None:
    """dx chunk by chunk, dW and db added up over the chunks: as in one, for every subset."""
    arguments = (points(9, 4), points(4), points(4) + 1)
    leaves = [t.requires_grad_(w) for t, w in zip(arguments, wanted, strict=False)]
    arriving = points(9, 4) + 1 if g == "full" else torch.tensor(0.7, dtype=torch.float64).expand(9, 4)
    asked = [t for t in leaves if t.requires_grad]
    found, expected = (
        torch.autograd.grad(module.layer_norm(leaves[0], (4,), *leaves[1:]), asked, arriving)
        for module in (F, torch.nn.functional)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False), (True,)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_norm_in_chunks_of_channels(
    layout: str, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx, dW and db of a few channels at a time; whole where the numbers of a channel lie far apart."""
    split: list[int | None] = []
    pieces = _formula._pieces
    monkeypatch.setattr(_formula, "_pieces", lambda t, n, axis: split.append(axis) or pieces(t, n, axis))
    x, g = points(2, 7, 3, 2), points(2, 7, 3, 2) + 1
    if layout == "channels_last":
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    leaves = [t.requires_grad_(w) for t, w in zip((x, points(7), points(7) + 1), wanted, strict=False)]
    asked = [t for t in leaves if t.requires_grad]
    found, expected = (
        torch.autograd.grad(module.batch_norm(leaves[0], None, None, *leaves[1:], training=True), asked, g)
        for module in (F, torch.nn.functional)
    )
    torch.testing.assert_close(found, expected)
    assert (1 in split) == (layout == "contiguous")


@pytest.mark.parametrize("backend", _kernels.BACKENDS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded gradient", "offset"])
def test_layouts(backend: str, layout: str) -> None:
    x, g = points(2, 3, 4, 5), points(2, 3, 4, 5) + 1
    if layout == "channels_last":
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    if layout == "transposed":
        g = g.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "expanded gradient":
        g = torch.tensor(0.7, dtype=x.dtype).expand(x.shape)
    if layout == "offset":
        x, g = points(3, 3, 4, 5)[1:], points(4, 3, 4, 5)[2:]
    with manualprop.kernels(backend):
        found = gradient(F.silu, x, g)
    torch.testing.assert_close(found, gradient(torch.nn.functional.silu, x, g))
    assert found.stride() == x.stride()


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_kernels_give_what_eager_gives(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for count in (40, 63, 1000):
            x = points(count, dtype=dtype)
            eager = gradient(case, x)
            with manualprop.kernels("inductor"):
                torch.testing.assert_close(gradient(case, x), eager)


def test_another_size_is_no_recompilation() -> None:
    with manualprop.kernels("inductor"), torch._dynamo.config.patch(error_on_recompile=True):
        for count in (16, 31, 200, 5000):
            gradient(F.tanh, points(count))
            gradient(F.tanh, points(count, 3))


def test_transforms_and_the_compiler_run_the_plain_formula() -> None:
    x = points(20)
    expected = gradient(F.mish, x)
    made = len(_kernels._made)
    with manualprop.kernels("inductor"):
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(F.mish))(x), expected)
        torch.testing.assert_close(torch.func.jvp(F.mish, (x,), (torch.ones_like(x),))[1], expected)
        compiled = torch.compile(F.mish, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradient(compiled, x), expected)
        assert len(_kernels._made) == made
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(F.mish(z).sum(), z, create_graph=True)
        torch.testing.assert_close(first, expected)
        assert torch.autograd.grad(first.sum(), z)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", _kernels.BACKENDS)
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("softmax", [-1]),
        ("log_softmax", [-1]),
        ("layer_norm", [(5,)]),
        ("silu", []),
        ("selu", []),
        ("gelu", []),
    ],
)
def test_compiled_autograd_traces_a_large_backward(name: str, arguments: list[Any], backend: str) -> None:
    x, weights = points(4, 5), torch.arange(5, dtype=torch.float64)

    def function(z: Tensor) -> Tensor:
        y: Tensor = getattr(F, name)(z, *arguments) * weights  # a norm's gradients add up to 0 otherwise
        return y

    expected = gradient(function, x)
    torch._dynamo.reset()
    with manualprop.kernels(backend):
        torch.testing.assert_close(compiled_autograd(function, x), expected)


def test_the_switch_is_a_function_and_a_context() -> None:
    with manualprop.kernels("inductor"):
        assert _kernels._backend == "inductor"
        with manualprop.kernels("eager"):
            assert _kernels._backend == "eager"
        assert _kernels._backend == "inductor"
    assert _kernels._backend == "eager"
    manualprop.kernels("inductor")
    assert _kernels._backend == "inductor"
    with pytest.raises(ValueError, match=r"must be 'eager' or 'inductor'\. Got 'triton'"):
        manualprop.kernels("triton")
    assert _kernels._backend == "inductor"


def test_no_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def kernel(*_: Any) -> None:
            raise RuntimeError("No working C++ compiler found")

        return kernel

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(_kernels, "_made", {})
    with (
        manualprop.kernels("inductor"),
        pytest.raises(RuntimeError, match=r"C\+\+ compiler .*eager.* does without. RuntimeError: No working"),
    ):
        gradient(F.tanh, points(20))


def test_threads_share_the_kernels() -> None:
    x, found = points(50), {}
    expected = gradient(F.sigmoid, x)
    with manualprop.kernels("inductor"):
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: gradient(F.sigmoid, x)})) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(4):
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, b, marks=[pytest.mark.slow] * (b == "inductor" and name != "gelu"))
        for name in ACTIVATIONS
        for b in _kernels.BACKENDS
    ],
)
def test_value_and_gradient_at_once(name: str, backend: str) -> None:
    u, g = points(7, 9), points(7, 9) + 1
    manualprop.kernels(backend)
    with torch.no_grad():
        du = through(name, g, u)
        mine, product = activated_and_through(name, g, u)
    torch.testing.assert_close((mine, product), (ACTIVATIONS[name].f(u), du))


def test_what_writes_at_classes_is_no_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would compare each target with every class."""
    asked: list[str] = []

    def in_one_kernel(runner: Any, *_: Any) -> Any:
        asked.append(str(runner.legend.names))
        raise NotImplementedError

    monkeypatch.setattr(_formula, "LARGE", 8)
    monkeypatch.setattr(_kernels, "in_one_kernel", in_one_kernel)
    x, t = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, 2, 2, 1, 3])
    with manualprop.kernels("inductor"):
        for loss in (F.cross_entropy, F.nll_loss):
            (dx,) = torch.autograd.grad(loss(x, t), x)
            (expected,) = torch.autograd.grad(getattr(torch.nn.functional, loss.__name__)(x, t), x)
            torch.testing.assert_close(dx, expected)
        assert not asked
        with pytest.raises(NotImplementedError):
            F.silu(x).sum().backward()
    assert len(asked) == 1
