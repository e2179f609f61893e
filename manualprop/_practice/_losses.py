"""Exercises: losses, softmax, and a whole network with its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._practice._activations import real
from manualprop._practice._exercise import Asked, Exercise


def _mse(cls: Any) -> list[Asked]:
    return [Asked(cls.apply, (real(5, 3), real(5, 3, seed=1).detach()), F.mse_loss)]


MSE = Exercise(
    "mse",
    "the mean squared error",
    """
    L = 1/N sum_i (x_i - t_i)^2        over all N numbers of x

Here y = L is one number, and so is g = dL'/dL: the loss may be part of a larger sum.  Find dL'/dx.
The target t needs no gradient: its place in what is returned holds None.
""",
    "MSE",
    """
class MSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return ((x - t) ** 2).mean()

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors  # both of any shape; g is one number
        dx = g * 2 * (x - t) / x.numel()  #= of the shape of x
        return dx, None
""",
    (
        "Write the mean as a sum over all numbers, and derive it for one x_i.  How many of the terms hold this x_i?",
        "One term holds x_i: (x_i - t_i)^2 / N.  Use the chain rule for the square, and keep the 1 / N.",
        "N counts all numbers of x, not its rows: x.numel().  And multiply by g, also though it is often 1.",
    ),
    ("MSE",),
    _mse,
    words={"y": "L"},
    derivation="L = 1/N sum_i l_i with l_i = (x_i - t_i)^2, so dL/dx_i = 1/N dl_i/dx_i; times g.",
    advice={
        "mean's divisor": "The loss is a mean over all numbers. How many are there?",
        "constant factor 3": "Is N the number of rows, or of all numbers?",
    },
)


def _softmax(cls: Any) -> list[Asked]:
    return [Asked(cls.apply, (real(4, 5),), lambda x: x.softmax(-1))]


SOFTMAX = Exercise(
    "softmax",
    "every output depends on every input of its row",
    """
    y_i = e^x_i / sum_k e^x_k        within each row of x, of shape (N, C)

Given g = dL/dy, of the shape of y, find dL/dx.  You need no loop, and no matrix of C times C numbers.
""",
    "Softmax",
    """
