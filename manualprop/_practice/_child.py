"""A learner's file runs in a process of its own, under a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

from manualprop._practice._exercises import EXERCISES
from manualprop._practice._mark import Mark
from manualprop._practice._marking import marked_source

LIMIT = 30.0  # seconds of processor time
START = 60.0  # seconds in which Python and torch have started, on a busy machine too
MOST_PRINTED = 2000  # characters that are shown
MOST_WRITTEN = 2**23  # bytes, of each file
CALL = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from manualprop._practice._child import main; main()"


def marked_file(name: str, file: Path, limit: float = LIMIT) -> Mark:
    """The mark of a learner's file.

    Args:
        name: of the exercise.
        file: the learner's.
        limit: seconds of processor time after which it is given up; waiting counts a third.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, printed = Path(folder) / "mark.json", Path(folder) / "printed.txt"
        words = [sys.executable, "-c", CALL, json.dumps(sys.path), name, str(file), str(answer), str(limit)]
        with printed.open("wb") as stream:
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
            try:
                status = child.wait(3 * limit + START)
            except subprocess.TimeoutExpired:
                return _given_up(name, limit)
            finally:
                child.kill()
                child.wait()
        said = printed.read_text(errors="replace")[-MOST_PRINTED:]
        if answer.exists():
            mark = Mark.from_json(answer.read_text())
            return Mark(mark.exercise, mark.verdict, mark.how, mark.text, said)
    if status < 0:
        return Mark(name, "gave up", f"{signal.Signals(-status).name}", "It took the process down.", said)
    return Mark(name, "gave up", f"exit status {status}", "It has ended the process.", said)


def _given_up(name: str, limit: float, lines: str = "") -> Mark:
    text = f"Given up after {limit:g} s: does a loop in it never end?"
    return Mark(name, "gave up", f"more than {limit:g} s", f"{text}\n{lines}".strip())


class _TooLong(BaseException):
    """Not an Exception, so that no handler of the learner's or of verify's takes it for one of theirs."""


def main() -> NoReturn:
    """The life of the child: write the mark into a file."""
    _, _, name, file, answer, limit = sys.argv
    _limit_time(float(limit))
    _limit_files()
    try:
        mark = marked_source(EXERCISES[name], Path(file).read_text(encoding="utf-8"), file)
        _limit_time(0.0)
    except _TooLong as late:
        _limit_time(0.0)  # the timers ring every second, for code that catches what they raise
        # The last line of the learner's is where it was.
        frames = [f for f in traceback.extract_tb(late.__traceback__) if f.filename == file]
        mark = _given_up(name, float(limit), "It was here:\n" + "".join(traceback.format_list(frames[-1:])))
    except UnicodeDecodeError as error:
        mark = Mark(name, "error", "not UTF-8", f"The file must be text in UTF-8. {error}")
    Path(answer).write_text(mark.to_json())
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)  # whatever the learner's code has registered for the end of the process


def _limit_time(limit: float) -> None:
    """Raise in the learner's code after so many seconds of processor time, or three times as many on the clock.

    0 takes the limit away.  Where there are no such signals, and in code that lets none through, the parent's ends it.
    """
    if not hasattr(signal, "SIGPROF"):
        return

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise _TooLong

    for number, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, limit),
        (signal.SIGALRM, signal.ITIMER_REAL, 3 * limit),
    ):
        signal.signal(number, late)
        signal.setitimer(timer, seconds, 1.0)


def _limit_files() -> None:
    """A loop that prints must not fill the disk: beyond this, writing raises an OSError."""
    with contextlib.suppress(ImportError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_WRITTEN, most))
