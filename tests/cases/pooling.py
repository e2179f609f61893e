"""Rows of the pools that are not linear."""

import torch
from torch import Tensor

from cases._case import Case, real


def positive(*shape: int) -> Tensor:
    return real(*shape, low=0.4, high=1.9)


def places(*shape: int, of: int) -> Tensor:
    """Distinct places in every row of ``of`` places."""
    generator = torch.Generator().manual_seed(3)
    *lead, count = (*shape[:2], torch.Size(shape[2:]).numel())
    rows = [torch.randperm(of, generator=generator)[:count] for _ in range(torch.Size(lead).numel())]
    return torch.stack(rows).reshape(shape)


def kept(outputs: int) -> int:
    """Bytes of the places."""
    return 8 * outputs


# fmt: off
CASES = [
    Case("max_pool1d", lambda: (real(2, 2, 7), 3), {"stride": 2, "padding": 1}, keeps_new=kept(16)),
    Case("max_pool1d", lambda: (real(2, 8), (2,)), {"dilation": 3, "ceil_mode": True}, keeps_new=kept(6)),
    Case("max_pool2d", lambda: (real(2, 2, 4, 5), 2), keeps_new=kept(16)),
    Case("max_pool2d", lambda: (real(2, 2, 5, 4), 3), {"stride": 1, "padding": 1}, keeps_new=kept(80)),
    Case("max_pool2d", lambda: (real(2, 6, 5), (2, 3)), {"stride": (2, 1), "dilation": (2, 1), "ceil_mode": True}, keeps_new=kept(18)),
    Case("max_pool3d", lambda: (real(1, 2, 4, 3, 4), 2), {"stride": (2, 1, 2), "padding": (1, 0, 0)}, keeps_new=kept(24)),
    Case("adaptive_max_pool1d", lambda: (real(2, 2, 7), 3), keeps_new=kept(12)),
    Case("adaptive_max_pool2d", lambda: (real(2, 2, 5, 4), (3, None)), keeps_new=kept(48)),
    Case("adaptive_max_pool3d", lambda: (real(1, 2, 4, 3, 3), 2), keeps_new=kept(16)),
    Case("fractional_max_pool2d", lambda: (real(2, 2, 6, 5), 2), {"output_size": (3, 2)}, keeps_new=kept(24), random=True),
    Case("fractional_max_pool3d", lambda: (real(2, 4, 5, 4), 2), {"output_ratio": 0.5}, keeps_new=kept(16), random=True),
    Case("max_unpool1d", lambda: (real(2, 2, 3), places(2, 2, 3, of=6), 2), keeps=(1,)),
    Case("max_unpool2d", lambda: (real(2, 2, 2, 3), places(2, 2, 2, 3, of=35), (2, 2)), {"output_size": (5, 7)}, keeps=(1,)),
    Case("max_unpool3d", lambda: (real(1, 2, 2, 2, 2), places(1, 2, 2, 2, 2, of=64), 2), keeps=(1,)),
    Case("lp_pool1d", lambda: (positive(2, 2, 7), 3, 3), {"stride": 2}, keeps=(0, "output")),
    Case("lp_pool2d", lambda: (real(2, 2, 4, 5), 2.0, 2), keeps=(0, "output")),
    Case("lp_pool2d", lambda: (positive(2, 5, 7), 1.5, (3, 2)), {"stride": (1, 3), "ceil_mode": True}, keeps=(0, "output")),
    Case("lp_pool2d", lambda: (real(2, 2, 4, 5), torch.inf, 2), keeps=(0,), keeps_new=kept(16)),
    Case("lp_pool3d", lambda: (positive(1, 2, 3, 4, 3), 3.0, 2), {"ceil_mode": True}, keeps=(0, "output"), except_for={"half_precision_is_as_good_as_torchs": "torch has no kernel for half precision; ours computes in float32"}),
]
# fmt: on
