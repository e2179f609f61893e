"""Linear maps: the adjoint is the adjoint, the matrices are the map, the layouts are torch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, linear_map
from properties import gradients, upstream
from torch import Tensor

from manualprop import functional as F
from manualprop import functions as rules
from manualprop.functions._execution import _axes
from manualprop.functions._execution._nearest import Kernel

ROWS = [pytest.param(c, id=str(c)) for c in linear_map.CASES]


def linear_part(case: Case) -> Callable[[Tensor], Tensor]:
    """x -> A x, of a row y = A x + c."""
    x, *p = case.made(grad=False)
    constant = case(torch.zeros_like(x), *p)
    return lambda z: case(z, *p) - constant


@pytest.mark.quick
@pytest.mark.parametrize("case", ROWS)
def test_the_adjoint_is_the_adjoint(case: Case) -> None:
    """<A x, y> = <x, A^T y>, for the rule, and for its backward's backward, which is A again."""
    A = linear_part(case)
    x = case.made(grad=False)[0].requires_grad_()
    y = upstream(A(x)).requires_grad_()
    (adjoint,) = torch.autograd.grad(A(x), x, y, create_graph=True)
    torch.testing.assert_close((A(x) * y).sum(), (x * adjoint).sum(), rtol=1e-13, atol=1e-13)
    (again,) = torch.autograd.grad(adjoint, y, x.detach())
    torch.testing.assert_close(again, A(x), rtol=1e-13, atol=1e-13)


