"""Whatever ends a step between two calls early, the cache is what it was before it."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest

from tests.cache.conversation import HEAD_DIM, N_KV_HEADS, Conversation
from tests.cache.twin import failing
from xkv import InputError, load_backend
from xkv.checks.invariants import broken_invariants

FORMS = {
    "ranks": ({"rank_k": 12, "rank_v": 12}, 1e-4),
    "bits": ({"compression": 2.0}, 0.02),
    "set": ({"compression": 2.0, "budget": 40, "kept_share": 0.5}, 0.02),
}
"""Options, and the error that is left."""


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param, kernels="off")


@pytest.mark.parametrize("form", FORMS)
def test_an_end_at_any_operation_changes_nothing(backend, form):
    """Of a first compression, and of a fold after it."""
    options, allowed = FORMS[form]
    talk = Conversation(backend, head_dim=64, **{"budget": 32, **options})
    for n_tokens in (300, 150):
        talk.say(n_tokens)
        before = talk.cache.groups[0].state
        for at in itertools.count(1, 7):
            with (
                failing(backend, at, KeyboardInterrupt) as has_failed,
                contextlib.suppress(KeyboardInterrupt),
            ):
                talk.cache.settle()
            if not has_failed():
                break
            assert talk.cache.groups[0].state is before
        # it failed at many operations before it went through
        assert at > 5 and talk.cache.groups[0].state is not before
        assert broken_invariants(talk.cache) == []
        assert talk.cache.layers[0].is_compressed
    assert talk.error() < allowed


@pytest.mark.parametrize("n_before", [0, 300])
def test_rows_that_are_not_finite_are_refused_and_can_be_forgotten(backend, n_before):
    talk = Conversation(backend, rank_k=12, rank_v=12)
    if n_before:
        talk.say(n_before)
        talk.reply(1)
    n_before = talk.cache.layers[0].offset
    for layer in talk.cache.layers.values():
        rows = np.random.default_rng(0).standard_normal((1, N_KV_HEADS, 200, HEAD_DIM))
        rows[0, 0, 7, 3] = np.nan
        layer.append(*(backend.from_numpy(rows.astype(np.float32)) for _ in range(2)), talk.spec)
    before = talk.cache.groups[0].state
    for _ in range(2):
        with pytest.raises(InputError, match="NaN"):
            talk.cache.settle()
        assert talk.cache.groups[0].state is before
    talk.trim_to(n_before)
    talk.say(100)
    talk.reply(1)
    assert broken_invariants(talk.cache) == [] and talk.error() < 1e-4
