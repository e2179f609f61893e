"""One directory per run, `runs/<name>/`: its files, who may write to it, and what `--overwrite` removes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from manualprop.training._errors import InputValueError, RunDirectoryError, UnwritableError
from manualprop.training._files import PARTIAL


class RunDirectory:
    """The files of one run.

    `claim` takes it for a command. `begin` is called when training has begun: until then nothing in it is
    changed, and `release` removes what has been added.

    Args:
        name: the name of the run: letters, digits, dot, dash and underscore.
        root: the directory that contains the directories of all runs.

    Attributes:
        began: whether training has begun; the content then belongs to the run.

    Raises:
        ValueError: for a name that is not a plain directory name.
    """

    def __init__(self, name: str, root: Path = Path("runs")) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise InputValueError(
                "name must be a plain directory name of letters, digits, dot, dash and underscore. Got "
                f"name={name!r}; try {re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'run'!r}."
            )
        self.name, self.path = name, root / name
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.csv"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / "best.ckpt"
        self.last = self.checkpoints / "last.ckpt"
        self.plots = self.path / "plots"
        self.logs = self.path / "lightning_logs"
        self.predictions = self.path / "predictions.csv"
        self.began = False
        self._lock = FileLock(self.path / ".lock")
        self._before: set[Path] | None = None
        self._overwrite = False

    @property
    def exists(self) -> bool:
        """Whether a run has left results here; a run that failed before its first epoch has not."""
        return self.history.exists() or any(self.checkpoints.glob("*.ckpt"))

    def claim(self, *, overwrite: bool = False, resume: bool = False, resumable: bool = True) -> None:
        """Take the directory for a training run of this process, until `release` or until the process ends.

        Args:
            overwrite: remove the results of an earlier run when this one begins.
            resume: keep them, to continue from the last checkpoint.
            resumable: whether the caller can resume, so that the error may advise it.

        Raises:
            OSError: if the directory cannot be written to, if another process trains there, if it has results
                and neither flag is given, or if there is nothing to resume.
        """
        if overwrite and resume:
            raise RunDirectoryError(
                "Give --overwrite or --resume, not both: one removes what the other goes on from."
            )
        self._acquire()
        try:
            self._check(overwrite, resume, resumable)
        except RunDirectoryError:
            self.release()
            raise
        self._overwrite = overwrite

    def _check(self, overwrite: bool, resume: bool, resumable: bool) -> None:
        if resume and not self.last.exists():
            raise RunDirectoryError(
                f"{self.path} must hold a checkpoint to resume from. {self.last} does not exist; start the run without "
                "--resume."
            )
        if self.exists and not (overwrite or resume):
            going_on = "--resume to go on with it, " if resumable else ""
            raise RunDirectoryError(
                f"{self.path} holds the results of an earlier run. Give {going_on}--overwrite to replace it, or "
                "--name for another directory."
            )

    def _acquire(self) -> None:
        before = self._contents()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"{self.path} is in use by another training run. Wait for it, stop it, or give --name for another "
                "directory."
            ) from None
        except OSError as error:
            _remove(self._contents() - before)
            raise UnwritableError(
                f"{self.path} must be a directory that can be written to. Got {error.strerror or error}: "
                f"{error.filename or self.path}; run the command where it can be, or change the permissions."
            ) from error
        self._before = before

    def _contents(self) -> set[Path]:
        parents = {path for path in (self.path.parent, self.path) if path.exists()}
        return parents | set(self.path.rglob("*"))

    def begin(self) -> None:
        """Start the run: remove what `--overwrite` replaces, and half-written files of a killed run."""
        if self.began:
            return
        self.began = True
        before = self._before or set()
        _remove(path for path in before if path.name.endswith(PARTIAL) and path.name.startswith("."))
        if self._overwrite:
            # Only what a run writes: the user's own files in the directory stay.
            files = (self.config, self.history, self.predictions)
            folders = (self.checkpoints, self.plots, self.logs)
            _remove(p for p in before if p in files or any(f == p or f in p.parents for f in folders))

    def release(self) -> None:
        """Release the directory before the process ends; if the run never began, restore it."""
        if self._before is not None and not self.began:
            _remove(self._contents() - self._before)
        self._before = None
        self._lock.release()


def _remove(paths: Iterable[Path]) -> None:
    """Remove files, and directories that are then empty."""
    for path in sorted(paths, reverse=True):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
