"""``scripts/real_model.py``: what stops it is one sentence, and leaves nothing behind."""

from __future__ import annotations

import subprocess

import pytest

from scripts import real_model


def mistake(out, capsys):
    """The one sentence that the script ends with."""
    with pytest.raises(SystemExit) as ended:
        real_model.main([str(out)])
    assert ended.value.code == 2
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(error) == 1
    return error[0]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is not an empty folder" in mistake(tmp_path, capsys)
    assert "exists and is not an empty folder" in mistake(tmp_path / "notes.txt", capsys)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found\n", "No matching distribution"),
        ("/usr/bin/python3: No module named pip\n", "No module named pip"),
        ("", "exit code 1"),
    ],
)
def test_without_the_packages_nothing_is_made(said, told, tmp_path, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    sentence = mistake(tmp_path / "model", capsys)
    assert told in sentence and "needs the network" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(capsys):
    assert "cannot write /proc/nowhere/model" in mistake("/proc/nowhere/model", capsys)


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    out = tmp_path / "model"
    with pytest.raises(RuntimeError), real_model._made_folder(out) as beside:
        (beside / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with real_model._made_folder(out) as beside:
        (beside / "config.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
