"""Caches of an enabled model as mlx-lm treats them: trimmed, copied, kept by the server."""

from __future__ import annotations

import copy
import gc
import json

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xkv
from tests.mlx_metal.enabled_model import EXACT, LOSSY, PROMPT, greedy, new_cache
from tests.tiny_models import write_checkpoint
from xkv.backends.mlx_metal import XKVCache
from xkv.backends.mlx_metal.model.enabled import lowrank_cache
from xkv.cache import state as cache_state


def active_memory() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("n_trimmed", [1, 30, 150, 5000])
def test_trim_prompt_cache(model, n_trimmed):
    want_cache = new_cache(model)
    xkv.enable(model, **EXACT)
    cache = new_cache(model)
    results = []
    for each in (want_cache, cache):
        greedy(model, each, n_tokens=30)
        length = each[0].offset
        trimmed = mlx_cache.trim_prompt_cache(each, n_trimmed)
        assert trimmed == min(n_trimmed, length)
        assert each[0].offset == length - trimmed
        results.append(greedy(model, each, PROMPT[:20]))
    assert results[0] == results[1]


def test_prompt_cache_tree_of_the_server(model):
    """Exact, shorter and longer hits, continued, give what a fresh cache gives."""
    xkv.enable(model, **EXACT)
    tree = mlx_cache.LRUPromptCache(10)
    cache = new_cache(model)
    reply = greedy(model, cache, n_tokens=20)
    # generate_step runs one token ahead
    tokens = PROMPT + reply
    tree.insert_cache("key", tokens, cache)
    questions = {
        "exact": tokens,
        "shorter": [*tokens, *PROMPT[:25]],
        "longer": [*PROMPT[:90], *PROMPT[:25]],
    }
    for name, question in questions.items():
        found, rest = tree.fetch_nearest_cache("key", question)
        assert found is not None
        assert len(rest) == {"exact": 0, "shorter": 25, "longer": 25}[name]
        if name == "exact":
            continue
        assert greedy(model, found, rest) == greedy(model, new_cache(model), question)
    assert cache[0].offset == len(tokens)


def test_copies_share_the_factors(tmp_path):
    folder = write_checkpoint(tmp_path, {"model_type": "llama", "head_dim": 64})
    model = mlx_lm.load(str(folder))[0]
    xkv.enable(model, compression=3, window=16, latent_bits=16)
    prompt = np.random.default_rng(1).integers(300, 1000, 3000).tolist()
    cache = new_cache(model)
    greedy(model, cache, prompt, n_tokens=1, prefill_step_size=512)
    held = sum(layer.nbytes for layer in cache)
    before = active_memory()
    copies = [copy.deepcopy(cache) for _ in range(4)]
    for number, each in enumerate(copies):
        greedy(model, each, prompt[number : number + 20], n_tokens=2)
    grown = active_memory() - before
    # each copy has a working set of its own, an eighth, and sinks, window and tail, 4 + 16 + 23 of
    # 3000 tokens, buffers aside
    assert grown < 4 * (0.125 + 0.06) * held
    assert copies[0][0].layer.group is copies[0][1].layer.group
    xkv.disable(model)


def test_contract_of_a_fresh_cache(model):
    """What mlx-lm's own cache tests ask of every cache."""
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    layer = cache[0]
    assert layer.empty() and layer.size() == layer.offset == layer.nbytes == 0
    assert layer.is_trimmable() and layer.trim(3) == 0
    assert layer.make_mask(1) is None and layer.make_mask(5) == "causal"
    assert layer.make_mask(5, return_array=True).shape == (5, 5)
    for name in ("bits", "to_quantized", "__len__"):
        assert not hasattr(layer, name)
    assert mlx_cache.can_trim_prompt_cache(cache)
    keys = mx.random.normal((1, 2, 10, 16))
    got_keys, got_values = layer.update_and_fetch(keys, keys)
    assert mx.array_equal(got_keys, keys) and mx.array_equal(got_values, keys)
    assert layer.size() == 10 and not layer.empty()
    state = layer.state
    assert all(isinstance(value, mx.array) for _, value in tree_flatten(state))
    again = XKVCache.from_state(state)
    assert again.offset == 10
    assert json.loads(np.array(state[0]).tobytes())["format"] == cache_state.FORMAT


def test_compressed_peak_and_held_are_counted(model):
    xkv.enable(model, compression=3, window=16, latent_bits=16)
    cache = new_cache(model)
    greedy(model, cache, n_tokens=1)
    dense = lowrank_cache(cache).dense_bytes()
    assert sum(layer.nbytes for layer in cache) <= dense / 2.5
