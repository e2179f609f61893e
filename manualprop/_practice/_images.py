"""Exercises on images: a convolution, and the largest number of each window."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manualprop._practice._activations import real
from manualprop._practice._exercise import Asked, Exercise


def _convolution(cls: Any) -> list[Asked]:
    def reference(x: Tensor, W: Tensor, b: Tensor, s: int, p: int) -> Tensor:
        return F.conv2d(x, W, b, stride=s, padding=p)

    # All sizes differ, so that letters which are exchanged do not fit.
    args = (real(2, 3, 5, 6), real(5, 3, 3, 2, seed=1), real(5, seed=2), 2, 1)
    return [Asked(cls.apply, args, reference, ("linearity", "grad_output_layout", "mutation", "sizes"))]


CONVOLUTION = Exercise(
    "convolution",
    "one kernel at every position",
    """
    y[n,o,q,r] = b[o] + sum_{c,k,l} W[o,c,k,l] x[n,c,i,j],    i = s q + k - p,    j = s r + l - p

n counts the examples, c the channels of x, o those of y; s is the stride, and p zeros stand around x.  Each weight is
used at every position (q, r), and each x[n,c,i,j] is met by several weights.  Given g = dL/dy, of shape (N, O, Q, R),
write dL/dx, dL/dW and dL/db as sums, with their indices.  The code goes through the kernel, one (k, l) at a time.
""",
    "Convolution",
    """
class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, s, p):
        ctx.save_for_backward(x, W)
        ctx.s, ctx.p = s, p
        return torch.nn.functional.conv2d(x, W, b, stride=s, padding=p)  # (N, O, Q, R)

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors  # (N, C, I, J), (O, C, K, L); g is (N, O, Q, R)
        s, p, (I, J), (K, L), (Q, R) = ctx.s, ctx.p, x.shape[2:], W.shape[2:], g.shape[2:]
        wide = torch.nn.functional.pad(x, (p, p, p, p))  # with its zeros: x[n,c,i,j] is wide[n,c,i+p,j+p]
        dwide = torch.zeros_like(wide)
        dW = torch.zeros_like(W)
        for k in range(K):
            for l in range(L):
                rows = slice(k, k + s * Q, s)  #= which rows of wide W[o,c,k,l] meets, for all q
                columns = slice(l, l + s * R, s)  #= which columns, for all r
                met = wide[:, :, rows, columns]  # (N, C, Q, R)
                dWkl = torch.einsum("noqr,ncqr->oc", g, met)  #= (O, C), of W[:, :, k, l]
                dmet = torch.einsum("noqr,oc->ncqr", g, W[:, :, k, l])  #= (N, C, Q, R), what W[:, :, k, l] sends to met
                dW[:, :, k, l] = dWkl
                dwide[:, :, rows, columns] += dmet
        dx = dwide[:, :, p : p + I, p : p + J]  #= (N, C, I, J)
        db = g.sum((0, 2, 3))  #= (O,)
        return dx, dW, db, None, None
