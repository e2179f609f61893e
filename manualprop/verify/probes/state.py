"""What a function leaves behind: in its arguments, and in the random generators."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from manualprop.verify._probe import probe
from manualprop.verify._report import Outcome, finding, limit, passed
from manualprop.verify._subject import Subject
from manualprop.verify.probes._runs import (
    Call,
    bits,
    differentiable,
    differs,
    outputs_named,
    run,
    same_bits,
)

# ----- what is written into -----


@probe()
@differentiable
def mutation(s: Subject) -> Outcome:
    """Neither forward nor backward writes into what it was given, unless autograd is told."""
    call = Call(s)
    before = {name: (bits(t), t._version, t.grad_fn) for name, t in call.given.items()}
    call.forward()
    notes = []
    for name, t in call.given.items():
        old, version, grad_fn = before[name]
        if same_bits(t, old) or any(t is y for y in call.returned) or t.grad_fn is not grad_fn:
            continue  # mark_dirty, or an operation in place that autograd recorded
        verdict = _written_in_forward(s, name, t._version != version)
        if verdict is not None:
            return verdict
        notes.append(f"forward updates {name}")
    held = {
        **call.given,
        **{f"output {i}": y for i, y in enumerate(call.returned)},
        **{f"grad_output {i}" if len(s.outputs) > 1 else "grad_output": c for i, c in _fresh(s)},
    }
    before_backward = {name: bits(t) for name, t in held.items()}
    cotangents = [held[name] for name in held if name.startswith("grad_output")]
    call.s.pull_back(call.outputs, call.leaves, cotangents)
    changed = [name for name, t in held.items() if not same_bits(t, before_backward[name])]
    if changed:
        return finding(
            f"backward writes into {', '.join(changed)}",
            f"overwritten in backward: {', '.join(changed)}",
            changed=changed,
        )
    return passed("; ".join(notes) or f"{', '.join(held)} unchanged")


def _fresh(s: Subject) -> list[tuple[int, Tensor]]:
    return [(i, c.clone()) for i, c in enumerate(s.cotangents)]


def _written_in_forward(s: Subject, name: str, counted: bool) -> Outcome | None:
    """What to say of a tensor that forward has changed; None if that is what the tensor is for."""
    if name in s.own_buffers():
        return None
    if name not in s.names and _only_written(s, name):
        return None  # a running statistic
    if name in s.own_parameters() and counted:  # as torch's own embedding does for max_norm
        return limit(f"forward writes into its parameter {name}")
    how = "without mark_dirty" if counted else "where autograd cannot see it"
    return finding(f"forward writes into its input {name}, {how}", f"overwritten input: {name}")


def _only_written(s: Subject, name: str) -> bool:
    """Whether the outputs do not depend on a floating argument."""
    call = Call(s)
    t = call.given[name]
    if not t.is_floating_point():
        return False
    t.mul_(0.75).add_(0.25)
    return not differs(call.forward().outputs, s.outputs, outputs_named(s), 0.0)


# ----- random numbers -----


@probe()
@differentiable
def random_state(s: Subject) -> Outcome:
    """Forward may draw random numbers, not set the generators; backward leaves them alone."""
    after = []
    for drawn in (3, 700):
        s.reseed()
        torch.rand(drawn)
        Call(s, reseed=False).forward()
        after.append(torch.get_rng_state())
    if torch.equal(*after):
        return finding("forward reseeds the global generator: its state afterwards is always the same")
    call = run(s)
    before, others = torch.get_rng_state(), _other_generators()
    call.backward(s.cotangents)
    if not torch.equal(torch.get_rng_state(), before):
        return finding("backward draws from the global generator: every random number after it depends on it")
    touched = [name for name, state in _other_generators().items() if state != others[name]]
    if touched:
        return passed(f"backward draws from {' and '.join(touched)}")
    return passed("forward draws random numbers" if s.random else "forward and backward draw none")


def _other_generators() -> dict[str, Any]:
    """The states of Python's generator, and of numpy's if that is in use."""
    found: dict[str, Any] = {"random": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["numpy.random"] = [
            getattr(part, "tobytes", lambda part=part: part)() for part in numpy.random.get_state()
        ]
    return found
