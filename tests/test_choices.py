"""Slopes that are 0 or a constant: the gradient is chosen there, not multiplied, as 0 times infinity would be NaN."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from torch import Tensor, nn

import manualprop
from manualprop import functional as F
from manualprop.descent import MiniBatch

CHOICES: dict[str, tuple[Any, ...]] = {
    "relu": (),
    "relu6": (),
    "hardtanh": (-0.5, 2.0),
    "hardtanh_": (-1.0, 0.0),
    "hardsigmoid": (),
    "hardshrink": (),
    "hardshrink_": (-1.0,),
    "softshrink": (),
    "threshold": (0.25, 7.0),
    "threshold_": (0.0, 0.0),
}
NEGATIVE_NAN = math.copysign(math.nan, -1)  # what 0 / 0 is on an x86
POINTS = (-9.0, -3.0, -0.5, -0.3, -0.0, 0.0, 0.1, 0.25, 0.5, 2.0, 3.0, 6.0, 50.0, math.nan, NEGATIVE_NAN)


def function(module: Any, name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(module, name.rstrip("_"))(x, *CHOICES[name])


def gradient(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, g)[0]


def expected(name: str, x: Tensor, g: Tensor) -> Tensor:
    """PyTorch's gradient; where x is NaN, of which PyTorch's own kernels give two, that of the steep piece."""
    torchs = gradient(function(torch_F, name), x, g)
    return torchs.where(~x.isnan(), g / 6 if name == "hardsigmoid" else g)


def same(ours: Tensor, torchs: Tensor) -> None:
    """Bit by bit, but for hardsigmoid's 1/6: torch rounds it to float32 in float64, and may round twice in half."""
    rtol = max(1e-7, torch.finfo(ours.dtype).eps)
    torch.testing.assert_close(ours, torchs, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("g", [math.inf, -math.inf, math.nan, 1.5])
@pytest.mark.parametrize("copies", [1, 2**15])  # by themselves, and in blocks
@pytest.mark.parametrize("name", CHOICES)
def test_any_gradient_is_0_where_the_slope_is(name: str, copies: int, g: float, dtype: torch.dtype) -> None:
    x = torch.tensor(POINTS, dtype=dtype).repeat(copies)
    arriving = torch.full_like(x, g)
    ours = gradient(function(F, name), x, arriving)
    assert ours.dtype == dtype
    same(ours, expected(name, x, arriving))


def second(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """The gradient as it is recorded for one more."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, g, create_graph=True)[0].detach()


def mapped(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    return torch.vmap(lambda z, t: torch.func.vjp(f, z)[1](t)[0])(x, g)


def tangent(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (g,))[1]


def batched(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """By autograd's older vmap: of the gradients alone."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, torch.stack((g, g)), is_grads_batched=True)[0][1]


def compiled(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    torch._dynamo.reset()
    return gradient(torch.compile(f, fullgraph=True), x, g)


def transposed(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """Of a gradient without gaps but in another order, and of one number for all."""
    folded = x.view(3, -1).t()
    whole = gradient(f, folded, g.view(3, -1).t())
    # rtol=0: the same products, so the same bits.
    torch.testing.assert_close(
        gradient(f, folded, g[0].expand(folded.shape)), whole, rtol=0, atol=0, equal_nan=True
    )
    return whole.t().reshape(x.shape)


ROUTES = [second, mapped, tangent, transposed, compiled]


@pytest.mark.filterwarnings("ignore")  # of torch, about itself, when it compiles
@pytest.mark.parametrize(
    ("name", "route"),
    [
        pytest.param(
            name, r, id=f"{name}-{r.__name__}", marks=[pytest.mark.slow] * (r is compiled and name != "relu")
        )
        for name in CHOICES
        for r in ROUTES
    ],
)
def test_so_it_is_on_every_route(name: str, route: Callable[..., Tensor]) -> None:
    x = torch.tensor(POINTS)
    x = x[:-2] if route is compiled else x  # without NaN, of which inductor's own softshrink makes 0
    g = torch.full_like(x, math.inf)
    same(route(function(F, name), x, g), expected(name, x, g))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 2**17])
def test_the_outer_slopes_of_hardswish_are_exact(copies: int, dtype: torch.dtype) -> None:
    x = torch.tensor([-50.0, -3.5, -3.0, 3.0, 3.5, 50.0], dtype=dtype).repeat(copies)
    assert gradient(F.hardswish, x, torch.ones_like(x))[-6:].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", CHOICES)
def test_batches_of_gradients_are_refused_no_more_than_before(name: str) -> None:
    """autograd's older vmap has no rules for bits: it multiplies, so that finite gradients come out right."""
    x = torch.tensor(POINTS)
    g = torch.linspace(1, 2, len(x))
    same(batched(function(F, name), x, g), expected(name, x, g))


def test_packed_bits_choose_too() -> None:
    for copies in (1, 2**15):
        x = torch.tensor(POINTS).repeat(copies)
        g = torch.full_like(x, math.inf)
        same(gradient(manualprop.nn.PackedReLU(), x, g), expected("relu", x, g))


def test_the_root_of_a_relu_can_be_trained() -> None:
    """Its gradient is infinite at 0, and the relu's 0 there."""
    x = torch.tensor([-1.0, 0.0, 4.0])
    for relu in (torch.relu, F.relu):
        assert gradient(lambda z, relu=relu: relu(z).sqrt(), x, torch.ones(3)).tolist() == [0, 0, 0.25]


def test_a_step_without_a_tape_chooses() -> None:
    """Also where the relu finds -0, whose bits are not those of 0."""
    weights = []
    for ours in (False, True):
        model = nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
            model[0].weight[:2], model[0].bias[:2] = 0, -0.0
        x, t = torch.tensor([[-1.0, 2.0, 3.0, 5.0], [7.0, -9.0, 2.0, -3.0]]), torch.ones(2, 1)
        if ours:
            loss = manualprop.nn.MSELoss()
            step = manualprop.Backprop(manualprop.swap(model).model, loss, MiniBatch(learning_rate=0.1))
            for _ in range(3):  # the first ones plan, the later ones repeat
                step(x, t)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), t).backward()
                optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)
