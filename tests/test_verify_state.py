"""The probes of state and memory: each finds a defect planted for it, and passes a right function."""

import gc
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from manualprop.verify import Outcome, check

STATE = (
    "mutation",
    "random_state",
    "retain_graph",
    "repeat",
    "interleaving",
    "inplace_edit",
    "saved_tensors",
)
STATE += ("leaks", "module_copy", "saved_bytes")


def x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(shape or (4, 3), generator=generator, dtype=torch.float64).requires_grad_()


def rule(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Tensor]:
    """The apply of a Function with these two."""
    made = type(
        "Planted", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    return made.apply  # type: ignore[attr-defined, no-any-return]


def saves_input(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x * x


def of_square(ctx: Any, g: Tensor) -> Tensor:
    return 2 * g * ctx.saved_tensors[0]


square = rule(saves_input, of_square)


def writes_grad_output(ctx: Any, g: Tensor) -> Tensor:
    g.data.mul_(2)
    return g * ctx.saved_tensors[0]


def writes_its_input(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x.neg_() * x


def writes_an_index(x: Tensor, index: Tensor) -> Tensor:
    index[index < 0] = 0
    return x[index]


def draws_in_backward(ctx: Any, g: Tensor) -> Tensor:
    torch.rand(1)
    return of_square(ctx, g)


def reseeds(ctx: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return saves_input(ctx, x)


def writes_what_it_saved(ctx: Any, g: Tensor) -> Tensor:
    return ctx.saved_tensors[0].data.mul_(2) * g


def counts(ctx: Any, x: Tensor) -> Tensor:
    ctx.backwards = 0
    return saves_input(ctx, x)


def adds_up(ctx: Any, g: Tensor) -> Tensor:
    ctx.backwards += 1
    return ctx.backwards * of_square(ctx, g)


calls = [0]


def halves_each_time(ctx: Any, g: Tensor) -> Tensor:
    calls[0] += 1
    return of_square(ctx, g) * 0.5 ** calls[0]


buffer = torch.zeros(4, 3, dtype=torch.float64)


def returns_one_buffer(ctx: Any, g: Tensor) -> Tensor:
    return torch.mul(2 * g, ctx.saved_tensors[0], out=buffer)


class Last:
    x: Tensor


def on_a_class(ctx: Any, x: Tensor) -> Tensor:
    Last.x = x.detach()
    return x * x


def of_last(ctx: Any, g: Tensor) -> Tensor:
    return 2 * g * Last.x


def on_ctx(ctx: Any, x: Tensor) -> Tensor:
    ctx.kept = {"x": [x.detach()]}
    return x * x


def of_kept(ctx: Any, g: Tensor) -> Tensor:
    return 2 * g * ctx.kept["x"][0]


def saves_data(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x.data)
    return x * x


def output_on_ctx(ctx: Any, x: Tensor) -> Tensor:
    ctx.y = x.exp()
    return ctx.y  # type: ignore[no-any-return]


log: list[Tensor] = []


def logs(x: Tensor) -> Tensor:
    log.append(x * x)
    return log[-1]


class Forgets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), 1.0
        self.scale = 2.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


DEFECTS = {
    "grad_output": (rule(saves_input, writes_grad_output), "mutation", "overwritten.*grad_output"),
    "an input": (rule(writes_its_input, of_square), "mutation", "overwritten input: x"),
    "drawn": (rule(saves_input, draws_in_backward), "random_state", ""),
    "reseeded": (rule(reseeds, of_square), "random_state", ""),
    "saved and written": (rule(saves_input, writes_what_it_saved), "retain_graph", "doubled accumulation"),
    "accumulated": (rule(counts, adds_up), "retain_graph", "doubled accumulation"),
    "halved": (rule(saves_input, halves_each_time), "repeat", "constant factor 0.5"),
    "one buffer": (rule(saves_input, returns_one_buffer), "repeat", "overwritten"),
    "class": (rule(on_a_class, of_last), "interleaving", "stale"),
    "class, by name": (rule(on_a_class, of_last), "saved_tensors", "Last.x is stale"),
    "ctx": (rule(on_ctx, of_kept), "saved_tensors", r"ctx\.kept\['x'\]\[0\]"),
    "data": (rule(saves_data, of_square), "inplace_edit", "overwritten saved tensor: x"),
    "cycle": (rule(output_on_ctx, lambda ctx, g: g * ctx.y), "leaks", "reference cycle"),
    "log": (logs, "leaks", "kept for good"),
    "copy": (Forgets().double(), "module_copy", "state is lost"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    fn, probe, says = DEFECTS[name]
    found = one(fn, x(), probe=probe)
    assert found.verdict == "finding", found
    assert re.search(says, found.diagnosis), found


def one(fn: Callable[..., Any], *args: Any, probe: str, **options: Any) -> Outcome:
    return check(fn, *args, only=probe, **options)[probe]


def test_a_written_index_is_found_and_a_running_statistic_is_not() -> None:
    found = one(writes_an_index, x(), torch.tensor([1, -1, 0]), probe="mutation")
    assert (found.verdict, found.diagnosis) == ("finding", "overwritten input: index")
    running = (torch.zeros(3), torch.ones(3))

    def normalised(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, mean, var, training=True)

    right = one(normalised, x(), *running, probe="mutation")
    assert (right.verdict, right.evidence) == ("passed", "forward updates mean; forward updates var")


def test_bytes_are_held_against_the_budget() -> None:
    kept = 4 * 3 * 8
    right = one(square, x(), probe="saved_bytes", saved_bytes=kept)
    assert right.details["bytes"] == kept and right.verdict == "passed", right
    assert one(square, x(), probe="saved_bytes", saved_bytes=kept - 1).verdict == "finding"
    on_context = one(rule(on_ctx, of_kept), x(), probe="saved_bytes", saved_bytes=0)
    assert on_context.details["bytes"] == kept, "what is stashed on ctx counts"


CONTROLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "square": (square, (x(),)),
    "in place": (nn.ReLU(inplace=True), (x(),)),
    "dropout": (nn.Dropout(), (x(),)),
    "batch norm": (nn.BatchNorm1d(3), (x(),)),
    "lstm": (nn.LSTM(3, 2), (x(2, 4, 3),)),
    "attention": (nn.MultiheadAttention(4, 2), (x(3, 2, 4), x(3, 2, 4), x(3, 2, 4))),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_right_function_raises_no_finding(name: str) -> None:
    fn, args = CONTROLS[name]
    report = check(fn, *args, only=STATE)
    assert report.passed, report


def test_the_second_backward_may_refuse() -> None:
    def refuses(ctx: Any, g: Tensor) -> Tensor:
        if ctx.backwards:
            raise RuntimeError("only once")
        ctx.backwards = 1
        return of_square(ctx, g)

    found = one(rule(counts, refuses), x(), probe="retain_graph")
    assert (found.verdict, "only once" in found.evidence) == ("limit", True)


def test_the_probes_leave_no_trace_without_isolation() -> None:
    state, python, enabled = torch.get_rng_state(), random.getstate(), gc.isenabled()
    module = nn.BatchNorm1d(3).double()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert check(module, x(), only=STATE, isolate=False).passed
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert gc.isenabled() is enabled and gc.get_freeze_count() == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
