"""Convolutions: the family against its definition, fast forms against the plain one, layers against torch's."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from cases import CASES, real
from properties import gradients, upstream
from routes import FORWARD, REVERSE, SECOND, Route, nested_forward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import manualprop
from manualprop import functional as F
from manualprop import functions as rules
from manualprop import nn
from manualprop.functions._execution import _convolution as run
from manualprop.functions._execution import _correlation

ROWS = [case for case in CASES if case.name.startswith("conv")]

# ----- the definition: sums over indices -----

# (N, channels of x in a group, channels of y in a group, G, X, Q, K, s, p, d): sizes that fit, and too long ones
GEOMETRIES = {
    "fits": (2, 2, 1, 1, (5,), (4,), (2,), (1,), (0,), (1,)),
    "groups": (2, 2, 2, 3, (6,), (3,), (2,), (2,), (1,), (3,)),
    "depthwise": (2, 1, 2, 3, (4, 3), (4, 2), (3, 2), (1, 1), (1, 0), (1, 1)),
    "two axes": (1, 2, 3, 2, (4, 4), (2, 3), (3, 2), (2, 1), (1, 0), (1, 1)),
    "three axes": (1, 2, 2, 1, (3, 3, 2), (3, 2, 2), (2, 2, 1), (1, 1, 1), (1, 0, 0), (2, 1, 1)),
    "x ends early": (2, 2, 2, 1, (5,), (5,), (2,), (1,), (0,), (1,)),
    "x is longer": (2, 1, 2, 1, (6,), (3,), (2,), (1,), (0,), (2,)),
    "one position": (2, 3, 2, 1, (3, 2), (3, 2), (1, 1), (1, 1), (0, 0), (1, 1)),
    "one position, strides": (2, 3, 2, 1, (5, 4), (3, 2), (1, 1), (2, 2), (0, 0), (1, 1)),
    "only padding": (2, 2, 1, 1, (1,), (1,), (2,), (7,), (3,), (1,)),
    "one position, padded": (1, 2, 2, 1, (2,), (4,), (1,), (1,), (1,), (1,)),
}


def factors(geometry: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and y."""
    N, C, O, G, X, Q, K, *_ = geometry
    shapes = ((N, G * C, *X), (G * O, C, *K), (N, G * O, *Q))
    made = [real(*shape, grad=False, seed=i) for i, shape in enumerate(shapes)]
    if dtype.is_complex:
        made = [torch.complex(t, t.flip(0).sin()) for t in made]
    x, W, y = (t.to(dtype) for t in made)
    return x, W, y


