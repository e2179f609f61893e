"""What the table can not say of the pools: ties, NaN, memory formats, windows that chose one number, misuse."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as torch_F
from properties import gradients, strided, upstream
from torch import Tensor

import manualprop
from manualprop import functional as F
from manualprop import nn
from manualprop.functions._execution import _places

D = torch.float64
SIDES = {1: (9,), 2: (5, 6), 3: (4, 5, 3)}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def both(
    name: str, *arguments: Any, **options: Any
) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """Our function and torch's, of x alone."""

    def of(home: Any) -> Callable[[Tensor], Any]:
        return lambda x: getattr(home, name)(x, *arguments, **options)

    return of(F), of(torch_F)


def special(*shape: int, dtype: torch.dtype = D) -> Tensor:
    """Ties, zeros of both signs, infinities and NaN."""
    numbers = torch.tensor(
        [0.0, -0.0, 1, 1, -1, 2, 2, torch.nan, torch.inf, -torch.inf, -torch.inf], dtype=dtype
    )
    return numbers[torch.randint(len(numbers), shape, generator=torch.Generator().manual_seed(4))]


def assert_alike(ours: Callable[..., Any], torchs: Callable[..., Any], x: Tensor) -> None:
    """Value, places, gradient and memory formats."""
    leaf = x.detach().requires_grad_()
    mine, theirs = ours(leaf), torchs(leaf)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit() & (a == 0), b.signbit() & (b == 0)) and formats(a) == formats(b)
    g = upstream(mine[0])
    dx, expected = (torch.autograd.grad(y, leaf, g)[0] for y in (mine[0], theirs[0]))
    torch.testing.assert_close(dx, expected)
    assert formats(dx) == formats(expected)


def formats(x: Tensor) -> tuple[bool, ...]:
    """Which memory formats it is in; with one channel in both."""
    last = FORMATS.get(x.dim() - 2)
    return x.is_contiguous(), last is not None and x.is_contiguous(memory_format=last)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_ties_and_nan_are_torchs(axes: int) -> None:
    x = special(2, 3, *SIDES[axes])
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1}):
        assert_alike(*both(f"max_pool{axes}d", return_indices=True, **options), x)
    assert_alike(*both(f"adaptive_max_pool{axes}d", 2, return_indices=True), x)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays_channels_last(axes: int, dtype: torch.dtype) -> None:
    """In, out and back; windows apart and windows that overlap."""
    for x in (special(2, 3, *SIDES[axes], dtype=dtype), special(1, 1, *SIDES[axes], dtype=dtype)):
        for stride in (1, 2):
            pools = both(f"max_pool{axes}d", 2, stride, return_indices=True)
            assert_alike(*pools, x.nan_to_num(0, 5, -5).to(memory_format=FORMATS[axes]))


def test_the_copy_to_channels_last_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs take another kernel of ATen's: the same numbers, places and memory formats."""
    taken = []
    pays = _places._pays_in_channels_last
    monkeypatch.setattr(_places, "MANY_NUMBERS", 1)
    monkeypatch.setattr(_places, "_pays_in_channels_last", lambda x: taken.append(pays(x)) or taken[-1])
    for options in itertools.product((2, 3), (1, 2), (0, 1), (1, 2), (False, True)):
        for x in (special(2, 11, 8, 7), torch.full((1, 8, 6, 6), -torch.inf, dtype=D)):
            assert_alike(*both("max_pool2d", *options, return_indices=True), x)
    assert len(taken) == 64 and all(taken)


def test_windows_that_chose_one_number_add_their_gradients() -> None:
    x = torch.tensor([[0.0, 5, 1, 2]], dtype=D, requires_grad=True)
    y = F.max_pool1d(x, 3, 1)
    assert torch.autograd.grad(y, x, torch.tensor([[10.0, 1]], dtype=D))[0].tolist() == [[0, 11, 0, 0]]


def test_half_precision_adds_in_float32() -> None:
    """256 windows choose one number: in bfloat16 a sum of ones stops at 256, here of 1 + 2^-7 it is exact."""
    x = torch.zeros(1, 1, 511, dtype=torch.bfloat16)
    x[..., 255] = 1
    x.requires_grad_()
    y = F.max_pool1d(x, 256, 1)
    g = torch.full_like(y, 1 + 2**-7)
    assert torch.autograd.grad(y, x, g)[0].max().item() == 256 * (1 + 2**-7)


