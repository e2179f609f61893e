"""Writes files that are complete or do not exist, whatever happens during writing."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from manualprop.training._errors import StorageError

PARTIAL = ".partial"


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that at every moment the old or the new file exists, even after a power failure.

    The data are written beside the target, on the same file system, flushed to disk and renamed. Then the
    directory, which holds the name, is flushed.

    Args:
        path: of the file; its directory is made if it is missing.
        data: the whole content.

    Raises:
        OSError: if it cannot be written; the old file is then unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_and_flush(partial, memoryview(data))
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()
        _flush_directory(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path} must be written. Got {error.strerror or error}; what stood there before is unchanged. Free some "
            "space or choose another disk, then run the command again."
        ) from error


def _write_and_flush(path: Path, data: memoryview) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


def _flush_directory(path: Path) -> None:
    if os.name != "posix":  # other systems cannot open a directory
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that are complete or do not exist: `Trainer(plugins=[WholeCheckpointIO()])`.

    Lightning writes its checkpoints to the temporary directory and moves them. If that is another file
    system, to move is to copy: a full disk or a kill then leaves a truncated checkpoint under its final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; see `write_whole`. Lightning writes to a path that is a remote address."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())
