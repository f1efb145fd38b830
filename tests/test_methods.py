"""The evaluation's methods: what they hold, what they keep, and attention over what they keep."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

import xkv
from xkv import InputError
from xkv.evaluation.methods import Document, parse_method
from xkv.evaluation.methods.snapkv import max_pool, watched_weights
from xkv.evaluation.prefix import Prefix
from xkv.grouping import make_groups
from xkv.lowrank_cache import LowRankCache
from xkv.rope import RopeSpec
from xkv.tolerances import TOLERANCE, relative_error

N_HEADS, N_KV_HEADS, N_WATCHED = 4, 2, 32
FREE = ["rotating", "snapkv", "snapkv-query", "xkv", "svd", "xkv:attention=selective,budget=256"]
EXACT = TOLERANCE["float32"]


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request) -> xkv.backend.Backend:
    options = {"device": "cpu"} if request.param == "torch" else {}
    return xkv.load_backend(request.param, **options)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make_document(
    backend: xkv.backend.Backend,
    n_tokens: int,
    n_layers: int = 4,
    head_dim: int = 32,
    dtype: str = "float32",
    keys: list[np.ndarray] | None = None,
    values: list[np.ndarray] | None = None,
    queries: list[np.ndarray] | None = None,
) -> Document:
    """Rows of a document, random where none are given."""
    xp = backend.xp

    def layers(given: list[np.ndarray] | None, heads: int, rows: int, kind: Any) -> tuple:
        arrays = given or [
            normal(1, heads, rows, head_dim, seed=100 * heads + rows + layer)
            for layer in range(n_layers)
        ]
        return tuple(xp.astype(backend.from_numpy(x), kind) for x in arrays)

    def make_cache(config: xkv.XKVConfig) -> LowRankCache:
        groups = make_groups(config, n_layers)
        return LowRankCache(backend, config, groups, n_layers - sum(map(len, groups)))

    kind = getattr(xp, dtype)
    # the values' seeds differ from the keys'
    values = values or [normal(1, N_KV_HEADS, n_tokens, head_dim, seed=i) for i in range(n_layers)]
    return Document(
        backend,
        layers(keys, N_KV_HEADS, n_tokens, kind),
        layers(values, N_KV_HEADS, n_tokens, kind),
        layers(queries, N_HEADS, N_WATCHED, xp.float32),
        (RopeSpec.standard(head_dim, 10_000.0),) * n_layers,
        (n_tokens,),
        head_dim**-0.5,
        xp.float32,
        3,
        (None,) * n_layers,
        make_cache,
    )


def numpy_rows(document: Document, name: str) -> list[np.ndarray]:
    return [document.backend.to_numpy(x) for x in getattr(document, name)]


def causal_weights(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """Attention weights ``[n_heads, Lq, S]`` of the last Lq rows, in float64."""
    queries, keys = (x.astype(np.float64) for x in (queries, keys))
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    scores = queries @ keys.swapaxes(-1, -2) * scale
    n_queries, n_rows = scores.shape[-2:]
    scores[:, ~np.tri(n_queries, n_rows, n_rows - n_queries, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def plain_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float
) -> np.ndarray:
    weights = causal_weights(queries, keys, scale)
    return weights @ np.repeat(values, len(queries) // len(values), axis=0)


class Asked:
    """A batch of questions to one layer, and what plain attention would answer."""

    def __init__(self, document: Document, prefix: Prefix, batch: int, layer: int = 0) -> None:
        self.document, self.prefix, self.batch = document, prefix, batch
        self.rows = {name: numpy_rows(document, name)[layer][0] for name in ("keys", "values")}
        shape = (batch, N_KV_HEADS, 0, self.rows["keys"].shape[-1])
        self.since = {name: np.zeros(shape, np.float32) for name in ("keys", "values")}

    def attend(self, queries: np.ndarray, seed: int) -> np.ndarray:
        """Take as many new tokens as queries, with random rows."""
        backend = self.document.backend
        shape = (self.batch, N_KV_HEADS, queries.shape[-2], queries.shape[-1])
        new = {name: normal(*shape, seed=seed + i) for i, name in enumerate(self.since)}
        for name, rows in new.items():
            self.since[name] = np.concatenate([self.since[name], rows], axis=-2)
        self.prefix.append(*map(backend.from_numpy, new.values()), None)
        output = self.prefix.attend(backend.from_numpy(queries), self.document.scale, None)
        return backend.to_numpy(output)

    def plain(self, queries: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Over all rows of the document, or those ``chosen [B, n_kv_heads, S]``."""
        n_rows = self.rows["keys"].shape[-2]
        if chosen is None:
            chosen = np.broadcast_to(np.arange(n_rows), (self.batch, N_KV_HEADS, n_rows))
        outputs = []
        for b in range(self.batch):
            keys, values = (
                np.concatenate(
                    [
                        np.take_along_axis(self.rows[name], chosen[b][..., None], -2),
                        self.since[name][b],
                    ],
                    axis=-2,
                )
                for name in ("keys", "values")
            )
            outputs.append(plain_attention(queries[b], keys, values, self.document.scale))
        return np.stack(outputs)