def by_indices(geometry: Any, x: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The transposed convolution, the correlation and the convolution, as sums over all n, o, c, q and k."""
    N, C, O, G, X, Q, K, s, p, d = geometry
    dx, dW, dy = torch.zeros_like(x), torch.zeros_like(W), torch.zeros_like(y)
    ranges = [
        range(N),
        range(G * O),
        range(C),
        itertools.product(*map(range, Q)),
        itertools.product(*map(range, K)),
    ]
    for n, o, c, q, k in itertools.product(*ranges):
        i = tuple(s * q + d * k - p for s, q, d, k, p in zip(s, q, d, k, p, strict=True))
        if all(0 <= at < length for at, length in zip(i, X, strict=True)):
            at_x, at_W, at_y = (n, o // O * C + c, *i), (o, c, *k), (n, o, *q)
            dx[at_x] += y[at_y] * W[at_W]
            dW[at_W] += y[at_y] * x[at_x]
            dy[at_y] += W[at_W] * x[at_x]
    return dx, dW, dy


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_three_maps_are_the_sums_of_the_derivation(name: str) -> None:
    geometry = GEOMETRIES[name]
    *_, G, X, Q, K, s, p, d = geometry
    x, W, y = factors(geometry)
    dx, dW, dy = by_indices(geometry, x, W, y)
    found = [
        (rules.Convolution.apply(x, W, None, s, p, d, G, Q), dy),
        (rules.TransposedConvolution.apply(y, W, None, s, p, d, G, X), dx),
        (run.input_gradient(y, W, None, s, p, d, G, X), dx),
        (rules.Correlation.apply(y, x, s, p, d, G, K), dW),
        (rules.Correlation.as_convolution(y, x, s, p, d, G, K), dW),
        (_correlation.correlate(y, x, s, p, d, G, K), dW),
        (_correlation.by_columns(y, x, s, p, d, G, K), dW),
    ]
    if G == 1:
        found += [
            (form(y, x, s, p, d, G, K), dW) for form in (_correlation.by_examples, _correlation.by_rows)
        ]
    if G == 1 and max(s) == 1 and Q == X:
        found.append((_correlation.by_shifts(y, x, s, p, d, G, K), dW))
    for mine, exact in found:
        torch.testing.assert_close(mine, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_fast_correlation_is_the_plain_one(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and an example at a time; float32 with oneDNN in both orders, and without; half precision is rounded once."""
    *_, G, _X, _Q, K, s, p, d = geometry = GEOMETRIES[name]
    x, _, y = factors(geometry, dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = rules.Correlation.as_convolution(y.to(wide), x.to(wide), s, p, d, G, K)
    within = {
        "rtol": torch.finfo(dtype).eps,
        "atol": 8 * torch.finfo(torch.float32).eps * exact.abs().max().item(),
    }
    products = (_correlation.product_of_rows, 2**17), (_correlation.product_of_rows, 0), (None, 0)
    for columns, (product, large) in itertools.product((2**20, 1), products):
        monkeypatch.setattr(_correlation, "COLUMNS", columns)
        monkeypatch.setattr(_correlation, "LARGE_RESULT", large)
        monkeypatch.setattr(_correlation, "WIDE", 1)
        monkeypatch.setattr(_correlation, "product_of_rows", product)
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout is torch.channels_last and x.dim() == 4:
                x, y = (t.contiguous(memory_format=layout) for t in (x, y))
            found = [_correlation.correlate(y, x, s, p, d, G, K)]
            if G == 1 and dtype == torch.float32:
                found += [
                    form(y, x, s, p, d, G, K) for form in (_correlation.by_rows, _correlation.by_columns)
                ]
            for W in found:
                assert W.dtype == dtype and W.is_contiguous()
                torch.testing.assert_close(W.to(wide), exact, **within)


# x, channels of y, options of conv2d or conv3d with a kernel of three
FORMS: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
    ("by_examples", (2, 3, 4, 4), 5, {"padding": 1}),
    ("by_examples", (2, 32, 4, 4), 8, {"padding": 1, "stride": 2}),
    ("by_examples", (2, 3, 4, 2, 2), 4, {"padding": 1}),
    ("by_rows", (3, 8, 11, 14), 6, {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}),
    ("by_rows", (2, 8, 6, 9, 10), 4, {"padding": 1}),
    ("by_shifts", (3, 16, 44, 32), 8, {"padding": 1}),
    ("by_shifts", (2, 16, 50, 45), 8, {"padding": (4, 1), "dilation": (4, 1)}),
    ("by_shifts", (2, 16, 2200), 5, {"padding": 2, "dilation": 2}),
    ("by_shifts", (2, 16, 12, 13, 14), 4, {"padding": 1}),
    ("by_columns", (2, 4, 11, 10), 6, {"padding": 1}),
    ("by_columns", (2, 8, 11, 10), 32, {"padding": 1}),
    ("by_columns", (2, 8, 12, 30), 6, {"stride": 3}),
    ("by_channels", (2, 1, 11, 10), 3, {}),
]


@pytest.mark.parametrize("columns", [2**20, 2**9])
@pytest.mark.parametrize(("form", "shape", "O", "options"), FORMS)
def test_each_layer_has_its_form(
    form: str,
    shape: tuple[int, ...],
    O: int,
    options: dict[str, Any],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """dW in float32, whole and band by band, against torch's in float64."""
    monkeypatch.setattr(_correlation, "COLUMNS", columns)
    chosen: list[Any] = []
    choose = _correlation.form_for
    monkeypatch.setattr(_correlation, "form_for", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    name, K = f"conv{len(shape) - 2}d", [3] * (len(shape) - 2)
    x, W = real(*shape, grad=False), real(O, shape[1], *K, seed=1)
    y = getattr(torch.nn.functional, name)(x, W, **options)
    g = upstream(y)
    (exact,) = torch.autograd.grad(y, W, g)
    W = W.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(getattr(F, name)(x.float(), W, **options), W, g.float())
    assert [f.__name__ for f in chosen] == [form]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


# ----- every order is ours -----


class Counted(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return sum(name in one for one in self.names)


ROUTES: dict[str, Route] = REVERSE | FORWARD | SECOND | {"nested forward": nested_forward}
IMAGE = real(2, 2, 5, grad=False)
KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "convolution": lambda F, x: F.conv1d(x, x.reshape(3, 2, 2), None, 1, 1, groups=1),
    "transposed": lambda F, x: F.conv_transpose1d(x, x.reshape(2, 3, 2), None, 2, 1, 1),
    "weight": lambda F, x: F.conv1d(IMAGE.to(x.dtype), x.reshape(3, 2, 2)),
}
POINT = real(2, 2, 3, grad=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_atens_backward_is_never_called(route: str, kind: str) -> None:
    def f(x: Tensor) -> Tensor:
        return KINDS[kind](F, x).sin()

    with Counted() as counted:
        ROUTES[route](f, POINT)
    assert counted.of("convolution_backward") == 0 < counted.of("aten.convolution.")


@pytest.mark.parametrize("route", ["backward", "vmap(grad)", "double backward", "hessian"])
def test_the_count_sees_atens_backward(route: str) -> None:
    with Counted() as counted:
        ROUTES[route](lambda x: KINDS["convolution"](torch.nn.functional, x).sin(), POINT)
    assert counted.of("convolution_backward") > 0


def compiled_operations(f: Callable[[Tensor], Tensor], x: Tensor) -> list[str]:
    """The names of the operations of forward and backward graph."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    REVERSE["backward"](compiled, x)
    return found


def test_a_compiled_graph_is_ours_and_does_not_grow_with_the_batch() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    few, many = (compiled_operations(lambda x: layer(x).sin(), real(N, 2, 5, 5)) for N in (2, 64))
    assert few == many and len(few) < 15
    assert "manualprop.correlate.default" in few and not any("convolution_backward" in name for name in few)


def test_the_operation_of_compiled_code_is_the_eager_one() -> None:
    x = real(2, 2, 5, 5)
    found = []
    for layer in (nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(2, 3, 1)):
        layer.double()
        torch._dynamo.reset()
        for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            y = f(x)
            found.append(torch.autograd.grad(y, [x, *layer.parameters()], upstream(y)))
        torch.testing.assert_close(found[-1], found[-2], rtol=1e-12, atol=1e-12)


def test_the_first_layer_computes_no_dx() -> None:
    layer = manualprop.swap(torch.nn.Conv2d(2, 3, 3).double()).model  # in float64 dW is always a product
    found = []
    for needed in (False, True):
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=needed)
        y = layer(x)
        with Counted() as counted:
            y.sum().backward()
        found.append(counted.of("aten.convolution."))
    assert found == [0, 1]  # the transposed convolution


# ----- as torch's -----


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_padding_modes_are_torchs(axes: int, mode: str) -> None:
    found = []
    for home in (nn, torch.nn):
        torch.manual_seed(0)
        layer = getattr(home, f"Conv{axes}d")(2, 3, 2, padding=1, stride=2, padding_mode=mode).double()
        x = real(2, 2, *[4] * axes)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream(y))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_goes_through(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients have torch's strides, where torch's are channels-last too."""
    found = []
    for home in (F, torch.nn.functional):
        x, W = (real(4, 4, 5, 3, seed=i).to(dtype).detach() for i in range(2))
        x, W = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, W[:, :, :3]))
        y = getattr(home, name)(x, W)
        found.append((y, *torch.autograd.grad(y, (x, W), torch.ones_like(y))))
    for ours, torchs in list(zip(*found, strict=True))[:2]:  # autograd copies dW into the weight's layout
        assert ours.stride() == torchs.stride()
    torch.testing.assert_close(*found)


def test_an_output_without_positions_gives_zeros() -> None:
    """Half precision has such transposed convolutions; torch's convolution, their gradient, refuses them."""
    y, W = real(2, 3, 2).bfloat16(), real(3, 2, 1).bfloat16()
    x = F.conv_transpose1d(y, W, stride=3, padding=2)
    assert x.shape == (2, 2, 0)
    assert not any(d.any() for d in torch.autograd.grad(x.sum(), (y, W)))


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_an_axis_of_length_1_may_have_any_stride(name: str) -> None:
    """Of a grouped kernel in channels-last: oneDNN misreads it, torch's own function too (2.13)."""
    x, W = real(2, 4, 4, 5, grad=False).float(), real(4, 2, 3, 1, grad=False).float()
    x = x.contiguous(memory_format=torch.channels_last)
    odd = torch.empty_strided(W.shape, (6, 1, 2, 1)).copy_(W)
    f = getattr(F, name)
    torch.testing.assert_close(f(x, odd, groups=2), f(x, W, groups=2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_output_size(axes: int) -> None:
    found = []
    for home in (nn, torch.nn):
        torch.manual_seed(0)
        layer = getattr(home, f"ConvTranspose{axes}d")(2, 3, 3, stride=2, padding=1).double()
        x = real(2, 2, *[3] * axes)
        y = layer(x, output_size=[6] * axes)
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream(y))])
        with pytest.raises(ValueError, match="requested an output size of"):
            layer(x, output_size=[8] * axes)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


EMPTY: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "no examples": ("conv2d", ((0, 2, 4, 4), (3, 2, 2, 2))),
    "no examples, transposed": ("conv_transpose2d", ((0, 2, 4, 4), (2, 3, 2, 2))),
    "no positions": ("conv1d", ((2, 2, 0), (3, 2, 2))),
    "no outputs": ("conv1d", ((2, 2, 4), (0, 2, 2))),
    "no channels, transposed": ("conv_transpose1d", ((2, 0, 4), (0, 3, 2))),
}


