"""The Metal kernel that multiplies queries and a basis, against the reference and with faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import query_terms
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.index import absorbed_queries, index_basis

pytest_plugins = ["tests.metal_device"]

CASE = DecodeCase(
    *(8, 6, 2, 128, 11, 8),
    **{
        "n_recent": 0,
        "n_rebuilt": 1,
        "n_queries": 3,
        "batch": 2,
        "rope_dims": 80,
        "rope_scale": 1.2,
    },
)
"""Six whole tiles of columns and one of six; one whole tile of pairs and one of eight."""
TRADITIONAL, ROTATED = replace(CASE, traditional=True), replace(CASE, rope_dims=None)
MOST_THREADGROUP_BYTES = 9_000
"""Of the 32 KiB that a threadgroup may have."""


def make_arguments(metal: MLXBackend, case: DecodeCase, dtype: str) -> tuple[Any, ...]:
    """The kernel's; a plain basis is a part of a longer one that goes on with NaN."""
    x = make_inputs(metal, case, dtype)
    basis = index_basis(metal, x.segment.keys)
    longer = mx.concatenate([basis, mx.nan * basis], axis=1)
    return x.queries * x.scale, longer[:, : basis.shape[1]], case.spec


def error_of(metal: MLXBackend, reference: Backend, arguments: tuple[Any, ...]) -> float:
    """Relative error of the kernel, the path asserted."""
    *arrays, spec = arguments
    got = metal.query_terms(*arrays, spec)
    assert metal.kernels.last_path["query_terms"] == "query_terms"
    assert got.dtype == arrays[0].dtype
    exact = [reference.from_numpy(metal.to_numpy(x).astype(np.float64)) for x in arrays]
    want = reference.to_numpy(reference.query_terms(*exact, spec))
    return relative_error(metal.to_numpy(got), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, CASE, TRADITIONAL], ids=str)
