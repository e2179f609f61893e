#!/usr/bin/env python3
"""The one door to this repository: `python3 scripts/run.py COMMAND [ARGUMENTS]`, see `--help`.

It needs nothing but Python. The first call installs everything into `.venv`; later calls hand over to it at once.
`test --torch 2.14.1` does the same with `.venv-torch-2.14.1`. In an environment, `set-up` is the stamp: it names what
is installed, once the last step is done. `suite-*.json` are the last runs of the tests, for `docs versions`.
"""

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

# Python 3.6 understands all imports above and the *syntax* of all that follows, so that the user of an old Python
# gets to read this one line. (Python 2 stops at the next line but one, and shows it.)
if sys.version_info < (3, 11):
    found: str = "%d.%d" % sys.version_info[:2]  # Syntax error? This is Python 2; use 3.11 or newer.
    sys.stderr.write("run.py: Python 3.11 or newer is needed, this is %s (%s).\n" % (found, sys.executable))
    sys.exit(2)

import tomllib

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
VERSION = "%d.%d" % sys.version_info[:2]
INTERRUPTED = 128 + signal.SIGINT
PLACE = f"Python {VERSION} at {ROOT}\n"  # an environment can follow neither another Python nor a moved folder


class Stop(Exception):
    """A line for the user and an exit status: 2 for what they can put right, 1 for what failed."""


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


# ----- the environment -----


class Environment:
    """A folder with packages of its own: a version of torch, and if `full` what only `test --full` needs."""

    def __init__(self, torch: str = "", full: bool = False) -> None:
        self.name = f".venv-torch-{torch}" if torch else ".venv"
        self.folder = ROOT / self.name
        self.python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp, self.log = self.folder / "set-up", self.folder / "install.log"
        self.full = full
        self.project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        self.pins = (ROOT / "scripts/constraints.txt").read_text(encoding="utf-8")
        if torch:  # another version has its own needs of setuptools
            self.pins = re.sub(r"(?m)^(torch|setuptools)==.*\n", "", self.pins) + f"torch=={torch}\n"
        pins = hashlib.sha256((self.project + self.pins).encode()).hexdigest()
        self.wanted = f"{PLACE}{pins}\n" + "full\n" * full

    def holds(self, start: str) -> bool:
        """Whether all of its set-up was done, and its stamp begins like this."""
        stamped = self.python.exists() and self.stamp.is_file()
        return stamped and self.stamp.read_text(encoding="utf-8").startswith(start)

    def make_ready(self) -> None:
        if not self.holds(self.wanted):
            with locked():
                if not self.holds(self.wanted):  # while we waited for the lock, another run may have done it
                    self.set_up()

    def set_up(self) -> None:
        if not (find_spec("venv") and find_spec("ensurepip")):  # Debian's python3 has the first alone
            raise Stop(
                "this Python cannot make environments: its module `venv` or `ensurepip` is missing. "
                f"On Debian and Ubuntu: sudo apt install python{VERSION}-venv",
                2,
            )
        began = time.monotonic()
        say(f"setting up {self.name}: torch, Lightning, test tools. It takes a few minutes.")
        # After a change of pins alone pip can install on top. Anything else, an interrupted set-up above all (pip
        # takes a half-written package for an installed one), needs an empty folder.
        if self.holds(PLACE):
            self.stamp.write_text("unfinished\n")
        else:
            self.clear()
            # The Python beneath any virtual environment: this script may run on the very one that it remakes.
            python = getattr(sys, "_base_executable", None) or sys.executable
            self.install([python, "-I", "-m", "venv", str(self.folder)])
        for step in self.pip_steps():
            self.install(step)
        self.stamp.write_text(self.wanted, encoding="utf-8")
        say(f"set-up finished after {time.monotonic() - began:.0f} s.")

    def clear(self) -> None:
        """Leave a folder with our stamp alone; a folder without it may be somebody's own, and is moved away."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.stamp.exists():
            number = next(n for n in range(1, 1000) if not os.path.lexists(f"{self.folder}.old{n}"))
            os.rename(self.folder, f"{self.folder}.old{number}")
            say(f"there was a {self.name} that this script had not made: it is now {self.name}.old{number}.")
        self.folder.mkdir(exist_ok=True)
        self.stamp.write_text("unfinished\n")
        for entry in set(self.folder.iterdir()) - {self.stamp}:  # the folder may be a link to a larger disk
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def pip_steps(self) -> list[list[str]]:
        pins = self.folder / "constraints.txt"
        pins.write_text(self.pins, encoding="utf-8")
        extras = tomllib.loads(self.project)["project"]["optional-dependencies"]
        names = ["training", "explain", "test"] + ["interop", "release"] * self.full
        packages = [package for name in names for package in extras[name]]
        # -I: a PYTHONPATH or user site with a torch in it must not count as installed.
        pip = [str(self.python), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        pip += ["--progress-bar", "off", "-c", str(pins)]
        # --no-deps: torch's index may hold other versions of what torch needs than the pinned ones; the package may
        # be tested with a torch out of its range; BackPACK asks for a torchvision that fits one build of torch only.
        index = os.environ.get("MANUALPROP_TORCH_INDEX", "").strip()
        steps = [[*pip, "--no-deps", "--index-url", index, "torch"]] if index else []
        steps += [[*pip, "torch", *packages], [*pip, "--no-deps", "-e", "."]]
        return steps + [[*pip, "--no-deps", "backpack-for-pytorch"]] * self.full

    def install(self, command: list[str]) -> None:
        """Run one command of the set-up, its output into the log, and show that it is alive."""
        # PIP_USER would send packages out of the environment; close_fds=False hands the lock down.
        options = {"env": self.variables(PIP_USER="0"), "stdin": subprocess.DEVNULL, "close_fds": False}
        with open(self.log, "w") as log, child_process(command, stdout=log, stderr=log, **options) as child:
            show_progress(child, self.log)
        if child.returncode:
            index = "MANUALPROP_TORCH_INDEX" if "--index-url" in command else "the package index"
            reason = explain(self.log.read_text(errors="replace"), child.returncode, index)
            raise Stop(f"set-up failed: {reason}. Full log: {self.log}. The next call tries again.", 1)

    def variables(self, **more: str) -> dict[str, str]:
        """PYTHONHOME names the files of one particular Python; another one does not start with it."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
        path = os.pathsep.join([str(self.python.parent), kept.get("PATH", os.defpath)])
        return {**kept, "PATH": path, **more}


