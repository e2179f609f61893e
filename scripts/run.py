#!/usr/bin/env python3
"""The one door to this repository: `python3 scripts/run.py COMMAND [ARGUMENTS]`, see `--help`.

It needs nothing but Python. The first call makes `.venv` beside pyproject.toml and installs everything there;
every later call hands over to that environment at once. Set-up leaves behind:

    .venv/set-up        the stamp: what was installed, or UNFINISHED. Written last, and atomically, so whatever
                        interrupts a set-up leaves UNFINISHED, and the next call starts afresh
    .venv/interop       the same stamp, once the packages are there that only `test --full` needs
    .venv/install.log   what venv and pip said
    .venv.lock          locked (not merely present) while a set-up runs
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
from pathlib import Path
from typing import IO, NamedTuple

# Python 3.6 understands all imports above and the *syntax* of all that follows, so that the user of an old Python
# gets to read this one line. (Python 2 stops at the next line but one, and shows it.)
if sys.version_info < (3, 11):
    found: str = "%d.%d" % sys.version_info[:2]  # Syntax error? This is Python 2; use 3.11 or newer.
    sys.stderr.write("run.py: Python 3.11 or newer is needed, this is %s (%s).\n" % (found, sys.executable))
    sys.exit(2)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "set-up"
INTEROP = VENV / "interop"
LOG = VENV / "install.log"
LOCK = ROOT / ".venv.lock"
PROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
UNFINISHED = "unfinished\n"


class Stop(Exception):
    """Ends the run with one line on stderr; status 2 for what the user can put right, 1 for what failed."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- the environment


def place() -> str:
    """What ties an environment to its spot: a venv can follow neither another Python nor a moved folder."""
    return f"Python {sys.version_info[0]}.{sys.version_info[1]} at {ROOT}"


def wanted_stamp() -> str:
    pins = hashlib.sha256(PROJECT.read_bytes() + b"\0" + CONSTRAINTS.read_bytes()).hexdigest()
    return f"{place()}\n{pins}\n"


