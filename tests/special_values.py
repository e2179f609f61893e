"""The contract at infinities, zeros and kinks, one function for each property.

As in ``properties.py``, torch is the measure wherever it gives a number; a NaN of torch allows any number.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import Case
from properties import HALVES, gradients, strided, transposed, upstream
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32)
SPECIAL = (math.inf, -math.inf, 0.0)
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # these properties look for NaN; others test the accuracy


# ----- arguments -----


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def places(count: int) -> list[int]:
    """The first and the last of ``count`` places."""
    return sorted({0, count - 1}) if count else []


def with_numbers(arguments: tuple[Any, ...], numbers: dict[int, dict[int, float]]) -> tuple[Any, ...]:
    """The arguments, with {place: number} written into some of them."""
    changed = list(arguments)
    for i, those in numbers.items():
        a = arguments[i].detach().clone()
        for place, number in those.items():
            a.view(-1)[place % a.numel()] = number
        changed[i] = a.requires_grad_(arguments[i].requires_grad)
    return tuple(changed)


def at_special_values(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Any, ...]]:
    """Arguments with an infinity in one place, both zeros, or special numbers at the same place of two."""
    arguments = case.made(dtype)
    floats = [i for i, a in enumerate(arguments) if is_float(a) and a.numel()]
    for i in floats:
        yield with_numbers(arguments, {i: {0: 0.0, -1: -0.0}})
        for number, place in itertools.product(SPECIAL[:2], places(arguments[i].numel())):
            yield with_numbers(arguments, {i: {place: number}})
    for i, j in itertools.combinations(floats, 2):
        if arguments[i].shape == arguments[j].shape:
            for a, b in (
                (0.0, 0.0),
                *itertools.product((0.0,), SPECIAL[:2]),
                *itertools.product(SPECIAL[:2], (0.0,)),
            ):
                yield with_numbers(arguments, {i: {1: a}, j: {1: b}})


def where_defined(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Any, ...]]:
    """The arguments of :func:`at_special_values` where torch's value is not NaN, and the row's ``edges``."""
    for arguments in at_special_values(case, dtype):
        try:
            y = case.torchs(*arguments)
        except (RuntimeError, ValueError):  # outside the domain of the function
            continue
        if not y.isnan().any():
            yield arguments
    for edge in case.edges:
        yield case.cast(edge(), dtype)


def subsets(where: list[int]) -> set[tuple[int, ...]]:
    """Every subset of up to three elements; of more elements, the single ones and the whole."""
    counts = range(1, len(where) + 1) if len(where) <= 3 else (1, len(where))
    return {some for n in counts for some in itertools.combinations(where, n)}


def tangent(x: Tensor) -> Tensor:
    return upstream(x) - 1.1


# ----- comparisons -----


def same_where_torchs_is_finite(ours: Any, torchs: Any, what: Any) -> None:
    for i, (mine, theirs) in enumerate(zip(ours, torchs, strict=True)):
        if theirs is not None and mine is not None:
            known = theirs.isfinite()
            torch.testing.assert_close(
                mine[known].double(), theirs[known].double(), **CLOSE, msg=lambda m, i=i: f"{what}, {i}: {m}"
            )


def agree(
    forward: Tensor, g: Tensor, reverse: Sequence[Tensor | None], t: Sequence[Tensor], what: Any
) -> None:
    """Check g . (J t) = (J^T g) . t wherever the right side is a number."""
    terms = torch.stack(
        [(torch.zeros_like(d) if r is None else r * d).sum() for r, d in zip(reverse, t, strict=True)]
    )
    if terms.isfinite().all():
        assert forward.isfinite().all(), f"{what}: the tangent is {forward}, the gradients {reverse}"
        torch.testing.assert_close((g * forward).sum(), terms.sum(), **CLOSE, msg=lambda m: f"{what}: {m}")


# ----- forward mode -----


def of_some(case: Case, arguments: tuple[Any, ...], some: Sequence[int]) -> Callable[..., Tensor]:
    """The row's function of some of its arguments."""

    def f(*xs: Tensor) -> Tensor:
        every = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        for i, x in zip(some, xs, strict=True):
            every[i] = x
        y: Tensor = case(*every)
        return y

    return f


def dual(f: Callable[..., Tensor], xs: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
    """The tangent of f by dual numbers; zeros if it has none."""
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, xs, t)))
        return torch.zeros_like(y) if dy is None else dy


def forward_mode_is_reverse_mode_at_infinities(case: Case) -> None:
    """Forward mode, by dual numbers and by torch.func, equals reverse mode, for each subset of inputs."""
    for arguments in where_defined(case):
        for some in subsets(case.differentiable(arguments)):
            f = of_some(case, arguments, some)
            xs = [arguments[i].detach() for i in some]
            leaves = [x.clone().requires_grad_() for x in xs]
            y = f(*leaves)
            g, t = upstream(y), [tangent(x) for x in xs]
            reverse = torch.autograd.grad(y, leaves, g, allow_unused=True)
            theirs = dict(
                zip(case.differentiable(arguments), gradients(case.torchs, arguments, g), strict=True)
            )
            same_where_torchs_is_finite(reverse, [theirs[i] for i in some], (some, arguments))
            agree(dual(f, xs, t), g, reverse, t, (some, arguments))
            if len(some) == 1 or len(some) == len(theirs):
                through_func = torch.func.jvp(f, tuple(xs), tuple(t))[1]
                agree(through_func, g, reverse, t, ("torch.func", some, arguments))