def try_lock(file: IO[str]) -> bool:
    """The system drops such a lock when its holder dies, so a dead holder needs no healing."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def locked() -> Iterator[None]:
    """One set-up at a time; who comes second waits, and says so."""
    with open(ROOT / ".venv.lock", "a") as file:
        if not try_lock(file):
            say("another run is setting up an environment: waiting for it to finish.")
            while not try_lock(file):
                time.sleep(0.2)
        # pip inherits the lock: if this process alone is killed, nobody clears the folder beneath a pip at work.
        os.set_inheritable(file.fileno(), True)
        yield


def show_progress(child: "subprocess.Popen[bytes]", log: Path) -> None:
    """Show the log's last line: on a terminal in one place, elsewhere (CI) as a plain line every ten seconds."""
    width = shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else 0
    began = time.monotonic()
    while child.returncode is None:
        try:
            child.wait(0.25 if width else 10)
        except subprocess.TimeoutExpired:
            lines = re.findall(r"(?m)^ *((?:[A-Z]\w+ing|Using cached) .+)$", log.read_text(errors="replace"))
            line = f"  {time.monotonic() - began:4.0f} s  {lines[-1] if lines else 'beginning'}"
            print(line[: width or 100].ljust(width), end="\r" if width else "\n", file=sys.stderr, flush=True)
    print(" " * width, end="\r" * bool(width), file=sys.stderr, flush=True)


def explain(output: str, status: int, index: str) -> str:
    """Why a step failed. Without a network pip says "no matching distribution", which misleads."""
    errors = re.findall(r"(?:ERROR|error): (?!subprocess-exited|ResolutionImpossible)(.*)", output)
    last = (errors or output.strip().splitlines() or ["no output"])[-1].strip()
    offline = re.search("(?i)connection (broken|error)|max retries|timed out|IncompleteRead", output)
    if "No space left on device" in output or "Errno 28" in output:
        return "the disk is full"
    if offline and not re.search(r"\(from versions: (?!none\b)", output):  # no index has answered
        return f"{index} could not be reached: check the network, and pip's proxy and index settings"
    if "No matching distribution" in output or "ResolutionImpossible" in output:
        return f"pip found no fitting version for Python {VERSION} on {sys.platform}: {last}"
    return f"the installer was killed by signal {-status}" if status < 0 else last


# ----- the commands -----


class Work(NamedTuple):
    """What a command does: each step is the arguments of one call of the environment's Python."""

    steps: list[list[str]]
    environment: Environment = Environment()
    variables: dict[str, str] = {}


def script(*words: str, **variables: str) -> Callable[[list[str]], Work]:
    """A command that hands its arguments on as they are."""
    return lambda arguments: Work([[*words, *arguments]], variables=variables)


