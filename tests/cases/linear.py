"""Rows of the linear maps."""

from cases._case import Case, real

# fmt: off
CASES = [
    Case("linear", lambda: (real(4, 3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1)),
    Case("linear", lambda: (real(4, 3), real(5, 3, seed=1)), keeps=(0, 1), label="no bias"),
    Case("linear", lambda: (real(3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1), label="one vector"),
    Case("linear", lambda: (real(2, 2, 3), real(5, 3, seed=1), real(5, seed=2)), keeps=(0, 1), label="two batch axes"),
    Case("linear", lambda: (real(4, 3), real(3, seed=1)), keeps=(0, 1), label="one row"),
]
# fmt: on
