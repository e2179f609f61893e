"""Every property of the contract, on every row of the table."""

from collections.abc import Callable

import pytest
from cases import CASES, IN_PLACE, Case
from properties import ELEMENTWISE_PROPERTIES, PROPERTIES

ROWS = CASES + IN_PLACE
# The first row of each function: what the quick tests hold against every property.
FIRST = {c.name: c for c in reversed(CASES)}


def pairs(properties: tuple[Callable[[Case], None], ...], cases: list[Case]) -> list[object]:
    return [
        pytest.param(p, c, id=f"{p.__name__}-{c}", marks=[pytest.mark.quick] if c is FIRST[c.name] else [])
        for p in properties
        for c in cases
        if p.__name__ not in c.except_for
    ]


@pytest.mark.parametrize(("holds", "case"), pairs(PROPERTIES, ROWS))
def test_contract(holds: Callable[[Case], None], case: Case) -> None:
    holds(case)


@pytest.mark.parametrize(("holds", "case"), pairs(ELEMENTWISE_PROPERTIES, [c for c in ROWS if c.elementwise]))
def test_elementwise_contract(holds: Callable[[Case], None], case: Case) -> None:
    holds(case)


def test_exceptions_name_properties() -> None:
    """A misspelt exception would exempt nothing, and a stale one hides nothing."""
    known = {p.__name__ for p in (*PROPERTIES, *ELEMENTWISE_PROPERTIES)}
    for case in CASES:
        assert set(case.except_for) <= known, case


@pytest.mark.parametrize(
    ("holds", "case"),
    [
        pytest.param(p, c, id=f"{p.__name__}-{c}")
        for p in (*PROPERTIES, *ELEMENTWISE_PROPERTIES)
        for c in ROWS
        if p.__name__ in c.except_for
    ],
)
def test_exceptions_are_needed(holds: Callable[[Case], None], case: Case) -> None:
    """An exempted property really fails, so that an exemption goes when its reason does."""
    with pytest.raises(Exception):  # noqa: B017  (whatever the property raises)
        holds(case)
