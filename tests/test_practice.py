"""The exercises: each solution is right, each usual mistake gets a mark that helps, and none tells the answer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from practice_attempts import ATTEMPTS, RIGHT, Attempt

import manualprop
from manualprop._practice import Mark
from manualprop._practice._child import marked_file
from manualprop._practice._exercise import Exercise
from manualprop._practice._exercises import EXERCISES
from manualprop._practice._marking import marked, marked_source
from manualprop._practice._practice import exercise_of

ORDER = (
    "linear sigmoid tanh relu softplus mse softmax cross_entropy network momentum dropout batch_norm layer_norm "
    "embedding convolution max_pool tanh_output gelu_mlp"
)
PARAMETERS = [pytest.param(e, id=name) for name, e in EXERCISES.items()]


def blanks(exercise: Exercise) -> list[str]:
    """What a learner is to find: the right sides of the blank lines."""
    return [found[1] for found in re.finditer(r"^ *\w+ = (.*)  #= ", exercise.code, re.M)]


def rows(attempts: list[Attempt], quick: int) -> list[Any]:
    """The attempts, of which so many at each exercise are quick."""
    seen: Counter[str] = Counter()
    found = []
    for attempt in attempts:
        seen[attempt.exercise] += 1
        marks = [pytest.mark.slow] if seen[attempt.exercise] > quick else []
        found.append(pytest.param(attempt, id=f"{attempt.exercise}-{seen[attempt.exercise]}", marks=marks))
    return found


# ----- the exercises -----


def test_eighteen_exercises_in_their_order() -> None:
    assert list(EXERCISES) == ORDER.split()
    assert all(name == exercise.name for name, exercise in EXERCISES.items())


@pytest.mark.parametrize("exercise", PARAMETERS)
def test_a_solution_is_right_and_what_is_handed_out_is_not_begun(exercise: Exercise) -> None:
    assert marked_source(exercise, f"import torch\n\n{exercise.solved()}\n", "right.py").verdict == "right"
    template = exercise.template()
    assert marked_source(exercise, template, "template.py").verdict == "not started"
    left_out = [line for line in exercise.code.splitlines() if line.endswith("#-")]
    assert "..." in template and exercise.statement.strip() in template
    for line in left_out:
        assert line.removesuffix("#-").rstrip() not in template.splitlines()
    assert not [answer for answer in blanks(exercise) if f"= {answer}  #" in template]


@pytest.mark.parametrize("exercise", PARAMETERS)
def test_the_solution_brings_the_derivation_and_no_marks_of_ours(exercise: Exercise) -> None:
    text = exercise.solution()
    assert exercise.solved() in text and "Derivation" in text and not re.search(r"#[-=+]|#$", text, re.M)
    assert all(f"manualprop.functions.{name}" in text for name in exercise.rules)
    assert len(text.partition("Derivation")[2].splitlines()) > 4


def test_the_derivation_is_that_of_the_rule() -> None:
    text = EXERCISES["tanh"].solution()
    assert "y' = (cosh^2 x - sinh^2 x) / cosh^2 x       quotient rule" in text and "Accuracy" not in text


@pytest.mark.parametrize("exercise", PARAMETERS)
def test_no_hint_is_the_line_that_is_asked_for(exercise: Exercise) -> None:
    assert len(set(exercise.hints)) == 3 and all(len(hint) > 39 for hint in exercise.hints)
    long = [answer for answer in blanks(exercise) if len(answer) > 8]
    assert not [answer for answer in long for hint in exercise.hints if answer in hint]


# ----- attempts -----


def test_every_exercise_has_four_wrong_attempts() -> None:
    count = Counter(a.exercise for a in ATTEMPTS if a.verdict != "right")
    assert set(count) == set(EXERCISES) and min(count.values()) >= 4


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("attempt", rows(ATTEMPTS, quick=4))
def test_a_wrong_attempt_is_told_how_it_is_wrong(attempt: Attempt) -> None:
    exercise = EXERCISES[attempt.exercise]
    mark = marked_source(exercise, attempt.source(), "attempt.py")
    assert mark.verdict == attempt.verdict and not mark.right
    assert re.search(attempt.mark, str(mark)), str(mark)
    assert mark.how and "\n" not in mark.how
    answers = [answer for answer in blanks(exercise) if len(answer) > 8]
    assert not [answer for answer in answers if answer in str(mark)], "the mark tells the answer"


@pytest.mark.parametrize("attempt", rows(RIGHT, quick=1))
def test_another_way_to_the_gradient_is_right_too(attempt: Attempt) -> None:
    mark = marked_source(EXERCISES[attempt.exercise], attempt.source(), "attempt.py")
    assert mark.right, str(mark)


def test_a_forward_that_was_changed_is_told() -> None:
    source = Attempt("tanh", ("return torch.tanh(x) -> return 2 * torch.tanh(x)",), "").source()
    mark = marked_source(EXERCISES["tanh"], source, "attempt.py")
    assert mark.how == "wrong value" and "y is off by up to" in mark.text


def test_what_is_not_there_is_told() -> None:
    mark = marked_source(EXERCISES["tanh"], "x = 1\n", "attempt.py")
    assert mark.verdict == "error" and "must define Tanh" in mark.text


def test_what_is_no_function_of_autograd_is_told() -> None:
    for source in ("class Tanh:\n    pass\n", "def Tanh(x):\n    return x\n"):
        mark = marked_source(EXERCISES["tanh"], source, "attempt.py")
        assert mark.verdict == "error" and "must be a class derived from torch.autograd.Function" in mark.text
    mark = marked_source(EXERCISES["tanh"], "x = 1\x00\n", "attempt.py")
    assert mark.verdict == "error" and "null bytes" in mark.how


def test_more_nones_and_the_newer_form_are_right_too() -> None:
    source = Attempt("tanh", ("return dx -> return dx, None",), "").source()
    assert marked_source(EXERCISES["tanh"], source, "attempt.py").right
    forward = "def forward(ctx, x, W, b):\n        ctx.save_for_backward(x, W)\n        return"
    newer = (
        "def setup_context(ctx, inputs, output):\n        ctx.save_for_backward(*inputs[:2])\n\n"
        "    @staticmethod\n    def forward(x, W, b):\n        return"
    )
    source = Attempt("linear", (f"{forward} -> {newer}",), "").source()
    assert marked_source(EXERCISES["linear"], source, "attempt.py").right
    source = Attempt("linear", (f"{forward} -> {newer}", "dW = x.T @ g"), "").source()
    assert (
        "The gradient of W has shape [4, 3]" in marked_source(EXERCISES["linear"], source, "attempt.py").text
    )


def test_a_class_of_a_notebook_is_marked() -> None:
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    mark = manualprop.practice(Tanh, "tanh")
    assert mark.verdict == "wrong" and "The gradient of x is wrong" in mark.text
    with pytest.raises(ValueError, match="tanh, tanh_output do"):
        manualprop.practice(Tanh)
    with pytest.raises(ValueError, match="Did you mean 'tanh'"):
        manualprop.practice(Tanh, "tanhh")


# ----- files, each in a process of its own -----


def written(folder: Path, name: str, edit: str = "", file: str = "") -> Path:
    """A learner's file, with the blanks filled in and an edit made."""
    head, _, rest = EXERCISES[name].template().partition("import manualprop\n")
    code = Attempt(name, (edit,) if edit else (), "").source().partition("\n\n")[2]
    test = rest[rest.index("def test_") :]
    path = folder / (file or f"{name}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}import manualprop\n\n\n{code}\n\n{test}")
    return path


