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
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(400, 20, 2, 64, 8, 101, batch=2, n_kept=0, n_rebuilt=150)
"""Two bands, the last one not whole; two tiles of rows and of queries."""
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
MOST_THREADGROUP_BYTES = 25_000
"""Of the 32 KiB that a threadgroup may have."""


def make_arguments(metal: MLXBackend, case: DecodeCase, dtype: str) -> tuple[Any, ...]:
    """The kernel's, with peaked weights, and NaN in all rows that are not weighed."""
    x = make_inputs(metal, case, dtype)
    latent, rows = x.segment.values.latent, metal.to_numpy(x.rows)
    is_used = np.zeros(latent.shape[:2], bool)
    np.put_along_axis(is_used, rows.reshape(len(rows), -1), True, axis=1)
    n_queries = case.n_heads // case.n_kv_heads * case.n_queries
    scores = np.random.default_rng(1).standard_normal((*rows.shape[:2], n_queries, rows.shape[2]))
    weights = mx.softmax(metal.from_numpy(3 * scores.astype(np.float32)), axis=-1)
    return hide_rows(metal, latent, is_used), x.rows, weights.astype(getattr(mx, dtype))


def expected(
    reference: Backend, case: DecodeCase, dtype: str, rows: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """In float64, of the same rounded inputs."""
    latent = make_inputs(reference, case, dtype, exact=True).segment.values.latent
    exact = (reference.from_numpy(rows.astype(np.int64)), reference.from_numpy(weights))
    return reference.to_numpy(reference.weigh_rows(latent, *exact))


def kernel_error(metal: MLXBackend, reference: Backend, case: DecodeCase, dtype: str) -> float:
    """Relative error of the kernel, the path asserted."""
    latent, rows, weights = make_arguments(metal, case, dtype)
    got = metal.weigh_rows(latent, rows, weights)
    assert metal.kernels.last_path["weigh_rows"] == "weigh_rows"
    assert got.dtype == weights.dtype
    exact = metal.to_numpy(weights).astype(np.float64)
    return relative_error(
        metal.to_numpy(got), expected(reference, case, dtype, metal.to_numpy(rows), exact)
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


@pytest.mark.parametrize("n", [1, 3, 4, 127, 128, 129, 385])
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
def test_weigh_rows_takes_any_number_of_rows(metal, reference, case, n):
    case = replace(case, n_rebuilt=n)
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
    latent, rows, weights = make_arguments(metal, PLAIN, "float16")
    want = weigh_rows.KERNEL(latent, rows, weights)
    got = metal.weigh_rows(latent, rows.astype(getattr(mx, dtype)), weights)
    assert mx.array_equal(got, want)


def test_weigh_rows_takes_a_part_of_all_weights(metal):
    latent, rows, weights = make_arguments(metal, PLAIN, "float16")
    wider = mx.concatenate([weights, mx.full((*weights.shape[:3], 5), mx.nan, mx.float16)], axis=-1)
    want = weigh_rows.KERNEL(latent, rows, weights)
    got = metal.weigh_rows(latent, rows, wider[..., : rows.shape[2]])
    assert mx.array_equal(got, want)


def test_sums_are_in_float32(metal):
    case = replace(PLAIN, n_rows=2048, n_rebuilt=2048, n_heads=2, rank_v=9)
    latent, rows, weights = make_arguments(metal, case, "float16")
    latent, even = latent.map(lambda x: mx.ones_like(x)), mx.full(weights.shape, 1.25, mx.float16)
    # a half that has reached 2,048 stays there when 1.25 is added, or grows by 2
    assert metal.weigh_rows(latent, rows, even).tolist() == mx.full((2, 2, 1, 9), 2560.0).tolist()


REFUSED = {
    "dtypes": ((mx.float16, mx.float32), 9, 3, "arrays of one dtype, not latent float16, weights"),
    "dtype": ((mx.int8, mx.int8), 9, 3, "float32, float16, bfloat16, not int8"),
    "few-numbers": ((mx.float16, mx.float16), 7, 8, "8 elements or more, not 7"),
    "few-weights": ((mx.float16, mx.float16), 9, 7, "8 elements or more, not 7"),
    "no-rows": ((mx.float16, mx.float16), 9, 0, "no rows are to be weighed"),
}


@pytest.mark.parametrize(("dtypes", "n_rows", "n", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(dtypes, n_rows, n, sentence):
    of_latent, of_weights = dtypes
    latent = Latent((mx.zeros((1, n_rows, 1), of_latent),))
    rows, weights = mx.zeros((1, 1, n), mx.int32), mx.zeros((1, 1, 1, n), of_weights)
    assert sentence in weigh_rows.KERNEL.why_not(latent, rows, weights)


def test_one_kernel_takes_all_bits(emulated):
    with emulator.settings() as launches:
        for bits in ((4, 4), (8, 6, 5, 4, 3, 2)):
            weigh_rows.KERNEL(*make_arguments(emulated, replace(PACKED, bits=bits), "float16"))
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


SOURCE, LATENT = (weigh_rows, "SOURCE"), (common, "LATENT_SOURCE")
READ_PLAIN, READ_PACKED = (common, "_READ_PLAIN"), (common, "_READ_PACKED")
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "last-row-not-taken": (PLAIN, SOURCE, "first + k < n)", "first + k < n - 1)"),
    "row-past-the-last": (PLAIN, SOURCE, "first + k < n)", "first + k <= n)"),
    "last-weight-missing": (PLAIN, SOURCE, "n - first)", "n - 1 - first)"),
    "weights-of-the-next-rows": (PLAIN, SOURCE, "q * n + first,", "q * n + first + 1,"),
    "last-tile-of-rows-missing": (PLAIN, SOURCE, "first < n;", "first + 128 < n;"),
    "rows-of-another-head": (PLAIN, SOURCE, "rows[kv_head * n", "rows[batch * n_kv_heads * n"),
    "rows-of-another-batch": (PLAIN, SOURCE, "rows[kv_head * n", "rows[head * n"),
    "weights-of-another-head": (
        PLAIN,
        SOURCE,
        "weights + first_query",
        "weights + (first_query + n_queries) % (2 * n_kv_heads * n_queries)",
    ),
    "weights-of-the-next-query": (PLAIN, SOURCE, "from + q * n", "from + (q + 1) % n_summed * n"),
    "weights-of-the-first-tile": (PLAIN, SOURCE, "* n;\n\n", "* n - query * n;\n\n"),
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


def test_missing_barrier_is_caught(emulated, plant):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    assert weigh_rows.SOURCE.count(barrier) == 1
    plant(SOURCE, barrier, "")
    with pytest.raises(emulator.MetalKernelError) as caught:
        weigh_rows.KERNEL(*make_arguments(emulated, PLAIN, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize(
    "fault", ["weights-of-the-first-tile", "rows-of-another-head", "second-word-missing"]
)
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    case, *place = FAULTS[fault]
    plant(*place)
    # one KV head, one tile, and bits of which no eight numbers are in two words
    case = replace(case, n_rebuilt=9, n_heads=2, n_kv_heads=1, bits=case.bits and (4,))
    with pytest.raises(xkv.InputError, match="weigh_rows disagrees with its plain twin"):
        emulated.weigh_rows(*make_arguments(emulated, case, "float16"))