CHANNELS_LAST = {
    "reflect": lambda f, x: f.pad(x, (1, 2, 2, 1), "reflect"),
    "replicate": lambda f, x: f.pad(x, (1, 2, 2, 1), "replicate"),
    "circular": lambda f, x: f.pad(x, (1, 2, 2, 1), "circular"),
    "constant": lambda f, x: f.pad(x, (1, 2, 2, 1)),
    "average": lambda f, x: f.avg_pool2d(x, 3, 2, 1),
    "adaptive": lambda f, x: f.adaptive_avg_pool2d(x, (3, 2)),
    "average of three axes, unbatched": lambda f, x: f.avg_pool3d(x, 2, 1),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last_stays_channels_last(name: str) -> None:
    """The output has torch's strides, and the gradient those of the input, whatever the layout of dL/dy."""
    f = CHANNELS_LAST[name]
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    y, theirs = f(F, x), f(torch.nn.functional, x)
    assert y.stride() == theirs.stride()
    for g in (upstream(y), upstream(y).to(memory_format=torch.channels_last)):
        ours = gradients(lambda z: f(F, z), (x,), g)[0]
        torch.testing.assert_close(ours, gradients(lambda z: f(torch.nn.functional, z), (x,), g)[0])
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.quick
def test_an_infinite_gradient_reaches_its_own_window_alone() -> None:
    for f in (lambda z: F.avg_pool1d(z, 3, 2, 1), lambda z: F.adaptive_avg_pool1d(z, 3)):
        x = torch.ones(1, 7, dtype=torch.float64, requires_grad=True)
        g = torch.tensor([[0.0, torch.inf, 0.0, 0.0]]).double()[:, : f(x).shape[1]]
        (dx,) = torch.autograd.grad(f(x), x, g)
        assert not dx.isnan().any() and 0 < dx.isinf().sum() < 7


# {name: (rule, n, o, options)}: regular and irregular matrices, with columns without a term and rows that repeat
KERNEL = Kernel("cpu", torch.float64, torch.contiguous_format, 1, 1)
MATRICES: dict[str, tuple[Any, int, int, tuple[Any, ...]]] = {
    "average": (rules.AvgPool, 7, 3, (3, 2, 0, True, None)),
    "average without padding": (rules.AvgPool, 7, 4, (3, 2, 1, False, None)),
    "average of blocks": (rules.AvgPool, 8, 4, (2, 2, 0, True, None)),
    "average with gaps": (rules.AvgPool, 9, 3, (2, 4, 0, True, None)),
    "adaptive": (rules.AdaptiveAvgPool, 7, 3, ()),
    "adaptive to more": (rules.AdaptiveAvgPool, 3, 7, ()),
    "to one": (rules.AdaptiveAvgPool, 5, 1, ()),
    "reflection": (rules.ReflectionPad, 5, 10, (3, 2)),
    "replication": (rules.ReplicationPad, 4, 9, (3, 2)),
    "circle, cut": (rules.CircularPad, 6, 7, (3, -2)),
    "nearest": (rules.NearestInterpolation, 4, 8, (None, False, KERNEL)),
    "linear": (rules.LinearInterpolation, 4, 8, (None, False)),
    "linear of points": (rules.LinearInterpolation, 32, 50, (None, True)),
    "cubic": (rules.CubicInterpolation, 9, 5, (None, False)),
}


@pytest.mark.quick
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", MATRICES)
def test_every_way_to_apply_a_matrix_is_the_product(name: str, axis: int) -> None:
    """Slices, slices mixed, the whole product, gathering and adding by index, in both memory formats, on both axes."""
    rule, n, o, options = MATRICES[name]
    M = _axes.matrix(rule.row, n, o, options)
    whole = torch.zeros(o, n, dtype=torch.float64)
    for i in range(o):
        for j, weight in rule.row(i, n, o, *options).items():
            whole[i, j] = weight
    shape = [2, 3, o, 4] if axis == -2 else [2, 3, 4, o]
    g = upstream(torch.empty(shape, dtype=torch.float64))
    expected = g.movedim(axis, -1).matmul(whole).movedim(-1, axis)
    found = [_axes.gathered(M, g, axis), _axes.added_by_index(M, g, axis)]
    runs = _axes.runs_of(M)
    step = None if runs is None else _axes.common_step(runs)
    if runs is not None and step is not None:
        found.append(_axes.interleaved(M, runs, step, g, axis))
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = g.contiguous(memory_format=layout)
        found += [_axes.transposed(M, laid, axis, layout), _axes.multiplied(M, laid, axis, layout)]
        found += [] if runs is None else [_axes.sliced(M, runs, laid, axis, layout)]
    for dx in found:
        torch.testing.assert_close(dx, expected, rtol=1e-13, atol=1e-13)


LARGE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "blocks": lambda f, x: f.avg_pool2d(x, 2),
    "windows": lambda f, x: f.avg_pool2d(x, 3, 2, 1),
    "to one": lambda f, x: f.adaptive_avg_pool2d(x, 1),
    "points": lambda f, x: f.interpolate(x, size=(40, 45), mode="bilinear", align_corners=True),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", LARGE)
def test_large_tensors_take_the_same_map(name: str) -> None:
    """In float64 torch's gradient, an infinity beside a number too; in half precision rounded once."""
    x = torch.linspace(-2, 2, 2 * 3 * 33 * 36, dtype=torch.float64).view(2, 3, 33, 36).requires_grad_()
    g = upstream(LARGE[name](F, x))
    ours, torchs = (gradients(lambda z, m=m: LARGE[name](m, z), (x,), g)[0] for m in (F, torch.nn.functional))
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    half = x.detach().bfloat16().requires_grad_()
    rounded = gradients(lambda z: LARGE[name](F, z), (half,), g.bfloat16())[0]
    exact = gradients(lambda z: LARGE[name](F, z), (x,), g.bfloat16().double())[0]
    assert ((rounded.double() - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps).all()
    g[0, 0, -1, -1] = torch.inf
    ours, torchs = (gradients(lambda z, m=m: LARGE[name](m, z), (x,), g)[0] for m in (F, torch.nn.functional))
    known = torchs.isfinite()
    torch.testing.assert_close(ours[known], torchs[known], rtol=1e-12, atol=1e-12)
    assert ours.isinf().any() and not ours.isnan().any()


REPEATED = {
    "channels last": ((2, 64, 8, 4), (2, 3), torch.channels_last),
    "few channels last": ((8, 8, 16, 4), (2, 2), torch.channels_last),
    "rows": ((2, 64, 8, 4), (3, 1), torch.contiguous_format),
    "three axes": ((2, 32, 2, 8, 4), (2, 1, 4), torch.contiguous_format),
    "three axes, channels last": ((2, 32, 2, 8, 4), (2, 1, 4), torch.channels_last_3d),
    "far": ((2, 64, 8, 4), (2, 5), torch.contiguous_format),
}


@pytest.mark.quick
@pytest.mark.parametrize("most", [0, _axes.CACHED], ids=["in one copy", "by parts"])
@pytest.mark.parametrize("name", REPEATED)
def test_every_way_to_repeat(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinity and NaN too, from a gradient of any layout."""
    shape, times, layout = REPEATED[name]
    monkeypatch.setattr(_axes, "CACHED", most)
    g = upstream(torch.empty(shape))
    g.view(-1)[:2] = torch.tensor([torch.inf, torch.nan])
    expected = g * 0.3
    for axis, k in zip(range(2, g.dim()), times, strict=True):
        expected = expected.repeat_interleave(k, axis)
    for laid in (g, g.contiguous(memory_format=layout), g.mT.contiguous().mT):
        with torch.no_grad():
            dx = _axes.repeated_along(times, laid, 0.3, layout)
        torch.testing.assert_close(dx, expected, rtol=0, atol=0, equal_nan=True)
        assert dx.is_contiguous(memory_format=layout)


@pytest.mark.quick
@pytest.mark.parametrize(("n", "o", "exact"), [(6, 74, False), (2, 41, True)])
def test_a_gradient_goes_to_the_element_that_was_copied(n: int, o: int, exact: bool) -> None:
    """Where i n / o is an integer but for rounding.  torch's backward rounds in another way than its forward."""
    mode = "nearest-exact" if exact else "nearest"
    x = torch.arange(n, dtype=torch.float64).view(1, 1, n).requires_grad_()
    for f in (F, torch.nn.functional):
        y = f.interpolate(x, size=o, mode=mode)
        (dx,) = torch.autograd.grad(y.sum(), x)
        copies = torch.stack([(y == j).sum() for j in range(n)]).double()
        assert torch.equal(dx.flatten(), copies) == (f is F)


def test_an_empty_batch_has_an_empty_gradient_of_its_shape() -> None:
    x = torch.ones(0, 4, 2, 2, requires_grad=True)
    for y in (F.pixel_shuffle(x, 2), F.avg_pool2d(x, 2), F.interpolate(x, size=5, mode="bilinear")):
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_the_mean_of_nothing_is_differentiable_twice() -> None:
    """The mean is NaN, as torch's; its gradient has no elements, and does not depend on the one that arrived."""
    x = torch.ones(1, 2, 3, 0, requires_grad=True)
    y = F.adaptive_avg_pool2d(x, 1)
    g = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(torch.autograd.grad(dx.sum(), g)[0], torch.zeros(1, 2, 1, 1))


@pytest.mark.parametrize("axes", [2, 3])
def test_one_mean_of_an_input_without_channels(axes: int) -> None:
    """torch averages; for more numbers it raises."""
    x = torch.arange(4.0**axes).view([4] * axes).requires_grad_()
    found = []
    for home in (F, torch.nn.functional):
        y = getattr(home, f"adaptive_avg_pool{axes}d")(x, 1)
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*found)


def test_circular_padding_of_too_many_axes_is_refused_as_by_torch() -> None:
    for home in (F, torch.nn.functional):
        with pytest.raises(NotImplementedError, match="Padding size 4 is not supported for 2D input"):
            home.pad(torch.ones(2, 2), (-1, 2, 0, 0), "circular")


def test_complex_numbers_are_reflected() -> None:
    x = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    ours, torchs = (
        gradients(lambda z, f=f: f.pad(z, (2, 1), "reflect"), (x,)) for f in (F, torch.nn.functional)
    )
    torch.testing.assert_close(ours, torchs)


def test_a_circle_is_not_padded_by_more_than_the_cut_left() -> None:
    """torch's output then has elements that nothing wrote."""
    with pytest.raises(
        RuntimeError, match=r"pad: circular padding must add at most .* Got \(2, -1\) for 2 elements"
    ):
        F.pad(torch.ones(2, 2), (2, -1), "circular")


MISUSES: dict[str, tuple[Any, ...]] = {
    "as many sizes as axes": ((2, 4, 5, 5), (1, 2, 3, 4)),
    "more sizes than pooled axes": ((2, 4, 5, 5), (1, 2, 3)),
    "text": ((2, 4, 5, 5), "3"),
    "no channels": ((5, 5), 2),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_of_adaptive_averages_is_torchs(name: str) -> None:
    shape, size = MISUSES[name]
    with pytest.raises(Exception) as torchs:
        torch.nn.functional.adaptive_avg_pool2d(torch.ones(shape), size)
    with pytest.raises(torchs.type):
        F.adaptive_avg_pool2d(torch.ones(shape), size)


@pytest.mark.slow
def test_one_program_for_sizes_and_options_that_vary() -> None:
    def f(x: Tensor, k: int, p: int) -> Tensor:
        y, places = F.max_pool2d(x, k, return_indices=True)
        y = F.interpolate(F.max_unpool2d(y, places, k), scale_factor=2.0)
        return F.lp_pool2d(F.avg_pool2d(y, k), p, k)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    found = [gradients(lambda z, g=g: g(z, 2, 2), (x,)) for g in (f, compiled)]
    torch.testing.assert_close(*found)
