"""What a compressed cache cannot do of what mlx-lm offers is refused in one sentence, first."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as mlx_cache
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

import xkv
from tests.architectures import build
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError
from xkv.backends.mlx_metal import XKVCache
from xkv.backends.mlx_metal.model.prefill import Prefill

EXACT = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 16, "max_tail": 32}
PROMPT = np.random.default_rng(0).integers(3, 250, 100).tolist()
GENERATE = sys.modules["mlx_lm.generate"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])
    return mlx_lm.load(str(folder))


@pytest.fixture
def model(loaded):
    xkv.enable(loaded[0], **EXACT)
    yield loaded[0]
    if hasattr(loaded[0], "_xkv"):
        xkv.disable(loaded[0])


@pytest.fixture
def make():
    """Builds models, which are disabled at the end."""
    models = []
    yield lambda name: models.append(build(name)) or models[-1]
    for model in models:
        if hasattr(model, "_xkv"):
            xkv.disable(model)


@pytest.fixture
def draft(tmp_path):
    """A draft model for ``model``, with its vocabulary."""
    small = {**ARCHITECTURES["qwen2"], "num_hidden_layers": 3}
    model = mlx_lm.load(str(write_checkpoint(tmp_path / "draft", small)))[0]
    yield model
    if hasattr(model, "_xkv"):
        xkv.disable(model)


def speculate(model, draft, n_tokens=12, **options) -> list[int]:
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=n_tokens, num_draft_tokens=3, **options
    )
    return [token for token, *_ in steps]


def is_sentence(error) -> bool:
    text = str(error.value)
    return "\n" not in text and "XKVCache" not in text and "class" not in text


def test_prompts_of_both_models_go_through_layer_by_layer(model, draft, monkeypatch):
    called = []
    run = Prefill.run
    monkeypatch.setattr(
        Prefill, "run", lambda self, *args: called.append(len(self.caches)) or run(self, *args)
    )
    want = [token for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=12)]
    called.clear()
    assert speculate(model, draft) == want
    assert called == [5] * 5
    xkv.enable(draft, **EXACT)
    called.clear()
    cache = [x for each in (model, draft) for x in make_prompt_cache(each)]
    assert speculate(model, draft, prompt_cache=cache, prefill_step_size=30) == want
    assert called == [5] * 5 + [3] * 3
    assert all(layer.layer.is_compressed for layer in cache)
    xkv.disable(model)
    called.clear()
    assert speculate(model, draft) == want
    assert called == [3] * 3


def test_no_layer_has_the_whole_prompt_dense(model, draft, monkeypatch):
    held = []
    finish = Prefill._finish

    def note(self, cache):
        finish(self, cache)
        held.append([x.layer.is_compressed for x in self.caches])

    monkeypatch.setattr(Prefill, "_finish", note)
    speculate(model, draft)
    assert held[1] == [True, True, False, False, False]


def test_a_later_turn_with_a_draft(model, draft):
    """Cache and tokens are those of a conversation without one."""
    xkv.enable(draft, **EXACT)
    cache = [x for each in (model, draft) for x in make_prompt_cache(each)]
    alone = make_prompt_cache(model)
    for _ in range(2):
        got = speculate(model, draft, prompt_cache=cache)
        options = {"max_tokens": 12, "prompt_cache": alone}
        assert got == [token for token, _ in generate_step(mx.array(PROMPT), model, **options)]
        n_tokens = min(x.offset for x in (*cache, *alone))
        for each in (cache, alone):
            for layer in each:
                layer.trim(layer.offset - n_tokens)


def test_models_with_more_caches_than_layers(make):
    pytest.importorskip("mlx_lm.models.nanbeige", reason="since mlx-lm 0.32")
    target, draft = make("nanbeige"), make("qwen2")
    assert len(make_prompt_cache(target)) > len(target.layers)
    want = [token for token, _ in generate_step(mx.array(PROMPT[:20]), target, max_tokens=6)]
    xkv.enable(target, **EXACT)
    cache = [x for each in (target, draft) for x in make_prompt_cache(each)]
    for prompt_cache in (None, cache):
        steps = speculative_generate_step(
            mx.array(PROMPT[:20]), target, draft, max_tokens=6, prompt_cache=prompt_cache
        )
        assert [token for token, *_ in steps] == want


@pytest.mark.parametrize("side", ["model", "draft", "both"])
def test_quantized_caches_are_refused_with_a_draft(model, draft, side):
    if side != "model":
        xkv.enable(draft, **EXACT)
    if side == "draft":
        xkv.disable(model)
    with pytest.raises(InputError, match="--kv-bits changes") as error:
        speculate(model, draft, kv_bits=4)
    assert is_sentence(error)


def test_draft_cache_that_is_missing_is_told(model, draft):
    with pytest.raises(InputError, match=r"has 5 layers, and the two models have 5 and 3") as error:
        speculate(model, draft, prompt_cache=make_prompt_cache(model))
    assert is_sentence(error)


def test_so_many_drafts_that_they_look_like_a_prompt(model, draft):
    steps = speculative_generate_step(mx.array(PROMPT), model, draft, num_draft_tokens=16)
    with pytest.raises(InputError, match="16 draft tokens at a time are too many"):
        next(steps)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "llama4"])
def test_drafts_past_a_window_are_refused(name, make):
    target, draft = make(name), make("qwen2")
    prompt = mx.array(PROMPT[:4])
    plain = [token for token, _ in generate_step(prompt, target, max_tokens=3)]
    for each in (target, draft):
        xkv.enable(each, **EXACT)
    window = min(
        getattr(x, "max_size", None) or getattr(x, "chunk_size", None) or 1000
        for x in make_prompt_cache(target)
    )
    assert 7 < window <= 112
    for pair in ((target, draft), (draft, target)):
        with pytest.raises(InputError, match=f"window of {window} tokens cannot take") as error:
            speculate(*pair)
        assert is_sentence(error)
        with pytest.raises(InputError, match="an answer without end would fill it"):
            speculate(*pair, n_tokens=-1)
    if name != "llama4":  # whose chunks cannot be trimmed at all before mlx-lm 0.32
        steps = speculative_generate_step(prompt, target, draft, max_tokens=3)
        assert [token for token, *_ in steps] == plain


def test_drafts_for_a_state_are_refused(make):
    target, draft = make("qwen3_next"), make("qwen2")
    xkv.enable(target, **EXACT)
    with pytest.raises(InputError, match="a layer's state cannot take drafts back") as error:
        speculate(target, draft)
    assert is_sentence(error)


def test_largest_size_of_a_cache_is_refused(model):
    for make in (make_prompt_cache, mlx_cache.make_prompt_cache):
        assert type(make(model)[0]) is type(make(model, None)[0]) is XKVCache
        for options in ({"max_kv_size": 64}, {"max_kv_size": 100_000}):
            with pytest.raises(InputError, match="--max-kv-size changes"):
                make(model, **options)
        with pytest.raises(InputError, match="--max-kv-size changes"):
            make(model, 64)
    xkv.disable(model)
    assert type(make_prompt_cache(build("qwen2"), 64)[0]) is mlx_cache.RotatingKVCache


def test_mlx_lm_is_as_before_when_disabled(loaded, model, draft):
    assert speculative_generate_step is GENERATE.speculative_generate_step
    xkv.disable(model)
    for function in (
        generate_step,
        speculative_generate_step,
        make_prompt_cache,
        BatchGenerator.insert_segments,
    ):
        assert "mlx_lm" in function.__code__.co_filename
    assert len(speculate(model, draft, kv_bits=4, quantized_kv_start=5000)) == 12
