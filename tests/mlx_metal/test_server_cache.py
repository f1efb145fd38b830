"""The server's prompt cache over layers of other kinds than ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import xkv
from tests.architectures import build
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server.budget import PromptCache, is_at

OPTIONS = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 8, "max_tail": 8}
TOKENS = [1 + i * 7 % 200 for i in range(60)]


@pytest.fixture
def enabled(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = build(request.param)
    xkv.enable(model, **OPTIONS)
    yield model
    xkv.disable(model)


def filled(model: nn.Module, tokens: list[int]) -> list[Any]:
    """A prompt cache that has seen these tokens, the last ones one by one."""
    cache = make_prompt_cache(model)
    for part in (tokens[:-3], *([x] for x in tokens[-3:])):
        mx.eval(model(mx.array([part]), cache=cache))
    return cache


def logits(model: nn.Module, cache: list[Any], tokens: list[int]) -> mx.array:
    for token in tokens:
        output = model(mx.array([[token]]), cache=cache)
    return output[0, -1].astype(mx.float32)


@pytest.mark.parametrize("enabled", ["deepseek_v32", "longcat_flash"], indirect=True)
def test_cache_lists_are_kept_counted_and_continued(enabled: nn.Module) -> None:
    cache = filled(enabled, TOKENS)
    assert all(isinstance(x, CacheList) for x in cache)
    kept = PromptCache(4, 10**9)
    kept.insert_cache("model", TOKENS, cache)
    report = kept.report()
    layers = list(flatten(cache))
    assert report["tokens"] == len(TOKENS)
    assert report["held_bytes"] == sum(layer.nbytes for layer in layers)
    ours = [x for x in layers if isinstance(x, XKVCache)]
    native = [x for x in layers if not isinstance(x, XKVCache)]
    rows = sum(x.nbytes * x.offset // x.keys.shape[2] for x in native)
    assert report["dense_bytes"] == sum(x.layer.dense_bytes for x in ours) + rows
    edited = [*TOKENS[:40], 9, 8, 7]
    found, rest = kept.fetch_nearest_cache("model", edited)
    assert found is not None and rest == [9, 8, 7]
    assert is_at(found, 40)
    got, wanted = logits(enabled, found, rest), logits(enabled, make_prompt_cache(enabled), edited)
    assert mx.linalg.norm(got - wanted) < 1e-2 * mx.linalg.norm(wanted)


def test_state_spaces_in_a_cache_list_have_no_offset() -> None:
    state = ArraysCache(size=1)
    state[0] = mx.zeros((1, 4))
    rows = KVCache()
    rows.update_and_fetch(mx.ones((1, 1, 5, 4)), mx.ones((1, 1, 5, 4)))
    kept = PromptCache(4, 10**9)
    kept.insert_cache("model", TOKENS[:5], [CacheList(state, rows)])
    assert kept.report()["dense_bytes"] == state.nbytes + 2 * 5 * 4 * 4
    found, rest = kept.fetch_nearest_cache("model", TOKENS[:8])
    assert found is not None and rest == TOKENS[5:8]
    # a state cannot be trimmed
    assert kept.fetch_nearest_cache("model", TOKENS[:4]) == (None, TOKENS[:4])
    assert kept.fetch_nearest_cache("model", TOKENS[:5]) == (None, TOKENS[:5])


@pytest.mark.parametrize("enabled", ["llama4"], indirect=True)
@pytest.mark.parametrize("n_kept", [3, 20, 33, 40, 47, 48, 50, 59])
def test_trimmed_chunked_layers_are_right_or_not_used(enabled: nn.Module, n_kept: int) -> None:
    cache = filled(enabled, TOKENS)
    assert any(isinstance(x, ChunkedKVCache) and x.start_position for x in cache)
    kept = PromptCache(4)
    kept.insert_cache("model", TOKENS, cache)
    edited = [*TOKENS[:n_kept], 201, 202, 203]
    found, rest = kept.fetch_nearest_cache("model", edited)
    if n_kept < 48:
        assert found is None and rest == edited
    else:
        assert found is not None and rest == edited[n_kept:]
        wanted = logits(enabled, make_prompt_cache(enabled), edited)
        got = logits(enabled, found, rest)
        assert mx.linalg.norm(got - wanted) < 1e-2 * mx.linalg.norm(wanted)


def test_shorter_cached_prompt_stands_in_for_one_that_cannot_be_trimmed() -> None:
    kept = PromptCache(4)
    window = RotatingKVCache(max_size=8)
    for n_tokens in (12, 30):
        while window.offset < n_tokens:
            window.update_and_fetch(mx.ones((1, 1, 1, 4)), mx.ones((1, 1, 1, 4)))
        copied = RotatingKVCache.from_state(window.state)
        kept.insert_cache("model", TOKENS[:n_tokens], [copied])
    # the exact prompt needs its last token again, and the longer one would have to be trimmed
    for n_tokens in (20, 30):
        found, rest = kept.fetch_nearest_cache("model", TOKENS[:n_tokens])
        assert found is not None and found[0].offset == 12
        assert rest == TOKENS[12:n_tokens]


def test_layers_that_are_out_of_step_are_not_kept() -> None:
    kept = PromptCache(4)
    full, window = KVCache(), RotatingKVCache(max_size=8)
    for layer, n_tokens in ((full, 20), (window, 23)):
        layer.update_and_fetch(mx.ones((1, 1, n_tokens, 4)), mx.ones((1, 1, n_tokens, 4)))
    # as after rejected drafts, which mlx-lm does not take back from a full window
    kept.insert_cache("model", TOKENS[:20], [full, window])
    assert len(kept) == 0
    # full layers are cut to the same length
    other = KVCache()
    other.update_and_fetch(mx.ones((1, 1, 17, 4)), mx.ones((1, 1, 17, 4)))
    kept.insert_cache(
        "model", TOKENS[:20], [full, CacheList(other, KVCache.from_state(full.state))]
    )
    assert kept.report()["tokens"] == 17
    found, rest = kept.fetch_nearest_cache("model", TOKENS[:18])
    assert found is not None and is_at(found, 17) and rest == TOKENS[17:18]
