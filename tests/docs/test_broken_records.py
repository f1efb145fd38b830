"""Each way in which a record can be broken is one sentence, and changes nothing."""

from __future__ import annotations

import math
import sys

import pytest

from scripts import add_result
from tests.docs.records import ROWS, as_json, contents, make, make_folder

ROW = ROWS["kl"][1]


def rows(**changes):
    return {"rows": [ROWS["kl"][0], {k: v for k, v in (ROW | changes).items() if v != "left out"}]}


BROKEN = {
    "field-missing": ({"command": "left out"}, "it has no command"),
    "format-missing": ({"format": "left out"}, "it has no format"),
    "format-newer": ({"format": 2}, "its format 2 is newer than 1, the newest this version reads"),
    "format-other": ({"format": "one"}, "its format is 'one', not 1"),
    "field-unknown": ({"speed": 1}, "no record has a field 'speed'"),
    "kind-unknown": ({"kind": "speed"}, "there is no kind 'speed'; kinds: kl, tasks,"),
    "kind-list": ({"kind": []}, "there is no kind []"),
    "date": ({"date": "26.11.2026"}, "date is '26.11.2026', not one like 2026-11-26"),
    "command-lines": ({"command": "a\n# b"}, "command is 'a\\n# b', not a line of text"),
    "commit-number": ({"commit": 7}, "commit is 7, not a line of text or null"),
    "machine-text": ({"machine": "Mac"}, "machine is 'Mac', not an object"),
    "machine-no-cpu": ({"machine": {"os": "x"}}, "its machine has no cpu"),
    "machine-memory": (
        {"machine": {"cpu": "x", "os": "x", "memory_bytes": -1}},
        "its machine has memory_bytes = -1, not a whole number, 0 or more",
    ),
    "versions-list": ({"versions": {"xkv": [1]}}, "'xkv' of versions is [1], not a line of text"),
    "settings-true": ({"settings": {"x": True}}, "'x' of settings is True, not a line of text"),
    "rows-none": ({"rows": []}, "it has no rows"),
    "rows-text": ({"rows": ["a"]}, "row 1 is not an object"),
    "row-nested": (rows(more={}), "row 2 has more = {}, neither text nor a number"),
    "row-column": (rows(kl="left out"), "row 2 has no kl"),
    "row-null": (rows(kl=None), "row 2 has kl = None, not a number"),
    "row-about": (rows(text="left out", problem="why"), "row 2 has no text"),
    "row-text": (rows(kl="0.1"), "row 2 has kl = '0.1', not a number"),
    "row-huge": (rows(kl=10**400), "row 2 has kl = 1000"),
    "row-bytes": (rows(held_bytes=-5), "row 2 has held_bytes = -5, not a whole number, 0 or more"),
    "row-problem": (rows(problem=3), "row 2 has problem = 3, not text"),
    "row-nan": (rows(kl=math.nan), "NaN is not a number"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "repository")
    monkeypatch.setattr(add_result, "ROOT", root)
    return root


def refuse(folder, file, monkeypatch, capsys):
    """What adding the file is refused with."""
    before = contents(folder)
    monkeypatch.setattr(sys, "argv", ["add_result", str(file)])
    with pytest.raises(SystemExit) as stop:
        add_result.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert contents(folder) == before
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


@pytest.mark.parametrize(("changes", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_record_is_refused(folder, tmp_path, monkeypatch, capsys, changes, words):
    file = as_json(make("kl"), tmp_path / "mine.json", **changes)
    assert f"{file} is no record: {words}" in refuse(folder, file, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "it is not one JSON object"),
        (b"3", "it is not one JSON object"),
    ],
)
def test_file_of_something_else_is_refused(folder, tmp_path, monkeypatch, capsys, content, words):
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    assert words in refuse(folder, file, monkeypatch, capsys)


def test_file_that_is_not_there_is_refused(folder, tmp_path, monkeypatch, capsys):
    words = refuse(folder, tmp_path / "none.json", monkeypatch, capsys)
    assert "cannot read" in words and "No such file" in words


def test_a_record_that_is_broken_already_is_named(folder, tmp_path, monkeypatch, capsys):
    """Nothing is rebuilt without it."""
    (folder / "scripts" / "results" / "old.json").write_text("{}")
    file = as_json(make("kl"), tmp_path / "mine.json")
    assert "old.json is no record: it has no format" in refuse(folder, file, monkeypatch, capsys)
