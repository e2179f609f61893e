"""The contract of every layer, one function for each property: it raises if a row violates the property.

They are apart from the tests so that ``test_planted.py`` can run them on rules that are wrong on purpose.
"""

import gc
import itertools
import weakref
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SHARP = {"rtol": 1e-6, "atol": 1e-7}  # with gradcheck's defaults a derivative wrong by 0.1 % passes
HALVES = (torch.bfloat16, torch.float16)


def upstream(y: Tensor) -> Tensor:
    """A gradient dL/dy without symmetry: no two elements are equal."""
    return (
        torch.linspace(0.3, 1.7, max(y.numel(), 1), dtype=torch.float64)[: y.numel()]
        .reshape(y.shape)
        .to(y.dtype)
    )


def gradients(function: Any, arguments: tuple[Any, ...], g: Tensor | None = None) -> list[Tensor]:
    """dL/d(argument) of every argument that requires a gradient."""
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    y = function(*arguments)
    return list(torch.autograd.grad(y, wanted, upstream(y) if g is None else g, allow_unused=True))


def value_is_torchs(case: Case) -> None:
    arguments = case.made()
    torch.testing.assert_close(case(*arguments), case.torchs(*case.made()), **TIGHT)


def gradient_is_torchs(case: Case) -> None:
    for ours, torchs in zip(gradients(case, case.made()), gradients(case.torchs, case.made()), strict=True):
        torch.testing.assert_close(ours, torchs, **TIGHT)


def first_derivative(case: Case) -> None:
    assert gradcheck(
        case,
        case.made(),
        **SHARP,
        check_forward_ad=True,
        check_batched_grad=not case.random,  # torch refuses to set a seed inside vmap
        check_batched_forward_grad=not case.random,
    )


def second_derivative(case: Case) -> None:
    assert gradgradcheck(
        case, case.made(), **SHARP, check_fwd_over_rev=True, check_batched_grad=not case.random
    )


def every_subset_of_gradients(case: Case) -> None:
    """For each subset of inputs with requires_grad, their gradients are the same as for all inputs."""
    whole = case.made()
    where = case.differentiable(whole)
    expected = dict(zip(where, gradients(case, whole), strict=True))
    for count in range(len(where)):
        for subset in itertools.combinations(where, count):
            arguments = case.made()
            for i in where:
                arguments[i].requires_grad_(i in subset)
            y = case(*arguments)
            assert y.requires_grad == bool(subset)
            if subset:
                found = torch.autograd.grad(y, [arguments[i] for i in subset], upstream(y))
                torch.testing.assert_close(list(found), [expected[i] for i in subset], **TIGHT)


