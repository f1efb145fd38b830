"""Rotating and SnapKV: which rows are kept."""

from __future__ import annotations

import numpy as np

from tests.evaluation.methods.documents import (
    EXACT,
    N_HEADS,
    N_KV_HEADS,
    N_WATCHED,
    Asked,
    causal_weights,
    kept_rows,
    make_document,
    normal,
    planted,
)
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method
from xkv.evaluation.methods.snapkv import max_pool, watched_weights


def test_rotating_keeps_the_first_and_the_last_rows(backend):
    document = make_document(backend, 100)
    compressed = parse_method("rotating:sinks=3").compress(document, 10.0)
    for layer, prefix in enumerate(compressed.start()):
        for head in range(N_KV_HEADS):
            assert kept_rows(document, prefix, layer, head) == [0, 1, 2, *range(93, 100)]


def test_rotating_without_sinks_keeps_the_last_rows(backend):
    document = make_document(backend, 100)
    prefix = parse_method("rotating:sinks=0").compress(document, 10.0).start()[0]
    assert kept_rows(document, prefix, 0, 0) == list(range(90, 100))


def test_watched_weights_are_summed_over_queries_and_averaged_over_heads(backend):
    queries, keys = 3 * normal(1, N_HEADS, 5, 32), normal(1, N_KV_HEADS, 40, 32, seed=1)
    parts = [backend.from_numpy(keys[..., :33, :]), backend.from_numpy(keys[..., 33:, :])]
    got = watched_weights(backend, backend.from_numpy(queries), parts, 0.2)
    weights = causal_weights(queries[0], keys[0], 0.2).sum(-2)
    want = weights.reshape(N_KV_HEADS, 2, 40).mean(1)[None]
    assert relative_error(backend.to_numpy(got), want) < EXACT


def test_max_pool_takes_the_neighbours_on_both_sides(backend):
    weights = backend.from_numpy(np.array([[0, 0, 5, 0, 0, 0, 1, 2]], np.float32))
    pooled = max_pool(backend, weights, 3)
    assert backend.to_numpy(pooled).tolist() == [[0, 5, 5, 5, 0, 1, 2, 2]]


def test_snapkv_keeps_what_the_window_attends_to_and_the_window(backend):
    places = np.array([[50, 200]])
    keys, directions = planted(places, 390)
    queries = [directions[:, :, None] + 0.1 * normal(1, N_HEADS, N_WATCHED, 32)]
    document = make_document(backend, 390, n_layers=1, keys=keys, queries=queries)
    prefix = parse_method("snapkv").compress(document, 10.0).start()[0]
    for head, place in enumerate(places[0]):
        want = [*range(place - 3, place + 4), *range(358, 390)]
        assert sorted(kept_rows(document, prefix, 0, head)) == want


def test_snapkv_window_is_the_end_of_the_queries(backend):
    keys, directions = planted(np.array([[50, 200], [90, 30]]), 390)
    queries = [np.repeat(directions[:1, :, None], N_WATCHED, axis=2)]
    queries[0][:, :, -4:] = directions[1, :, None]
    document = make_document(backend, 390, n_layers=1, keys=keys, queries=queries)
    prefix = parse_method("snapkv:window=4,kernel_size=1").compress(document, 78.0).start()[0]
    for head, place in enumerate((90, 30)):
        assert sorted(kept_rows(document, prefix, 0, head)) == [place, *range(386, 390)]


def test_snapkv_query_chooses_for_each_question(backend):
    places = np.array([[50, 200], [120, 20]])
    keys, directions = planted(places, 390)
    document = make_document(backend, 390, n_layers=1, keys=keys)
    compressed = parse_method("snapkv-query").compress(document, 55.0)
    assert compressed.held_bytes == 7 * document.row_bytes
    asked = Asked(document, compressed.start()[0], batch=2)
    question = directions[:, :, None] + 0.1 * normal(2, N_HEADS, 6, 32)
    assert relative_error(asked.attend(question, 20), asked.plain(question)) < EXACT
    # decode tokens that look for the other question's rows do not find them
    chosen = places[..., None] + np.arange(-3, 4)
    for step in range(2):
        query = directions[::-1, :, None] + 0.1 * normal(2, N_HEADS, 1, 32, seed=step)
        got = asked.attend(query, 30 + 2 * step)
        assert relative_error(got, asked.plain(query, chosen)) < EXACT
        assert relative_error(got, asked.plain(query)) > 10 * EXACT


def test_snapkv_query_weighs_rows_against_the_question_itself(backend):
    keys, directions = planted(np.array([[50, 50], [120, 120]]), 390)
    keys[0][..., 120, :] *= 0.5
    document = make_document(backend, 390, n_layers=1, keys=keys)
    text = "snapkv-query:kernel_size=1"
    for own, place in ((0, 50), (6, 120)):
        prefix = parse_method(text).compress(document, 390.0).start()[0]
        # the first token looks for row 50, which it may find in itself; the second for row 120
        question = np.stack([directions[0], directions[1]], axis=1)[None]
        rows = question[:, :: N_HEADS // N_KV_HEADS] * np.array([[own], [0]], np.float32)
        prefix.append(*[backend.from_numpy(rows)] * 2, None)
        prefix.attend(backend.from_numpy(question), document.scale, None)
        selected = backend.to_numpy(prefix.select(backend.from_numpy(question), document.scale))
        assert np.argwhere(selected[0]).tolist() == [[0, place], [1, place]]


def test_each_start_chooses_anew(backend):
    places = np.array([[50, 200], [120, 20]])
    keys, directions = planted(places, 390)
    document = make_document(backend, 390, n_layers=1, keys=keys)
    compressed = parse_method("snapkv-query").compress(document, 55.0)
    for b in range(2):
        asked = Asked(document, compressed.start()[0], batch=1)
        query = directions[b : b + 1, :, None]
        asked.attend(query, 20)
        got = asked.attend(query, 30)
        chosen = places[b : b + 1, :, None] + np.arange(-3, 4)
        assert relative_error(got, asked.plain(query, chosen)) < EXACT
