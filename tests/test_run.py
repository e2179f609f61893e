"""scripts/run.py: set-up, healing, and handing over. A stand-in Python plays venv and pip, so nothing is downloaded."""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

fcntl = pytest.importorskip("fcntl", reason="the stand-in Python is a script with a #! line: not for Windows")

ROOT = Path(__file__).resolve().parent.parent

# What run.py takes for Python. As `-m venv DIR` it copies itself there; as `-m pip` it notes its arguments, leaves a
# half-written package while it works, and obeys the files pip-waits and pip-says; otherwise it is the real Python.
STAND_IN = f"""#!{sys.executable} -IS
import os, pathlib, shutil, sys, time
here = pathlib.Path.cwd()
words = sys.argv[1:]
if words[:3] == ["-I", "-m", "venv"]:
    target = pathlib.Path(words[3], "bin")
    target.mkdir(parents=True)
    shutil.copy(__file__, target / "python")
elif words[:3] == ["-I", "-m", "pip"]:
    with open(here / "pip-calls", "a") as calls:
        calls.write(" ".join(words[3:]) + "\\n")
    half = pathlib.Path(__file__).parent.parent / "half-written"
    half.touch()
    while (here / "pip-waits").exists():
        time.sleep(0.02)
    says = here / "pip-says"
    if says.exists():
        print(says.read_text())
        sys.exit(1)
    half.unlink()
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""

DRIVER = """
import pathlib, sys
sys._base_executable = str(pathlib.Path(__file__).with_name("stand-in"))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "scripts"))
import run
if "no-ensurepip" in sys.argv:
    run.find_spec = lambda name: None if name == "ensurepip" else name
    sys.argv.remove("no-ensurepip")
sys.exit(run.main(sys.argv[1:]))
"""

ECHO = """
import sys, time
print(sys.argv[1:], flush=True)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(7)
"""

CALM = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
print("ready", flush=True)
signal.pause()
"""

CONSOLE = """
import os, sys
print(os.environ["MANUALPROP_COMMAND"], os.environ["MANUALPROP_CALLED_FROM"], sys.argv[1:], os.getcwd(), sep="|")
"""

PROJECT = '[project.optional-dependencies]\ntraining = ["t>=1"]\nexplain = ["x"]\ntest = ["p"]\ninterop = ["i"]\nrelease = ["r"]\n'


class Tree:
    """A small repository with run.py in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("scripts", "manualprop"):
            (root / folder).mkdir()
        shutil.copy(ROOT / "scripts/run.py", root / "scripts/run.py")
        self.write("scripts/constraints.txt", "a==1\ntorch==2.13.0\nsetuptools==84.2.1\n")
        self.write("pyproject.toml", PROJECT)
        self.write("driver.py", DRIVER)
        self.write("scripts/bench_echo.py", ECHO)
        self.write("scripts/bench_calm.py", CALM)
        self.write("manualprop/__init__.py", "")  # or the installed package comes first
        self.write("manualprop/__main__.py", CONSOLE)
        self.write("stand-in", STAND_IN)
        (root / "stand-in").chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def start(self, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "driver.py", *arguments],
            cwd=self.root,
            env={**os.environ, "MANUALPROP_TORCH_INDEX": "", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can signal the whole group, as a terminal does
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        return finish(self.start(*arguments, **variables))

    def echo(self, **variables: str) -> str:
        """The benchmark `echo`, which must run; returns stderr."""
        status, out, err = self.run("bench", "echo", "hi", **variables)
        assert (status, out) == (7, "['hi']\n"), err
        return err

    def start_and_hold(self) -> "subprocess.Popen[str]":
        """A run whose pip is at work until pip-waits is removed."""
        self.write("pip-waits", "")
        process = self.start("bench", "echo", "hi")
        wait_until((self.root / ".venv/half-written").exists)
        return process

    def release(self) -> None:
        (self.root / "pip-waits").unlink()

    @property
    def pip_calls(self) -> list[str]:
        file = self.root / "pip-calls"
        return file.read_text().splitlines() if file.exists() else []


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true"
        time.sleep(0.01)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def run() -> ModuleType:
    """scripts/run.py as a module."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "scripts/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----- Python too old -----


def test_an_old_python_gets_one_line() -> None:
    ast.parse((ROOT / "scripts/run.py").read_text(encoding="ascii"), feature_version=(3, 6))
    code = "import runpy, sys; sys.version_info = (3, 10, 1); runpy.run_path('scripts/run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"run\.py: Python 3\.11 or newer is needed, this is 3\.10 \(.*\)\.\n", done.stderr)


