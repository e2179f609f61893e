"""Graphs compiled ahead of time into packages, which are kept on disk from process to process.

A package is a shared library, made by torch's AOTInductor in about ten seconds and loaded in a few milliseconds.
Its name is a digest of everything that decides its code: the graph itself, so every formula in it, the shapes, the
versions, the processor.  So a package is never out of date: whatever changes gives another name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from manualprop._torch import compiled_ahead, load_program

Program = Callable[[Sequence[Tensor]], list[Tensor]]
Whole = Callable[[GraphModule, Sequence[Tensor]], tuple[GraphModule, Sequence[Tensor]]]

MOST = 64  # packages kept, of about 2 MB each; the least recently used goes first
FOLDER = "MANUALPROP_PROGRAMS"  # the environment variable that names another folder
SUFFIX = ".pt2"
PART = ".part"  # of a package that is being written, or was when its process was killed
HOUR = 3600.0
# Where torch looks for the folder for temporary files, in this order.
TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


def folder() -> Path:
    """Where packages are kept.

    Raises:
        RuntimeError: for a user without a home.
    """
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "manualprop" / "programs"
    except RuntimeError:
        raise RuntimeError(
            "Backprop: a program is kept in a folder, by default in the user's home. Got no home; name a folder in the "
            f"environment variable {FOLDER}."
        ) from None


def packages() -> list[Path]:
    """The packages on disk, the most recently used first."""
    return sorted(folder().glob(f"*{SUFFIX}"), key=last_used, reverse=True)


def clear() -> int:
    """Delete all packages, and what killed processes left; return how many packages there were.

    Raises:
        OSError: for a folder that cannot be written.
    """
    found = packages()
    for path in [*found, *folder().glob(f".*{PART}")]:
        path.unlink(missing_ok=True)
    return len(found)


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++", "c++"]))


def is_kept(graph: GraphModule) -> bool:
    """Whether the package made from a graph is on disk."""
    return os.path.exists(_path(graph))  # False for a folder that cannot be read


def compiled_program(graph: GraphModule, inputs: Sequence[Tensor], whole: Whole | None = None) -> Program:
    """A graph as a program: loaded from disk, or compiled and kept there.

    Args:
        graph: the graph, of functional operations and of writes to its inputs.
        inputs: examples of its inputs.
        whole: makes from these the graph that is compiled, and its inputs; by default they are compiled as they are.

    Raises:
        RuntimeError: without a C++ compiler, or if it fails.
    """
    _require_temporary_folder()
    path = _path(graph)
    found = _load(path)
    if found is None:
        found = _compile(*(whole(graph, inputs) if whole else (graph, inputs)), path)
    return found


def _require_temporary_folder() -> None:
    """Raise without the folder into which torch unpacks a program.  Python's tempfile takes another one instead."""
    given = next(((name, os.environ[name]) for name in TEMPORARY if os.environ.get(name)), None)
    if given is not None and not os.access(given[1], os.W_OK | os.X_OK):
        raise RuntimeError(
            "Backprop: a program is unpacked in the folder for temporary files, which must exist and be writable. Got "
            f"{given[0]}={given[1]}; name another, or use compile=False."
        )


def _load(path: Path) -> Program | None:
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as package:
            if package.testzip() is not None:  # torch would run damaged code
                raise zipfile.BadZipFile
        found = load_program(path)
    except (OSError, zipfile.BadZipFile):  # damaged, or just removed by another process
        with contextlib.suppress(OSError):  # another user's: it stays
            path.unlink()
        return None
    except RuntimeError:  # another kind of file, or no place to unpack it: what is compiled now replaces it
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def _compile(graph: GraphModule, inputs: Sequence[Tensor], path: Path) -> Program:
    if not has_compiler():
        raise RuntimeError(
            "Backprop: a program is compiled by a C++ compiler, which must be on the PATH. Got none; install g++ or "
            "clang++, name one in the environment variable CXX, or use compile=False."
        )
    with tempfile.TemporaryDirectory(prefix="manualprop-") as own:
        try:
            made = compiled_ahead(graph, inputs, Path(own) / f"program{SUFFIX}")
        except Exception as error:  # of a compiler, and of torch's: whatever it raises
            raise RuntimeError(
                f"Backprop: the C++ compiler must be able to compile the program. It failed: {_first_line(error)} "
                "Name another in the environment variable CXX, or use compile=False."
            ) from error
        _keep(made, path)
        return load_program(made)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."


def _keep(made: Path, path: Path) -> None:
    """Copy a package into the folder.  Another process sees all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=PART, delete=False) as whole:
            part = Path(whole.name)
            try:
                whole.write(made.read_bytes())
                whole.flush()
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        left = [part for part in path.parent.glob(f".*{PART}") if time.time() - last_used(part) > HOUR]
        for old in [*packages()[MOST:], *left]:
            old.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"Backprop: the compiled program could not be kept in {path.parent}: {error.strerror or error}. The next "
            f"process compiles it again; the environment variable {FOLDER} names another folder.",
            stacklevel=2,
        )


def last_used(package: Path) -> float:
    """When a package was last used, in seconds since 1970."""
    try:
        return package.stat().st_mtime
    except OSError:  # another process has just removed it
        return 0.0


# ----- the name of a package -----


def _path(graph: GraphModule) -> Path:
    digest = hashlib.sha256("\n".join([*_surroundings(), *_text(graph)]).encode()).hexdigest()
    return folder() / f"{digest[:32]}{SUFFIX}"


def _text(graph: GraphModule) -> Iterator[str]:
    """All that is in a graph: its operations with their arguments, the shapes, the graphs within."""
    for node in graph.graph.nodes:
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {_shape(node.meta.get('val'))}"
    for name, inner in graph.named_children():
        yield name
        yield from _text(inner)  # type: ignore[arg-type]


def _shape(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "; ".join(map(_shape, value))
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"


def _surroundings() -> list[str]:
    """What else decides the code of a program."""
    versions = torch.__version__, str(torch.version.git_version)
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("TORCHINDUCTOR_"))
    return [*versions, *settings, str(torch.get_num_threads()), *_machine(), *_makers()]


@functools.cache
def _makers() -> tuple[str, ...]:
    """The files that make of a step what is compiled."""
    home = Path(__file__).parent
    return tuple(path.read_text(encoding="utf-8") for path in (home / "_scan.py", home.parent / "_torch.py"))


@functools.cache
def _machine() -> tuple[str, ...]:
    """The system and the processor: the code uses all its instructions."""
    known = platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return *known, platform.processor()
    return *known, *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