def second_order_of_some_at_infinities(case: Case) -> None:
    """The gradient of a gradient equals its tangent, for some inputs, with a tangent of one input or all."""
    for arguments in where_defined(case):
        where = case.differentiable(arguments)
        for some in {(i,) for i in where} | {tuple(where)}:
            f = of_some(case, arguments, some)
            g = upstream(f(*(arguments[i].detach() for i in some)))
            inputs = [g, *(arguments[i].detach() for i in some)]

            def gradient(g: Tensor, *xs: Tensor, f: Any = f) -> tuple[Tensor, ...]:
                return torch.func.vjp(f, *xs)[1](g)

            leaves = [x.clone().requires_grad_() for x in inputs]
            first = torch.autograd.grad(f(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
            if not all(d.isfinite().all() for d in first):
                continue
            v = [tangent(d) for d in first]
            reverse = torch.autograd.grad(first, leaves, v, allow_unused=True)
            t = [tangent(x) for x in inputs]
            for moved in [[i] for i in range(len(inputs))] + [list(range(len(inputs)))]:

                def of_moved(
                    *xs: Tensor, moved: Any = moved, inputs: Any = inputs, gradient: Any = gradient
                ) -> Any:
                    every = list(inputs)
                    for i, x in zip(moved, xs, strict=True):
                        every[i] = x
                    return gradient(*every)

                found = torch.func.jvp(of_moved, tuple(inputs[i] for i in moved), tuple(t[i] for i in moved))[
                    1
                ]
                ones = torch.cat([d.reshape(-1) for d in found])
                weights = torch.cat([d.reshape(-1) for d in v])
                agree(
                    ones,
                    weights,
                    [reverse[i] for i in moved],
                    [t[i] for i in moved],
                    (some, moved, arguments),
                )


# ----- an infinite gradient -----


def with_infinite_gradients(case: Case, dtype: torch.dtype) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Arguments, and an arriving gradient that is infinite or NaN in one place, or everywhere."""
    sets = [case.made(dtype)]
    if case.elementwise:
        kinks = [
            at for at in case.kinks if torch.tensor(at, dtype=dtype).item() == at
        ]  # otherwise torch gives two answers
        points = [*kinks, *case.special, 0.1, -0.1, 2.3, -2.3, 7.0, -7.0, math.inf, -math.inf]
        sets.append((torch.tensor(points, dtype=dtype).requires_grad_(),))
    sets += [case.cast(edge(), dtype) for edge in case.edges]
    for arguments in sets:
        y = case.torchs(*arguments)
        for bad in (math.inf, -math.inf, math.nan):
            yield arguments, torch.full_like(y, bad)
            for place in places(y.numel()):
                g = upstream(y.detach())
                g.view(-1)[place] = bad
                yield arguments, g


def infinite_gradient_is_torchs(case: Case) -> None:
    """Where torch's gradient is a number, such as where the slope is 0, ours is the same number."""
    for dtype in (torch.float64, torch.bfloat16):
        try:
            case.torchs(*case.made(dtype))
        except RuntimeError:  # torch has no kernel
            continue
        for arguments, g in with_infinite_gradients(case, dtype):
            theirs, ours = gradients(case.torchs, arguments, g), gradients(case, arguments, g)
            for a, b in zip(ours, theirs, strict=True):
                known = b.isfinite()
                loose = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
                if dtype == torch.float64:
                    loose = CLOSE
                torch.testing.assert_close(
                    a[known], b[known], **loose, msg=lambda m, d=arguments, g=g: f"{m}\n{d}\n{g}"
                )


def second_order_of_an_infinite_gradient_is_torchs(case: Case) -> None:
    for arguments, g in with_infinite_gradients(case, torch.float64):
        theirs = second(case.torchs, case, arguments, g)
        if theirs is not None:
            ours = second(case, case, arguments, g)
            same_where_torchs_is_finite(ours, theirs, (arguments, g))


def second(function: Any, case: Case, arguments: tuple[Any, ...], g: Tensor) -> list[Tensor] | None:
    """d <v, dL/dx> / d(g, x); None if torch has none."""
    wanted = [arguments[i] for i in case.differentiable(arguments)]
    g = g.clone().requires_grad_()
    try:
        first = torch.autograd.grad(function(*arguments), wanted, g, create_graph=True)
        v = [tangent(d.detach()) for d in first]
        found = torch.autograd.grad(first, [g, *wanted], v, allow_unused=True)
    except RuntimeError:
        if function is case:
            raise
        return None
    return [torch.zeros_like(w) if d is None else d for w, d in zip([g, *wanted], found, strict=True)]


# ----- the value -----


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def other_bits(ours: Tensor, torchs: Tensor, what: Any) -> Tensor:
    """Where a bit differs, including signs of zeros; all NaNs count as equal."""
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape, f"{what}"
    a, b = (z.contiguous().view(INTEGERS[z.itemsize]) for z in (ours, torchs))
    return (a != b) & ~(ours.isnan() & torchs.isnan())


def same_kind(ours: Tensor, torchs: Tensor, what: Any) -> None:
    """Check that NaN, infinities and the signs of zeros and infinities are as in torch."""
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{what}: {ours}, torch: {torchs}"
    assert torch.equal(ours.isinf(), torchs.isinf()), f"{what}: {ours}, torch: {torchs}"
    marked = torchs.isinf() | ((torchs == 0) & (ours == 0))
    assert torch.equal(ours[marked].signbit(), torchs[marked].signbit()), f"{what}: {ours}, torch: {torchs}"


def points(case: Case, dtype: torch.dtype) -> Tensor:
    """Both zeros, denormals, infinities, NaN, numbers at and beside the kinks, and ordinary numbers."""
    info = torch.finfo(dtype)
    x = torch.tensor([*case.kinks, *case.special, 0.7, -0.7, 2.3, -2.3, 5.9, -5.9], dtype=dtype)
    beside = [x, *(torch.nextafter(x, torch.full_like(x, to)) for to in (math.inf, -math.inf))]
    ends = torch.tensor(
        [math.inf, math.nan, info.max, info.tiny, info.tiny * info.eps, 30.0, 88.5, 700.0], dtype=dtype
    )
    ordinary = torch.linspace(-9.3, 9.7, 61, dtype=torch.float64).to(dtype)
    return torch.cat([*beside, ends, -ends, ordinary])


def elementwise_arguments(case: Case, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    x = points(case, dtype)
    yield (x,)
    for size in (1, 2, 7, 33, 2**18 + 3):
        yield (x.repeat(-(-size // x.numel()))[:size].clone(),)
    yield (x[:24].reshape(2, 3, 4).transpose(0, 2),)
    yield (strided(x[:24].reshape(4, 6)),)
    yield (x[:24].reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),)
    yield (x[3].expand(5, 7),)


def several_arguments(case: Case, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for change in (lambda a: a, strided, transposed):
        yield tuple(change(a.detach()) if isinstance(a, Tensor) else a for a in case.made(dtype))
    yield from at_special_values(case, dtype)


def values(case: Case, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor, Tensor]]:
    """Arguments, our value and torch's."""
    for dtype in dtypes:
        for arguments in (elementwise_arguments if case.elementwise else several_arguments)(case, dtype):
            try:
                theirs = case.torchs(*arguments)
            except (RuntimeError, ValueError):  # no kernel, or outside the domain of the function
                continue
            yield arguments, case(*arguments).detach(), theirs.detach()


def value_is_torchs_to_the_bit(case: Case) -> None:
    for arguments, ours, theirs in values(case, FLOATS):
        wrong = other_bits(ours, theirs, arguments)
        if case.another_form:
            loose = 16 * torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose, equal_nan=True)
            continue
        assert not wrong.any(), f"{ours[wrong][:5]}, torch: {theirs[wrong][:5]}, of {arguments}"


def half_value_is_torchs_or_nearer(case: Case) -> None:
    """Every bit is torch's, or our value is nearer to the float64 value: ours rounds only once."""
    for arguments, ours, theirs in values(case, HALVES):
        wrong = other_bits(ours, theirs, arguments)
        if wrong.any() and not case.another_form:
            exact = in_double(case, arguments, ours.dtype).detach()[wrong]
            mine, others = ours[wrong].double(), theirs[wrong].double()
            nearer = ((mine - exact).abs() <= (others - exact).abs()) & (mine != others) | others.isnan()
            assert nearer.all(), f"{mine}, torch: {others}, exact: {exact}, of {arguments}"


def in_double(case: Case, arguments: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """torch's value in float64, for arguments and options rounded to ``dtype``."""
    rounded = {k: v.to(dtype) if is_float(v) else v for k, v in case.kwargs.items()}
    exact: Tensor = replace(case, kwargs=rounded).torchs(
        *(a.double() if is_float(a) else a for a in arguments)
    )
    return exact


def value_is_of_torchs_kind(case: Case) -> None:
    """NaN, infinities and zeros, with their signs, are at the same places as in torch."""
    for arguments, ours, theirs in values(case, FLOATS):
        same_kind(ours, theirs, arguments)


DERIVATIVE_PROPERTIES = (
    forward_mode_is_reverse_mode_at_infinities,
    second_order_of_some_at_infinities,
    infinite_gradient_is_torchs,
    second_order_of_an_infinite_gradient_is_torchs,
)
VALUE_PROPERTIES = (
    value_is_torchs_to_the_bit,
    half_value_is_torchs_or_nearer,
    value_is_of_torchs_kind,
)
