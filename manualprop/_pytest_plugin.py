"""pytest plugin: the fixture ``verify_gradients``, and ``--manualprop-intercept``.

It is loaded in every pytest run of an environment, so it imports pytest alone; torch comes when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
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


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Before any conftest: a module may keep `op = MyFunction.apply`, which must be ours by then.
    packages = early_config.known_args_namespace.manualprop_intercept
    if packages:
        early_config.pluginmanager.register(_Intercepting(packages), "manualprop-interceptor")


class _Intercepting:
    """Verifies, after each test, the Functions that it called."""

    def __init__(self, packages: list[str]) -> None:
        from manualprop.verify._intercept import Interceptor

        self.interceptor = Interceptor(packages)

    def pytest_runtest_setup(self) -> None:
        self.interceptor.watch_overriding()

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self) -> Generator[None, object, object]:
        result = yield
        wrong = self.interceptor.verify()
        if wrong:
            pytest.fail("\n\n".join(map(str, wrong)), pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("gradients verified")
        for line in self.interceptor.summary():
            terminalreporter.write_line(line)


@pytest.fixture
def verify_gradients() -> Callable[..., Report]:
    """``verify_gradients(fn, *args, **options)``: :func:`manualprop.verify.check`, failing the test on a finding."""

    def verify(fn: Any, *args: Any, **options: Any) -> Report:
        __tracebackhide__ = True
        from manualprop.verify import check

        report = check(fn, *args, **options)
        report.assert_passed()
        return report

    return verify
