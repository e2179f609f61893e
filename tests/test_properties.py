"""Properties on examples that hypothesis makes up: shapes, strides, dtypes, values, subsets of gradients.

Each property is run on a few examples always, and on many under ``--full``.  The examples are derived from the
test's source, so that a run repeats; a failure prints the ``@reproduce_failure`` line that brings it back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import CASES, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from properties import HALVES, upstream
from torch import Tensor
from torch.func import jvp

from manualprop import functional as F

COMMON = settings(
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
QUICK, MANY = settings(COMMON, max_examples=8), settings(COMMON, max_examples=100)

DTYPES = (torch.float64, torch.float32, *HALVES)
SIZES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
# Kinks of the activations, both zeros, denormals of every dtype, large numbers; the rest is drawn.
CORNERS = (0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 5e-324, -1e-40, 6e-8, 20.0, -20.0, 1e4, -1e4)
ORDINARY = st.floats(-8, 8, width=16)
VALUES = st.one_of(ORDINARY, st.sampled_from(CORNERS))


class Layout(NamedTuple):
    """How a tensor of given values lies in memory."""

    name: str
    lay: Callable[[Tensor], Tensor]


def offset(x: Tensor) -> Tensor:
    """Every other element of a longer storage, from the third place on."""
    long = x.new_full((2 * x.numel() + 3,), 7.0)
    return long[3::2].view(x.shape).copy_(x)


def turned(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def expanded(x: Tensor) -> Tensor:
    """The first slice along the first axis stands for all of them."""
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


LAYOUTS = [
    Layout("contiguous", lambda x: x),
    Layout("turned", turned),
    Layout("offset", offset),
    Layout("expanded", expanded),
]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, values: Any = VALUES) -> Tensor:
    count = math.prod(shape)
    drawn = draw(st.lists(values, min_size=count, max_size=count))
    x = torch.tensor(drawn, dtype=torch.float64).to(dtype).reshape(shape)
    return draw(st.sampled_from(LAYOUTS)).lay(x)


# ----- the checks -----


def derivatives(
    function: Callable[..., Tensor], arguments: list[Tensor], wanted: list[bool], g: Tensor
) -> Any:
    """The value and the gradients that were asked for, and None for the others."""
    leaves = [a.detach().requires_grad_(w) for a, w in zip(arguments, wanted, strict=True)]
    y = function(*leaves)
    assert y.requires_grad == any(wanted)
    asked = [a for a in leaves if a.requires_grad]
    found = iter(torch.autograd.grad(y, asked, g.to(y.dtype)) if asked else ())
    return y.detach(), [next(found) if w else None for w in wanted]


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference where both are numbers; infinite where one alone is (NaN, infinity)."""
    a, b = found.double(), exact.double()
    finite = b.isfinite() & a.isfinite()
    return (a - b)[finite].abs().max().item() if finite.any() else 0.0


def as_good_as(ours: Tensor, torchs: Tensor, exact: Tensor, unit: float, loose: float, where: str) -> None:
    """|ours - exact| <= 2 |torch's - exact| + 4 ulp of the largest; a NaN or infinity only where torch has one.

    Exact is torch in float64, hence 16 ulp there; ``loose`` is added, relatively, where it is further off.  A slope that is
    computed from the output is known to some ulp of 1, hence a gradient to some ulp of ``unit``, the arriving one.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape, where
    assert not (torchs.isfinite() & ~ours.isfinite()).any(), f"{where}: {ours}, torch: {torchs}"
    finite = exact.isfinite() & torchs.isfinite()
    scale = max(unit, exact[finite].abs().max().item() if finite.any() else 0.0)
    info = torch.finfo(ours.dtype)
    ulps = 16 if ours.dtype == torch.float64 else 4
    allowed = 2 * error(torchs, exact) + (ulps * info.eps + loose) * scale + 4 * info.tiny
    assert error(ours.where(finite, torchs), exact.where(finite, torchs.double())) <= allowed, (
        f"{where}: {ours}, torch: {torchs}"
    )


def check(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    arguments: list[Tensor],
    wanted: list[bool],
    loose: float = 0.0,
) -> None:
    """Value and gradients against torch's; untouched arguments; linear in g; forward mode agrees with reverse."""
    before = [(a.clone(), a._version) for a in arguments]
    with torch.no_grad():
        y = ours(*arguments)
    g = upstream(y.double()).to(y.dtype)
    g_before = g.clone()
    value, gradients = derivatives(ours, arguments, wanted, g)
    for a, (old, version) in zip(arguments, before, strict=True):
        assert same(a, old) and a._version == version, "an argument was changed"
    assert same(g, g_before), "the arriving gradient was changed"
    exact = derivatives(torchs, [a.double() for a in arguments], wanted, g.double())
    theirs = derivatives(torchs, arguments, wanted, g)
    as_good_as(value, theirs[0], exact[0], 0.0, loose, "value")
    unit = g.abs().max().item() if g.numel() else 0.0
    for i, (a, b, c) in enumerate(zip(gradients, theirs[1], exact[1], strict=True)):
        if a is not None:
            as_good_as(a, b, c, unit, loose, f"gradient of argument {i}")
    doubled = derivatives(ours, arguments, wanted, 2 * g)[1]
    for a, b in zip(gradients, doubled, strict=True):
        assert a is None or twice(a, b), f"not linear in the arriving gradient: {a}, {b}"
    if any(wanted) and value.dtype == torch.float64:
        forward_agrees(ours, arguments, wanted, g, gradients)


def twice(a: Tensor, b: Tensor) -> bool:
    """Whether b = 2 a: to the last digit, as 2 is a power of two, but for denormals, which have fewer digits."""
    info = torch.finfo(a.dtype)
    return error(2 * a, b) <= 2 * info.tiny * info.eps


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def forward_agrees(
    ours: Callable[..., Tensor], arguments: list[Tensor], wanted: list[bool], g: Tensor, gradients: list[Any]
) -> None:
    """g . (J t) = (J^T g) . t"""
    moved = [i for i, w in enumerate(wanted) if w]

    def f(*those: Tensor) -> Tensor:
        every = list(arguments)
        for i, x in zip(moved, those, strict=True):
            every[i] = x
        return ours(*every)

    t = tuple(upstream(arguments[i]) - 1.1 for i in moved)
    primal = tuple(arguments[i].clone() for i in moved)  # torch takes no expanded tensor here
    tangent = jvp(f, primal, t)[1]
    terms = [gradients[i] * d for i, d in zip(moved, t, strict=True)]
    reverse = torch.stack([term.sum() for term in terms]).sum()
    if not reverse.isfinite():
        assert not tangent.isfinite().all()
        return
    if not any(term.numel() for term in terms):  # a mean of nothing is 0 / 0
        assert not tangent.nan_to_num().any()
        return
    scale = torch.stack([term.abs().sum() for term in terms]).sum() + (g * tangent).abs().sum()
    # A slope near 0 that is computed from the output, as 1 - y^2, is known to an ulp of 1 (Accuracy in its rule).
    ulp = torch.finfo(torch.float64).eps * g.abs().sum() * torch.stack([d.abs().sum() for d in t]).sum()
    assert ((g * tangent).sum() - reverse).abs() <= 1e-13 * scale + ulp + 1e-300


# ----- elementwise functions -----

ELEMENTWISE = {str(c): c for c in CASES if c.elementwise and not c.random}  # float64 draws other numbers


