"""Every property of the contract, on every row of the table."""

from collections.abc import Callable

import pytest
import torch
from cases import CASES, IN_PLACE, Case
from properties import ELEMENTWISE_PROPERTIES, PROPERTIES
from special_values import (
    DERIVATIVE_PROPERTIES,
    VALUE_PROPERTIES,
    same_kind,
    second_order_of_some_at_infinities,
)

EVERY = (*PROPERTIES, *VALUE_PROPERTIES, *DERIVATIVE_PROPERTIES, *ELEMENTWISE_PROPERTIES)
# A sum, or no reduction, has the derivatives of the mean but for a factor.
OF_MEANS = [c for c in CASES if c.kwargs.get("reduction") not in ("sum", "none")]

ROWS = CASES + IN_PLACE
# The first row of each function: what the quick tests hold against every property.
FIRST = {c.name: c for c in reversed(CASES)}


# Whose many subsets and points take a second of a block: on the first rows always, on all of them under --full.
COSTLY = (second_order_of_some_at_infinities,)


def marks(holds: Callable[[Case], None], case: Case) -> list[pytest.MarkDecorator]:
    if case is FIRST[case.name]:
        return [pytest.mark.quick]
    return [pytest.mark.slow] if holds in COSTLY else []


def pairs(properties: tuple[Callable[[Case], None], ...], cases: list[Case]) -> list[object]:
    return [
        pytest.param(p, c, id=f"{p.__name__}-{c}", marks=marks(p, c))
        for p in properties
        for c in cases
        if p.__name__ not in c.except_for
    ]


@pytest.mark.parametrize(
    ("holds", "case"),
    [*pairs((*PROPERTIES, *VALUE_PROPERTIES), ROWS), *pairs(DERIVATIVE_PROPERTIES, OF_MEANS)],
)
def test_contract(holds: Callable[[Case], None], case: Case) -> None:
    holds(case)


@pytest.mark.parametrize(("holds", "case"), pairs(ELEMENTWISE_PROPERTIES, [c for c in ROWS if c.elementwise]))
def test_elementwise_contract(holds: Callable[[Case], None], case: Case) -> None:
    holds(case)


def test_exceptions_name_properties() -> None:
    """A misspelt exception would exempt nothing, and a stale one hides nothing."""
    known = {p.__name__ for p in EVERY}
    for case in CASES:
        assert set(case.except_for) <= known, case


@pytest.mark.parametrize(
    ("holds", "case"),
    [pytest.param(p, c, id=f"{p.__name__}-{c}") for p in EVERY for c in ROWS if p.__name__ in c.except_for],
)
def test_exceptions_are_needed(holds: Callable[[Case], None], case: Case) -> None:
    """An exempted property really fails, so that an exemption goes when its reason does."""
    with pytest.raises(Exception):  # noqa: B017  (whatever the property raises)
        holds(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_values_keep_signed_zeros() -> None:
    """NaN, infinities and zeros, with the signs of torch's compiled ones, of all activations in one program."""
    cases = [c for c in CASES if c.elementwise and "value_is_of_torchs_kind" not in c.except_for]
    ends = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 0.3, -0.3, 5.0, -5.0]
    x = torch.tensor([*ends, *(at for c in cases for at in c.kinks)])
    together = torch.compile(lambda z: [(c(z), c.torchs(z)) for c in cases], fullgraph=True)
    for case, (ours, torchs) in zip(cases, together(x), strict=True):
        same_kind(ours, torchs, case)