def read_stamp(stamp: Path = STAMP) -> str:
    """The stamp, or "" where there is none."""
    try:
        return stamp.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def write_stamp(text: str) -> None:
    fresh = STAMP.with_name("set-up.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, STAMP)


def is_ready(full: bool) -> bool:
    stamps = [STAMP, INTEROP] if full else [STAMP]
    return PYTHON.exists() and all(read_stamp(stamp) == wanted_stamp() for stamp in stamps)


def make_ready(full: bool) -> None:
    """Set up unless that is done. Reads a few small files when it is: no lock, nothing written.

    Args:
        full: with the packages too that only `test --full` needs.
    """
    if is_ready(full):
        return
    try:
        with locked():
            if not is_ready(full):  # while we waited for the lock, another run may have done it
                set_up(full)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Stop(f"cannot set up .venv in {ROOT}: {where}{error.strerror or error}", 1) from None


def set_up(full: bool) -> None:
    if not has_venv():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Stop(
            "this Python cannot make virtual environments: its `venv` or `ensurepip` module is missing. "
            f"On Debian and Ubuntu: sudo apt install python{version}-venv"
        )
    began = time.monotonic()
    say("setting up .venv: torch, Lightning, test tools. It takes a few minutes.")
    # After a change of pins alone pip can install on top. Anything else, an interrupted set-up above all (pip
    # takes a half-written package for an installed one), needs an empty environment.
    keep = PYTHON.exists() and read_stamp().startswith(place() + "\n")
    if not keep:
        move_away_foreign()
    VENV.mkdir(exist_ok=True)
    write_stamp(UNFINISHED)
    if not keep:
        clear_venv()
        install_step([base_python(), "-I", "-m", "venv", str(VENV)], "making .venv")
    for step in pip_steps(full):
        install_step(step, "asking the package index")
    if full:
        INTEROP.write_text(wanted_stamp(), encoding="utf-8")
    write_stamp(wanted_stamp())
    say(f"set-up finished after {time.monotonic() - began:.0f} s.")


def has_venv() -> bool:
    """Debian's python3 without python3-venv has `venv` but not the `ensurepip` that it calls."""
    from importlib.util import find_spec

    return find_spec("venv") is not None and find_spec("ensurepip") is not None


def base_python() -> str:
    """The Python beneath any virtual environment: this script may run on the very .venv it is about to remake."""
    return getattr(sys, "_base_executable", None) or sys.executable


def move_away_foreign() -> None:
    """A .venv without our stamp may be somebody's own: keep it."""
    ours = read_stamp() or not os.path.lexists(VENV) or (VENV.is_dir() and not any(VENV.iterdir()))
    if ours:
        return
    number = 1
    while os.path.lexists(ROOT / f".venv.old{number}"):
        number += 1
    os.rename(VENV, ROOT / f".venv.old{number}")
    say(f"there was a .venv that this script had not made: it is now .venv.old{number}.")


def clear_venv() -> None:
    """Empty the folder but for the stamp, which says whose it is. (The folder may be a link to a larger disk.)"""
    for entry in VENV.iterdir():
        if entry == STAMP:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# ----------------------------------------------------------------------------------------------------- the lock


def try_lock(file: IO[str]) -> bool:
    """The system drops such a lock when its holder dies, so a dead holder needs no healing."""
    try:
        if sys.platform == "win32":
            file.seek(4096)  # a locked byte cannot be read by others, and they read the holder's name
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextmanager
def locked() -> Iterator[None]:
    """One set-up at a time; who comes second waits, and says for whom."""
    with open(LOCK, "a+", encoding="utf-8") as file:
        if not try_lock(file):
            time.sleep(0.2)  # the holder may have got it this instant, and still be writing its name
            file.seek(0)
            holder = file.read().strip() or "unknown"
            say(f"another run (process {holder}) is setting up .venv: waiting for it to finish.")
            while not try_lock(file):
                time.sleep(0.2)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        # pip inherits the lock: if this process alone is killed, nobody clears .venv beneath a pip still at work.
        os.set_inheritable(file.fileno(), True)
        yield


# ---------------------------------------------------------------------------------------------------------- pip


def pip_steps(full: bool) -> list[list[str]]:
    # -I: a PYTHONPATH or user site with a torch in it must not count as installed.
    pip = [str(PYTHON), "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--progress-bar", "off", "-c", str(CONSTRAINTS)]
    steps = [[*pip, "-e", ".[training,explain,test]"]]
    index = os.environ.get("MANUALPROP_TORCH_INDEX", "").strip()
    if index:
        # torch alone: such an index may hold other versions of what torch needs than the pinned ones.
        steps.insert(0, [*pip, "--no-deps", "--index-url", index, "torch"])
    if full:
        # BackPACK alone: the torchvision that it asks for fits one build of torch only, and it does without.
        steps += [[*pip, "-e", ".[interop,release]"], [*pip, "--no-deps", "backpack-for-pytorch"]]
    return steps


def install_step(command: list[str], title: str) -> None:
    """Run one command of the set-up, its output into the log, and show that it is alive."""
    with open(LOG, "a", encoding="utf-8", errors="replace") as log:
        start = log.tell()
        # close_fds=False hands the lock down; PIP_USER would send packages out of the environment.
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean_environment(), "PIP_USER": "0"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            close_fds=False,
        )
    try:
        watch(child, title, start)
    finally:
        if child.poll() is None:  # Ctrl-C, or SIGTERM: leave no pip behind
            child.terminate()
            child.wait()
    if child.returncode:
        with open(LOG, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            index = "MANUALPROP_TORCH_INDEX" if "--index-url" in command else "the package index"
            raise Stop(explain(log.read(), child.returncode, index), 1)


def watch(child: subprocess.Popen[bytes], title: str, start: int) -> None:
    """Show what the child is at, from its log, until it ends."""
    began = time.monotonic()
    progress = Progress()
    doing = title
    with open(LOG, encoding="utf-8", errors="replace") as log:
        log.seek(start)
        try:
            while child.poll() is None:
                doing = latest(log.readlines()) or doing
                progress.show(f"  {time.monotonic() - began:4.0f} s  {doing}")
                try:
                    child.wait(0.25)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            progress.wipe()


class Progress:
    """On a terminal one line, rewritten; elsewhere (CI) a plain line every ten seconds."""

    def __init__(self) -> None:
        self.width = shutil.get_terminal_size().columns - 1 if sys.stderr.isatty() else 0
        self.shown = time.monotonic()

    def show(self, line: str) -> None:
        if self.width:
            sys.stderr.write("\r" + line[: self.width].ljust(self.width))
            sys.stderr.flush()
        elif time.monotonic() - self.shown >= 10:
            self.shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def wipe(self) -> None:
        if self.width:
            sys.stderr.write("\r" + " " * self.width + "\r")
            sys.stderr.flush()


def latest(lines: list[str]) -> str:
    """The last thing that pip says it is doing, cut to its gist; "" if it says nothing of the kind."""
    for line in reversed(lines):
        if "Installing collected packages" in line:
            count = line.count(",") + 1
            return f"unpacking {count} package{'s' * (count > 1)}"
        match = re.match(
            r"\s*(Collecting|Downloading|Using cached) (?:\S*/)?([^-\s]+)(?:-([\d.]+))?.*?(\(.*B\))?$", line
        )
        if match:
            return " ".join(part for part in (match[1].lower(), *match.groups()[1:]) if part)
        match = re.match(r"\s*((?:Installing|Preparing|Building|Getting) [\w ]+)", line)
        if match:
            return match[1].strip().lower()
    return ""


UNREACHABLE = re.compile(
    "connection broken by|Max retries exceeded|Failed to establish a new connection|Name or service not known"
    "|name resolution|Network is unreachable|Connection refused|Connection reset|Read timed out|ConnectTimeout"
    "|ProxyError|ConnectionError|IncompleteRead|SSLError"
)


def explain(output: str, status: int, index: str = "the package index") -> str:
    """One line for a failed step. Without a network pip says "no matching distribution", which misleads."""
    errors = re.findall(r"(?:ERROR|error): (?!subprocess-exited|ResolutionImpossible)(.*)", output)
    last = (errors or output.strip().splitlines() or ["no output"])[-1].strip()
    chosen = re.search(r"\(from versions: (?!none\b)", output)  # then an index was reached, and it answered
    if "No space left on device" in output or "Errno 28" in output:
        reason = "the disk is full"
    elif UNREACHABLE.search(output) and not chosen:
        reason = f"{index} could not be reached: check the network, and pip's proxy and index settings"
    elif "No matching distribution" in output or "ResolutionImpossible" in output:
        reason = f"pip found no fitting version for {place().partition(' at ')[0]} on {sys.platform}: {last}"
    elif status < 0:
        reason = f"the installer was killed by signal {-status}"
    else:
        reason = last
    return f"set-up failed: {reason}. Full log: {LOG}. The next call tries again."


# ------------------------------------------------------------------------------------------------- the commands


def train(arguments: list[str]) -> list[list[str]]:
    return [["recipes/digits/descents.py", *arguments]]


def console(arguments: list[str]) -> list[list[str]]:
    return [["-m", "manualprop", *arguments]]


def test(arguments: list[str]) -> list[list[str]]:
    options = [] if "--full" in arguments else ["-m", "not slow"]  # before the user's own: the last -m counts
    arguments = [argument for argument in arguments if argument != "--full"]
    alone = "-n|--numprocesses|--dist|-?.*no:xdist|--pdb|--trace$|-h$|--help$|--version$"
    if cores() > 1 and not any(re.match(alone, argument) for argument in arguments):
        options += ["-n", str(min(cores(), 8))]  # each worker loads torch: 300 MB
    return [["-m", "pytest", *options, *arguments]]


def lint(arguments: list[str]) -> list[list[str]]:
    if arguments not in ([], ["--fix"]):
        raise Stop(f"lint takes --fix or nothing. Got {' '.join(arguments)}")
    check = [] if arguments else ["--check"]
    return [["-m", "ruff", "check", *arguments], ["-m", "ruff", "format", *check], ["-m", "mypy"]]


def benchmarks() -> list[str]:
    return sorted(path.stem.partition("_")[2] for path in ROOT.glob("scripts/bench_*.py"))


def bench(arguments: list[str]) -> list[list[str]]:
    if not arguments or arguments[0] not in benchmarks():
        given = f"no benchmark {arguments[0]!r}." if arguments else "which benchmark?"
        raise Stop(f"{given} There are: {', '.join(benchmarks())}")
    return [[f"scripts/bench_{arguments[0]}.py", *arguments[1:]]]


def docs(arguments: list[str]) -> list[list[str]]:
    return [["scripts/build_docs.py", *arguments]]


def browser(arguments: list[str]) -> list[list[str]]:
    """Debian's Chromium and its driver, for the tests of the page; nothing where they are there."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return []
    if not shutil.which("apt-get"):
        raise Stop(
            "browser installs by Debian's apt-get, which is not here. Install chromium and chromedriver."
        )
    apt = [*([] if os.getuid() == 0 else ["sudo"]), "apt-get", "-o", "Acquire::http::Timeout=20"]
    each = [[*apt, "update", "-q"], [*apt, "install", "-qy", "chromium", "chromium-driver"]]
    return [["-c", f"import subprocess; [subprocess.run(step, check=True) for step in {each!r}]"]]


class Command(NamedTuple):
    steps: Callable[[list[str]], list[list[str]]]  # the user's arguments -> arguments of .venv's Python
    needs: str  # a glob of files without which the command cannot work, and is not offered
    help: str


TABLE = {
    "train": Command(train, "recipes/digits/descents.py", "train on the digits with all three descents"),
    "manualprop": Command(
        console, "manualprop/__main__.py", "the console command, as in: manualprop fit --help"
    ),
    "test": Command(test, "tests", "pytest; -m quick: a part, under a minute; --full: slow ones too"),
    "bench": Command(
        bench, "scripts/bench_*.py", "a benchmark: bench NAME; NAME is " + " or ".join(benchmarks())
    ),
    "browser": Command(browser, "tests/test_explain_page.py", "install Chromium, for the tests of the page"),
    "docs": Command(docs, "scripts/build_docs.py", "write the generated pages and the texts of --help"),
    "lint": Command(lint, "pyproject.toml", "ruff check, ruff format, mypy; --fix repairs what it can"),
}


def offered() -> dict[str, Command]:
    return {name: command for name, command in TABLE.items() if any(ROOT.glob(command.needs))}


def usage() -> str:
    rows = [f"  {name:12}{command.help}" for name, command in offered().items()]
    return "\n".join(
        [
            "usage: python3 scripts/run.py COMMAND [ARGUMENTS]",
            "",
            *rows,
            "",
            "ARGUMENTS go to the command: `test -k tanh -x` is pytest's -k and -x, and",
            "`train --help` lists train's own. Commands run in the repository root, wherever",
            "they are called from: paths among the ARGUMENTS are relative to it.",
            "",
            "The first call installs everything into .venv (a few minutes); delete .venv to",
            "start over. On a Linux machine without a GPU, take torch from PyTorch's own CPU",
            "index and spare gigabytes:",
            "",
            "  MANUALPROP_TORCH_INDEX=https://download.pytorch.org/whl/cpu",
        ]
    )


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clean_environment() -> dict[str, str]:
    """PYTHONHOME names the files of one particular Python; another one does not start with it."""
    drop = ("PYTHONHOME", "__PYVENV_LAUNCHER__")
    return {key: value for key, value in os.environ.items() if key not in drop}


def typed() -> list[str]:
    """The user's words up to this script: what to type again for another command."""
    return sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]


