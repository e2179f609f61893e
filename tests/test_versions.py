"""The range of torch: the warning outside of it, the generated page, pyproject.toml, the workflow and the pages."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import build_docs
import pytest
import run
import yaml
from conftest import record

import manualprop
from manualprop import _torch

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs/versions.md"
OWN = "test_the_range_is_that_of_the_versions_that_pass"

# Each of the first three parts is imported as if it were the only one; all others come after them.
OUTSIDE = """
import sys, warnings
import manualprop
assert "torch" not in sys.modules
import torch
torch.__version__ = {version!r}
del torch.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyOptions  # as before 2.13

def heard(*parts):
    with warnings.catch_warnings(record=True) as all_heard:
        warnings.simplefilter("always")
        for part in parts:
            __import__(f"manualprop.{{part}}")
    return [str(w.message) for w in all_heard if "manualprop" in str(w.message)]

for part in ("verify", "descent", "_receipt"):
    (line,) = heard(part)
    for name in [name for name in sys.modules if name.startswith("manualprop.")]:
        del sys.modules[name]
        vars(manualprop).pop(name.split(".")[1], None)
(line,) = heard("functions", "functional", "nn", "verify", "descent", "_receipt", "_backprop", "_swap", "interop")
x = torch.ones(2, 2, requires_grad=True)
manualprop.nn.Tanh()(x).sum().backward()
assert x.grad.shape == (2, 2)
try:
    manualprop.nn.LinearCrossEntropyLoss(2, 3)
except RuntimeError as error:
    assert "LinearCrossEntropyLoss: torch 2.13 or newer is needed. This is torch" in str(error)
else:
    raise AssertionError("what is missing was built")
print(line)
"""


@pytest.mark.parametrize("version", ["2.9.1", "2.99.0+cpu"])
def test_a_version_outside_of_the_range_is_told_once_and_works(version: str) -> None:
    code = OUTSIDE.format(version=version)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"tested with torch 2.13 and later, below 2.15. This is torch {version}" in done.stdout
    assert "pip install 'torch>=2.13,<2.15'" in done.stdout


@pytest.mark.parametrize("version", ["2.13.0", "2.14.1+cu130", "2.14.0a0+git1234"])
def test_a_version_in_the_range_is_not_mentioned(version: str) -> None:
    _torch.warn_if_untested(version)  # a warning would be an error


def test_the_range_is_that_of_the_versions_that_pass() -> None:
    """Each minor version in the range has a run, and none that fails (but for this very test); no other has."""
    (torch,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    first, beyond = (".".join(map(str, bound)) for bound in (_torch.FIRST, _torch.BEYOND))
    assert torch == f"torch>={first},<{beyond}"
    rows = re.findall(r"^\| 2\.(\d+)\.\d+ \|.* \| (\d{4,}) \| \d+ \| \d+ \| (.*) \|$", PAGE.read_text(), re.M)
    failing = {
        int(minor) for minor, _, which in rows if which not in ("-", f"`tests/test_versions.py::{OWN}`")
    }
    passing = {int(minor) for minor, _, _ in rows} - failing
    assert passing == set(range(_torch.FIRST[1], _torch.BEYOND[1]))


def test_the_page_takes_up_what_was_run_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    page = tmp_path / "docs/versions.md"

    def write(**changes: object) -> list[str]:
        run = {
            "torch": "2.9.1",
            "python": "3.11",
            "day": "2026-01-01",
            "passed": 7,
            "skipped": 1,
            "failed": [],
        }
        (tmp_path / ".venv-torch-x").mkdir(exist_ok=True)
        (tmp_path / ".venv-torch-x/suite-all.json").write_text(json.dumps(run | changes))
        assert build_docs.main(["versions"]) == 0
        return re.findall(r"^\| \d.*$", page.read_text(), re.M)

    old = "| 2.9.1 | 3.11 | all | 2026-01-01 | 7 | 1 | 0 | - |"
    assert write() == [old]
    failing = "| 2.10.0 | 3.11 | all | 2026-01-01 | 7 | 1 | 2 | `a.py::b`, `a.py::c[x]` |"
    assert write(torch="2.10.0", failed=["a.py::b", "a.py::c[x]"]) == [failing, old]
    assert write(torch="2.10.0", passed=9)[0] == "| 2.10.0 | 3.11 | all | 2026-01-01 | 9 | 1 | 0 | - |"
    assert build_docs.main(["versions", "--check"]) == 0


def test_a_run_is_recorded() -> None:
    report = pytest.TestReport("a.py::b", ("a.py", 1, "b"), {}, "failed", None, "call")
    found = record({"passed": [report] * 3, "error": [report], "xfailed": [report], "warnings": [report]})
    assert (found["passed"], found["skipped"], found["failed"]) == (3, 1, ["a.py::b"])
    assert str(found["torch"]).startswith("2.")


RECORDED = "def test_one(): pass\ndef test_two(): assert {passes}\n"


def test_only_a_run_that_came_to_its_end_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    for body, expected in ((RECORDED.format(passes=False), 1), ("raise KeyboardInterrupt", 2)):
        (tmp_path / "test_it.py").write_text(body)
        file = tmp_path / f"{expected}.json"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", f"--record={file}"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == expected, done.stdout
        assert file.exists() == (expected == 1)
    assert json.loads((tmp_path / "1.json").read_text())["failed"] == ["test_it.py::test_two"]


# ----- continuous integration, and what the pages tell to type -----


def test_the_workflow_runs_commands_that_exist() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = [
        line.replace("${{ matrix.torch }}", version).split() for line in lines for version in matrix["torch"]
    ]
    for python, script, name, *arguments in called:
        assert (python, script) == ("python3", "scripts/run.py")
        assert run.COMMANDS[name][0](arguments).steps  # arguments that are wrong raise
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
    assert {name for _, _, name, *_ in called} == {"lint", "test", "docs"}


def test_the_workflow_covers_the_ranges() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={matrix['python'][0]}"
    minors = [tuple(map(int, version.split(".")[:2])) for version in matrix["torch"]]
    assert minors == [(2, minor) for minor in range(_torch.FIRST[1], _torch.BEYOND[1])]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_page_names_commands_that_exist(page: str) -> None:
    named = set(re.findall(r"python3 scripts/run\.py ([a-z]+)", (ROOT / page).read_text()))
    assert named and named <= set(run.COMMANDS)


def test_the_changelog_has_its_form() -> None:
    """Keep a Changelog: sections by version, the newest first, and the current version among them."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?([^\]\s]+)", text, re.M)
    assert versions[0] == "Unreleased" and manualprop.__version__ in versions
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds
