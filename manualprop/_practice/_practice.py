"""`manualprop.practice`: mark a file, or a class or function that a notebook has defined."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from manualprop._practice._child import LIMIT, marked_file
from manualprop._practice._exercises import EXERCISES
from manualprop._practice._mark import Mark
from manualprop._practice._marking import marked
from manualprop._practice._progress import Progress


def practice(attempt: Any, exercise: str | None = None, *, time_limit: float = LIMIT) -> Mark:
    """Mark an attempt at an exercise.

    Args:
        attempt: path of the file, which then runs in a process of its own; or the class or function itself, as a
            notebook defines it.
        exercise: its name (default: the one that the file names; else the one that asks for this class or function).
        time_limit: seconds of processor time for a file.

    Returns:
        The mark: print it.  ``mark.right`` says whether it is right, ``mark.assert_right()`` raises if not.

    Raises:
        ValueError: for an exercise that there is not.
        FileNotFoundError: if there is no such file.
    """
    if not isinstance(attempt, str | Path):
        name = exercise_named(exercise) if exercise else _asking_for(attempt)
        return marked(EXERCISES[name], attempt, isolate=True)
    file = Path(attempt)
    name = exercise_named(exercise) if exercise else exercise_of(file)
    mark = marked_file(name, file, time_limit)
    if file.stem == name:
        Progress(file.parent).mark(name, mark)
    return mark


def exercise_named(name: str) -> str:
    """The name, if there is such an exercise.

    Raises:
        ValueError: if there is none.
    """
    if name in EXERCISES:
        return name
    similar = difflib.get_close_matches(name, EXERCISES, n=1)
    hint = f"Did you mean {similar[0]!r}?" if similar else f"There are {', '.join(EXERCISES)}."
    raise ValueError(f"there is no exercise {name!r}. {hint}")


def exercise_of(file: Path) -> str:
    """The exercise of a file: by its first line, else by its name.

    Raises:
        ValueError: if neither tells.
    """
    found = re.search(r"^\W*Exercise (\w+)", file.read_text(encoding="utf-8", errors="replace"), re.M)
    if found and found[1] in EXERCISES:
        return found[1]
    named = [name for name in EXERCISES if re.search(rf"(^|[^a-z]){name}$", file.stem.lower())]
    if named:
        return max(named, key=len)
    raise ValueError(
        f"{file} must say of which exercise it is, in its first line or by its name. "
        f'Begin it with """Exercise tanh""", or call it anna_tanh.py.'
    )


def _asking_for(attempt: Any) -> str:
    named = [name for name, e in EXERCISES.items() if e.entry == getattr(attempt, "__name__", None)]
    if len(named) == 1:
        return named[0]
    given = f"{', '.join(named)} do" if named else "none does"
    raise ValueError(
        f"practice: one exercise must ask for {getattr(attempt, '__name__', attempt)!r}, and {given}. "
        f"Give its name: practice(attempt, {(named or ['tanh'])[0]!r})."
    )
