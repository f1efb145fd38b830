"""``scripts/bench_gpu.py`` prints its whole table without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMS = ("full", "working set", "every row")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/bench_gpu.py", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("replay", [[], ["--replay"], ["--replay", "only"]])
def test_tiny_run_prints_and_writes_every_row(tmp_path, replay):
    arguments = ["--lengths", "600", "--batches", "1", "2", "--steps", "4", "--runs", "2", *replay]
    done = run("--tiny", *arguments, "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "gpu.json").read_text())
    rows = [(row["form"], row["batch"]) for row in about["rows"]]
    names = {0: [""], 1: ["", ", replayed"], 2: [", replayed"]}[len(replay)]
    forms = [f"{form}{how}" for form in FORMS for how in names]
    assert rows == [(form, batch) for form in forms for batch in (1, 2)]
    assert about["left_out"] == []
    assert all(row["tokens_per_s"] > 0 and row["held_bytes"] > 0 for row in about["rows"])
    held = {(row["form"], row["batch"]): row["held_bytes"] for row in about["rows"]}
    full, working_set, every_row = (held[f"{form}{names[-1]}", 1] for form in FORMS)
    assert full > 3 * max(working_set, every_row)
    ours, exact, _ = about["factorizations"]
    assert exact["over_exact"] == 0 and 0 <= ours["over_exact"] < 0.01
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("\n| 600 |") == len(rows) and "| torch.svd_lowrank |" in table
    assert all(line in done.stdout for line in table.splitlines()[2:])


def test_prompt_too_short_to_compress_is_one_sentence():
    done = run("--tiny", "--lengths", "20", "--steps", "2", "--runs", "2")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: 20 tokens are too few: kept dense")


def test_rows_that_begin_too_late_are_left_out_and_named(tmp_path):
    arguments = ["--tiny", "--lengths", "600", "--batches", "1", "--max-seconds", "0"]
    done = run(*arguments, "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert about["rows"] == about["factorizations"] == []
    assert about["left_out"][0] == "600 tokens, full: not begun within 0 seconds"
    assert about["left_out"][-1] == "factorizations: not begun within 0 seconds"
    assert "* Left out: 600 tokens, every row" in (tmp_path / "gpu.md").read_text()


def test_each_batch_is_compared_with_full_attention(tmp_path):
    arguments = ["--tiny", "--lengths", "600", "--batches", "3", "--steps", "3", "--runs", "2"]
    done = run(*arguments, "--factorize-tokens", "300", "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["batch"] for row in about["rows"]] == [3] * 3
    assert about["factorizations"][0]["tokens"] == 300
    told = "* 600 tokens, batch 3: a step of working set runs at"
    assert told in (tmp_path / "gpu.md").read_text()
