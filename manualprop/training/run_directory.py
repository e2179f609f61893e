"""One directory per run, `runs/<name>/`: what lies where, who may write to it, and what `--overwrite` removes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from manualprop.training._errors import InputValueError, RunDirectoryError


class RunDirectory:
    """The files of one run.

    Args:
        name: of the run: letters, digits, dot, dash and underscore.
        root: in which the directories of all runs lie.

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
        self.predictions = self.path / "predictions.csv"
        self._lock = FileLock(self.path / ".lock")

    @property
    def exists(self) -> bool:
        """Whether a run has left results here; a run that failed before its first epoch has not."""
        return self.history.exists() or any(self.checkpoints.glob("*"))

    def claim(self, *, overwrite: bool = False, resume: bool = False, resumable: bool = True) -> None:
        """Take the directory for a training run of this process, until it ends.

        Args:
            overwrite: remove the results of an earlier run.
            resume: keep them, to go on from the last checkpoint.
            resumable: whether the caller can resume at all, and the error may advise it.

        Raises:
            FileExistsError: when another process trains there, or results are there and neither flag is given, or
                there is nothing to resume.
        """
        if overwrite and resume:
            raise RunDirectoryError(
                "Give --overwrite or --resume, not both: one removes what the other goes on from."
            )
        self._acquire()
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
        if overwrite:
            self._remove_results()

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunDirectoryError(
                f"{self.path} is in use by another training run. Wait for it, stop it, or give --name for another "
                "directory."
            ) from None

    def release(self) -> None:
        """Give the directory free before the process ends."""
        self._lock.release()

    def _remove_results(self) -> None:
        # Only what a run writes: something of the user's own in the directory stays.
        for file in (self.config, self.history, self.predictions):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.plots):
            shutil.rmtree(folder, ignore_errors=True)
