"""Rows of the linear maps: padding, average pooling, interpolation, pixel shuffles."""

from cases._case import Case, real

NO_BFLOAT16 = {"half_precision_is_as_good_as_torchs": "torch's kernel takes no bfloat16 on the CPU"}

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
    Case("avg_pool3d", lambda: (real(1, 1, 3, 2, 4), (2, 1, 3)), {"stride": 1, "padding": (1, 0, 1)}, except_for=NO_BFLOAT16),
    Case("adaptive_avg_pool1d", lambda: (real(2, 7), 3)),
    Case("adaptive_avg_pool2d", lambda: (real(2, 3, 2, 3), 1)),
    Case("adaptive_avg_pool2d", lambda: (real(1, 2, 5, 3), (2, 4)), label="more and fewer"),
    Case("adaptive_avg_pool2d", lambda: (real(2, 3, 3), (None, 2)), label="one axis kept"),
    Case("adaptive_avg_pool3d", lambda: (real(1, 1, 3, 2, 4), (2, 1, 3))),
    Case("interpolate", lambda: (real(1, 2, 2, 3),), {"scale_factor": 2}),
    Case("interpolate", lambda: (real(1, 1, 5), 7), {"mode": "nearest-exact"}),
    Case("interpolate", lambda: (real(1, 2, 3), 5), {"mode": "linear"}),
    Case("interpolate", lambda: (real(1, 1, 3, 4), (6, 3)), {"mode": "bilinear"}),
    Case("interpolate", lambda: (real(1, 1, 3, 4), (5, 2)), {"mode": "bilinear", "align_corners": True}),
    Case("interpolate", lambda: (real(1, 1, 4, 5),), {"mode": "bicubic", "scale_factor": (1.3, 0.7)}),
    Case("interpolate", lambda: (real(1, 1, 2, 3, 2), (3, 2, 4)), {"mode": "trilinear"}),
    Case("interpolate", lambda: (real(1, 1, 5, 3), (2, 4)), {"mode": "area"}),
    Case("interpolate", lambda: (real(1, 1, 7, 3), (3, 4)), {"mode": "bilinear", "antialias": True}, except_for=NO_BFLOAT16),
    Case("interpolate", lambda: (real(1, 1, 7, 3), (3, 4)), {"mode": "bicubic", "antialias": True}, except_for=NO_BFLOAT16),
    Case("pixel_shuffle", lambda: (real(1, 8, 1, 2), 2)),
    Case("pixel_unshuffle", lambda: (real(2, 4, 6), 2)),
]
# fmt: on
