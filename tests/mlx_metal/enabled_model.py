"""Talking to an enabled model in tests: configurations, a prompt, greedy answers."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import numpy as np
from mlx_lm.generate import generate_step

EXACT = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 16, "max_tail": 16}
LOSSY = {"rank_k": 24, "rank_v": 32, "group_size": 2, "window": 16, "max_tail": 16}
PROMPT = np.random.default_rng(0).integers(300, 1000, 200).tolist()


def greedy(model, cache, prompt=PROMPT, n_tokens=12, **options) -> list[int]:
    options = {"prefill_step_size": 64, **options}
    steps = generate_step(
        mx.array(prompt), model, max_tokens=n_tokens, prompt_cache=cache, **options
    )
    return [token for token, _ in steps]


def new_cache(model):
    return mlx_cache.make_prompt_cache(model)
