"""Check a custom backward: of any ``autograd.Function``, any module, any differentiable callable.

:func:`check` runs every probe and returns a :class:`Report`.  It never raises for a defect.  This folder imports torch
only, and does not depend on the layers of this package.
"""

from manualprop import _torch as _torch  # warns of an untested version
from manualprop.verify._case import Case as Case
from manualprop.verify._check import check as check
from manualprop.verify._pytest import gradient_tests as gradient_tests
from manualprop.verify._report import Outcome as Outcome
from manualprop.verify._report import Report as Report

__all__ = ["Case", "Outcome", "Report", "check", "gradient_tests"]
