"""Folding: later tokens join the compressed part, and nothing that was there changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from xkv import RopeSpec, XKVConfig, load_backend
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.settling import fresh_bytes

SPEC = RopeSpec.standard(32, 10_000.0)
N_LAYERS, N_KV_HEADS, HEAD_DIM = 2, 2, 32
WIDTH = N_LAYERS * N_KV_HEADS * HEAD_DIM


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


class Conversation:
    """A cache fed with rows of a given rank, and what the full cache would hold."""

    def __init__(self, backend, topics=2, rank=12, **options) -> None:
        options = {"budget": 64, **options}
        config = XKVConfig(group_size=2, sinks=2, window=16, max_tail=16, **options)
        self.backend = backend
        self.cache = LowRankCache(backend, config, [[0, 1]])
        self.generator = np.random.default_rng(0)
        # one basis a topic: rows of a later topic do not fit the basis of the first
        self.bases = self.generator.standard_normal((topics, 2, rank, WIDTH))
        self.rows = [[[], []] for _ in range(N_LAYERS)]

    def say(self, n_tokens: int, topic: int = 0) -> None:
        weights = self.generator.standard_normal((2, n_tokens, self.bases.shape[2]))
        flat = (weights @ self.bases[topic]).reshape(2, n_tokens, N_LAYERS, N_KV_HEADS, HEAD_DIM)
        for layer_idx, layer in self.cache.layers.items():
            keys, values = (
                self.backend.from_numpy(x[None, :, layer_idx].swapaxes(1, 2).astype(np.float32))
                for x in flat
            )
            keys = self.backend.rope(keys, layer.offset, SPEC)
            layer.append(keys, values, SPEC)
            for kept, rows in zip(self.rows[layer_idx], (keys, values), strict=True):
                kept.append(self.backend.to_numpy(rows))

    def reply(self, n_tokens: int, topic: int = 0) -> None:
        for _ in range(n_tokens):
            self.say(1, topic)

    def error(self, last: int | None = None) -> float:
        """Largest relative error of the rebuilt keys and values (of the last rows)."""
        errors = []
        for layer_idx, layer in self.cache.layers.items():
            for got, kept in zip(layer.dense(), self.rows[layer_idx], strict=True):
                want = np.concatenate(kept, axis=2)[..., : layer.offset, :]
                got = self.backend.to_numpy(got)
                assert got.shape == want.shape
                first = 0 if last is None else layer.offset - last
                difference = np.linalg.norm((got - want)[..., first:, :])
                errors.append(difference / np.linalg.norm(want[..., first:, :]))
        return max(errors)


def test_replies_and_prompts_are_folded(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12)
    talk.say(200)
    talk.reply(40)
    talk.say(50)
    talk.reply(3)
    first = talk.cache.layers[0]
    assert first.rows.n_segment + first.rows.n_recent > 293 - 2 - 16 - 16 - 8
    # no more than sinks, window and tail are dense, but for the call that has not settled
    assert first.rows.keys.n_rows <= 2 + 16 + 16 + 8
    assert talk.error() < 1e-4


def test_full_rank_stays_exact_over_folds(backend):
    talk = Conversation(backend, rank=WIDTH, rank_k="full", rank_v="full")
    talk.say(100)
    talk.reply(150)
    assert talk.cache.layers[0].rows.n_recent > 60
    assert talk.error() < 1e-4


def test_basis_grows_for_a_new_topic_only(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12, budget=1024)
    talk.say(200)
    talk.reply(60)
    group = talk.cache.groups[0]
    before = group.keys
    assert before.rank == 12
    talk.reply(60, topic=1)
    assert 12 < group.keys.rank <= 24
    assert group.keys.latent is before.latent
    assert talk.error(last=60) < 1e-4


def test_growth_is_paid_out_of_what_a_fresh_compression_holds(backend):
    talk = Conversation(backend, topics=3, rank=40, compression=2)
    talk.say(600)
    for topic in (1, 2, 1, 2):
        talk.reply(60, topic)
        group, first = talk.cache.groups[0], talk.cache.layers[0]
        n_rows = first.rows.n_segment + first.rows.n_recent
        fresh = fresh_bytes(talk.cache.config, talk.cache.shape, 0, group.state, n_rows)
        assert group.keys.nbytes + group.values.nbytes <= fresh


def test_recent_rows_join_the_segment_beyond_the_budget(backend):
    talk = Conversation(backend, rank_k=24, rank_v=24)
    talk.say(200)
    talk.reply(70, topic=1)
    n_segment = talk.cache.layers[0].rows.n_segment
    talk.reply(50, topic=1)
    first = talk.cache.layers[0]
    assert first.rows.n_segment > n_segment
    assert talk.error() < 1e-4


def test_landmarks_grow_with_the_segment(backend):
    talk = Conversation(
        backend, rank_k=12, rank_v=12, attention="selective", outlier_chunks=2, landmark_bits=16
    )
    talk.say(402)
    talk.reply(120)
    first = talk.cache.layers[0]
    assert first.rows.n_segment > 384
    assert first.landmarks.n_chunks * 8 == first.rows.n_segment
    keys = talk.backend.to_numpy(first.dense()[0])[..., 2 : 2 + first.rows.n_segment, :]
    means = keys.reshape(1, N_KV_HEADS, -1, 8, HEAD_DIM).mean(axis=3)
    got = talk.backend.to_numpy(first.landmarks.arrays[0])
    np.testing.assert_allclose(got, means, atol=1e-3)


@pytest.mark.parametrize("n_trimmed", [5, 30, 60, 120, 290])
@pytest.mark.parametrize("attention", ["dense", "selective"])
def test_trim_reaches_every_part(backend, n_trimmed, attention):
    talk = Conversation(backend, rank_k=12, rank_v=12, attention=attention, outlier_chunks=2)
    talk.say(250)
    talk.reply(50)
    for layer in talk.cache.layers.values():
        assert layer.trim(n_trimmed) == n_trimmed
        assert layer.offset == 300 - n_trimmed
    assert talk.error() < 1e-4


def test_trim_keeps_selecting(backend):
    talk = Conversation(
        backend, rank_k=12, rank_v=12, attention="selective", outlier_chunks=2, landmark_bits=16
    )
    talk.say(402)
    talk.reply(1)
    for layer in talk.cache.layers.values():
        layer.trim(101)
    first = talk.cache.layers[0]
    assert first.rows.n_segment % 8 == 0
    assert first.landmarks.n_chunks * 8 == first.rows.n_segment
    assert not talk.backend.to_numpy(first.landmarks.is_outlier).any()
    assert first.rows.n_outlier_rows == 0


def test_a_latent_trimmed_to_less_than_half_is_freed(backend):
    talk = Conversation(backend, rank_k=12, rank_v=12)
    talk.say(402)
    talk.reply(1)
    before = talk.cache.held_bytes()
    for layer in talk.cache.layers.values():
        layer.trim(301)
    talk.rows = [[[np.concatenate(x, axis=2)[:, :, :102]] for x in kept] for kept in talk.rows]
    talk.reply(1)
    assert talk.cache.held_bytes() < 0.5 * before
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
    assert talk.cache.groups[0].keys.latent is before.latent


def test_a_conversation_that_was_too_short_is_compressed_when_it_has_grown(backend):
    talk = Conversation(backend, compression=2, latent_bits=16)
    talk.say(40)
    talk.reply(4)
    assert talk.cache.notice is not None
    talk.reply(500)
    assert talk.cache.notice is None
    assert talk.cache.layers[0].is_compressed
    assert talk.error() < 1e-4
