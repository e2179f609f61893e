"""Every function of ours passes its own checker, at its deepest, with no limit declared and none observed."""

import pytest
from cases import CASES, Case

from manualprop import functional as F
from manualprop.verify import check

# The deepest level takes some seconds a row.
ONE_OF_EACH = list({case.name: case for case in CASES}.values())


def verified(case: Case, level: str, **options):
    kwargs = {k: v for k, v in case.kwargs.items() if k not in case.by_name}
    arguments = case.made()
    count = len(arguments) - len(case.by_name)
    kwargs |= dict(zip(case.by_name, arguments[count:], strict=True))
    # Of an embedding the row of padding_idx has no gradient, by definition.
    accept = (
        {"first_order": "of the row of padding_idx there is none"}
        if "first_derivative" in case.except_for
        else {}
    )
    # A place that comes twice has torch's slope, 1 for both numbers; docs/limits.md says so.
    unique = ["indices"] if case.name.startswith("max_unpool") else []
    return check(
        getattr(F, case.name),
        *arguments[:count],
        kwargs=kwargs,
        level=level,
        accept=accept,
        unique=unique,
        **options,
    )


def assert_without_limits(case: Case, report) -> None:
    # As torch: it refuses to batch the noise that it draws for rrelu, and some inputs that have no entry.
    # Mixed dtypes and other ranks are refused loudly by some, as by torch.
    known = {"zero_size", "mixed_dtypes", "ranks", "indices"} | {
        "rrelu": {"vmap", "vmap_grad", "jacrev", "jacfwd"}
    }.get(case.name, set())
    assert {outcome.probe for outcome in report.limits} <= known, report


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES])
def test_no_finding_in_any_configuration(case: Case) -> None:
    report = verified(case, "quick")
    report.assert_passed()
    assert_without_limits(case, report)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in ONE_OF_EACH])
def test_no_finding_in_the_deepest_probes(case: Case) -> None:
    report = verified(case, "deep")
    report.assert_passed()
    assert_without_limits(case, report)


@pytest.mark.parametrize("name", ["tanh", "linear", "cross_entropy", "layer_norm"])
def test_no_finding_at_the_quick_level(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    report = verified(case, "quick")
    report.assert_passed()
    assert_without_limits(case, report)
