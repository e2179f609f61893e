"""Rows of the activations with a second argument."""

from cases._case import Case, real

HALF = {"half_precision_is_as_good_as_torchs": "torch has no rrelu in training for float16, nor have we"}
DRAWN = "in half precision the slopes are rounded before the product"
TORCH = {
    "extremes_stay_finite": "torch has no vmap of rrelu to compare with",
    "keeps_the_memory_format": "torch's rrelu loses it, ours keeps it",
}

# fmt: off
CASES = [
    Case("prelu", lambda: (real(3, 5, low=-3.31), real(1, low=0.3, seed=1)), keeps=(0, 1), label="one slope"),
    Case("prelu", lambda: (real(3, 5, low=-3.31), real(5, low=-0.4, high=1.2, seed=1)), keeps=(0, 1)),
    Case("prelu", lambda: (real(2, 3, 4, low=-3.31), real(3, low=-0.4, high=1.2, seed=1)), keeps=(0, 1), label="channels"),
    Case("prelu", lambda: (real(5, low=-3.31), real(1, low=0.3, seed=1).detach().sum().requires_grad_()), keeps=(0, 1), label="0-d slope"),
    Case("rrelu", lambda: (real(4, 5, low=-3.31),), {"training": True}, random=True, keeps=("output",), keeps_new=20 * 8, another_form=DRAWN, except_for=HALF),
    Case("rrelu", lambda: (real(4, 5, low=-3.31),), {"training": True, "lower": -0.3, "upper": 1.4}, random=True, keeps=("output",), keeps_new=20 * 8, another_form=DRAWN, except_for=HALF),
    Case("rrelu", lambda: (real(4, 5, low=-3.31),), elementwise=True, keeps=("output",), kinks={0.0: (1 / 8 + 1 / 3) / 2}, except_for=TORCH, exact="random in training, leaky_relu otherwise"),
    Case("rrelu", lambda: (real(4, 5, low=-3.31),), {"lower": -0.7, "upper": 0.1}, elementwise=True, keeps=(0,), kinks={0.0: -0.3}, except_for=TORCH),
    Case("glu",   lambda: (real(3, 6),), keeps=(0,)),
    Case("glu",   lambda: (real(4, 3, 2),), {"dim": 0}, keeps=(0,)),
]
# fmt: on
