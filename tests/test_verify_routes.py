"""The probes of the routes: each finds a defect planted for it, and passes a right function."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from manualprop import functional as ours
from manualprop import nn as our_nn
from manualprop.verify import Outcome, check

EAGER = ("checkpointing", "saved_tensor_hooks", "vmap", "func_grad", "jacrev", "jacfwd", "vmap_grad")


def x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(shape or (4, 3), generator=generator, dtype=torch.float64) + 0.5).requires_grad_()


def one(fn: Callable[..., Any], *args: Any, probe: str, **options: Any) -> Outcome:
    return check(fn, *args, only=probe, **options)[probe]


class Square(Function):
    """Right, for every transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return 2 * t * ctx.saved_tensors[0]


class OldStyle(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class ByAddress(OldStyle):
    @staticmethod
    def forward(ctx, x):
        ctx.address = x.data_ptr()
        return OldStyle.forward(ctx, x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x if x.data_ptr() == ctx.address else g


class BatchedAlongTheWrongDimension(Square):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x):
        return Square.apply(x).flip(in_dims[0]), in_dims[0]


class ExpBatchedAlongTheWrongDimension(Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info, in_dims, x):
        return ExpBatchedAlongTheWrongDimension.apply(x).flip(in_dims[0]), in_dims[0]


class WrongInABatchOfGradients(Square):
    @staticmethod
    def backward(ctx, g):
        factor = (
            2 if g.dim() == ctx.saved_tensors[0].dim() and not torch._C._functorch.is_batchedtensor(g) else 1
        )
        return factor * g * ctx.saved_tensors[0]


class NoTangent(Square):
    @staticmethod
    def jvp(ctx, t):
        return torch.zeros_like(t)


class StraightThrough(Square):
    """What the forward's own derivative is not."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g * 1.0

    @staticmethod
    def jvp(ctx, t):
        return t * 1.0


trained = [True]


def trusts_the_first_forward(x: Tensor) -> Tensor:
    """The forward without gradient of a reentrant checkpoint leaves a flag behind."""
    kept, trained[0] = trained[0], torch.is_grad_enabled()
    return x * x if kept else x * x.detach()


def detached_in_transforms(x: Tensor) -> Tensor:
    return x * (x.detach() if torch._C._functorch.is_gradtrackingtensor(x) else x)


def otherwise_when_compiled(x: Tensor) -> Tensor:
    return x * (x.detach() if torch.compiler.is_compiling() else x)


DEFECTS = {
    "flag": (trusts_the_first_forward, "checkpointing", "constant factor 0.5"),
    "address": (ByAddress.apply, "saved_tensor_hooks", "identity or the address"),
    "flipped batch": (BatchedAlongTheWrongDimension.apply, "vmap", "only under vmap"),
    "detached": (detached_in_transforms, "func_grad", "constant factor 0.5"),
    "batched grad_output": (WrongInABatchOfGradients.apply, "jacrev", "constant factor 0.5"),
    "no tangent": (NoTangent.apply, "jacfwd", "zero"),
    "batched gradient": (ExpBatchedAlongTheWrongDimension.apply, "vmap_grad", "only under vmap of grad"),
    "compiled": (otherwise_when_compiled, "compile", "constant factor 0.5"),
    "bypassed": (
        StraightThrough.apply,
        "poisoned_backward",
        r"bypassed by compile\(func.grad\), compile\(vmap",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    fn, probe, says = DEFECTS[name]
    found = one(fn, x(), probe=probe)
    assert found.verdict == "finding", found
    assert re.search(says, found.diagnosis), found


CONTROLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "square": (Square.apply, (x(),)),
    "softmax": (torch.softmax, (x(), -1)),
    "in place": (nn.ReLU(inplace=True), (x(),)),
    "dropout": (nn.Dropout(), (x(),)),
    "batch norm": (nn.BatchNorm1d(3), (x(),)),
    "lstm": (nn.LSTM(3, 2), (x(2, 4, 3),)),
    "attention with dropout": (
        nn.MultiheadAttention(4, 2, dropout=0.5),
        (x(3, 2, 4), x(3, 2, 4), x(3, 2, 4)),
    ),
    "our layer norm": (our_nn.LayerNorm(3), (x(),)),
    "our softmax": (ours.softmax, (x(), -1)),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_right_function_raises_no_finding(name: str) -> None:
    fn, args = CONTROLS[name]
    report = check(fn, *args, only=EAGER)
    assert report.passed, report


def test_our_rules_run_on_every_route() -> None:
    report = check(our_nn.GELU(), x(), only=("compile", "poisoned_backward"))
    assert report.passed and not report.limits, report
    details = report["poisoned_backward"].details
    assert details["bypassed"] == ["training of an exported module"] and not details["refused"]
    assert {"compile(func.grad)", "compile(vmap(grad))", "func.jvp", "autocast"} <= set(details["ran"])


def test_a_bypass_with_the_same_values_is_a_limit() -> None:
    """torch's way with every Function that is not registered; a finding where support is declared."""
    found = one(Square.apply, x(), probe="poisoned_backward")
    assert found.verdict == "limit" and "bypassed: compile(func.grad), compile(vmap(grad))" in found.evidence
    declared = one(Square.apply, x(), probe="poisoned_backward", declare={"poisoned_backward": True})
    assert declared.verdict == "finding"
    assert Square.backward is vars(Square)["backward"].__func__, "the poison is taken back"


def test_a_refusal_is_a_limit_in_one_sentence() -> None:
    report = check(OldStyle.apply, x(), only=("func_grad", "vmap", "jacfwd"))
    assert [o.verdict for o in report] == ["limit"] * 3
    assert all("more details" not in o.evidence for o in report), report


def test_a_function_without_rules_cannot_be_poisoned() -> None:
    assert one(torch.tanh, x(), probe="poisoned_backward").verdict == "skipped"
