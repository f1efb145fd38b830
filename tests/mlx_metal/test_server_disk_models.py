"""Prompt caches of all kinds of layers, on disk and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, make_prompt_cache

import xkv
from tests.architectures import build
from tests.mlx_metal.kept_rows import files_of
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.going_back import keep_state, states_of
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server import disk_form
from xkv.backends.mlx_metal.server.disk import Disk
from xkv.backends.mlx_metal.server.disk_cache import DiskPromptCache
from xkv.backends.mlx_metal.server.disk_folder import BLOCK
from xkv.backends.mlx_metal.server.disk_form import put_together, take_apart

OPTIONS = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 8, "max_tail": 8}
TOKENS = [1 + i * 7 % 200 for i in range(60)]
IS_CHUNKED_WRITTEN = not hasattr(ChunkedKVCache, "meta_state")
"""Not up to mlx-lm 0.31."""
KINDS = ["granite", "llama", "deepseek_v32", "gemma3_text", "qwen3_next", "longcat_flash"]
KINDS += ["llama4"] * IS_CHUNKED_WRITTEN


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_form, "BLOCK_ROWS", 16)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    made = build(request.param)
    xkv.enable(made, **OPTIONS)
    yield made
    if hasattr(made, "_xkv"):
        xkv.disable(made)


def filled(model: nn.Module, tokens: list[int]) -> list[Any]:
    """A prompt cache that has seen these tokens, the last ones one by one."""
    cache = make_prompt_cache(model)
    # mlx-lm's chunked layers take a long prompt at the beginning alone, up to 0.31
    is_chunked = any(isinstance(x, ChunkedKVCache) for x in flatten(cache))
    parts = [tokens[:-3]] if is_chunked else [tokens[:30], tokens[30:-3]]
    for part in (*parts, *([x] for x in tokens[-3:])):
        mx.eval(model(mx.array([part]), cache=cache))
        keep_state(cache)
    return cache


def answer(model: nn.Module, cache: list[Any], tokens: list[int]) -> np.ndarray:
    """Logits of a few steps, which write into the cache."""
    outputs = []
    for token in [*tokens, 3, 5, 7]:
        output = model(mx.array([[token]]), cache=cache)
        outputs.append(np.array(output[0, -1].astype(mx.float32)))
    return np.stack(outputs)


def kept_in(folder: Path, model: nn.Module) -> DiskPromptCache:
    return DiskPromptCache(9, None, Disk(folder, 10**8), lambda: [model, None])


@pytest.mark.parametrize("is_enabled", [True, False], ids=["compressed", "full"])
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_answers_are_those_of_the_cache_in_memory(
    tmp_path: Path, model: nn.Module, is_enabled: bool
) -> None:
    if not is_enabled:
        xkv.disable(model)
    kept = kept_in(tmp_path, model)
    kept.insert_cache("model", list(TOKENS), filled(model, TOKENS))
    prompts = [[*TOKENS, 9], [*TOKENS[:50], 201, 202], [*TOKENS[:33], 201]]
    wanted = []
    for prompt in prompts:
        found, rest = kept.fetch_nearest_cache("model", prompt)
        wanted.append((len(rest), None if found is None else answer(model, found, rest)))
    assert wanted[0][1] is not None
    kept.close()
    kept = kept_in(tmp_path, model)
    for prompt, (n_rest, logits) in zip(prompts, wanted, strict=True):
        found, rest = kept.fetch_nearest_cache("model", prompt)
        assert len(rest) == n_rest and (found is None) == (logits is None)
        if found is not None:
            assert np.array_equal(answer(model, found, rest), logits)
    assert kept.report()["disk"]["hits"] == 1
    kept.close()


@pytest.mark.parametrize("model", ["granite"], indirect=True)
def test_the_latents_of_a_shared_beginning_are_stored_once(
    tmp_path: Path, model: nn.Module
) -> None:
    kept = kept_in(tmp_path, model)
    cache = filled(model, TOKENS)
    layer = next(x for x in flatten(cache) if isinstance(x, XKVCache)).layer
    assert layer.is_compressed and layer.rows.n_segment > 32
    kept.insert_cache("model", list(TOKENS), cache)
    kept._disk.flush()
    blocks = files_of(tmp_path, BLOCK)
    edited, rest = kept.fetch_nearest_cache("model", [*TOKENS[:40], 9])
    assert edited is not None and rest == [9]
    mx.eval(model(mx.array([rest]), cache=edited))
    kept.insert_cache("model", [*TOKENS[:40], 9], edited)
    kept._disk.flush()
    # the rows that were cut off its latents are not there; 4 sinks, then 32 rows in two blocks
    added = files_of(tmp_path, BLOCK) - blocks
    assert len(added) <= 2 and kept.report()["disk"]["conversations"] == 2
    kept.close()


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_what_is_to_be_written_does_not_change_while_the_cache_goes_on(model: nn.Module) -> None:
    cache = filled(model, TOKENS)
    apart = take_apart(cache)
    form = json.loads(json.dumps(apart.form))
    before = [b"".join(x.tobytes() for x in parts) for parts in apart.blocks()]
    answer(model, cache, [11, 12, 13])
    assert [b"".join(x.tobytes() for x in parts) for parts in apart.blocks()] == before
    again = put_together(form, before)
    assert [x.offset for x in flatten(again) if hasattr(x, "offset")]
    with pytest.raises(xkv.InputError, match="a block of"):
        put_together(form, [*before[:-1], before[-1] + b"x"])
    with pytest.raises(ValueError):
        put_together(form, before[:-1])


@pytest.mark.parametrize("model", ["qwen3_next"], indirect=True)
def test_copies_to_go_back_to_are_stored_too(tmp_path: Path, model: nn.Module) -> None:
    cache = filled(model, TOKENS)
    states = states_of(cache)
    assert states
    kept = kept_in(tmp_path, model)
    kept.insert_cache("model", list(TOKENS), cache)
    kept.close()
    kept = kept_in(tmp_path, model)
    n_tokens = states[-1].n_tokens
    found, rest = kept.fetch_nearest_cache("model", [*TOKENS[: n_tokens + 2], 201])
    assert found is not None and rest == [*TOKENS[n_tokens : n_tokens + 2], 201]
    assert kept.report()["disk"]["hits"] == 1
    # nothing of it serves a prompt that leaves before the first copy
    before = [*TOKENS[: states[0].n_tokens - 1], 201]
    assert kept.fetch_nearest_cache("model", before) == (None, before)
    # once, however the conversation goes on
    blocks = files_of(tmp_path, BLOCK)
    longer, rest = kept.fetch_nearest_cache("model", [*TOKENS, 9])
    answer(model, longer, rest)
    kept.insert_cache("model", [*TOKENS, 9, 3, 5, 7], longer)
    kept.close()
    shared = files_of(tmp_path, BLOCK) & blocks
    assert {x.nbytes for x in states} <= {x.stat().st_size for x in shared}


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_draft_models_cache_goes_with_its_models(tmp_path: Path, model: nn.Module) -> None:
    models = [model, build("llama")]

    def kept_of_both() -> DiskPromptCache:
        return DiskPromptCache(9, None, Disk(tmp_path, 10**8), lambda: models)

    kept = kept_of_both()
    n_layers = len(make_prompt_cache(model))
    kept.insert_cache("model", list(TOKENS), [*filled(model, TOKENS), *filled(models[1], TOKENS)])
    found, rest = kept.fetch_nearest_cache("model", [*TOKENS, 9])
    parts = found[:n_layers], found[n_layers:]
    wanted = [answer(x, part, rest) for x, part in zip(models, parts, strict=True)]
    kept.close()
    # alone the model is another one
    alone = kept_in(tmp_path, model)
    assert alone.fetch_nearest_cache("model", [*TOKENS, 9])[0] is None
    alone.close()
    kept = kept_of_both()
    found, rest = kept.fetch_nearest_cache("model", [*TOKENS, 9])
    parts = found[:n_layers], found[n_layers:]
    for x, part, logits in zip(models, parts, wanted, strict=True):
        assert np.array_equal(answer(x, part, rest), logits)
    kept.close()


def test_chunked_layers_of_older_versions_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkedKVCache, "meta_state", ("8", "0"), raising=False)
    with pytest.raises(xkv.InputError, match="does not give a ChunkedKVCache back as it was"):
        take_apart([ChunkedKVCache(8)])


def test_layers_that_cannot_be_written_stay_in_memory_and_it_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(KVCache):
        pass

    cache = Other()
    cache.update_and_fetch(mx.ones((1, 1, 60, 4)), mx.ones((1, 1, 60, 4)))
    kept = kept_in(tmp_path, build("llama"))
    for tokens in (TOKENS, [2, *TOKENS[1:]]):
        kept.insert_cache("model", list(tokens), [copy.deepcopy(cache)])
    assert len(kept) == 2 and not files_of(tmp_path, BLOCK)
    (text,) = [x.getMessage() for x in caplog.records if "stay in memory" in x.getMessage()]
    assert "layers of the kind Other cannot be written" in text
    kept.close()
    nested = ArraysCache(size=2)
    nested[0], nested[1] = mx.ones((1, 4)), []
    with pytest.raises(xkv.InputError, match="empty states cannot be written"):
        take_apart([nested])
