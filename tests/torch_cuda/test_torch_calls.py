"""Calls that ``generate`` makes in its own ways, other batches, and calls that fail."""

from __future__ import annotations

import copy

import pytest
import torch

import xkv
from tests.cache.machine import same_state
from tests.torch_models import greedy, make_model, make_prompt
from xkv import InputError
from xkv.checks.invariants import broken_invariants

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16, "max_tail": 16, "group_size": 2}
DRAFTS = {
    "assistant": lambda name: {"assistant_model": make_model(name)},
    "lookup": lambda name: {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def padded_pair(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first of which is shorter, and their mask."""
    prompt = make_prompt(n_tokens, batch=2)
    mask = torch.ones_like(prompt)
    mask[0, :30] = 0
    return prompt, mask


def all_of(cache):
    """Everything that a call changes."""
    states = [group.state for x in cache.sequences for group in x.groups]
    native = [
        (layer.keys, layer.values, getattr(layer, "cumulative_length", None))
        for layer in cache.layers
        if layer.keys is not None
    ]
    return [
        copy.deepcopy(states),
        [getattr(layer, "n_rows", None) for layer in cache.layers],
        copy.deepcopy(native),
        copy.deepcopy(cache.padding.is_token),
        [cache.get_seq_length(), cache.batch_size, cache.notice],
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts_after_a_prefill_do_not_store_the_prompt_again(name, drafts):
    model, prompt = make_model(name), make_prompt(150)
    want = greedy(model, prompt, n=20)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt, step_size=40)
    assert greedy(model, prompt, n=20, cache=cache, **DRAFTS[drafts](name)) == want
    assert cache.get_seq_length() == 150 + 19


def test_prompt_that_is_held_whole_is_refused():
    model, prompt = make_model("llama"), make_prompt(60)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    model(prompt, cache=cache)
    before = all_of(cache)
    with pytest.raises(InputError, match=r"holds all 60 tokens .*crop\(-1\)"):
        greedy(model, prompt, cache=cache)
    assert same_state(all_of(cache), before)
    cache.crop(-1)
    assert greedy(model, prompt, cache=cache) == want


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 7), "covers 7 tokens, and there are 60 in the cache and 7 in the call"),
        ((2, 67), "holds 1 sequences, and the call brings 2: use cache.batch_repeat_interleave"),
    ],
)
def test_calls_that_do_not_go_on_are_refused(shape, sentence):
    model = make_model("llama")
    cache = xkv.torch_cache(model, **EXACT)
    model(make_prompt(60), cache=cache)
    before = all_of(cache)
    with pytest.raises(InputError, match=sentence):
        mask = torch.ones(shape, dtype=torch.long)
        model(make_prompt(7, batch=shape[0]), attention_mask=mask, cache=cache)
    assert same_state(all_of(cache), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_beam_search_gives_the_tokens_of_dynamic_cache(name):
    model, prompt = make_model(name), make_prompt(90, batch=2)
    want = greedy(model, prompt, n=24, num_beams=3)
    cache = xkv.torch_cache(model, **EXACT)
    assert greedy(model, prompt, n=24, num_beams=3, cache=cache) == want
    assert cache.batch_size == 6


@pytest.mark.parametrize("is_padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("options", [EXACT, {"compression": 3}], ids=["full", "bits"])
def test_repeated_and_selected_sequences_go_on_as_the_originals(options, is_padded):
    model, (prompt, mask) = make_model("llama", head_dim=32), padded_pair(300)
    mask = mask if is_padded else torch.ones_like(mask)
    cache = xkv.torch_cache(model, **options)
    xkv.torch_prefill(model, cache, prompt, attention_mask=mask)
    want = greedy(model, prompt, mask, n=8, cache=copy.deepcopy(cache))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4 and cache.sequences[0].layers[0].is_compressed
    rows = [1, 0, 1]
    # copies of one sequence share no buffer that one of them writes into
    for indices in (torch.tensor([3, 0, -1]), torch.tensor([True, False, True])):
        cache.batch_select_indices(indices)
        got = greedy(model, prompt[rows], mask[rows], n=8, cache=copy.deepcopy(cache))
        assert got == [want[i] for i in rows]
        assert not any(broken_invariants(x) for x in cache.sequences)
        rows = [1, 1]


def test_several_answers_to_one_prompt():
    model, prompt = make_model("llama"), make_prompt(90)
    want = greedy(model, prompt)
    cache = xkv.torch_cache(model, **EXACT)
    xkv.torch_prefill(model, cache, prompt)
    cache.batch_repeat_interleave(2)
    torch.manual_seed(0)
    output = model.generate(
        prompt, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=12, cache=cache
    )
    assert output[:, 90:].tolist() == want * 2


def test_what_a_batch_cannot_do_is_one_sentence():
    model = make_model("llama")
    cache = xkv.torch_cache(model, **EXACT)
    cache.batch_repeat_interleave(2)  # nothing is held yet, as with DynamicCache
    assert cache.batch_size == -1
    model(make_prompt(60, batch=2), cache=cache)
    before = all_of(cache)
    for refused, sentence in (
        (lambda: cache.batch_select_indices(torch.tensor([2])), "holds 2 sequences, numbered"),
        (lambda: cache.batch_select_indices([]), r"use cache\.reset\(\)"),
        (lambda: cache.batch_repeat_interleave(0), r"use cache\.reset\(\)"),
        (lambda: cache.offload(0), "stay on the model's device"),
        (lambda: cache.prefetch(0), "stay on the model's device"),
        (lambda: cache.crop(20), "as a negative one"),
        (lambda: cache.layers[0].reset(), "use the methods of the whole cache"),
        (lambda: cache.layers[0].reorder_cache(torch.tensor([0, 0])), "of the whole cache"),
    ):
        with pytest.raises(InputError, match=sentence):
            refused()
    assert same_state(all_of(cache), before)


@pytest.mark.parametrize("n_removed", [1, 25, 60])
def test_crop_that_a_sliding_window_has_not_kept_is_refused_before_anything_changes(n_removed):
    model, prompt = make_model("gemma3"), make_prompt(100)
    cache = xkv.torch_cache(model, **EXACT)
    model(prompt[:, :80], cache=cache)
    if n_removed > 1:
        cache.activate_past_recording()
        model(prompt[:, 80:], cache=cache)
    before = all_of(cache)
    with pytest.raises(InputError, match="layer 0 has not kept what it had"):
        cache.crop(-n_removed)
    assert same_state(all_of(cache), before)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert greedy(model, prompt, cache=cache) == greedy(model, prompt)


class Failure(Exception):
    """Stands in for whatever goes wrong."""


@pytest.mark.parametrize("kind", [Failure, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("is_padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_failed_call_is_as_if_it_had_not_been(kind, is_padded, at):
    model, (prompt, mask) = make_model("gemma3"), padded_pair(90)
    mask = mask if is_padded else torch.ones_like(mask)
    want = greedy(model, prompt, mask)
    cache = xkv.torch_cache(model, **EXACT)
    mlp = model.model.layers[at].mlp
    for n_seen in (0, 60):
        with pytest.MonkeyPatch.context() as patch:
            if n_seen:
                positions = (mask[:, :60].cumsum(-1) - 1).clamp(min=0)
                model(prompt[:, :60], attention_mask=mask[:, :60], position_ids=positions,
                      cache=cache)  # fmt: skip
            before = all_of(cache)
            patch.setattr(mlp, "forward", lambda x: (_ for _ in ()).throw(kind("it failed")))
            with pytest.raises(kind):
                greedy(model, prompt, mask, cache=cache)
        assert cache.get_seq_length() == n_seen
        cache.forget_failed_call()  # as the next call does
        assert same_state(all_of(cache), before)
    assert greedy(model, prompt, mask, cache=cache) == want
