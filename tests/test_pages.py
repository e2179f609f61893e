"""The pages are run: the Python blocks of the README and of docs/, each page from top to bottom."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SYBIL = Sybil(parsers=[PythonCodeBlockParser()])


# A page is one test: its blocks build on each other, and xdist would deal them out to several processes.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_runs(page: Path) -> None:
    for example in SYBIL.parse(page).examples():
        example.evaluate()


def test_pages_have_blocks_and_a_wrong_one_fails(tmp_path: Path) -> None:
    assert sum(len(list(SYBIL.parse(page).examples())) for page in PAGES) > 5
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        test_the_page_runs(page)