def command_environment(name: str) -> dict[str, str]:
    environment = clean_environment()
    environment["PATH"] = os.pathsep.join([str(PYTHON.parent), environment.get("PATH", os.defpath)])
    if name in (
        "train",
        "manualprop",
    ):  # the commands and paths that they print must work where the user stands
        environment["MANUALPROP_COMMAND"] = shlex.join([*typed(), "manualprop"])
        environment["MANUALPROP_CALLED_FROM"] = os.getcwd()
    if name == "test":
        environment.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores already
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # pytest compiles every test file anew without its cache
    return environment


def call(command: list[str], environment: dict[str, str]) -> int:
    """Run to its end, return its exit status; 130 after Ctrl-C, once the child has wound up."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment)
    interrupted = False
    try:
        while True:
            try:
                status = child.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                pass_on_interrupt(child)
    finally:
        if child.poll() is None:  # SIGTERM
            child.terminate()
            child.wait()
    if interrupted:
        return 128 + signal.SIGINT
    return 128 - status if status < 0 else status


def pass_on_interrupt(child: subprocess.Popen[bytes]) -> None:
    """A terminal's Ctrl-C reaches the child by itself, and a second one would cut its winding-up short."""
    try:
        child.wait(0.5)
    except subprocess.TimeoutExpired:
        if not sys.stdin or not sys.stdin.isatty():
            child.send_signal(signal.SIGINT)


