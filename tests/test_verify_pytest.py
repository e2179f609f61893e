"""The pytest plugin: items for probes, the fixture, and the interception of a suite."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torch.autograd import Function

from manualprop.verify._intercept import Interceptor

pytest_plugins = ["pytester"]

# Installed, pytest finds the plugin by its entry point; in a bare checkout it is named.
INSTALLED = any(e.value == "manualprop._pytest_plugin" for e in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "manualprop._pytest_plugin")

OPS = """
    import torch

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Steep(Sine):
        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0].cos()

    class OwnApply(Steep):
        @classmethod
        def apply(cls, *args):
            return super(torch.autograd.Function, cls).apply(*args)

    class ByChance(Sine):
        @staticmethod
        def forward(ctx, x):
            import random
            ctx.save_for_backward(x)
            return x.sin() + random.random()

    sine, steep, by_chance = Sine.apply, Steep.apply, ByChance.apply
"""


def run(pytester: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(
        ops=OPS, test_ops=f"import torch, ops\nfrom manualprop.verify import gradient_tests\n{tests}"
    )
    alone = [] if "-n" in options else ["-p", "no:xdist"]
    return pytester.runpytest_subprocess(*PLUGIN, *alone, "-W", "error", *options)


@pytest.mark.slow
def test_one_item_for_each_probe(pytester: pytest.Pytester) -> None:
    tests = """
x = torch.randn(3, requires_grad=True)
only = ["first_order", "second_order", "forward_mode", "reference"]
test_sine = gradient_tests(ops.sine, x, only=only)
test_accepted = gradient_tests(ops.sine, inputs=(x,), only=only, accept={"forward_mode": "no jvp"})
test_works_after_all = gradient_tests(ops.sine, inputs=lambda: x, only=only, accept={"second_order": "a kernel"})
test_group_works = gradient_tests(ops.sine, inputs=lambda rows=3: torch.randn(rows, requires_grad=True), only=only,
                                  accept={"double_backward": "a kernel"})
test_steep = gradient_tests(ops.steep, x, only=only)
"""
    result = run(pytester, tests, "-v", "-rxs", "-k", "not third")
    result.stdout.fnmatch_lines(
        [
            "*test_sine?first_order? PASSED*",
            "*test_sine?forward_mode? SKIPPED*limit*",
            "*test_sine?reference? SKIPPED*",
            "*test_accepted?forward_mode? XFAIL*",
            "*test_works_after_all?second_order? FAILED*",
            "*test_group_works?first_order? PASSED*",
            "*test_group_works?second_order? FAILED*",
            "*test_steep?first_order? FAILED*",
            "*test_steep?second_order? PASSED*",
            "*accepted because of 'a kernel', but it passes: take 'second_order' out*",
            "*constant factor 2: doubled*",
        ]
    )
    again = run(pytester, tests, "-q", "-k", "test_steep and first_order")
    again.assert_outcomes(failed=1, deselected=19)


def test_an_unknown_probe_is_refused_when_it_is_written(pytester: pytest.Pytester) -> None:
    result = run(pytester, "test_sine = gradient_tests(ops.sine, accept={'vmapp': 'why'})")
    result.stdout.fnmatch_lines(["*ValueError: check: accept must name probes. Got 'vmapp'*"])


def test_what_pyproject_accepts_holds_for_items_fixture_and_interception(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("""
        [tool.manualprop.verify.accept."ops.Steep"]
        first_order = "steeper, on purpose"
        """)
    tests = """
x = torch.randn(3, requires_grad=True)
test_item = gradient_tests(ops.steep, x, only="first_order")

def test_fixture(verify_gradients):
    report = verify_gradients(ops.steep, x, only="first_order")
    assert [o.verdict for o in report] == ["accepted"]

def test_intercepted():
    ops.steep(torch.randn(3, requires_grad=True))
"""
    result = run(pytester, tests, "--manualprop-intercept=ops", "--manualprop-only=first_order", "-rx")
    result.assert_outcomes(passed=2, xfailed=1)
    result.stdout.fnmatch_lines(["ops.Steep: no finding, 1 accepted*", "*steeper, on purpose*"])


@pytest.mark.slow
def test_interception_with_a_baseline_fails_for_what_is_new(pytester: pytest.Pytester) -> None:
    tests = """
def test_steep():
    ops.steep(torch.randn(3, requires_grad=True))

def test_own_apply():
    ops.OwnApply.apply(torch.randn(3, requires_grad=True))
