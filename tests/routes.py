"""The routes on which PyTorch differentiates, each as a function (f, x) -> the gradient of sum f at x."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Route = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def compiled(f: Any) -> Any:
    """f under the compiler: traced whole, run by AOTAutograd, where a rule could be bypassed."""
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def compiled_autograd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        return backward(f, x)


class Wrapped(torch.nn.Module):
    """A module with one parameter, for functional_call."""

    def __init__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__()
        self.f, self.weight = f, torch.nn.Parameter(x.detach().clone())

    def forward(self, scale: Tensor) -> Tensor:
        return self.f(self.weight) * scale


def per_sample(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of each of two samples, with scales 1 and 2, by functional_call under vmap(grad)."""
    module = Wrapped(f, x)

    def loss(parameters: dict[str, Tensor], scale: Tensor) -> Tensor:
        return functional_call(module, parameters, (scale,)).sum()

    scales = torch.tensor([1.0, 2.0], dtype=x.dtype)
    found = vmap(grad(loss), (None, 0))(dict(module.named_parameters()), scales)["weight"]
    torch.testing.assert_close(found[1], 2 * found[0])
    return found[0]


def autocast(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return backward(f, x)


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Forward mode without torch.func."""
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(x, direction(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert tangent is not None
        return tangent


def total(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sum()


def direction(x: Tensor) -> Tensor:
    """A tangent without symmetry: along ones, softmax does not change."""
    return torch.linspace(0.3, 1.7, max(x.numel(), 1), dtype=x.dtype)[: x.numel()].reshape(x.shape)


# Reverse mode gives the gradient of sum f, forward mode the derivative of f along ``direction``.
REVERSE: dict[str, Route] = {
    "backward": backward,
    "func.grad": lambda f, x: grad(total(f))(x),
    "func.vjp": lambda f, x: vjp(total(f), x)[1](torch.ones((), dtype=x.dtype))[0],
    "vmap(grad)": lambda f, x: vmap(grad(total(f)))(x.unsqueeze(0)).squeeze(0),
    "jacrev": lambda f, x: jacrev(total(f))(x),
    "per-sample": per_sample,
    "checkpoint": lambda f, x: backward(lambda z: checkpoint(f, z, use_reentrant=False), x),
    "autocast": autocast,
}
FORWARD: dict[str, Route] = {
    "func.jvp": lambda f, x: jvp(f, (x,), (direction(x),))[1],
    "jacfwd": lambda f, x: jacfwd(lambda s: f(x + s * direction(x)))(torch.zeros((), dtype=x.dtype)),
    "forward_ad": dual,
}
COMPILED: dict[str, Route] = {
    f"compile({name})": (lambda f, x, route=route: compiled(lambda z: route(f, z))(x))
    for name, route in {
        "func.grad": REVERSE["func.grad"],
        "func.vjp": REVERSE["func.vjp"],
        "vmap(grad)": REVERSE["vmap(grad)"],
        "jacrev": REVERSE["jacrev"],
        "func.jvp": FORWARD["func.jvp"],
        "jacfwd": FORWARD["jacfwd"],
    }.items()
} | {
    "compile(backward)": lambda f, x: backward(compiled(f), x),
    "compiled autograd": compiled_autograd,
}


def second_by_hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """H 1, the sum of each row of the Hessian of sum f."""
    return hessian(total(f))(x).reshape(x.numel(), x.numel()).sum(1).reshape(x.shape)


def second_by_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)[0]


SECOND: dict[str, Route] = {
    "double backward": second_by_backward,
    "hessian": second_by_hessian,
    "grad(grad)": lambda f, x: grad(lambda z: grad(total(f))(z).sum())(x),
    "jvp(grad)": lambda f, x: jvp(grad(total(f)), (x,), (torch.ones_like(x),))[1],
}


def nested_forward(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d'' f along ``direction``, by forward mode inside forward mode."""

    def once(z: Tensor) -> Tensor:
        return jvp(f, (z,), (direction(x),))[1]

    return jvp(once, (x,), (direction(x),))[1]


def forward_of_reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same, summed over the outputs, by forward mode over reverse mode."""
    return jvp(grad(total(f)), (x,), (direction(x),))[1] * direction(x)


COMPILED_SECOND: dict[str, Route] = {
    f"compile({name})": (lambda f, x, route=SECOND[name]: compiled(lambda z: route(f, z))(x))
    for name in ("hessian", "grad(grad)", "jvp(grad)")
}
