"""PyTorch's own databases of modules and operators drive tests of our twins.

``module_db`` and ``op_db`` are what PyTorch tests itself with: inputs and misuses of every module and operator,
options included, collected over years and by others.  Every twin and every function of ours is looked up there;
what is not found, and where torch's own gradient is not exact, is named below with its reason, and an entry that
is not needed any more fails.
"""

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from properties import upstream
from test_routes import tripled
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from manualprop import functional as F
from manualprop import functions as rules
from manualprop._swap import TWINS

FUNCTIONS = sorted(n for n, f in vars(F).items() if inspect.isfunction(f) and not n.startswith("_"))
CLOSE = 1e-12  # of the largest value, or of 1 where all are smaller; float64's eps is 2.2e-16
INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class Allowed(NamedTuple):
    """How far we may be from torch, and why it is torch that is off."""

    error: float
    reason: str


NO_MODULE_INFO = "torch has no ModuleInfo for it; its function is in op_db"
NOT_IN_MODULE_DB = {
    "Hardsigmoid": NO_MODULE_INFO,
    "Identity": "torch has no ModuleInfo for it; it returns its very input (test_nn)",
    "RReLU": NO_MODULE_INFO,
    "NLLLoss2d": "torch has no ModuleInfo for it; it is NLLLoss under its old name",
    "TripletMarginLoss": NO_MODULE_INFO,
    "TripletMarginWithDistanceLoss": NO_MODULE_INFO,
    "CosineSimilarity": NO_MODULE_INFO,
    "PairwiseDistance": NO_MODULE_INFO,
    "EmbeddingBag": NO_MODULE_INFO,
    **dict.fromkeys(("PixelShuffle", "PixelUnshuffle", "Upsample"), NO_MODULE_INFO),
    **{f"Upsampling{n}2d": NO_MODULE_INFO for n in ("Nearest", "Bilinear")},
    **dict.fromkeys(("Flatten", "Unflatten"), "torch has no ModuleInfo for it; it is torch's view"),
    **{f"Lazy{n}": f"torch has no ModuleInfo for it; it becomes {n}" for n in ("Linear", "Bilinear")},
    **{f"LazyBatchNorm{d}d": f"torch has no ModuleInfo for it; it becomes BatchNorm{d}d" for d in (1, 2, 3)},
    **{f"LazyInstanceNorm{d}d": f"torch has no ModuleInfo; it becomes InstanceNorm{d}d" for d in (1, 2, 3)},
    **{f"MaxUnpool{d}d": NO_MODULE_INFO for d in (1, 2, 3)},
    **{f"{n}Dropout": NO_MODULE_INFO for n in ("", "Alpha", "FeatureAlpha")},
    **{f"Dropout{d}d": NO_MODULE_INFO for d in (1, 2, 3)},
}
NOT_IN_OP_DB = {"dropout1d": "torch has no OpInfo for it; its module is dropout's"}
NOT_IN_OP_DB |= {f"lp_pool{d}d": "torch has no OpInfo for it; its module is in module_db" for d in (1, 2, 3)}
NOT_IN_OP_DB |= {
    name: "torch has no function of that name: its rows hold it against a composition of others"
    for name in FUNCTIONS
    if not hasattr(torch.nn.functional, name)
}
# {(module or function, order of the derivative): how far from torch's}
GRADIENTS = {
    ("hardsigmoid", 1): Allowed(1e-8, "torch multiplies by a 1/6 rounded to float32"),
}
GRADIENTS |= {
    (name, 2): Allowed(1e-9, "torch adds 1e-12 to x and to 1 - x in the second derivative")
    for name in ("BCELoss", "binary_cross_entropy")
}
REFERENCES = {"RMSNorm": Allowed(1e-6, "torch's reference_fn computes in float32 whatever the input")}
WEIGHT_FIRST = {"embedding"}  # the OpInfo takes what is differentiated first, the function takes it second
# Defects of ours that these tests found and that are not mended yet: {subject: (tests, what is wrong)}.
OPEN: dict[str, tuple[set[str], str]] = {}
# Misuses for which we raise the same exception with another text.
OWN_WORDS = {
    "CrossEntropyLoss": "says what to do: leave out the class axis for class indices",
    **{f"conv{d}d": "says which tensor has the wrong number of axes" for d in (1, 2, 3)},
    "gelu": "says which argument was received",
    "max_pool1d": "torch's words for a call that asks for the places too",
    "poisson_nll_loss": "names the two sizes in the order of the arguments",
}


