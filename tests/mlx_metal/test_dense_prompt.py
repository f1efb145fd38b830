"""Compressed caches out of a prompt that is in mlx-lm's own cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import xkv
from tests.architectures import build
from tests.mlx_metal import enabled_model
from tests.mlx_metal.enabled_model import EXACT, greedy, new_cache
from xkv.backends.mlx_metal.model.dense_prompt import compressed_copy, prefill_dense
from xkv.backends.mlx_metal.model.enabled import enabled_state, lowrank_cache
from xkv.backends.mlx_metal.model.prefill import equal_chunks, held_arrays

STEP = 64
# of the tiny models' vocabulary
PROMPT = [token % 256 for token in enabled_model.PROMPT * 2]
LOSSY = {"compression": 2, "group_size": 2, "window": 16, "max_tail": 16}
# full attention, a rope that changes with the length, windows, linear attention, MLA
NAMES = ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"]


def flat_arrays(caches) -> list[np.ndarray]:
    arrays = tree_flatten(held_arrays(caches))
    return [np.array(x.astype(mx.float32)) for _, x in arrays if isinstance(x, mx.array)]


@pytest.mark.parametrize("options", [EXACT, LOSSY], ids=["exact", "lossy"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_what_a_prompt_layer_by_layer_gives(name, options):
    model = build(name)
    dense = new_cache(model)
    prefill_dense(model, dense, PROMPT[:-1], STEP)
    xkv.enable(model, **options)
    copy = compressed_copy(enabled_state(model), dense, STEP)
    fresh = new_cache(model)
    with enabled_state(model).layerwise(fresh, STEP):
        model(mx.array(PROMPT[:-1])[None], cache=fresh)
    assert all(x.is_compressed for x in lowrank_cache(copy).layers.values())
    pairs = list(zip(flat_arrays(copy), flat_arrays(fresh), strict=True))
    assert len(pairs) > 5
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
    assert greedy(model, copy, PROMPT[-1:]) == greedy(model, fresh, PROMPT[-1:])


@pytest.mark.parametrize("name", NAMES)
def test_the_full_cache_goes_on_as_if_there_were_no_copy(name):
    model = build(name)
    want = greedy(model, new_cache(model), PROMPT)
    dense = new_cache(model)
    prefill_dense(model, dense, PROMPT[:-1], STEP)
    xkv.enable(model, **LOSSY)
    greedy(model, compressed_copy(enabled_state(model), dense, STEP), PROMPT[-1:])
    xkv.disable(model)
    assert greedy(model, dense, PROMPT[-1:]) == want


def test_equal_chunks_cover_all_tokens_once():
    for n_tokens in (0, 1, 63, 64, 65, 128, 200):
        chunks = list(equal_chunks(n_tokens, STEP))
        assert [x for start, end in chunks for x in range(start, end)] == list(range(n_tokens))
        sizes = [end - start for start, end in chunks]
        assert all(size <= STEP for size in sizes) and len(sizes) == -(-n_tokens // STEP)
