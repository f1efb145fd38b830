"""Models of mlx-vlm: text and image prompts on compressed caches; where mlx-vlm is installed."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed; see CONTRIBUTING.md")

import mlx_vlm
from mlx_vlm import prompt_utils
from mlx_vlm.generate import ar, dispatch
from mlx_vlm.generate.common import PromptCacheState
from mlx_vlm.models import base
from mlx_vlm.models.cache import KVCache, make_prompt_cache

import xkv
from tests.docs.pages import ROOT, blocks_of
from tests.mlx_metal.vlm_models import CONFIGS, Processor, build, image_prompt, text_prompt
from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal import XKVCache, attention_seam
from xkv.backends.mlx_metal import make_prompt_cache as our_prompt_cache
from xkv.backends.mlx_metal.model.enabled import enabled_state

EXACT = {"rank_k": "full", "rank_v": "full", "group_size": 2, "window": 16, "max_tail": 16}
MROPE = ("qwen2_5_vl", "qwen3_vl")
PAGE = ROOT / "docs" / "vlm.md"


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in CONFIGS}


@pytest.fixture
def enabled(models):
    """Enables a model by its name until the test ends."""
    names = []

    def enable(name, **options):
        xkv.enable(models[name], **options)
        names.append(name)
        return models[name]

    yield enable
    for name in {*names}:
        if enabled_state(models[name].language_model) is not None:
            xkv.disable(models[name])


def answer(model, prompt, cache=None, n_tokens=12, **options):
    """Greedy tokens and their log probabilities ``[L, vocabulary]``, and the cache."""
    tokens, image = prompt
    cache = cache or make_prompt_cache(model.language_model)
    options = {**image, "prefill_step_size": 64, **options}
    pixels = options.pop("pixel_values", None)
    ids = mx.array([tokens])
    steps = ar.generate_step(
        ids, model, pixels, mx.ones_like(ids), max_tokens=n_tokens, prompt_cache=cache, **options
    )
    tokens, logprobs = zip(*steps, strict=True)
    return list(tokens), np.array(mx.stack(logprobs)), cache


def ours(cache):
    return [layer for layer in cache if type(layer) is XKVCache]


@pytest.mark.parametrize("step_size", [2048, 64])
@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_form_answers_as_the_full_cache(name, kind, step_size, models, enabled, monkeypatch):
    prompt = text_prompt() if kind == "text" else image_prompt(name)
    want, want_logprobs, full = answer(models[name], prompt, prefill_step_size=step_size)
    model = enabled(name, **EXACT)
    attended, attend = [], XKVCache.attend
    monkeypatch.setattr(
        XKVCache, "attend", lambda self, *args: attended.append(self) or attend(self, *args)
    )
    got, logprobs, cache = answer(model, prompt, prefill_step_size=step_size)
    n_full = sum(type(layer) is KVCache for layer in full) or len(full)
    assert len(ours(cache)) == n_full == len({id(x) for x in attended})
    assert all(layer.layer.is_compressed for layer in ours(cache))
    assert got == want
    np.testing.assert_allclose(logprobs, want_logprobs, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_cache_of_a_model_that_is_not_enabled_is_right_too(name, models):
    """Whether mlx-lm's models reach our attention or not, this one's do not."""
    prompt = image_prompt(name)
    want, want_logprobs, _ = answer(models[name], prompt)
    with attention_seam():
        cache = our_prompt_cache(models[name], XKVConfig(**EXACT))
        got, logprobs, _ = answer(models[name], prompt, cache)
    assert all(layer.layer.is_compressed for layer in ours(cache))
    assert got == want
    np.testing.assert_allclose(logprobs, want_logprobs, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_lossy_form_holds_about_an_eighth(name, enabled):
    prompt = image_prompt(name, 1500)
    model = enabled(name, compression=8, group_size=4, window=16, max_tail=16)
    _, logprobs, cache = answer(model, prompt, prefill_step_size=2048)
    layers = ours(cache)
    dense = sum(layer.layer.dense_bytes for layer in layers)
    assert sum(layer.nbytes for layer in layers) < dense / 6
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("name", MROPE)
def test_keys_of_a_text_are_stored_without_their_rotation(name):
    """Keys that are all the same but for their rotation have rank one once it is undone."""
    model, prompt = build(name), text_prompt()
    for layer in model.language_model.layers:
        projection = nn.Linear(64, 32)
        projection.weight, projection.bias = mx.zeros((32, 64)), mx.random.normal((32,))
        layer.self_attn.k_proj = projection
    want, want_logprobs, _ = answer(model, prompt)
    xkv.enable(model, **{**EXACT, "rank_k": 1})
    got, logprobs, cache = answer(model, prompt)
    assert cache[0].layer.is_compressed
    assert got == want
    np.testing.assert_allclose(logprobs, want_logprobs, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_enabling_leaves_no_positions_and_disabling_nothing(name, models):
    model = models[name].language_model

    def everything():
        return (
            {**model},
            {**vars(model)},
            [type(layer) for layer in model.layers],
            ar.generate_step,
            dispatch.generate_step,
            base.scaled_dot_product_attention,
        )

    before = everything()
    xkv.enable(models[name], **EXACT)
    changed = {"_xkv", "make_cache"}
    now = everything()
    assert now[0].keys() == before[0].keys()
    assert {key: x for key, x in now[1].items() if key not in changed} == before[1]
    assert now[3] is now[4] is not before[3]
    xkv.disable(models[name])
    after = everything()
    assert all(after[0][key] is x for key, x in before[0].items())
    assert after[1:] == before[1:]


def test_model_and_its_language_model_are_the_same(models, enabled):
    model = enabled("llava", **EXACT)
    assert enabled_state(model.language_model).plan.name == "llava"
    xkv.enable(model.language_model, compression=4)
    assert enabled_state(model.language_model).plan.config.compression == 4
    xkv.disable(model.language_model)
    with pytest.raises(InputError, match="not enabled"):
        xkv.disable(model)


@pytest.mark.parametrize("name", [*MROPE, "llava"])
def test_a_conversation_goes_on_from_its_image(name, models, enabled):
    tokens, image = image_prompt(name)

    def talk(model):
        state, said = PromptCacheState(), []
        for history in (tokens, [*tokens, 7, 8, 9]):
            history = history + said
            results = dispatch.stream_generate(
                model,
                Processor(),
                "",
                input_ids=mx.array([history]),
                prompt_cache_state=state,
                max_tokens=10,
                **image,
            )
            results = list(results)
            said = results[-1].token_ids
        return said, results[-1].cached_tokens, state.cache

    want, n_cached, _ = talk(models[name])
    said, n_held, cache = talk(enabled(name, **EXACT))
    assert (said, n_held) == (want, n_cached)
    assert n_held >= len(tokens)
    assert len(ours(cache)) == 4


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"kv_bits": 4}, "kv_bits"),
        ({"max_kv_size": 64}, "max_kv_size"),
        ({"draft_model": nn.Linear(1, 1)}, "draft_model"),
        ({"prompt_cache_checkpoint": print}, "apc_manager"),
    ],
)
def test_what_changes_the_native_cache_is_refused(option, named, enabled):
    model = enabled("llava", **EXACT)
    with pytest.raises(InputError, match=f"^{named} does not go with"):
        answer(model, text_prompt(), **option)


def test_batches_are_refused(models, enabled):
    make = ar._make_cache
    assert len(make(models["llava"].language_model, [0, 0])) == 4
    model = enabled("llava", **EXACT)
    with pytest.raises(InputError, match="batches"):
        ar._make_cache(model.language_model, [0, 0])
    assert len(ar._make_cache(models["gemma3"].language_model, [0, 0])) == 8


def test_a_cache_of_another_model_is_refused(models, enabled):
    cache = make_prompt_cache(enabled("llava", **EXACT).language_model)
    model = enabled("qwen3_vl", **EXACT)
    with pytest.raises(InputError, match="another model"):
        answer(model, text_prompt(), cache)


def test_a_prompt_that_fails_leaves_the_cache_as_it_was(enabled, monkeypatch):
    model, prompt = enabled("llava", **EXACT), text_prompt()
    cache = answer(model, prompt)[2]
    n_tokens, attend, calls = cache[0].offset, XKVCache.attend, []

    def fails(self, *args):
        calls.append(self)
        if len(calls) > 2:
            raise MemoryError
        return attend(self, *args)

    monkeypatch.setattr(XKVCache, "attend", fails)
    with pytest.raises(MemoryError):
        answer(model, prompt, cache)
    assert {layer.offset for layer in cache} == {n_tokens}


def test_example_of_the_documentation(monkeypatch):
    (example,) = [x.text for x in blocks_of(PAGE.read_text()) if x.language == "py"]
    model, caches = build("qwen3_vl"), []

    def generate(model, processor, prompt, image):
        caches.append(answer(model, text_prompt())[2])
        return SimpleNamespace(text="")

    monkeypatch.setattr(mlx_vlm, "load", lambda path: (model, Processor()))
    monkeypatch.setattr(mlx_vlm, "generate", generate)
    monkeypatch.setattr(prompt_utils, "apply_chat_template", lambda *args, **options: "")
    exec(example, {})
    assert len(ours(caches[0])) == 4
    assert enabled_state(model.language_model) is None


def test_models_without_a_language_model_are_told(models):
    with pytest.raises(InputError, match=r"^llava of mlx-vlm has no language model"):
        xkv.enable(models["llava"].vision_tower)


def test_a_layer_that_comes_again_has_two_caches():
    model, prompt = build("llava"), text_prompt()
    model.language_model.model.layers[2] = model.language_model.model.layers[0]
    want, want_logprobs, _ = answer(model, prompt)
    xkv.enable(model, **EXACT)
    got, logprobs, cache = answer(model, prompt)
    assert len(ours(cache)) == 4
    assert got == want
    np.testing.assert_allclose(logprobs, want_logprobs, atol=2e-4)
    xkv.disable(model)


def test_an_unknown_rotation_is_told(monkeypatch):
    class OddRoPE(nn.RoPE):
        pass

    OddRoPE.__module__ = "mlx_vlm.models.odd.language"
    model = build("llava")
    for layer in model.language_model.layers:
        layer.self_attn.rope.__class__ = OddRoPE
    with pytest.raises(InputError, match="OddRoPE is not known"):
        xkv.enable(model, **EXACT)
    assert make_prompt_cache(model.language_model)[0].offset == 0
    assert not hasattr(model.language_model, "_xkv")
