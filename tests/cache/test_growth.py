"""Later turns on other topics: bases grow and merge, whatever the heads, and stay sound."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cache.conversation import Conversation
from xkv import load_backend
from xkv.checks.invariants import broken_invariants
from xkv.ops.attention import reconstruct
from xkv.ops.packed import group_size_of
from xkv.store.bit_plan import Option
from xkv.store.factorization import factor_rows
from xkv.store.growth import fold_rows, merge_rows


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 120, 128, 256])
def test_packed_bases_grow_and_merge_at_every_head_size(backend, head_dim):
    """Rows of one topic in 4 bits, then rows of another."""
    random = np.random.default_rng(0)
    bases = random.standard_normal((2, 12, 2 * head_dim)).astype(np.float32)

    def rows(topic: int) -> list:
        flat = random.standard_normal((1, 150, 12)).astype(np.float32) @ bases[topic]
        shaped = flat.reshape(1, 150, 2, 1, head_dim)
        return [backend.from_numpy(np.ascontiguousarray(shaped[:, :, i])) for i in range(2)]

    how = {"power_iterations": 3, "seed": 0}
    rank = min(64, 2 * head_dim)
    found = factor_rows(backend, rows(0), rank, backend.xp.float32, is_rotated=True, **how)
    basis_bits = 8 if group_size_of(head_dim) else 16
    factors = found.pack(backend, [Option(0, 0.0, 4, basis_bits)])
    later = rows(1)
    grown = fold_rows(backend, factors, later, 0, 64, **how)
    if 2 * head_dim > 64:
        assert grown.rank > factors.rank and not grown.is_plain
    merged = merge_rows(backend, grown, 150, 150, 150)
    assert merged.latent.shape[1] == 300 and merged.recent is None
    for each, latent in ((grown, grown.recent), (merged, merged.latent.rows(150, 300))):
        for basis, want in zip(each.bases, later, strict=True):
            got = backend.to_numpy(reconstruct(backend, latent, basis)).swapaxes(1, 2)
            want = backend.to_numpy(want)
            assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


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
    talk = Conversation(backend, topics=1, rank=10, head_dim=64, compression=4.0)
    talk.say(1200)
    talk.reply(1)
    keys = talk.cache.groups[0].keys
    # the second and third band hold rounding only
    assert len(keys.latent.bits) == 3
    for basis in keys.bases:
        rows = backend.to_numpy(basis.unpack(backend))
        assert np.linalg.norm(rows.reshape(rows.shape[1], -1), axis=1).max() < 3
    for _ in range(3):
        talk.say(120)
        talk.reply(1)
    assert talk.error() < 0.02
