"""The Metal kernel that weighs rows of a latent, against the reference and with planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, weigh_rows
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, hide_rows, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(400, 20, 2, 64, 8, 101, batch=2, n_recent=0, n_rebuilt=150)
"""Two bands, the last one not whole; two tiles of rows and of queries."""
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
LONG = replace(PLAIN, n_rows=600, n_heads=6, n_rebuilt=530)
"""More rows than have their weights in threadgroup memory at once."""
MOST_THREADGROUP_BYTES = 25_000
"""Of the 32 KiB that a threadgroup may have."""


def make_arguments(metal: MLXBackend, case: DecodeCase, dtype: str) -> tuple[Any, ...]:
    """The kernel's, with large scores, peaked weights, and NaN in all rows that are not weighed.

    What the queries of a KV head give to the others is like what they give to the rows; nearly all
    they have for the second query, nearly nothing for the third, which wants the last row.
    """
    x = make_inputs(metal, case, dtype)
    latent, rows = x.segment.values.latent, metal.to_numpy(x.rows)
    is_used = np.zeros(latent.shape[:2], bool)
    np.put_along_axis(is_used, rows.reshape(len(rows), -1), True, axis=1)
    random = np.random.default_rng(1)
    n_queries = case.n_heads // case.n_kv_heads * case.n_queries
    scores = 3 * random.standard_normal((*rows.shape[:2], n_queries, rows.shape[2])) + 200
    scores[..., 2:3, -1] += 100
    totals = np.logaddexp.reduce(scores, axis=-1) + random.standard_normal(scores.shape[:3])
    totals[..., 1:2] += 300
    totals[..., 2:3] -= 300
    shape = (case.batch, case.n_heads, case.n_queries)
    beside = metal.from_numpy(random.standard_normal((*shape, case.head_dim)).astype(np.float32))
    return (
        hide_rows(metal, latent, is_used),
        x.rows,
        metal.from_numpy(scores.astype(np.float32)),
        metal.from_numpy(totals.reshape(shape).astype(np.float32)),
        beside.astype(getattr(mx, dtype)),
    )


def kernel_error(metal: MLXBackend, reference: Backend, case: DecodeCase, dtype: str) -> float:
    """The larger relative error of the two results, the path asserted."""
    latent, rows, *others = make_arguments(metal, case, dtype)
    found = metal.weigh_rows(latent, rows, *others)
    assert metal.kernels.last_path["weigh_rows"] == "weigh_rows"
    assert [x.dtype for x in found] == [others[-1].dtype] * 2
    exact = make_inputs(reference, case, dtype, exact=True).segment.values.latent
    numbers = [metal.to_numpy(x).astype(np.float64) for x in others]
    wanted = reference.weigh_rows(
        exact,
        reference.from_numpy(metal.to_numpy(rows).astype(np.int64)),
        *map(reference.from_numpy, numbers),
    )
    return max(
        relative_error(metal.to_numpy(got), reference.to_numpy(want))
        for got, want in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weigh_rows_is_right(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_weigh_rows_does_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert kernel_error(emulated, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("n", [1, 3, 4, 127, 128, 129, 385, 512, 513])
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
def test_weigh_rows_takes_any_number_of_rows(metal, reference, case, n):
    case = replace(case, n_rows=max(case.n_rows, n), n_heads=6, n_rebuilt=n)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_queries"),
    [(1, 1, 1), (2, 2, 4), (7, 1, 1), (8, 1, 1), (9, 1, 1), (14, 2, 5), (8, 8, 1), (32, 2, 13)],
)
def test_weigh_rows_takes_any_queries(metal, reference, n_heads, n_kv_heads, n_queries):
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_queries": n_queries}
    case = replace(PACKED, n_rebuilt=21, **heads)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("rank", [1, 7, 8, 63, 64, 65, 129, 200])
def test_weigh_rows_takes_any_rank(metal, reference, rank):
    case = replace(PLAIN, rank_v=rank)
    assert kernel_error(metal, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("bits", [(2,), (3, 3), (5, 2, 6), (6, 8, 5, 3)], ids=str)
def test_weigh_rows_takes_any_bits(metal, reference, bits):
    case = replace(PACKED, bits=bits)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_weigh_rows_takes_any_row_numbers(metal, dtype):
    latent, rows, *others = make_arguments(metal, PLAIN, "float16")
    wanted = weigh_rows.KERNEL(latent, rows, *others)
    found = metal.weigh_rows(latent, rows.astype(getattr(mx, dtype)), *others)
    assert all(map(mx.array_equal, found, wanted))


def test_weigh_rows_takes_a_part_of_all_scores(metal):
    latent, rows, scores, *others = make_arguments(metal, PLAIN, "float16")
    wider = mx.concatenate([scores, mx.full((*scores.shape[:3], 5), mx.nan)], axis=-1)
    wanted = weigh_rows.KERNEL(latent, rows, scores, *others)
    found = metal.weigh_rows(latent, rows, wider[..., : rows.shape[2]], *others)
    assert all(map(mx.array_equal, found, wanted))


def test_weigh_rows_takes_any_width_beside(metal):
    latent, rows, scores, totals, beside = make_arguments(metal, PLAIN, "float32")
    wanted = weigh_rows.KERNEL(latent, rows, scores, totals, beside)
    for width in (1, 13):
        found = metal.weigh_rows(latent, rows, scores, totals, beside[..., :width])
        assert mx.array_equal(found[0], wanted[0])
        assert mx.array_equal(found[1], wanted[1][..., :width])


def test_weigh_rows_gives_nothing_to_rows_far_below_the_others(metal):
    latent, rows, scores, totals, beside = make_arguments(metal, PLAIN, "float32")
    sums, rest = metal.weigh_rows(latent, rows, scores - 2000, totals, beside)
    assert not mx.any(sums)
    assert mx.array_equal(rest.reshape(beside.shape), beside)


@pytest.mark.parametrize("total", [-2000.0, -mx.inf])
def test_weigh_rows_gives_nothing_to_others_far_below_the_rows(metal, total):
    latent, rows, scores, totals, beside = make_arguments(metal, PLAIN, "float32")
    sums, rest = metal.weigh_rows(latent, rows, scores, mx.full(totals.shape, total), beside)
    want, _ = metal.weigh_rows(latent, rows, scores, mx.full(totals.shape, -500.0), beside)
    assert not mx.any(rest)
    assert mx.array_equal(sums, want)


def test_weights_and_sums_are_in_float32(metal):
    case = replace(PLAIN, n_rows=2048, n_rebuilt=2048, n_heads=2, rank_v=9)
    latent, rows, scores, totals, beside = make_arguments(metal, case, "float16")
    latent, even = latent.map(lambda x: mx.ones_like(x)), mx.zeros(scores.shape)
    # a half holds exp(-15) to 3 percent only
    sums, _ = metal.weigh_rows(latent, rows, even, mx.full(totals.shape, 15.0), beside)
    want = 2048 / (2048 + np.exp(15.0))
    assert np.abs(metal.to_numpy(sums) / want - 1).max() < 1e-3


FLOATS = {"latent": mx.float16, "scores": mx.float32, "totals": mx.float32, "beside": mx.float16}
REFUSED = {
    "dtypes": ({"beside": mx.float32}, 9, 3, "of one dtype, not latent float16, beside float32"),
    "dtype": (
        {"latent": mx.int8, "beside": mx.int8},
        *(9, 3, "float32, float16, bfloat16, not int8"),
    ),
    "scores": ({"scores": mx.float16}, 9, 3, "takes scores in float32, not float16"),
    "totals": ({"totals": mx.bfloat16}, 9, 3, "takes totals in float32, not bfloat16"),
    "few-numbers": ({}, 7, 8, "8 elements or more, not 7"),
    "no-rows": ({}, 9, 0, "no rows are to be weighed"),
}


@pytest.mark.parametrize(("changes", "n_rows", "n", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(changes, n_rows, n, sentence):
    dtypes = FLOATS | changes
    shapes = {"latent": (1, n_rows, 1), "scores": (1, 1, 1, n), "totals": (1, 1, 1)}
    arrays = {name: mx.zeros(shapes.get(name, (1, 1, 1, 4)), dtypes[name]) for name in dtypes}
    latent, rows = Latent((arrays.pop("latent"),)), mx.zeros((1, 1, n), mx.int32)
    assert sentence in weigh_rows.KERNEL.why_not(latent, rows, **arrays)


def test_one_kernel_takes_all_bits(emulated):
    with emulator.settings() as launches:
        for bits in ((4, 4), (8, 6, 5, 4, 3, 2)):
            weigh_rows.KERNEL(*make_arguments(emulated, replace(PACKED, bits=bits), "float16"))
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


def test_a_simdgroup_looks_after_one_query():
    n_simdgroups = weigh_rows.ROWS * BAND // common.SIMDGROUP // common.SIMDGROUP
    assert n_simdgroups == weigh_rows.QUERIES


SOURCE, LATENT = (weigh_rows, "SOURCE"), (common, "LATENT_SOURCE")
READ_PLAIN, READ_PACKED = (common, "_READ_PLAIN"), (common, "_READ_PACKED")
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "last-row-not-taken": (PLAIN, SOURCE, "first + k < n_here)", "first + k < n_here - 1)"),
    "row-past-the-last": (PLAIN, SOURCE, "first + k < n_here)", "first + k <= n_here)"),
    "last-weight-missing": (PLAIN, SOURCE, "i < n_here ?", "i < n_here - 1 ?"),
    "weights-of-the-next-rows": (PLAIN, SOURCE, "fours[q][first / 4]", "fours[q][first / 4 + 1]"),
    "last-tile-of-rows-missing": (PLAIN, SOURCE, "first < n_here;", "first + 128 < n_here;"),
    "last-piece-missing": (LONG, SOURCE, "start < n;", "start + piece < n;"),
    "scores-of-the-first-piece": (LONG, SOURCE, "of_query[start + i]", "of_query[i]"),
    "rows-of-the-first-piece": (LONG, SOURCE, "start + first + k]", "first + k]"),
    "maximum-without-the-last-row": (PLAIN, SOURCE, "&& i < n;", "&& i < n - 1;"),
    "rows-of-another-head": (PLAIN, SOURCE, "rows[kv_head * n", "rows[batch * n_kv_heads * n"),
    "rows-of-another-batch": (PLAIN, SOURCE, "rows[kv_head * n", "rows[head * n"),
    "scores-of-the-first-head": (PLAIN, SOURCE, "(first_query + sg)", "(query + sg)"),
    "scores-of-the-first-tile": (PLAIN, SOURCE, "(first_query + sg)", "(first_query - query + sg)"),
    "weights-of-the-next-query": (PLAIN, SOURCE, "fours[q]", "fours[(q + 1) % n_summed]"),
    "maximum-missing": (PLAIN, SOURCE, "[start + i] - largest", "[start + i]"),
    "maximum-without-the-others": (PLAIN, SOURCE, "largest = total,", "largest = -INFINITY,"),
    "maximum-of-a-lane": (PLAIN, SOURCE, "simd_max(largest)", "largest"),
    "sum-of-a-lane": (PLAIN, SOURCE, "simd_sum(divisor)", "divisor"),
    "sum-without-the-others": (PLAIN, SOURCE, " + exp(total - largest);", ";"),
    "totals-of-the-first-query": (PLAIN, SOURCE, "totals[first_query + sg]", "totals[first_query]"),
    "totals-of-the-first-head": (PLAIN, SOURCE, "totals[first_query", "totals[query"),
    "sums-not-divided": (PLAIN, SOURCE, "sum / divisors[q]", "sum"),
    "rest-not-divided": (PLAIN, SOURCE, "largest) / divisor", "largest)"),
    "rest-of-the-first-query": (PLAIN, SOURCE, "left[e / value_dim]", "left[0]"),
    "rest-of-another-batch": (PLAIN, SOURCE, "beside[at]", "beside[at % (20 * value_dim)]"),
    "rest-of-the-first-tile": (PLAIN, SOURCE, "beside[at]", "beside[at - query * value_dim]"),
    "last-of-the-rest-unwritten": (PLAIN, SOURCE, "n_summed * value_dim;", "n_summed - 1;"),
    "last-query-unwritten": (PLAIN, SOURCE, "e < n_summed * N", "e < (n_summed - 1) * N"),
    "last-tile-of-queries-missing": (PLAIN, SOURCE, "(n_queries + QUERIES - 1)", "n_queries"),
    "half-a-row-missing": (PLAIN, SOURCE, "x[k].high[c])", "x[k].low[c])"),
    "second-eight-threads-missing": (PLAIN, SOURCE, "simd_shuffle_xor(sums[q][c], 8)", "0.0f"),
    "second-half-of-a-simdgroup-missing": (PLAIN, SOURCE, "simd_shuffle_xor(sum, 16)", "0.0f"),
    "last-simdgroup-missing": (PLAIN, SOURCE, "i < n_simdgroups", "i < n_simdgroups - 1"),
    "first-band-again": (PLAIN, SOURCE, "= first_column + thread_index", "= thread_index"),
    "last-column-unwritten": (PLAIN, SOURCE, ">= stored.width", ">= stored.width - 1"),
    "numbers-of-another-batch": (PLAIN, READ_PLAIN, ".z) * n_rows", ".z) * 0"),
    "last-rank-missing": (PLAIN, LATENT, "load_four(from, width - column)", "load_four(from, 0)"),
    "wrong-shift": (PACKED, LATENT, "codes >> shift", "codes >> (shift ^ 8)"),
    "second-word-missing": (PACKED, LATENT, "ulong(from[1]) << 32", "ulong(0)"),
    "bias-missing": (PACKED, LATENT, "scale, bias)", "scale, 0.0f)"),
    "words-of-another-batch": (PACKED, READ_PACKED, "words + first_stored * n_words", "words"),
    "scales-of-another-batch": (PACKED, READ_PACKED, "scales + first_stored * n_bands", "scales"),
    "bits-of-the-first-band": (PACKED, LATENT, "bits = bands[2 * band]", "bits = bands[0]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, plant, name):
    case, *fault = FAULTS[name]
    plant(*fault)
    metal.kernels.check = lambda *args: None
    try:
        error = kernel_error(metal, reference, case, "float32")
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert error > 10 * TOLERANCE["float32"], f"an error of {error:.1e} only"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("occurrence", range(weigh_rows.SOURCE.count(BARRIER)))
def test_missing_barrier_is_caught(emulated, plant, occurrence):
    plant(SOURCE, BARRIER, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        weigh_rows.KERNEL(*make_arguments(emulated, LONG, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


def test_missing_weights_past_the_last_are_caught(emulated, plant):
    plant(SOURCE, "(n_here + 3) / 4 * 4", "n_here")
    with pytest.raises(emulator.MetalKernelError) as caught:
        weigh_rows.KERNEL(*make_arguments(emulated, PLAIN, "float16"))
    assert caught.value.kind == "uninitialised"


@pytest.mark.parametrize(
    "fault", ["scores-of-the-first-tile", "rows-of-another-head", "second-word-missing"]
)
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    case, *place = FAULTS[fault]
    plant(*place)
    # one KV head, one tile, and bits of which no eight numbers are in two words
    case = replace(case, n_rebuilt=9, n_heads=2, n_kv_heads=1, bits=case.bits and (4,))
    with pytest.raises(xkv.InputError, match="weigh_rows disagrees with its plain twin"):
        emulated.weigh_rows(*make_arguments(emulated, case, "float16"))
