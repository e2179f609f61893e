"""Exercises: dropout, the norms, the embedding, and a GELU MLP that keeps one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualprop._practice._activations import real
from manualprop._practice._exercise import BEYOND, Asked, Exercise

DROPOUT = Exercise(
    "dropout",
    "a product with chance",
    """
    y = k x / q,    k = 1 with probability q, else 0,    number by number

k is drawn in forward, and is a constant for the derivative.  Given g = dL/dy, find dL/dx.
""",
    "Dropout",
    """
class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        k = (torch.rand_like(x) < q).to(x.dtype)
        ctx.save_for_backward(k)
        ctx.q = q
        return x * k / q

    @staticmethod
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        dx = g * k / ctx.q  #= of the shape of x
        return dx, None
""",
    (
        "For given k and q, y is x times a number.  What is the slope of a straight line?",
        "dy/dx = k / q: the very number that forward has multiplied by.  It has been saved.",
        "A number that was dropped gets no gradient, one that was kept gets g / q.  Do not draw again.",
    ),
    ("Dropout",),
    lambda cls: [Asked(cls.apply, (real(4, 5), 0.7), beyond=("linearity", "grad_output_layout", "mutation"))],
    words={"the mask and the scale that forward draws are missing": "this is the gradient of y = x"},
    advice={
        "of y = x": "What does a number send on that was dropped?",
        "draws from the global generator": "Which numbers were dropped is decided in forward, once.",
        "only in": "What does a number send on that was dropped?",
        "constant factor": "By what has forward multiplied the numbers that were kept?",
    },
)

EPS = 0.1  # so large that a forgotten eps shows


def _batch_norm(cls: Any) -> list[Asked]:
    def reference(x: Tensor, W: Tensor, b: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, None, None, W, b, training=True, eps=eps)

    return [Asked(cls.apply, (real(6, 3), real(3, seed=1), real(3, seed=2), EPS), reference, BEYOND_NORM)]


def _layer_norm(cls: Any) -> list[Asked]:
    def reference(x: Tensor, W: Tensor, b: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], W, b, eps)

    return [Asked(cls.apply, (real(5, 4), real(4, seed=1), real(4, seed=2), EPS), reference, BEYOND_NORM)]


# What floats do to a norm at 1e30 is not the learner's to solve.
BEYOND_NORM = tuple(name for name in BEYOND if name != "extremes")

NORM_ADVICE = {
    r"^x.*\|.*(one path|no simple|factor of its own|g of ones)": "x enters z in three ways: itself, through the mean m, "
    "and through r, with its eps. Are all three in dx, is each mean over as many as in forward, and is g weighted by W before?",
    "mean for sum": "W and b are used by every row. How much does L change if one of them does?",
    r"missing sum over a broadcast|^(W|b)\|.*exchanged": "W and b have one number for each column.",
    r"^W\|": "W is charged with g times what it was multiplied by.",
}

BATCH_NORM = Exercise(
    "batch_norm",
    "every row depends on every other",
    """
    m = 1/N sum_n x_n,    v = 1/N sum_n (x_n - m)^2,    r = (v + eps)^(-1/2)
    z_n = r (x_n - m),    y_n = W z_n + b        for each of the D columns by itself

Given g = dL/dy, of shape (N, D), find dL/dx, dL/dW and dL/db.  x is saved, and m, r and z are computed again, so that
backward can be differentiated once more.
""",
    "BatchNorm",
    """
class BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, eps):
        m = x.mean(0)  # (D,)
        r = ((x - m) ** 2).mean(0).add(eps).rsqrt()  # (D,)
        ctx.save_for_backward(x, W)
        ctx.eps = eps
        return W * (r * (x - m)) + b  # (N, D)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors  # (N, D), (D,); g is (N, D)
        m = x.mean(0)
        r = ((x - m) ** 2).mean(0).add(ctx.eps).rsqrt()
        z = r * (x - m)
        dW = (g * z).sum(0)  #= (D,)
        db = g.sum(0)  #= (D,)
        u = g * W  #-
        dx = r * (u - u.mean(0) - z * (u * z).mean(0))  #= (N, D)
        return dx, dW, db, None
