"""What has been done: the last mark of each exercise, and the hints that were read, beside the learner's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from manualprop._practice._mark import Mark


class Progress:
    """The record of a folder of exercises, in its file `.marks.json`.

    Args:
        folder: of the learner's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / ".marks.json"

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or spoiled: then nothing is known
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, **values: Any) -> None:
        known = self._read()
        known[name] = {**known.get(name, {}), **values}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(known, indent=1), encoding="utf-8")

    def file(self, name: str) -> Path:
        """The learner's file of an exercise."""
        return self.folder / f"{name}.py"

    def mark(self, name: str, mark: Mark) -> None:
        """Note a mark."""
        tried = self.attempted(name) or mark.verdict != "not started"
        self._write(name, verdict=mark.verdict, how=mark.how, source=self._source(name), tried=tried)

    def attempted(self, name: str) -> bool:
        """Whether an attempt has been marked."""
        return bool(self._read().get(name, {}).get("tried"))

    def next_hint(self, name: str) -> int:
        """The number of the hint that is due, from 0 on; the last one stays due."""
        due = min(int(self._read().get(name, {}).get("hints", 0)), 2)
        self._write(name, hints=due + 1)
        return due

    def done(self, name: str) -> bool:
        """Whether the file as it stands was marked right."""
        return self.state(name) == "right"

    def state(self, name: str) -> str:
        """What the list says of an exercise: nothing, started, or its last mark."""
        known = self._read().get(name, {})
        if not self.file(name).exists():
            return ""
        if "verdict" not in known or known["verdict"] == "not started":
            return "started"
        if known["source"] != self._source(name):
            return f"changed since it was marked ({known['verdict']})"
        how = f": {known['how']}" if known["how"] and known["verdict"] in ("wrong", "error") else ""
        return f"{known['verdict']}{how}"

    def _source(self, name: str) -> str:
        try:
            return hashlib.sha256(self.file(name).read_bytes()).hexdigest()
        except OSError:
            return ""