def test(arguments: list[str]) -> Work:
    full, torch, rest = "--full" in arguments, "", [a for a in arguments if a != "--full"]
    if "--torch" in rest:
        at = rest.index("--torch")
        torch = "".join(rest[at + 1 : at + 2])
        del rest[at : at + 2]
        if not re.fullmatch(r"\d+\.\d+\.\d+", torch):
            raise Stop(f"--torch takes a version, as in: test --torch 2.14.1. Got {torch!r}", 2)
    environment = Environment(torch, full)
    options = [] if full else ["-m", "not slow"]  # before the user's own: the last -m counts, the last -n too
    part = {(): "full" if full else "all", ("-m", "quick"): "quick"}.get(tuple(rest))
    options += [f"--record={environment.folder}/suite-{part}.json"] if part else []
    if cores() > 1 and not {"--pdb", "--trace", "no:xdist"} & set(rest):
        options += ["-n", str(min(cores(), 8))]  # each worker loads torch: 300 MB
    # As many workers as cores already; without its cache pytest compiles every test file anew.
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONDONTWRITEBYTECODE": ""}
    return Work([["-m", "pytest", *options, *rest]], environment, variables)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lint(arguments: list[str]) -> Work:
    if arguments not in ([], ["--fix"]):
        raise Stop(f"lint takes --fix or nothing. Got {' '.join(arguments)}", 2)
    check = [] if arguments else ["--check"]
    return Work([["-m", "ruff", "check", *arguments], ["-m", "ruff", "format", *check], ["-m", "mypy"]])


BENCHMARKS = sorted(path.stem.partition("_")[2] for path in ROOT.glob("scripts/bench_*.py"))


def bench(arguments: list[str]) -> Work:
    if not arguments or arguments[0] not in BENCHMARKS:
        given = f"no benchmark {arguments[0]!r}." if arguments else "which benchmark?"
        raise Stop(f"{given} There are: {', '.join(BENCHMARKS)}", 2)
    return Work([[f"scripts/bench_{arguments[0]}.py", *arguments[1:]]])


# What prints commands and paths must know how it was called: they have to work where the user stands.
TYPED = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
CALLED = {"MANUALPROP_COMMAND": shlex.join([*TYPED, "manualprop"]), "MANUALPROP_CALLED_FROM": os.getcwd()}
COMMANDS = {
    "train": (script("recipes/digits/descents.py", **CALLED), "train on the digits with all three descents"),
    "manualprop": (script("-m", "manualprop", **CALLED), "the console command, as in: manualprop fit --help"),
    "test": (test, "pytest; -m quick: a part, under a minute; --full: slow ones too"),
    "bench": (bench, f"measures NAME: {', '.join(BENCHMARKS)}"),
    "browser": (script("scripts/install_browser.py"), "install Chromium, for the tests of explain's page"),
    "docs": (script("scripts/build_docs.py"), "write the generated pages and the texts of --help"),
    "lint": (lint, "ruff check, ruff format, mypy; --fix repairs what it can"),
}
USAGE = """usage: python3 scripts/run.py COMMAND [ARGUMENTS]

{commands}

ARGUMENTS go to the command: `test -k tanh -x` is pytest's -k and -x, and
`train --help` lists train's own. Commands run in the repository root, wherever
they are called from: paths among the ARGUMENTS are relative to it.
`test --torch 2.14.1` tests with that version, in an environment of its own.

The first call installs everything into .venv (a few minutes); delete .venv to
start over. On a Linux machine without a GPU, take torch from PyTorch's own CPU
index and spare gigabytes:

  MANUALPROP_TORCH_INDEX=https://download.pytorch.org/whl/cpu"""


@contextmanager
def child_process(command: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in the repository that does not outlive the block, whatever ends it."""
    child = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def call(command: list[str], variables: dict[str, str]) -> int:
    """Run to its end, return its exit status; 130 after Ctrl-C, once the child has wound up."""
    interrupted = False
    with child_process(command, env=variables) as child:
        while child.returncode is None:
            try:
                child.wait()
            except KeyboardInterrupt:
                interrupted = True
                time.sleep(0.5)
                # A terminal's Ctrl-C reaches the child by itself; a second one would cut its winding-up short.
                if child.poll() is None and not (sys.stdin and sys.stdin.isatty()):
                    child.send_signal(signal.SIGINT)
    if interrupted:
        return INTERRUPTED
    return 128 - child.returncode if child.returncode < 0 else child.returncode


def run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help."
        raise Stop(f"no command {name!r}: {hint} Commands: {', '.join(COMMANDS)}", 2)
    work = COMMANDS[name][0](arguments)  # before the set-up: a typing error should not cost minutes
    work.environment.make_ready()
    worst = 0
    for step in work.steps:
        status = call([str(work.environment.python), *step], work.environment.variables(**work.variables))
        if status == INTERRUPTED:
            return status
        worst = worst or status  # the later ones run all the same: lint shows everything at once
    return worst


def main(argv: list[str]) -> int:
    # As an exception, so that each `finally` ends its child.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    words = argv[:2] if argv[:1] in (["bench"], ["lint"]) else argv[:1]  # nothing behind these could answer
    if not argv or {"-h", "--help", "help"} & set(words):
        rows = "\n".join(f"  {name:12}{text}" for name, (_, text) in COMMANDS.items())
        print(USAGE.format(commands=rows), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        return run(argv[0], argv[1:])
    except (Stop, OSError) as error:
        message, status = error.args if isinstance(error, Stop) else (f"cannot set up in {ROOT}: {error}", 1)
        say(message)
        return status
    except KeyboardInterrupt:
        say("interrupted. An unfinished set-up starts afresh on the next call.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
