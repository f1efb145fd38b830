"""The transformers cache: equal to DynamicCache at full rank."""

from __future__ import annotations

import pytest
import torch
import transformers

from xkv import InputError, XKVConfig
from xkv.backends.torch_cuda.cache import (
    ATTENTION,
    XKVLayer,
    attention_forward,
    make_cache,
    xkv_attention,
)

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16}
TINY = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-yarn": (transformers.LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "phi3": (transformers.Phi3Config, {}),
    "gemma": (transformers.GemmaConfig, {}),
}


def make_model(name: str):
    config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**TINY, **options)).eval()
    model.generation_config.eos_token_id = None
    return model.to(torch.float64)


def tokens_from(model, cache) -> list[int]:
    torch.manual_seed(1)
    prompt = torch.randint(3, 200, (1, 150))
    model(prompt[:, :-1], past_key_values=cache)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
    )
    return output[0, 150:].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_gives_the_tokens_of_dynamic_cache(name):
    model = make_model(name)
    want = tokens_from(model, transformers.DynamicCache(config=model.config))
    cache = make_cache(model, XKVConfig(group_size=2, **EXACT))
    with xkv_attention(model):
        got = tokens_from(model, cache)
    assert all(isinstance(x, XKVLayer) and x.layer.is_compressed for x in cache.layers)
    assert got == want


def test_attention_is_restored_even_after_an_error():
    model = make_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), xkv_attention(model):
        assert model.config._attn_implementation == ATTENTION
        raise RuntimeError
    assert model.config._attn_implementation == before


def test_later_turns_and_crop_are_exact():
    model = make_model("llama")
    cache = make_cache(model, XKVConfig(**EXACT))
    native = transformers.DynamicCache(config=model.config)
    torch.manual_seed(2)
    prompt = torch.randint(3, 200, (1, 150))
    with xkv_attention(model), torch.no_grad():
        for start, end in ((0, 100), (100, 101), (101, 106), (106, 150)):
            got, want = (
                model(prompt[:, start:end], past_key_values=each).logits for each in (cache, native)
            )
            torch.testing.assert_close(got, want)
        for each in (cache, native):
            each.crop(-60)
        got, want = (
            model(prompt[:, 90:91], past_key_values=each).logits for each in (cache, native)
        )
        torch.testing.assert_close(got, want)


def test_attention_without_a_mask_is_causal():
    model = make_model("llama")
    cache = make_cache(model, XKVConfig(**EXACT))
    torch.manual_seed(3)
    with xkv_attention(model), torch.no_grad():
        model(torch.randint(3, 200, (1, 100)), past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    layer, queries = cache.layers[0], torch.randn(1, 4, 3, 16, dtype=torch.float64)
    is_seen = torch.ones(3, 101, dtype=torch.bool).tril(98)
    got, want = (
        attention_forward(model, queries, layer, layer, mask)[0] for mask in (None, is_seen)
    )
    torch.testing.assert_close(got, want)
    everything, _ = attention_forward(model, queries, layer, layer, is_seen | True)
    assert not torch.allclose(got, everything)


def test_sliding_window_layers_are_refused_by_name():
    config = transformers.MistralConfig(**TINY, sliding_window=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"DynamicSlidingWindowLayer.*--group-size 0"):
        make_cache(model)


def test_rope_that_changes_with_the_length_is_refused_by_name():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**TINY, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="'dynamic' changes with the length"):
        make_cache(model)
