"""Shared by the probes of state and of routes: calls that keep every tensor, and comparisons of two runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from manualprop.verify._random import generator
from manualprop.verify._report import Outcome, skipped
from manualprop.verify._subject import Subject

Found = Sequence[Tensor | None]


def differentiable(run: Callable[[Subject], Outcome]) -> Callable[[Subject], Outcome]:
    """A probe that compares with the plain gradients.  It is skipped where there are none."""

    @functools.wraps(run)
    def guarded(s: Subject) -> Outcome:
        try:
            plain = s.plain
        except Exception:  # whatever the checked code raises: first_order tells
            return skipped("the plain backward raises: see first_order")
        _ = s.cotangents, s.recorded  # made now: within a transform it is too late
        if all(g is None for g in plain):
            return skipped("no gradient: see first_order and output_requires_grad")
        return run(s)

    return guarded


def repeatable(run: Callable[[Subject], Outcome]) -> Callable[[Subject], Outcome]:
    """A probe that compares with the plain run.  It means something only if that gives the same each time."""

    @functools.wraps(run)
    def guarded(s: Subject) -> Outcome:
        outcome = differentiable(run)(s)
        if outcome.verdict == "finding":
            try:
                s(*s.at())  # a probe may have left a flag that the next forward puts right
                text = differs(s.gradients(), s.plain, s.names, exactness(s))
            except Exception:  # whatever the checked code raises
                text = "raises"
            if text:
                return skipped("the plain run no longer gives what it gave: see repeat")
        return outcome

    return guarded


def recorded_outputs(s: Subject) -> list[int]:
    """The outputs that require grad in the plain run."""
    return [k for k, y in enumerate(s(*s.at())) if y.requires_grad]


def nothing_requires_grad() -> Outcome:
    return skipped("no output requires grad: see output_requires_grad")


def replaced(items: Sequence[Tensor], k: int, item: Tensor) -> list[Tensor]:
    """Copies of the tensors, but for one, which is handed over as it is."""
    return [item if i == k else t.clone() for i, t in enumerate(items)]


def moved(s: Subject, points: Sequence[Tensor]) -> Subject | None:
    """The function at other points, if it may be asked there and works."""
    try:
        near = s.allowed(points)
        if not all(torch.equal(a, b) for a, b in zip(near, points, strict=True)):
            return None
        other = s.with_points(points)
        finite = all(torch.isfinite(y).all() for y in other.outputs)
        return other if finite and other.plain else None
    except Exception:  # whatever the checked code raises: outside its domain
        return None


def reference_of(s: Subject) -> Subject | None:
    """The reference at the same points, where one is given that takes them."""
    if s.case.reference is None:
        return None
    other = Subject(dataclasses.replace(s.case, fn=s.case.reference, surrogate=None), s.dtype)
    if [p.shape for p in other.points] != [p.shape for p in s.points]:
        return None
    return other.with_points([p.clone() for p in s.points])


class Call:
    """One forward, which keeps every tensor that goes in and comes out.

    Args:
        s: the function.
        points: where; of fresh leaves if not given.
        buffers: of a module, to be used and updated; its own, copied, if not given.
        reseed: whether the random generator starts where it always does.

    Attributes:
        given: by name, every tensor that the function gets: arguments, parameters, buffers.
        outputs: the floating outputs, as the subject has them.
        returned: every tensor that it returns.
    """

    def __init__(
        self,
        s: Subject,
        points: Sequence[Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
        reseed: bool = True,
    ) -> None:
        self.s = s
        self.leaves = s.at(points)
        self.args, self.kwargs, self.state = s.arguments(*self.leaves)
        if buffers is not None:
            self.state.update(buffers)
        self.given = s.named(self.args, self.kwargs, self.state)
        if reseed:
            s.reseed()
        self.result: Any = None
        self.outputs: tuple[Tensor, ...] = ()
        self.returned: list[Tensor] = []

    def forward(self) -> Call:
        self.result = self.s.called(self.args, self.kwargs, self.state)
        self.outputs = self.s.kept(self.result)
        self.returned = [t for t in tree_leaves(self.result) if isinstance(t, Tensor)]
        return self

    def backward(self, cotangents: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
        """Gradients at the leaves, for copies of the cotangents."""
        return self.s.pull_back(self.outputs, self.leaves, [c.clone() for c in cotangents], **options)


def run(s: Subject, points: Sequence[Tensor] | None = None) -> Call:
    """A forward at fresh leaves."""
    return Call(s, points).forward()


# ----- comparing -----


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor, copied."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.contiguous().clone().reshape(-1).view(torch.uint8)


def same_bits(t: Tensor, before: Tensor) -> bool:
    return torch.equal(bits(t), before)


def copies(found: Found) -> list[Tensor | None]:
    return [None if g is None else g.detach().clone() for g in found]


def scale_of(tensors: Found) -> float:
    """The largest finite entry."""
    finite = (
        t.detach().abs().nan_to_num(0, 0, 0).max().item() for t in tensors if t is not None and t.numel()
    )
    return max(finite, default=0.0)


def differs(
    found: Found, expected: Found, names: Sequence[str], rtol: float, rough: Sequence[float] = ()
) -> str:
    """How ``found`` is not ``expected``, to ``rtol`` of the largest entry; None counts as zeros.  Empty if it is.

    Each may besides be off by what ``rough`` says of it, in absolute terms.
    """
    overall = scale_of(expected)
    spare = [*rough, *[0.0] * (len(expected) - len(rough))]
    for name, f, e, extra in zip(names, found, expected, spare, strict=True):
        if f is None and e is None:
            continue
        f = torch.zeros_like(e) if f is None else f.detach()  # type: ignore[arg-type]
        e = torch.zeros_like(f) if e is None else e.detach()
        if f.shape != e.shape:
            return f"{name} has shape {list(f.shape)} for {list(e.shape)}"
        f = f.to(e.dtype)
        scale = max(scale_of([e]), 1e-3 * overall)
        # Equal where both are infinite, or NaN: what is NaN in the plain run is another probe's matter.
        error = torch.where((f == e) | (f.isnan() & e.isnan()), 0.0, (f - e).abs().nan_to_num(torch.inf))
        if error.numel() and not error.max().item() <= rtol * scale + extra + torch.finfo(e.dtype).tiny:
            index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            at = f" at {list(index)}" if index else ""
            return f"{name} is {f[index].item():.6g}{at} instead of {e[index].item():.6g}"
    return ""


def exactness(s: Subject) -> float:
    """How closely the same arithmetic must repeat itself."""
    return 1e-12 if s.dtype == torch.float64 else 1e-5


def gradients_named(s: Subject) -> list[str]:
    return [f"the gradient of {n}" for n in s.names]


def outputs_named(s: Subject) -> list[str]:
    return [f"output {i}" if len(s.outputs) > 1 else "the output" for i in range(len(s.outputs))]


def ratio(found: Found, expected: Found) -> float | None:
    """c if ``found`` is ``c`` times ``expected``."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None and e.numel()]
    if not pairs:
        return None
    f = torch.cat([(torch.zeros_like(e) if f is None else f.detach()).reshape(-1) for f, e in pairs])
    e = torch.cat([e.detach().reshape(-1) for _, e in pairs])
    if f.shape != e.shape or not (torch.isfinite(f).all() and torch.isfinite(e).all()):
        return None
    norm = torch.dot(e, e)
    if norm == 0:
        return None
    c = (torch.dot(f, e) / norm).item()
    return c if (f - c * e).abs().max() <= 1e-8 * e.abs().max() else None


def in_words(found: Found, expected: Found, otherwise: str) -> str:
    """What a gradient that depends on the history of calls looks like."""
    c = ratio(found, expected)
    if c is None:
        return otherwise
    if abs(c) < 1e-9:
        return "zero"
    if abs(c - 2) < 1e-6:
        return "doubled accumulation"
    return f"constant factor {c:.6g}"


def elsewhere(s: Subject, seed: int = 5) -> list[Tensor]:
    """Other values in the domain of the function: of the same signs, somewhat smaller."""
    source = generator("elsewhere", s.case.seed, seed)
    return s.allowed(
        [
            p * (0.65 + 0.3 * torch.rand(p.shape, generator=source, dtype=torch.float64)).to(p.dtype)
            for p in s.points
        ]
    )
