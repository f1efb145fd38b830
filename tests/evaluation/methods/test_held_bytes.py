"""What methods hold, and how they are named on the command line."""

from __future__ import annotations

import pytest

from tests.evaluation.methods.documents import (
    N_KV_HEADS,
    make_document,
    normal,
)
from xkv import InputError
from xkv.evaluation.methods import parse_method

FREE = ["rotating", "snapkv", "snapkv-query", "xkv", "svd", "xkv:attention=exact"]


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xkw", "'xkw' is unknown; choose one of xkv, svd, full, quantized"),
        ("", "'' is unknown"),
        ("quantized:bit=2", "no option 'bit'; its options: bits, group_size"),
        ("full:bits=2", "no option 'bits'; it has none"),
        ("xkv:rank=2", "no option 'rank'; its options: group_size, .*rank_k"),
        ("quantized:bits=7", "bits=7 must be 2, 3, 4, 5, 6 or 8"),
        ("lloydmax:bits=7", "bits=7 must be 1 to 6"),
        ("lloydmax:group_size=0", "group_size=0 must be at least 1"),
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
    assert parse_method("xkv").has_free_size
    assert parse_method("xkv").is_stepwise
    assert not parse_method("xkv:attention=exact").is_stepwise
    assert parse_method("snapkv-query").is_query_aware
