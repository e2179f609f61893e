"""What is installed and what is published: the wheel, the source archive, the editable install, their metadata."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import manualprop

ROOT = Path(__file__).resolve().parent.parent
# What a clone holds, without what lies in a working tree besides.
PARTS = (
    "manualprop",
    "docs",
    "recipes",
    "scripts",
    "tests",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "pyproject.toml",
)

BUILD = """
import sys
from setuptools import build_meta
_, folder, *kinds = sys.argv  # setuptools overwrites it
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(folder)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, in a folder that has the package's name, as `git clone` makes it."""
    folder = tmp_path_factory.mktemp("above") / "manualprop"
    folder.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=leave)
        else:
            shutil.copy(source, folder / part)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source archive and, in a folder within, the wheel of an editable install."""
    folder = tmp_path_factory.mktemp("built")
    for place, kinds in ((folder, ("sdist", "wheel")), (folder / "editable", ("editable",))):
        place.mkdir(exist_ok=True)
        words = [sys.executable, "-c", BUILD, str(place), *kinds]
        done = subprocess.run(words, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_a_script_in_the_folder_above_the_clone_finds_the_package(clone: Path, built: Path) -> None:
    """Python looks beside the script first, and there the clone's folder has the package's name."""
    site = built / "site"
    with zipfile.ZipFile(one(built / "editable", "*.whl")) as wheel:
        wheel.extractall(site)
    script = clone.parent / "script.py"
    script.write_text(
        f"import site; site.addsitedir({str(site)!r})\nimport manualprop; print(manualprop.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-S", str(script)], env={}, capture_output=True, text=True)
    assert done.stdout == f"{manualprop.__version__}\n", done.stderr


def test_a_folder_that_hides_the_package_is_told_so_in_one_line(clone: Path) -> None:
    """Without an installation the clone's folder is found, and the package in it under the wrong name."""
    code = "import manualprop.manualprop"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=clone.parent, env={}, capture_output=True, text=True
    )
    *_, last = done.stderr.splitlines()
    assert re.fullmatch(
        r"ImportError: manualprop: the folder '.*/manualprop' holds the repository, and hides the package in it\. "
        r"Run from another folder, or install it: pip install -e .*/manualprop",
        last,
    )
    assert str(clone) in last


def test_the_wheel_holds_the_package_and_its_data_alone(built: Path) -> None:
    with zipfile.ZipFile(one(built, "*.whl")) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"manualprop"}
    data = {"py.typed", "training/data/digits.gz", *(f"training/help/{c}.txt" for c in ("fit", "test"))}
    assert {f"manualprop/{name}" for name in data} <= set(names)


def test_links_work_from_the_source_archive(built: Path, tmp_path: Path) -> None:
    """Every relative link of the README and of the pages leads to a file of the archive."""
    with tarfile.open(one(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    root = one(tmp_path, "manualprop-*")
    pages = [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]
    assert len(pages) > 10
    links = [(p, target) for p in pages for target in re.findall(r"\]\(([^)\s]+)\)", prose(p))]
    assert len(links) > 15
    for page, target in links:
        path, _, _ = target.partition("#")
        assert re.match("https?:", target) or not path or (page.parent / path).exists(), (
            f"{page.name}: {target}"
        )
    named = re.findall(
        r"`((?:manualprop|recipes|scripts|tests|docs)/[\w/.]+\.\w+)`", (root / "README.md").read_text()
    )
    assert named and all((root / name).exists() for name in named), named
    assert (root / "manualprop/training/help/fit.txt").exists()


def prose(page: Path) -> str:
    """A page without its blocks of code, where `](x)` is a call."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("twine") is None, reason="scripts/run.py test --full installs twine"
)
def test_the_archives_pass_twine(built: Path) -> None:
    words = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.glob("*.*"))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2