def test_query_terms_is_right(metal, reference, case, dtype):
    assert error_of(metal, reference, make_arguments(metal, case, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("schedule", ["reverse", "random"])
@pytest.mark.parametrize("case", [CASE, TRADITIONAL], ids=["halves", "traditional"])
def test_query_terms_does_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        arguments = make_arguments(emulated, case, "float16")
        assert error_of(emulated, reference, arguments) < TOLERANCE["float16"]


@pytest.mark.parametrize("rank", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_query_terms_takes_any_number_of_columns(metal, reference, rank, n_queries):
    case = replace(CASE, rank_k=rank, n_queries=n_queries, n_heads=3, n_kv_heads=1)
    arguments = make_arguments(metal, case, "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize("rope_dims", [2, 62, 64, 66, 126, 128])
@pytest.mark.parametrize("traditional", [False, True], ids=["halves", "traditional"])
def test_query_terms_takes_any_pairs(metal, reference, rope_dims, traditional):
    case = replace(CASE, rope_dims=rope_dims, traditional=traditional)
    arguments = make_arguments(metal, case, "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize("head_dim", [2, 6, 80, 192, 256])
def test_query_terms_takes_any_head_dim(metal, reference, head_dim):
    sizes = {"head_dim": head_dim, "rope_dims": 2, "n_heads": 1, "n_kv_heads": 1, "batch": 1}
    case = replace(CASE, rank_k=3, n_queries=1, **sizes)
    arguments = make_arguments(metal, case, "float32")
    assert error_of(metal, reference, arguments) < TOLERANCE["float32"]


@pytest.mark.parametrize("shared", [0, 1], ids=["queries", "basis"])
def test_one_batch_is_every_batch(metal, reference, shared):
    arguments = list(make_arguments(metal, CASE, "float32"))
    arguments[shared] = arguments[shared][:1]
    assert error_of(metal, reference, tuple(arguments)) < TOLERANCE["float32"]


def test_query_terms_takes_any_strides(metal):
    queries, basis, spec = make_arguments(metal, CASE, "float16")
    want = query_terms.KERNEL(queries, basis, spec)
    columns = mx.contiguous(basis.swapaxes(1, 3)).swapaxes(1, 3)
    got = query_terms.KERNEL(mx.repeat(queries, 2, axis=3)[..., ::2], columns, spec)
    assert mx.array_equal(got, want)


def test_absorbed_queries_go_through_the_kernel(metal, reference):
    x = make_inputs(metal, CASE, "float32")
    got = absorbed_queries(metal, x.queries * x.scale, x.segment.keys)
    assert metal.kernels.last_path["query_terms"] == "query_terms"
    exact = make_inputs(reference, CASE, "float32", exact=True)
    want = absorbed_queries(reference, exact.queries * exact.scale, exact.segment.keys)
    assert relative_error(metal.to_numpy(got), reference.to_numpy(want)) < TOLERANCE["float32"]


REFUSED = {
    "dtypes": ((mx.float16, mx.float32), "one dtype, not queries float16, basis float32"),
    "dtype": ((mx.int8, mx.int8), "float32, float16, bfloat16, not int8"),
}


@pytest.mark.parametrize(("dtypes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(dtypes, sentence):
    queries, basis = (mx.zeros((1, 1, 1, 64), dtype) for dtype in dtypes)
    assert sentence in query_terms.KERNEL.why_not(queries, basis, CASE.spec)


def test_one_kernel_takes_all_sizes(emulated):
    others = {"head_dim": 64, "rope_dims": 16, "n_heads": 3, "n_kv_heads": 1, "batch": 1}
    with emulator.settings() as launches:
        for case in (CASE, ROTATED, replace(CASE, n_queries=1, **others)):
            query_terms.KERNEL(*make_arguments(emulated, case, "float16"))
    assert len(launches) == 3
    assert len({(launch.name, launch.text) for launch in launches}) == 1
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


SOURCE = (query_terms, "SOURCE")
# Name: a case, the text of the source that is replaced, by what.
FAULTS = {
    "last-column-missing": (CASE, "n_columns - first_column)", "n_columns - 1 - first_column)"),
    "column-past-the-last": (CASE, "lane >= n_columns", "lane > n_columns"),
    "first-tile-of-columns-again": (CASE, "column = first_column + c,", "column = c,"),
    "rows-of-queries": (CASE, "column / (n_heads * n_queries)", "column / n_heads % 11"),
    "heads-of-queries": (CASE, "column / n_queries % n_heads", "column % n_heads"),
    "first-query-again": (CASE, "query = column % n_queries", "query = 0"),
    "queries-of-another-batch": (CASE, "queries_batch *", "0 *"),
    "queries-of-another-head": (
        CASE,
        "head * queries_strides[1]",
        "(head ^ 1) * queries_strides[1]",
    ),
    "basis-of-another-batch": (CASE, "basis_batch *", "0 *"),
    "basis-as-if-copied": (
        CASE,
        "basis_batch * basis_strides[0]",
        "basis_batch * basis_shape[1] * basis_strides[1]",
    ),
    "basis-of-another-head": (CASE, "head / group", "head % basis_shape[2]"),
    "next-row-of-the-basis": (CASE, "row * basis", "(row + 1) % basis_shape[1] * basis"),
    "cosine-of-the-first-features": (CASE, "q1 * b1 + q2 * b2", "q1 * b1"),
    "cosine-with-another-sign": (CASE, "q1 * b1 + q2 * b2", "q1 * b1 - q2 * b2"),
    "sine-turns-the-other-way": (CASE, "q2 * b1 - q1 * b2", "q1 * b2 - q2 * b1"),
    "cosine-not-scaled": (CASE, "q2 * b2) * scale", "q2 * b2)"),
    "sine-not-scaled": (CASE, "q1 * b2) * scale", "q1 * b2)"),
    "neighbours-where-halves-are": (CASE, "TRADITIONAL ? 2 * pair :", "!TRADITIONAL ? 2 * pair :"),
    "halves-where-neighbours-are": (TRADITIONAL, "2 * pair + 1 : pair", "pair : pair"),
    "halves-of-the-head": (CASE, "pair + n_pairs;", "pair + head_dim / 2;"),
    "last-pair-missing": (CASE, "pair >= n_pairs) c", "pair >= n_pairs - 1) c"),
    "last-pair-unwritten": (CASE, "n_pairs - first_pair)", "n_pairs - 1 - first_pair)"),
    "pair-past-the-last": (CASE, "n_pairs - first_pair)", "n_pairs + 1 - first_pair)"),
    "first-tile-of-pairs-again": (CASE, "pair = first_pair + lane", "pair = lane"),
    "sines-in-place-of-cosines": (CASE, "to[(n_pairs + pair)", "to[(pair)"),
    "cosines-twice": (CASE, "T(terms[1]", "T(terms[0]"),
    "not-transposed": (CASE, "T(terms[1][p][lane])", "T(terms[1][lane][p])"),
    "first-of-the-rest-missing": (CASE, "i = 2 * n_pairs + lane", "i = 2 * n_pairs + 1 + lane"),
    "last-of-the-rest-missing": (CASE, "i < head_dim; i", "i < head_dim - 1; i"),
    "second-half-of-the-rest-missing": (CASE, "i < head_dim; i", "i < 2 * n_pairs + 32; i"),
    "a-lane-of-the-rest": (CASE, "sum = simd_sum(sum);", ""),
    "rest-scaled": (CASE, "= T(sum)", "= T(sum * scale)"),
    "rest-in-place-of-a-sine": (CASE, "n_terms - 1)", "n_terms - 2)"),
    "no-room-for-the-rest": (CASE, "int(2 * n_pairs < head_dim)", "0"),
    "rest-where-there-is-none": (ROTATED, "int(2 * n_pairs < head_dim)", "1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, plant, name):
    case, *fault = FAULTS[name]
    plant(SOURCE, *fault)
    metal.kernels.check = lambda *args: None
    try:
        error = error_of(metal, reference, make_arguments(metal, case, "float32"))
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert error > 10 * TOLERANCE["float32"], f"an error of {error:.1e} only"


@pytest.mark.parametrize("shared", [0, 1], ids=["queries", "basis"])
def test_batch_that_is_not_there_is_caught(metal, reference, plant, shared):
    name = ("queries", "basis")[shared]
    plant(SOURCE, f"{name}_shape[0] == 1 ? 0 : batch", "batch")
    metal.kernels.check = lambda *args: None
    with pytest.raises((ValueError, AssertionError, emulator.MetalKernelError)) as found:
        test_one_batch_is_every_batch(metal, reference, shared)
    assert getattr(found.value, "kind", "") != "compile"


def test_missing_barrier_is_caught(emulated, plant):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    assert query_terms.SOURCE.count(barrier) == 1
    plant(SOURCE, barrier, "")
    with pytest.raises(emulator.MetalKernelError) as caught:
        query_terms.KERNEL(*make_arguments(emulated, CASE, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize(
    "fault",
    [
        "queries-of-another-batch",
        "basis-of-another-head",
        "first-query-again",
        "next-row-of-the-basis",
    ],
)
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    case, *texts = FAULTS[fault]
    plant(SOURCE, *texts)
    case = replace(case, rank_k=1, n_heads=1, n_kv_heads=1, n_queries=1, batch=1)
    with pytest.raises(xkv.InputError, match="query_terms disagrees with its plain twin"):
        emulated.query_terms(*make_arguments(emulated, case, "float16"))
