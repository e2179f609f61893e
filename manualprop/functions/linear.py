r"""Hand-derived rules of the linear and the bilinear layer.

Shape legend
    N   batch: any number of leading axes, flattened for a sum over them
    I   in_features           O   out_features        I, J   in1_features, in2_features of a bilinear layer
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._execution._products import bilinear, linear
from manualprop.functions._execution._transforms import save
from manualprop.functions._rule import Rule

__all__ = ["Bilinear", "Linear"]


class Linear(Rule):
    r"""$y = x W^\top + b$, that is $y_{no} = \sum_i x_{ni} W_{oi} + b_o$

    Derivation, with g = dL/dy
        dL/dx_ni = sum_o g_no dy_no/dx_ni = sum_o g_no W_oi        so dx = g W
        dL/dW_oi = sum_n g_no dy_no/dW_oi = sum_n g_no x_ni        so dW = g^T x
        dL/db_o  = sum_n g_no dy_no/db_o  = sum_n g_no             so db = sum_n g_n
        dy = dx W^T + x dW^T + db                                  forward mode: product rule
    Second order
        dx, dW and db are products and sums of g, x and W: autograd differentiates those as written.
    Shape
        x (N, I), W (O, I), b (O,) or None -> y (N, O)
    Memory
        x if W needs a gradient, W if x does.
    Accuracy
        That of the matrix products: sums over N, I or O terms.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return linear(x, W, b)  # (N, I) (I, O) + (O,) -> (N, O): multiply by weights, add biases

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, W, _ = inputs
        needs_x, needs_W, _ = ctx.needs_input_grad
        save(ctx, (x, needs_W), (W, needs_x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, W = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad
        dx = Linear.input_gradient(g, W) if needs_x else None
        dW = Linear.weight_gradient(g, x) if needs_W else None
        db = Linear.bias_gradient(g) if needs_b else None
        return dx, dW, db

    @staticmethod
    def input_gradient(g: Tensor, W: Tensor) -> Tensor:
        """dL/dx: the chain rule to the layer before."""
        return g.matmul(W)  # (N, O) (O, I) -> (N, I)

    @staticmethod
    def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
        """dL/dW."""
        return rows(g).mT.matmul(rows(x))  # (O, N) (N, I) -> (O, I)

    @staticmethod
    def bias_gradient(g: Tensor) -> Tensor:
        """dL/db."""
        return rows(g).sum(0)  # (N, O) -> (O,)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        return linear_tangent(x, W, dx, dW, db)


def linear_tangent(x: Tensor, W: Tensor, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
    """dx W^T + x dW^T + db: forward mode of :class:`Linear`, for those of the tangents that there are."""
    terms = (
        None if dx is None else F.linear(dx, W),
        None if dW is None else F.linear(x, dW),
        None if db is None else db.expand(*x.shape[:-1], -1).clone(),
    )
    first, *rest = (term for term in terms if term is not None)
    return sum(rest, first)


class Bilinear(Rule):
    r"""$y_{no} = \sum_{ij} a_{ni} W_{oij} c_{nj} + b_o$ of two inputs $a$ and $c$

    Derivation, with g = dL/dy and p_noi = g_no a_ni
        dL/da_ni  = sum_o g_no dy_no/da_ni = sum_o g_no sum_j W_oij c_nj
        dL/dc_nj  = sum_o g_no dy_no/dc_nj = sum_oi p_noi W_oij    so dc = p W, with the pair oi as one axis
        dL/dW_oij = sum_n g_no dy_no/dW_oij = sum_n p_noi c_nj     so dW = p^T c
        dL/db_o   = sum_n g_no
        dy = y(da, c) + y(a, dc) + y(a, c; dW) + db                forward mode: product rule
    Second order
        All are products and sums of g, a, c and W: autograd differentiates those as written.
    Shape
        a (N, I), c (N, J), W (O, I, J), b (O,) or None -> y (N, O)
    Memory
        a, c and W, and in backward p: N O I elements.
    Accuracy
        That of the matrix products: sums over N, I J, O I or O J terms.
    """

    @staticmethod
    def forward(a: Tensor, c: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return bilinear(Bilinear._product, a, c, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, c, W = ctx.saved_tensors
        needs_a, needs_c, needs_W, needs_b = ctx.needs_input_grad
        W2 = W.reshape(-1, W.shape[2])  # (O I, J)
        da = dc = dW = db = None
        if needs_a:
            da = g.unsqueeze(-2).matmul(Bilinear._weights(c, W)).squeeze(-2)  # (N, 1, O) (N, O, I) -> (N, I)
        if needs_c or needs_W:
            p = g.unsqueeze(-1) * a.unsqueeze(-2)  # (N, O, 1) (N, 1, I) -> (N, O, I)
            p = p.reshape(*g.shape[:-1], W2.shape[0])
            dc = p.matmul(W2) if needs_c else None  # (N, O I) (O I, J) -> (N, J)
            dW = rows(p).mT.matmul(rows(c)).view(W.shape) if needs_W else None  # (O I, N) (N, J) -> (O I, J)
        if needs_b:
            db = rows(g).sum(0)  # (N, O) -> (O,)
        return da, dc, dW, db

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, dc: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
        a, c, W = ctx.saved_tensors
        terms = (
            None if da is None else Bilinear._product(da, c, W),
            None if dc is None else Bilinear._product(a, dc, W),
            None if dW is None else Bilinear._product(a, c, dW),
            None if db is None else db.expand(*a.shape[:-1], -1).clone(),
        )
        first, *rest = (term for term in terms if term is not None)
        return sum(rest, first)

    @staticmethod
    def _weights(c: Tensor, W: Tensor) -> Tensor:
        """sum_j W_oij c_nj: given c, the weights of a linear layer for each example."""
        O, I, J = W.shape
        return c.matmul(W.reshape(O * I, J).mT).reshape(*c.shape[:-1], O, I)  # (N, J) (J, O I) -> (N, O, I)

    @staticmethod
    def _product(a: Tensor, c: Tensor, W: Tensor) -> Tensor:
        """sum_ij a_ni W_oij c_nj."""
        return Bilinear._weights(c, W).matmul(a.unsqueeze(-1)).squeeze(-1)  # (N, O, I) (N, I, 1) -> (N, O)


def rows(x: Tensor) -> Tensor:
    """All axes except the last, flattened into one."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: the last may be 0
