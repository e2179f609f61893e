"""Rows of the linear maps."""

from cases._case import Case, real

# fmt: off
CASES = [
    Case("linear", lambda: (real(4, 3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1)),
    Case("linear", lambda: (real(4, 3), real(5, 3, seed=1)), keeps=(0, 1), label="no bias"),
    Case("linear", lambda: (real(3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1), label="one vector"),
    Case("linear", lambda: (real(2, 2, 3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1), label="two batch axes"),
    Case("linear", lambda: (real(4, 3), real(3, seed=1)), keeps=(0, 1), label="one row"),
    Case("bilinear", lambda: (real(4, 2), real(4, 3, seed=1), real(5, 2, 3, seed=2), real(5, seed=3)), keeps=(0, 1, 2)),
    Case("bilinear", lambda: (real(4, 2), real(4, 3, seed=1), real(5, 2, 3, seed=2)), keeps=(0, 1, 2), label="no bias"),
    Case("bilinear", lambda: (real(2), real(3, seed=1), real(5, 2, 3, seed=2), real(5, seed=3)), keeps=(0, 1, 2), label="one vector"),
    Case("bilinear", lambda: (real(2, 3, 2), real(2, 3, 3, seed=1), real(5, 2, 3, seed=2), real(5, seed=3)), keeps=(0, 1, 2), label="two batch axes"),
]
# fmt: on
