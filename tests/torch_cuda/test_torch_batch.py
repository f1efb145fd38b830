"""Batches with left padding: each sequence gets what it gets alone."""

from __future__ import annotations

import pytest
import torch

import xkv
from tests.torch_models import FAMILIES, greedy, make_model, make_prompt
from xkv import InputError

EXACT = {"rank_k": "full", "rank_v": "full", "window": 16, "max_tail": 16, "group_size": 2}
RANKS = {"rank_k": 40, "rank_v": 56, "window": 16, "max_tail": 16}
COMPRESSED = {
    "exact": {**RANKS, "attention": "exact"},
    "set": {**RANKS, "budget": 32},
}
SHARED = ({"compression": 4}, {"compression": 3, "group_size": 8}, {"compression": 2})
LENGTHS = (130, 40, 97)


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts ``[1, L]`` as one batch, padded on the left, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    rows = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for i, prompt in enumerate(prompts):
        rows[i, longest - prompt.shape[1] :] = prompt
        mask[i, longest - prompt.shape[1] :] = 1
    return rows, mask


def prompts_of(lengths=LENGTHS) -> list[torch.Tensor]:
    return [make_prompt(n, seed=n) for n in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batch_at_full_rank_gives_each_sequence_its_own_tokens(name):
    model = make_model(name)
    alone = [greedy(model, prompt, n=24)[0] for prompt in prompts_of()]
    cache = xkv.torch_cache(model, **EXACT)
    assert greedy(model, *padded(prompts_of()), n=24, cache=cache) == alone
    assert len(cache.sequences) == 3


@pytest.mark.parametrize("form", COMPRESSED)
def test_padded_batch_is_compressed_as_each_sequence_alone(form):
    model, config = make_model("llama"), COMPRESSED[form]
    lengths = (400, 250, 330)
    alone, held = [], 0
    for prompt in prompts_of(lengths):
        cache = xkv.torch_cache(model, **config)
        alone += greedy(model, prompt, cache=cache)
        held += cache.held_bytes()
    batch = xkv.torch_cache(model, **config)
    assert greedy(model, *padded(prompts_of(lengths)), cache=batch) == alone
    layers = [sequence.layers[0] for sequence in batch.sequences]
    assert all(layer.is_compressed for layer in layers)
    assert all(bool(layer.rows.n_recent) == (form == "set") for layer in layers)
    assert batch.held_bytes() == held


def test_batch_without_padding_shares_one_cache():
    model, prompt = make_model("llama"), make_prompt(130, batch=2)
    alone = [greedy(model, row[None], n=24)[0] for row in prompt]
    cache = xkv.torch_cache(model, **EXACT)
    assert greedy(model, prompt, n=24, cache=cache) == alone
    assert len(cache.sequences) == 1


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_batch_without_padding_is_compressed_as_much_as_one_sequence(options):
    model, prompt = make_model("llama", head_dim=32, num_hidden_layers=8), make_prompt(700, 4)
    ratios = []
    for rows in (prompt[:1], prompt[1:2], prompt[:2], prompt):
        cache = xkv.torch_cache(model, **options)
        xkv.torch_prefill(model, cache, rows)
        dense = len(rows) * 8 * 699 * 2 * 2 * 32 * 4
        assert cache.dense_bytes() == dense
        ratios.append(dense / cache.held_bytes())
    asked = options["compression"]
    assert ratios == pytest.approx([asked] * 4, rel=0.03)
    assert ratios[2:] == pytest.approx([sum(ratios[:2]) / 2] * 2, rel=0.02)


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_short_batch_is_compressed_exactly_where_one_prompt_is(options):
    model, found = make_model("llama", head_dim=32), {}
    for batch in (1, 3):
        for n_tokens in range(30, 690, 110):
            rows = make_prompt(n_tokens, batch)
            cache = xkv.torch_cache(model, **options)
            model(rows, cache=cache, logits_to_keep=1)
            model(rows[:, :1], cache=cache)
            is_compressed = cache.sequences[0].layers[0].is_compressed
            found.setdefault(batch, []).append(is_compressed)
    assert found[1] == found[3]
    assert False in found[1] and True in found[1]


def test_later_turn_with_padding_of_its_own_and_crop():
    model, first, second = make_model("llama"), prompts_of((60, 90)), prompts_of((30, 7))
    alone = [greedy(model, torch.cat(turns, 1))[0] for turns in zip(first, second, strict=True)]
    (rows, mask), (more, more_mask) = padded(first), padded(second)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = xkv.torch_cache(model, **EXACT)
    model(rows, attention_mask=mask, position_ids=positions, cache=cache)
    both, both_mask = torch.cat([rows, more], 1), torch.cat([mask, more_mask], 1)
    assert greedy(model, both, both_mask, cache=cache) == alone
    cache.crop(-(more.shape[1] + 11))
    assert [sequence.layers[0].offset for sequence in cache.sequences] == [60, 90]
    assert greedy(model, both, both_mask, cache=cache) == alone


def test_padding_after_a_shared_compression_is_refused():
    model, prompt = make_model("llama"), make_prompt(130, batch=2)
    cache = xkv.torch_cache(model, **EXACT)
    greedy(model, prompt, cache=cache)
    rows = torch.cat([prompt, make_prompt(40, batch=2)], 1)
    mask = torch.ones_like(rows)
    mask[0, 145:150] = 0
    with pytest.raises(InputError, match="begin with a new cache"):
        greedy(model, rows, mask, cache=cache)