def any_layout(case: Case) -> None:
    """Strided, expanded and offset gradients and arguments give the same results as contiguous ones."""
    arguments = case.made()
    y = case(*arguments)
    g = upstream(y)
    expected = gradients(case, arguments, g)
    layouts = [strided(g), transposed(g)]
    for layout in layouts:
        assert layout.is_contiguous() == g.is_contiguous() or not layout.is_contiguous()
        torch.testing.assert_close(gradients(case, case.made(), layout), expected, **TIGHT)
    expanded = torch.tensor(0.7, dtype=g.dtype).expand(g.shape)
    torch.testing.assert_close(
        gradients(case, case.made(), expanded), gradients(case, case.made(), expanded.contiguous()), **TIGHT
    )
    for change in (strided, transposed):
        changed = tuple(
            change(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in case.made()
        )
        torch.testing.assert_close(case(*changed), y, **TIGHT)
        torch.testing.assert_close(gradients(case, changed, g), expected, **TIGHT)


def strided(x: Tensor) -> Tensor:
    """The same values at every second place of a longer storage, with an offset."""
    long = x.new_zeros(2 * x.numel() + 3)
    view = long[3:].as_strided(x.shape, [2 * s for s in x.contiguous().stride()])
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same values, with the last axis stored first."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() else x


def leaves_all_else_alone(case: Case) -> None:
    """Inputs, the arriving gradient and, for a function that is not random, the generator do not change."""
    arguments = case.made()
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    state = torch.get_rng_state()
    y = case(*arguments)
    g, value = upstream(y), y.detach().clone()
    kept, version = g.clone(), g._version
    wanted = [arguments[i] for i in case.differentiable(arguments)]
    once = [d.clone() for d in torch.autograd.grad(y, wanted, g, retain_graph=True)]
    twice = torch.autograd.grad(y, wanted, g, retain_graph=True)
    torch.testing.assert_close(once, list(twice), rtol=0, atol=0)
    assert torch.equal(y, value), "backward changed the output"
    assert torch.equal(g, kept) and g._version == version, "the arriving gradient was changed"
    for t, old, v in zip(tensors, before, versions, strict=True):
        assert torch.equal(t, old) and t._version == v, "an argument was changed"
    assert case.random or torch.equal(state, torch.get_rng_state())


def nothing_leaks(case: Case) -> None:
    """Everything is freed with its last reference, without garbage collection."""
    gc.disable()
    try:
        arguments = case.made()
        y = case(*arguments)
        (y.sum() * 1).backward(create_graph=False)
        watched = [weakref.ref(t) for t in (y, *(a for a in arguments if isinstance(a, Tensor)))]
        del y, arguments
        assert all(ref() is None for ref in watched), "a reference cycle keeps tensors alive"
    finally:
        gc.enable()


def keeps_what_it_declares(case: Case) -> None:
    """The storages saved for backward are the declared ones; new ones have at most the declared bytes."""
    arguments = case.made()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = case(*arguments)
    named = {"output": y} | {i: a for i, a in enumerate(arguments) if isinstance(a, Tensor)}
    declared = {named[k].untyped_storage().data_ptr() for k in case.keeps}
    options = {v.untyped_storage().data_ptr() for v in case.kwargs.values() if isinstance(v, Tensor)}
    new = {pointer: size for pointer, size in saved.items() if pointer not in declared | options}
    assert sum(new.values()) <= case.keeps_new, (
        f"keeps {sum(new.values())} new bytes, declares {case.keeps_new}"
    )


def float32_is_as_good_as_torchs(case: Case) -> None:
    _accuracy(case, torch.float32, factor=1, ulps=4)


def half_precision_is_as_good_as_torchs(case: Case) -> None:
    for dtype in HALVES:
        _accuracy(case, dtype, factor=2, ulps=1)


def _accuracy(case: Case, dtype: torch.dtype, factor: float, ulps: float) -> None:
    """|ours - exact| <= factor |torch's - exact| + ulps, in values and gradients; exact is torch in float64."""

    def results(function: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
        y = function(*arguments)
        return [y, *gradients(function, arguments, upstream(y.double()).to(dtype).to(y.dtype))]

    rounded = case.made(dtype)
    exact = results(case.torchs, tuple(_double(a) for a in rounded))
    ours, torchs = results(case, case.made(dtype)), results(case.torchs, case.made(dtype))
    for mine, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert mine.dtype == theirs.dtype
        scale = truth.abs().max().clamp(min=torch.finfo(dtype).tiny) if truth.numel() else torch.tensor(0.0)
        allowed = factor * (theirs.double() - truth).abs().max() + ulps * torch.finfo(dtype).eps * scale
        assert (mine.double() - truth).abs().max() <= allowed


def _double(a: Any) -> Any:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    return a.detach().double().requires_grad_(a.requires_grad)


def autocast_is_torchs(case: Case) -> None:
    """Under autocast the output has torch's dtype and value, and backward runs outside the region."""
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = case(*case.made(torch.float32)), case.torchs(*case.made(torch.float32))
    assert ours.dtype == torchs.dtype
    torch.testing.assert_close(ours, torchs)
    arguments = case.made(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case(*arguments)
    wanted = [arguments[i] for i in case.differentiable(arguments)]
    for argument, dx in zip(wanted, torch.autograd.grad(y, wanted, upstream(y)), strict=True):
        assert dx.dtype == argument.dtype and dx.isfinite().all()


def survives_checkpointing(case: Case) -> None:
    """Both forms of activation checkpointing, and saved tensors that are moved away and back."""
    expected = gradients(case, case.made())
    for reentrant in (False, True):
        arguments = case.made()
        y = checkpoint(case, *arguments, use_reentrant=reentrant)
        y.backward(upstream(y))
        torch.testing.assert_close(
            [arguments[i].grad for i in case.differentiable(arguments)], expected, **TIGHT
        )
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(case, case.made()), expected, **TIGHT)


def second_derivative_of_a_sum(case: Case) -> None:
    """Zeros, not an error, if the function is piecewise linear and torch gives zeros."""

    def second(function: Any) -> list[Tensor]:
        arguments = case.made()
        wanted = [arguments[i] for i in case.differentiable(arguments)]
        first = torch.autograd.grad(function(*arguments).sum(), wanted, create_graph=True)
        found = torch.autograd.grad(sum(d.sum() for d in first), wanted, allow_unused=True)
        return [torch.zeros_like(w) if d is None else d for w, d in zip(wanted, found, strict=True)]

    try:
        expected = second(case.torchs)
    except RuntimeError:  # torch has no second derivative here
        return
    torch.testing.assert_close(second(case), expected, rtol=1e-7, atol=1e-10)


PROPERTIES = (
    value_is_torchs,
    gradient_is_torchs,
    first_derivative,
    second_derivative,
    second_derivative_of_a_sum,
    every_subset_of_gradients,
    any_layout,
    leaves_all_else_alone,
    nothing_leaks,
    keeps_what_it_declares,
    float32_is_as_good_as_torchs,
    half_precision_is_as_good_as_torchs,
    autocast_is_torchs,
    survives_checkpointing,
)


# ----- properties of y = f(x) alone -----


def slope_at_the_kinks(case: Case) -> None:
    for at, slope in case.kinks.items():
        x = torch.tensor(at, dtype=torch.float64)
        expected = torch.tensor(slope, dtype=torch.float64)
        torch.testing.assert_close(torch.func.grad(case)(x), expected)
        torch.testing.assert_close(torch.func.jvp(case, (x,), (torch.ones_like(x),))[1], expected)
        x32 = torch.tensor(at, dtype=torch.float32, requires_grad=True)
        torch.testing.assert_close(torch.autograd.grad(case(x32), x32)[0], expected.float())


def extremes_stay_finite(case: Case) -> None:
    """First and second derivatives are finite, and the first are torch's, at +-0, denormals and +-1e4."""
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor(case.special, dtype=dtype)
        slopes = torch.func.vmap(torch.func.grad(case))(x)
        assert slopes.isfinite().all(), slopes
        assert torch.func.vmap(torch.func.grad(torch.func.grad(case)))(x).isfinite().all()
        if not ({"gradient_is_torchs"} & set(case.except_for)):
            torchs = torch.func.vmap(torch.func.grad(case.torchs))(x)
            # For large x both lose different digits of a slope near 0; other properties test accuracy.
            torch.testing.assert_close(slopes, torchs, rtol=1e-5, atol=4 * torch.finfo(dtype).eps)


def infinities_and_nan_pass_as_torchs(case: Case) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(case(x), case.torchs(x), equal_nan=True)
    ours, torchs = (
        gradients(f, (x.clone().requires_grad_(),), torch.ones_like(x))[0] for f in (case, case.torchs)
    )
    known = ~torchs.isnan()  # where torch gives NaN, any number is allowed
    torch.testing.assert_close(ours[:2][known[:2]], torchs[:2][known[:2]])


def any_size(case: Case) -> None:
    for shape in ((), (0,), (0, 3), (1,), (257,), (2, 0, 3), (2, 3, 1, 2)):
        x = torch.linspace(-2.9, 3.1, max(torch.Size(shape).numel(), 1), dtype=torch.float64)
        x = x[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
        torch.testing.assert_close(case(x), case.torchs(x))
        torch.testing.assert_close(
            gradients(case, (x,)),
            gradients(case.torchs, (x,)),
            rtol=1e-7,
            atol=1e-7 if case.except_for else 1e-12,
        )


def keeps_the_memory_format(case: Case) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = case(x)
    assert y.stride() == case.torchs(x).stride()
    if y.is_contiguous(memory_format=torch.channels_last):
        (dx,) = gradients(case, (x,))
        assert dx.is_contiguous(memory_format=torch.channels_last)


def third_derivative(case: Case) -> None:
    """f''' from three reverse passes equals the central difference of f''."""
    x = real_points().requires_grad_()
    first = torch.autograd.grad(case(x).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    third = torch.autograd.grad(second.sum(), x)[0] if second.requires_grad else torch.zeros_like(x)

    def f2(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(torch.autograd.grad(case(z).sum(), z, create_graph=True)[0].sum(), z)[0]

    h = 1e-5
    torch.testing.assert_close(third, (f2(x + h) - f2(x - h)) / (2 * h), rtol=1e-6, atol=1e-8)


def real_points() -> Tensor:
    return torch.linspace(-2.83, 2.71, 9, dtype=torch.float64)


ELEMENTWISE_PROPERTIES = (
    slope_at_the_kinks,
    extremes_stay_finite,
    infinities_and_nan_pass_as_torchs,
    any_size,
    keeps_the_memory_format,
    third_derivative,
)
