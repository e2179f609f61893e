"""A project's settings for all its checks: ``[tool.manualprop.verify]`` in pyproject.toml, and a baseline file."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from manualprop.verify._report import Report
from manualprop.verify._verdicts import KNOWN, members
from manualprop.verify.probes import load


class BadSettings(ValueError):
    """A settings file cannot be understood.  The text is one line for the user."""


class Settings(NamedTuple):
    """The table in pyproject.toml.

    Attributes:
        accept: qualified name of a Function, a module class or a function -> probe or group -> reason.
        baseline: path of a baseline file, or None.
        level: of checks by the command and by the interception, or None.
    """

    accept: Mapping[str, Mapping[str, str]] = {}
    baseline: Path | None = None
    level: str | None = None

    def accepted(self, fn: Callable[..., Any], name: str = "") -> dict[str, str]:
        """What is accepted for a callable, by its qualified name or the name of its case."""
        return {**self.accept.get(name, {}), **self.accept.get(qualified_name(fn), {})}


def qualified_name(fn: Callable[..., Any]) -> str:
    """``package.module.Name``: of the Function for its ``apply``, of a module's class, of any other callable."""
    owner = getattr(fn, "__self__", None)
    thing: Any = fn
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        thing = owner
    elif isinstance(fn, torch.nn.Module):
        thing = type(fn)
    elif isinstance(fn, functools.partial):
        return qualified_name(fn.func)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{getattr(thing, '__module__', '')}.{name}"


def project_settings(start: Path | None = None) -> Settings:
    """The settings in the nearest pyproject.toml: in ``start`` (by default the working directory) or above it."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            return _read(file)
    return Settings()


def _read(file: Path) -> Settings:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except tomllib.TOMLDecodeError as error:
        raise BadSettings(f"{file} is not TOML: {error}") from None
    table = table.get("manualprop", {}).get("verify", {})
    unknown = set(table) - {"accept", "baseline", "level"}
    if unknown:
        raise BadSettings(
            f"{file}: [tool.manualprop.verify] has accept, baseline and level. Got {', '.join(sorted(unknown))}."
        )
    accept = table.get("accept", {})
    for name, reasons in accept.items():
        if not isinstance(reasons, dict) or not all(
            isinstance(r, str) and r.strip() for r in reasons.values()
        ):
            raise BadSettings(
                f"{file}: accept.{name!r} must give a reason for each probe, as in "
                f'[tool.manualprop.verify.accept."{name}"] second_order = "why". Got {reasons!r}.'
            )
        try:
            members(reasons, list(load()), f"accept.{name!r}")
        except ValueError as error:
            raise BadSettings(f"{file}: {str(error).removeprefix('check: ')}") from None
    baseline = table.get("baseline")
    return Settings(accept, None if baseline is None else file.parent / baseline, table.get("level"))


# ----- the baseline: the findings known at the start -----


def _entry(name: str) -> str:
    """The name in the file: the command writes ``ops:Swish``, the interception ``ops.Swish``; both mean the same."""
    return name.replace(":", ".")


def read_baseline(path: Path) -> dict[str, dict[str, str]]:
    """Name -> probe -> evidence, for each known finding."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {_entry(name): dict(found) for name, found in content["findings"].items()}
    except FileNotFoundError:
        raise BadSettings(f"there is no baseline {path}: --update-baseline writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadSettings(f"{path} is not a baseline: --update-baseline writes one") from None


def write_baseline(path: Path, reports: Iterable[tuple[str, Report]]) -> int:
    """Add what these reports found, remove what they no longer find, and return the number of findings."""
    known = read_baseline(path) if path.is_file() else {}
    for name, report in reports:
        found = {
            o.probe: o.evidence
            for o in report
            if o.verdict == "finding" or (o.verdict == "accepted" and o.evidence.startswith(KNOWN))
        }
        seen = {o.probe for o in report}
        kept = {probe: text for probe, text in known.pop(_entry(name), {}).items() if probe not in seen}
        if found or kept:
            known[_entry(name)] = {**kept, **found}
    content = {"findings": {name: dict(sorted(found.items())) for name, found in sorted(known.items())}}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(len(found) for found in known.values())


def known_findings(
    baseline: Mapping[str, Mapping[str, str]], name: str, probes: Iterable[str]
) -> dict[str, str]:
    """What to accept for a name because the baseline lists it."""
    names = set(probes)
    return {probe: KNOWN for probe in baseline.get(_entry(name), {}) if probe in names}
