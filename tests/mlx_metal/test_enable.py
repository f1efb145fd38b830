"""An enabled model: mlx-lm's own functions with our cache, and nothing left when disabled."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import base

import xkv
from tests.mlx_metal.enabled_model import EXACT, LOSSY, PROMPT, greedy, new_cache
from xkv import InputError
from xkv.backends.mlx_metal import XKVCache
from xkv.backends.mlx_metal.model.prefill import Prefill


def test_mlx_lm_functions_get_our_cache_and_answer_as_before(loaded, model):
    tokenizer = loaded[1]
    want = [x.token for x in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12)]
    report = xkv.enable(model, **EXACT)
    assert report.count("compressed") == 5
    assert all(type(layer) is XKVCache for layer in new_cache(model))
    got = [x.token for x in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=12)]
    assert got == want
    cache = new_cache(model)
    assert greedy(model, cache) == want
    assert all(layer.layer.is_compressed for layer in cache)


def test_disable_restores_everything(loaded, model):
    generate = mlx_lm.generate.__globals__
    before = (
        dict(vars(model)),
        [type(layer) for layer in model.layers],
        base.scaled_dot_product_attention,
        generate["generate_step"],
        globals()["generate_step"],
        dict(vars(mlx_cache)),
    )
    xkv.enable(model, **EXACT)
    assert type(model.layers[0]) is not before[1][0]
    assert generate["generate_step"] is not before[3]
    xkv.disable(model)
    after = (
        dict(vars(model)),
        [type(layer) for layer in model.layers],
        base.scaled_dot_product_attention,
        generate["generate_step"],
        globals()["generate_step"],
        dict(vars(mlx_cache)),
    )
    assert before == after
    with pytest.raises(InputError, match="not enabled"):
        xkv.disable(model)


def test_two_models_do_not_disturb_each_other(model, hybrid):
    xkv.enable(model, **EXACT)
    xkv.enable(hybrid, **EXACT)
    xkv.disable(hybrid)
    assert type(new_cache(model)[0]) is XKVCache
    cache = new_cache(model)
    greedy(model, cache)
    assert cache[0].layer.is_compressed
    assert not any(type(layer) is XKVCache for layer in new_cache(hybrid))


@pytest.mark.parametrize("option", [{"kv_bits": 4}, {"max_kv_size": 64}])
def test_what_changes_the_native_cache_is_refused(model, option):
    xkv.enable(model, **EXACT)
    with pytest.raises(InputError, match=next(iter(option)).replace("_", "-")):
        greedy(model, None, **option)


def test_layer_by_layer_prefill_changes_no_logits(model):
    """With the window longer than the prompt nothing is compressed, only the order differs."""
    native, mine = new_cache(model), None
    xkv.enable(model, **{**EXACT, "window": 500})
    mine = new_cache(model)
    results = []
    for cache in (native, mine):
        step = generate_step(mx.array(PROMPT), model, prompt_cache=cache, prefill_step_size=48)
        results.append(np.array(next(step)[1]))
    np.testing.assert_allclose(results[1], results[0], atol=5e-5)
    keys = np.array(mine[3].layer.rows.keys.rows)
    # another order of sums: 1.3e-5 was seen
    np.testing.assert_allclose(keys, np.array(native[3].keys)[:, :, : keys.shape[2]], atol=5e-5)


def test_prompt_goes_through_layer_by_layer(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    seen = []
    finish = Prefill._finish

    def note(self, layer_cache):
        finish(self, layer_cache)
        seen.append([layer.offset for layer in cache])

    monkeypatch.setattr(Prefill, "_finish", note)
    progress = []
    greedy(
        model, cache, prompt_progress_callback=lambda done, total: progress.append((done, total))
    )
    assert seen[0] == [199, 0, 0, 0, 0]
    assert seen[3] == [199] * 4 + [0]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (200, 200)


def test_groups_are_factored_before_later_layers_begin(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    cache = new_cache(model)
    states = []
    finish = Prefill._finish

    def note(self, layer_cache):
        finish(self, layer_cache)
        states.append([layer.layer.is_compressed for layer in cache])

    monkeypatch.setattr(Prefill, "_finish", note)
    greedy(model, cache)
    assert states[1] == [True, True, False, False, False]


def test_speculative_decoding_gives_the_same_tokens(loaded, model):
    draft = mlx_lm.load(str(xkv.tiny.CHECKPOINT_DIR))[0]
    vocabulary = model.args.vocab_size
    assert draft.args.vocab_size == vocabulary

    def tokens(options):
        steps = speculative_generate_step(
            mx.array(PROMPT), model, draft, max_tokens=24, num_draft_tokens=3, **options
        )
        return [int(token) for token, *_ in steps]

    want = tokens({})
    xkv.enable(model, **EXACT)
    assert tokens({}) == want
    draft_report = xkv.enable(draft, rank_k="full", rank_v="full", window=16)
    assert draft_report.count("compressed") == 8
    assert tokens({"prefill_step_size": 64}) == want
    xkv.disable(draft)


def test_prompt_that_is_interrupted_leaves_other_caches_alone(model, monkeypatch):
    xkv.enable(model, **LOSSY)
    first = new_cache(model)
    want = greedy(model, copy.deepcopy(first))
    cache = copy.deepcopy(first)
    progress = []

    def interrupt(done, total):
        progress.append(done)
        if len(progress) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, cache, prompt_progress_callback=interrupt)
    assert greedy(model, first) == want
