#!/usr/bin/env python3
"""Write what is generated: pages that are measured, and the help.

    accuracy   docs/accuracy.md: errors of every elementwise function and its
               derivatives, ours and torch's
    routes     docs/routes.md: every function on every route of
               differentiation (some minutes)
    versions   docs/versions.md: what passes on which torch, from the last runs of
               the tests in each environment
    help       manualprop/training/help/: what `manualprop fit --help` shows

The first two name the processor that they were made on, for their last digits
depend on it. Elsewhere they are left as they are, unless asked for by name.
docs/benchmarks.md is written by `run.py bench NAME --write`.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import torch
import torch.nn.functional as torch_F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# The pages are made from the tests' tables.
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "tests"),
    str(ROOT / "scripts"),
]

from benchmarking import markdown_table, processor, progress  # noqa: E402
from cases import CASES, Case  # noqa: E402
from routes import COMPILED, COMPILED_SECOND, FORWARD, REVERSE, SECOND, Route  # noqa: E402

from manualprop import functional as F  # noqa: E402

# ----- accuracy: the exact functions -----

mpf = mpmath.mpf
DIGITS = 60


def title(case: Case) -> str:
    """A row's name on the page, as in "gelu (tanh)"."""
    return " ".join([case.name, *(f"({value})" for value in case.kwargs.values())])


# The rows that say what is exact, and those that say why nothing is.
EXACT = {title(c): c for c in sorted(CASES, key=title) if callable(c.exact)}
WITHOUT_EXACT = {c.name: c.exact for c in sorted(CASES, key=title) if c.exact and isinstance(c.exact, str)}
SYMBOLS = ("f", "f'", "f''")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def exact(name: str, x: float, order: int) -> float:
    with mpmath.workdps(DIGITS):
        f = EXACT[name].exact
        found = mpmath.diff(f, mpf(x), order) if order else f(mpf(x))
        return float(found)


def points(name: str, dtype: torch.dtype) -> Tensor:
    """[-30, 30] in steps that meet no kink, and extremes; each as the dtype holds it."""
    x = torch.linspace(-30, 30, 241, dtype=torch.float64) + 0.0137
    extremes = torch.tensor([1e-7, 1e-4, 0.01, 50.0, 87.0, 89.0, 100.0, 500.0], dtype=torch.float64)
    x = torch.cat([x, extremes, -extremes]).to(dtype).unique()
    kinks = torch.tensor([*EXACT[name].kinks, torch.inf], dtype=torch.float64)
    return x[(x.double().unsqueeze(1) - kinks).abs().min(1).values > 1e-6]


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    """f, f' and f'' at x by repeated backward: zeros where the graph ends, None where torch has no formula."""
    x = x.detach().requires_grad_()
    last, found = f(x), []
    for order in range(3):
        found.append(last.detach().double())
        if not last.requires_grad:
            return [*found, *[torch.zeros_like(found[0])] * (2 - order)]
        try:
            (last,) = torch.autograd.grad(last.sum(), x, create_graph=True)
        except RuntimeError:
            return [*found, *[None] * (2 - order)]
    return found


class Errors(NamedTuple):
    """Points, the exact f, f', f'' there, and what we and torch find."""

    x: Tensor
    exact: list[Tensor]
    ours: list[Tensor | None]
    torchs: list[Tensor | None]

    def worst(self, found: Tensor | None, order: int, eps: float) -> float | None:
        """Largest error in eps max(|exact|, 1); inf for a NaN, None for what is not implemented."""
        if found is None:
            return None
        truth = self.exact[order]
        error = (found - truth).abs() / truth.abs().clamp(min=1) / eps
        return float(error.nan_to_num(nan=math.inf).max())


@functools.cache
def errors(name: str, dtype_name: str) -> Errors:
    dtype = DTYPES[dtype_name]
    x = points(name, dtype)
    truth = [torch.tensor([exact(name, v, n) for v in x.tolist()], dtype=torch.float64) for n in range(3)]
    keep = torch.stack([t.abs() < torch.finfo(dtype).max for t in truth]).all(0)
    x, truth = x[keep], [t[keep] for t in truth]
    return Errors(x, truth, derivatives(EXACT[name], x), derivatives(EXACT[name].torchs, x))


