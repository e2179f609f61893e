#!/usr/bin/env python3
"""How much of the rules is mathematics: lines of the bodies of methods and formulas, by file.

Not counted are signatures, docstrings, comments, the unpacking of what was saved, and a return of bare names.  Of the
rest a line is plumbing if it speaks of the context, of what is needed, of shapes that are only put in order, or of
dtypes; everything else is mathematics.  Run it as `.venv/bin/python scripts/count_mathematics.py`.
"""

import ast
import re
import sys
from pathlib import Path

FUNCTIONS = Path(__file__).resolve().parent.parent / "manualprop" / "functions"
UNPACKING = re.compile(
    r"= (ctx\.saved_tensors|ctx\.needs_input_grad|inputs|output|ctx\.options)\b|^\(?\w+,?\)? = "
)
PLUMBING = re.compile(
    r"\bctx\b|\bneeds|needed|\.to\(|dtype|\.view\(|\.reshape\(|shaped\(|save_for|set_materialize|is None|is not None"
    r"|arranged\(|in_full_precision|plain_eager|is_compiling|is_grad_enabled|legacy|\bout\b|contiguous|setattr|in_place"
)
WORDS = (
    "out: Tensor | None",
    "in_full_precision",
    "is_grad_enabled()",
    "plain_eager()",
    "is_compiling()",
    "is_legacy_batchedtensor(",
)


def bodies(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def statements(function: ast.FunctionDef) -> list[str]:
    """Each simple statement of a body, on one line, but for the docstring and what is only handed over."""
    found = []
    for node in ast.walk(function):
        if node is function or not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If | ast.For | ast.With):
            found.append(ast.unparse(node).splitlines()[0])
            continue
        if isinstance(node, ast.Return) and _bare(node.value):
            continue
        text = ast.unparse(node)
        if not UNPACKING.search(text) or not text.endswith(
            ("saved_tensors", "needs_input_grad", "inputs", "output")
        ):
            found.append(text)
    return found


def _bare(value: ast.expr | None) -> bool:
    if value is None or isinstance(value, ast.Name | ast.Constant):
        return True
    return isinstance(value, ast.Tuple) and all(_bare(v) or isinstance(v, ast.Starred) for v in value.elts)


def main() -> int:
    print(f"{'file':28}{'lines':>7}{'statements':>12}{'mathematics':>13}")
    totals = [0, 0, 0]
    texts = []
    for path in sorted(FUNCTIONS.glob("**/*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" or "_execution" in path.parts:
            continue
        if not path.name.startswith("_"):
            texts.append(text)
            lines = [s for f in bodies(ast.parse(text)) for s in statements(f)]
            plain = sum(not PLUMBING.search(line) for line in lines)
            totals = [a + b for a, b in zip(totals, (text.count("\n"), len(lines), plain), strict=True)]
            print(
                f"{path.name:28}{text.count(chr(10)):7}{len(lines):12}{plain:9}{plain / max(len(lines), 1):4.0%}"
            )
    print(f"{'all rules':28}{totals[0]:7}{totals[1]:12}{totals[2]:9}{totals[2] / totals[1]:4.0%}")
    executor = sum(p.read_text(encoding="utf-8").count("\n") for p in (FUNCTIONS / "_execution").glob("*.py"))
    print(f"executor: {executor} lines")
    print(", ".join(f"{word} {sum(t.count(word) for t in texts)}" for word in WORDS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