class Databases(NamedTuple):
    modules: dict[type[nn.Module], list[Any]]
    ops: dict[str, list[Any]]


@pytest.fixture(scope="module")
def db() -> Databases:
    """The two databases, read without the traces that their import leaves in the process."""
    environment, frozen = dict(os.environ), "__allow_nonbracketed_mutation_flag"
    flag = getattr(torch.backends, frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    setattr(torch.backends, frozen, flag)  # else nobody may set torch.backends.cudnn.benchmark any more
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    modules: dict[type[nn.Module], list[Any]] = {}
    for info in module_db:
        modules.setdefault(info.module_cls, []).append(info)
    ops: dict[str, list[Any]] = {}
    for info in op_db:
        ops.setdefault(info.name.removeprefix("nn.functional."), []).append(info)
    return Databases(modules, ops)


# ----- comparing -----


class Outcome(NamedTuple):
    """What a call gives: a value, gradients and buffers; or the error that it raises instead."""

    value: Any
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    error: str
    warned: frozenset[str] = frozenset()


def fresh(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """The same nested inputs in tensors of their own, layouts kept; floating ones in ``dtype``, if given."""

    def renewed(t: Any) -> Any:
        if isinstance(t, torch.dtype) and dtype is not None:
            return dtype
        if not isinstance(t, Tensor):
            return t
        numbers = t.is_floating_point() or t.is_complex()
        to = dtype if dtype is not None and numbers and dtype.is_complex == t.is_complex() else t.dtype
        return t.detach().clone().to(to).requires_grad_(t.requires_grad)

    return tree_map(renewed, inputs)


def outcome(
    function: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    module: nn.Module | None = None,
    order: int = 1,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """The gradients of every tensor that requires one; at order 2 those of the gradients, in all inputs and g."""
    args, kwargs = fresh(inputs, dtype)
    if order == 2 or dtype is not None:
        # With options torch's linear_cross_entropy has no second derivative, and does not say so; they hold dtypes too.
        kwargs.pop("options", None)
        if hasattr(module, "options"):
            module.options = None
    leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]
    leaves += [] if module is None else list(module.parameters())
    found: list[Tensor | None] = [None] * len(leaves)
    y, failed = None, ""
    torch.manual_seed(0)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch gives some warnings once a process, to whoever comes first
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y = function(*args, **kwargs)
            first = without_places(y)
            if leaves and first.requires_grad:
                g = upstream(first).requires_grad_(order == 2)
                found = list(
                    torch.autograd.grad(first, leaves, g, allow_unused=True, create_graph=order == 2)
                )
                if order == 2:
                    found = second(found, [*leaves, g])
        except Exception as error:
            found, failed = [], f"{type(error).__name__}: {error}"
        finally:
            torch.set_warn_always(always)
    warned = frozenset(str(w.message)[:60] for w in caught if issubclass(w.category, UserWarning))
    return Outcome(y, found, [] if module is None or failed else list(module.buffers()), failed, warned)


def without_places(y: Any) -> Any:
    """What is differentiated: a pool may return the places of the maxima too."""
    return y[0] if isinstance(y, tuple) else y


def second(first: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor | None]:
    recorded = [d for d in first if d is not None and d.requires_grad]
    v = [upstream(d) for d in recorded]
    found = torch.autograd.grad(recorded, leaves, v, allow_unused=True, materialize_grads=True)
    return list(found)


def distance(ours: Tensor | None, torchs: Tensor | None) -> float:
    """The largest difference, of the largest value; infinite where type, shape, NaNs or infinities differ."""
    if ours is None or torchs is None:
        return 0.0 if ours is torchs else math.inf
    if ours.shape != torchs.shape:
        return math.inf
    a, b = (
        torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        for t in (ours.detach(), torchs.detach())
    )
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return math.inf
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    if not finite.any():
        return 0.0
    return ((a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp(min=1)).item()


def parts(o: Outcome) -> tuple[list[Any], list[Any]]:
    values = o.value if isinstance(o.value, tuple) else (o.value,)
    return [*values, *o.buffers], o.gradients


def distances(ours: Outcome, torchs: Outcome) -> tuple[float, float]:
    """Of the values and buffers, and of the gradients; dtypes are equal."""
    if "is not implemented" in torchs.error:
        return 0.0, 0.0  # torch has no second derivative there, ours is checked by finite differences
    assert bool(ours.warned) <= bool(torchs.warned), f"warns as torch does not: {set(ours.warned)}"
    assert ours.error.split(":")[0] == torchs.error.split(":")[0], f"{ours.error!r}, torch: {torchs.error!r}"
    found = []
    for mine, theirs in zip(parts(ours), parts(torchs), strict=True):
        pairs = list(zip(mine, theirs, strict=True))
        assert all(a is None or b is None or a.dtype == b.dtype for a, b in pairs), "dtype"
        found.append(max((distance(a, b) for a, b in pairs), default=0.0))
    return found[0], found[1]


def bound(name: str, order: int) -> float:
    return GRADIENTS[name, order].error if (name, order) in GRADIENTS else CLOSE


def check_exemption(name: str, order: int, worst: float) -> None:
    assert (worst > CLOSE) == ((name, order) in GRADIENTS), "the entry in GRADIENTS is not needed"


# ----- what the databases hold -----


def module_samples(info: Any, training: bool) -> list[Any]:
    torch.manual_seed(0)
    found: list[Any] = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    return found


def built(cls: type[nn.Module], sample: Any, training: bool) -> nn.Module:
    return constructed(cls, sample).double().train(training)


def constructed(cls: type[nn.Module], sample: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)


def op_samples(db: Databases, name: str, dtype: torch.dtype) -> Iterator[Any]:
    """Samples of every variant of an operator that has the dtype, as ``(args, kwargs)`` with a description."""
    for info in db.ops[name]:
        if dtype in info.supported_dtypes("cpu"):
            grad = dtype in info.supported_backward_dtypes("cpu")
            yield from info.sample_inputs("cpu", dtype, requires_grad=grad)


def inputs(name: str, sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first, *rest = (sample.input, *sample.args)
    return ((rest[0], first) if name in WEIGHT_FIRST else (first, *rest)), sample.kwargs


def both(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(F, name), getattr(nn.functional, name)


IN_OP_DB = [name for name in FUNCTIONS if name not in NOT_IN_OP_DB]


def open_defect(test: str, name: str) -> list[pytest.MarkDecorator]:
    """Expected to fail, and failing when it does not: then its entry in OPEN can go."""
    tests, what = OPEN.get(name, (set(), ""))
    return [pytest.mark.xfail(strict=True, reason=what)] if test in tests else []


def each_module(test: str) -> list[Any]:
    known = [t for t in TWINS if t.__name__ not in NOT_IN_MODULE_DB]
    return [pytest.param(t, id=t.__name__, marks=open_defect(test, t.__name__)) for t in known]


def each_module_in_both_modes() -> list[Any]:
    modes = {"train": True, "eval": False}
    return [
        pytest.param(
            *row.values,
            training,
            id=f"{row.id}-{mode}",
            marks=[*row.marks, *open_defect(f"module_samples[{mode}]", str(row.id))],
        )
        for row in each_module("module_samples")
        for mode, training in modes.items()
    ]


def each_operator(test: str) -> Any:
    rows = [pytest.param(name, id=name, marks=open_defect(test, name)) for name in IN_OP_DB]
    return pytest.mark.parametrize("name", rows)


FIRST_AND_SECOND = pytest.mark.parametrize(
    "order", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["first", "second"]
)


def test_every_twin_is_in_the_module_database_or_excused(db: Databases) -> None:
    assert {t.__name__ for t in TWINS if t not in db.modules} <= set(NOT_IN_MODULE_DB)
    assert not {t.__name__ for t in db.modules} & set(NOT_IN_MODULE_DB), "these are in the database by now"


def test_every_function_is_in_the_operator_database_or_excused(db: Databases) -> None:
    assert {name for name in FUNCTIONS if name not in db.ops} <= set(NOT_IN_OP_DB)
    assert not set(db.ops) & set(NOT_IN_OP_DB), "these are in the database by now"


def test_the_databases_hold_what_these_tests_count_on(db: Databases) -> None:
    """Nothing below can pass by finding nothing."""
    modules = sum(len(module_samples(i, True)) for t in TWINS for i in db.modules.get(t, []))
    operators = {name: len(list(op_samples(db, name, torch.float64))) for name in IN_OP_DB}
    misuses = sum(len(list(op_misuses(db, name))) for name in IN_OP_DB)
    module_errors = sum(len(module_misuses(db, t)) for t in TWINS if t in db.modules)
    assert modules >= 5 * len(TWINS) and sum(operators.values()) >= 15 * len(IN_OP_DB)
    assert min(operators.values()) >= 1
    assert misuses >= 50 and module_errors >= 15


# ----- modules -----


@FIRST_AND_SECOND
@pytest.mark.parametrize(("torchs", "training"), each_module_in_both_modes())
def test_module_samples(db: Databases, torchs: type[nn.Module], training: bool, order: int) -> None:
    """Value, buffers, gradients of inputs and parameters are torch's; the value is that of torch's reference."""
    ran, worst, name = 0, 0.0, torchs.__name__
    reference = REFERENCES[name].error if name in REFERENCES else CLOSE
    for info in db.modules[torchs]:
        for sample in module_samples(info, training):
            mine, theirs = (built(c, sample, training) for c in (TWINS[torchs], torchs))
            call = sample.forward_input.args, sample.forward_input.kwargs
            ours = outcome(mine, call, mine, order)
            values, gradients = distances(ours, outcome(theirs, call, theirs, order))
            assert values <= CLOSE, f"{sample.desc}: values differ by {values:.1e}"
            assert gradients <= bound(name, order), f"{sample.desc}: gradients differ by {gradients:.1e}"
            worst, ran = max(worst, gradients), ran + 1
            if sample.reference_fn is not None:
                args, kwargs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, call)
                expected = sample.reference_fn(mine, *args, **kwargs)
                assert distance(ours.value, expected) <= reference, (
                    f"{sample.desc}: not the reference's value"
                )
    assert ran
    check_exemption(name, order, worst)


def module_misuses(db: Databases, torchs: type[nn.Module]) -> list[Any]:
    torch.manual_seed(0)
    keywords = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": True}
    infos = [i for i in db.modules[torchs] if i.module_error_inputs_func is not None]
    return [misuse for i in infos for misuse in i.module_error_inputs_func(i, **keywords)]


@pytest.mark.filterwarnings(
    "ignore:Using a target size",  # torch warns of sizes before it raises
    "ignore:Possible nested set:FutureWarning",  # in a pattern of the database
)
@pytest.mark.parametrize("torchs", each_module("module_misuse"))
def test_module_misuse(db: Databases, torchs: type[nn.Module]) -> None:
    cases = []
    for misuse in module_misuses(db, torchs):
        sample = misuse.module_error_input

        def act(sample: Any = sample) -> None:
            call = sample.forward_input
            constructed(TWINS[torchs], sample)(*call.args, **call.kwargs)

        cases.append((misuse, act))
    check_misuses(torchs.__name__, cases)


def check_misuses(name: str, cases: list[tuple[Any, Callable[[], Any]]]) -> None:
    """Each raises the type that the database demands and, unless we chose our own words, its text."""
    other_words = False
    for misuse, act in cases:
        with pytest.raises(misuse.error_type) as caught:
            act()
        said = re.search(misuse.error_regex, str(caught.value)) is not None
        assert said or name in OWN_WORDS, f"{caught.value}; torch: {misuse.error_regex}"
        other_words |= not said
    assert other_words == (name in OWN_WORDS), "the entry in OWN_WORDS is not needed"


# ----- operators -----


@FIRST_AND_SECOND
@each_operator("op_samples")
def test_operator_samples(db: Databases, name: str, order: int) -> None:
    ran, worst = 0, 0.0
    ours, torchs = both(name)
    for sample in op_samples(db, name, torch.float64):
        mine, theirs = (outcome(f, inputs(name, sample), order=order) for f in (ours, torchs))
        values, gradients = distances(mine, theirs)
        assert values <= CLOSE, f"{sample.summary()}: values differ by {values:.1e}"
        assert gradients <= bound(name, order), f"{sample.summary()}: gradients differ by {gradients:.1e}"
        worst, ran = max(worst, gradients), ran + 1
    assert ran
    check_exemption(name, order, worst)


def op_misuses(db: Databases, name: str) -> Iterator[Any]:
    for info in db.ops[name]:
        if info.error_inputs_func is not None:
            yield from info.error_inputs("cpu")


@pytest.mark.filterwarnings(
    "ignore:Using a target size",  # torch warns of sizes before it raises
    "ignore:Possible nested set:FutureWarning",  # in a pattern of the database
)
@each_operator("op_misuse")
def test_operator_misuse(db: Databases, name: str) -> None:
    cases = []
    for misuse in op_misuses(db, name):

        def act(sample: Any = misuse.sample_input) -> Any:
            args, kwargs = inputs(name, sample)
            return getattr(F, name)(*args, **kwargs)

        cases.append((misuse, act))
    check_misuses(name, cases)


@pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental",
    "ignore:Casting complex values to real discards the imaginary part",  # softmax(..., dtype=float)
)
@each_operator("complex")
def test_complex_samples_are_refused_or_right(db: Databases, name: str) -> None:
    """Refused loudly; or else the result is torch's, or no further off than twice torch's."""
    for dtype in (torch.complex64, torch.complex128):
        for sample in op_samples(db, name, dtype):
            ours, torchs = both(name)
            mine = outcome(ours, inputs(name, sample))
            if not (mine.error.startswith("TypeError") and "must be real" in mine.error):
                theirs = outcome(torchs, inputs(name, sample))
                if max(distances(mine, theirs)) > CLOSE:
                    exact = outcome(torchs, inputs(name, sample), dtype=torch.complex128)
                    no_worse(mine, theirs, exact, dtype, sample.summary())


@pytest.mark.slow
@each_operator("dtypes")
def test_operator_samples_of_other_dtypes(db: Databases, name: str) -> None:
    """Integers as torch; floats no worse than twice torch's error against float64, and one to four ulp."""
    ours, torchs = both(name)
    wanted = {d for info in db.ops[name] for d in info.supported_dtypes("cpu") if not d.is_complex}
    for dtype in sorted(wanted - {torch.float64}, key=str):
        for sample in op_samples(db, name, dtype):
            mine, theirs = (outcome(f, inputs(name, sample)) for f in (ours, torchs))
            where = f"{dtype}, {sample.summary()}: "
            assert (mine.error == "") == (theirs.error == ""), where + mine.error + theirs.error
            if dtype in INTEGERS:
                assert distances(mine, theirs)[0] <= 1e-6, where
            elif not theirs.error:
                distances(mine, theirs)  # the dtypes
                exact = outcome(torchs, inputs(name, sample), dtype=torch.float64)
                no_worse(mine, theirs, exact, dtype, where)


def no_worse(mine: Outcome, theirs: Outcome, exact: Outcome, dtype: torch.dtype, where: str) -> None:
    # The sums over examples cancel: their error is some ulp of the terms, not of the result.
    slack = (16 if dtype in (torch.float32, torch.complex64) else 1) * torch.finfo(dtype).eps
    flat = ([*parts(o)[0], *parts(o)[1]] for o in (mine, theirs, exact))
    for a, b, c in zip(*flat, strict=True):
        if a is None:
            continue
        known = ~c.isnan()  # where exact mathematics has no answer, a number is no worse than a NaN
        a, b, c = a[known], b[known], c[known]
        allowed = 2 * distance(b, c) + slack
        assert distance(a, c) <= allowed or distance(a, b) == 0, (
            f"{where}{distance(a, c):.1e} > {allowed:.1e}"
        )


@pytest.mark.slow
@each_operator("noncontiguous")
def test_operator_samples_made_noncontiguous(db: Databases, name: str) -> None:
    ours, torchs = both(name)
    for sample in op_samples(db, name, torch.float64):
        call = inputs(name, sample.noncontiguous())
        mine, theirs = (outcome(f, call) for f in (ours, torchs))
        values, gradients = distances(mine, theirs)
        assert values <= CLOSE and gradients <= bound(name, 1), sample.summary()
        if not theirs.error and without_places(theirs.value).numel():
            strides = [[v.stride() for v in parts(o)[0]] for o in (mine, theirs)]
            assert strides[0] == strides[1], sample.summary()


def has_repeats(places: Tensor) -> bool:
    rows = places.flatten(2) if places.dim() > 2 else places
    return any(len(row.unique()) < len(row) for row in rows.reshape(-1, rows.shape[-1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of options and sizes, as torch's; compared above
@each_operator("forward")
def test_forward_mode_agrees_with_reverse_mode(db: Databases, name: str) -> None:
    """v . (J t) = (J^T v) . t on every sample."""
    ran = 0
    for sample in op_samples(db, name, torch.float64):
        leaves, structure = tree_flatten(fresh(inputs(name, sample)))
        where = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]

        def f(*wanted: Tensor, leaves: Any = leaves, where: Any = where, structure: Any = structure) -> Any:
            every = list(leaves)
            for i, x in zip(where, wanted, strict=True):
                every[i] = x
            args, kwargs = tree_unflatten(every, structure)
            torch.manual_seed(0)
            return without_places(getattr(F, name)(*args, **kwargs))

        if name.startswith("max_unpool") and has_repeats(sample.args[0]):
            continue  # torch's gradient, and ours, reaches numbers that were overwritten
        x = tuple(leaves[i].detach().requires_grad_() for i in where)
        t = tuple(upstream(a).flip(tuple(range(a.dim()))) for a in x)
        if outcome(getattr(F, name), inputs(name, sample)).error:
            continue  # test_operator_samples has seen that torch raises the same
        y = f(*x)
        v = upstream(y)
        gradients = torch.autograd.grad(y, x, v, allow_unused=True, materialize_grads=True)
        forward = (v * jvp(f, tuple(a.detach() for a in x), t)[1]).sum()
        reverse = sum(((d * s).sum() for d, s in zip(gradients, t, strict=True)), torch.zeros(()).double())
        scale = sum((d * s).abs().sum() for d, s in zip(gradients, t, strict=True)) + 1
        known = reverse.isfinite() & forward.isfinite()
        assert (forward - reverse).abs() <= 1e-12 * scale or not known, (
            f"{sample.summary()}: {forward} {reverse}"
        )
        ran += 1
    assert ran


# ----- the tests themselves -----


def test_a_wrong_rule_is_noticed(db: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "Tanh", tripled(rules.Tanh))
    with pytest.raises(AssertionError, match="gradients differ"):
        test_operator_samples(db, "tanh", 1)
    with pytest.raises(AssertionError, match="gradients differ"):
        test_module_samples(db, nn.Tanh, True, 1)


def test_a_missing_check_is_noticed(db: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "softshrink", lambda input, lambd=0.5: input)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_operator_misuse(db, "softshrink")
