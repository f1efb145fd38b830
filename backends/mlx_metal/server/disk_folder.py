"""Files named by a checksum of their contents, in a folder of one process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xkv.cache.whole_file import whole_file
from xkv.errors import InputError

BLOCK, CONVERSATION = ".xkvblock", ".xkvconversation"
"""What the names end with; other files in the folder are none of ours."""

_OURS = re.compile(rf"(?P<code>.*)({re.escape(BLOCK)}|{re.escape(CONVERSATION)})")
_CODE = re.compile(r"[0-9a-f]{64}")


class Folder:
    """A folder's files, and how many bytes they take.

    Args:
        path: Of the folder; it is made if there is none, for its owner alone.

    Raises:
        InputError: If there can be none, or another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"cannot use --prompt-cache-dir {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.sizes = {x.name: x.stat().st_size for x in path.iterdir() if _OURS.match(x.name)}
        except OSError as error:
            os.close(self._handle)
            if isinstance(error, BlockingIOError):
                text = "another process uses it; give each server a folder of its own"
            else:
                text = f"{error.strerror}"
            raise InputError(f"cannot use --prompt-cache-dir {path}: {text}") from error

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._handle)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(list(self.sizes.values()))

    def left_over(self) -> list[str]:
        """Files that were being written when a process was killed."""
        return [x for x in self.sizes if (m := _OURS.match(x)) and not _CODE.fullmatch(m["code"])]

    def write(self, name: str, parts: Iterable[Any], size: int) -> None:
        """Write a file wholly or not at all.

        Raises:
            InputError: If it cannot be written.
        """
        with whole_file(self.path / name, size, ()) as beside, open(beside, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        self.sizes[name] = size

    def read(self, name: str) -> bytes:
        """What was written.

        Raises:
            InputError: If that is not what is there.
        """
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror})") from error
        if checksum([content]) != name.partition(".")[0]:
            raise InputError(f"{name} is not what was written")
        return content

    def is_whole(self, name: str) -> bool:
        """Whether a file is as it was written."""
        with contextlib.suppress(InputError):
            self.read(name)
            return True
        return False

    def remove(self, name: str) -> None:
        """Delete a file; one that cannot be deleted counts on."""
        with contextlib.suppress(OSError):
            (self.path / name).unlink(missing_ok=True)
            self.sizes.pop(name, None)

    def used(self, name: str) -> float:
        """When a file was last used."""
        try:
            return (self.path / name).stat().st_mtime_ns
        except OSError:
            return 0

    def use(self, name: str) -> None:
        """Note that a file is used."""
        with contextlib.suppress(OSError):
            os.utime(self.path / name)


def checksum(parts: Iterable[Any]) -> str:
    """A file's name without its end."""
    code = hashlib.sha256()
    for part in parts:
        code.update(part)
    return code.hexdigest()
