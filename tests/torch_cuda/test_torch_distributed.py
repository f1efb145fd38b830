"""A tensor-parallel transformers model under torchrun: each rank compresses its own heads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.torch_models import make_model

WORKER = Path(__file__).parents[1] / "torch_distributed_worker.py"


def test_two_ranks_give_the_tokens_of_the_full_cache(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    torchrun = Path(sys.executable).with_name("torchrun")
    run = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node", "2", WORKER, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # two processes write to one pipe
    found = [json.loads(text) for text in re.findall(r"FOUND (\{.*?\})", run.stdout)]
    assert sorted(each["rank"] for each in found) == [0, 1], run.stdout + run.stderr
    for each in found:
        assert each["same"] and each["compressed"] == [True] * 5
        assert each["kv_heads"] == 1
