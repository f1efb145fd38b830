"""What the measuring commands record: as they print it, and so that it reads back."""

from __future__ import annotations

import csv
import re
import sys

import pytest

from scripts import bench_decode, bench_fidelity, bench_first_run, bench_prefill, bench_prefixes
from scripts.bench_first_run import Case
from scripts.fidelity_points import Point
from scripts.results_tables import TABLES
from xkv import evaluate
from xkv.cli.record import make_record, read_record
from xkv.planning.language_model import load_language_model
from xkv.tiny import CHECKPOINT_DIR, make_document


def record_of(module, path, monkeypatch, *flags):
    """Run a script with a record asked for, and read it."""
    monkeypatch.setattr(sys, "argv", ["script", *flags, "--json", str(path)])
    module.main()
    return read_record(path)


def test_decode_record_holds_what_was_printed(tmp_path, monkeypatch, capsys):
    flags = ["--backend", "torch", "--device", "cpu", "--shape", "bundled", "--lengths", "1024"]
    flags += ["--runs", "1"]
    record = record_of(bench_decode, tmp_path / "x.json", monkeypatch, *flags)
    assert record.command == f"python scripts/bench_decode.py {' '.join(flags)} --json x.json"
    printed = capsys.readouterr().out
    assert len(record.rows) == 3 * 2 * 5 + 2
    for row in record.rows:
        on_metal = row.get("chip") != "H100 SXM"
        if row["what"] == "measured":
            line = rf"{row['tokens']}  {row['form']} +{row['ms']:.3f}  "
        elif on_metal:
            counts = f"{row['bytes'] / 1e9:.2f} +{row['flops'] / 1e9:.2f} +{row['launches']} "
            line = rf"{row['tokens']}  {row['form']} +{counts}.*\b{row['ms']:.2f}\b"
        else:
            line = rf"{row['tokens']}  {row['form']} .* {row['ms']:.2f}\n"
        assert re.search(line, printed), row


