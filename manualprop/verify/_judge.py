"""Run one probe on a subject, and turn whatever happens into an outcome."""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
import warnings

from manualprop.verify._case import Case
from manualprop.verify._diagnosis import of_refused_shape
from manualprop.verify._probe import Probe
from manualprop.verify._ready import look_at_less_if_quick, lower_if_needed, ready
from manualprop.verify._report import Outcome, finding, message, skipped
from manualprop.verify._subject import BadUse, OutsideDomain, Subject

_HERE = os.path.dirname(__file__)


def judged(probe: Probe, subject: Subject) -> Outcome:
    """The outcome of one probe.  An exception in the checked code is a finding."""
    start = time.perf_counter()
    subject.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not subject.settled:
            subject.settled = True
            lower_if_needed(subject)
            look_at_less_if_quick(subject)
        try:
            outcome = probe.run(subject.fresh())
        except OutsideDomain as error:
            outcome = skipped(f"not measured: {error}")
        except Exception as error:  # whatever the checked code raises
            outcome = _raised(probe, subject, error)
        finally:
            subject.restore()
    notes = (subject.note,) if subject.note else ()
    return dataclasses.replace(outcome, probe=probe.name, seconds=time.perf_counter() - start, notes=notes)


def _raised(probe: Probe, subject: Subject, error: Exception) -> Outcome:
    """What an exception in a probe means.  If the plain run raises it too, first_order alone reports it."""
    if probe.name != "first_order" and _plain_backward_raises(subject):
        return skipped("the plain backward raises: see first_order")
    if _of_our_own(error):
        return skipped(f"not measured: the probe itself raises {message(error)}")
    return finding(f"raises {message(error)}", of_refused_shape(str(error), subject))


def _of_our_own(error: Exception) -> bool:
    """Whether the probe raised it, and not the checked code."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(f.name in ("allowed", "_projected", "made") and _is_ours(f) for f in frames):
        return True  # the domain, project or inputs of the case
    # A function in C has no frame of its own: the last frame is then the one that calls it.
    return _is_ours(frames[-1]) and frames[-1].name not in ("called", "call", "meant")


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_HERE)


def _plain_backward_raises(subject: Subject) -> bool:
    try:
        subject.gradients()
    except Exception:  # whatever the checked code raises
        return True
    return False


def prepared(case: Case, quick: bool) -> Subject | Outcome:
    """The case, ready to run; or the finding that it does not run at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subject = ready(case)
            subject.quick = quick
            return subject
        except BadUse:
            raise
        except Exception as error:  # whatever the checked code raises
            return dataclasses.replace(finding(f"the plain call raises {message(error)}"), probe="call")
