r"""Hand-derived rule of the linear layer.

Shape legend
    N   batch: any number of leading axes, flattened where a sum over them is taken
    I   in_features           O   out_features
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from manualprop.functions._rule import Rule


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
        return F.linear(x, W, b)  # (N, I) (I, O) + (O,) -> (N, O): multiply by weights, add biases

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, W, _ = inputs
        needs_x, needs_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_W else None, W if needs_x else None)
        ctx.save_for_forward(x, W)

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
    def add_weight_gradient(into: Tensor, g: Tensor, x: Tensor, keep: float, scale: float) -> None:
        """``into <- keep * into + scale * dL/dW``, one product in place: dW itself is never stored."""
        into.addmm_(rows(g).t(), rows(x), beta=keep, alpha=scale)  # (O, N) (N, I) -> (O, I)

    @staticmethod
    def add_bias_gradient(into: Tensor, g: Tensor, scale: float) -> None:
        """``into <- into + scale * dL/db``."""
        into.add_(g.view(-1) if g.numel() == into.numel() else rows(g).sum(0), alpha=scale)  # (N, O) -> (O,)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        terms = (
            None if dx is None else F.linear(dx, W),
            None if dW is None else F.linear(x, dW),
            None if db is None else db.expand(*x.shape[:-1], -1),
        )
        first, *rest = (term for term in terms if term is not None)
        return sum(rest, first)


def rows(x: Tensor) -> Tensor:
    """Every axis but the last flattened into one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
