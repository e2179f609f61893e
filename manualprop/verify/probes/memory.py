"""What is kept for backward, how, and for how long."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manualprop.verify._probe import probe
from manualprop.verify._random import generator, normal
from manualprop.verify._report import Outcome, apart, finding, limit, message, passed
from manualprop.verify._subject import Subject
from manualprop.verify.probes._kept import held_by, storage_of, tensors_in
from manualprop.verify.probes._runs import (
    Call,
    bits,
    differentiable,
    differs,
    elsewhere,
    exactness,
    gradients_named,
    repeatable,
    run,
    same_bits,
)

# ----- edited after forward -----

MOST = 16  # tensors that are edited, one after the other


@probe()
@repeatable
def inplace_edit(s: Subject) -> Outcome:
    """An edit in place of an input or an output, after forward, makes backward raise, or changes nothing."""
    count = len(_editable(run(s)))
    heard, harmless, noted = [], [], []
    for i in range(min(count, MOST)):
        call = run(s)
        name, t = _editable(call)[i]
        try:
            with torch.no_grad():
                _edit(t)
        except RuntimeError:  # one of several views of one tensor
            continue
        try:
            found = call.backward(s.cotangents)
        except Exception:
            # Torch's, that a saved tensor was modified; or what follows from it in the checked code.
            heard.append(name)
            continue
        text = differs(found, s.plain, gradients_named(s), exactness(s))
        if text and name in s.own_parameters():
            noted.append(
                name
            )  # whoever computes anew in backward, as torch's checkpoint, takes what is there then
        elif text:
            return finding(
                f"an edit of {name} in place, after forward, goes unseen: {text}",
                f"stale or overwritten saved tensor: {name} is kept as .data or on ctx, not by save_for_backward",
                edited=name,
            )
        else:
            harmless.append(name)
    if noted:
        return limit(f"backward computes anew with {', '.join(noted)}: an edit after forward goes unseen")
    parts = [f"{', '.join(heard)}: backward raises"] if heard else []
    parts += [f"{', '.join(harmless)}: harmless"] if harmless else []
    return passed("; ".join(parts))


def _editable(call: Call) -> list[tuple[str, Tensor]]:
    """Every tensor in the caller's hands that has entries."""
    outputs = {
        f"output {i}" if len(call.returned) > 1 else "the output": y for i, y in enumerate(call.returned)
    }
    return [(name, t) for name, t in {**call.given, **outputs}.items() if t.numel()]


def _edit(t: Tensor) -> None:
    """Other values: random ones, or the same integers in another order."""
    if t.is_floating_point() or t.is_complex():
        source = generator("edit")
        shape = torch.view_as_real(t).shape if t.is_complex() else t.shape
        noise = normal(shape, source)
        t.copy_(torch.view_as_complex(noise) if t.is_complex() else noise)
    elif t.dtype == torch.bool:
        t.logical_not_()
    else:
        t.copy_(t.flatten().roll(1).reshape(t.shape).clone())


# ----- kept elsewhere -----


@probe()
@differentiable
def saved_tensors(s: Subject) -> Outcome:
    """What backward reads goes through save_for_backward: not on ctx, not on the class, not in a global."""
    call = run(s)
    theirs = {storage_of(t) for t in (*call.given.values(), *call.returned)}
    buffers = {storage_of(t) for name, t in call.state.items() if name not in s.names}
    notes = []
    other = _kept_elsewhere(s)
    for node in s.nodes(call.outputs):
        cls = node._forward_cls.__name__
        for path, t in tensors_in(vars(node)):
            whose = "an input or output" if storage_of(t) in theirs else f"a tensor of shape {list(t.shape)}"
            # A constant, the same for all inputs: nobody can edit it, and it remembers nothing of the call.
            constant = (cls, path) in other and same_bits(t, other[cls, path])
            if (
                ((constant or t.numel() < 2) and storage_of(t) not in theirs)
                or storage_of(t) in buffers
                or isinstance(t, torch.nn.Parameter)
            ):
                notes.append(f"{cls} keeps {whose} as ctx{path}")
                continue
            found = finding(
                f"{cls} keeps {whose} as ctx{path}, not by save_for_backward",
                f"ctx{path} is not guarded: an edit in place makes it stale, and nothing says so; saved-tensor hooks "
                "miss it, and it is freed late",
                attribute=f"ctx{path}",
            )
            # A slope computed in forward has no second derivative, wherever it is kept.
            return apart(found, "second_order") if storage_of(t) in theirs else found
    before = {where: (t, bits(t)) for where, t in held_by(s.functions)}
    there = s.with_points(elsewhere(s))
    there(*there.at())
    for where, t in held_by(s.functions):
        old = before.get(where)
        if old is None or old[0] is not t or not torch.equal(bits(t), old[1]):
            return finding(
                f"forward keeps a tensor of shape {list(t.shape)} as {where}",
                f"{where} is stale after another call: what backward reads belongs to save_for_backward",
                attribute=where,
            )
    return passed("; ".join(notes) or "nothing is kept past save_for_backward")