def elementwise(case: Case, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    x = data.draw(tensors(data.draw(SIZES), dtype))
    loose = 1e-6 if "gradient_is_torchs" in case.except_for else 0.0
    check(case, case.torchs, [x], [data.draw(st.booleans())], loose)


@pytest.mark.parametrize("row", ELEMENTWISE)
@QUICK
@given(data=st.data())
def test_elementwise(row: str, data: st.DataObject) -> None:
    elementwise(ELEMENTWISE[row], data)


@pytest.mark.slow
@pytest.mark.parametrize("row", ELEMENTWISE)
@MANY
@given(data=st.data())
def test_elementwise_at_length(row: str, data: st.DataObject) -> None:
    elementwise(ELEMENTWISE[row], data)


@pytest.mark.slow
@pytest.mark.parametrize("row", ELEMENTWISE)
@MANY
@given(data=st.data())
def test_infinities_and_nan_pass_as_torchs(row: str, data: st.DataObject) -> None:
    """In any company: the value's NaNs and infinities are torch's, and its neighbours are not touched."""
    dtype = data.draw(st.sampled_from(DTYPES))
    values = st.sampled_from([math.inf, -math.inf, math.nan, 0.7, -0.7])
    x = data.draw(tensors(data.draw(SIZES), dtype, values))
    case = ELEMENTWISE[row]
    ours, torchs = case(x), case.torchs(x)
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(ours.nan_to_num().isinf(), torchs.nan_to_num().isinf())
    usual = x.isfinite()
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(case(leaf), leaf, torch.ones_like(x))
    assert dx[usual].isfinite().all()
    assert torch.equal(ours.isinf(), torchs.isinf()) and torch.equal(ours > 0, torchs > 0)


# ----- several arguments -----


def linear(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    batch = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    n, m = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    shapes = [(*batch, n), (m, n), (m,)][: data.draw(st.integers(2, 3))]
    arguments = [data.draw(tensors(shape, dtype, ORDINARY)) for shape in shapes]
    check(F.linear, torch.nn.functional.linear, arguments, [data.draw(st.booleans()) for _ in shapes])


@pytest.mark.parametrize("shape", [((2, 3), 0, 4), ((2, 3), 4, 0), ((2, 0), 3, 2), ((), 3, 0), ((), 0, 0)])
def test_linear_without_features(shape: tuple[tuple[int, ...], int, int]) -> None:
    """Sums over nothing are 0, and a batch of any shape has gradients of its own shape."""
    batch, n, m = shape
    arguments = [torch.ones(s, dtype=torch.float64) for s in ((*batch, n), (m, n), (m,))]
    check(F.linear, torch.nn.functional.linear, arguments, [True] * 3)


def softmax(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(SIZES)
    dim = data.draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))
    name = data.draw(st.sampled_from(["softmax", "log_softmax", "softmin"]))
    x = data.draw(tensors(shape, dtype))

    def along(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda z: function(z, dim)

    ours, torchs = (along(getattr(where, name)) for where in (F, torch.nn.functional))
    check(ours, torchs, [x], [data.draw(st.booleans())])


REDUCTIONS = st.sampled_from(["none", "sum", "mean"])


def reduced(name: str, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def bound(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: function(*arguments, **options)

    ours, torchs = (bound(getattr(where, name)) for where in (F, torch.nn.functional))
    return ours, torchs


def mse(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(SIZES)
    arguments = [data.draw(tensors(shape, dtype, ORDINARY)) for _ in range(2)]
    wanted = [data.draw(st.booleans()) for _ in range(2)]
    check(*reduced("mse_loss", reduction=data.draw(REDUCTIONS)), arguments, wanted)


def cross_entropy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    classes = data.draw(st.integers(1, 4))
    batch, *rest = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    x = data.draw(tensors((batch, classes, *rest), dtype))
    count = math.prod((batch, *rest))
    drawn = data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    targets = torch.tensor(drawn).reshape(batch, *rest)
    options: dict[str, Any] = {"reduction": data.draw(REDUCTIONS)}
    options["ignore_index"] = data.draw(st.sampled_from([-100, 0]))
    options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.25]))
    if options["reduction"] == "mean" and not (targets != options["ignore_index"]).any():
        options["reduction"] = "sum"  # the mean of nothing is NaN in both, and tells nothing
    ours, torchs = (lambda z, f=f: f(z, targets) for f in reduced("cross_entropy", **options))
    check(ours, torchs, [x], [data.draw(st.booleans())])


SEVERAL = {f.__name__: f for f in (linear, softmax, mse, cross_entropy)}


@pytest.mark.parametrize("name", SEVERAL)
@QUICK
@given(data=st.data())
def test_several_arguments(name: str, data: st.DataObject) -> None:
    SEVERAL[name](data)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
@MANY
@given(data=st.data())
def test_several_arguments_at_length(name: str, data: st.DataObject) -> None:
    SEVERAL[name](data)


# ----- the check itself -----


def test_a_wrong_derivative_is_noticed() -> None:
    """A value, a slope and an argument that are wrong on purpose: each by an error that gradcheck would pass."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for wrong in (
        lambda z: torch.tanh(z) * (1 + 1e-12),
        lambda z: torch.tanh(z) + 1e-12 * (z - z.detach()),
        lambda z: torch.tanh(z).where(z.detach().add_(0) != 0, z * 0.999),
    ):
        with pytest.raises(AssertionError):
            check(wrong, torch.tanh, [x.clone()], [True])
    check(torch.tanh, torch.tanh, [x], [True])