@pytest.mark.parametrize("layout", [strided, lambda g: g[..., :1].expand(g.shape)])
def test_any_gradient_of_a_channels_last_pool(layout: Callable[[Tensor], Tensor]) -> None:
    x = special(2, 3, 5, 6).nan_to_num(0, 5, -5).to(memory_format=torch.channels_last).requires_grad_()
    ours, torchs = both("max_pool2d", 3, 2)
    g = layout(upstream(ours(x)))
    torch.testing.assert_close(gradients(ours, (x,), g), gradients(torchs, (x,), g))


def test_places_carry_no_gradient_and_x_is_not_kept() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y, places = F.max_pool2d(x, 2, return_indices=True)
    assert y.requires_grad and not places.requires_grad and places.dtype == torch.int64
    layers = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.MaxPool2d(2))
    torchs = manualprop.receipt(layers, x.detach()).kept
    ours = manualprop.receipt(manualprop.swap(layers, only=torch.nn.MaxPool2d).model, x.detach()).kept
    assert torchs - ours == x.nbytes  # what the first layer returns


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_empty_batch(axes: int) -> None:
    x = torch.randn(0, 3, *SIDES[axes], dtype=D, requires_grad=True)
    for ours, torchs in (both(f"max_pool{axes}d", 2), both(f"adaptive_max_pool{axes}d", 2)):
        assert ours(x).shape == torchs(x).shape
        (dx,) = torch.autograd.grad(ours(x).sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_unpooling_undoes_pooling(axes: int) -> None:
    x = torch.rand(2, 3, *[6] * axes, dtype=D) + 1
    y, places = getattr(nn, f"MaxPool{axes}d")(2, return_indices=True)(x)
    back = getattr(nn, f"MaxUnpool{axes}d")(2)(y, places, x.shape)
    assert torch.equal(getattr(F, f"max_pool{axes}d")(back, 2), y) and int((back != 0).sum()) == y.numel()


def test_a_place_that_comes_twice_is_torchs() -> None:
    """The last number stays, and the gradient reaches both, as in torch."""
    y = torch.tensor([[[1.0, 2, 3]]], dtype=D, requires_grad=True)
    places = torch.tensor([[[4, 4, 1]]])
    found = []
    for home in (F, torch_F):
        x = home.max_unpool1d(y, places, 2)
        found.append((x, *torch.autograd.grad(x, y, upstream(x))))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own under vmap
def test_unpooling_under_vmap_is_a_formula() -> None:
    y, places = F.max_pool2d(torch.randn(4, 2, 3, 6, 6, dtype=D).flatten(0, 1), 2, return_indices=True)
    y, places = y.unflatten(0, (4, 2)), places.unflatten(0, (4, 2))
    mapped = torch.func.vmap(lambda y, i: F.max_unpool2d(y, i, 2))(y, places)
    for row, one, i in zip(mapped, y, places, strict=True):
        assert torch.equal(row, torch_F.max_unpool2d(one, i, 2))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_a_norm_of_zeros_has_the_gradient_zero(p: float) -> None:
    x = torch.tensor([[0.0, 0, 1, 0]], dtype=D, requires_grad=True)
    ours, torchs = (gradients(f, (x,)) for f in both("lp_pool1d", p, 2))
    torch.testing.assert_close(ours, torchs)
    assert ours[0][0, :2].tolist() == [0, 0]
    second = torch.autograd.grad(F.lp_pool1d(x, p, 2).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(second.sum(), x)[0].isfinite().all() or p < 2


def test_a_negative_power_of_infinities_has_the_gradient_zero() -> None:
    """There the sum of x^p is 0 too."""
    x = torch.tensor([[torch.inf, torch.inf, 1, 2]], dtype=D, requires_grad=True)
    torch.testing.assert_close(*(gradients(f, (x,)) for f in both("lp_pool1d", -2.0, 2)))


def test_a_norm_of_whole_numbers_is_no_whole_number() -> None:
    x = torch.tensor([[1, 2, 3, 4]])
    ours, torchs = both("lp_pool1d", 2.0, 2)
    torch.testing.assert_close(ours(x), torchs(x))


@pytest.mark.parametrize("p", [torch.inf, -torch.inf])
def test_an_infinite_norm(p: float) -> None:
    x = torch.linspace(-3.1, 2.9, 24, dtype=D).reshape(2, 12).requires_grad_()
    ours, torchs = both("lp_pool1d", p, 3, 2, True)
    assert torch.equal(ours(x), torchs(x))
    torch.testing.assert_close(gradients(ours, (x,)), gradients(torchs, (x,)))


def test_the_same_seed_draws_the_same_windows() -> None:
    x = torch.randn(2, 3, 9, 9, dtype=D)
    for options in ({"output_size": 4}, {"output_ratio": (0.5, 0.4)}):
        drawn = []
        for home in (nn, torch.nn):
            torch.manual_seed(3)
            drawn.append(home.FractionalMaxPool2d(2, return_indices=True, **options)(x))
        torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)


MISUSES: dict[str, tuple[Any, ...]] = {
    "max_pool2d: padding": ("max_pool2d", torch.ones(1, 1, 4, 4), 2, 2, 2),
    "max_pool2d: no kernel": ("max_pool2d", torch.ones(1, 1, 4, 4), 0),
    "max_pool2d: three axes": ("max_pool2d", torch.ones(4, 4), 2),
    "max_pool2d: a complex input": ("max_pool2d", torch.ones(1, 4, 4, dtype=torch.complex64), 2),
    "max_pool3d: too small": ("max_pool3d", torch.ones(1, 1, 4, 4, 1), 2),
    "adaptive_max_pool2d: too many sizes": ("adaptive_max_pool2d", torch.ones(1, 4, 4), (1, 2, 3)),
    "fractional_max_pool2d: no size": ("fractional_max_pool2d", torch.ones(1, 4, 4), 2),
    "max_unpool2d: size": ("max_unpool2d", torch.ones(1, 1, 1), torch.zeros(1, 1, 1).long(), 2, 2, 0, (9, 9)),
    "max_unpool2d: place": ("max_unpool2d", torch.ones(1, 1, 1), torch.full((1, 1, 1), 9), 2),
    "max_unpool2d: shapes": ("max_unpool2d", torch.ones(1, 1, 2), torch.zeros(1, 1, 1).long(), 2),
    "lp_pool2d: p is 0": ("lp_pool2d", torch.ones(1, 4, 4), 0, 2),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_torchs(name: str) -> None:
    function, *arguments = MISUSES[name]
    raised = []
    for home in (F, torch_F):
        with pytest.raises(Exception) as caught:
            getattr(home, function)(*arguments)
        raised.append((caught.type, str(caught.value).splitlines()[0]))
    assert raised[0] == raised[1]


def test_whole_numbers_of_numpy() -> None:
    x, number = torch.linspace(0.5, 2, 60).view(2, 5, 6), numpy.int64
    torch.testing.assert_close(F.avg_pool2d(x, number(2), number(2)), F.avg_pool2d(x, 2, 2))
    torch.testing.assert_close(F.lp_pool2d(x, 2, number(2), number(1)), F.lp_pool2d(x, 2, 2, 1))
    torch.testing.assert_close(F.adaptive_avg_pool1d(x, number(3)), F.adaptive_avg_pool1d(x, 3))


def test_unpooling_without_a_kernel_is_refused() -> None:
    with pytest.raises(TypeError, match=r"max_unpool2d: kernel_size .* Got None and 0"):
        F.max_unpool2d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), None)