@pytest.mark.parametrize("what", EMPTY)
def test_nothing_is_torchs(what: str) -> None:
    """Value and gradients, or the type of the error."""
    name, shapes = EMPTY[what]
    found: list[Any] = []
    for home in (F, torch.nn.functional):
        arguments = tuple(torch.ones(shape, requires_grad=True) for shape in shapes)
        try:
            found.append([getattr(home, name)(*arguments), *gradients(getattr(home, name), arguments)])
        except Exception as error:
            found.append(type(error))
    if isinstance(found[1], type):
        assert found[0] is found[1]
    else:
        torch.testing.assert_close(*found)


X1, W1, V1 = torch.ones(2, 4, 5), torch.ones(6, 4, 3), torch.ones(4, 3, 2)
MISUSES: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("conv1d", (torch.ones(2, 2, 4, 5), W1), {}, r"conv1d: input must be 2D \(unbatched\) or 3D .* Got \[2, 2, 4, 5\]"),
    ("conv1d", (X1, torch.ones(6, 4)), {}, r"conv1d: weight must have 3 axes, .* Got \[6, 4\]"),
    ("conv1d", (X1, W1), {"padding": "sane"}, r"padding must be numbers, 'valid' or 'same'. Got 'sane'"),
    ("conv1d", (X1, W1), {"padding": "same", "stride": 2}, r"padding='same' must have stride 1. Got \[2\]"),
    ("conv1d", (X1, W1), {"stride": (1, 2)}, r"stride must be one number, or 1. Got \[1, 2\]"),
    ("conv1d", (X1, W1), {"stride": 0}, "non-positive stride"),
    ("conv1d", (X1, W1), {"dilation": 0}, "non-positive dilation"),
    ("conv1d", (X1, W1), {"padding": -1}, "negative padding"),
    ("conv1d", (X1, W1), {"groups": 3}, "groups"),
    ("conv1d", (X1, W1), {"groups": 0}, "groups"),
    ("conv1d", (X1, W1), {"stride": 1.5}, "stride must be whole numbers. Got 1.5"),
    ("conv1d", (X1, W1), {"dilation": [1.0, 2.0]}, r"dilation must be whole numbers. Got \[1.0, 2.0\]"),
    ("conv1d", (X1, W1), {"groups": "1"}, "groups must be a whole number. Got '1'"),
    ("conv_transpose1d", (X1, V1), {"stride": (2.0,)}, r"stride must be whole numbers. Got \(2.0,\)"),
    ("conv1d", (X1, W1.double()), {}, "type"),
    ("conv1d", (X1[:, :3], W1), {}, "channels"),
    ("conv1d", (X1[..., :2], W1), {}, "Kernel size can't be greater"),
    ("conv_transpose1d", (X1, V1), {"output_padding": -1}, "output_padding must not be negative. Got -1"),
    ("conv_transpose1d", (X1, V1), {"output_padding": 1}, "output padding must be smaller"),
    ("conv_transpose1d", (X1, V1), {"stride": "2"}, "str"),
    ("conv_transpose1d", (X1, V1), {"padding": "same"}, "padding must be numbers, not a str. Got 'same'"),
    ("conv1d", (X1, None), {}, "conv1d: weight must be a Tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "kwargs", "text"), MISUSES)
def test_misuse(name: str, arguments: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(Exception) as torchs:
        getattr(torch.nn.functional, name)(*arguments, **kwargs)
    with pytest.raises(torchs.type, match=text):
        getattr(F, name)(*arguments, **kwargs)


@pytest.mark.parametrize("number", [numpy.int64, torch.tensor])
def test_whole_numbers_of_other_libraries(number: Any) -> None:
    options = {"stride": number(2), "padding": number(1), "dilation": (number(1), 1), "groups": number(2)}
    torch.testing.assert_close(
        F.conv2d(torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 2), **options),
        F.conv2d(torch.ones(2, 4, 5, 6), torch.ones(6, 2, 3, 2), None, 2, 1, 1, 2),
    )


def test_a_kernel_without_channels_is_refused() -> None:
    """torch's convolution then returns no output channels, whatever the weight says."""
    x, W = torch.ones(2, 0, 4), torch.ones(3, 0, 2)
    assert torch.nn.functional.conv1d(x, W).shape == (2, 0, 3)
    with pytest.raises(RuntimeError, match=r"conv1d: weight must have channels. Got \[3, 0, 2\]"):
        F.conv1d(x, W)


def test_on_the_meta_device() -> None:
    layer = nn.Conv2d(2, 3, 3, device="meta")
    x = torch.empty(4, 2, 5, 5, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (3, 2, 3, 3)
    assert x.grad is not None and x.grad.is_meta