class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.softmax(x, dim=-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors  # (N, C), and so is g
        dx = y * (g - (g * y).sum(-1, keepdim=True))  #= (N, C)
        return dx
""",
    (
        "x_j enters every y_i of its row, through the sum in the denominator.  So dL/dx_j = sum_i g_i dy_i/dx_j,\n"
        "a sum over the whole row.  Derive dy_i/dx_j twice: for i = j, and for i other than j.",
        "For i = j the quotient rule gives y_j - y_j^2, for other i it gives -y_i y_j.  Both in one:\n"
        "dy_i/dx_j = y_i ([i = j] - y_j), where [i = j] is 1 or 0.",
        "Put it into the sum over i.  [i = j] leaves one term, g_j y_j; y_j comes out of the other, and what is left\n"
        "there is one number for each row: sum(-1, keepdim=True).",
    ),
    ("Softmax",),
    _softmax,
    advice={
        "the coupling between entries": "x_j enters the y of all others in its row too, through the denominator.",
        "a missing or extra term|g of ones|no simple|factor of its own": "Derive dy_i/dx_j for i = j, and for other i. "
        "Are both in the sum over i?",
        "over the wrong axis": "The row is the last axis. Over which is your sum?",
    },
)


def _cross_entropy(cls: Any) -> list[Asked]:
    return [Asked(cls.apply, (real(5, 4), torch.tensor([1, 3, 0, 3, 2])), F.cross_entropy)]


CROSS_ENTROPY = Exercise(
    "cross_entropy",
    "cross-entropy, and why p - y",
    """
    p = softmax(x) within each row,    L = -1/N sum_n log p_{n, t_n}

for N rows of C logits, where t_n is the number of the right class of row n.  g = dL'/dL is one number.
Find dL'/dx.  Books write p - y for it, with y = 1 for the right class and 0 for the others: find out why, do not look
it up.  F.one_hot(t, C) makes y; as numbers of the dtype of p: F.one_hot(t, C).to(p.dtype).
""",
    "CrossEntropy",
    """
F = torch.nn.functional


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return -torch.log_softmax(x, dim=-1).gather(1, t[:, None]).mean()

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors  # (N, C), (N,); g is one number
        p = torch.softmax(x, dim=-1)
        y = F.one_hot(t, x.shape[1]).to(p.dtype)  #-
        dx = g * (p - y) / len(x)  #= (N, C)
        return dx, None
""",
    (
        "For one row, log p_t = x_t - log sum_k e^x_k.  Derive the two terms one after the other, by x_c.",
        "x_t depends on x_c if c = t: that gives [c = t], which is y_c.  The derivative of log sum_k e^x_k by x_c is\n"
        "e^x_c / sum_k e^x_k.  You know that quotient.",
        "So d log p_t / dx_c = y_c - p_c.  L has a minus before it, and is a mean over the N rows.",
    ),
    ("CrossEntropy",),
    _cross_entropy,
    words={"y": "L"},
    derivation="""
For one row, l = -log p_t = -x_t + log sum_k e^x_k
    dl/dx_c = -[c = t] + e^x_c / sum_k e^x_k        the second is log u, so u' / u
            = -y_c + p_c
so p - y is what the two terms give: the exponentials of softmax and the logarithm of the loss take each other away.
L is the mean over N rows: dL/dx = (p - y) / N, times g.
The rule of this package is the same with class weights and label smoothing: there M = 1, and m is y.
""",
    advice={
        "mean's divisor": "L is a mean. Over how many rows?",
        "in .* of the entries": "What is different about the right class?",
        "one path of a sum": "log p_t has two terms in x. Are both in your gradient?",
        "no simple explanation|factor of its own": "log p_t has two terms in x. Are both in your gradient?",
    },
)


RATE = 1 / 32  # a forgotten learning rate shows as a factor 32, which is no size of a tensor


def _network(step: Callable[..., Any]) -> list[Asked]:
    x, t = real(6, 4, seed=9).detach(), torch.tensor([1, 0, 2, 1, 1, 0])

    class Network(torch.autograd.Function):
        """The loss; its gradients are what the learner's update has moved the parameters by, over the rate."""

        @staticmethod
        def forward(ctx: Any, *parameters: Tensor) -> Tensor:
            ctx.save_for_backward(*parameters)
            W1, b1, W2, b2 = parameters
            return F.cross_entropy(torch.tanh(x.to(W1) @ W1.T + b1) @ W2.T + b2, t)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
            old = ctx.saved_tensors
            new = step(x.to(old[0]), t, *[p.clone() for p in old], RATE)
            of_right_form(new, "step", ("W1", "b1", "W2", "b2"), old)
            return tuple(g * (p - q) / RATE for p, q in zip(old, new, strict=True))

    # Written out, so that the report names them.
    def network(W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
        loss: Tensor = Network.apply(W1, b1, W2, b2)
        return loss

    parameters = (real(5, 4), real(5, seed=1), real(3, 5, seed=2), real(3, seed=3))
    return [Asked(network, parameters, beyond=(), second=False)]


def of_right_form(made: Any, function: str, names: tuple[str, ...], old: tuple[Tensor, ...]) -> None:
    """Raise unless a learner's function has returned tensors of the right number and shapes."""
    if not isinstance(made, tuple | list) or len(made) != len(names):
        given = f"{len(made)} values" if isinstance(made, tuple | list) else type(made).__name__
        raise TypeError(f"{function} must return {', '.join(names)}. Got {given}.")
    for name, new, before in zip(names, made, old, strict=True):
        if not isinstance(new, Tensor):
            raise TypeError(f"{function} must return tensors. Got {type(new).__name__} for {name}.")
        if new.shape != before.shape:
            raise ValueError(
                f"{function}: the new {name} must have the shape of the old, {list(before.shape)}. "
                f"Got {list(new.shape)}."
            )


NETWORK = Exercise(
    "network",
    "two layers end to end, with the update",
    """
    h = tanh(x W1^T + b1),    z = h W2^T + b2,    p = softmax(z),    L = -1/N sum_n log p_{n, t_n}

One update by gradient descent: forward, backward and W <- W - rate dL/dW, for all four parameters.  Nothing here but
what the exercises before had: go back from the loss, layer by layer.  Return the new parameters.
""",
    "step",
    """
F = torch.nn.functional


def step(x, t, W1, b1, W2, b2, rate):
    # Forward.  x (N, I), t (N,), W1 (H, I), b1 (H,), W2 (C, H), b2 (C,)
    h = torch.tanh(x @ W1.T + b1)  # (N, H)
    z = h @ W2.T + b2  # (N, C)
    p = torch.softmax(z, dim=-1)
    y = F.one_hot(t, z.shape[1]).to(p.dtype)

    # Backward.
    dz = (p - y) / len(x)  #= (N, C)
    dW2 = dz.T @ h  #= (C, H)
    db2 = dz.sum(0)  #= (C,)
    dh = dz @ W2  #= (N, H)
    da = dh * (1 - h * h)  #= (N, H): before tanh
    dW1 = da.T @ x  #= (H, I)
    db1 = da.sum(0)  #= (H,)

    # Update.
    #+ return W1, b1, W2, b2  # the new ones
    return W1 - rate * dW1, b1 - rate * db1, W2 - rate * dW2, b2 - rate * db2  #-
""",
    (
        "Each line of backward is an exercise that you have solved: dz is cross_entropy, dW2, db2 and dh are linear,\n"
        "da is tanh (from its output h), dW1 and db1 are linear once more.",
        "What arrives at a layer is the gradient at its output: dz is the g of the second layer, dh the g of tanh, da the\n"
        "g of the first layer.  The 1 / N of the mean is in dz, and need not be said again.",
        "dz = (p - y) / N, and then linear: dW2 from dz and h, dh from dz and W2.  da = dh times the slope of tanh, which\n"
        "is 1 - h^2.  The update of W2 comes after dh is computed with the old W2.",
    ),
    ("CrossEntropy", "Linear", "Tanh"),
    _network,
    words={"y": "L"},
    derivation="The chain rule, from the loss back: each layer is handed the gradient at its output, as its g.",
    advice={
        r"constant factor -?32\b": "The rate is 1/32 here. Is it in the update?",
        r"constant factor -?(1/)?6\b": "x has 6 rows, and L is a mean over them: each row counts 1/6, once.",
        "wrong sign": "Descent goes against the gradient.",
        "zero": "A parameter that comes back as it was has learned nothing.",
        "no simple explanation|factor of its own|one path": "Look at the first line of backward whose gradient is "
        "wrong: what comes after it is wrong for that reason. If that is the first layer alone: is the slope of tanh in "
        "da, and is dh computed with the W2 that forward has used?",
    },
)

MOMENTUM = 0.9


def momentum_rule(W: Tensor, dW: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The update of the exercise: the new W and the new V."""
    V = MOMENTUM * V + dW
    return W - RATE * V, V


def _momentum(update: Callable[..., Any]) -> list[Asked]:
    def theirs(W: Tensor, dW: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        made = update(W.clone(), dW.clone(), V.clone(), RATE, MOMENTUM)
        of_right_form(made, "update", ("W", "V"), (W, V))
        return made[0], made[1]

    class Update(torch.autograd.Function):
        """The right update; its derivatives are those of the learner's."""

        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(*tensors)
            return momentum_rule(*tensors)

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                # A tensor that the learner returns as it came has a gradient too.
                made = [m + 0 * sum(t.sum() for t in leaves) for m in theirs(*leaves)]
                return torch.autograd.grad(made, leaves, g)

    def rule(W: Tensor, dW: Tensor, V: Tensor) -> Any:
        return Update.apply(W, dW, V)

    tensors = (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2))
    return [
        Asked(rule, tensors, beyond=(), second=False),
        Asked(theirs, tensors, momentum_rule, beyond=(), second=False),
    ]


MOMENTUM_EXERCISE = Exercise(
    "momentum",
    "an update that remembers",
    """
    V <- m V + dW,    W <- W - rate V

V is what is left of all gradients so far: the last one whole, the one before it times m, then m^2, and so on.
Write the update as torch.optim.SGD(momentum=m) makes it.  It is marked by its derivatives: how much the new W and the
new V change with W, with dW and with V.
""",
    "update",
    """
def update(W, dW, V, rate, m):
    new_V = m * V + dW  #= of the shape of W
    new_W = W - rate * new_V  #= of the shape of W
    return new_W, new_V
""",
    (
        "Two lines, one for each formula.  Mind their order: which V stands in the second?",
        "The arrow means that what stands on its left is the new value from there on.  So W is moved by the new V.",
        "The last gradient counts whole, without a factor 1 - m, and the rate stands in the second line, not the first.",
    ),
    (),
    _momentum,
    derivation="""
V_k = m V_(k-1) + dW_k = dW_k + m dW_(k-1) + m^2 dW_(k-2) + ...        put in one after the other
W_k = W_(k-1) - rate V_k
If all gradients are the same, V tends to dW (1 + m + m^2 + ...) = dW / (1 - m): ten times the step, for m = 0.9.
The derivatives that are marked: dV_k/dV = m, dV_k/d(dW) = 1, dW_k/dW = 1, dW_k/dV = -rate m, dW_k/d(dW) = -rate.
""",
    words={"output 0": "the new W", "output 1": "the new V", "y": "", "gradient of": "derivative by"},
    advice={
        "comes through the new W": "V may be right, and used wrongly: which V, which rate, which sign is in the "
        "second line?",
        "comes through the new V": "Look at the first line: what is multiplied by m, and what is not?",
        r"constant factor 10/9\b": "10/9 is 1 / m here. Is V multiplied by it?",
        r"constant factor 1/10\b": "1/10 is 1 - m here. The formula has no such factor.",
    },
)
