"""What calibration has summed so far, in files: a process may end at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class Moments:
    """Sums of outer products of rows by group, keys and values, and of squared gradients by layer.

    They are kept in a folder, one file each, so that one is in memory at a time and what was summed
    is not lost with the process.

    Args:
        folder: Made for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log, self._next_log = folder / "done.json", folder / "done.next.json"
        self.done: dict[str, Any] = {"pieces": 0, "rows": 0, "gradient_rows": 0}
        if self._next_log.is_file():
            # the process ended while a piece was being committed
            self._finish()
        for path in folder.glob("*.next.npy"):
            path.unlink()
        if self._log.is_file():
            self.done = json.loads(self._log.read_text())

    def add(self, name: str, matrix: np.ndarray) -> None:
        """Add to one sum, in a file that takes the place of the old one when the piece is done."""
        path = self.folder / f"{name}.npy"
        total = np.load(path) + matrix if path.is_file() else matrix
        np.save(self.folder / f"{name}.next.npy", total)

    def commit(self, **counts: int) -> None:
        """A piece is done: wholly, or not at all, whenever the process ends."""
        for name, count in counts.items():
            self.done[name] += count
        written = self.folder / "done.writing"
        written.write_text(json.dumps(self.done))
        written.replace(self._next_log)
        self._finish()

    def _finish(self) -> None:
        for path in self.folder.glob("*.next.npy"):
            path.replace(self.folder / path.name.replace(".next", ""))
        self._next_log.replace(self._log)

    def load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")