def test_an_endless_loop_ends_and_its_line_is_shown(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "dx = g; return dx -> while True: pass".partition("; ")[2])
    mark = marked_file("tanh", path, limit=2)
    assert mark.verdict == "gave up" and "does a loop in it never end?" in mark.text
    assert "in backward\n    while True: pass" in mark.text


@pytest.mark.slow
@pytest.mark.parametrize("line", ["import time; time.sleep(1000)", "import signal; signal.pause()"])
def test_waiting_for_ever_ends_too(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, "tanh", f"return dx -> {line}")
    mark = marked_file("tanh", path, limit=1)
    assert mark.verdict == "gave up" and f"in backward\n    {line}" in mark.text


@pytest.mark.slow
def test_a_loop_that_prints_does_not_fill_the_disk(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "return dx -> while True: print('x' * 10_000)")
    mark = marked_file("tanh", path, limit=10)
    assert mark.verdict in ("error", "gave up") and len(mark.printed) <= 2000
    assert mark.how == "OSError: [Errno 27] File too large"


def test_a_crash_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "return dx -> print('so far', flush=True); import os; os.abort()")
    mark = marked_file("tanh", path)
    assert (mark.verdict, mark.how) == ("gave up", "SIGABRT") and "so far" in str(mark)


def test_a_syntax_error_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "torch.tanh(x) ** 2) -> torch.tanh(x) ** 2")
    mark = marked_file("tanh", path)
    pythons = subprocess.run([sys.executable, str(path)], capture_output=True, text=True).stderr
    assert mark.verdict == "error" and mark.how == "SyntaxError: '(' was never closed"
    assert mark.text.rstrip() == pythons.rstrip()
    assert "^" in mark.text


