"""Find what to verify in a module: cases, and Functions with inputs that they accept."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualprop.verify import _process
from manualprop.verify._case import Case


class Found(NamedTuple):
    """Something to verify.

    Args:
        target: the name for the command, as in ``mypackage.ops:Swish``.
        case: how it is called; None if no accepted inputs were found, or if its module cannot be imported.
        guessed: the inputs that were made up for it, in words; empty for the author's own case.
        broken: why its module cannot be imported.
    """

    target: str
    case: Case | None
    guessed: str = ""
    broken: str = ""


class NotFound(Exception):
    """A target names nothing.  The text is one line for the user."""


def discover(target: str, seed: int = 0) -> list[Found]:
    """Everything to verify in ``package.module[:Name]`` or ``path/to/file.py[:Name]``.

    In a module: every :class:`Case` among its attributes, alone or in a list, tuple or dict, and every
    ``autograd.Function`` defined there that has no case.  In a package: the same in all its modules; one of them that
    cannot be imported hides no other.

    Raises:
        NotFound: if there is no such module or name, or it holds nothing to verify.
    """
    home, _, name = target.partition(":")
    module = _imported(home)
    if name:
        return [_named(module, home, name, seed)]
    found = list(_of_module(module, home, seed))
    for inner in _modules_in(module):
        try:
            found += _of_module(_imported(inner), inner, seed)
        except NotFound as error:
            found.append(Found(inner, None, broken=str(error)))
    if not found:
        raise NotFound(f"{home} holds no autograd.Function and no manualprop.verify.Case")
    return found


def _imported(home: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script lacks the working directory
    try:
        if home.endswith(".py"):
            return _from_file(Path(home))
        return importlib.import_module(home)
    except NotFound:
        raise
    except ModuleNotFoundError as error:
        if error.name and (home == error.name or home.startswith(f"{error.name}.")):
            raise NotFound(f"there is no module {error.name!r}") from None
        raise NotFound(f"{home} cannot be imported: {error}") from None
    except Exception as error:  # whatever the user's module raises
        raise NotFound(f"{home} cannot be imported: {type(error).__name__}: {error}") from None


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _modules_in(package: ModuleType) -> Iterator[str]:
    """Their names.  A subpackage that cannot be imported is named, without what is inside."""
    for info in pkgutil.walk_packages(
        getattr(package, "__path__", ()), f"{package.__name__}.", onerror=lambda name: None
    ):
        if not info.name.endswith("__main__"):
            yield info.name


def _of_module(module: ModuleType, home: str, seed: int) -> Iterator[Found]:
    covered: set[type] = set()
    for name, value in list(vars(module).items()):
        for label, case in _cases(name, value):
            covered.add(getattr(case.fn, "__self__", None))  # type: ignore[arg-type]
            yield Found(f"{home}:{label}", case)
    for name, value in list(vars(module).items()):
        if _is_function(value) and value.__module__ == module.__name__ and value not in covered:
            yield _guessed(value.apply, value.forward, f"{home}:{name}", seed)


def _cases(name: str, value: Any) -> Iterator[tuple[str, Case]]:
    if isinstance(value, Case):
        yield name, value
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}.{i}", c) for i, c in enumerate(value) if isinstance(c, Case))
    elif isinstance(value, dict):
        yield from ((f"{name}.{key}", c) for key, c in value.items() if isinstance(c, Case))


def _is_function(value: Any) -> bool:
    """Whether it is a Function that defines forward."""
    base = torch.autograd.Function
    return isinstance(value, type) and issubclass(value, base) and value.forward is not base.forward


def _named(module: ModuleType, home: str, name: str, seed: int) -> Found:
    target = f"{home}:{name}"
    head, _, index = name.partition(".")
    value = getattr(module, head, None)
    for label, case in _cases(head, value):
        if label in (name, f"{head}.{index}"):
            return Found(target, case)
    if value is None or index:
        known = [n for n, v in vars(module).items() if _is_function(v) or any(True for _ in _cases(n, v))]
        raise NotFound(
            f"{home} has no {name!r}. There are: {', '.join(known) or 'no Functions and no cases'}"
        )
    for label, case in itertools.chain.from_iterable(_cases(n, v) for n, v in vars(module).items()):
        if getattr(case.fn, "__self__", None) is value or case.fn is value:
            return Found(f"{home}:{label}", case)
    if _is_function(value):
        return _guessed(value.apply, value.forward, target, seed)
    if callable(value) and not isinstance(value, type):
        owner = getattr(value, "__self__", None)  # of `op = MyFunction.apply`
        return _guessed(
            value, getattr(owner if _is_function(owner) else value, "forward", value), target, seed
        )
    raise NotFound(f"{target} must be an autograd.Function, a Case or a function. Got {type(value).__name__}")


# ----- inputs for a Function without a case -----

# Shapes that usual operations take together.  A Function of k tensors uses the first k of a row.
_N, _C, _K = 4, 5, 3
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((_N, _C),) * 6,
    ((_N, _C), (_K, _C), (_K,)),  # linear
    ((_N, _C), (_C, _K), (_K,)),  # a product
    ((_N, _C), (_C,), (_C,), (_C,), (_C,)),  # a norm
    ((_N, _C), (_N,), (_N,)),  # a value for each row
    ((_N, _C), (1,), (1,)),
    ((_N, _C), (), ()),
    ((2, _C, 6), (_C,), (_C,)),
    ((2, _K, _N, _C), (2, _K, _N, _C), (2, _K, _N, _C)),  # attention
    ((2, _K, 6, 6), (_N, _K, 3, 3), (_N,)),  # a convolution
    ((2, _K, _N, 6), (_K,), (_K,), (_K,), (_K,)),
    ((2, _N, _C), (2, _C, _K), (_K,)),
    ((2, _N, _C), (_K, _C), (_K,)),
    ((_N,),) * 4,
    ((_N, _N),) * 4,
)
KINDS = ("normal", "positive", "index")


def _guessed(fn: Callable[..., Any], forward: Callable[..., Any], target: str, seed: int) -> Found:
    parameters = _tensors_and_others(forward)
    if parameters is None:
        return Found(target, None)
    accepted = _process.in_child(lambda: _first_accepted(fn, parameters, seed), time_limit=60.0)
    if accepted is None:
        return Found(target, None)
    position, numbers = accepted
    args = next(itertools.islice(_trials(parameters, seed), position, None))
    args = tuple(numbers.get(i, a) for i, a in enumerate(args))
    words = [
        f"{p.name} {str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
        if isinstance(a, Tensor)
        else f"{p.name} {a!r}"
        for p, a in zip(parameters, args, strict=False)
    ]
    return Found(target, Case(fn, args, seed=seed), ", ".join(words))


def _tensors_and_others(forward: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The required parameters, without ctx; None if they are unknown."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if parameters and parameters[0].name in ("ctx", "self"):
        parameters = parameters[1:]
    if any(p.kind == p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return None
    several = [p for p in parameters if p.kind == p.VAR_POSITIONAL]
    needed = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return needed or several  # for `*inputs` alone, one


def _first_accepted(
    fn: Callable[..., Any], parameters: Sequence[inspect.Parameter], seed: int
) -> tuple[int, dict[int, float]] | None:
    """The first trial that runs forward and backward, else the first that runs forward; and which arguments are numbers.

    An argument that gets no gradient may be a number.
    """
    forward_only = None
    for position, args in enumerate(_trials(parameters, seed)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = fn(*args)
                outputs = [
                    y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor)
                ]
                if not outputs or not all(torch.isfinite(y).all() for y in outputs if y.is_floating_point()):
                    continue
                if forward_only is None:
                    forward_only = position
                sum(y.sum() for y in outputs if y.requires_grad).backward()  # type: ignore[union-attr]
            except Exception:  # these are not its inputs
                continue
            return position, _numbers_among(fn, parameters, args)
    return None if forward_only is None else (forward_only, {})


# Names of arguments that stay tensors although they get no gradient.
_TENSORS = re.compile(
    r"^.$|target|label|mask|index|idx|weight|bias|input|other|grad|noise|mean|var|query|key|value"
)


def _numbers_among(
    fn: Callable[..., Any], parameters: Sequence[inspect.Parameter], args: tuple[Any, ...]
) -> dict[int, float]:
    """Which tensors without a gradient may be numbers, as an un-annotated num_bits."""
    found: dict[int, float] = {}
    for i, (parameter, a) in enumerate(zip(parameters, args, strict=False)):
        if not isinstance(a, Tensor) or not a.requires_grad or a.grad is not None:
            continue
        if _TENSORS.search(parameter.name) or parameter.kind == parameter.VAR_POSITIONAL:
            continue
        for number in (2, 0.5):
            try:
                with torch.no_grad():
                    fn(*[number if j == i else found.get(j, b) for j, b in enumerate(args)])
            except Exception:  # it is a tensor after all
                continue
            found[i] = number
            break
    return found


def _trials(parameters: Sequence[inspect.Parameter], seed: int) -> Iterator[tuple[Any, ...]]:
    """Argument lists to try, the most likely first."""
    others = [_other(p) for p in parameters]
    count = sum(o is None for o in others)
    seen = set()
    for later, shapes in itertools.product(KINDS, SHAPES):
        for kinds in _kinds(count, later):
            key = (kinds, shapes[:count])
            if len(shapes) < count or key in seen:
                continue
            seen.add(key)
            generator = torch.Generator().manual_seed(seed)
            tensors = iter(
                [_tensor(kind, shape, generator) for kind, shape in zip(kinds, shapes, strict=False)]
            )
            yield tuple(next(tensors) if o is None else o[0] for o in others)


def _kinds(count: int, later: str) -> Iterator[tuple[str, ...]]:
    """Kinds of the tensors: all normal, all positive, or one an index."""
    if later != "index":
        yield (later,) * count
        return
    for i in range(count):
        yield tuple("index" if j == i else "normal" for j in range(count))


def _tensor(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if kind == "index":
        return torch.randint(_K, shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    return (values.abs() + 0.1 if kind == "positive" else values).requires_grad_()


_Value = tuple[Any] | None
_NUMBERS: dict[Any, _Value] = {float: (0.5,), int: (1,), bool: (False,)}
_BY_NAME: dict[str, _Value] = {
    "eps": (1e-5,), "dim": (-1,), "axis": (-1,), "alpha": (0.5,), "beta": (1.0,), "p": (0.5,), "training": (True,),
    "reduction": ("mean",), "inplace": (False,), "scale": (0.5,), "negative_slope": (0.1,), "temperature": (2.0,),
    "threshold": (0.5,), "momentum": (0.9,), "lambda_": (0.5,), "lam": (0.5,), "lamb": (0.5,), "seed": (0,), "k": None,
    "stride": (1,), "padding": (0,), "dilation": (1,), "groups": (1,), "num_groups": (1,), "kernel_size": (3,),
    "num_bits": (4,), "bits": (4,), "n_bits": (4,), "nbits": (4,), "levels": (8,), "causal": (False,),
    "is_causal": (False,), "ignore_index": (-100,), "label_smoothing": (0.1,),
}  # fmt: skip


def _other(parameter: inspect.Parameter) -> _Value:
    """The value of a parameter that is not a tensor, in a tuple; None for a tensor."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = {"float": float, "int": int, "bool": bool}.get(annotation, annotation)
    if annotation in _NUMBERS:
        return _BY_NAME.get(parameter.name, _NUMBERS[annotation])
    if type(None) in typing.get_args(annotation):
        return (None,)
    return _BY_NAME.get(parameter.name)
