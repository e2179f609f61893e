"""``manualprop.verify`` on functions with a planted defect and on right ones (``planted``).

Two rows for each probe run always, all of them under ``--full``.
"""

import re
from collections import Counter

import pytest
import torch
from planted import CONTROLS, DEFECTS, Call, Control, Defect

from manualprop.verify import Report, check

AT_KINKS = ("_at_ties", "_at_zero", "_at_its_bounds", "_at_its_kink")
HIDDEN = {  # one for each law and cure; the whole table of pairs is slow
    "softmax_twice_too_steep_and_forgets_the_last_columns",
    "slope_of_an_arctangent_and_forgets_the_last_rows",
    "keeps_its_input_on_aclass_and_detaches_its_slope",
}
COMPILED = {"compile", "poisoned_backward"}  # seconds each


def rows(table):
    """All rows; but for two of each probe they are slow."""
    seen, found = Counter(), []
    for row in table:
        first = row.probes[0] if isinstance(row, Defect) else row.tempts[0]
        seen[first] += 1
        slow = seen[first] > 2 or first in COMPILED or "time_limit" in row.options
        found.append(pytest.param(row, id=row.name, marks=[pytest.mark.slow] if slow else []))
    return found


def checked(row: Defect | Control, **options) -> Report:
    call = row.make()
    args = () if "inputs" in row.options else call.args
    report = check(call.fn, *args, kwargs=call.kwargs, **{**row.options, **options})
    assert not [o for o in report if "the probe itself raises" in o.evidence], report.table()
    return report


# ---------------------------------------------------------------- the tables themselves


@pytest.mark.parametrize("defect", rows(DEFECTS))
def test_a_planted_defect_is_one(defect: Defect) -> None:
    """By hand.  The gradients differ from those of the right function; or agree, and the defect shows elsewhere."""
    assert defect.shows is not None or defect.truth is not None
    if defect.truth is not None:
        given = defect.make().gradients()
        call = defect.make()
        right = Call(defect.truth, call.args, call.kwargs).gradients()
        agree = all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(given, right, strict=True))
        assert agree == (defect.shows is not None)
    if defect.shows is not None:
        assert defect.shows(defect.make())


@pytest.mark.parametrize("control", rows(CONTROLS))
def test_a_control_is_right(control: Control) -> None:
    """By gradcheck, but at a kink, where it asks too much, and where another gradient is declared."""
    call = control.make()
    if (
        "surrogate" in control.options
    ):  # by autograd, of the function that backward is meant to be the gradient of
        meant = Call(control.options["surrogate"], control.make().args, call.kwargs)
        for given, right in zip(call.gradients(), meant.gradients(), strict=True):
            torch.testing.assert_close(given, right)
        return
    if "project" in control.options:  # along what stays allowed
        right, project = call.fn, control.options["project"]
        call = Call(lambda a: right(project(a)), call.args)
    wanted = call.wanted()
    assert wanted
    on_purpose = {"first_order", "linearity"} & set(control.options.get("accept", {}))
    if control.name.endswith(AT_KINKS) or on_purpose:
        assert all(g.isfinite().all() for g in call.gradients())
        return

    def outputs(*_):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return tuple(y for y in call() if y.is_floating_point() and y.requires_grad)

    if all(t.dtype in (torch.float64, torch.complex128) for t in wanted):
        assert torch.autograd.gradcheck(outputs, wanted, fast_mode=True, rtol=1e-5, atol=1e-6)
        return
    # In float32 a difference over 0.01 is right to a hundredth at best: it catches a wrong formula, no more.
    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(outputs, wanted, fast_mode=True, eps=1e-2, rtol=1e-2, atol=1e-2)


def test_the_tables_are_wide() -> None:
    assert len(DEFECTS) >= 150
    assert len(CONTROLS) >= 120
    names = [row.name for row in (*DEFECTS, *CONTROLS)]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------- the checker


@pytest.mark.parametrize("defect", rows(DEFECTS))
def test_a_defect_is_found_by_the_right_probe_and_explained(defect: Defect) -> None:
    right = defect.probes[0]
    # A call that fails comes before any probe.
    report = checked(defect, only=None if right == "call" else right)
    found = [o for o in report.findings if o.probe == right]
    assert found, f"{right} finds nothing:\n{report}"
    said = f"{found[0].diagnosis} {found[0].evidence}"
    assert defect.says is None or re.search(defect.says, said), f"expected {defect.says!r}: {said}"


@pytest.mark.parametrize("defect", [pytest.param(d, id=d.name) for d in DEFECTS if d.name in HIDDEN])
def test_a_defect_hidden_behind_another_is_found(defect: Defect) -> None:
    report = checked(defect, level="quick", only=(*defect.probes, *defect.also), isolate=False)
    assert [o.probe for o in report.findings] == [*defect.probes, *defect.also], str(report)


@pytest.mark.parametrize("control", rows(CONTROLS))
def test_a_control_raises_no_finding_where_it_is_likeliest(control: Control) -> None:
    checked(control, only=control.tempts).assert_passed()


@pytest.mark.slow
@pytest.mark.parametrize("control", [pytest.param(c, id=c.name) for c in CONTROLS])
def test_a_control_raises_no_finding_at_all(control: Control) -> None:
    checked(control, level="full").assert_passed()


@pytest.mark.slow
@pytest.mark.parametrize("defect", [pytest.param(d, id=d.name) for d in DEFECTS])
def test_a_whole_check_finds_each_cause_once(defect: Defect) -> None:
    report = checked(defect, level="deep" if defect.probes[0] == "third_order" else "full")
    found = [o.probe for o in report.findings if o.probe not in defect.also]
    assert len(found) == 1 and found[0] in defect.probes, f"one cause, one finding:\n{report}"
    assert {o.probe for o in report.findings} >= set(defect.also), str(report)