def _kept_elsewhere(s: Subject) -> dict[tuple[str, str], Tensor]:
    """The bytes of what the Functions keep on ctx at other inputs, and other random numbers."""
    try:
        there = s.with_points(elsewhere(s))
        leaves = there.at()
        torch.default_generator.manual_seed(s.case.seed + 1)
        nodes = s.nodes(there.function(*leaves))
        return {(n._forward_cls.__name__, path): bits(t) for n in nodes for path, t in tensors_in(vars(n))}
    except Exception:  # whatever the checked code raises: not defined there
        return {}


# ----- kept too long -----


class _Births(TorchDispatchMode):
    """Notes every storage that is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[StorageWeakRef, str]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for t in tree_leaves(result):
            if _has_storage(t) and t.untyped_storage()._cdata not in given and t.untyped_storage().nbytes():
                self.seen.append((StorageWeakRef(t.untyped_storage()), str(func)))
        return result


def _has_storage(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and t.device.type != "meta"


@probe()
@differentiable
def leaks(s: Subject) -> Outcome:
    """Once the caller lets go, every tensor of a call dies, without the garbage collector."""
    kinds: dict[str, Callable[[Call], Any]] = {
        "forward": lambda call: None,
        "forward and backward": lambda call: call.backward(s.cotangents),
        "backward with create_graph": lambda call: call.backward(s.cotangents, create_graph=True),
    }
    enabled = gc.isenabled()
    gc.collect(0)
    gc.freeze()  # what lives now need not be walked through again
    gc.disable()
    try:
        for what, then in kinds.items():
            try:
                outcome = _kept_by(s, then, what)
            except Exception as error:  # whatever torch or the checked code refuses with
                if what == "backward with create_graph":
                    continue  # is second_order's matter
                return limit(f"{what} cannot be watched: {message(error)}")
            if outcome is not None:
                return outcome
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return passed("all memory is free as soon as the caller lets go")


RUNS = 3


def _kept_by(s: Subject, then: Callable[[Call], Any], what: str) -> Outcome | None:
    then(run(s))  # caches of constants fill now
    births = []
    for _ in range(RUNS):
        with _Births() as born:
            then(run(s))
        births.append(born.seen)
    kept = [[(ref, op) for ref, op in seen if not ref.expired()] for seen in births]
    if not any(kept[:-1]):  # of the last call alone: a cache of one
        return None
    gc.collect()
    for_good = sum(not ref.expired() for ref, _ in kept[0])
    count = len(kept[0])
    after = (
        f"after {what}, {count} tensor{'s' * (count != 1)} of the call (from {kept[0][0][1]}) "
        if kept[0]
        else ""
    )
    if for_good:
        return finding(
            f"{after}stay alive, more with each call", "kept for good: in a list, a global, or the module"
        )
    return finding(
        f"{after}live until the garbage collector runs",
        "a reference cycle: an output or its gradient kept on ctx, which the output keeps?",
    )


# ----- how much -----


@probe()
@differentiable
def saved_bytes(s: Subject) -> Outcome:
    """The bytes kept for backward, each storage once, in the dtypes that were given."""
    given = Subject(s.case, None)
    given._not_leaf = s._not_leaf
    call = Call(given)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[storage_of(t)] = _nbytes(t)
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            call.forward()
    except Exception as error:  # whatever torch or the checked code refuses with
        return limit(f"saved tensors cannot be counted: {message(error)}")
    for node in given.nodes(call.outputs):
        kept |= {storage_of(t): _nbytes(t) for _, t in tensors_in(vars(node))}
    whose = {
        "inputs": {storage_of(t) for n, t in call.given.items() if n not in call.state},
        "parameters and buffers": {storage_of(t) for t in call.state.values()},
        "outputs": {storage_of(t) for t in call.returned},
    }
    total, parts, rest = sum(kept.values()), [], dict(kept)
    for name, storages in whose.items():
        size = sum(rest.pop(p) for p in list(rest) if p in storages)
        parts += [f"{name} {size}"] if size else []
    parts += [f"others {sum(rest.values())}"] if rest else []
    text = f"{total} bytes ({', '.join(parts)})" if parts else "nothing"
    budget = s.case.saved_bytes
    if budget is not None and total > budget:
        return finding(f"keeps {text} for backward, where {budget} are declared", bytes=total)
    return passed(f"keeps {text} for backward", bytes=total)


def _nbytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes() if t.layout == torch.strided else t.numel() * t.element_size()
