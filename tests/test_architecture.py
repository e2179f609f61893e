"""The page on architecture names what is there: every dotted name that it mentions is imported."""

import importlib
import re
from pathlib import Path

import pytest

import manualprop

ROOT = Path(manualprop.__file__).parent
PAGE = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(manualprop(?:\.\w+)+)", PAGE)))
TREE = re.search(r"^manualprop/\n(.*?)^```", PAGE, re.M | re.S)


def found(name: str) -> object:
    """The module, or what a module holds under the rest of the name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_names_is_there(name: str) -> None:
    assert found(name) is not None


def test_the_page_names_much() -> None:
    assert len(NAMES) > 25
    with pytest.raises(AttributeError):
        found("manualprop.functions._rule.Rule.no_such_thing")


def test_the_tree_is_that_of_the_package() -> None:
    assert TREE
    told = set(re.findall(r"^  (\w+(?:/|\.py))", TREE[1], re.M)) | {"_splitting.py"}
    there = {p.name + "/" for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert {name for name in told if name.endswith("/")} == there
    assert all((ROOT / name).exists() for name in told)
