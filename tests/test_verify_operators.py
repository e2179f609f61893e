"""The checker raises no alarm on torch's own operators: the first small sample of each differentiable one.

What torch itself gets wrong, or what an operator is by its definition, is named below with the evidence; an entry
that is not needed any more fails.  A handful run always, all of them under ``--full``.
"""

import functools
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from manualprop.verify import Report, check

ENTRIES = 150  # of a tensor of a sample
ALWAYS = ("sin", "addmm", "amax", "index_select", "nn_functional_layer_norm")


class Known(NamedTuple):
    """What the checker finds in an operator of torch, and why it is no false alarm."""

    probes: tuple[str, ...]
    why: str


NO_GRADIENT = Known(
    ("output_requires_grad",),
    "returns the statistics of the rows too, which torch marks as not differentiable",
)
MEMORY = ("first_order", "input_layout", "grad_output_layout")
KNOWN: dict[str, Known] = {
    "unsafe_chunk": Known(("aliasing",), "its outputs share memory, and are no views: unsafe by name"),
    "unsafe_split": Known(("aliasing",), "its outputs share memory, and are no views: unsafe by name"),
    "as_strided": Known(MEMORY, "reads the memory of its input, whatever its layout, by definition"),
    "as_strided_copy": Known(MEMORY, "reads the memory of its input, whatever its layout, by definition"),
    "as_strided_partial_views": Known(
        MEMORY, "reads the memory of its input, whatever its layout, by definition"
    ),
    "as_strided_scatter": Known(
        MEMORY, "writes into the memory of its input, whatever its layout, by definition"
    ),
    "logaddexp": Known(("extremes",), "its second derivative is NaN in float32 at 90: exp overflows"),
    "logaddexp2": Known(("extremes",), "its second derivative is NaN in float32 at 800: exp2 overflows"),
    "lu": Known(("extremes",), "its gradient is NaN for a singular matrix, where the value is finite"),
    "qr": Known(("extremes",), "its gradient for a matrix without full rank is rounding"),
    "nn_functional_prelu": Known(("ties",), "at 0 forward mode takes another slope than backward"),
    "nn_functional_rrelu": Known(
        ("checkpointing",), "under checkpoint its gradient is memory that was never written (6.9e-310)"
    ),
    "nn_functional_hardsigmoid": Known(("dtypes",), "its slope in float64 is a sixth in float32"),
    "nn_functional_mish": Known(("extremes",), "its second derivative is NaN in float32 at 90"),
    "nn_functional_binary_cross_entropy": Known(
        ("extremes",),
        "the value clamps the logarithm, and the gradient of the target is infinite all the same",
    ),
    "nn_functional_softshrink": Known(
        ("extremes", "ties"), "with lambd=0 it is the identity, and its gradient at 0 is 0"
    ),
    "select_scatter": Known(
        ("vmap",), "batched, the gradient of what is written is as many times too large as the axis is long"
    ),
    "triangular_solve": Known(
        ("forward_mode",), "its tangent depends on the triangle that the value does not read"
    ),
    "polar": Known(("extremes",), "its gradient at a radius of 0 is 0, and its slope is cos and sin"),
    **{
        f"polygamma_polygamma_n_{n}": Known(
            ("dtypes",), "its gradient is infinite in float16, where it is in range"
        )
        for n in range(5)
    },
    "native_layer_norm": NO_GRADIENT,
    "native_batch_norm": NO_GRADIENT,
    "_native_batch_norm_legit": NO_GRADIENT,
    "_batch_norm_with_update": NO_GRADIENT,
    "native_group_norm": Known(
        ("partial_outputs", "input_layout", "output_requires_grad"),
        "through its second output alone nothing comes back, and it reads a strided weight without its stride",
    ),
    "nn_functional_group_norm": Known(
        ("zero_size",), "of an input that is empty in space the gradient of the weight is NaN"
    ),
    "nn_functional_max_unpool3d": Known(
        ("first_order", "input_layout"),
        "of places that repeat one value is kept and each gets the gradient; backward raises for a strided input",
    ),
    "nn_functional_max_unpool3d_grad": Known(("input_layout",), "backward raises for a strided input"),
    "nn_functional_linear_cross_entropy_chunked": Known(
        ("second_order", "forward_mode"), "its second derivative and its tangent are 0, in silence"
    ),
    "nn_functional_linear_cross_entropy_chunked_none": Known(
        ("forward_mode",), "its tangent is 0, in silence"
    ),
}


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


# What an operator's inputs are: without it the checker goes where torch promises nothing.
DOMAINS: dict[str, dict[str, Any]] = {
    "cholesky": {"project": symmetric},
    "linalg_cholesky": {"project": symmetric},
    "linalg_cholesky_ex": {"project": symmetric},
    "cholesky_inverse": {"project": torch.tril},
    "cholesky_solve": {"project": {"args[1]": torch.tril}},
    "index_copy": {"unique": ["args[2]"]},
    "nn_functional_max_unpool1d": {"unique": ["args[1]"]},
    "nn_functional_max_unpool2d": {"unique": ["args[1]"]},
}


@functools.cache
def database() -> dict[str, Any]:
    """The differentiable operators of float64 by name; loading takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.formatted_name: op for op in op_db if op.supports_autograd and torch.float64 in op.dtypes}


def small(sample: Any) -> bool:
    """Whether a sample has an entry to differentiate, and no tensor that is large or not strided."""
    tensors = [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, Tensor)]
    wanted = [t for t in tensors if t.requires_grad and t.numel() > 1]
    return bool(wanted) and all(t.numel() <= ENTRIES and t.layout == torch.strided for t in tensors)


def sample_of(op: Any) -> Any:
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    return next((s for s in samples if small(s)), None)


def checked(name: str, **options: Any) -> Report | None:
    """The report at the first small sample, or None without one."""
    op = database()[name]
    sample = sample_of(op)
    if sample is None:
        return None

    def operator(*args: Any, **kwargs: Any) -> Any:
        return op.op(*args, **kwargs)

    operator.__qualname__ = name
    return check(
        operator,
        sample.input,
        *sample.args,
        kwargs=sample.kwargs,
        level="quick",
        **DOMAINS.get(name, {}),
        **options,
    )


def judged(name: str) -> None:
    report = checked(name)
    if report is None:
        pytest.skip("no small sample")
    known = KNOWN.get(name, Known((), ""))
    found = {o.probe for o in report.findings}
    assert found <= set(known.probes), report
    assert not known.probes or found, f"{name} raises no alarm any more: {known.why}"
    assert not [o for o in report if "the probe itself raises" in o.evidence], report.table()


@pytest.mark.parametrize("name", ALWAYS)
def test_no_alarm_on_an_operator(name: str) -> None:
    judged(name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_alarm_on_any_operator() -> None:
    """One test, so that the database is loaded and sampled once; what it finds is told together."""
    told, count = [], 0
    for name in database():
        try:
            judged(name)
        except pytest.skip.Exception:
            continue
        except (ValueError, TypeError) as refused:  # not deterministic, or no floating output
            assert "check:" in str(refused), f"{name}: {refused}"
            continue
        except AssertionError as alarm:
            told.append(f"{name}: {alarm}")
        count += 1
    assert not told, "\n\n".join(told)
    assert count >= 150
