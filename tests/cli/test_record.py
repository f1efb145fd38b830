"""Records: what they say of the command, the code and the machine, and that they read back."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.docs.records import ROWS, make
from xkv.cli import record, this_machine
from xkv.cli.record import (
    make_record,
    read_record,
    record_text,
    rows_from_csv,
    typed_command,
    write_record,
)
from xkv.cli.record_kinds import KINDS
from xkv.errors import InputError

ABOUT = {"command": "python -m x", "model": "bundled", "backend": "mlx", "settings": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_record_reads_back_as_it_was(kind, tmp_path):
    made = make_record(kind, ROWS[kind], **ABOUT)
    write_record(tmp_path / "x.json", made)
    assert read_record(tmp_path / "x.json") == made
    assert (tmp_path / "x.json").read_text() == record_text(made)
    assert record_text(made).count("\n  {") == len(ROWS[kind])


def test_command_is_as_typed_without_this_machines_folders():
    inside = str(this_machine.ROOT / "docs" / "x.txt")
    typed = ["--model", "/home/me/models/smol", "--out=/tmp/a b", "--text", inside, "x/y.txt"]
    typed += ["--methods", "xkv:group_size=4,basis=prompt", "mlx-community/Llama-4bit"]
    assert typed_command("python -m xkv.evaluate", typed) == (
        "python -m xkv.evaluate --model smol '--out=a b' --text docs/x.txt x/y.txt "
        "--methods xkv:group_size=4,basis=prompt mlx-community/Llama-4bit"
    )
    assert make_record("hits", ROWS["hits"], **ABOUT | {"model": "/a/b"}).model == "b"
    assert typed_command("python", ["a\nb\udc80"]) == "python 'a?b?'"


def test_machine_and_versions_are_told():
    made = make_record("hits", ROWS["hits"], **ABOUT)
    assert made.machine["cores"] == os.cpu_count() and made.machine["memory_bytes"] > 1e8
    assert made.machine["cpu"] and made.machine["os"].split()[0] in ("Linux", "macOS")
    assert {"python", "xkv", "mlx", "numpy"} <= set(made.versions)


def test_commit_says_whether_the_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(this_machine, "ROOT", tmp_path)
    assert this_machine.code_commit() is None

    def git(*words):
        name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *name, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "xkv").mkdir()
    (tmp_path / "xkv" / "a.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short", "HEAD")
    (tmp_path / "README.md").write_text("words are no code")
    assert this_machine.code_commit() == commit
    (tmp_path / "xkv" / "b.py").write_text("")
    assert this_machine.code_commit() == f"{commit}+changes"


def test_processor_is_read_where_the_system_says_it(monkeypatch):
    said = {"sysctl": "Apple M3 Max", "nvidia-smi": "NVIDIA H100"}
    monkeypatch.setattr(this_machine, "_said", lambda *command: said[command[0]])
    assert this_machine.this_machine()["gpu"] == "NVIDIA H100"
    system = {"system": "Darwin", "machine": "arm64", "mac_ver": ("15.1", (), "")}
    for name, value in system.items():
        monkeypatch.setattr(this_machine.platform, name, lambda value=value: value)
    machine = this_machine.this_machine()
    assert (machine["cpu"], machine["gpu"]) == ("Apple M3 Max", "Apple M3 Max")
    assert machine["os"] == "macOS 15.1 arm64"


def test_rows_of_a_table_have_their_types():
    head = "task,length,method,ratio,held_ratio,n,score,low,high,perplexity,kl,problem\n"
    first, second = rows_from_csv(
        "tasks", head + "needle,1024,123,4,4.02,64,1.0,0.9,1.0,,,\nppl,1024,xkv,,nan,1,,,,2,0.1,\n"
    )
    assert (first["length"], first["method"], first["ratio"], first["n"]) == (1024, "123", 4.0, 64)
    assert first["perplexity"] is None and first["problem"] is None
    assert second == {"task": "ppl", "length": 1024, "method": "xkv", "ratio": None} | {
        "problem": "held_ratio is nan"
    }


def test_rows_of_another_kind_are_refused():
    with pytest.raises(InputError, match="tasks is no record: row 1 has no length"):
        make_record("tasks", ROWS["hits"], **ABOUT)


def test_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_record(path, make("hits"))
    before = path.read_text()
    # as a full disk may leave it
    monkeypatch.setattr(record.Path, "write_bytes", lambda self, content: 0)
    with pytest.raises(InputError, match="the disk is full; nothing was changed"):
        write_record(path, make("hits", commit=None))
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot write"):
        write_record(tmp_path / "none" / "x.json", make("hits"))
