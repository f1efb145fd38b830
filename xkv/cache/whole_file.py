"""Files that are written wholly or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xkv.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path, min_bytes: int, errors: tuple[type[Exception], ...]) -> Iterator[str]:
    """The name of a file beside ``path`` that takes its place if the block ends well.

    Args:
        path: An older file there survives a failure.
        min_bytes: Size of a complete one: a full disk may end a write without an error of its own.
        errors: What writing raises besides ``OSError``.

    Raises:
        InputError: If the file cannot be written, with the reason.
    """
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield beside
        if os.path.getsize(beside) < min_bytes:
            raise OSError(28, "the disk is full")
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except failures as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot write {path}: {reason}; nothing was changed") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
