"""The structure: which way imports point, what every rule's docstring says, which function has a row."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

import manualprop
from manualprop import functional, functions
from manualprop.functions import Rule

pytestmark = pytest.mark.quick

ROOT = Path(manualprop.__file__).parent

# Imports point one way: a package may import only those named here, and itself.
MAY_IMPORT = {
    "_torch": set(),  # which every part may import
    "functions": set(),
    "functional": {"functions"},
    "nn": {"functional", "_torch"},
    "_swap": {"nn", "functional", "_receipt"},
    "interop": {"_swap"},
    "_splitting": set(),
    "descent": {"_splitting", "_torch"},
    "verify": {"_torch"},
    "training": {"_backprop", "nn", "descent", "_splitting", "functional", "_invocation"},
    "_backprop": {"nn", "descent", "_splitting", "functions"},
    "_explain": {"_backprop", "nn", "descent", "_splitting", "functions"},
    "_explain_command": {"_command_line", "_explain", "_invocation", "descent", "nn", "training"},
    "_practice": {"verify", "functions"},
    "_practice_command": {"_command_line", "_invocation", "_practice"},
    "_receipt": {"_torch"},
    "_command_line": set(),
    "_programs_command": {"_backprop", "_command_line"},
    "_receipt_command": {"_command_line", "_receipt", "_swap"},
    "_verify_command": {"verify"},
    "_pytest_plugin": {"verify"},
    "_command": {"training", "_invocation"},
    "_invocation": set(),
    "__main__": {"_command"},
    "__init__": {
        "_backprop",
        "descent",
        "_explain",
        "functional",
        "functions",
        "interop",
        "nn",
        "_practice",
        "_receipt",
        "_swap",
        "verify",
    },
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of manualprop that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "manualprop":
            dotted = node.module.split(".")
            found |= {dotted[1]} if len(dotted) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("manualprop.")}
    return {name for name in found if not name.startswith("__")}


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in sorted(ROOT.rglob("*.py"))]
)
def test_imports_point_one_way(path: Path) -> None:
    assert part(path) in MAY_IMPORT, f"{path.name}: state in MAY_IMPORT what it may import"
    assert imported(path) <= MAY_IMPORT[part(path)] | {part(path), "_torch"}


@pytest.mark.parametrize(
    "part_name",
    ["functions", "functional", "nn", "descent", "_splitting", "_swap", "verify", "_practice"],
)
def test_the_core_imports_torch_alone(part_name: str) -> None:
    paths = [p for p in ROOT.rglob("*.py") if part(p) == part_name]
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                top = name.split(".")[0]
                # gradient_tests is called in test modules only, and imports pytest when it is.
                allowed = {"torch", "manualprop"} | ({"pytest"} if path.name == "_pytest.py" else set())
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"


# ----- circles of files -----


def imports_of_files() -> dict[str, set[str]]:
    """Which files of the package each file imports, anywhere in it."""
    files = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("manualprop"):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (named & set(files)) or ({node.module} & set(files))
    return graph


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_no_circle_of_files() -> None:
    """Not even through an import inside of a function."""
    assert len(imports_of_files()) > 100
    assert circle(imports_of_files()) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_names_of_helpers_are_unique() -> None:
    """What one file offers to others has a name that no other file uses for something else."""
    offered: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if part(path) == "verify":  # knows nothing of the rest, nor the rest of it
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                offered.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))
    # A rule, its function and its module share the name of torch's; a command has a main.
    public = {*vars(functions), *vars(functional), *vars(manualprop.nn), "main"}
    assert not {name: files for name, files in offered.items() if len(files) > 1 and name not in public}


def test_importing_the_package_is_light() -> None:
    script = """
import sys, manualprop
assert "torch" not in sys.modules
manualprop.nn, manualprop.functional, manualprop.descent, manualprop.swap, manualprop.interop, manualprop.explain
heavy = {"lightning", "pytest", "rich", "latex2mathml", "torchmetrics", "matplotlib", "torch._dynamo", "jsonargparse", "opacus"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'swop'"):
        manualprop.swop  # noqa: B018
    assert {"nn", "swap", "descent"} <= set(dir(manualprop))


def test_every_function_has_a_row() -> None:
    public = {
        name for name, f in vars(functional).items() if inspect.isfunction(f) and not name.startswith("_")
    }
    assert public == {case.name for case in CASES}


RULES = [
    pytest.param(rule, id=rule.__name__)
    for rule in vars(functions).values()
    if inspect.isclass(rule) and issubclass(rule, Rule) and rule not in (Rule, functions.Elementwise)
]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_derives_its_formula(rule: type[Rule]) -> None:
    doc = inspect.getdoc(rule)
    assert doc and doc.startswith("$"), "the formula comes first"
    order = ["Derivation", "Kinks", "Second order", "Shape", "Memory", "Accuracy", "Reference"]
    sections = re.findall(r"^([A-Z][a-z]+(?: order)?)(?:,.*)?$", doc, re.MULTILINE)
    found = [s for s in sections if s in order]
    assert {"Derivation", "Memory", "Accuracy"} <= set(found), found
    assert found == sorted(found, key=order.index), f"sections out of order: {found}"


FORBIDDEN = re.compile(
    r"aten\.\w*backward|autograd\.(grad|backward)\(|\.backward\(\)|torch\.func\b|(?<!save_for)_backward\("
)


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.name) for p in sorted((ROOT / "functions").glob("*.py"))]
)
def test_no_backward_is_borrowed(path: Path) -> None:
    """A backward is our own formula: neither ATen's nor autograd's (comments and docstrings may name them)."""
    code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
    assert not FORBIDDEN.search(code)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(value=None)
    return tree


def test_the_search_for_borrowed_backwards_finds_one() -> None:
    assert FORBIDDEN.search("torch.ops.aten.gelu_backward(g, x)") and FORBIDDEN.search(
        "torch.autograd.grad(y, x)"
    )
