"""Large tensors run in blocks or by compiled kernels: the same formulas, the same values."""

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
from manualprop.functions import _kernels
from manualprop.functions.fused import ACTIVATIONS, activated_and_through, through

# The compiler loads parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

ONE_ROW = list({c.name: c for c in CASES if c.elementwise}.values())
COMPILED = [c for c in ONE_ROW if c.name in ("hardtanh", "selu", "softplus", "silu", "gelu")]


@pytest.fixture(autouse=True)
def large_is_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks and kernels from a few elements on, so that the tests are quick."""
    monkeypatch.setattr(_kernels, "LARGE", 8)
    monkeypatch.setattr(_kernels, "LARGE_COMPILED", 8)
    monkeypatch.setattr(_kernels, "SMALLEST", 8)
    monkeypatch.setattr(_kernels, "BLOCK", 5)
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
def test_blocks_change_nothing(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = points(7, 9, dtype=dtype), points(7, 9, dtype=dtype) + 1
    in_blocks = gradient(case, x, g)
    monkeypatch.setattr(_kernels, "LARGE", 1000)
    torch.testing.assert_close(in_blocks, gradient(case, x, g))


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
def test_rows_in_blocks_change_nothing(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = points(3, 4, 6), points(3, 4, 6) + 1
    in_blocks = gradient(lambda z: getattr(F, name)(z, dim), x, g)
    torch.testing.assert_close(in_blocks, gradient(lambda z: getattr(torch, name)(z, dim), x, g))


@pytest.mark.parametrize(
    "wanted",  # which of x, W and b require a gradient; of x alone, there are no W and b
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True), (True,)],
)
@pytest.mark.parametrize("g", ["full", "expanded"])
def test_a_layer_norm_in_blocks_of_rows(g: str, wanted: tuple[bool, ...]) -> None:
    """dx block by block, dW and db added up over the blocks: as in one, for every subset."""
    arguments = (points(9, 4), points(4), points(4) + 1)
    leaves = [t.requires_grad_(w) for t, w in zip(arguments, wanted, strict=False)]
    arriving = points(9, 4) + 1 if g == "full" else torch.tensor(0.7, dtype=torch.float64).expand(9, 4)
    asked = [t for t in leaves if t.requires_grad]
    found, expected = (
        torch.autograd.grad(module.layer_norm(leaves[0], (4,), *leaves[1:]), asked, arriving)
        for module in (F, torch.nn.functional)
    )
    assert _kernels.rows_of_a_block(arriving, leaves[0].detach()) < 9, "not in blocks"
    torch.testing.assert_close(found, expected)


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
        z = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(F.mish(z).sum(), z, create_graph=True)
        torch.testing.assert_close(first, expected)
        assert torch.autograd.grad(first.sum(), z)[0].isfinite().all()
    assert len(_kernels._made) <= made + 1  # the first backward of the double one, which records the product


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


@pytest.mark.parametrize("backend", _kernels.BACKENDS)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "mish", "relu", "silu", "tanh"])
def test_value_and_gradient_at_once(name: str, backend: str) -> None:
    u, g = points(7, 9), points(7, 9) + 1
    h = ACTIVATIONS[name].f(u)
    manualprop.kernels(backend)
    with torch.no_grad():
        du = through(name, g, u, h)
        mine, product = activated_and_through(name, g.clone(), u)
    torch.testing.assert_close((mine, product), (h, du))
