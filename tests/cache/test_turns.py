"""Folding: later tokens join the compressed part, and nothing that was there changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tests.cache.conversation import WIDTH, Conversation
from xkv import load_backend
from xkv.checks.invariants import broken_invariants


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


def test_replies_and_prompts_are_folded(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12)
    talk.say(200)
    talk.reply(40)
    talk.say(50)
    talk.reply(3)
    first = talk.cache.layers[0]
    assert first.rows.n_segment > 293 - 2 - 16 - 16 - 8
    # no more than sinks, window and tail are dense, but for the call that has not settled
    assert first.rows.keys.n_rows <= 2 + 16 + 16 + 8
    assert talk.error() < 1e-4


def test_full_rank_stays_exact_over_folds(backend):
    talk = Conversation(backend, rank=WIDTH, rank_k="full", rank_v="full")
    talk.say(100)
    talk.reply(150)
    assert talk.cache.layers[0].rows.n_segment > 200
    assert talk.error() < 1e-4


@pytest.mark.parametrize("form", [{"rank_k": 12, "rank_v": 12}, {"compression": 6}])
def test_later_rows_that_fit_badly_are_reported(backend, form):
    talk = Conversation(backend, topics=2, head_dim=64, **form)
    talk.say(400)
    talk.reply(60)
    assert talk.cache.notice is None
    before = talk.cache.groups[0].values
    talk.reply(60, topic=1)
    after = talk.cache.groups[0].values
    share = (after.lost - before.lost) / (after.total - before.total)
    assert "first prompt's basis badly" in talk.cache.notice
    assert f"{share:.1%}" in talk.cache.notice or "keys" in talk.cache.notice
    assert talk.error(last=60) == pytest.approx(share**0.5, rel=0.3)


def test_recent_rows_move_on_with_the_segment(backend):
    """They are its last rows, as they were computed, and more as a conversation grows."""
    talk = Conversation(backend, rank_k=12, rank_v=12, budget=100, kept_share=0.5)
    talk.say(402)
    talk.reply(1)
    first = talk.cache.layers[0]
    # half of an eighth of the rows, and 7 in the bytes of 4
    assert first.rows.n_recent == 402 * 7 // 64
    before = first.rows.recent
    talk.reply(120)
    assert first.rows.n_segment * 7 // 64 < first.rows.n_recent <= first.offset * 7 // 64
    assert broken_invariants(talk.cache) == []
    # what was held before is as it was
    assert before.n_rows == 402 * 7 // 64


@pytest.mark.parametrize(("n_queries", "n_rebuilt"), [(1, 128), (8, 128), (9, 256)])
def test_many_tokens_share_more_rows(backend, monkeypatch, n_queries, n_rebuilt):
    talk = Conversation(backend, rank_k=12, rank_v=12, budget=None, kept_share=0.9)
    talk.say(2000)
    talk.reply(1)
    counts, choose = [], type(backend).choose_rows

    def spy(worth, count):
        counts.append(count)
        return choose(backend, worth, count)

    monkeypatch.setattr(backend, "choose_rows", spy, raising=False)
    layer = talk.cache.layers[0]
    assert layer.rows.n_recent > 352 - 128
    heads = layer.rows.keys.rows.shape[1]
    layer.attend(backend.normal((1, 2 * heads, n_queries, 32), 0), 0.2, None)
    assert counts == [n_rebuilt]


@pytest.mark.parametrize("n_trimmed", [5, 30, 60, 120, 290])
@pytest.mark.parametrize("attention", ["auto", "exact"])
def test_trim_reaches_every_part(backend, n_trimmed, attention):
    talk = Conversation(backend, rank_k=12, rank_v=12, attention=attention, kept_share=0.5)
    talk.say(250)
    talk.reply(50)
    for layer in talk.cache.layers.values():
        assert layer.trim(n_trimmed) == n_trimmed
        assert layer.offset == 300 - n_trimmed
    assert talk.error() < 1e-4 and broken_invariants(talk.cache) == []


def test_recent_rows_that_are_cut_off_are_gone(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12, kept_share=0.5, budget=80)
    talk.say(402)
    talk.reply(1)
    first = talk.cache.layers[0]
    n_stored = first.offset - first.rows.n_tail
    for n_left, n_recent in ((395, 43), (380, 43 - (n_stored - 380)), (300, 0), (20, 0)):
        talk.trim_to(n_left)
        assert talk.cache.layers[0].rows.n_recent == n_recent
        assert broken_invariants(talk.cache) == []
        assert talk.error() < 1e-4
    talk.reply(150)
    # as many as came since
    assert talk.cache.layers[0].rows.n_recent > 10
    assert broken_invariants(talk.cache) == []


def test_recent_rows_of_other_rows_are_noticed(backend):
    """By the invariants that every sequence of the state machine ends with."""
    talk = Conversation(backend, rank=WIDTH, rank_k="full", rank_v="full", budget=100)
    talk.say(402)
    talk.reply(1)
    layer = talk.cache.layers[0]
    rows, recent = layer.rows, layer.rows.recent
    shifted = backend.xp.roll(recent.numbers, 1, axis=2)
    faults = {
        "those of other rows": recent._replace(numbers=shifted),
        "recent numbers and scales": recent._replace(scales=recent.scales[:, :, :-1]),
    }
    for sentence, fault in faults.items():
        layer.rows = rows._replace(recent=fault)
        assert any(sentence in x for x in broken_invariants(talk.cache)), sentence
    layer.rows = rows._replace(n_segment=rows.n_segment - 1)
    assert any("those of other rows" in x for x in broken_invariants(talk.cache))
    layer.rows = rows
    assert broken_invariants(talk.cache) == []


def test_a_latent_trimmed_to_less_than_half_is_freed(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12)
    talk.say(402)
    talk.reply(1)
    group = talk.cache.groups[0]
    before = sum(x.nbytes for x in group.arrays())
    talk.trim_to(102)
    talk.reply(1)
    assert sum(x.nbytes for x in group.arrays()) < 0.5 * before
    assert talk.error() < 1e-4


def test_a_copy_shares_the_factors_and_goes_its_own_way(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12, budget=1024)
    talk.say(200)
    talk.reply(20)
    fork = copy.deepcopy(talk.cache)
    before = talk.cache.groups[0].keys
    talk.reply(60)
    assert fork.layers[0].offset == 220
    assert fork.groups[0].keys.latent.shape == before.latent.shape
    after = talk.cache.groups[0].keys.latent.rows(0, before.latent.shape[1])
    for mine, its in zip(after.arrays, fork.groups[0].keys.arrays, strict=True):
        np.testing.assert_array_equal(talk.backend.to_numpy(mine), talk.backend.to_numpy(its))


def test_a_conversation_that_was_too_short_is_compressed_when_it_has_grown(backend):
    talk = Conversation(backend, compression=2, latent_bits=16)
    talk.say(40)
    talk.reply(4)
    assert talk.cache.notice is not None
    talk.reply(500)
    assert talk.cache.notice is None
    assert talk.cache.layers[0].is_compressed
    assert talk.error() < 1e-4