def test_an_exception_is_shown_with_the_learners_lines_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "torch.tanh(x) ** 2 -> torch.tan_h(x)")
    mark = marked_file("tanh", path)
    assert mark.verdict == "error" and mark.how.startswith(
        "AttributeError: module 'torch' has no attribute 'tan_h'"
    )
    assert mark.text.count('File "') == 1 and "dx = g * (1 - torch.tan_h(x))" in mark.text


def test_running_the_file_marks_it(tmp_path: Path) -> None:
    path = written(tmp_path, "tanh", "torch.tanh(x) ** 2 -> torch.tanh(x)")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith("tanh: wrong\n    The gradient of x is wrong."), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", EXERCISES)
def test_pytest_on_the_file_marks_it(tmp_path: Path, name: str) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    right = subprocess.run([*words, written(tmp_path, name)], capture_output=True, text=True)
    assert right.returncode == 0 and "1 passed" in right.stdout, right.stdout
    path = tmp_path / f"{name}.py"
    path.write_text(path.read_text().replace("return ", "return None  # ", 2))
    wrong = subprocess.run([*words, path], capture_output=True, text=True)
    assert wrong.returncode == 1 and f"AssertionError: {name}: " in wrong.stdout, wrong.stdout


def test_which_exercise_a_file_is_of(tmp_path: Path) -> None:
    named = tmp_path / "anna_tanh_output.py"
    named.write_text("import torch\n")
    assert exercise_of(named) == "tanh_output"
    named.write_text('"""Exercise relu: mine."""\n')
    assert exercise_of(named) == "relu"
    other = tmp_path / "anna.py"
    other.write_text("")
    with pytest.raises(ValueError, match="must say of which exercise it is"):
        exercise_of(other)


def test_a_mark_survives_json_and_asserts() -> None:
    mark = Mark("tanh", "wrong", "factor 2", "It is wrong.", "printed\n")
    assert Mark.from_json(mark.to_json()) == mark
    with pytest.raises(AssertionError, match=r"tanh: wrong\n    It is wrong.\n    It printed:\n    printed"):
        mark.assert_right()
    Mark("tanh", "right").assert_right()


def test_templates_are_python(tmp_path: Path) -> None:
    for exercise in EXERCISES.values():
        tree = ast.parse(exercise.template())
        assert (ast.get_docstring(tree) or "").startswith(f"Exercise {exercise.name}: ")


def test_marked_asks_everything_of_an_exercise() -> None:
    """The second question of momentum is the value: an update with the right derivatives and a number too many."""
    code = Attempt("momentum", ("new_W = W - rate * new_V + 1",), "").source()
    names: dict[str, Any] = {}
    exec(code, names)
    mark = marked(EXERCISES["momentum"], names["update"])
    assert mark.how == "wrong value" and "the new W" in mark.text
