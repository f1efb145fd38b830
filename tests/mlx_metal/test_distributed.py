"""Two processes that share a model: groups stay within a rank, and full rank stays exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "distributed_worker.py"


@pytest.mark.parametrize(
    ("kind", "caches", "kv_heads"), [("tensor", 6, 1), ("pipeline", 3, 2)], ids=lambda x: str(x)
)
def test_two_ranks_give_the_tokens_of_the_full_cache(kind, caches, kv_heads):
    launch = Path(sys.executable).with_name("mlx.launch")
    run = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", sys.executable, WORKER, "qwen2", kind],
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = [json.loads(x.split("FOUND ")[1]) for x in run.stdout.splitlines() if "FOUND" in x]
    assert sorted(each["rank"] for each in found) == [0, 1], run.stdout + run.stderr
    for each in found:
        assert each["same"] and each["error"] < 5e-6
        assert each["caches"] == len(each["compressed"]) == caches
        assert each["kv_heads"] == kv_heads
        assert all(each["compressed"])
