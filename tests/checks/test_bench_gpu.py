"""``scripts/bench_gpu.py`` prints its whole table without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
    arguments = ["--lengths", "600", "--steps", "4", "--runs", "2", *replay]
    done = run("--tiny", *arguments, "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "gpu.json").read_text())
    rows = [(row["form"], row["batch"]) for row in about["rows"]]
    names = {0: [""], 1: ["", ", replayed"], 2: [", replayed"]}[len(replay)]
    forms = [f"{form}{how}" for form in ("full", "selective", "dense low-rank") for how in names]
    assert rows == [(form, batch) for form in forms for batch in (1, 2)]
    assert about["left_out"] == []
    assert all(row["tokens_per_s"] > 0 and row["held_bytes"] > 0 for row in about["rows"])
    held = {(row["form"], row["batch"]): row["held_bytes"] for row in about["rows"]}
    how = names[-1]
    full, selective, dense = (
        held[f"{form}{how}", 1] for form in ("full", "selective", "dense low-rank")
    )
    assert full > 2 * selective > 2 * dense
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
    assert "* Left out: 600 tokens, dense low-rank" in (tmp_path / "gpu.md").read_text()


def test_batches_that_are_asked_for_are_compared_one_by_one(tmp_path):
    arguments = ["--tiny", "--lengths", "600", "--batches", "3", "--steps", "3", "--runs", "2"]
    done = run(*arguments, "--factorize-tokens", "300", "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["batch"], row["is_largest"]) for row in about["rows"]] == [(3, False)] * 3
    assert about["factorizations"][0]["tokens"] == 300
    assert "* 600 tokens, batch 3: a step of selective runs at" in (tmp_path / "gpu.md").read_text()
    assert "at its best batch" not in done.stdout
