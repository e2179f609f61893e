"""Linear maps: the adjoint is the adjoint, the matrices are the map, the layouts are torch's."""

from collections.abc import Callable

import pytest
import torch
from cases import Case, linear_map
from properties import gradients, upstream
from torch import Tensor

from manualprop import functional as F

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