def test_prefill_record_holds_what_was_printed(tmp_path, monkeypatch, capsys):
    flags = ["--tokens", "300", "--layers", "2", "--hidden-size", "64", "--heads", "2"]
    flags += ["--kv-heads", "2", "--runs", "2"]
    record = record_of(bench_prefill, tmp_path / "x.json", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert [row["side"] for row in record.rows] == ["mlx-lm", "xKV"]
    for row in record.rows:
        assert f"peak {row['peak_bytes'] / 1e6:8.1f} MB  held {row['held_bytes'] / 1e6:8.1f}" in (
            printed
        )
        assert row["low_seconds"] <= row["seconds"] <= row["high_seconds"]
    assert record.model == "random weights, 2 layers, hidden size 64, 2 KV heads of 32"


def test_prefixes_record_holds_what_was_printed(tmp_path, monkeypatch, capsys):
    flags = ["--tokens", "500", "--runs", "2"]
    record = record_of(bench_prefixes, tmp_path / "x.json", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert [row["side"] for row in record.rows] == 2 * ["computed again", "read from disk"]
    assert {row["tokens"] for row in record.rows} == {500}
    for again, found in zip(record.rows[::2], record.rows[1::2], strict=True):
        times = (f"{row['side']} {row['seconds']:.3f} s" for row in (again, found))
        assert ", ".join(times) in printed
    assert f"500 tokens, {found['bytes'] / 1e6:.2f} MB on disk" in printed


def test_fidelity_record_holds_its_points(tmp_path, monkeypatch, capsys):
    points = {
        ("quantized:bits=4", 3.55, None): 0.09,
        ("xkv:group_size=4", 3.556, 3.556): 0.03,
    }
    monkeypatch.setattr(bench_fidelity, "synthetic_document", lambda *_: None)
    monkeypatch.setattr(
        bench_fidelity,
        "measure",
        lambda *_: [
            *(Point("knee", 512, *key, error, 0.2, 1.5) for key, error in points.items()),
            Point("knee", 512, "svd", 0.0, 64.0, problem="too short"),
        ],
    )
    record = record_of(bench_fidelity, tmp_path / "x.json", monkeypatch, "--families", "knee")
    (text,) = TABLES["fidelity"](record)
    assert "| knee | 512 | xkv:group_size=4 at 3.556x | 3.56 x | 0.0300 | 0.200 | 1.5 |  |" in text
    assert "| knee | 512 | mlx-lm, 4 bits | 3.55 x |" in text
    assert "| knee | 512 | svd at 64x | – | – | – | – | too short |" in text


def test_fidelity_tells_what_a_prompt_is_too_short_for():
    model = load_language_model("torch", str(CHECKPOINT_DIR))
    document = model.prefill(model.encode(make_document(3, 60).text), 0)
    points = bench_fidelity.measure([document], "bundled", "group_size=8", is_long=True)
    record = make_record(
        "fidelity",
        [point.row() for point in points],
        **{"command": "x", "model": "bundled", "backend": "torch", "settings": {}},
    )
    assert [row["method"] for row in record.rows[:3]] == [f"quantized:bits={x}" for x in (8, 4, 2)]
    problems = [row for row in record.rows if row.get("problem")]
    assert problems and all("kept dense: 60 tokens" in x["problem"] for x in problems)


def test_first_commands_are_timed_and_failures_are_told(tmp_path, monkeypatch, capsys):
    program = (
        "import os, sys; print('no', file=sys.stderr); sys.exit('XKV_NO_OPENBLAS' in os.environ)"
    )
    cases = (
        Case(("-c", program)),
        Case(("-c", program), is_openblas_allowed=False, exit_code=1, most_runs=1),
    )
    monkeypatch.setattr(bench_first_run, "CASES", cases)
    record = record_of(bench_first_run, tmp_path / "x.json", monkeypatch, "--runs", "2")
    assert [row["run"] for row in record.rows] == [1, 2, 1]
    assert all(0 < row["seconds"] < 60 for row in record.rows)
    monkeypatch.setattr(bench_first_run, "CASES", (Case(("-c", program), exit_code=7),))
    with pytest.raises(SystemExit) as stop:
        record_of(bench_first_run, tmp_path / "y.json", monkeypatch, "--runs", "1")
    assert stop.value.code == 1
    assert read_record(tmp_path / "y.json").rows[0]["problem"] == "exit code 0: no"


def test_first_commands_are_those_of_a_newcomer():
    commands = [case.command for case in bench_first_run.CASES]
    first = "python -m xkv.generate"
    assert commands == [first, first, f"{first} --help", f"{first} --no-such-flag"]
    assert [case.exit_code for case in bench_first_run.CASES] == [0, 0, 0, 2]


def test_evaluate_leaves_a_record_of_each_table(tmp_path, capsys):
    story = tmp_path / "story.txt"
    story.write_text(make_document(3, 450).text)
    flags = ["--tasks", "needle", "kl", "--samples", "1", "--methods", "quantized:bits=4"]
    flags += ["xkv", "--ratios", "900", "--lengths", "150", "--continuation", "32"]
    evaluate.main(
        [*flags, "--text", str(story), "--out", str(tmp_path / "out"), "--backend", "torch"]
    )
    said = capsys.readouterr().err
    assert ", tasks.json, " in said and ", kl.json; " in said
    for kind, table in (("tasks", "summary.csv"), ("kl", "kl.csv")):
        record = read_record(tmp_path / "out" / f"{kind}.json")
        assert (record.kind, record.model, record.backend) == (kind, "bundled", "torch")
        assert record.command == (
            f"python -m xkv.evaluate {' '.join(flags)} --text story.txt --out out --backend torch"
        )
        assert record.settings == {"kv_dtype": "float16", "dtype": "float32"}
        lines = list(csv.DictReader((tmp_path / "out" / table).open()))
        assert len(lines) == len(record.rows)
        for line, row in zip(lines, record.rows, strict=True):
            shown = {name: row.get(name) for name in line}
            assert {k: _number(v) for k, v in line.items()} == shown
        text = "".join(TABLES[kind](record))
        assert "| xKV at 900x | – |" in text and "| mlx-lm, 4 bits | " in text


def _number(cell):
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell
