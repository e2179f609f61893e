"""Proves a swap: outputs, loss and gradients before and after agree within a rounding bound."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualprop._swap._changes import Change, apply, revert
from manualprop._swap._report import Check
from manualprop._swap._run import as_call, is_floating, kept, run_model
from manualprop._swap._twins import TWINS, title
from manualprop.nn import dropout

FACTOR = 4.0  # the limit in units of rounding; the five transformers of the tests use up to 1.8
DRAWS_ALIKE_ON = "cpu"  # on other devices torch's fused dropout draws in another order
RANDOM = (*(t for t, ours in TWINS.items() if ours.__module__ == dropout.__name__), nn.RReLU)


def prove(model: nn.Module, changes: Sequence[Change], inputs: Any) -> Check:
    """Make the changes, or raise and leave ``model`` as it was; see :func:`manualprop.swap`."""
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "swap: check needs initialised parameters. Got a lazy layer: run the model once before the swap."
        )
    compared = [change for change in changes if _draws_alike(change, inputs)]
    others = [change for change in changes if change not in compared]
    try:
        comparison = ModelBefore(model, inputs)
        closest, wrong = comparison.of(compared)
        if wrong is not None:
            raise _refusal(model, compared, inputs, comparison)
    except BaseException:
        revert(changes)
        raise
    before = kept(model, inputs)
    apply(changes)
    both = before.beside(kept(model, inputs))
    return Check(len(comparison.exact), closest.name, closest.ratio, both, tuple(c.path for c in others))


class Deviation(NamedTuple):
    """The tensor that came closest to its limit, or exceeded it."""

    name: str
    size: float
    limit: float
    dtype: torch.dtype
    error: Exception | None = None

    @property
    def ratio(self) -> float:
        if self.size == 0:
            return 0.0
        return self.size / self.limit if self.limit else torch.inf

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.name} ({self.dtype})"
        return (
            f"{self.name} is off by {self.size:.1e} in {self.dtype}, where rounding explains {self.limit:.1e}"
        )


class ModelBefore:
    """The results before the swap in two precisions, one unit of rounding for each, and the comparison.

    Attributes:
        exact: the results of the model in float64.
        rounded: its results in its own precision (float32 for a float64 model).
        units: one unit of rounding for each floating result.
        dtypes: {None or float64: eps of the runs to compare}; None is the model's own precision.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        own = _widest_eps(model, inputs)
        eps64 = torch.finfo(torch.float64).eps
        narrow = torch.float32 if own == eps64 else None
        self.eps = torch.finfo(torch.float32).eps if own == eps64 else own
        self.dtypes = {torch.float64: eps64} | ({} if own == eps64 else {None: own})
        try:
            self.exact = run_model(model, inputs, torch.float64)
            self.rounded = run_model(model, inputs, narrow)
        except Exception as error:
            error.add_note("This is the model as it was given: swap(check=...) has not swapped anything yet.")
            raise
        if not any(is_floating(v) for name, v in self.exact.items() if name.startswith("output")):
            raise ValueError("swap: check needs a model that returns a floating tensor. Got none.")
        self.units = self._units()

    def _units(self) -> dict[str, float]:
        """One unit of rounding for each tensor: e + a eps s, with the letters of swap's docstring."""
        e: dict[str, float] = {}
        s: dict[str, float] = {}
        for name, exact in self.exact.items():
            if not is_floating(exact):
                continue
            group = _group(name)
            e[group] = max(e.get(group, 0.0), _distance(*self._in_range(name, self.rounded[name])))
            s[group] = max(s.get(group, 0.0), _largest(exact))
        floor = self.eps * max(s.values())
        s = {group: max(size, floor, torch.finfo(torch.float64).tiny) for group, size in s.items()}
        a = min(max(1.0, median(e[group] / (self.eps * s[group]) for group in e)), 1 / self.eps)
        return {n: e[_group(n)] + a * self.eps * s[_group(n)] for n in self.exact if _group(n) in e}

    def of(self, changes: Sequence[Change]) -> tuple[Deviation, Deviation | None]:
        """The largest difference that ``changes`` make; then the same if it is too large, else None."""
        worst = Deviation("output", 0.0, 1.0, torch.float64)
        apply(changes)
        try:
            for dtype, eps in self.dtypes.items():
                worst = max(worst, self._largest(dtype, eps), key=lambda d: d.ratio)
        except Exception as error:
            worst = Deviation(f"{type(error).__name__}: {error}", torch.inf, 1.0, torch.float64, error)
        finally:
            revert(changes)
        return worst, None if worst.ratio <= 1 else worst

    def _largest(self, dtype: torch.dtype | None, eps: float) -> Deviation:
        results = run_model(self.model, self.inputs, dtype)
        if set(results) != set(self.exact):
            odd = sorted(set(results) ^ set(self.exact))
            raise RuntimeError(f"only one of the two models gives {', '.join(odd)}")
        found = []
        for name, result in results.items():
            if dtype is None and not is_floating(result):
                continue  # such as an argmax: rounding may change it; the float64 run compares it
            limit = FACTOR * self.units.get(name, 0.0) * eps / self.eps
            a, b = (result, self.exact[name]) if dtype is not None else self._in_range(name, result)
            found.append(Deviation(name, _distance(a, b), limit, result.dtype))
        return max(found, key=lambda difference: difference.ratio)

    def _in_range(self, name: str, result: Tensor) -> tuple[Tensor, Tensor]:
        """``result`` and the exact result, without elements that overflow in the model's own precision."""
        overflowed = self.rounded[name].isinf() & self.exact[name].isfinite()
        return result.masked_fill(overflowed, 0), self.exact[name].masked_fill(overflowed, 0)