""",
    (
        "Leave one factor of the sum out, and sum over every letter that it does not have.  W[o,c,k,l] has no n, q and r;\n"
        "b[o] has none of the three either; x[n,c,i,j] has no o, and not every (q, r) reaches it.",
        "dL/dW[o,c,k,l] = sum_{n,q,r} g[n,o,q,r] x[n,c,i,j].  In wide, i + p is s q + k: it begins at k, and goes on in\n"
        "steps of s.  dL/dx[n,c,i,j] is a sum of g[n,o,q,r] W[o,c,k,l] over o, and over all q, k with s q + k - p = i.",
        "Of one (k, l): einsum sums over the letters that its result has not, so dWkl keeps o and c, dmet keeps n, c, q, r.\n"
        "rows is a slice from k in steps of s, with Q numbers.  dx is dwide without the p rows and columns around it.",
    ),
    ("Convolution",),
    _convolution,
    derivation="i, q and k stand for both axes.  Here the dilation is d = 1, and there is one group.",
    advice={
        "for an input of shape": "dx has a number for each number of x, and the zeros around x are none of them.",
        "exchanged": "What is returned stands in the order of the arguments of forward.",
        r"^x, W\|": "Both meet where i = s q + k - p: is that what rows and columns say, for every q and r?",
        r"\| reversed": "W[o,c,k,l] has met x at i = s q + k - p: does k grow with i, or against it?",
        "mean for sum|missing sum": "How often is one number of the kernel, or of the bias, used?",
        r"^W\|": "W[o,c,k,l] has met x[n,c,i,j] for every n, q and r, and gets g[n,o,q,r] from each of them.",
        r"^b\|": "b[o] was added in every example and at every position.",
        r"^x\|": "Which (q, k) reach x[n,c,i,j]? All with s q + k - p = i, each by its own weight, and they add up.",
    },
)


def _max_pool(cls: Any) -> list[Asked]:
    def reference(x: Tensor, K: int, s: int) -> Tensor:
        return F.max_pool2d(x, K, s)

    return [Asked(cls.apply, (real(2, 3, 5, 7), 3, 2), reference)]


MAX_POOL = Exercise(
    "max_pool",
    "one number of each window; windows overlap",
    """
    y[n,c,q,r] = the largest of x[n,c,i,j] with i = s q + k, j = s r + l, for 0 <= k < K and 0 <= l < K

Windows overlap if s < K.  Of equal numbers the first counts, row by row.  Given g = dL/dy, of shape (N, C, Q, R), find
dL/dx: first the place of each maximum in its window, then in the image, then what each place gets.
""",
    "MaxPool",
    """
class MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, K, s):
        ctx.save_for_backward(x)
        ctx.K, ctx.s = K, s
        return x.unfold(2, K, s).unfold(3, K, s).amax((-2, -1))  # (N, C, Q, R)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors  # (N, C, I, J); g is (N, C, Q, R)
        K, s, (Q, R) = ctx.K, ctx.s, g.shape[2:]
        windows = x.unfold(2, K, s).unfold(3, K, s).flatten(-2)  # (N, C, Q, R, K K): each window, row by row
        q, r = torch.arange(Q)[:, None], torch.arange(R)
        m = windows.argmax(-1)  #= (N, C, Q, R), from 0 to K K - 1: the place of the maximum in its window
        i = s * q + m // K  #= (N, C, Q, R): its row in the image
        j = s * r + m % K  #= (N, C, Q, R): its column
        place = i * x.shape[3] + j  #= (N, C, Q, R): its place in the image, row by row
        dx = torch.zeros_like(x).flatten(2).scatter_add(2, place.flatten(2), g.flatten(2))  #= (N, C, I J)
        return dx.view_as(x), None, None
""",
    (
        "Near x, while no other number becomes the largest, y is one of the numbers of x.  What is the slope of y = x?\n"
        "And what is the slope in all the other numbers of the window?",
        "A number that is not the largest in any window gets nothing.  One that is the largest in two windows gets the g of\n"
        "both.  m counts row by row in a window of width K: m // K is the row in it, m % K the column.",
        "The window (q, r) begins at row s q and column s r.  The place counts row by row in an image of width x.shape[3].\n"
        "scatter_add begins with zeros and adds; scatter writes, and of two windows one is lost.",
    ),
    ("MaxPool",),
    _max_pool,
    derivation="o stands for (q, r), and j for a place of the image.",
    advice={
        "kink|tie": "Of equal numbers in a window one is the maximum, and its window has one g to give.",
        "send nothing back": "What does a place get that is the maximum of two windows?",
        "only in": "Take one place on paper. Of which windows is it the maximum, where do these begin, and how wide is "
        "the image?",
        r"^x\|": "y follows one number of its window, with slope 1. What do the others get, and how much of g does this one?",
    },
)
