"""The local response norm with the name, signature and defaults of :mod:`torch.nn.functional`."""

from torch import Tensor
from torch.nn import functional as torch_F

from manualprop import functions as rules
from manualprop.functional._checks import refuse_complex

__all__ = ["local_response_norm"]


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Like :func:`torch.nn.functional.local_response_norm`, by :class:`manualprop.functions.LocalResponseNorm`.

    Args:
        size: the number of neighbouring channels of the mean, at least 1.

    Shape:
        ``input`` (N, C, ...) with at least three axes -> the same
    """
    refuse_complex("local_response_norm", input)
    if input.dim() < 3 or input.numel() == 0:
        return torch_F.local_response_norm(input, size, alpha, beta, k)  # raises, or returns its input
    output: Tensor = rules.LocalResponseNorm.apply(input, size, alpha, beta, k)
    return output
