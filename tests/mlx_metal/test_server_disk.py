"""Conversations on disk: what is written, found, shared and deleted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.mlx_metal.kept_rows import (
    ROW_BYTES,
    Kept,
    Plain,
    bytes_of,
    files_of,
    tokens_of,
)
from xkv.backends.mlx_metal.server import disk_form
from xkv.backends.mlx_metal.server.disk_folder import BLOCK, CONVERSATION, Folder
from xkv.errors import InputError

ROWS = 16
A, B, C, D, E = (tokens_of(number) for number in range(5))


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_form, "BLOCK_ROWS", ROWS)


def test_conversations_are_found_after_a_restart(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "a" / "b")
    kept.take(A)
    kept.take(B)
    kept.close()
    kept = Kept(tmp_path / "a" / "b")
    assert kept.report()["sequences"] == 0
    # read when it is asked for, and from then on in memory
    assert kept.cached([*A, 1, 2, 3]) == len(A)
    assert kept.report()["sequences"] == 1 and kept.disk["hits"] == 1
    assert kept.cached([*A, 5]) == len(A)
    assert kept.disk["hits"] == 1
    # the last token is computed again; an edited conversation keeps its beginning
    assert kept.cached(B) == len(B) - 1
    assert kept.cached([*B[:21], 98, 99]) == 21
    assert kept.cached(C) == 0
    disk = kept.disk
    assert disk["conversations"] == 2 and disk["written_bytes"] == 0
    assert disk["held_bytes"] == bytes_of(tmp_path / "a" / "b")
    kept.close()


def test_the_longer_beginning_of_memory_and_disk_wins(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.take([*A, *B])
    kept.close()
    kept = Kept(tmp_path)
    kept.take([*A, *C])
    assert kept.cached([*A, *C, 1]) == len(A) + len(C)
    assert kept.disk["hits"] == 0
    assert kept.cached([*A, *B, 1]) == len(A) + len(B)
    assert kept.disk["hits"] == 1
    kept.close()


def test_few_tokens_in_common_are_not_worth_reading_a_long_conversation(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    long, short = [*A[:3], *tokens_of(5, 97)], [*A[:3], *B]
    kept.take(long)
    kept.close()
    kept = Kept(tmp_path)
    assert kept.cached([*A[:3], *C]) == 0
    assert kept.cached([*long[:4], *C]) == 4
    kept.close()
    kept = Kept(tmp_path)
    kept.take([*A[:3], *tokens_of(6, 80)])
    kept.take(short)
    kept.trim_to(n_sequences=0)
    # of two that serve as well, the one that is read faster
    assert kept.cached([*A[:3], *C]) == 3
    assert kept.report()["tokens"] == len(short)
    kept.close()


def test_what_leaves_memory_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Folder.write

    def slowly(*args: Any) -> None:
        time.sleep(0.1)
        write(*args)

    monkeypatch.setattr(Folder, "write", slowly)
    kept = Kept(tmp_path, size=1)
    kept.take(A)
    kept.take(B)
    # the writer has no hand in A, whose memory counts as free
    assert len(files_of(tmp_path, CONVERSATION)) == 1
    assert kept.cached([*A, 1]) == len(A)
    kept.close()
    assert len(files_of(tmp_path, CONVERSATION)) == 2


def test_beginnings_that_conversations_share_are_stored_once(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.take([*A, *B])
    written = kept.disk["written_bytes"]
    blocks = files_of(tmp_path, BLOCK)
    kept.take([*A, *C])
    assert kept.disk["conversations"] == 2
    added = files_of(tmp_path, BLOCK) - blocks
    # 40 tokens in common are two blocks
    n_blocks = -(-(len(A) + len(C)) // ROWS)
    assert len(added) == n_blocks - 2
    rows = ROW_BYTES * (len(A) + len(C) - 2 * ROWS)
    assert rows < kept.disk["written_bytes"] - written < rows + 2500
    kept.close()


def test_a_conversation_that_grew_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.take(A)
    assert kept.disk["conversations"] == 1
    blocks = {x: x.stat().st_ino for x in files_of(tmp_path, BLOCK)}
    kept.take([*A, *B])
    assert kept.disk["conversations"] == 1
    left = [x for x, inode in blocks.items() if x.exists() and x.stat().st_ino == inode]
    # full blocks stay as they are, and the one that was not full is gone
    assert len(left) == len(A) // ROWS < len(blocks)
    written = kept.disk["written_bytes"]
    # what a longer one serves needs no writing
    kept.take(A)
    assert kept.disk["written_bytes"] == written and kept.disk["conversations"] == 1
    kept.close()
    kept = Kept(tmp_path)
    assert kept.cached([*A, *B, 1]) == len(A) + len(B)
    kept.close()


def test_other_models_and_options_find_nothing_and_delete_nothing(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.take(A)
    kept.close()
    for other in (Plain(2.0), Kept):
        kept = Kept(tmp_path, model=other if isinstance(other, Plain) else None)
        kept._options = [4] if other is Kept else []
        assert kept.cached([*A, 1]) == 0
        kept.take(B)
        kept.close()
    kept = Kept(tmp_path)
    assert kept.cached([*A, 1]) == len(A)
    assert kept.cached([*B, 1]) == 0
    assert kept.disk["conversations"] == 3
    # a server that has loaded another model by now
    kept.model = Plain(3.0)
    assert kept.fetch_nearest_cache("another", [*A, 1]) == (None, [*A, 1])
    kept.close()


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with pytest.raises(InputError, match="another process uses it"):
        Kept(tmp_path)
    kept.close()
    Kept(tmp_path).close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot use --prompt-cache-dir .*file"):
        Kept(tmp_path / "file")
