"""Rows of the linear maps: padding and average pooling."""

from cases._case import Case, real

# fmt: off
CASES = [
    Case("pad", lambda: (real(2, 3), (1, 2))),
    Case("pad", lambda: (real(2, 2, 3), (1, -1, -1, 2)), {"value": 0.7}),
    Case("pad", lambda: (real(2, 4), (2, 3)), {"mode": "reflect"}, label="one axis"),
    Case("pad", lambda: (real(1, 2, 3, 3), (2, 1, 1, 2)), {"mode": "reflect"}),
    Case("pad", lambda: (real(1, 2, 3, 2), (2, 0, -1, 2)), {"mode": "replicate"}),
    Case("pad", lambda: (real(1, 2, 3, 3), (2, 1, -1, 2)), {"mode": "circular"}),
    Case("pad", lambda: (real(1, 1, 2, 2, 2), (1, 0, 1, 1, 0, 1)), {"mode": "replicate"}, label="three axes"),
    Case("avg_pool1d", lambda: (real(2, 7), 3), {"stride": 2, "padding": 1}),
    Case("avg_pool1d", lambda: (real(1, 2, 5), 2), {"ceil_mode": True}),
    Case("avg_pool2d", lambda: (real(1, 2, 4, 6), 2)),
    Case("avg_pool2d", lambda: (real(1, 2, 5, 4), (3, 2)), {"stride": (2, 1), "padding": 1}),
    Case("avg_pool2d", lambda: (real(1, 1, 5, 4), 3), {"stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
    Case("avg_pool2d", lambda: (real(2, 5, 5), 2), {"stride": 3, "divisor_override": 3}),
    Case("avg_pool3d", lambda: (real(1, 1, 3, 2, 4), (2, 1, 3)), {"stride": 1, "padding": (1, 0, 1)}, except_for={"half_precision_is_as_good_as_torchs": "torch's kernel takes no bfloat16 on the CPU"}),
    Case("adaptive_avg_pool1d", lambda: (real(2, 7), 3)),
    Case("adaptive_avg_pool2d", lambda: (real(2, 3, 2, 3), 1)),
    Case("adaptive_avg_pool2d", lambda: (real(1, 2, 5, 3), (2, 4)), label="more and fewer"),
    Case("adaptive_avg_pool2d", lambda: (real(2, 3, 3), (None, 2)), label="one axis kept"),
    Case("adaptive_avg_pool3d", lambda: (real(1, 1, 3, 2, 4), (2, 1, 3))),
]
# fmt: on
