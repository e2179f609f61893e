"""Say how a gradient is wrong."""

from __future__ import annotations

from typing import Any


def explain(s: Any, comparisons: Any) -> tuple[str, str, dict[str, Any]]:
    names = [s.names[c.point] for c in comparisons if c.wrong.any()]
    return f"wrong for {', '.join(names)}", "no simple explanation", {}
