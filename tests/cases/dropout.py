"""Rows of dropout."""

from cases._case import Case, real

STORED = {"any_layout": "torch too draws in the order in which the elements are stored"}

# fmt: off
CASES = [
    Case("dropout",    lambda: (real(4, 5),), random=True, keeps_new=3, except_for=STORED),
    Case("dropout",    lambda: (real(4, 5),), {"p": 0.2}, random=True, keeps_new=3, except_for=STORED),
    Case("dropout",    lambda: (real(4, 5),), {"p": 1.0}, random=True, keeps_new=1),
    Case("dropout1d",  lambda: (real(3, 4, 2),), {"p": 0.4}, random=True, keeps_new=2),
    Case("dropout1d",  lambda: (real(6, 2),), {"p": 0.4}, random=True, keeps_new=1, label="no batch"),
    Case("dropout2d",  lambda: (real(3, 4, 2, 2),), {"p": 0.4}, random=True, keeps_new=2),
    Case("dropout3d",  lambda: (real(3, 4, 2, 1, 2),), {"p": 0.4}, random=True, keeps_new=2),
    Case("dropout3d",  lambda: (real(6, 2, 1, 2),), {"p": 0.4}, random=True, keeps_new=1, label="no batch"),
    Case("alpha_dropout", lambda: (real(4, 5),), {"p": 0.3, "training": True}, random=True, keeps_new=3, except_for=STORED),
    Case("feature_alpha_dropout", lambda: (real(3, 4, 2),), {"p": 0.3, "training": True}, random=True, keeps_new=2),
]
# fmt: on