def worst_pair(name: str, dtype_name: str, order: int) -> tuple[float | None, float | None]:
    e, eps = errors(name, dtype_name), torch.finfo(DTYPES[dtype_name]).eps
    return e.worst(e.ours[order], order, eps), e.worst(e.torchs[order], order, eps)


def breaks_the_claim(ours: float | None, torchs: float | None) -> bool:
    return ours is None or (torchs is not None and ours > 2 * torchs + 1)


# ----- where a page was made -----


def machine() -> str:
    """The processor, and which of torch's kernels it runs."""
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


def made(page: str) -> str:
    return (
        f"Generated by `python3 scripts/run.py docs {page}`; do not edit.  \n"
        f"Made on {machine()}, with torch {torch.__version__}."
    )


def made_on(path: Path) -> str | None:
    """The machine that a page was made on, None where it does not say."""
    found = (
        re.search(r"^Made on (.*), with torch ", path.read_text(encoding="utf-8"), re.M)
        if path.exists()
        else None
    )
    return found[1] if found else None


# ----- accuracy: the page -----

ACCURACY = """# Accuracy

{made}

The largest error of value, first and second derivative over [-30, 30] and extremes up to 500, against {digits} digits:
ours / torch's, in units of eps max(|exact|, 1) of the dtype (an error of half a unit is a correct rounding). We promise
at most twice torch's error plus one unit; a cell that breaks the promise is marked with !. Both sides differentiate twice
by backward; `none` is a derivative that torch has not implemented.

"""


def accuracy_page() -> Iterator[str]:
    yield ACCURACY.format(made=made("accuracy"), digits=DIGITS)
    for dtype_name in DTYPES:
        rows = []
        for i, name in enumerate(EXACT):
            progress(i, len(EXACT), f"accuracy, {dtype_name}: {name}")
            rows.append([name, *(_cell(*worst_pair(name, dtype_name, n)) for n in range(3))])
        yield f"## {dtype_name}\n\n{markdown_table(['function', *(f'`{s}`' for s in SYMBOLS)], rows)}\n\n"
    yield "## Where torch is poor\n\n"
    yield "The place of torch's largest relative error, float32, where it is over 1 % and a hundred times ours.\n\n"
    yield markdown_table(["function", "x", "exact", "ours", "torch"], list(poor_places())) + "\n\n"
    yield "## At a kink\n\n" + prelu_at_zero() + "\n\n"
    names = ", ".join(f"{name} ({reason})" for name, reason in WITHOUT_EXACT.items())
    yield f"Functions without a row: {names}.\n"


def _cell(ours: float | None, torchs: float | None) -> str:
    return f"{_short(ours)} / {_short(torchs)}{' !' if breaks_the_claim(ours, torchs) else ''}"


def _short(value: float | None) -> str:
    if value is None:
        return "none"
    if value < 1e-9:  # the exact value's own last digits
        return "0"
    return "NaN" if math.isinf(value) else f"{value:.2g}" if value < 100 else f"{value:.1e}"


def poor_places() -> Iterator[list[str]]:
    tiny = torch.finfo(torch.float32).tiny
    for name in EXACT:
        e = errors(name, "float32")
        for n, symbol in enumerate(SYMBOLS):
            truth, mine, theirs = e.exact[n], e.ours[n], e.torchs[n]
            if mine is None or theirs is None:
                continue
            scale = truth.abs().clamp(min=tiny)
            ours, torchs = (
                ((found - truth).abs() / scale).nan_to_num(nan=math.inf) for found in (mine, theirs)
            )
            poor = (truth.abs() >= tiny) & (torchs > 0.01) & (torchs > 100 * ours)
            if poor.any():
                i = int(torchs.where(poor, -1.0).argmax())
                values = (float(t[i]) for t in (truth, mine, theirs))
                yield [f"{name} `{symbol}`", f"{float(e.x[i]):g}", *(f"{v:.6g}" for v in values)]


