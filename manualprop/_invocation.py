"""How the user called us, so that a printed command can be pasted and a printed path opened where they stand."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

# Set by scripts/run.py, which runs its commands in the repository, wherever it was called from.
COMMAND, FOLDER = "MANUALPROP_COMMAND", "MANUALPROP_CALLED_FROM"


def console_command() -> str:
    """Return what to type for the console command: ``manualprop`` where the shell finds the one of this environment."""
    given = os.environ.get(COMMAND)
    if given:
        return given
    found = shutil.which("manualprop")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "manualprop"
    return f"{shlex.quote(sys.executable)} -m manualprop"


def shown(path: Path) -> str:
    """Return a path for printing: as it is, or whole if the user stands in another folder than this process.

    Args:
        path: relative to the folder of this process, or whole.
    """
    folder = os.environ.get(FOLDER)
    return str(path if folder is None or Path(folder) == Path.cwd() else path.absolute())
