"""Log-softmax along a short last axis, such as the ten classes of the digits."""

import torch
from torch import Tensor

WIDTH = 16  # float32 numbers in the widest vector of a CPU
ROWS = 32  # fewer rows than these do not repay the copy


def log_softmax(x: Tensor) -> Tensor:
    """``torch.log_softmax(x, -1)`` of x (N, C), which is laid out column by column where that is quicker.

    ATen's kernel works along the axis a vector at a time, and one number at a time where the axis is shorter than
    a vector: 230 us for 1797 rows of 10 against 30 us for the same along the first axis, copy included.
    """
    if x.shape[0] >= ROWS and x.shape[1] < WIDTH and x.is_cpu:
        return torch.log_softmax(x.t().contiguous(), 0).t()
    return torch.log_softmax(x, -1)