# ----- set-up -----


def test_the_first_call_installs_and_the_second_does_not(tree: Tree) -> None:
    assert re.search(r"(?s)setting up \.venv.*set-up finished", tree.echo())
    packages, ours = tree.pip_calls
    assert packages.endswith("torch t>=1 x p") and ours.endswith("--no-deps -e .")
    assert f"-c {tree.root}/.venv/constraints.txt" in packages
    assert tree.echo() == "" and len(tree.pip_calls) == 2


@pytest.mark.parametrize("file", ["pyproject.toml", "scripts/constraints.txt"])
def test_a_changed_file_installs_on_top(tree: Tree, file: str) -> None:
    tree.echo()
    tree.write(".venv/kept", "")
    tree.write(file, (tree.root / file).read_text() + "# changed\n")
    tree.echo()
    assert len(tree.pip_calls) == 4 and (tree.root / ".venv/kept").exists()
    assert tree.echo() == ""


def test_torchs_index_serves_torch_alone(tree: Tree) -> None:
    tree.echo(MANUALPROP_TORCH_INDEX="https://example.org/cpu")
    torch, *rest = tree.pip_calls
    assert torch.endswith("--no-deps --index-url https://example.org/cpu torch") and "constraints" in torch
    assert not any("--index-url" in call for call in rest)


def test_the_full_tests_install_what_they_alone_need(tree: Tree) -> None:
    tree.run("test")
    tree.run("test", "--full")
    tree.run("test", "--full")
    tree.run("test")
    assert len(tree.pip_calls) == 5
    assert tree.pip_calls[2].endswith("torch t>=1 x p i r")
    assert tree.pip_calls[4].endswith("--no-deps backpack-for-pytorch")


def test_another_torch_has_an_environment_of_its_own(tree: Tree) -> None:
    _, _, err = tree.run("test", "--torch", "2.14.1", "--version")
    assert "setting up .venv-torch-2.14.1" in err and not (tree.root / ".venv").exists()
    pins = tree.root / ".venv-torch-2.14.1/constraints.txt"
    assert pins.read_text() == "a==1\ntorch==2.14.1\n" and str(pins) in tree.pip_calls[0]
    assert "set-up" not in tree.run("test", "--torch", "2.14.1", "--version")[2]
    tree.echo()
    assert "torch==2.13.0\n" in (tree.root / ".venv/constraints.txt").read_text()


def test_a_moved_tree_is_set_up_anew(tree: Tree) -> None:
    """The editable install names the old folder."""
    tree.echo()
    tree.root = tree.root.rename(tree.root.with_name("moved"))
    assert "set-up finished" in tree.echo()


def test_a_foreign_environment_is_kept(tree: Tree) -> None:
    (tree.root / ".venv").mkdir()
    tree.write(".venv/theirs", "precious")
    assert ".venv.old1" in tree.echo()
    assert (tree.root / ".venv.old1/theirs").read_text() == "precious"
    assert tree.echo() == ""


def test_a_link_stays_a_link_and_a_deleted_python_is_replaced(tree: Tree, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tree.root / ".venv").symlink_to(elsewhere)
    tree.echo()
    (elsewhere / "bin/python").unlink()
    assert "set-up finished" in tree.echo()
    assert (tree.root / ".venv").is_symlink() and (elsewhere / "set-up").exists()


# ----- interruptions -----