""",
    (
        "Begin with dW and db: y is linear in them.  Then take u = g W, which is dL/dz, and one column.  x_i enters z_k\n"
        "through itself, through m, and through r.  Derive these three, and add.",
        "dm/dx_i = 1 / N.  dr/dx_i = -r^2 z_i / N: the derivative of (v + eps)^(-1/2), and sum_k (x_k - m) = 0.\n"
        "Then dz_k/dx_i = r ([k = i] - 1 / N) + (x_k - m) dr/dx_i, by the product rule.",
        "x_k - m is z_k / r, so dz_k/dx_i = r ([k = i] - 1 / N - z_k z_i / N).  Multiply by u_k and sum over k: three terms,\n"
        "of which the second is a mean of u over the rows, the third z_i times a mean of u z.",
    ),
    ("norm.norm_gradients",),
    _batch_norm,
    derivation="For one column; the n elements are the N rows.",
    advice=NORM_ADVICE,
)

LAYER_NORM = Exercise(
    "layer_norm",
    "the same along the row",
    """
    m_n = 1/D sum_d x_nd,    v_n = 1/D sum_d (x_nd - m_n)^2,    r_n = (v_n + eps)^(-1/2)
    z_nd = r_n (x_nd - m_n),    y_nd = W_d z_nd + b_d        for each of the N rows by itself

Given g = dL/dy, of shape (N, D), find dL/dx, dL/dW and dL/db.  What changes against batch_norm, and what does not?
""",
    "LayerNorm",
    """
class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, eps):
        m = x.mean(-1, keepdim=True)  # (N, 1)
        r = ((x - m) ** 2).mean(-1, keepdim=True).add(eps).rsqrt()  # (N, 1)
        ctx.save_for_backward(x, W)
        ctx.eps = eps
        return W * (r * (x - m)) + b  # (N, D)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors  # (N, D), (D,); g is (N, D)
        m = x.mean(-1, keepdim=True)
        r = ((x - m) ** 2).mean(-1, keepdim=True).add(ctx.eps).rsqrt()
        z = r * (x - m)
        dW = (g * z).sum(0)  #= (D,)
        db = g.sum(0)  #= (D,)
        u = g * W  #-
        dx = r * (u - u.mean(-1, keepdim=True) - z * (u * z).mean(-1, keepdim=True))  #= (N, D)
        return dx, dW, db, None
""",
    (
        "W and b belong to the columns, m and r to the rows.  So dW and db are those of batch_norm, and in dx the means go\n"
        "the other way.",
        "W_d now differs within what is averaged: it cannot be taken out of the means.  Work with u = g W.",
        "dL/dx_i = r (u_i - mean of u - z_i times the mean of u z), both means along the row, with keepdim=True.",
    ),
    ("norm.norm_gradients",),
    _layer_norm,
    derivation="For one row; the n elements are its D numbers.",
    advice=NORM_ADVICE,
)


def _embedding(cls: Any) -> list[Asked]:
    rows = torch.tensor([2, 0, 2, 5, 2])  # a row that comes three times, and rows that do not come
    return [Asked(cls.apply, (rows, real(6, 3)), lambda i, W: W[i], ("linearity", "grad_output_layout"))]


EMBEDDING = Exercise(
    "embedding",
    "rows that are used several times",
    """
    y_n = W_{i_n}        the row of W, of shape (V, D), that the number i_n names

A row may be named several times, or never.  Given g = dL/dy, of shape (N, D), find dL/dW.  The numbers i have no
gradient.
""",
    "Embedding",
    """
