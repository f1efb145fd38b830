"""Prefill layer by layer on PyTorch: the same cache, never dense as a whole."""

from __future__ import annotations

import copy

import pytest
import torch

import xkv
from tests.cache.machine import failing, same_state
from tests.torch_models import FAMILIES, greedy, make_model, make_prompt
from xkv import InputError

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16, "max_tail": 16, "group_size": 2}
STEP = {"step_size": 40}


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_then_generate_gives_the_tokens_of_dynamic_cache(name, caplog):
    model = make_model(name)
    prompt, mask = make_prompt(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    # one chunk of the first sequence is all padding, and one of both
    mask[0, :90] = mask[1, :45] = 0
    want = greedy(model, prompt, mask)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt, attention_mask=mask, **STEP)
    assert cache.get_seq_length() == 149 and "as they stream in" not in caplog.text
    assert all(part.is_compressed for part in cache.sequences[0].layers.values())
    assert greedy(model, prompt, mask, cache=cache) == want
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert model.config._attn_implementation == "xkv"


def test_never_holds_more_than_a_group_dense():
    model, prompt = make_model("llama", num_hidden_layers=8), make_prompt(800)
    cache, held, done = xkv.torch_cache(model, compression=4, group_size=2), [], []

    def watch(n_done, n_tokens):
        held.append(cache.held_bytes())
        done.append(n_done)

    xkv.torch_prefill(model, cache, prompt, step_size=100, on_progress=watch)
    dense = cache.dense_bytes()
    # the last group is dense while the three before it are compressed
    assert max(held) < dense * (2 / 8 * 17 / 16 + 6 / 8 / 3)
    assert cache.held_bytes() < dense / 3
    assert done == sorted(done) and done[-1] == 799


def test_later_prompt_layer_by_layer():
    model, prompt = make_model("qwen2"), make_prompt(200)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt[:, :90], **STEP)
    xkv.torch_prefill(model, cache, prompt, **STEP)
    assert greedy(model, prompt, cache=cache) == want


def test_model_that_cannot_goes_on_as_a_stream_and_says_so(caplog):
    model, prompt = make_model("llama"), make_prompt(150)
    want = greedy(model, prompt)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: (forward(*args, **kwargs),)
        layer.register_forward_hook(lambda layer, args, output: output[0])
    originals = [vars(layer)["forward"] for layer in model.model.layers]
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt, **STEP)
    assert "in segments as they stream in" in caplog.text
    assert "a layer returns more than hidden states" in caplog.text
    assert cache.sequences[0].layers[0].is_compressed
    assert greedy(model, prompt, cache=cache) == want
    assert [vars(layer)["forward"] for layer in model.model.layers] == originals


def test_list_of_other_layers_is_noticed(caplog):
    model, prompt = make_model("llama"), make_prompt(150)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))
    model.model._modules = {"vision": others, **model.model._modules}
    xkv.torch_prefill(model, cache, prompt, **STEP)
    assert "the layers that it lists are not called" in caplog.text
    assert greedy(model, prompt, cache=cache) == want


def states_of(cache):
    return [copy.deepcopy(group.state) for x in cache.sequences for group in x.groups]


@pytest.mark.parametrize("n_seen", [0, 120])
def test_out_of_memory_is_one_sentence_and_leaves_all_as_it_was(monkeypatch, n_seen):
    model, prompt = make_model("llama"), make_prompt(250)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt[:, : n_seen + 1], **STEP)
    before = states_of(cache)

    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[3].mlp, "forward", no_memory)
        with pytest.raises(InputError, match=r"ran out of memory .*2\.00 GiB\.\); the cache is as"):
            xkv.torch_prefill(model, cache, prompt, **STEP)
    assert cache.get_seq_length() == n_seen and same_state(states_of(cache), before)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    xkv.torch_prefill(model, cache, prompt, **STEP)
    assert greedy(model, prompt, cache=cache) == want


class Failure(Exception):
    """Stands in for whatever goes wrong."""


@pytest.mark.parametrize("kind", [Failure, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("is_stream", [False, True], ids=["layers", "stream"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["plain", "padded"])
def test_prefill_that_fails_anywhere_leaves_the_cache_as_it_was(kind, is_stream, is_padded):
    model, prompt = make_model("gemma3"), make_prompt(150, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, : 40 * is_padded] = 0
    want = greedy(model, prompt, mask)
    if is_stream:
        model.model.layers[0].register_forward_hook(lambda layer, args, output: (output,))
        model.model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0][0],))
    cache = xkv.torch_cache(model, **EXACT)
    layers, n_failed = list(cache.layers), 0
    for at in (1, 4, 9, 17, 30, 46, 77):
        with failing(cache.backend, at, kind) as has_failed:
            try:
                xkv.torch_prefill(model, cache, prompt, attention_mask=mask, **STEP)
            except kind:
                n_failed += 1
        if not has_failed():
            break
        assert cache.get_seq_length() == 0 and cache.held_bytes() == 0
        assert cache.padding.is_token is None and len(cache.sequences) == 1
        assert not cache.sequences[0].is_streaming and cache.layers == layers
    assert n_failed >= 4
    cache = cache if not has_failed() else xkv.torch_cache(model, **EXACT)
    assert greedy(model, prompt, mask, cache=cache) == want


def test_overflow_leaves_the_cache_as_it_was(monkeypatch):
    model, prompt = make_model("llama"), make_prompt(150)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    values = model.model.layers[2].self_attn.v_proj
    with monkeypatch.context() as patch:
        patch.setattr(values, "forward", lambda x: x.new_full((*x.shape[:2], 32), torch.nan))
        with pytest.raises(InputError, match="NaN"):
            xkv.torch_prefill(model, cache, prompt, **STEP)
    assert cache.get_seq_length() == 0 and cache.held_bytes() == 0
    xkv.torch_prefill(model, cache, prompt, **STEP)
    assert greedy(model, prompt, cache=cache) == want


def test_steps_that_count_as_decoding_are_refused():
    model = make_model("llama")
    with pytest.raises(InputError, match="step_size=16 must be above 16"):
        xkv.torch_prefill(model, xkv.torch_cache(model), make_prompt(50), step_size=16)
