"""The byte formula and the ranks it gives."""

from __future__ import annotations

import pytest

from xkv import XKVConfig
from xkv.store.ranks import RankPlan, plan_ranks
from xkv.store.shapes import CacheShape

LLAMA_8B = CacheShape.uniform((4,) * 8, n_kv_heads=8, key_dim=128, value_dim=128, item_bytes=2)
NOTHING_DENSE = {"sinks": 0, "window": 0, "attention": "exact"}


@pytest.mark.parametrize(
    ("tokens", "ratio"), [(8192, 5.69), (16384, 6.83), (32768, 7.59), (65536, 8.03), (131072, 8.27)]
)
def test_formula_gives_the_papers_ratios_when_nothing_stays_dense(tokens, ratio):
    config = XKVConfig(rank_k=384, rank_v=576, **NOTHING_DENSE)
    held = RankPlan(384, 576).held_bytes(LLAMA_8B, config, tokens)
    dense_row = LLAMA_8B.dense_bytes(16)  # the formula counts the first tail buffer, 16 rows
    assert LLAMA_8B.dense_bytes(tokens) / (held - dense_row) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("compression", [2, 4, 8])
@pytest.mark.parametrize("attention", ["auto", "exact"])
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_planned_bytes_meet_the_target(compression, attention, tokens):
    config = XKVConfig(compression=compression, attention=attention)
    plan = plan_ranks(LLAMA_8B, config, tokens)
    held = plan.held_bytes(LLAMA_8B, config, tokens)
    assert held == pytest.approx(LLAMA_8B.dense_bytes(tokens) / compression, rel=1e-6)
    n_rows = config.layout(tokens).n_rows
    parts = [plan.factor_bytes(LLAMA_8B, config, i, n_rows) for i in range(8)]
    assert sum(parts) == pytest.approx(plan.budget_bytes, rel=1e-6)


@pytest.mark.parametrize("compression", [2, 4, 8])
@pytest.mark.parametrize("attention", ["auto", "exact"])
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_planned_ranks_meet_the_target_and_no_larger_ones_do(compression, attention, tokens):
    config = XKVConfig(compression=compression, attention=attention, latent_bits=16)
    plan = plan_ranks(LLAMA_8B, config, tokens)
    allowed = LLAMA_8B.dense_bytes(tokens) / compression
    assert 0.97 * allowed < plan.held_bytes(LLAMA_8B, config, tokens) <= allowed
    larger = RankPlan(plan.rank_k + 2, plan.rank_v + 3)
    assert larger.held_bytes(LLAMA_8B, config, tokens) > allowed


def test_shorter_last_group_clamps_to_its_own_width():
    shape = CacheShape.uniform((4, 1), n_kv_heads=2, key_dim=16, value_dim=8, item_bytes=4)
    plan, config = RankPlan(100, "full"), XKVConfig()
    assert plan.for_group(shape, config, 0, 1000) == (100, 64)
    assert plan.for_group(shape, config, 1, 1000) == (32, 16)


@pytest.mark.parametrize(
    ("options", "tokens", "words"),
    [
        ({}, 20, "20 tokens are not more than the 4 sinks and 16 window"),
        ({"compression": 16}, 128, "too few for a compression of 16"),
        ({"compression": 16}, 512, "at most 11.2 can be reached"),
        ({"compression": 8, "latent_bits": 16, "window": 128}, 500, "too few for a compression"),
        ({"rank_k": 900, "rank_v": 900}, 300, "more memory than the full cache"),
    ],
)
def test_short_prompt_stays_dense_and_says_why(options, tokens, words):
    assert words in plan_ranks(LLAMA_8B, XKVConfig(**options), tokens)


def test_window_leaves_seven_eighths_of_the_bytes_to_factors():
    windows = [XKVConfig(compression=ratio).window_at(4096) for ratio in (2, 8, 16, 32, 100)]
    assert windows == [128, 49, 19, 16, 16]
    assert XKVConfig(rank_k=8, rank_v=8).window_at(100) == 128
    assert XKVConfig(compression=32, window=50).window_at(4096) == 50


def test_full_rank_is_taken_although_it_saves_nothing():
    config = XKVConfig(rank_k="full", rank_v="full")
    assert plan_ranks(LLAMA_8B, config, 300) == RankPlan("full", "full")
