"""Rows of the normalisations."""

import torch
from torch import Tensor

from cases._case import Case, real


def affine(*shape: int) -> tuple[Tensor, Tensor]:
    return real(*shape, low=0.4, high=1.9, seed=1), real(*shape, seed=2)


def running(count: int) -> tuple[Tensor, Tensor]:
    return (
        torch.linspace(-0.4, 0.7, count, dtype=torch.float64),
        torch.linspace(0.6, 2.1, count, dtype=torch.float64),
    )


# fmt: off
CASES = [
    Case("layer_norm",    lambda: (real(4, 5), [5], *affine(5)), keeps=(0, 2), keeps_new=2 * 4 * 8),
    Case("layer_norm",    lambda: (real(4, 5), [5], affine(5)[0]), keeps=(0, 2), keeps_new=2 * 4 * 8, label="no bias"),
    Case("layer_norm",    lambda: (real(4, 5), [5], None, affine(5)[1]), keeps=(0,), keeps_new=2 * 4 * 8, label="no weight"),
    Case("layer_norm",    lambda: (real(4, 5), [5]), {"eps": 0.1}, keeps=(0,), keeps_new=2 * 4 * 8),
    Case("layer_norm",    lambda: (real(2, 3, 2, 3), [2, 3], *affine(2, 3)), keeps=(0, 2), keeps_new=2 * 6 * 8, label="two axes"),
    Case("layer_norm",    lambda: (real(5), [5], *affine(5)), keeps=(0, 2), keeps_new=2 * 8, label="one vector"),
    Case("rms_norm",      lambda: (real(4, 5), [5], affine(5)[0]), keeps=(0, 2), keeps_new=4 * 8),
    Case("rms_norm",      lambda: (real(4, 5), [5]), {"eps": 0.1}, keeps=(0,), keeps_new=4 * 8),
    Case("rms_norm",      lambda: (real(2, 3, 2, 3), [2, 3], affine(2, 3)[0]), keeps=(0, 2), keeps_new=6 * 8, label="two axes"),
    Case("group_norm",    lambda: (real(2, 6, 3), 3, *affine(6)), keeps=(0, 2), keeps_new=2 * 6 * 8),
    Case("group_norm",    lambda: (real(2, 6, 2, 2), 2, affine(6)[0]), keeps=(0, 2), keeps_new=2 * 4 * 8, label="no bias"),
    Case("group_norm",    lambda: (real(3, 6), 2), {"eps": 0.1}, keeps=(0,), keeps_new=2 * 6 * 8),
    Case("batch_norm",    lambda: (real(5, 4), None, None, *affine(4)), {"training": True}, keeps=(0, 3), keeps_new=2 * 4 * 8),
    Case("batch_norm",    lambda: (real(3, 4, 2), None, None, *affine(4)), {"training": True, "eps": 0.1}, keeps=(0, 3), keeps_new=2 * 4 * 8),
    Case("batch_norm",    lambda: (real(2, 4, 2, 3), None, None), {"training": True}, keeps=(0,), keeps_new=2 * 4 * 8, label="no weight"),
    Case("batch_norm",    lambda: (real(5, 4), *running(4), *affine(4)), keeps=(0, 1, 2, 3)),
    Case("batch_norm",    lambda: (real(2, 4, 3), *running(4), affine(4)[0]), {"eps": 0.1}, keeps=(0, 1, 2, 3)),
    Case("batch_norm",    lambda: (real(2, 4, 3), *running(4)), keeps=(1, 2), label="no weight"),
    Case("instance_norm", lambda: (real(2, 4, 3), None, None, *affine(4)), keeps=(0,), keeps_new=3 * 8 * 8),
    Case("instance_norm", lambda: (real(2, 4, 3, 2),), {"eps": 0.1}, keeps=(0,), keeps_new=2 * 8 * 8),
    Case("instance_norm", lambda: (real(2, 4, 3), *running(4), *affine(4)), {"use_input_stats": False}, keeps=(0,), keeps_new=3 * 8 * 8),
    Case("local_response_norm", lambda: (real(1, 4, 3), 3), {"alpha": 0.5}, keeps=(0,)),
    Case("local_response_norm", lambda: (real(1, 3, 2, 2), 2), {"alpha": 0.5, "beta": 0.4, "k": 2.0}, keeps=(0,), except_for={"half_precision_is_as_good_as_torchs": "torch's kernel takes no bfloat16 on the CPU"}),
]
# fmt: on