def test_the_infinite_norm_of_complex_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="lp_pool2d: inputs must be real"):
        F.lp_pool2d(torch.ones(1, 4, 4, dtype=torch.complex64), math.inf, 2)


def test_swap_finds_the_pools() -> None:
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.MaxPool2d(2), torch.nn.AdaptiveMaxPool2d(2), torch.nn.LPPool2d(2, 2)
    )
    report = manualprop.swap(model, check=torch.randn(2, 3, 8, 8))
    assert [type(layer) for layer in model][1:] == [nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d]
    assert report.check is not None and report.check.kept.after.kept < report.check.kept.before.kept


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_activation_in_place_after_a_pool(axes: int) -> None:
    """The output is no view: autograd refuses to overwrite one that a rule returns."""
    x = special(2, 3, *SIDES[axes]).nan_to_num(0, 5, -5)
    y, places = getattr(F, f"max_pool{axes}d")(x, 2, return_indices=True)
    for f, leaf in (
        (lambda z: getattr(F, f"max_pool{axes}d")(z, 2), x),
        (lambda z: getattr(F, f"adaptive_max_pool{axes}d")(z, 2), x),
        (lambda z: getattr(F, f"max_unpool{axes}d")(z, places, 2, output_size=SIDES[axes]), y),
    ):
        found = [
            gradients(lambda z, f=f, g=g: g(f(z)), (leaf.clone().requires_grad_(),))
            for g in (torch.relu_, torch.relu)
        ]
        torch.testing.assert_close(found[0], found[1])


def test_a_list_of_sizes_under_a_hessian() -> None:
    x = torch.rand(1, 2, 4, 4, dtype=D)
    found = torch.func.hessian(lambda x: F.max_pool2d(x, [2, 2], [2, 1]).square().sum())(x)
    torch.testing.assert_close(
        found, torch.func.hessian(lambda x: torch_F.max_pool2d(x, 2, (2, 1)).square().sum())(x)
    )
