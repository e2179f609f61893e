"""The first exercises: a linear layer, and the activations.  And, at the end, tanh in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._practice._exercise import Asked, Exercise


def real(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers that require a gradient, the same ones each time."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * numbers).requires_grad_()


def elementwise(
    reference: Callable[[Tensor], Tensor], keeps: tuple[str, ...] = ()
) -> Callable[[Any], list[Asked]]:
    """What is asked of an activation."""
    return lambda cls: [Asked(cls.apply, (real(4, 3),), reference, keeps=keeps)]


def _linear(cls: Any) -> list[Asked]:
    return [Asked(cls.apply, (real(5, 4), real(3, 4, seed=1), real(3, seed=2)), F.linear)]


LINEAR = Exercise(
    "linear",
    "a linear layer",
    """
    y = x W^T + b,    y_no = sum_i x_ni W_oi + b_o

with N rows n, I inputs i, O outputs o.  Given g = dL/dy, of the shape of y, find dL/dx, dL/dW and dL/db.
""",
    "Linear",
    """
class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(x, W)
        return x @ W.T + b  # (N, I) (I, O) + (O,) -> (N, O)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors  # (N, I), (O, I); g is (N, O)
        dx = g @ W  #= (N, I)
        dW = g.T @ x  #= (O, I)
        db = g.sum(0)  #= (O,)
        return dx, dW, db
""",
    (
        "Write one number of y as a sum over i.  Which of the y's does x_ni enter?  Which does W_oi, which does b_o?\n"
        "Each of them is charged with g, times what it was multiplied by, summed over all the y's that it enters.",
        "x_ni enters y_no for every o, with the factor W_oi.  W_oi enters y_no for every n, with the factor x_ni.\n"
        "b_o enters y_no for every n, with the factor 1.",
        "dL/dx_ni = sum_o g_no W_oi,  dL/dW_oi = sum_n g_no x_ni,  dL/db_o = sum_n g_no.  A sum over the index that two\n"
        "matrices share is a matrix product; where that index is the first of both, one of them is transposed.",
    ),
    ("Linear",),
    _linear,
    advice={
        "mean for sum": "b was added to every row of the batch. How much does L change if b_o does?",
        "missing sum over a broadcast": "b was added to every row, and has one entry for all of them.",
    },
)

SIGMOID = Exercise(
    "sigmoid",
    "the logistic function",
    """
    y = 1 / (1 + e^-x),    number by number

Given g = dL/dy, find dL/dx.  Say it in x, or in sigmoid(x).
""",
    "Sigmoid",
    """
class Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        y = torch.sigmoid(x)  #-
        dx = g * y * (1 - y)  #= of the shape of x
        return dx
""",
    (
        "Each y depends on one x alone, so dL/dx = g f'(x), number by number.  What is left is f'(x) on paper:\n"
        "the derivative of 1 / u is -u' / u^2.",
        "f'(x) = e^-x / (1 + e^-x)^2.  As code this fails for large negative x, where e^-x is infinite.\n"
        "Take it apart into two factors, each between 0 and 1.",
        "One factor is y = 1 / (1 + e^-x), the other e^-x / (1 + e^-x).  The two add up to 1.",
    ),
    ("Sigmoid",),
    elementwise(torch.sigmoid),
)

TANH = Exercise(
    "tanh",
    "the hyperbolic tangent",
    """
    y = tanh x = sinh x / cosh x,    number by number

Given g = dL/dy, find dL/dx.
""",
    "Tanh",
    """
class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = g * (1 - torch.tanh(x) ** 2)  #= of the shape of x
        return dx
""",
    (
        "Use the quotient rule on sinh x / cosh x.  The derivative of sinh is cosh, that of cosh is sinh.",
        "f'(x) = (cosh^2 x - sinh^2 x) / cosh^2 x.  Divide, and look for tanh in what you have.  Do not compute cosh x\n"
        "in code: it is infinite for large x.",
        "sinh^2 x / cosh^2 x is the square of y.  And do not forget what arrives: the chain rule multiplies f'(x) by g.",
    ),
    ("Tanh",),
    elementwise(torch.tanh),
)

RELU = Exercise(
    "relu",
    "the rectifier, and its kink",
    """
    y = max(x, 0),    number by number

Given g = dL/dy, find dL/dx.  At x = 0 there is no derivative.  Take 0 there, as PyTorch does.
""",
    "ReLU",
    """
class ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = g * (x > 0)  #= of the shape of x
        return dx
""",
    (
        "Draw it.  What is the slope to the left of 0, and what to the right?",
        "The slope depends on the sign of x alone.  A comparison of tensors is a tensor of truth values; a product with it\n"
        "takes them as 0 and 1.",
        "At x = 0 the comparison must be false, so that the slope is 0.  There are two comparisons to choose from.",
    ),
    ("ReLU",),
    elementwise(torch.relu),
    advice={"only at ties and kinks": "Read again what the exercise asks for at x = 0."},
)

SOFTPLUS = Exercise(
    "softplus",
    "a smooth rectifier, also for large numbers",
    """
    y = log(1 + e^x),    number by number

Given g = dL/dy, find dL/dx.  It must be right for x = 800 too, where e^x is infinite.
""",
    "Softplus",
    """
class Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.logaddexp(x, torch.zeros_like(x))  # log(e^x + e^0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = g * torch.sigmoid(x)  #= of the shape of x
        return dx
""",
    (
        "The derivative of log u is u' / u.  Then ask where the quotient that you get is infinity by infinity.",
        "f'(x) = e^x / (1 + e^x).  Divide both by e^x.",
        "1 / (1 + e^-x) is a function that you have met two exercises ago, and torch has it, for all x.",
    ),
    ("Softplus",),
    elementwise(lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    advice={"extreme values": "Which part of your formula is infinite for a large x? Divide by it on paper."},
)

TANH_OUTPUT = Exercise(
    "tanh_output",
    "tanh in less memory",
    """
    y = tanh x,    number by number

As in the exercise tanh.  But x is needed by nobody else, while the next layer keeps y anyway.  Change what is saved:
y alone.  Then find dL/dx from y and g, without tanh.
""",
    "Tanh",
    """
class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        #+ ctx.save_for_backward(x)  # change this
        ctx.save_for_backward(y)  #-
        return y

    @staticmethod
    def backward(ctx, g):
        #+ (x,) = ctx.saved_tensors
        (y,) = ctx.saved_tensors  #-
        dx = g * (1 - y * y)  #= of the shape of x
        return dx
""",
    (
        "In the exercise tanh you computed tanh(x) in backward.  That number has been there before.",
        "ctx.save_for_backward(y) in forward; ctx.saved_tensors in backward is then (y,).",
        "f'(x) = 1 - tanh(x)^2, and tanh(x) is y.",
    ),
    ("Tanh",),
    elementwise(torch.tanh, keeps=("outputs",)),
    advice={
        "right gradient for x = ": "Is what you unpack in backward what forward has saved?",
    },
)
