"""Results on disk: one JSON object a line, written as each is done, so that a run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xkv.errors import InputError

RESULTS, RUN = "results.jsonl", "run.json"


class Key(NamedTuple):
    """What a line of the results is about."""

    task: str
    length: int
    seed: int
    method: str
    ratio: float | None


class Store:
    """The results in one folder.

    Args:
        folder: Made if it is not there.
        run: What all results of the folder have in common.

    Raises:
        InputError: If the folder cannot be written, or holds results of another run.
    """

    def __init__(self, folder: str, run: dict[str, Any]) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_run(run)
            self._drop_unfinished_line()
            self._file = (self._folder / RESULTS).open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        self._done = {Key(*(line[name] for name in Key._fields)): line for line in self.lines()}

    def _check_run(self, run: dict[str, Any]) -> None:
        path = self._folder / RUN
        if not path.exists():
            path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} is not JSON: name another folder with --out") from None
        differing = sorted(k for k in {*run, *before} if run.get(k) != before.get(k))
        if differing:
            told = ", ".join(f"{k} {before.get(k)} (now {run.get(k)})" for k in differing)
            raise InputError(
                f"{self._folder} holds results of another run: {told}; name another folder with "
                "--out"
            )

    def _drop_unfinished_line(self) -> None:
        """A run that was killed may have left half a line."""
        path = self._folder / RESULTS
        if not path.exists():
            return
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every result."""
        path = self._folder / RESULTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise InputError(
                    f"{path}, line {number} is not JSON: mend it or remove it"
                ) from None

    def results(self) -> list[dict[str, Any]]:
        """The last result of each sample."""
        return list(self._done.values())

    def is_done(self, key: Key, n_answers: int) -> bool:
        """Whether a sample was done before, and of as many questions."""
        result = self._done.get(key)
        return result is not None and len(result.get("answers", range(n_answers))) >= n_answers

    def add(self, key: Key, result: dict[str, Any]) -> None:
        """Write a result to disk.

        Raises:
            InputError: If the disk is full.
        """
        line = {**key._asdict(), **result}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write to {self._folder / RESULTS}: {error.strerror}; what was done "
                "before is kept, and the same command goes on from there"
            ) from error
        self._done[key] = line

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