class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, i, W):
        ctx.save_for_backward(i)
        ctx.V = W.shape[0]
        return W[i]  # (N, D)

    @staticmethod
    def backward(ctx, g):
        (i,) = ctx.saved_tensors  # (N,); g is (N, D)
        dW = g.new_zeros(ctx.V, g.shape[1]).index_add(0, i, g)  #= (V, D)
        return None, dW
""",
    (
        "Think of y = E W, where E has a row for each n, with a 1 in the column i_n and 0 elsewhere.  That is linear.",
        "dL/dW = E^T g: row v is the sum of all g_n with i_n = v.  Rows that are not named get zeros.",
        "You need not make E.  Begin with zeros of shape (V, D), and add each g_n to row i_n: index_add does that.\n"
        "zeros[i] = g does not: it writes, and the last one wins.",
    ),
    ("Embedding",),
    _embedding,
    advice={
        "missing sum|only in": "Try it on paper with i = [2, 0, 2]: row 2 was used twice.",
        "mean's divisor": "Nothing is averaged here.",
        "exchanged": "dW has a row for each row of W, also for those that i does not name.",
    },
)


def _gelu_mlp(cls: Any) -> list[Asked]:
    def reference(x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, W, b)), V, c)

    args = (real(4, 3), real(5, 3, seed=1), real(5, seed=2), real(2, 5, seed=3), real(2, seed=4))
    return [
        Asked(cls.apply, args, reference, ("linearity", "grad_output_layout", "mutation"), keeps=("inputs",))
    ]


GELU_MLP = Exercise(
    "gelu_mlp",
    "a block that keeps one tensor",
    """
    u = x W^T + b,    h = gelu(u) = u Phi(u),    y = h V^T + c
    Phi(u) = 1/2 (1 + erf(u / sqrt 2)),    Phi'(u) = phi(u) = e^(-u^2 / 2) / sqrt(2 pi)

Autograd keeps x, u and h for this.  Keep x alone, beside the parameters, which are there anyway: compute u and h again
in backward.  Given g = dL/dy, find all five gradients.  phi and Phi are written.
""",
    "GELUMLP",
    """
class GELUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, V, c):
        u = x @ W.T + b  # (N, I) (I, H) + (H,) -> (N, H)
        h = torch.nn.functional.gelu(u)
        #+ ctx.save_for_backward(x, W, V, u, h)  # change this
        ctx.save_for_backward(x, W, b, V)  #-
        return h @ V.T + c  # (N, H) (H, O) + (O,) -> (N, O)

    @staticmethod
    def backward(ctx, g):
        #+ x, W, V, u, h = ctx.saved_tensors  # change this
        x, W, b, V = ctx.saved_tensors  #-
        u = x @ W.T + b  #-
        Phi = 0.5 * (1 + torch.erf(u / 2**0.5))
        phi = torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
        h = u * Phi  #-
        dV = g.T @ h  #= (O, H)
        dc = g.sum(0)  #= (O,)
        du = (g @ V) * (Phi + u * phi)  #= (N, H): through V, then through gelu
        dx = du @ W  #= (N, I)
        dW = du.T @ x  #= (H, I)
        db = du.sum(0)  #= (H,)
        return dx, dW, db, dV, dc
""",
    (
        "Solve it with u and h saved first: linear, an activation, linear, as in the exercise network.  Then save less.",
        "gelu(u) = u Phi(u) is a product, so its derivative has two terms; Phi' = phi.  What backward needs beside g is\n"
        "x, W, V, u and h; and u and h come from x, W and b.",
        "gelu'(u) = Phi(u) + u phi(u).  Save x, W, b, V; begin backward with u as in forward, and h = u Phi.",
    ),
    ("MLP", "GELU", "Linear"),
    _gelu_mlp,
    derivation="With dropout, the rule of this package has k and q; here k = q = 1, so d = h.",
    advice={
        r"^x.*\|.*(one path|factor of its own|no simple|g of ones)": "gelu is a product: has its slope two terms?",
        "mean for sum": "A bias was added to every row.",
    },
)
