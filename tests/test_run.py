"""scripts/run.py: set-up, healing, and handing over. A stand-in Python plays venv and pip, so nothing is downloaded."""

import ast
import glob
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

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
    half = here / ".venv" / "half-written"
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
import sys
sys.path.insert(0, "scripts")
import run
run.base_python = lambda: str(run.ROOT / "stand-in")
if "no-ensurepip" in sys.argv:
    sys.argv.remove("no-ensurepip")
    sys.modules["ensurepip"] = None
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


class Tree:
    """A small repository with run.py in it."""

    def __init__(self, root: Path):
        self.root = root
        (root / "scripts").mkdir()
        shutil.copy(ROOT / "scripts/run.py", root / "scripts/run.py")
        self.write("scripts/constraints.txt", "torch==2.13.0\n")
        self.write("pyproject.toml", "[project]\n")
        self.write("driver.py", DRIVER)
        self.write("scripts/bench_echo.py", ECHO)
        self.write("stand-in", STAND_IN)
        (root / "stand-in").chmod(0o755)

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "driver.py", *arguments],
            cwd=self.root,
            env={**os.environ, "MANUALPROP_TORCH_INDEX": "", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can signal the whole group, as a terminal does
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        return finish(self.start(*arguments, **environment))

    def echo(self, **environment: str) -> str:
        """The benchmark `echo`, which must run; returns stderr."""
        status, out, err = self.run("bench", "echo", "hi", **environment)
        assert (status, out) == (7, "['hi']\n"), err
        return err

    def hold_pip(self) -> None:
        self.write("pip-waits", "")

    def release_pip(self) -> None:
        (self.root / "pip-waits").unlink()

    def wait_for_pip(self) -> None:
        wait_until((self.root / ".venv/half-written").exists)

    @property
    def pip_calls(self) -> list[str]:
        file = self.root / "pip-calls"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def stamp(self) -> str:
        return (self.root / ".venv/set-up").read_text()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{condition} did not come true"
        time.sleep(0.01)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def run():
    """scripts/run.py as a module."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "scripts/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------- Python too old


def test_syntax_is_old():
    """Otherwise an old Python shows a SyntaxError in place of the line about its age."""
    ast.parse((ROOT / "scripts/run.py").read_text(encoding="ascii"), feature_version=(3, 6))


def test_python_too_old():
    code = "import runpy, sys; sys.version_info = (3, 10, 1); runpy.run_path('scripts/run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run.py: Python 3.11 or newer is needed, this is 3.10 (")
    assert done.stderr.count("\n") == 1


def old_pythons():
    names = ["python2", "python2.7", *(f"python3.{minor}" for minor in range(6, 11))]
    found = [*filter(None, map(shutil.which, names))]
    for pattern in ("~/.pyenv/versions/2.7*", "~/.pyenv/versions/3.[6-9].*", "~/.pyenv/versions/3.10.*"):
        found += glob.glob(os.path.expanduser(f"{pattern}/bin/python"))
    return found


def test_real_old_pythons():
    tried = 0
    for python in old_pythons():
        if subprocess.run([python, "-c", ""], capture_output=True).returncode:
            continue  # a shim without a Python behind it
        done = subprocess.run([python, ROOT / "scripts/run.py", "test"], capture_output=True, text=True)
        assert done.returncode, python
        assert "3.11 or newer" in done.stderr and "Traceback" not in done.stderr, python
        tried += 1
    if not tried:
        pytest.skip("no old Python on this machine")


# --------------------------------------------------------------------------------------------------------- set-up


def test_first_call_installs_second_does_not(tree):
    assert re.search(r"(?s)setting up \.venv.*set-up finished", tree.echo())
    assert len(tree.pip_calls) == 1
    assert "-c" in tree.pip_calls[0] and tree.pip_calls[0].endswith("-e .[training,explain,test]")
    assert tree.echo() == ""
    assert len(tree.pip_calls) == 1


@pytest.mark.parametrize("file", ["pyproject.toml", "scripts/constraints.txt"])
def test_changed_file_installs_on_top(tree, file):
    tree.echo()
    before = tree.stamp
    tree.write(".venv/kept", "")
    tree.write(file, "changed\n")
    tree.echo()
    assert len(tree.pip_calls) == 2
    assert tree.stamp != before
    assert (tree.root / ".venv/kept").exists()
    assert tree.echo() == ""


def test_torch_index_goes_to_pip(tree):
    tree.echo(MANUALPROP_TORCH_INDEX="https://example.org/cpu")
    torch, rest = tree.pip_calls
    assert (
        torch.endswith("--no-deps --index-url https://example.org/cpu torch") and "constraints.txt" in torch
    )
    assert "--index-url" not in rest and rest.endswith("-e .[training,explain,test]")
    tree.echo(MANUALPROP_TORCH_INDEX="https://example.org/other")
    assert len(tree.pip_calls) == 2


def test_only_the_full_tests_install_what_they_alone_need(tree):
    (tree.root / "tests").mkdir()
    tree.run("test")
    assert len(tree.pip_calls) == 1
    for _ in range(2):
        tree.run("test", "--full")
    first, again, interop, backpack = tree.pip_calls
    assert first == again and interop.endswith("-e .[interop,release]")
    assert backpack.endswith("--no-deps backpack-for-pytorch") and "constraints.txt" in backpack
    tree.write("scripts/constraints.txt", "changed\n")
    tree.run("test")
    assert len(tree.pip_calls) == 5
    tree.run("test", "--full")
    assert len(tree.pip_calls) == 8


def test_moved_tree_is_set_up_anew(tree):
    """The editable install names the old folder."""
    tree.echo()
    tree.root = tree.root.rename(tree.root.with_name("moved"))
    tree.echo()
    assert len(tree.pip_calls) == 2


def test_foreign_venv_is_kept(tree):
    (tree.root / ".venv").mkdir()
    tree.write(".venv/theirs", "precious")
    assert ".venv.old1" in tree.echo()
    assert (tree.root / ".venv.old1/theirs").read_text() == "precious"
    assert tree.echo() == ""


def test_linked_venv_stays_linked(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tree.root / ".venv").symlink_to(elsewhere)
    tree.echo()
    (elsewhere / "bin/python").unlink()
    tree.echo()
    assert (tree.root / ".venv").is_symlink() and (elsewhere / "set-up").exists()


# ------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    "whom, how",
    [
        (os.killpg, signal.SIGINT),  # Ctrl-C
        (os.kill, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGKILL),
    ],
)
def test_interrupted_set_up_is_redone(tree, whom, how):
    tree.hold_pip()
    first = tree.start("bench", "echo", "hi")
    tree.wait_for_pip()
    whom(first.pid, how)
    status, _, err = finish(first)
    wait_for_the_lock(tree.root / ".venv.lock")  # free: nobody is left who holds it, pip neither
    assert status == (-how if how == signal.SIGKILL else 128 + how)
    assert "Traceback" not in err
    assert ("interrupted" in err) == (how == signal.SIGINT)
    assert tree.stamp == "unfinished\n" and (tree.root / ".venv/half-written").exists()
    tree.release_pip()
    err = tree.echo()
    assert "waiting" not in err and "set-up finished" in err
    assert not (tree.root / ".venv/half-written").exists()


def wait_for_the_lock(path):
    """A killed process gives its lock back when the system has done with it, a moment after the kill."""
    deadline = time.monotonic() + 10
    with open(path) as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "somebody still holds the lock"
                time.sleep(0.01)


def test_interrupted_update_is_redone_from_nothing(tree):
    tree.echo()
    tree.write(".venv/old", "")
    tree.write("pyproject.toml", "changed\n")
    tree.hold_pip()
    second = tree.start("bench", "echo", "hi")
    tree.wait_for_pip()
    os.killpg(second.pid, signal.SIGKILL)
    finish(second)
    tree.release_pip()
    tree.echo()
    assert not (tree.root / ".venv/old").exists()


def test_pip_that_outlives_its_parent_is_waited_for(tree):
    tree.hold_pip()
    first = tree.start("bench", "echo", "hi")
    tree.wait_for_pip()
    first.kill()  # the parent alone
    first.wait()  # its pipes stay open: pip has inherited them
    second = tree.start("bench", "echo", "hi")
    assert f"another run (process {first.pid}) is setting up .venv: waiting" in second.stderr.readline()
    assert len(tree.pip_calls) == 1
    tree.release_pip()
    assert finish(second)[0] == 7
    assert len(tree.pip_calls) == 2
    finish(first)


def test_deleted_python_is_replaced(tree):
    tree.echo()
    (tree.root / ".venv/bin/python").unlink()
    assert "set-up finished" in tree.echo()
    assert len(tree.pip_calls) == 2


def test_first_runs_at_once(tree):
    """One installs, the others wait for it and say so."""
    tree.hold_pip()
    first = tree.start("bench", "echo", "hi")
    tree.wait_for_pip()
    others = [tree.start("bench", "echo", "hi") for _ in range(2)]
    for other in others:
        assert f"another run (process {first.pid}) is setting up .venv: waiting" in other.stderr.readline()
    tree.release_pip()
    for process in (first, *others):
        status, out, err = finish(process)
        assert (status, out) == (7, "['hi']\n")
        assert ("set-up finished" in err) == (process is first)
    assert len(tree.pip_calls) == 1


# ------------------------------------------------------------------------------------------------------- failures

OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<HTTPSConnection>: Failed to
 establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch (from versions: none)
ERROR: No matching distribution found for torch"""
ABSENT = """ERROR: Could not find a version that satisfies the requirement torch==9 (from versions: 2.12.0, 2.13.0)
ERROR: No matching distribution found for torch==9"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
BROKEN = "ERROR: Something else\nnote: see above"
SHAKY = "WARNING: Retrying after connection broken by 'ReadTimeoutError'\n"


@pytest.mark.parametrize(
    "says, reason",
    [
        (OFFLINE, "the package index could not be reached: check the network"),
        (
            ABSENT,
            r"pip found no fitting version for Python 3\.\d+ on \w+: No matching distribution found for torch==9",
        ),
        (SHAKY + ABSENT, "pip found no fitting version"),  # the index did answer in the end
        (FULL, "the disk is full"),
        (BROKEN, "Something else"),
        ("", "no output"),
    ],
)
def test_failing_pip_gives_one_line(tree, says, reason):
    tree.write("pip-says", says)
    status, out, err = tree.run("bench", "echo")
    assert (status, out) == (1, "")
    _, line = err.splitlines()  # after "setting up"
    assert re.match(
        f"run.py: set-up failed: {reason}.*Full log: {re.escape(str(tree.root))}/.venv/install.log", line
    )
    assert says in (tree.root / ".venv/install.log").read_text()
    (tree.root / "pip-says").unlink()
    tree.echo()


def test_failing_torch_index_is_named(tree):
    tree.write("pip-says", OFFLINE)
    _, _, err = tree.run("bench", "echo", MANUALPROP_TORCH_INDEX="https://example.org/cpu")
    assert "MANUALPROP_TORCH_INDEX could not be reached" in err


def test_missing_ensurepip_says_what_to_install(tree):
    status, _, err = tree.run("bench", "echo", "no-ensurepip")
    assert status == 2
    assert re.fullmatch(
        r"run.py: .* `ensurepip` module is missing.* sudo apt install python3\.\d+-venv\n", err
    )
    assert not (tree.root / ".venv").exists()


def test_unwritable_folder_gives_one_line(tree):
    (tree.root / ".venv.lock").mkdir()  # cannot be opened for writing, not even by root
    status, _, err = tree.run("bench", "echo")
    assert status == 1
    assert re.fullmatch(r"run.py: cannot set up \.venv in .*\.venv\.lock: Is a directory\n", err)


# ------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lnit"], "no command 'lnit': did you mean lint?"),
        (["xyzzy"], "no command 'xyzzy': see --help. Commands: bench, lint"),
        (["docs"], "docs: this checkout has no scripts/build_docs.py"),
        (["bench"], "which benchmark? There are: echo"),
        (["bench", "ecco"], "no benchmark 'ecco'. There are: echo"),
        (["lint", "manualprop"], "lint takes --fix or nothing. Got manualprop"),
    ],
)
def test_wrong_command_costs_no_set_up(tree, arguments, message):
    status, out, err = tree.run(*arguments)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not (tree.root / ".venv").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["help"], ["bench", "--help"], ["lint", "-h"]])
def test_help_lists_what_this_checkout_can_do(tree, arguments):
    status, out, _ = tree.run(*arguments)
    assert status == 0
    assert "bench NAME; NAME is echo" in out
    assert re.findall(r"^  ([a-z]+) ", out, re.M) == ["bench", "lint"]
    assert "MANUALPROP_TORCH_INDEX" in out
    status, out, err = tree.run()
    assert (status, out) == (2, "") and err.startswith("usage:")


def test_the_usage_fits_a_terminal_of_80_columns(run):
    assert max(map(len, run.usage().splitlines())) <= 80
    assert "manualprop" in run.offered()


CONSOLE = """
import os, sys
print(os.environ.get("MANUALPROP_COMMAND"), os.environ.get("MANUALPROP_CALLED_FROM"), sys.argv[1:], os.getcwd(), sep="|")
"""


def test_the_console_command_and_how_to_call_it_again(tree, tmp_path_factory):
    """The words that the user typed come back, and work from where they stand."""
    (tree.root / "manualprop").mkdir()
    tree.write("manualprop/__init__.py", "")  # or the installed package, which is no namespace, comes first
    tree.write("manualprop/__main__.py", CONSOLE)
    tree.echo()
    elsewhere = tmp_path_factory.mktemp("else where")
    script = os.path.relpath(tree.root / "driver.py", elsewhere)
    words = [sys.executable, script, "manualprop", "fit", "--name", "a b"]
    # The driver looks for run.py beside itself.
    environment = {**os.environ, "PYTHONPATH": str(tree.root / "scripts")}
    done = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command, folder, arguments, at = done.stdout.strip().split("|")
    assert arguments == "['fit', '--name', 'a b']", done.stderr
    assert (folder, at) == (str(elsewhere), str(tree.root))
    again = subprocess.run(
        f"{command} test", shell=True, cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert "|['test']|" in again.stdout, again.stderr


@pytest.mark.parametrize("name, tells", [("train", True), ("manualprop", True), ("test", False)])
def test_only_what_prints_commands_is_told_how_it_was_called(run, monkeypatch, name, tells):
    monkeypatch.delenv("MANUALPROP_COMMAND", raising=False)
    assert ("MANUALPROP_COMMAND" in run.command_environment(name)) is tells


@pytest.mark.parametrize("whom", [os.kill, os.killpg])
def test_ctrl_c_in_a_command(tree, whom):
    tree.echo()
    process = tree.start("bench", "echo", "wait")
    assert process.stdout.readline() == "['wait']\n"
    whom(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert "run.py" not in err  # a traceback would be the command's own


def test_ctrl_c_is_130_though_the_command_ends_well(tree):
    """pytest, for one, catches it and returns 2."""
    tree.write("scripts/bench_calm.py", CALM)
    process = tree.start("bench", "calm")
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == 130


def test_killed_command_and_terminated_run(tree):
    tree.write("scripts/bench_die.py", "import os; os.kill(os.getpid(), 9)")
    assert tree.run("bench", "die")[0] == 128 + 9
    process = tree.start("bench", "echo", "wait")
    process.stdout.readline()
    process.terminate()
    assert finish(process)[0] == 128 + 15  # finish reads to the end: the child is gone too


@pytest.mark.parametrize(
    "given, passed",
    [
        ([], ["-m", "not slow", "-n", "2"]),
        (["--full", "-q"], ["-n", "2", "-q"]),
        (["-n0", "x.py"], ["-m", "not slow", "-n0", "x.py"]),
        (["-m", "slow", "--numprocesses=3"], ["-m", "not slow", "-m", "slow", "--numprocesses=3"]),
        (["--pdb"], ["-m", "not slow", "--pdb"]),
        (["-p", "no:xdist"], ["-m", "not slow", "-p", "no:xdist"]),
    ],
)
def test_pytest_arguments(run, monkeypatch, given, passed):
    monkeypatch.setattr(run, "cores", lambda: 2)
    assert run.test(given) == [["-m", "pytest", *passed]]


def test_workers_share_the_cores(run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run.command_environment("test")["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in run.command_environment("train")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert run.command_environment("test")["OMP_NUM_THREADS"] == "4"


def test_pytest_keeps_what_it_compiles(run, monkeypatch):
    """Else it compiles all test files anew in every run and every worker."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in run.command_environment("test")
    assert "PYTHONDONTWRITEBYTECODE" in run.command_environment("train")


@pytest.mark.parametrize("statuses, result", [([0, 0, 0], 0), ([1, 0, 0], 1), ([0, 3, 0], 3), ([0, 0, 2], 2)])
def test_lint_runs_all_and_fails_if_any_does(run, monkeypatch, statuses, result):
    ran = []
    monkeypatch.setattr(run, "make_ready", lambda full: None)
    monkeypatch.setattr(run, "call", lambda command, _: ran.append(command[2:4]) or statuses[len(ran) - 1])
    assert run.main(["lint"]) == result
    assert ran == [["ruff", "check"], ["ruff", "format"], ["mypy"]]


@pytest.mark.parametrize("lint, test, result", [(0, 0, 0), (1, 0, 1), (0, 2, 2), (1, 2, 2)])
def test_ci_fails_with_lint_and_with_tests(tmp_path, lint, test, result):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    stub = f"import sys; print(sys.argv[1]); sys.exit(dict(lint={lint}, browser=1, test={test})[sys.argv[1]])"
    (tmp_path / "scripts/run.py").write_text(stub)
    done = subprocess.run([tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (result, "lint\nbrowser\ntest\n")
    assert ("lint failed" in done.stderr) == bool(lint)


# ----------------------------------------------------------------------------------------------------------- pins


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["training"],
        *extras["explain"],
        *extras["test"],
        *extras["interop"],
        *extras["release"],
    ]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if re.fullmatch(r"[\w.-]+==[\d.a-z]+", line)}
    assert names <= pinned
    assert "torch==2.13.0" in lines
