"""Quest: pages of the full cache."""

from __future__ import annotations

import numpy as np

from tests.evaluation.methods.documents import (
    EXACT,
    N_HEADS,
    N_KV_HEADS,
    Asked,
    make_document,
    normal,
    numpy_rows,
    planted,
)
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method


def test_quest_with_budget_for_all_is_full_attention(backend):
    document = make_document(backend, 197, n_layers=1)
    compressed = parse_method("quest:budget=192").compress(document, None)
    asked = Asked(document, compressed.start()[0], batch=2)
    query = 3 * normal(2, N_HEADS, 1, 32)
    assert relative_error(asked.attend(query, 20), asked.plain(query)) < EXACT


def test_quest_reads_the_planted_page_and_the_one_that_is_not_full(backend):
    places = np.array([[50, 100], [130, 20]])
    keys, directions = planted(places, 197)
    document = make_document(backend, 197, n_layers=1, keys=keys)
    compressed = parse_method("quest:budget=16").compress(document, None)
    asked = Asked(document, compressed.start()[0], batch=2)
    question = normal(2, N_HEADS, 3, 32)
    assert relative_error(asked.attend(question, 20), asked.plain(question)) < EXACT
    page = places[..., None] // 16 * 16 + np.arange(16)
    rest = np.broadcast_to(np.arange(192, 197), (2, N_KV_HEADS, 5))
    query = directions[:, :, None]
    got = asked.attend(query, 30)
    assert relative_error(got, asked.plain(query, np.concatenate([page, rest], -1))) < EXACT


def test_quest_ranks_pages_by_the_bound_on_their_scores(backend):
    document = make_document(backend, 192, n_layers=1)
    prefix = parse_method("quest:budget=48").compress(document, None).start()[0]
    query = normal(2, N_HEADS, 1, 32, seed=5)
    selected = backend.to_numpy(prefix.select(backend.from_numpy(query), 1.0))
    pages = numpy_rows(document, "keys")[0].reshape(1, N_KV_HEADS, 1, 12, 16, 32)
    grouped = query.reshape(2, N_KV_HEADS, 2, 1, 32)
    bound = np.maximum(grouped * pages.min(-2), grouped * pages.max(-2)).sum(-1).max(2)
    want = np.zeros((2, N_KV_HEADS, 12), bool)
    np.put_along_axis(want, np.argsort(-bound, axis=-1)[..., :3], True, -1)
    np.testing.assert_array_equal(selected, np.repeat(want, 16, axis=-1))


def test_quest_holds_the_cache_and_the_bounds(backend):
    document = make_document(backend, 197, dtype="float16")
    held = parse_method("quest").compress(document, None).held_bytes
    assert held - document.dense_bytes == 4 * 2 * N_KV_HEADS * 12 * 32 * 2
