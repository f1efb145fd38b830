"""Conversations on disk: what there is room for."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from tests.mlx_metal.kept_rows import (
    Kept,
    bytes_of,
    files_of,
    tokens_of,
)
from xkv.backends.mlx_metal.server import disk_folder, disk_form
from xkv.backends.mlx_metal.server.disk_folder import CONVERSATION

ROWS = 16
A, B, C, D, E = (tokens_of(number) for number in range(5))


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_form, "BLOCK_ROWS", ROWS)


def size_of(tmp_path: Path, *conversations: list[int]) -> int:
    """Bytes that conversations take on disk."""
    kept = Kept(tmp_path / "measured")
    for tokens in conversations:
        kept.take(tokens)
    size = kept.disk["held_bytes"]
    kept.close()
    return size


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]


def test_bytes_are_under_the_cap_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = size_of(tmp_path, A, B) + 100
    folder, sizes = tmp_path / "kept", []

    def fsync(handle: int) -> None:
        sizes.append(bytes_of(folder))

    monkeypatch.setattr(disk_folder.os, "fsync", fsync)
    kept = Kept(folder, limit)
    conversations = [A, B, C, [*C, 1, 2], D, [*A, 3], [*A[:16], *B[:16]], [*A, 3, *D[:5]]]
    for tokens in conversations:
        kept.take(tokens)
        assert kept.disk["held_bytes"] == bytes_of(folder)
    assert len(sizes) > len(conversations)
    assert limit / 2 < max(sizes) <= limit
    kept.close()
    # a lower cap holds from the start
    kept = Kept(folder, limit * 3 // 4)
    assert 0 < bytes_of(folder) <= limit * 3 // 4
    kept.close()


def test_blocks_of_what_is_deleted_for_a_conversation_stay_if_it_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = size_of(tmp_path, [*A, *B], C) + 100
    folder, sizes = tmp_path / "kept", []
    kept = Kept(folder, limit)
    kept.take([*A, *B])
    kept.take(C)
    kept.disk  # noqa: B018
    monkeypatch.setattr(disk_folder.os, "fsync", lambda handle: sizes.append(bytes_of(folder)))
    # goes in the place of both, as it is longer
    kept.take([*A, *D, *E[:10]])
    assert kept.disk["conversations"] == 1
    assert max(sizes) <= limit
    kept.close()


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    limit = size_of(tmp_path, A, B, C) + 100
    folder = tmp_path / "kept"
    kept = Kept(folder, limit)
    for number, tokens in enumerate((A, B, C)):
        kept.take(tokens)
        kept.disk  # noqa: B018
        (made,) = [x for x in files_of(folder, CONVERSATION) if x.stat().st_mtime > 10]
        # clocks of file systems are coarse
        os.utime(made, (number, number))
    kept.close()
    kept = Kept(folder, limit)
    assert kept.cached([*A, 1]) == len(A)
    kept.take(D)
    assert kept.disk["conversations"] == 3
    kept.close()
    # what was used is known after a restart
    kept = Kept(folder, limit)
    kept.take(E)
    kept.close()
    kept = Kept(folder, limit)
    assert [kept.cached([*x, 99]) for x in (A, B, C, D, E)] == [40, 0, 0, 40, 40]
    kept.close()


def test_what_is_larger_than_the_cap_is_not_written_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    kept = Kept(folder, size_of(tmp_path, A) + 100)
    kept.take(A)
    for tokens in ([*B, *C], [*C, *D]):
        kept.take(tokens)
        assert kept.disk["conversations"] == 1
    assert kept.cached([*B, *C, 1]) == len(B) + len(C)
    (text,) = warnings(caplog)
    assert "is not written, as --prompt-cache-disk-bytes allows 0.0 MB" in text
    kept.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_a_disk_that_takes_no_more_is_told_once(
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    kept = Kept(tmp_path)
    kept.take(A)
    before = kept.disk["held_bytes"]
    with monkeypatch.context() as patched:
        patched.setattr(disk_folder.os, "fsync", full)
        for tokens in (B, C):
            kept.take(tokens)
            assert kept.disk["held_bytes"] == before == bytes_of(tmp_path)
    (text,) = warnings(caplog)
    assert f"cannot write {tmp_path}" in text and os.strerror(number) in text
    # served from memory meanwhile, and written again as soon as that works
    assert kept.cached([*B, 1]) == len(B)
    kept.take(D)
    assert kept.disk["conversations"] == 2
    monkeypatch.setattr(disk_folder.os, "fsync", full)
    kept.take(E)
    kept.close()
    assert len(warnings(caplog)) == 2


def test_what_could_not_be_written_completely_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, fsync, n_calls = Kept(tmp_path), os.fsync, iter(range(99))

    def full_in_the_end(handle: int) -> None:
        if next(n_calls) == 3:
            raise OSError(errno.ENOSPC, "full")
        fsync(handle)

    monkeypatch.setattr(disk_folder.os, "fsync", full_in_the_end)
    kept.take([*A, *B])
    assert kept.disk["held_bytes"] == bytes_of(tmp_path) == 0
    kept.close()
