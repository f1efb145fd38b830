"""Planted faults of the Metal kernel that attends to dense and recent rows, all of them caught."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

import xkv
from tests import metal_emulator as emulator
from tests.mlx_metal.dense_rows import CASE, WIDE, error_of, far_arguments, make_arguments
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import attend_dense
from xkv.checks.decode_cases import DecodeCase
from xkv.checks.tolerances import TOLERANCE
from xkv.ops.backend import Backend

pytest_plugins = ["tests.metal_device"]

BATCH, BATCH_RECENT, ASK, SINKS, RECENT, ROWS, HEADER = (
    (attend_dense, name)
    for name in ("BATCH", "BATCH_RECENT", "ASK", "SINKS", "RECENT", "ROWS", "HEADER")
)
SEEN, SHRUNK = "n_rows - n_queries + query + 1", "fast::exp(mine.largest - most)"
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "last-row-not-seen": (CASE, ROWS, "row < n_seen", "row < n_seen - 1"),
    "row-past-the-last": (CASE, ROWS, "row < n_seen", "row <= n_seen"),
    "first-row-not-seen": (CASE, ROWS, "row = sg;", "row = max(sg, 1);"),
    "rows-twice": (CASE, ROWS, "row += SIMDGROUPS", "row += SIMDGROUPS / 2"),
    "queries-see-all-rows": (CASE, ASK, SEEN, "n_rows"),
    "queries-see-the-first's-rows": (CASE, ASK, SEEN, "n_rows - n_queries + 1"),
    "keys-of-another-head": (CASE, BATCH, "kv_head * keys", "(1 - kv_head) * keys"),
    "values-of-another-head": (CASE, BATCH, "kv_head * values", "(1 - kv_head) * values"),
    "keys-as-if-copied": (CASE, BATCH, "kv_head * keys_strides[1]", "kv_head * n_rows * N"),
    "values-as-if-copied": (CASE, BATCH, "kv_head * values_strides[1]", "kv_head * n_rows * N"),
    "keys-of-another-batch": (CASE, BATCH, "keys + batch", "keys + 0"),
    "values-of-another-batch": (CASE, BATCH, "values + batch", "values + 0"),
    "queries-of-another-batch": (CASE, BATCH, "queries + batch", "queries + 0"),
    "queries-of-another-head": (CASE, BATCH, "+ head * q", "+ (head ^ 1) * q"),
    "first-query-again": (CASE, BATCH, "query * queries_strides[2]", "0"),
    "heads-of-another-group": (CASE, BATCH, "head / (n_heads / keys_", "head % (keys_"),
    "next-values": (CASE, ROWS, "value + row *", "value + (row + 1) % n_rows *"),
    "first-feature-again": (CASE, HEADER, "fma(x[i], y[i], sum)", "fma(x[i], y[0], sum)"),
    "features-of-another-lane": (CASE, ROWS, "feature * value_next", "(feature ^ 2)"),
    "a-lane's-score": (CASE, HEADER, "return simd_sum(sum);", "return sum;"),
    "total-not-shrunk": (CASE, HEADER, "fma(total, shrink,", "fma(total, 1.0f,"),
    "sums-not-shrunk": (CASE, HEADER, "fma(sums[i], shrink,", "fma(sums[i], 1.0f,"),
    "row-counts-once-in-sums": (CASE, HEADER, "weight * factor * x[i]", "factor * x[i]"),
    "merged-totals-not-shrunk": (CASE, ROWS, "fast::exp(one_largest - most)", "1.0f"),
    "merged-sums-not-shrunk": (CASE, ROWS, SHRUNK, "1.0f"),
    "not-divided": (CASE, ROWS, SHRUNK + " / sum", SHRUNK),
    "last-simdgroup-missing": (CASE, ROWS, "i < SIMDGROUPS; i++", "i < SIMDGROUPS - 1; i++"),
    "simdgroups-that-are-not": (WIDE, ROWS, "lane < SIMDGROUPS", "lane < 32"),
    "half-the-simdgroups-merged": (CASE, ROWS, "lane < SIMDGROUPS", "lane < 16"),
    "totals-without-largest": (CASE, ROWS, "most + log(sum)", "log(sum)"),
    "totals-without-sum": (CASE, ROWS, "most + log(sum)", "most"),
    "totals-unwritten": (CASE, ROWS, "thread_index == 0)", "thread_index + query == 0)"),
    "last-feature-unwritten": (CASE, ROWS, "thread_index < N)", "thread_index < N - 1)"),
    "features-past-the-last": (CASE, ROWS, "thread_index < N)", "thread_index < N + 1)"),
    "outputs-of-all-queries-in-one": (CASE, ROWS, "n_queries + query;", "n_queries;"),
    "outputs-of-another-head": (CASE, ROWS, "n_heads + head)", "n_heads + (head ^ 1))"),
    "sink-not-in-the-sum": (CASE, SINKS, "mine.total = 1.0f", "mine.total = 0.0f"),
    "sink-of-the-first-head": (CASE, SINKS, "head * sinks", "0 * sinks"),
    "sink-of-each-simdgroup": (CASE, SINKS, "sg == 0", "sg >= 0"),
    "last-recent-not-seen": (CASE, RECENT, "row < n_recent", "row < n_recent - 1"),
    "recent-past-the-last": (CASE, RECENT, "row < n_recent", "row <= n_recent"),
    "first-recent-not-seen": (CASE, RECENT, "row = sg;", "row = max(sg, 1);"),
    "recent-of-another-head": (CASE, BATCH_RECENT, "kv_head * numbers", "(1 - kv_head) * numbers"),
    "recent-of-another-batch": (CASE, BATCH_RECENT, "numbers + batch", "numbers + 0"),
    "factors-of-another-head": (CASE, BATCH_RECENT, "kv_head * scales", "(1 - kv_head) * scales"),
    "factors-of-another-batch": (CASE, BATCH_RECENT, "scales + batch", "scales + 0"),
    "recent-as-if-copied": (CASE, BATCH_RECENT, "* numbers_strides[1]", "* n_recent * 2 * N"),
    "factors-of-the-next-row": (CASE, RECENT, "factors + row", "factors + (row ^ 1)"),
    "factor-of-the-value": (CASE, RECENT, "* factor[0]", "* factor[1]"),
    "factor-of-the-key": (CASE, RECENT, "factor[factors_next]", "factor[0]"),
    "keys-as-values": (CASE, RECENT, "+ N * recent_next", "+ 0"),
    "recent-without-factors": (CASE, HEADER, "weight * factor * x[i]", "weight * x[i]"),
    "neighbours-where-there-are-none": (CASE, HEADER, "i * stride", "i"),
}


def kernel_error(metal: MLXBackend, reference: Backend, case: DecodeCase) -> float:
    """Of keys in columns, so that both ways of reading are tried."""
    queries, dense, sinks = make_arguments(metal, case, "float32", has_sinks=True)
    keys = mx.repeat(dense.keys, 2, axis=3)
    keys[..., 1::2] = mx.nan
    return error_of(metal, reference, (queries, dense._replace(keys=keys[..., ::2]), sinks))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, plant, name):
    case, *fault = FAULTS[name]
    plant(*fault)
    metal.kernels.check = lambda *args: None
    try:
        error = kernel_error(metal, reference, case)
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert error > 10 * TOLERANCE["float32"], f"an error of {error:.1e} only"


def test_no_score_that_is_not_the_lowest_is_caught(metal, reference, plant):
    plant(HEADER, "-1e38f", "0.0f")
    metal.kernels.check = lambda *args: None
    with pytest.raises(ValueError, match="not finite"):
        error_of(metal, reference, far_arguments(metal, -128.0))


@pytest.mark.parametrize("occurrence", [0, 1])
def test_missing_barrier_is_caught(emulated, plant, occurrence):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    assert attend_dense.ROWS.count(barrier) == 2
    plant(ROWS, barrier, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        attend_dense.KERNEL(*make_arguments(emulated, CASE, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize(
    "fault",
    [
        *("keys-of-another-batch", "values-as-if-copied", "queries-see-all-rows"),
        *("sums-not-shrunk", "factors-of-another-head"),
    ],
)
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    case, *place = FAULTS[fault]
    plant(*place)
    # one of each, and a row a simdgroup
    one = {"n_heads": 1, "n_kv_heads": 1, "n_queries": 1, "batch": 1}
    case = replace(case, n_dense=20, n_recent=20, **one)
    with pytest.raises(xkv.InputError, match="attend_dense disagrees with its plain twin"):
        emulated.attend_dense(*make_arguments(emulated, case, "float16"))
