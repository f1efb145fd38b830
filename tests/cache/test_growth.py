"""Later turns on other topics: bases grow and merge, whatever the heads, and stay sound."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cache.conversation import Conversation
from xkv import load_backend
from xkv.checks.invariants import broken_invariants


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 120, 128, 256])
def test_bases_grow_at_every_head_size(backend, head_dim):
    talk = Conversation(backend, head_dim=head_dim, compression=1.5, max_rank=64, budget=2048)
    talk.say(700)
    talk.reply(2)
    rank = talk.cache.groups[0].keys.rank
    for topic in (1, 1):
        talk.say(150, topic)
        talk.reply(2, topic)
        assert broken_invariants(talk.cache) == []
    assert talk.cache.groups[0].keys.rank > rank
    assert talk.error(last=100) < 0.1


@pytest.mark.parametrize("options", [{}, {"attention": "selective", "chunk_size": 8}])
def test_a_conversation_longer_than_the_budget_goes_on_after_its_basis_grew(backend, options):
    talk = Conversation(backend, topics=4, head_dim=64, compression=2.0, **options)
    talk.say(400)
    for turn in range(12):
        talk.say(90, turn % 4)
        talk.reply(3, turn % 4)
        assert broken_invariants(talk.cache) == []
    assert talk.cache.layers[0].rows.n_segment > 400 + 6 * 90
    assert talk.error() < 0.1


def test_bases_stay_as_long_as_they_were(backend):
    """Columns with nothing in them are no lever for what the others' rounding lost."""
    talk = Conversation(
        backend,
        topics=1,
        rank=10,
        head_dim=96,
        compression=2.0,
        budget=16,
        chunk_size=4,
        window=0,
        max_tail=40,
    )
    for n_tokens in (280, 300, 120, 120):
        talk.say(n_tokens)
        talk.reply(1)
    for basis in talk.cache.groups[0].keys.bases:
        rows = backend.to_numpy(basis.unpack(backend))
        assert np.linalg.norm(rows.reshape(rows.shape[1], -1), axis=1).max() < 3
    assert talk.error() < 0.02