def _refusal(model: nn.Module, changes: Sequence[Change], inputs: Any, comparison: ModelBefore) -> Exception:
    """The error that names the first layer, in the order of execution, whose swap makes the model differ."""
    _, itself = comparison.of(())
    if itself is not None:
        return ValueError(
            f"swap: check needs a model that gives the same twice. As it was given, {itself}: draw random numbers "
            "with torch's generators only, and keep no state beside the buffers."
        )
    order = _in_execution_order(model, changes, inputs)
    # Swapping the first `agree` layers changes nothing; swapping the first `differ` layers does.
    agree, differ = (
        0,
        len(order),
    )
    while differ - agree > 1:
        middle = (agree + differ) // 2
        _, wrong = comparison.of(order[:middle])
        agree, differ = (middle, differ) if wrong is None else (agree, middle)
    _, wrong = comparison.of(order[:differ])
    first = order[differ - 1]
    verb = "fails where it worked before" if wrong is not None and wrong.error is not None else "differs"
    changed = (
        f"our rules in the forward of {title(first.after)}" if first.is_of_functions else title(first.after)
    )
    refusal = RuntimeError(
        f"swap: with {changed} at {first.path or 'the model itself'!r} the model {verb}: {wrong}. "
        f"The model is as it was; skip={first.path!r} leaves that layer out."
    )
    refusal.__cause__ = wrong.error if wrong is not None else None
    return refusal


def _in_execution_order(model: nn.Module, changes: Sequence[Change], inputs: Any) -> list[Change]:
    called: dict[nn.Module, None] = {}
    hooks = [c.module.register_forward_pre_hook(lambda module, _: called.setdefault(module)) for c in changes]
    try:
        run_model(model, inputs, torch.float64)
    finally:
        for hook in hooks:
            hook.remove()
    position = {module: number for number, module in enumerate(called)}

    def order(c: Change) -> tuple[bool, bool, int, int]:
        """Fusions come last: they need swapped layers.  Functions by depth: an outer forward reaches the inner ones."""
        depth = len(c.path.split(".")) if c.path else 0
        among = -depth if c.is_of_functions else 0
        return c.fuses, c.is_of_functions, among, position.get(c.module, len(position))

    return sorted(changes, key=order)


def _draws_alike(change: Change, inputs: Any) -> bool:
    """Whether a layer draws the same numbers as its torch twin: on the CPU, or if it draws none."""
    positional, keywords = as_call(inputs)
    tensors = [
        t for t in (*positional, *keywords.values(), *change.module.parameters()) if isinstance(t, Tensor)
    ]
    concerned = change.module.modules() if change.fuses else [change.module]
    random = any(isinstance(module, RANDOM) for module in concerned)
    return not random or all(t.device.type == DRAWS_ALIKE_ON for t in tensors)


def _widest_eps(model: nn.Module, inputs: Any) -> float:
    positional, keywords = as_call(inputs)
    tensors = [t for t in (*positional, *keywords.values()) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in (*tensors, *model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max(torch.finfo(dtype).eps for dtype in dtypes or {torch.get_default_dtype()})


def _group(name: str) -> str:
    """The parameters of one layer share a scale: the gradient of some biases is 0 except for rounding."""
    return name.rpartition(".")[0] if name.startswith("gradient of ") else name


def _parts(value: Tensor) -> Tensor:
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value.double()


def _largest(value: Tensor) -> float:
    size = _parts(value).abs()
    return size[size.isfinite()].max().item() if size.isfinite().any() else 0.0


def _distance(value: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite if one element is not finite and the other is not equal to it."""
    if value.shape != exact.shape:
        return torch.inf
    a, b = _parts(value), _parts(exact)
    difference = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    return difference.nan_to_num(torch.inf, torch.inf).max().item() if difference.numel() else 0.0
