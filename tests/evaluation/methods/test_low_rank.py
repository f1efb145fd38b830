"""Low-rank methods, and attention over what they keep."""

from __future__ import annotations

import numpy as np
import pytest

import xkv
from tests.evaluation.methods.documents import (
    EXACT,
    N_HEADS,
    N_KV_HEADS,
    Asked,
    kept_rows,
    make_document,
    normal,
    numpy_rows,
)
from xkv.checks.tolerances import relative_error
from xkv.evaluation.methods import parse_method
from xkv.evaluation.prefix import Prefix


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
FORMS = {
    "exact": {**LOW_RANK, "attention": "exact"},
    "set": {**LOW_RANK, "budget": 160, "kept_share": 0.0},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_prefix_attends_as_the_cache_does(backend, options):
    document = make_document(backend, 340)
    spec = document.ropes[0]
    cache = document.make_cache(xkv.XKVConfig(**options))
    for i, layer in cache.layers.items():
        layer.append(document.keys[i], document.values[i], spec)
    cache.settle()
    text = ",".join(f"{name}={value}" for name, value in options.items())
    prefixes = parse_method(f"xkv:{text}").compress(document, None).start()
    for step, n_tokens in enumerate((7, 1, 1, 40)):
        for i, prefix in enumerate(prefixes):
            rows = [
                backend.from_numpy(normal(1, N_KV_HEADS, n_tokens, 32, seed=10 * step + j))
                for j in range(2)
            ]
            queries = backend.from_numpy(3 * normal(1, N_HEADS, n_tokens, 32, seed=90 + step))
            for each in (prefix, cache.layers[i]):
                each.append(*rows, spec)
            got, want = (
                backend.to_numpy(each.attend(queries, document.scale, None))
                for each in (prefix, cache.layers[i])
            )
            assert relative_error(got, want) < EXACT
            if "budget" in options and n_tokens == 1:
                everything = backend.attention(queries, *cache.layers[i].dense(), 32**-0.5, None)
                assert relative_error(got, backend.to_numpy(everything)) > 10 * EXACT


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