def prelu_at_zero() -> str:
    slope, zero = torch.tensor([0.25]), torch.zeros(1)

    def both(f: Callable[..., Tensor]) -> str:
        (reverse,) = torch.func.vjp(lambda x: f(x, slope), zero)[1](torch.ones(1))
        forward = torch.func.jvp(lambda x: f(x, slope), (zero,), (torch.ones(1),))[1]
        return f"{reverse.item():g} in reverse mode and {forward.item():g} in forward mode"

    return (
        f"The slope of prelu at 0 with a weight of 0.25: torch {both(torch_F.prelu)}, ours {both(F.prelu)}."
    )


# ----- routes -----

ROUTES = """# Every function on every route

{made}

One row of the test table for each function; each cell is run and its result compared with torch's own backward (forward
mode: with torch's jvp; second order: with torch's double backward).

- `ok`: the right values.
- `ok+`: the right values, where torch's own function raises or has no second derivative.
- `as torch`: a loud error where torch's own function raises as well.

"""


class Probe(NamedTuple):
    """A function of one tensor: a row with all arguments but one fixed."""

    ours: Callable[[Tensor], Tensor]
    torchs: Callable[[Tensor], Tensor]
    x: Tensor


def probe(case: Case) -> Probe:
    # Seeded before the route: inside of it, vmap and Dynamo refuse.
    case = dataclasses.replace(case, random=False)
    arguments = case.made()
    i = case.differentiable(arguments)[0]
    rest = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

    def at(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(*rest[:i], x, *rest[i + 1 :])

    return Probe(at(case), at(case.torchs), rest[i])


def attempt(route: Route, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | Exception:
    torch._dynamo.reset()
    torch.manual_seed(5)
    try:
        return route(f, x)
    except Exception as error:  # whatever the route raises is the result
        return error


def expected(family: dict[str, Route], p: Probe) -> Tensor | Exception:
    base: Route = next(iter(family.values()))
    found = attempt(base, p.torchs, p.x)
    if isinstance(found, Exception):
        found = attempt(base, p.ours, p.x)
    return found


def verdict(name: str, route: Route, p: Probe, truth: Tensor | Exception) -> str:
    found = attempt(route, p.ours, p.x)
    if isinstance(found, Exception):
        torchs = attempt(route, p.torchs, p.x)
        return "as torch" if isinstance(torchs, Exception) else f"**{type(found).__name__}**"
    if isinstance(truth, Exception):
        return "ok+"
    loose = {"rtol": 0.05, "atol": 0.05} if name == "autocast" else {"rtol": 1e-6, "atol": 1e-7}
    try:
        torch.testing.assert_close(found.to(truth.dtype), truth, **loose)
    except AssertionError:
        return "**wrong**"
    if name.startswith("compile"):  # too slow to run torch's side as well
        return "ok"
    return "ok+" if isinstance(attempt(route, p.torchs, p.x), Exception) else "ok"


FORWARD_COMPILED = ("compile(func.jvp)", "compile(jacfwd)")
FAMILIES: dict[str, tuple[dict[str, Route], dict[str, Route]]] = {
    "Reverse mode": (REVERSE, REVERSE),
    "Forward mode": (FORWARD, FORWARD),
    "Second order": (SECOND, SECOND),
    "Reverse mode, compiled": (REVERSE, {k: r for k, r in COMPILED.items() if k not in FORWARD_COMPILED}),
    "Forward mode, compiled": (FORWARD, {k: COMPILED[k] for k in FORWARD_COMPILED}),
    "Second order, compiled": (SECOND, COMPILED_SECOND),
}


def rows_to_run() -> dict[str, Case]:
    return {c.name: c for c in reversed(CASES) if c.differentiable(c.made())}


def routes_page(cases: dict[str, Case] | None = None, compiled: bool = True) -> Iterator[str]:
    yield ROUTES.format(made=made("routes"))
    cases = rows_to_run() if cases is None else cases
    for title, (base, family) in FAMILIES.items():
        if "compiled" in title and not compiled:
            continue
        rows = []
        for i, (name, case) in enumerate(sorted(cases.items())):
            progress(i, len(cases), f"{title}: {name}")
            rows.append([f"`{name}`", *_verdicts(case, base, family)])
        yield f"## {title}\n\n{markdown_table(['function', *family], rows)}\n\n"


def _verdicts(case: Case, base: dict[str, Route], family: dict[str, Route]) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p = probe(case)
        truth = expected(base, p)
        for name, route in family.items():
            yield verdict(name, route, p, truth)


# ----- versions of torch -----

VERSIONS = """# Versions of torch

Generated by `python3 scripts/run.py docs versions`; do not edit.

The last runs of the tests on a CPU: `python3 scripts/run.py test --torch VERSION` runs them on another version than that
of `scripts/constraints.txt`. `all` are the tests of a plain `test`, `quick` those of `test -m quick`, `full` those of
`test --full`. The range in `pyproject.toml` holds the versions on which none fails; outside of it the package works as far as it works,
and warns once.

"""
HEADER = ["torch", "Python", "tests", "day", "passed", "skipped", "failed", "which"]


def version_files() -> dict[Path, str]:
    """The page; a row stays as it is where no environment here has made it anew."""
    path = ROOT / "docs" / "versions.md"
    kept = re.findall(r"^\| (\d.*) \|$", path.read_text(encoding="utf-8") if path.exists() else "", re.M)
    rows = [line.split(" | ") for line in kept] + [version_row(p) for p in ROOT.glob(".venv*/suite-*.json")]
    latest = {tuple(row[:3]): row for row in rows}
    ordered = sorted(
        latest.values(), key=lambda row: ([int(n) for n in f"{row[0]}.{row[1]}".split(".")], row[2])
    )
    return {path: VERSIONS + markdown_table(HEADER, ordered[::-1]) + "\n"}


def version_row(path: Path) -> list[str]:
    """What tests/conftest.py has recorded of a run."""
    run = json.loads(path.read_text(encoding="utf-8"))
    failed = ", ".join(f"`{name}`" for name in run["failed"])
    numbers = [str(run["passed"]), str(run["skipped"]), str(len(run["failed"]))]
    part = path.stem.removeprefix("suite-")
    return [run["torch"], run["python"], part, run["day"], *numbers, failed or "-"]


# ----- the help of the console command -----


def help_files() -> dict[Path, str]:
    from manualprop.training import _help  # Lightning: only where it is asked for

    return {_help.FOLDER / f"{command}.txt": text for command, text in _help.texts().items()}


# ----- the command -----

PAGES: dict[str, Callable[[], Iterator[str]]] = {"accuracy": accuracy_page, "routes": routes_page}
PARTS = [*PAGES, "versions", "help"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 scripts/run.py docs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part {unknown[0]!r}. There are: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    current = [
        _build(name, arguments.check) for name in arguments.parts or PARTS if _is_due(name, arguments.parts)
    ]
    return 0 if all(current) else 1


def _is_due(name: str, asked: list[str]) -> bool:
    """Whether to make a part: one that another processor made only if it is asked for."""
    elsewhere = made_on(ROOT / "docs" / f"{name}.md")
    if name in asked or elsewhere in (None, machine()):
        return True
    print(f"docs/{name}.md was made on {elsewhere}; this is {machine()}.")
    print(f"It is left as it is: python3 scripts/run.py docs {name} makes it anew.")
    return False


def _build(name: str, check: bool) -> bool:
    if name in ("versions", "help"):
        files = version_files() if name == "versions" else help_files()
    else:
        files = {ROOT / "docs" / f"{name}.md": "".join(PAGES[name]()).rstrip() + "\n"}
        progress(1, 1, f"{name}: done")
    current = [_is_current(path, text) if check else _write(path, text) for path, text in files.items()]
    return all(current)  # of each that was looked at


def _is_current(path: Path, text: str) -> bool:
    current = path.exists() and path.read_text(encoding="utf-8") == text
    print(f"{_shown(path)} is {'up to date' if current else 'out of date: python3 scripts/run.py docs'}")
    return current


def _write(path: Path, text: str) -> bool:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {_shown(path)}")
    return True


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
