"""Run probes in forked children: a crash or a hang is a finding, and nothing in the caller's process changes.

A fork, not a fresh process: the checked code may be a closure or a local class, which cannot be pickled.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import torch

from manualprop.verify._case import Case
from manualprop.verify._judge import judged, prepared
from manualprop.verify._probe import Probe
from manualprop.verify._report import Outcome, finding, skipped
from manualprop.verify._subject import BadUse

# Imported before the fork: otherwise every child would import them again.
_WARM = (
    "torch._functorch.autograd_function",
    "torch.func",
    "torch._decomp.decompositions_for_jvp",
    "torch.fx.experimental.symbolic_shapes",  # by torch.autograd.grad with grad_outputs
)
# The compiler takes a second to import, and its back ends another.  So only for the families that need them.
_WARM_FOR = {
    "routes": ("torch._dynamo",),  # torch.utils.checkpoint imports it
    "compiled": ("torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.compile_fx"),
}


def can_fork() -> bool:
    """Whether the platform can fork, and the autograd engine has no threads that a child would lack."""
    return hasattr(os, "fork") and sys.platform != "darwin" and not torch.cuda.is_initialized()


def outcomes(
    case: Case, probes: Sequence[Probe], time_limit: float, quick: bool = False
) -> Iterator[Outcome]:
    """The outcome of each probe, in order, as it comes.  ``quick`` looks at less of an expensive function.

    Raises:
        ValueError, TypeError: for a wrong use of the check.
    """
    _warm(probes, quick)
    rest = list(probes)
    while rest:
        batch = _batch(rest)
        child = _Child(case, batch, quick)
        try:
            started = child.receive(time_limit)
            if isinstance(started, BadUse):
                raise started.kind(str(started)) from None
            if started is not None:  # it cannot even be called
                yield started if started.probe else dataclasses.replace(started, probe="call")
                return
            for done, probe in enumerate(batch, start=1):
                outcome = child.receive(time_limit)
                if outcome.probe == "":  # the child is gone
                    outcome = dataclasses.replace(outcome, probe=probe.name)
                    rest = rest[done:]
                    yield outcome
                    if probe.name == "first_order" and child.pid > 0:  # and so would all the others
                        yield from (
                            dataclasses.replace(skipped("first_order was given up"), probe=p.name)
                            for p in rest
                        )
                        return
                    break
                yield outcome
            else:
                rest = rest[len(batch) :]
        finally:
            child.stop()


def _warm(probes: Sequence[Probe], quick: bool) -> None:
    families = {p.family for p in probes if not (quick and p.level == "quick")}
    needed = [n for family, names in _WARM_FOR.items() if family in families for n in names]
    if "numpy" in sys.modules:
        needed.append("numpy.random")  # numpy imports it when its state is asked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        for name in (*_WARM, *needed):
            __import__(name)


def in_child(question: Callable[[], Any], time_limit: float) -> Any:
    """What ``question`` returns in a child process; None if it crashes, hangs or raises.

    Without fork it runs in this process.
    """
    if not can_fork():
        return question()
    connection, theirs = Pipe(duplex=False)
    pid = _forked()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            theirs.send(question())
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    try:
        return connection.recv() if connection.poll(time_limit) else None
    except EOFError:
        return None
    finally:
        connection.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _forked() -> int:
    """os.fork, after a flush: otherwise both processes would print what is in the buffers."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with threads.  The child starts no parallel region of torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _batch(probes: Sequence[Probe]) -> list[Probe]:
    """The probes that share a child: one that must be alone, or all before the next such one."""
    if probes[0].alone:
        return [probes[0]]
    alone = next((i for i, p in enumerate(probes) if p.alone), len(probes))
    return list(probes[:alone])


class _Child:
    def __init__(self, case: Case, probes: Sequence[Probe], quick: bool) -> None:
        self.connection, theirs = Pipe()
        self.pid = _forked()
        if self.pid == 0:
            self.connection.close()
            _work(case, probes, quick, theirs)
        theirs.close()

    def receive(self, time_limit: float) -> Any:
        """The child's next message, or the finding that it crashed or was given up.  The finding names no probe."""
        start = time.perf_counter()
        ended = self._wait(time_limit)
        if ended:
            return dataclasses.replace(finding(f"gave up after {ended}"), seconds=time.perf_counter() - start)
        try:
            return self.connection.recv()
        except EOFError:
            _, status = os.waitpid(self.pid, 0)
            self.pid = -1
            seconds = time.perf_counter() - start
            return dataclasses.replace(finding(f"crashes the process: {_end(status)}"), seconds=seconds)

    def _wait(self, time_limit: float) -> str:
        """Wait for the child.  Returns the limit that it reached, in words, or nothing.

        The limit counts the child's processor time, so a loaded machine gives up no sooner.  It also counts the time
        in which the child computes nothing, as in a deadlock.
        """
        began = used = _used(self.pid)
        busy = time.perf_counter()
        while not self.connection.poll(min(0.2, time_limit / 4)):
            now = _used(self.pid)
            if now.seconds - began.seconds > time_limit:
                return f"{time_limit:g} s of processor time"
            if now.seconds > used.seconds or now.runnable:
                used, busy = now, time.perf_counter()
            elif time.perf_counter() - busy > time_limit:
                return f"{time_limit:g} s in which it computed nothing"
        return ""

    def stop(self) -> None:
        self.connection.close()
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class _Used(NamedTuple):
    """The processor time of a process, and whether it runs."""

    seconds: float  # of processor time, its ended children's included
    runnable: bool  # whether it computes, or waits for a processor


def _used(pid: int) -> _Used:
    """From Linux' /proc; elsewhere the wall-clock time."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return _Used(time.perf_counter(), False)
    ticks = sum(int(n) for n in fields[11:15])
    return _Used(ticks / os.sysconf("SC_CLK_TCK"), fields[0] == "R")


def _end(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"signal {number} ({signal.Signals(number).name})"
    return f"exit status {os.WEXITSTATUS(status)}"


def _work(case: Case, probes: Sequence[Probe], quick: bool, connection: Connection) -> None:
    """All that the child does.  It never returns."""
    status = 1
    try:
        faulthandler.disable()  # the parent reports the crash: no traceback is needed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and stops the child
        # The threads of the parent's pool do not exist here: a parallel region would hang.
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        try:
            subject = prepared(case, quick)
        except BadUse as bad:
            connection.send(bad)
        else:
            connection.send(subject if isinstance(subject, Outcome) else None)
            if not isinstance(subject, Outcome):
                for probe in probes:
                    connection.send(judged(probe, subject))
        status = 0
    except BrokenPipeError:  # the parent no longer listens
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
