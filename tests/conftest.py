"""Hooks of the suite: the memory of its workers, and a record of a whole run for docs/versions.md."""

import datetime
import gc
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  # its plugins ask who refers to an object, which gc.freeze hides: so before that
import pytest


def pytest_collection_finish() -> None:
    """Every worker holds all tests: the garbage collector need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs are kept in a folder of the session, and not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANUALPROP_PROGRAMS", str(tmp_path_factory.mktemp("programs")))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", type=Path, help="write what passed and failed into FILE")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if config.getoption("--record") and ended:
        config.getoption("--record").write_text(json.dumps(record(terminalreporter.stats)))


def record(stats: dict[str, list[pytest.TestReport]]) -> dict[str, object]:
    """What `docs versions` puts into a row."""
    count = {key: len(reports) for key, reports in stats.items()}
    return {
        "torch": importlib.metadata.version("torch").partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "day": datetime.date.today().isoformat(),
        "passed": count.get("passed", 0),
        "skipped": count.get("skipped", 0) + count.get("xfailed", 0),
        "failed": sorted(report.nodeid for key in ("failed", "error") for report in stats.get(key, [])),
    }
