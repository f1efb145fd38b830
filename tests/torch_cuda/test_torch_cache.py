"""The transformers cache: ``model.generate`` as with DynamicCache at full rank."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import xkv
from tests.torch_models import FAMILIES, TINY, greedy, make_model, make_prompt
from xkv import InputError
from xkv.backends.torch_cuda.model.attention import ATTENTION, xkv_attention
from xkv.backends.torch_cuda.model.cache_layer import XKVLayer
from xkv.backends.torch_cuda.model.probe import cache_argument

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16, "max_tail": 16, "group_size": 2}
MLA = ("deepseek_v2", "deepseek_v3")


def ours(cache) -> list[XKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, XKVLayer)]


@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_gives_the_tokens_of_dynamic_cache(name):
    model, prompt = make_model(name), make_prompt(150)
    want = greedy(model, prompt, n=40)
    cache = xkv.torch_cache(model, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert greedy(model, prompt, n=40, cache=cache) == want
    layers = ours(cache)
    assert all(layer.parts[0].is_compressed for layer in layers)
    assert len(layers) == (3 if name == "gemma3" else 5)
    assert all((layer.rope is None) == (name in MLA) for layer in layers)
    assert cache.report.count("bypassed") == (5 if name in MLA else 0)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_old_name_of_the_argument_works_too():
    model, prompt = make_model("llama"), make_prompt(60)
    want = greedy(model, prompt)
    assert greedy(model, prompt, past_key_values=xkv.torch_cache(model, **EXACT)) == want


def test_streamer_gets_each_token():
    model, prompt = make_model("llama"), make_prompt(60)
    pieces = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            pieces.extend(value.flatten().tolist())

        def end(self):
            pieces.append("end")

    answer = greedy(model, prompt, cache=xkv.torch_cache(model, **EXACT), streamer=Streamer())
    assert pieces == [*prompt[0].tolist(), *answer[0], "end"]


def test_other_caches_are_as_before_under_our_attention():
    model, prompt = make_model("gemma3"), make_prompt(60, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    want = greedy(model, prompt, mask)
    xkv.torch_cache(model, **EXACT)
    assert model.config._attn_implementation == ATTENTION
    assert greedy(model, prompt, mask) == want


def test_cache_needs_our_attention():
    model, prompt = make_model("llama"), make_prompt(60)
    cache = xkv.torch_cache(model, **EXACT)
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="set to 'eager' since torch_cache was called"):
        greedy(model, prompt, cache=cache)


def test_attention_is_restored_even_after_an_error():
    model = make_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), xkv_attention(model):
        assert model.config._attn_implementation == ATTENTION
        raise RuntimeError
    assert model.config._attn_implementation == before


def test_later_turns_and_crop_are_exact():
    # another model for the reference, whose attention stays transformers'
    model, plain = (make_model("llama", torch.float64) for _ in range(2))
    prompt = make_prompt(150)
    cache = xkv.torch_cache(model, **EXACT)
    native = transformers.DynamicCache(config=model.config)
    pairs = ((model, cache), (plain, native))
    with torch.no_grad():
        for start, end in ((0, 100), (100, 101), (101, 106), (106, 150)):
            got, want = (run(prompt[:, start:end], cache=each).logits for run, each in pairs)
            torch.testing.assert_close(got, want)
        for each in (cache, native):
            each.crop(-60)
        got, want = (run(prompt[:, 90:91], cache=each).logits for run, each in pairs)
        torch.testing.assert_close(got, want)


class Watch(TorchDispatchMode):
    """Notes the operations after which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["exact", "auto"])
@pytest.mark.parametrize("n_padding", [0, 20])
def test_decode_step_never_waits_for_the_device(monkeypatch, attention, n_padding):
    model, prompt = make_model("llama"), make_prompt(400, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :n_padding] = 0
    config = {"rank_k": 40, "rank_v": 56, "budget": 32, "max_tail": 16, "window": 16}
    cache = xkv.torch_cache(model, attention=attention, **config)
    greedy(model, prompt, mask, n=21, cache=cache)  # rows were folded meanwhile
    layers = [sequence.layers[0] for sequence in cache.sequences]
    assert all(
        layer.rows.n_segment > 300 and bool(layer.rows.n_recent) == (attention == "auto")
        for layer in layers
    )
    mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
    monkeypatch.setattr(cache.backend.xp, "asarray", None)
    with torch.no_grad(), Watch() as watch:
        model(prompt[:, :1], attention_mask=mask, cache=cache)
    assert watch.waits == []


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mistral", {"sliding_window": 32}, "its layers: keeps its own DynamicSlidingWindowLayer"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "'dynamic' changes with the length"),
    ],
)  # fmt: skip
def test_what_cannot_be_compressed_is_refused_by_name(name, options, sentence):
    with pytest.raises(InputError, match=f"{sentence}.*--group-size 0"):
        xkv.torch_cache(make_model(name, **options))


def test_attention_that_computes_something_else_is_refused_by_name():
    config = transformers.Gemma2Config(**TINY, attn_logit_softcapping=5.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"Gemma2ForCausalLM uses softcap in its attention"):
        xkv.torch_cache(model)
    assert model.config._attn_implementation != ATTENTION


def test_attention_that_cannot_be_replaced_is_refused_by_name():
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=200)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="BloomForCausalLM does not let its attention be replaced"):
        xkv.torch_cache(model)


def test_keys_with_an_unknown_rotation_are_kept_as_they_are_and_it_is_said(monkeypatch, caplog):
    model, prompt = make_model("llama"), make_prompt(100)
    want = greedy(model, prompt)
    monkeypatch.setattr("xkv.backends.torch_cuda.model.probe.rope_candidates", lambda model: [])
    cache = xkv.torch_cache(model, **EXACT)
    assert caplog.text.count("LlamaForCausalLM rotates keys in a way that is not known") == 1
    assert ours(cache)[0].rope is None
    assert greedy(model, prompt, cache=cache) == want


def test_report_names_what_is_left_native():
    report = str(xkv.torch_cache(make_model("gemma3"), group_size=2).report)
    assert "layer 0: native (keeps its own DynamicSlidingWindowLayer)" in report
    assert "layer 1: compressed, with layers 1, 3" in report


def test_four_dimensional_masks_are_refused():
    model, prompt = make_model("llama"), make_prompt(20)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    with pytest.raises(InputError, match=r"attention mask of shape \(1, 1, 20, 20\)"):
        model(prompt, attention_mask=mask, cache=xkv.torch_cache(model))


def test_a_copy_made_in_inference_mode_goes_on_outside_it():
    model = make_model("llama")
    prompt = make_prompt(120)
    with torch.inference_mode():
        cache = xkv.torch_cache(model, **EXACT)
        model(prompt, **{cache_argument(model): cache})
        twin = copy.deepcopy(cache)
        model(prompt[:, :1], **{cache_argument(model): twin})
    with torch.no_grad():
        logits = [
            model(prompt[:, :2], **{cache_argument(model): each}).logits for each in (twin, cache)
        ]
    assert twin.get_seq_length() == cache.get_seq_length() + 1
    assert all(bool(x.isfinite().all()) for x in logits)
