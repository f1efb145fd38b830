"""Trimming and going on: every row stays within reach, at every length."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.cache.conversation import HEAD_DIM, N_KV_HEADS, Conversation
from xkv import load_backend
from xkv.checks.invariants import broken_invariants

SET = {"budget": 40}
FORMS = {"exact": {"attention": "exact"}, "set": SET}


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


def test_rows_after_an_edit_are_attended_to(backend):
    """A prompt long enough for a working set, cut to where none is used, grows again."""
    talk = Conversation(backend, rank=128, rank_k="full", rank_v="full", budget=100)
    talk.say(400)
    talk.reply(1)
    assert talk.cache.layers[0].rows.n_recent
    talk.trim_to(100)
    talk.say(110)
    talk.reply(3)
    assert broken_invariants(talk.cache) == []
    layer, (keys, values) = talk.cache.layers[0], talk.rows[0]
    assert layer.rows.n_segment > 150
    # a query for one row of the part that was merged
    query = 3 * keys[:, :, 150:151]
    scores = np.einsum("bhqd,bhkd->bhqk", query.astype(np.float64), keys) * HEAD_DIM**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), values)
    got = backend.to_numpy(layer.attend(backend.from_numpy(query), HEAD_DIM**-0.5, None))
    assert got.shape == (1, N_KV_HEADS, 1, HEAD_DIM)
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_any_length_can_be_trimmed_to(backend, options):
    talk = Conversation(backend, head_dim=64, compression=4.0, **options)
    talk.say(300)
    talk.reply(20)
    assert {16} != set(talk.cache.groups[0].keys.latent.bits)
    exact = talk.rows
    for n_kept in [*range(0, 24), *range(180, 200), 310, 319, 320]:
        fork = copy.deepcopy(talk.cache)
        for layer in fork.layers.values():
            layer.trim(layer.offset - n_kept)
        assert broken_invariants(fork) == []
        for layer_idx, layer in fork.layers.items():
            for rows, want in zip(layer.dense(), exact[layer_idx], strict=True):
                got, want = backend.to_numpy(rows), want[:, :, :n_kept]
                assert np.linalg.norm(got - want) <= 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("compression", [2.0, 3.0])
def test_a_batch_meets_the_ratio_of_one(backend, compression, options):
    for batch in (1, 3):
        talk = Conversation(backend, batch=batch, head_dim=64, compression=compression, **options)
        talk.say(1500)
        talk.reply(1)
        dense = batch * 1501 * 2 * 2 * 2 * 64 * 4
        assert talk.cache.dense_bytes() == dense
        # at the most all columns are held in 8 of 32 bits
        assert 0.98 * compression <= dense / talk.cache.held_bytes() < 4.2
        # one sequence's budget for three would lose a hundred times as much
        assert talk.error() < 0.005


def test_a_batch_is_compressed_from_the_length_on_at_which_one_prompt_is(backend):
    kinds = []
    for batch in (1, 2, 4):
        compressed = []
        for n_tokens in range(120, 420, 20):
            talk = Conversation(backend, batch=batch, head_dim=64, compression=3.0)
            talk.say(n_tokens)
            talk.reply(1)
            compressed.append(talk.cache.layers[0].is_compressed)
        kinds.append(compressed)
    assert kinds[0] == kinds[1] == kinds[2] and len(set(kinds[0])) == 2


def test_a_batch_of_another_size_is_refused(backend):
    from xkv import InputError

    talk = Conversation(backend, rank_k=12, rank_v=12)
    talk.say(30)
    layer = talk.cache.layers[0]
    rows = backend.from_numpy(np.zeros((2, N_KV_HEADS, 1, HEAD_DIM), np.float32))
    with pytest.raises(InputError, match=r"\(2, 2, 32\) cannot follow those of \(1, 2, 32\)"):
        layer.append(rows, rows, talk.spec)
    assert broken_invariants(talk.cache) == [] and layer.offset == 30
