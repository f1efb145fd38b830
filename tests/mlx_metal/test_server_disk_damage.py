"""What becomes of files that are not as they were written, and of a process that is killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mlx_metal.kept_rows import Kept, bytes_of, files_of, tokens_of
from xkv.backends.mlx_metal.server import disk_form
from xkv.backends.mlx_metal.server.disk_folder import BLOCK, CONVERSATION, checksum

ROWS = 16
A, B, C = (tokens_of(number) for number in range(3))


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_form, "BLOCK_ROWS", ROWS)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill(path: Path) -> None:
    path.write_bytes(b"\x00{garbage" * 5)


def rename(path: Path, change: Callable[[dict], None]) -> None:
    """Other contents under the name that they have to have."""
    about = json.loads(path.read_text())
    change(about)
    text = json.dumps(about).encode()
    path.unlink()
    path.with_name(checksum([text]) + CONVERSATION).write_bytes(text)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated block": (BLOCK, truncate),
    "block with a flipped bit": (BLOCK, flip),
    "missing block": (BLOCK, Path.unlink),
    "empty block": (BLOCK, lambda path: os.truncate(path, 0)),
    "truncated conversation": (CONVERSATION, truncate),
    "conversation with a flipped bit": (CONVERSATION, flip),
    "garbage for a conversation": (CONVERSATION, fill),
}
"""Other contents than their names say."""
FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "other format": (CONVERSATION, lambda path: rename(path, lambda x: x.update(format=0))),
    "no format": (CONVERSATION, lambda path: rename(path, lambda x: x.pop("format"))),
    "no form": (CONVERSATION, lambda path: rename(path, lambda x: x.pop("form"))),
    "unknown kind": (
        CONVERSATION,
        lambda path: rename(path, lambda x: x["form"].update(kinds=["Nothing"] * 2)),
    ),
    "too few layers": (
        CONVERSATION,
        lambda path: rename(path, lambda x: x["form"]["kinds"].pop()),
    ),
    "other layers": (
        CONVERSATION,
        lambda path: rename(path, lambda x: x["form"].update(kinds=["ChunkedKVCache"] * 2)),
    ),
    "other shape": (
        CONVERSATION,
        lambda path: rename(path, lambda x: x["form"]["pieces"][0].__setitem__(2, [1, 2, 40, 9])),
    ),
    "more tokens than rows": (
        CONVERSATION,
        lambda path: rename(path, lambda x: x["tokens"].append(5)),
    ),
    "a block less": (CONVERSATION, lambda path: rename(path, lambda x: x["blocks"].pop())),
}
"""What no version of this program writes, or another one."""
CASES = [
    *((name, at) for name in FILES for at in ("start", "use")),
    *((x, "start") for x in FOREIGN),
]


@pytest.mark.parametrize(("damage", "at"), CASES)
def test_broken_conversations_are_skipped_and_deleted(
    tmp_path: Path, damage: str, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    end, break_file = {**FILES, **FOREIGN}[damage]
    kept = Kept(tmp_path)
    kept.take(A)
    kept.disk  # noqa: B018
    before = files_of(tmp_path, end)
    kept.take(B)
    kept.close()
    if at == "use":
        kept = Kept(tmp_path)
    break_file(sorted(files_of(tmp_path, end) - before)[0])
    if at == "start":
        kept = Kept(tmp_path)
        if damage.endswith(" block"):
            # what a look at the files shows is no conversation from the start
            assert kept.disk["conversations"] == 1
    assert kept.cached([*B, 5, 6]) == 0
    (text,) = [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING]
    assert "is skipped: " in text and "\n" not in text
    # nothing is left of it, nothing happened to the other, and it can be written again
    assert kept.disk["conversations"] == 1
    assert files_of(tmp_path, end) == before
    assert kept.cached([*A, 5, 6]) == len(A)
    kept.take(B)
    kept.close()
    kept = Kept(tmp_path)
    assert kept.cached([*B, 5, 6]) == len(B)
    assert kept.disk["held_bytes"] == bytes_of(tmp_path)
    kept.close()


def test_a_broken_block_that_conversations_share_is_written_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.take([*A, *B])
    kept.take([*A, *C])
    kept.close()
    manifests = files_of(tmp_path, CONVERSATION)
    blocks = [{name for name, _ in json.loads(x.read_text())["blocks"]} for x in manifests]
    shared = set.intersection(*blocks)
    assert len(shared) == 2
    kept = Kept(tmp_path)
    for name in shared:
        flip(tmp_path / name)
    assert kept.cached([*A, *B, 1]) == 0
    kept.take([*A, *B])
    kept.close()
    kept = Kept(tmp_path)
    assert kept.cached([*A, *B, 1]) == len(A) + len(B)
    assert kept.cached([*A, *C, 1]) == len(A) + len(C)
    kept.close()


def test_leftovers_of_a_killed_process_are_deleted_and_other_files_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(tmp_path)
    kept.take(A)
    kept.close()
    own = {x.name for x in tmp_path.iterdir()}
    for name in (f"tmpabc{BLOCK}", f"tmpabc{CONVERSATION}", f"{'0' * 64}{BLOCK}"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("notes.txt", "model.safetensors", "0" * 64):
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / "folder").mkdir()
    kept = Kept(tmp_path)
    names = {x.name for x in tmp_path.iterdir()}
    assert names - own == {"notes.txt", "model.safetensors", "0" * 64, "folder"}
    assert own <= names and not [x for x in caplog.records if x.levelno >= logging.WARNING]
    assert kept.disk["held_bytes"] == sum((tmp_path / name).stat().st_size for name in own)
    assert kept.cached([*A, 1]) == len(A)
    kept.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.mlx_metal.kept_rows import Kept, tokens_of
from xkv.backends.mlx_metal.server import disk_folder, disk_form
disk_form.BLOCK_ROWS = 16
kept = Kept(Path(sys.argv[1]))
kept.take(tokens_of(0))
kept.disk
left = int(sys.argv[2])
fsync, replace = os.fsync, os.replace
def killing(original):
    def call(*args):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return call
disk_folder.os.fsync, disk_folder.os.replace = killing(fsync), killing(replace)
kept.take([*tokens_of(0), *tokens_of(1)])
kept.disk
"""


@pytest.mark.parametrize("n_calls", [1, 2, 3, 6, 7, 8, 9])
def test_a_killed_process_loses_at_most_what_it_was_writing(tmp_path: Path, n_calls: int) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(n_calls)])
    kept = Kept(tmp_path)
    found = kept.cached([*A, *B, 1])
    # three blocks, each made sure of and renamed, then the conversation
    if n_calls <= 8:
        assert run.returncode == -signal.SIGKILL
        assert found == len(A)
    else:
        assert run.returncode == 0
        assert found == len(A) + len(B)
    assert kept.disk["held_bytes"] == bytes_of(tmp_path)
    assert kept.disk["conversations"] == 1
    kept.close()
