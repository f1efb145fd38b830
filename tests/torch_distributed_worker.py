"""One of two processes that share a transformers model: full rank against its own cache, as JSON.

torchrun --nproc-per-node 2 tests/torch_distributed_worker.py CHECKPOINT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

import xkv
from tests.torch_models import greedy, make_prompt

EXACT = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 8, "max_tail": 8}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], distributed_config=DistributedConfig(tp_size=2)
    )
    prompt = make_prompt(60)
    want = greedy(model, prompt, n=20)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt, step_size=20)
    lowrank = cache.sequences[0]
    found = {
        "rank": torch.distributed.get_rank(),
        "same": greedy(model, prompt, n=20, cache=cache) == want,
        "kv_heads": lowrank.shape.groups[0].n_kv_heads,
        "compressed": [layer.is_compressed for layer in lowrank.layers.values()],
    }
    print("FOUND " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