"""
    options = [
        "--manualprop-intercept=ops",
        "--manualprop-only=first_order",
        "--manualprop-baseline=known.json",
    ]
    run(pytester, tests, *options, "--manualprop-update-baseline", "-k", "steep").assert_outcomes(
        passed=1, deselected=1
    )
    run(pytester, tests, *options).assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"level": "slow"}, "the level must be one of quick, full, deep. Got 'slow'"),
        ({"only": ["vmapp"]}, "Did you mean 'vmap'"),
        ({"baseline": Path("no-such.json")}, "there is no baseline no-such.json"),
        ({"update": True}, "name the baseline"),
    ],
)
def test_a_mistake_in_the_interception_is_told_before_anything_is_wrapped(options, text) -> None:
    apply = Function.apply
    with pytest.raises(ValueError, match=text):
        Interceptor(["ops"], **options)
    assert Function.apply == apply


def test_the_fixture(pytester: pytest.Pytester) -> None:
    tests = """
def test_right(verify_gradients):
    assert verify_gradients(ops.sine, torch.randn(3, requires_grad=True), only="first_order").passed

def test_wrong(verify_gradients):
    verify_gradients(ops.steep, torch.randn(3, requires_grad=True), only="first_order")
"""
    result = run(pytester, tests)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*constant factor 2: doubled*"])


SUITE = """
import unittest
def test_right():
    ops.sine(torch.randn(3, requires_grad=True)).sum().backward()

def test_wrong():
    ops.steep(torch.randn(3, 2, requires_grad=True))

def test_wrong_once_more():
    ops.steep(torch.randn(5, 2, requires_grad=True))  # the same kind of call: told once

def test_no_gradient():
    ops.steep(torch.randn(3))

def test_own_apply():
    ops.OwnApply.apply(torch.randn(3, requires_grad=True))

class TestOldStyle(unittest.TestCase):
    def test_by_unittest(self):
        ops.steep(torch.randn(5, requires_grad=True))

def test_fails_by_itself():
    ops.steep(torch.randn(2, 3, 4, requires_grad=True))
    assert False

def test_innocent():
    pass

def test_traced():
    torch.func.vmap(ops.Sine.forward, in_dims=(None, 0))
    torch.compile(ops.sine, backend="eager")(torch.randn(2, 2, 2, requires_grad=True))
"""


def test_interception_fails_the_test_that_meets_a_wrong_function(pytester: pytest.Pytester) -> None:
    result = run(pytester, SUITE, "--manualprop-intercept=ops", "-v")
    result.stdout.fnmatch_lines(
        [
            "*test_right PASSED*",
            "*test_wrong FAILED*",
            "*test_wrong_once_more PASSED*",
            "*test_no_gradient PASSED*",
            "*test_own_apply FAILED*",
            "*test_by_unittest FAILED*",
            "*test_fails_by_itself FAILED*",
            "*test_innocent PASSED*",
            "*test_traced PASSED*",
            "called with float32[[]3, 2[]] that requires grad",
            "*constant factor 2: doubled*",
            "*again: *pytest test_ops.py::test_wrong --manualprop-intercept=ops --manualprop-only=first_order",
            "*Captured gradients call*",
            "*gradients verified*",
            "ops.Sine: no finding*",
            "ops.Steep: * finding*",
        ]
    )
    result.assert_outcomes(passed=5, failed=4)


@pytest.mark.parametrize("workers", [[], pytest.param(["-n", "2"], marks=pytest.mark.slow)])
def test_what_the_interception_cannot_verify_stands_in_the_junit_file(
    pytester: pytest.Pytester, workers: list[str]
) -> None:
    tests = """
def test_by_chance():
    ops.by_chance(torch.randn(3, requires_grad=True))

def test_fine():
    pass
"""
    options = ["--manualprop-intercept=ops", "--manualprop-only=first_order", "--junitxml=out.xml", *workers]
    result = run(pytester, tests, *options)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["ops.ByChance: not verified: *must give the same output*"])
    cases = list(ElementTree.parse(pytester.path / "out.xml").getroot().iter("testcase"))
    reasons = [skipped.get("message", "") for case in cases for skipped in case.iter("skipped")]
    assert len(cases) == 3
    assert [text.startswith("not verified: ops.ByChance must give the same output") for text in reasons] == [
        True
    ]


def test_interception_of_a_package_that_no_test_uses_says_so(pytester: pytest.Pytester) -> None:
    result = run(pytester, SUITE, "--manualprop-intercept=other")
    result.assert_outcomes(passed=8, failed=1)
    result.stdout.fnmatch_lines(
        ["no torch.autograd.Function of other was called*", "other was never imported: is that its name?"]
    )


def test_the_plugin_loads_neither_torch_nor_the_package() -> None:
    code = (
        "import sys, manualprop._pytest_plugin; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'lightning') or m == 'manualprop.verify'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_entry_point_is_declared() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nmanualprop = "manualprop._pytest_plugin"' in pyproject
