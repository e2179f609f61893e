"""docs/practice.md and docs/lesson.ipynb are run: what a command prints on the page, and every cell in its order."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import manualprop
from manualprop import _command, _invocation
from manualprop._practice._exercises import EXERCISES

DOCS = Path(__file__).parent.parent / "docs"
LESSON = json.loads((DOCS / "lesson.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in LESSON["cells"] if cell["cell_type"] == "code"]
OF_THE_LESSON = ("linear", "tanh", "cross_entropy")

# ----- the page -----


def replayed(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """Each command of a page with what it prints there, and what it prints here.  A class of Python goes to the file."""
    found = []
    file = folder / "practice" / "tanh.py"
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", page, re.M | re.S):
        attempt = re.search(r"^class Tanh\(.*", block, re.M | re.S)
        if kind == "python":
            if attempt:
                head, _, rest = file.read_text().partition("class Tanh(")
                file.write_text(f"{head}{attempt[0]}\n\ndef test_{rest.partition('def test_')[2]}")
            continue
        for command, expected in re.findall(r"^\$ manualprop (.*?)\n(.*?)(?=^\$|\Z)", block, re.M | re.S):
            capsys.readouterr()
            _command.main(command.split())
            found.append((command, expected, capsys.readouterr().out))
    return found


def test_the_page_shows_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(_invocation.COMMAND, "manualprop")
    commands = replayed((DOCS / "practice.md").read_text(), tmp_path, capsys)
    assert [c.split()[1:2] for c, _, _ in commands] == [
        ["start"], ["check"], ["hint"], ["hint"], ["hint"], ["check"], ["solution"], []
    ]  # fmt: skip
    for command, expected, printed in commands:
        assert printed == expected, command


def test_the_pages_count_the_attempts_that_there_are() -> None:
    from practice_attempts import ATTEMPTS

    said = re.search(r"more than (\d+) wrong attempts", (DOCS / "teaching.md").read_text())
    assert said and int(said[1]) < len(ATTEMPTS)


# ----- the lesson -----


def run(cells: list[str]) -> dict[str, Any]:
    """Run cells in their order in one namespace, as a notebook does; the last expression of each is shown."""
    names: dict[str, Any] = {"__name__": "__main__", "shown": []}
    for cell in cells:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            assert isinstance(last, ast.Expr)
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            names["shown"].append(value)
    return names


def solved(cell: str) -> str:
    """A cell of an exercise with its dots filled in."""
    for name in OF_THE_LESSON:
        if f"class {EXERCISES[name].entry}(" in cell:
            return EXERCISES[name].solved()
    return cell


def test_the_lesson_asks_what_the_exercises_ask() -> None:
    for name in OF_THE_LESSON:
        exercise = EXERCISES[name]
        code = next(cell for cell in CELLS if f"class {exercise.entry}(" in cell)
        assert code in exercise.template() and "..." in code
    assert LESSON["nbformat"] == 4 and not any(c.get("outputs") for c in LESSON["cells"])


def test_the_lesson_runs_as_it_is_handed_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing raises while dots are left, and the marks say so."""
    names = run(CELLS)
    assert [mark.verdict for mark in names["marks"]] == ["not finished"] * 3
    out = capsys.readouterr().out
    assert out.count("not finished") == 6 and EXERCISES["linear"].hints[0] in out


def test_the_lesson_runs_once_it_is_solved(capsys: pytest.CaptureFixture[str]) -> None:
    names = run([solved(cell) for cell in CELLS])
    assert all(mark.right for mark in names["marks"])
    assert names["losses"][-1] < 0.35 * names["losses"][0]
    page = names["found"]
    assert page is names["shown"][0] and "&lt;/html&gt;" in page._repr_html_()
    assert "the loss falls from" in capsys.readouterr().out


def test_a_mark_has_three_hints() -> None:
    mark = manualprop._practice.Mark("tanh", "wrong")
    assert mark.hint(3) == EXERCISES["tanh"].hints[2]
    with pytest.raises(ValueError, match=r"step must be from 1 to 3. Got 4"):
        mark.hint(4)