@pytest.mark.parametrize(
    "whom, how",
    [
        (os.killpg, signal.SIGINT),
        (os.kill, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGKILL),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_an_interrupted_set_up_is_redone_from_nothing(tree: Tree, whom, how: int, update: bool) -> None:
    if update:
        tree.echo()
        tree.write("pyproject.toml", PROJECT + "# changed\n")
    process = tree.start_and_hold()
    whom(process.pid, how)
    status, _, err = finish(process)
    with open(tree.root / ".venv.lock") as lock:
        wait_until(lambda: free(lock))  # nobody is left who holds it, pip neither
    assert status == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in err and ("interrupted" in err) == (how == signal.SIGINT)
    assert (tree.root / ".venv/half-written").exists()
    tree.release()
    err = tree.echo()
    assert "waiting" not in err and "set-up finished" in err
    assert not (tree.root / ".venv/half-written").exists()


def free(lock) -> bool:
    """A killed process gives its lock back when the system has done with it, a moment after the kill."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_a_pip_that_outlives_its_parent_is_waited_for(tree: Tree) -> None:
    first = tree.start_and_hold()
    first.kill()  # the parent alone
    first.wait()  # its pipes stay open: pip has inherited them
    second = tree.start("bench", "echo", "hi")
    assert "another run is setting up" in second.stderr.readline()
    calls = len(tree.pip_calls)
    tree.release()
    assert finish(second)[0] == 7 and len(tree.pip_calls) == calls + 2
    finish(first)


def test_of_first_runs_at_once_one_installs(tree: Tree) -> None:
    first = tree.start_and_hold()
    others = [tree.start("bench", "echo", "hi") for _ in range(2)]
    for other in others:
        assert "another run is setting up an environment: waiting" in other.stderr.readline()
    tree.release()
    for process in (first, *others):
        status, out, err = finish(process)
        assert (status, out) == (7, "['hi']\n")
        assert ("set-up finished" in err) == (process is first)
    assert len(tree.pip_calls) == 2


# ----- failures -----

OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<HTTPSConnection>: Failed to
 establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch (from versions: none)
ERROR: No matching distribution found for torch"""
ABSENT = """ERROR: Could not find a version that satisfies the requirement torch==9 (from versions: 2.12.0, 2.13.0)
ERROR: No matching distribution found for torch==9"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
SHAKY = "WARNING: Retrying after connection broken by 'ReadTimeoutError'\n"
UNFIT = r"pip found no fitting version for Python 3\.\d+ on \w+: No matching distribution found for torch==9"


@pytest.mark.parametrize(
    "says, reason",
    [
        (OFFLINE, "MANUALPROP_TORCH_INDEX could not be reached: check the network"),
        (ABSENT, UNFIT),
        (SHAKY + ABSENT, UNFIT),  # the index did answer in the end
        (FULL, "the disk is full"),
        ("ERROR: Something else\nnote: see above", "Something else"),
        ("", "no output"),
    ],
)
def test_a_failing_pip_gives_one_line(tree: Tree, says: str, reason: str) -> None:
    tree.write("pip-says", says)
    status, out, err = tree.run("bench", "echo", MANUALPROP_TORCH_INDEX="https://example.org/cpu")
    assert (status, out) == (1, "")
    log = tree.root / ".venv/install.log"
    _, line = err.splitlines()  # after "setting up"
    assert re.match(f"run.py: set-up failed: {reason}.*Full log: {re.escape(str(log))}", line)
    assert says in log.read_text()
    (tree.root / "pip-says").unlink()
    tree.echo()


def test_what_cannot_be_set_up_gives_one_line(tree: Tree) -> None:
    status, _, err = tree.run("bench", "echo", "no-ensurepip")
    assert status == 2 and not (tree.root / ".venv").exists()
    assert re.fullmatch(r"run.py: .* `ensurepip` is missing.* sudo apt install python3\.\d+-venv\n", err)
    (tree.root / ".venv.lock").unlink()
    (tree.root / ".venv.lock").mkdir()  # cannot be opened for writing, not even by root
    status, _, err = tree.run("bench", "echo")
    assert status == 1 and re.fullmatch(r"run.py: cannot set up in .*Is a directory.*\.venv\.lock'\n", err)


# ----- commands -----


@pytest.mark.parametrize(
    "words, message",
    [
        ("lnit", "no command 'lnit': did you mean lint?"),
        ("xyzzy", "no command 'xyzzy': see --help. Commands: train, manualprop"),
        ("bench", "which benchmark? There are: calm, echo"),
        ("bench ecco", "no benchmark 'ecco'. There are: calm, echo"),
        ("lint manualprop", "lint takes --fix or nothing. Got manualprop"),
        ("test --torch", "--torch takes a version, as in: test --torch 2.14.1. Got ''"),
        ("test --torch -x", "Got '-x'"),
    ],
)
def test_a_wrong_command_costs_no_set_up(tree: Tree, words: str, message: str) -> None:
    status, out, err = tree.run(*words.split())
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not (tree.root / ".venv").exists()


@pytest.mark.parametrize("words", ["--help", "help", "bench --help", "lint -h", ""])
def test_help_lists_the_commands_in_80_columns(words: str) -> None:
    words = [sys.executable, ROOT / "scripts/run.py", *words.split()]
    done = subprocess.run(words, capture_output=True, text=True)
    shown, silent = (done.stdout, done.stderr) if len(words) > 2 else (done.stderr, done.stdout)
    assert done.returncode == (0 if len(words) > 2 else 2) and not silent
    assert "measures NAME: blocks, " in shown and "MANUALPROP_TORCH_INDEX" in shown
    assert {"train", "manualprop", "test", "bench", "docs", "lint"} <= {
        *re.findall(r"^  ([a-z]+) ", shown, re.M)
    }
    assert max(map(len, shown.splitlines())) <= 80


def test_the_console_command_and_how_to_call_it_again(tree: Tree, tmp_path_factory) -> None:
    """The words that the user typed come back, and work from where they stand."""
    tree.echo()
    elsewhere = tmp_path_factory.mktemp("else where")
    script = os.path.relpath(tree.root / "driver.py", elsewhere)
    words = [sys.executable, script, "manualprop", "fit", "--name", "a b"]
    done = subprocess.run(words, cwd=elsewhere, capture_output=True, text=True)
    command, folder, arguments, at = done.stdout.strip().split("|")
    assert arguments == "['fit', '--name', 'a b']", done.stderr
    assert (folder, at) == (str(elsewhere), str(tree.root))
    again = subprocess.run(f"{command} test", shell=True, cwd=elsewhere, capture_output=True, text=True)
    assert "|['test']|" in again.stdout, again.stderr


@pytest.mark.parametrize(
    "whom, how, name, status",
    [
        (os.kill, signal.SIGINT, "echo", 130),
        (os.killpg, signal.SIGINT, "echo", 130),
        (os.killpg, signal.SIGINT, "calm", 130),  # though the command ends well; pytest, for one, returns 2
        (os.kill, signal.SIGTERM, "echo", 143),
    ],
)
def test_an_interrupted_command(tree: Tree, whom, how: int, name: str, status: int) -> None:
    process = tree.start("bench", name, "wait")
    process.stdout.readline()
    whom(process.pid, how)
    found, _, err = finish(process)  # it reads to the end: the child is gone too
    assert found == status and "interrupted. An" not in err


def test_a_killed_command_is_told_by_its_status(tree: Tree) -> None:
    tree.write("scripts/bench_die.py", "import os; os.kill(os.getpid(), 9)")
    assert tree.run("bench", "die")[0] == 128 + 9


@pytest.mark.parametrize(
    "given, passed",
    [
        ("", "-m|not slow|--record={}-all.json|-n|2"),
        ("--full", "--record={}-full.json|-n|2"),
        ("--full -q", "-n|2|-q"),
        ("-m quick", "-m|not slow|--record={}-quick.json|-n|2|-m|quick"),
        ("--pdb", "-m|not slow|--pdb"),
        ("-p no:xdist", "-m|not slow|-p|no:xdist"),
    ],
)
def test_pytests_arguments(run: ModuleType, monkeypatch, given: str, passed: str) -> None:
    monkeypatch.setattr(run, "cores", lambda: 2)
    steps = run.test(given.split()).steps
    assert steps == [["-m", "pytest", *passed.format(ROOT / ".venv/suite").split("|")]]


def test_the_tests_variables(run: ModuleType, monkeypatch) -> None:
    """Workers share the cores; pytest keeps what it compiles; what tests print is not for this call."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run.test([]).variables == {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert run.test([]).variables["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("statuses, result", [([0, 0, 0], 0), ([1, 0, 0], 1), ([0, 3, 0], 3), ([0, 0, 2], 2)])
def test_lint_runs_all_and_fails_if_any_does(run: ModuleType, monkeypatch, statuses, result: int) -> None:
    ran = []
    monkeypatch.setattr(run.Environment, "make_ready", lambda self: None)
    monkeypatch.setattr(run, "call", lambda command, _: ran.append(command[2:4]) or statuses[len(ran) - 1])
    assert run.main(["lint"]) == result
    assert ran == [["ruff", "check"], ["ruff", "format"], ["mypy"]]


@pytest.mark.parametrize("lint, test, result", [(0, 0, 0), (1, 0, 1), (0, 2, 2), (1, 2, 2)])
def test_ci_fails_with_lint_and_with_tests(tmp_path: Path, lint: int, test: int, result: int) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    stub = f"import sys; print(sys.argv[1]); sys.exit(dict(lint={lint}, browser=1, test={test})[sys.argv[1]])"
    (tmp_path / "scripts/run.py").write_text(stub)
    done = subprocess.run([tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (result, "lint\nbrowser\ntest\n")
    assert ("lint failed" in done.stderr) == bool(lint)


# ----- pins -----


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if re.fullmatch(r"[\w.-]+==[\d.a-z]+", line)}
    assert names <= pinned
    assert "torch==2.13.0" in lines
