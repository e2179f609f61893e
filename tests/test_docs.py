"""The generated pages: what accuracy.md claims is tested point by point; routes.md marks what fails."""

from pathlib import Path
from typing import Any

import build_docs
import pytest
import torch
from cases import CASES, Case
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("dtype", build_docs.DTYPES)
@pytest.mark.parametrize("name", build_docs.EXACT)
def test_never_worse_than_twice_torchs_plus_one_unit(name: str, dtype: str) -> None:
    for order in range(3):
        ours, torchs = build_docs.worst_pair(name, dtype, order)
        assert not build_docs.breaks_the_claim(ours, torchs), (order, ours, torchs)


def test_every_elementwise_function_has_an_exact_one() -> None:
    covered = {name.partition(" ")[0] for name in build_docs.EXACT} | set(build_docs.WITHOUT_DEFAULTS)
    assert {c.name for c in CASES if c.elementwise} == covered


def test_the_claim_can_be_broken() -> None:
    assert build_docs.breaks_the_claim(3.1, 1.0) and not build_docs.breaks_the_claim(3.0, 1.0)
    assert build_docs.breaks_the_claim(None, 1.0) and not build_docs.breaks_the_claim(9.0, None)
    assert not build_docs.breaks_the_claim(9.0, float("inf")), "torch is NaN"
    assert "!" in build_docs._cell(3.1, 1.0)


def test_torchs_poor_places_are_found() -> None:
    places = {row[0] for row in build_docs.poor_places()}
    assert {"logsigmoid `f''`", "gelu `f'`"} <= places
    assert build_docs._cell(*build_docs.worst_pair("mish", "float32", 2)).endswith("/ NaN")
    assert "torch 0.25 in reverse mode and 1 in forward mode" in build_docs.prelu_at_zero()


class Planted(Case):
    """A row whose function of ours is wrong, or raises."""

    def __call__(self, *arguments: Any) -> Tensor:
        if self.label == "raises":
            raise ValueError("no")
        result: Tensor = 2 * torch.tanh(*arguments)
        return result


def planted(label: str) -> Case:
    right = next(c for c in CASES if c.name == "tanh")
    return Planted("tanh", right.arguments, label=label)


def test_a_wrong_and_a_raising_cell_are_shown() -> None:
    wrong = "".join(build_docs.routes_page({"tanh": planted("wrong")}, compiled=False))
    assert "| `tanh` | **wrong** | **wrong** |" in wrong
    raises = "".join(build_docs.routes_page({"tanh": planted("raises")}, compiled=False))
    assert "| `tanh` | **ValueError** |" in raises


def test_the_routes_page_holds_every_function_and_route() -> None:
    page = (ROOT / "docs" / "routes.md").read_text()
    for name in build_docs.rows_to_run():
        assert f"| `{name}` |" in page, f"{name} is not in docs/routes.md: python3 scripts/run.py docs routes"
    for _, family in build_docs.FAMILIES.values():
        assert all(f" {route} |" in page for route in family)
    assert "**wrong**" not in page


def test_the_accuracy_page_is_up_to_date_in_its_rows() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text()
    assert all(page.count(f"| {name} |") == len(build_docs.DTYPES) for name in build_docs.EXACT)
    assert " ! |" not in page
