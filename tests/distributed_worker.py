"""One of two processes that share a model: full rank against mlx-lm's own cache, as JSON.

mlx.launch -n 2 --backend ring PYTHON tests/distributed_worker.py MODEL_FILE tensor|pipeline
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[1]))

import xkv
from tests.architectures import CONFIGS, build
from xkv.backends.mlx_metal.model.enabled import lowrank_cache

PROMPT = np.random.default_rng(0).integers(1, 250, 61).tolist()


def decode(model) -> tuple[list[int], np.ndarray, list]:
    cache = make_prompt_cache(model)
    steps = list(
        generate_step(
            mx.array(PROMPT), model, max_tokens=8, prefill_step_size=20, prompt_cache=cache
        )
    )
    return [token for token, _ in steps], np.stack([np.array(x) for _, x in steps]), cache


def main() -> None:
    name, kind = sys.argv[1:]
    group = mx.distributed.init(strict=True, backend="ring")
    CONFIGS[name] |= {"num_key_value_heads": 2}
    model = build(name)
    if kind == "tensor":
        model.shard(group)
    else:
        model.model.pipeline(group)
    mx.eval(model.parameters())
    tokens, logprobs, _ = decode(model)
    xkv.enable(model, rank_k="full", rank_v="full", group_size=2, sinks=2, window=8, max_tail=8)
    got_tokens, got, cache = decode(model)
    lowrank = lowrank_cache(cache)
    assert lowrank is not None
    error = float(np.linalg.norm(got - logprobs) / np.linalg.norm(logprobs))
    found = {
        "rank": group.rank(),
        "same": got_tokens == tokens,
        "error": error,
        "caches": len(cache),
        "kv_heads": lowrank.shape.groups[0].n_kv_heads,
        "compressed": [layer.is_compressed for layer in lowrank.layers.values()],
    }
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