def kept_rows(document: Document, prefix: Prefix, layer: int, head: int) -> list[int]:
    """Numbers of the document's rows that a prefix holds, each row's key and value checked."""
    backend, found = document.backend, []
    for name, rows in (("keys", prefix.prefix_keys), ("values", prefix.prefix_values)):
        exact = numpy_rows(document, name)[layer][0, head].astype(np.float32)
        same = (backend.to_numpy(rows)[0, head][:, None] == exact).all(-1)
        assert (same.sum(-1) == 1).all(), "a row that the document does not have"
        found.append(same.argmax(-1).tolist())
    assert found[0] == found[1]
    return found[0]


# Bytes


@pytest.mark.parametrize("text", FREE)
def test_held_bytes_meet_the_ratio(backend, text):
    document = make_document(backend, 2048, dtype="float16", head_dim=64)
    compressed = parse_method(text).compress(document, 4.0)
    assert 0.97 * document.dense_bytes / 4 <= compressed.held_bytes <= document.dense_bytes / 4
    if text in ("rotating", "snapkv"):
        rows = sum(x.prefix_keys.shape[-2] for x in compressed.start())
        assert compressed.held_bytes == rows * N_KV_HEADS * 2 * 64 * 2


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("rotating", 60.0), ("snapkv", 8.0), ("snapkv-query", 300.0), ("xkv", 50.0), ("svd", 50.0)],
)
def test_ratio_out_of_reach_is_refused(reference, text, ratio):
    with pytest.raises(InputError, match=r"240 (of|tokens)|of 240 tokens"):
        parse_method(text).compress(make_document(reference, 240), ratio)


@pytest.mark.parametrize("text", ["rotating", "snapkv", "snapkv-query"])
def test_dropping_rows_needs_a_ratio(reference, text):
    with pytest.raises(InputError, match="needs a ratio"):
        parse_method(text).compress(make_document(reference, 240), None)


@pytest.mark.parametrize("text", ["full", "random"])
def test_methods_that_drop_nothing_hold_the_dense_bytes(backend, text):
    document = make_document(backend, 100)
    assert parse_method(text).compress(document, None).held_bytes == 4 * 2 * 2 * 100 * 32 * 4


def test_conversation_counts_the_tokens_that_came_since(backend):
    document = make_document(backend, 240)
    conversation = parse_method("rotating").compress(document, 4.0).converse()
    for layer in conversation.layers:
        layer.append(*[backend.from_numpy(normal(1, N_KV_HEADS, 10, 32))] * 2, None)
    assert conversation.bytes_now() == (250 * document.row_bytes, 70 * document.row_bytes)


# Quantized


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_rows_are_those_of_mlx(backend, bits, dtype):
    document = make_document(backend, 50, n_layers=2, head_dim=128, dtype=dtype)
    compressed = parse_method(f"quantized:bits={bits}").compress(document, None)
    exact = make_document(xkv.load_backend("mlx"), 50, n_layers=2, head_dim=128, dtype=dtype)
    for i, prefix in enumerate(compressed.start()):
        for rows, got in ((exact.keys, prefix.prefix_keys), (exact.values, prefix.prefix_values)):
            packed = mx.quantize(rows[i], group_size=64, bits=bits)
            want = mx.dequantize(*packed, group_size=64, bits=bits).astype(mx.float32)
            np.testing.assert_array_equal(backend.to_numpy(got), np.array(want))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_bytes_are_those_of_mlx_lm(backend, bits):
    document = make_document(backend, 512, n_layers=2, head_dim=64, dtype="float16")
    cache = QuantizedKVCache(group_size=64, bits=bits)
    cache.update_and_fetch(*[mx.zeros((1, N_KV_HEADS, 512, 64), mx.float16)] * 2)
    held = parse_method(f"quantized:bits={bits}").compress(document, None).held_bytes
    assert held == 2 * cache.nbytes


