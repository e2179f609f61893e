"""`manualprop practice`: what is done, start, check, hint, solution, and the table of a class."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_practice import written

from manualprop import _command, _invocation, _practice_command
from manualprop._practice import Mark
from manualprop._practice._child import LIMIT
from manualprop._practice._exercises import EXERCISES
from manualprop._practice._progress import Progress

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(_invocation.COMMAND, "manualprop")
    yield


def told(capsys: Capture, *words: str, status: int = 0) -> str:
    """What the command prints: on standard output, or of a mistake on the other."""
    assert _command.main(["practice", *words]) == status
    out, err = capsys.readouterr()
    return err if status == 2 else out


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if f" {name} " in line)


def test_from_the_list_to_the_solution(capsys: Capture, tmp_path: Path) -> None:
    text = told(capsys)
    assert all(f" {name} " in text for name in EXERCISES) and text.splitlines()[0].startswith(" 1  linear")
    assert text.endswith("0 of 18 are right. Next: manualprop practice start linear\n")

    assert "practice/tanh.py is written" in told(capsys, "start", "tanh")
    file = tmp_path / "practice" / "tanh.py"
    assert file.read_text() == EXERCISES["tanh"].template()
    assert row(told(capsys), "tanh").endswith("started")
    assert told(capsys, "check", "tanh", status=1).startswith("tanh: not started")
    assert "comes after an attempt" in told(capsys, "solution", "tanh", status=2)

    written(tmp_path / "practice", "tanh", "torch.tanh(x) ** 2 -> torch.tanh(x)")
    mark = told(capsys, "check", "tanh", status=1)
    assert mark.startswith("tanh: wrong\n") and "a factor of its own" in mark
    assert "wrong: a factor of its own" in row(told(capsys), "tanh")
    assert "Derivation" in told(capsys, "solution", "tanh")

    written(tmp_path / "practice", "tanh")
    assert row(told(capsys), "tanh").endswith("changed since it was marked (wrong)")
    assert told(capsys, "check") == "tanh: right\n"
    text = told(capsys)
    assert row(text, "tanh").endswith("right") and "1 of 18 are right." in text


def test_start_takes_the_next_and_overwrites_nothing(capsys: Capture, tmp_path: Path) -> None:
    assert "mine/linear.py is written" in told(capsys, "start", "--folder", "mine")
    assert "mine/sigmoid.py is written" in told(capsys, "--folder", "mine", "start")
    (tmp_path / "mine" / "linear.py").write_text("mine")
    assert "is there, and is left as it is" in told(capsys, "start", "linear", "--folder", "mine", status=2)
    assert (tmp_path / "mine" / "linear.py").read_text() == "mine"
    for name in EXERCISES:
        (tmp_path / "mine" / f"{name}.py").touch()
    assert "every exercise has been started" in told(capsys, "start", "--folder", "mine", status=2)


def test_three_hints_one_after_the_other(capsys: Capture) -> None:
    hints = EXERCISES["softmax"].hints
    for number, hint in ((1, hints[0]), (2, hints[1]), (3, hints[2]), (3, hints[2])):
        assert told(capsys, "hint", "softmax") == f"Hint {number} of 3\n{hint}\n"


def test_a_class_is_marked_into_a_table(capsys: Capture, tmp_path: Path) -> None:
    folder = tmp_path / "handed_in"
    written(folder / "anna", "tanh")
    written(folder / "ben", "tanh", "torch.tanh(x) ** 2) -> torch.tanh(x) ** 2")
    written(folder, "relu", "(x > 0) -> (x >= 0)", file="carl_relu.py")
    (folder / "what.py").write_text("x = 1\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "relu.py").write_text("")
    text = told(capsys, "check", "handed_in", "--csv", "marks.csv")
    assert "1 of 4 are right. The marks are in marks.csv." in text
    with (tmp_path / "marks.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["file", "exercise", "mark", "how"],
        ["handed_in/anna/tanh.py", "tanh", "right", ""],
        ["handed_in/ben/tanh.py", "tanh", "error", "SyntaxError: '(' was never closed"],
        ["handed_in/carl_relu.py", "relu", "wrong", "wrong only at ties and kinks"],
        ["handed_in/what.py", "", "error", "of which exercise is it?"],
    ]
    assert not list(folder.rglob(".marks.json")), "a teacher's folder is left as it is"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["check"], "there is nothing to mark. Begin with: manualprop practice start"),
        (["check", "tanh"], "tanh must be started first"),
        (["check", "tanhh"], "there is no exercise 'tanhh'. Did you mean 'tanh'?"),
        (["check", "mine.py"], "mine.py must say of which exercise it is"),
        (["check", "--time-limit", "0"], "--time-limit must be positive. Got 0."),
        (["check", "mine.py", "--csv", "no/marks.csv"], "no/marks.csv cannot be written"),
        (["start", "conv"], "there is no exercise 'conv'. There are linear, sigmoid,"),
        (["start", "--folder", "mine.py/x"], "cannot be written"),
        (["hint"], "the following arguments are required: NAME"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys: Capture, tmp_path: Path, words: list[str], text: str) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    said = told(capsys, *words, status=2)
    assert said.startswith("manualprop: practice: ") and text in said and said.count("\n") == 1


def test_help_says_what_there_is(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        _command.main(["practice", "--help"])
    out = capsys.readouterr().out
    assert "practice start tanh" in out and "--csv" in out and "exit status" in out
    assert max(map(len, out.splitlines())) <= 90
    limit = _practice_command._parser().parse_args(["check"]).time_limit
    assert limit == LIMIT, "the help, which loads no torch, says the limit once more"


def test_progress_forgives_a_spoiled_file(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    (tmp_path / ".marks.json").write_text("{")
    assert progress.state("tanh") == "" and not progress.attempted("tanh")
    (tmp_path / "tanh.py").write_text("x")
    progress.mark("tanh", Mark("tanh", "first order only", "zero"))
    assert progress.state("tanh") == "first order only" and progress.attempted("tanh")
    progress.mark("tanh", Mark("tanh", "not started"))
    assert progress.attempted("tanh"), "an attempt stays one"
