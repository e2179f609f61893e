"""The page "Add an activation, add a loss" is followed to the letter, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
TESTS = [
    f"tests/test_{name}.py"
    for name in ("contract", "routes", "execution", "structure", "fused", "docs", "torch_databases")
]


class Edit(NamedTuple):
    """A block of the page, and the file that it goes into."""

    path: str
    block: str

    def make(self, root: Path) -> None:
        path = root / self.path
        text = path.read_text(encoding="utf-8")
        if self.block.startswith(("row(", "*rows(")):
            text = text.replace("CASES = [\n", f"CASES = [\n    {self.block.strip()}\n", 1)
        elif self.path.startswith("tests/"):
            text = text.replace("\nCASES = [", f"\n{self.block}\n\nCASES = [", 1)
        else:
            (name,) = re.findall(r"^(?:class|def) (\w+)", self.block, re.M)
            text = text.replace("__all__ = [", f'__all__ = ["{name}", ', 1) + f"\n\n{self.block}"
        path.write_text(text, encoding="utf-8")


def edits(heading: str) -> list[Edit]:
    """The edits of a section of the page."""
    section = re.split(r"^## ", PAGE, flags=re.M)
    (text,) = [s for s in section if s.startswith(heading)]
    found = []
    for step in text.split("\n### ")[1:]:
        path = re.search(r"`([\w/]+\.py)`", step)
        assert path, step
        found += [Edit(path[1], block) for block in re.findall(r"^```py\n(.*?)^```$", step, re.M | re.S)]
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("manualprop", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(root: Path, names: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on what is named in the copy; pytest's settings put the copy before the installed package."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, "-m", "not slow", "-k", names, *arguments],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_makes_no_more_than_four_edits_of_an_activation_and_five_of_a_loss() -> None:
    assert len({edit.path for edit in edits("An activation")}) == 4
    assert len(edits("A loss")) == 5


def test_the_contract_holds_for_what_the_page_adds(copy: Path) -> None:
    for edit in edits("An activation") + edits("A loss"):
        edit.make(copy)
    names = "(sine or Sine or log_cosh or LogCosh) and not cosine and not Cosine and not routes_page"
    done = run(copy, names, *TESTS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 150  # type: ignore[index]


def test_a_mistake_in_the_rule_is_noticed(copy: Path) -> None:
    for edit in edits("An activation"):
        wrong = edit.block.replace("return torch.cos(x)", "return 1.0001 * torch.cos(x)")
        edit._replace(block=wrong).make(copy)
    done = run(copy, "first_derivative-sine", "tests/test_contract.py")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-3000:]
