"""Callbacks of a training run: history, checkpoints, a progress bar."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from manualprop.training._files import write_whole
from manualprop.training.run_directory import RunDirectory

Row = dict[str, float]


class History(Callback):
    """Write one row per epoch to a CSV file, and keep the rows in the checkpoint.

    A resumed run starts from the rows of its checkpoint. So the file does not lose or double an epoch, even
    if the interrupted run had written more rows than its last checkpoint holds.

    Args:
        path: the CSV file; None keeps the rows only in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.trained = False
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock at the time of the last row."""
        self.trained = True
        self._start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row. Callbacks that save checkpoints run later, so the checkpoint holds the row."""
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row: Row = {
            "epoch": trainer.current_epoch + 1,
            "update": trainer.global_step,
            "seconds": round(time.perf_counter() - self._start, 4),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        if self.rows and self.rows[-1]["epoch"] == row["epoch"]:
            self.rows.pop()  # the first part of an epoch that max_steps stopped
        self.rows.append(row | dict(sorted(metrics.items())))
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.path is not None and self.rows and trainer.is_global_zero:
            write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]


class RecordRun(Callback):
    """Write the configuration of a run after its first update, and keep it in the checkpoint.

    Until then the run's directory does not change: a refused run leaves no trace. If a resumed run changes
    settings, the configuration begins with a line for each change, which says from which update on.

    Args:
        run: the run's directory.
        settings: every key of the configuration and its value.
        text: the text of the configuration.
    """

    def __init__(self, run: RunDirectory, settings: dict[str, str], text: str) -> None:
        self.run, self.settings, self.text = run, settings, text
        self.changes: list[str] = []
        self._before: dict[str, str] = settings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which settings have changed."""
        keys = dict.fromkeys([*self._before, *self.settings])
        changed = [
            f"{key} {self._before.get(key, 'absent')} -> {self.settings.get(key, 'absent')}"
            for key in keys
            if self._before.get(key) != self.settings.get(key)
        ]
        self.changes += [f"from update {trainer.global_step} on: {change}" for change in changed]
        self._before = self.settings
        if changed:
            cast(Any, pl_module).changes = changed  # the module logs them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin the run, once."""
        if self.run.began or not trainer.is_global_zero:
            return
        self.run.begin()
        lines = [f"# {change}\n" for change in self.changes]
        write_whole(self.run.config, "".join([*lines, self.text]).encode())

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, and the changes since the run began."""
        return {"settings": self.settings, "changes": list(self.changes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the settings of the checkpoint."""
        self._before, self.changes = state_dict["settings"], list(state_dict["changes"])


def write_csv(path: Path, rows: list[Row] | list[dict[str, Any]]) -> None:
    """Write rows to a CSV file that is complete at every moment.

    Args:
        path: the file.
        rows: the rows; some may lack some keys.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue().encode())


def checkpoint_callbacks(run: RunDirectory, monitor: str | None) -> list[ModelCheckpoint]:
    """Return the callbacks that keep the last and the best checkpoint of a run.

    There are two, because one ModelCheckpoint with `save_last` writes the last only when it also writes the
    best. "Last" comes first: Lightning takes the first for `trainer.checkpoint_callback`.

    Args:
        run: the run's directory.
        monitor: the logged value whose minimum marks the best; None keeps only the last.
    """
    always: dict[str, Any] = {
        "dirpath": run.checkpoints,
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    last = ModelCheckpoint(filename="last", **always)
    best = ModelCheckpoint(filename="best", monitor=monitor, mode="min", **always)
    return [last, best] if monitor else [last]


class _Clipped(TextColumn):
    """A column that becomes shorter in a narrow terminal, so that the others, such as the time, have room."""

    def render(self, task: Task) -> Text:
        """Return the text; if it does not fit it ends in dots."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class TrainingProgress(ProgressBar):
    """One bar for the whole training run: with many short epochs, a bar per epoch would only flicker.

    Args:
        title: the text at the left of the bar.
        console: where to draw; standard error by default.
    """

    def __init__(self, title: str = "training", console: Console | None = None) -> None:
        super().__init__()
        self.title = title
        self._enabled = True
        self._task: TaskID | None = None
        self._progress = Progress(
            _Clipped("{task.description}", table_column=Column(ratio=1)),
            BarColumn(bar_width=6),
            _Clipped("{task.fields[state]}"),
            TimeRemainingColumn(
                compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)
            ),
            console=console or Console(stderr=True),
            expand=True,
        )

    def disable(self) -> None:
        """Draw nothing (Lightning calls this on all processes except the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Draw."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if self._enabled:
            self._task = self._progress.add_task(self.title, total=1.0, state="")
            self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar on."""
        if self._task is not None:
            done = _share_done(trainer, batch_idx)
            self._progress.update(self._task, completed=done, state=_state(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the metrics of the epoch."""
        if self._task is not None:
            self._progress.update(self._task, state=_state(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is, so that the next printed text has its own line."""
        self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._task = None


def _share_done(trainer: Trainer, batch_idx: int) -> float:
    epochs = trainer.current_epoch + (batch_idx + 1) / max(1.0, trainer.num_training_batches)
    by_epochs = epochs / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
    by_updates = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    return min(1.0, max(by_epochs, by_updates))


def _state(trainer: Trainer, pl_module: LightningModule) -> str:
    limit = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    text = f"epoch {trainer.current_epoch + 1}{limit}, {trainer.global_step} updates"
    known = trainer.callback_metrics
    loss = known["train_loss"].item() if "train_loss" in known else getattr(pl_module, "last_loss", None)
    text += f", loss {loss:.3f}" if loss is not None else ""
    return text + (f", val. {100 * known['val_accuracy'].item():.1f} %" if "val_accuracy" in known else "")
