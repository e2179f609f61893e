"""The table every test is derived from: one row for each configuration of a function.

To add a function, add rows to the file of its family, and the family to ``FAMILIES``.  Every property of
``properties.py`` is then tested on them (``test_contract.py``), and a function without a row is named by
``test_structure.py``.  What cannot hold for a row is stated in the row (``except_for``), with its reason.
"""

from cases import (
    activation,
    convolution,
    dropout,
    embedding,
    fused,
    gated,
    linear,
    linear_map,
    loss,
    norm,
    pooling,
)
from cases._case import Case as Case
from cases._case import in_place
from cases._case import real as real

FAMILIES = (
    activation,
    convolution,
    dropout,
    embedding,
    fused,
    gated,
    linear,
    linear_map,
    loss,
    norm,
    pooling,
)
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]
IN_PLACE: list[Case] = [in_place(case) for case in CASES if case.can_be_in_place]
