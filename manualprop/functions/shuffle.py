r"""Hand-derived rules of the pixel shuffles: permutations, whose adjoint is their inverse.

Shape legend
    C   channels         H, W   height and width         r   the factor of both
"""

from torch import Tensor
from torch.nn import functional as F

from manualprop.functions._execution._axes import Like
from manualprop.functions.linear_map import LinearMap

__all__ = ["PixelShuffle", "PixelUnshuffle"]


class PixelShuffle(LinearMap):
    r"""$y_{c, ir+a, jr+b} = x_{cr^2 + ar + b, i, j}$: $r^2$ channels become the pixels of one $r$ times finer

    Derivation
        Every element of x is in one place of y: A is a permutation, so A^T A = 1 and A^T = A^{-1}.
        dL/dx_{cr^2 + ar + b, i, j} = g_{c, ir+a, jr+b}            so dx is g unshuffled
    Second order
        dx is linear in g; its adjoint is this shuffle.
    Shape
        x (..., C r^2, H, W) -> y (..., C, H r, W r)
    Memory
        Nothing but the shape of x.
    Accuracy
        Exact.
    Reference
        Shi et al., 2016, https://arxiv.org/abs/1609.05158
    """

    @staticmethod
    def f(x: Tensor, r: int) -> Tensor:
        return F.pixel_shuffle(x, r)

    @staticmethod
    def transposed(g: Tensor, like: Like, r: int) -> Tensor:
        return F.pixel_unshuffle(g, r)


class PixelUnshuffle(LinearMap):
    r"""$y_{cr^2 + ar + b, i, j} = x_{c, ir+a, jr+b}$: the inverse of :class:`PixelShuffle`

    Derivation
        A is a permutation, so A^T = A^{-1}.
        dL/dx_{c, ir+a, jr+b} = g_{cr^2 + ar + b, i, j}            so dx is g shuffled
    Second order
        dx is linear in g; its adjoint is this unshuffle.
    Shape
        x (..., C, H r, W r) -> y (..., C r^2, H, W)
    Memory
        Nothing but the shape of x.
    Accuracy
        Exact.
    """

    @staticmethod
    def f(x: Tensor, r: int) -> Tensor:
        return F.pixel_unshuffle(x, r)

    @staticmethod
    def transposed(g: Tensor, like: Like, r: int) -> Tensor:
        return F.pixel_shuffle(g, r)