def test_quantized_refuses_heads_that_are_no_multiple_of_a_group(reference):
    with pytest.raises(InputError, match="heads of 32 features"):
        parse_method("quantized").compress(make_document(reference, 50), None)


# Rotating and SnapKV


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


def planted(places: np.ndarray, n_tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Keys of one layer and the queries that they match.

    Args:
        places: Row for each question and KV head, ``[B, n_kv_heads]``.

    Returns:
        The keys, and a direction for each question and head, ``[B, n_heads, 32]``.
    """
    keys = normal(1, N_KV_HEADS, n_tokens, 32, seed=7)
    directions = normal(*places.shape, 32, seed=8)
    for (b, head), place in np.ndenumerate(places):
        keys[0, head, place] = 3 * directions[b, head]
    return [keys], np.repeat(directions, N_HEADS // N_KV_HEADS, axis=1)


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


# Quest


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


# MiniCache


def test_minicache_of_equal_layers_is_exact(backend):
    rows = [normal(1, N_KV_HEADS, 60, 32, seed=i // 2) for i in range(4)]
    document = make_document(backend, 60, keys=rows, values=rows[::-1])
    text = "minicache:start_share=0,retained_share=0"
    for i, prefix in enumerate(parse_method(text).compress(document, None).start()):
        assert relative_error(backend.to_numpy(prefix.prefix_keys), rows[i]) < EXACT
        assert relative_error(backend.to_numpy(prefix.prefix_values), rows[3 - i]) < EXACT


@pytest.mark.parametrize("name", ["keys", "values"])
def test_minicache_shares_directions_and_retains_the_most_distant_rows(backend, name):
    document = make_document(backend, 60, n_layers=5)
    prefixes = parse_method("minicache:retained_share=0.1").compress(document, None).start()
    exact = numpy_rows(document, name)
    got = [backend.to_numpy(getattr(prefix, f"prefix_{name}")) for prefix in prefixes]
    for i in (0, 1, 4):
        np.testing.assert_array_equal(got[i], exact[i])
    units = [exact[i] / np.linalg.norm(exact[i], axis=-1, keepdims=True) for i in (2, 3)]
    cosines = (units[0] * units[1]).sum(-1)
    shared = units[0] + units[1]
    shared /= np.linalg.norm(shared, axis=-1, keepdims=True)
    is_retained = np.zeros(cosines.shape, bool)
    np.put_along_axis(is_retained, np.argsort(cosines, axis=-1)[..., :6], True, -1)
    for i in (2, 3):
        np.testing.assert_array_equal(got[i][is_retained], exact[i][is_retained])
        want = np.linalg.norm(exact[i], axis=-1, keepdims=True) * shared
        assert relative_error(got[i][~is_retained], want[~is_retained]) < EXACT


def test_minicache_bytes(backend):
    document = make_document(backend, 60, n_layers=5, dtype="float16")
    held = parse_method("minicache:retained_share=0.1").compress(document, None).held_bytes
    row = N_KV_HEADS * 32 * 2
    # a tensor: three layers whole; a direction, norms and retained rows of two, their numbers
    a_tensor = (3 + 1) * 60 * row + 2 * 60 * N_KV_HEADS * 2 + 2 * 6 * row + 6 * N_KV_HEADS * 4
    assert held == 2 * a_tensor


def test_minicache_needs_a_pair(reference):
    with pytest.raises(InputError, match="a partner"):
        parse_method("minicache").compress(make_document(reference, 60, n_layers=2), None)


# Low rank


@pytest.mark.parametrize("text", ["xkv:group_size=2", "svd"])
def test_full_rank_gives_the_rows_back(backend, text):
    document = make_document(backend, 200)
    method = parse_method(f"{text}{',' if ':' in text else ':'}rank_k=full,rank_v=full,window=16")
    for i, prefix in enumerate(method.compress(document, None).start()):
        for name in ("keys", "values"):
            got = backend.to_numpy(getattr(prefix, f"prefix_{name}"))
            assert relative_error(got, numpy_rows(document, name)[i]) < EXACT


def test_layers_outside_the_groups_stay_exact_and_count(backend):
    document = make_document(backend, 400, dtype="float16")
    text = "xkv:first_layer=1,last_layer=2,rank_k=8,rank_v=8,window=16"
    compressed = parse_method(text).compress(document, None)
    prefixes = compressed.start()
    assert kept_rows(document, prefixes[0], 0, 1) == list(range(400))
    assert compressed.held_bytes > document.dense_bytes / 2


LOW_RANK = {"rank_k": 24, "rank_v": 24, "window": 16, "group_size": 2}
SELECTIVE = {**LOW_RANK, "attention": "selective", "budget": 160, "outlier_chunks": 2}


@pytest.mark.parametrize("options", [LOW_RANK, SELECTIVE], ids=["dense", "selective"])
def test_prefix_attends_as_the_cache_does(backend, options):
    document = make_document(backend, 340)
    spec = document.ropes[0]
    cache = document.make_cache(xkv.XKVConfig(**{"attention": "dense", **options}))
    for i, layer in cache.layers.items():
        layer.append(document.keys[i], document.values[i], spec)
    for group in cache.groups:
        group.settle()
    text = ",".join(f"{name}={value}" for name, value in options.items())
    prefixes = parse_method(f"xkv:{text}").compress(document, None).start()
    assert all((x.landmarks is not None) == (options is SELECTIVE) for x in cache.layers.values())
    for step, n_tokens in enumerate((7, 1, 1, 40)):
        mask = None
        if n_tokens > 1:
            n_rows = prefixes[0].offset + n_tokens
            mask = backend.from_numpy(np.tri(n_tokens, n_rows, n_rows - n_tokens, dtype=bool))
        for i, prefix in enumerate(prefixes):
            rows = [
                backend.from_numpy(normal(1, N_KV_HEADS, n_tokens, 32, seed=10 * step + j))
                for j in range(2)
            ]
            queries = backend.from_numpy(3 * normal(1, N_HEADS, n_tokens, 32, seed=90 + step))
            for each in (prefix, cache.layers[i]):
                each.append(*rows, spec)
            got, want = (
                backend.to_numpy(each.attend(queries, document.scale, mask))
                for each in (prefix, cache.layers[i])
            )
            assert relative_error(got, want) < EXACT
            if options is SELECTIVE and n_tokens == 1:
                everything = backend.attention(queries, *cache.layers[i].dense(), 32**-0.5, None)
                assert relative_error(got, backend.to_numpy(everything)) > 10 * EXACT


# Prefixes


def test_batch_of_questions_is_each_alone_and_plain_attention(backend):
    document = make_document(backend, 70, n_layers=1)
    compressed = parse_method("full").compress(document, None)
    together = Asked(document, compressed.start()[0], batch=3)
    alone = [Prefix(backend, document.keys[0], document.values[0], 70) for _ in range(3)]
    for step, n_tokens in enumerate((5, 1, 1)):
        queries = 3 * normal(3, N_HEADS, n_tokens, 32, seed=step)
        got = together.attend(queries, 20 + 2 * step)
        assert together.prefix.offset == 70 + together.since["keys"].shape[-2]
        assert relative_error(got, together.plain(queries)) < EXACT
        for b, prefix in enumerate(alone):
            rows = [together.since[x][b : b + 1, :, -n_tokens:] for x in ("keys", "values")]
            prefix.append(*map(backend.from_numpy, rows), None)
            one = prefix.attend(backend.from_numpy(queries[b : b + 1]), document.scale, None)
            assert relative_error(backend.to_numpy(one)[0], got[b]) < EXACT


def test_random_keys_are_drawn_for_each_layer_and_values_kept(backend):
    document = make_document(backend, 50)
    compressed = parse_method("random").compress(document, None)
    keys = [backend.to_numpy(x.prefix_keys) for x in compressed.start()]
    again = parse_method("random").compress(document, None).start()
    exact = numpy_rows(document, "keys") + keys
    for i, prefix in enumerate(again):
        np.testing.assert_array_equal(backend.to_numpy(prefix.prefix_keys), keys[i])
        assert sum((x == keys[i]).any() for x in exact) == 1
        values = backend.to_numpy(prefix.prefix_values)
        np.testing.assert_array_equal(values, numpy_rows(document, "values")[i])


# VeloxQuant


class HoardingCache(KVCache):
    """Gives rows back halved and keeps the exact ones as well."""

    compressed_key_bytes = compressed_value_bytes = 10

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.exact = keys
        return super().update_and_fetch(keys / 2, values / 2)


def test_veloxquant_counts_what_stays_alive(monkeypatch):
    base = ModuleType("veloxquant_mlx.cache.base")
    base.KVCacheConfig = lambda **options: options
    base.KVCacheBuilder = type(
        "KVCacheBuilder",
        (),
        {"for_model": staticmethod(lambda model, _: [HoardingCache() for _ in model.layers])},
    )
    for name in ("veloxquant_mlx", "veloxquant_mlx.cache"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "veloxquant_mlx.cache.base", base)
    backend = xkv.load_backend("mlx")
    document = make_document(backend, 1024, n_layers=2, head_dim=64, dtype="float16")
    compressed = parse_method("veloxquant").compress(document, None)
    assert compressed.held_bytes == pytest.approx(1.5 * document.dense_bytes, rel=0.02)
    assert compressed.detail.startswith("40 bytes")
    for i, prefix in enumerate(compressed.start()):
        for name in ("keys", "values"):
            got = backend.to_numpy(getattr(prefix, f"prefix_{name}"))
            np.testing.assert_array_equal(got, numpy_rows(document, name)[i] / 2)


def test_veloxquant_is_refused_where_it_cannot_run(monkeypatch, reference, mlx_backend):
    with pytest.raises(InputError, match="runs on MLX only"):
        parse_method("veloxquant").compress(make_document(reference, 50), None)
    monkeypatch.setitem(sys.modules, "veloxquant_mlx", None)
    with pytest.raises(InputError, match="pip install veloxquant-mlx"):
        parse_method("veloxquant").compress(make_document(mlx_backend, 50), None)


# Names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xkw", "'xkw' is unknown; choose one of xkv, svd, full, quantized"),
        ("", "'' is unknown"),
        ("quantized:bit=2", "no option 'bit'; its options: bits, group_size"),
        ("full:bits=2", "no option 'bits'; it has none"),
        ("xkv:rank=2", "no option 'rank'; its options: group_size, .*rank_k"),
        ("quantized:bits=3", "bits=3 must be 2, 4 or 8"),
        ("quantized:bits=two", "bits=two must be int"),
        ("quantized:group_size=16", "group_size=16 must be"),
        ("xkv:budget=8.0", r"budget=8\.0 must be int"),
        ("xkv:groups=01", "groups=1 must be"),
        ("xkv:rank_k=half,rank_v=8", "rank_k=half must be"),
        ("xkv:rank_k=8", "rank_v is missing"),
        ("svd:group_size=2", "leave group_size out"),
        ("quest:budget", "with every option once"),
        ("quest:budget=32,budget=64", "with every option once"),
        ("quest:budget=33", "multiple of page_size=16"),
        ("snapkv:window=33", "window=33 must be 1 to 32"),
        ("snapkv:kernel_size=4", "kernel_size=4 must be an odd number"),
        ("snapkv-query:kernel_size=0", "kernel_size=0 must be an odd number"),
        ("rotating:sinks=-1", "sinks=-1 must not be negative"),
        ("minicache:start_share=2", "start_share=2 must be 0 to 1"),
        ("veloxquant:kind=kivi", "kind='kivi' must be one of xkv, palu, kvtc"),
    ],
)
def test_parse_method_says_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_method(text)


def test_parse_method_takes_names_and_options():
    quest = parse_method("quest:budget=256,page_size=8")
    assert (quest.name, quest.budget, quest.page_size) == ("quest", 256, 8)
    assert parse_method("minicache:retained_share=0.1,start_share=0").retained_share == 0.1
    assert parse_method("veloxquant:kind=palu").kind == "palu"
    svd = parse_method("svd:rank_k=full,rank_v=12")
    assert svd.name == "svd" and not svd.has_free_size
    assert dict(svd.options) == {"rank_k": "full", "rank_v": 12, "group_size": 1}
    assert parse_method("xkv").has_free_size and not parse_method("xkv").is_stepwise
    assert parse_method("xkv:attention=selective").is_stepwise
    assert parse_method("snapkv-query").is_query_aware
