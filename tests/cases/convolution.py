"""Rows of the convolutions."""

import torch.nn.functional as torch_F
from torch import Tensor

from cases._case import Case, real


def same_of_torch(x: Tensor, W: Tensor, padding: str) -> Tensor:
    """torch's padding="same" with an even kernel, without its warning that it makes a padded copy."""
    return torch_F.conv1d(torch_F.pad(x, (0, 1)), W)


# fmt: off
CASES = [
    Case("conv1d", lambda: (real(2, 4, 7), real(4, 2, 2, seed=1), real(4, seed=2)), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}, keeps=(0, 1)),
    Case("conv1d", lambda: (real(2, 6), real(3, 2, 2, seed=1)), {"padding": "same"}, keeps=(0, 1), label="unbatched", reference=same_of_torch),
    Case("conv2d", lambda: (real(2, 3, 4, 4), real(2, 3, 3, 2, seed=1), real(2, seed=2)), {"padding": (1, 0)}, keeps=(0, 1)),
    Case("conv2d", lambda: (real(2, 2, 4, 4), real(4, 1, 3, 3, seed=1)), {"padding": 1, "groups": 2}, keeps=(0, 1), label="depthwise"),
    Case("conv2d", lambda: (real(2, 3, 2, 3), real(2, 3, 1, 1, seed=1), real(2, seed=2)), keeps=(0, 1), label="1x1"),
    Case("conv3d", lambda: (real(1, 2, 3, 3, 2), real(2, 2, 2, 2, 1, seed=1), real(2, seed=2)), keeps=(0, 1)),
    Case("conv_transpose1d", lambda: (real(2, 2, 3), real(2, 1, 2, seed=1), real(1, seed=2)), {"dilation": 2, "output_padding": 1}, keeps=(0, 1)),
    Case("conv_transpose2d", lambda: (real(1, 4, 2, 3), real(4, 1, 2, 2, seed=1), real(2, seed=2)), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, keeps=(0, 1)),
    Case("conv_transpose3d", lambda: (real(1, 2, 2, 2, 2), real(2, 2, 2, 1, 2, seed=1)), {"stride": (1, 2, 1)}, keeps=(0, 1)),
]
# fmt: on
