"""Rows of the embedding."""

import torch
from torch import Tensor

from cases._case import Case, real

DEFINED = dict.fromkeys(
    ("first_derivative", "forward_mode_is_reverse_mode_at_infinities"),
    "by definition of the option the gradient is not that of the values",
)


def words(*shape: int) -> Tensor:
    return torch.randint(6, shape, generator=torch.Generator().manual_seed(2))


# fmt: off
CASES = [
    Case("embedding", lambda: (words(4), real(6, 3)), keeps=(0,)),
    Case("embedding", lambda: (words(2, 5), real(6, 3)), keeps=(0,), label="two axes"),
    Case("embedding", lambda: (words(), real(6, 3)), keeps=(0,), label="one word"),
    Case("embedding", lambda: (words(2, 5), real(6, 3)), {"padding_idx": -4}, keeps=(0,), except_for=DEFINED),
    Case("embedding", lambda: (words(2, 5), real(6, 3)), {"scale_grad_by_freq": True}, keeps=(0,), except_for=DEFINED | {"second_order_of_an_infinite_gradient_is_torchs": "torch's second derivative leaves the frequencies out"}),
]
# fmt: on
