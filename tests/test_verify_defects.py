"""``manualprop.verify`` on functions with a planted defect and on right ones (``planted``)."""

import pytest
import torch
from planted import CONTROLS, DEFECTS, Call, Control, Defect

AT_KINKS = {c.name for c in CONTROLS if c.name.endswith(("_at_ties", "_at_zero", "_at_its_bounds"))}


@pytest.mark.parametrize("defect", [pytest.param(d, id=d.name) for d in DEFECTS])
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


@pytest.mark.parametrize("control", [pytest.param(c, id=c.name) for c in CONTROLS])
def test_a_control_is_right(control: Control) -> None:
    """By gradcheck, but at a kink, where it asks too much, and where another gradient is declared."""
    call = control.make()
    wanted = call.wanted()
    assert wanted
    if control.name in AT_KINKS or "first_order" in control.options.get("declare", {}):
        assert all(g.isfinite().all() for g in call.gradients())
        return

    def outputs(*_):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return tuple(y for y in call() if y.is_floating_point() and y.requires_grad)

    assert torch.autograd.gradcheck(outputs, wanted, fast_mode=True, rtol=1e-5, atol=1e-6)
