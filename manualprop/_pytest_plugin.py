"""pytest plugin: the fixture ``verify_gradients``, and ``--manualprop-intercept``.

It is loaded in every pytest run of an environment, so it imports pytest alone; torch comes when it is used.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from manualprop.verify import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("manualprop", "verification of gradients")
    group.addoption(
        "--manualprop-intercept",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="verify every torch.autograd.Function of this package at the inputs that the tests call it with; "
        "a test that meets a wrong one fails",
    )
    group.addoption(
        "--manualprop-level",
        metavar="LEVEL",
        help="quick (the default), full or deep, of what is intercepted",
    )
    group.addoption("--manualprop-only", metavar="PROBE[,PROBE]", help="these probes only")
    group.addoption(
        "--manualprop-baseline",
        metavar="FILE",
        help="findings that are known: they fail no test, new ones do",
    )
    group.addoption(
        "--manualprop-update-baseline",
        action="store_true",
        default=False,
        help="write what is found into the baseline, and fail no test",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Before any conftest: a module may keep `op = MyFunction.apply`, which must be ours by then.
    options = early_config.known_args_namespace
    if options.manualprop_intercept:
        early_config.pluginmanager.register(_Intercepting(options), "manualprop-interceptor")


class _Intercepting:
    """Verifies, after each test, the Functions that it called."""

    def __init__(self, options: Any) -> None:
        from manualprop.verify._intercept import Interceptor

        self.left: list[Report] = []  # with findings, and of no test
        self.told: list[str] = []  # by the processes of xdist
        self.unverified: list[tuple[str, str]] = []  # by them, too
        if options.manualprop_update_baseline and getattr(options, "numprocesses", None):
            raise pytest.UsageError("--manualprop-update-baseline writes from one process: add -n 0")
        only, baseline = options.manualprop_only, options.manualprop_baseline
        try:
            self.interceptor = Interceptor(
                options.manualprop_intercept,
                options.manualprop_level,
                only.split(",") if only else None,
                Path(baseline) if baseline else None,
                options.manualprop_update_baseline,
            )
        except ValueError as mistake:
            raise pytest.UsageError(f"--manualprop-intercept: {mistake}") from None

    def pytest_runtest_setup(self) -> None:
        self.interceptor.watch_overriding()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        options = " ".join(f"--manualprop-intercept={name}" for name in self.interceptor.packages)
        again = f"pytest {shlex.quote(item.nodeid)} {options} --manualprop-only="
        try:
            result = yield
        except (Exception, pytest.fail.Exception):  # it fails already; the next test is not to blame
            for report in self.interceptor.verify(again):
                item.add_report_section("call", "gradients", str(report))
            raise
        wrong = self.interceptor.verify(again)
        if wrong:
            pytest.fail("\n\n".join(map(str, wrong)), pytrace=False)
        return result

    @pytest.hookimpl(tryfirst=True)  # before the JUnit file is written
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.left = self.interceptor.verify()  # what fixtures called after the last test
        if self.left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(session.config, "workeroutput"):  # a process of xdist: the first one prints
            session.config.workeroutput["manualprop"] = self.lines(), self.interceptor.unverified
        else:
            self.unverified += self.interceptor.unverified
            self._log_unverified(session.config)
        self.interceptor.finish()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        lines, unverified = getattr(node, "workeroutput", {}).get("manualprop", ([], []))
        self.told += lines
        self.unverified += [(name, why) for name, why in unverified]

    def _log_unverified(self, config: pytest.Config) -> None:
        """Tell the JUnit file, and other reports, of what was not verified: a skipped test each."""
        terminal = config.pluginmanager.getplugin("terminalreporter")  # its section says it
        log = config.pluginmanager.subset_hook_caller(
            "pytest_runtest_logreport", [terminal] if terminal else []
        )
        for name, why in dict.fromkeys(self.unverified):
            log(
                report=pytest.TestReport(
                    nodeid=f"manualprop::{name}",
                    location=("manualprop", 0, name),
                    keywords={},
                    outcome="skipped",
                    longrepr=("manualprop", 0, f"Skipped: not verified: {why}"),
                    when="call",
                )
            )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("gradients verified")
        for line in self.told or self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> list[str]:
        """The summary, after what no test could report."""
        return [*map(str, self.left), *self.interceptor.summary()]


@pytest.fixture
def verify_gradients() -> Callable[..., Report]:
    """``verify_gradients(fn, *args, **options)``: :func:`manualprop.verify.check`, failing the test on a finding."""

    def verify(fn: Any, *args: Any, **options: Any) -> Report:
        __tracebackhide__ = True
        from manualprop.verify import check

        report = check(fn, *args, **{**options, "accept": _accepted(fn, options.get("accept"))})
        report.assert_passed()
        return report

    return verify


def _accepted(fn: Any, accept: dict[str, str] | None) -> dict[str, str]:
    """What pyproject.toml accepts of it, and what the test does."""
    from manualprop.verify import Case
    from manualprop.verify._settings import project_settings

    function, name = (fn.fn, fn.name) if isinstance(fn, Case) else (fn, "")
    return {**project_settings().accepted(function, name), **(accept or {})}