def choose(name: str) -> Command:
    if name in offered():
        return offered()[name]
    if name in TABLE:
        raise Stop(f"{name}: this checkout has no {TABLE[name].needs}")
    from difflib import get_close_matches

    near = get_close_matches(name, offered(), n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help."
    raise Stop(f"no command {name!r}: {hint} Commands: {', '.join(offered())}")


def run(name: str, arguments: list[str]) -> int:
    steps = choose(name).steps(arguments)  # before the set-up: a typing error should not cost minutes
    make_ready(full=name == "test" and "--full" in arguments)
    worst = 0
    for step in steps:
        status = call([str(PYTHON), *step], command_environment(name))
        if status == 128 + signal.SIGINT:
            return status
        worst = worst or status  # the later ones run all the same: lint shows everything at once
    return worst


def main(argv: list[str]) -> int:
    # As an exception, so that each `finally` ends its child.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    helps = ("-h", "--help")
    # bench and lint have nothing behind them that could answer.
    if (
        not argv
        or argv[0] in (*helps, "help")
        or (argv[0] in ("bench", "lint") and argv[1:2] and argv[1] in helps)
    ):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        return run(argv[0], argv[1:])
    except Stop as stop:
        say(str(stop))
        return stop.status
    except KeyboardInterrupt:
        say("interrupted. An unfinished set-up starts afresh on the next call.")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
