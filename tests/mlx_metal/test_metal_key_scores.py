"""The Metal kernel that scores some rows' keys, against the reference, with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, key_scores
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, hide_rows, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops import working_set
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import RopeRun, RopeSpec, Stored

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(136, 6, 2, 128, 37, 8, batch=2, n_recent=0, rope_scale=1.2)
"""Two tiles, two steps of the product, three queries, and a rotation that scales."""
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
MOST_THREADGROUP_BYTES = 25_000
"""Of the 32 KiB that a threadgroup may have."""

Change = Callable[[Stored], Stored]


def keep(stored: Stored) -> Stored:
    return stored


def with_arrays(*arrays: mx.array, bits: tuple[int, ...] = ()) -> Change:
    return lambda stored: stored._replace(latent=Latent(arrays, bits))


def draw_rows(case: DecodeCase, n: int) -> np.ndarray:
    """Row numbers in no order, some of them twice."""
    shape = (case.batch, case.n_kv_heads, n)
    return np.random.default_rng(1).integers(0, case.n_rows, shape)


def make_arguments(
    metal: MLXBackend, case: DecodeCase, dtype: str, rows: np.ndarray | None = None
) -> tuple[Any, ...]:
    """The kernel's, with NaN in all rows that are not taken."""
    x = make_inputs(metal, case, dtype)
    rows = metal.to_numpy(x.rows) if rows is None else rows
    is_taken = np.zeros(x.segment.keys.latent.shape[:2], bool)
    np.put_along_axis(is_taken, rows.reshape(len(rows), -1), True, axis=1)
    latent = hide_rows(metal, x.segment.keys.latent, is_taken)
    return x.segment.keys._replace(latent=latent), mx.array(rows), x.queries


def kernel_error(
    metal: MLXBackend,
    reference: Backend,
    case: DecodeCase,
    dtype: str,
    change: Change = keep,
    rows: np.ndarray | None = None,
) -> float:
    """Relative error of the kernel, the path asserted."""
    stored, numbers, queries = make_arguments(metal, case, dtype, rows)
    got = metal.key_scores(change(stored), numbers, queries)
    assert metal.kernels.last_path["key_scores"] == "key_scores"
    assert got.dtype == mx.float32
    exact = make_inputs(reference, case, dtype, exact=True)
    numbers = reference.from_numpy(metal.to_numpy(numbers).astype(np.int64))
    want = reference.key_scores(change(exact.segment.keys), numbers, exact.queries)
    return relative_error(metal.to_numpy(got), reference.to_numpy(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_key_scores_are_right(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_key_scores_do_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert kernel_error(emulated, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize(
    ("n", "dtype"), [(1, "int32"), (31, "uint32"), (32, "int64"), (33, "int32"), (65, "int32")]
)
def test_key_scores_take_any_rows(metal, reference, n, dtype):
    rows = draw_rows(PLAIN, n).astype(dtype)
    assert kernel_error(metal, reference, PLAIN, "float16", rows=rows) < TOLERANCE["float16"]


RANKS = [replace(PLAIN, rank_k=rank) for rank in (1, 7, 8, 31, 32, 33, 100)]
BANDS = [replace(PACKED, bits=bits) for bits in ((2,), (3, 3), (5, 2, 6), (6, 8, 5, 3))]


@pytest.mark.parametrize("case", [*RANKS, *BANDS], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_key_scores_take_any_latent(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


def test_key_scores_take_one_basis_for_all_batches(metal, reference):
    error = kernel_error(
        metal, reference, PLAIN, "float32", lambda x: x._replace(basis=x.basis[:1])
    )
    assert error < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_queries"), [(1, 1, 1), (2, 2, 4), (7, 1, 1), (8, 8, 1), (32, 2, 3)]
)
def test_key_scores_take_any_queries(metal, reference, n_heads, n_kv_heads, n_queries):
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_queries": n_queries}
    case = replace(PACKED, n_rebuilt=21, **heads)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


SPECS = {
    "no-rope": None,
    "partial-traditional": RopeSpec.standard(32, 10_000.0, traditional=True),
    "six-features": RopeSpec((1.0, 30.0, 900.0)),
    "traditional": RopeSpec.standard(128, 500_000.0, traditional=True),
    "scaled": RopeSpec(RopeSpec.standard(128, 500_000.0, position_scale=0.25).freqs, scale=0.7),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_key_scores_rotate_like_the_reference(metal, reference, spec):
    runs = (RopeRun(PLAIN.n_rows, spec),)
    error = kernel_error(metal, reference, PLAIN, "float32", lambda x: x._replace(rope_runs=runs))
    assert error < TOLERANCE["float32"]


def test_angles_of_far_positions_are_those_of_the_plain_twin(metal):
    x = make_inputs(metal, replace(PLAIN, start=100_000), "float32")
    arguments = x.segment.keys, mx.array(draw_rows(PLAIN, 40)), x.queries
    want = metal.to_numpy(working_set.key_scores(metal, *arguments))
    metal.kernels.check = lambda *args: None
    # a float32 angle there is known to 4e-3; the twin looks its angles up
    assert relative_error(metal.to_numpy(metal.key_scores(*arguments)), want) < 2e-3


def test_scores_are_of_keys_that_are_not_rounded(metal, reference):
    x = make_inputs(reference, PLAIN, "float16", exact=True)
    arguments = make_arguments(metal, PLAIN, "float16")
    scores = metal.key_scores(*arguments)
    want = reference.key_scores(x.segment.keys, x.rows, x.queries)
    # rounded keys make it 2e-4
    assert relative_error(metal.to_numpy(scores), reference.to_numpy(want)) < 1e-5


def test_key_scores_take_a_part_of_all_queries(metal):
    stored, rows, queries = make_arguments(metal, PLAIN, "float16")
    wider = mx.concatenate([queries, mx.full(queries.shape, mx.nan, mx.float16)], axis=-1)
    found = metal.key_scores(stored, rows, wider[..., :128])
    assert mx.array_equal(found, key_scores.KERNEL(stored, rows, queries))


REFUSED = {
    "head-dim": (lambda s: s._replace(basis=s.basis[..., :48]), 3, "head_dim 64, 128, 256, not 48"),
    "runs": (lambda s: s._replace(rope_runs=s.rope_runs * 2), 3, "have 2 different rotations"),
    "dtypes": (
        lambda s: s._replace(basis=s.basis.astype(mx.float32)),
        3,
        "arrays of one dtype, not latent float16, basis float32, queries float16",
    ),
    "scales": (
        with_arrays(mx.zeros((2, 9, 8), mx.uint32), *[mx.zeros((2, 9, 1))] * 2, bits=(4,)),
        3,
        "not latent float32, basis float16",
    ),
    "few-numbers": (with_arrays(mx.zeros((1, 1, 7), mx.float16)), 1, "8 elements or more, not 7"),
    "few-scales": (
        with_arrays(mx.zeros((1, 7, 8), mx.uint32), *[mx.zeros((1, 7, 1), mx.float16)] * 2),
        1,
        "8 elements or more, not 7",
    ),
    "no-rows": (keep, 0, "no rows are to be rebuilt"),
}


@pytest.mark.parametrize(("change", "n", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(metal, change, n, sentence):
    x = make_inputs(metal, PLAIN, "float16")
    rows = mx.array(draw_rows(PLAIN, n))
    assert sentence in key_scores.KERNEL.why_not(change(x.segment.keys), rows, x.queries)


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
def test_why_not_says_that_there_is_no_device():
    assert "this machine has none" in common.device_problem()


def test_one_kernel_takes_all_bits(emulated):
    with emulator.settings() as launches:
        for bits in ((4, 4), (8, 6, 5, 4, 3, 2)):
            key_scores.KERNEL(*make_arguments(emulated, replace(PACKED, bits=bits), "float16"))
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", key_scores.HEAD_DIMS)
def test_key_scores_leave_threadgroup_memory(emulated, head_dim, dtype):
    case = replace(PLAIN, n_rows=9, head_dim=head_dim)
    with emulator.settings() as launches:
        key_scores.KERNEL(*make_arguments(emulated, case, dtype))
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


SOURCE, LATENT = (key_scores, "SOURCE"), (common, "LATENT_SOURCE")
PRODUCT, READ_PACKED = (common, "PRODUCT_SOURCE"), (common, "_READ_PACKED")
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "position-off-by-one": (PLAIN, SOURCE, "start + row", "start + 1 + row"),
    "last-row-not-taken": (PLAIN, SOURCE, "i < end ?", "i < end - 1 ?"),
    "last-row-unwritten": (PLAIN, SOURCE, "row >= end", "row >= end - 1"),
    "rope-scale-missing": (PLAIN, SOURCE, "x[k] * rope[0]", "x[k]"),
    "wrong-kv-head": (PLAIN, SOURCE, "n_kv_heads + head) * N", "n_kv_heads + 1 - head) * N"),
    "basis-of-another-batch": (PLAIN, SOURCE, "== 1 ? 0 : batch", "== 1 ? 0 : 0"),
    "last-rank-missing": (PLAIN, LATENT, "column - 4)", "column - 5)"),
    "second-four-missing": (PLAIN, LATENT, "load_four(from + 4,", "load_four(from,"),
    "rows-of-another-batch": (PLAIN, (common, "_READ_PLAIN"), ".z) * n_rows", ".z) * 0"),
    "last-depth-missing": (PLAIN, PRODUCT, "first < left.width;", "first + 8 < left.width;"),
    "second-pair-of-a-lane-missing": (PLAIN, SOURCE, "k < N / 64", "k < 1"),
    "product-of-the-next-row": (PLAIN, SOURCE, "shown + i *", "shown + (i + 1) % 8 *"),
    "rotation-missing": (PLAIN, SOURCE, "pair < n_pairs)\n", "pair < 0)\n"),
    "last-simdgroup-missing": (PLAIN, SOURCE, "int i = sg;", "int i = sg == 3 ? N : sg;"),
    "scores-of-the-first-pairs": (PLAIN, SOURCE, "features(32 * k + lane", "features(lane"),
    "scores-of-other-pairs": (PLAIN, SOURCE, "lane, n_pairs, T", "lane, 0, T"),
    "half-a-pair-missing": (PLAIN, SOURCE, "+ at.y]), x[k].y", "+ at.y]), 0.0f"),
    "half-a-pair-twice": (PLAIN, SOURCE, "N + at.y]", "N + at.x]"),
    "sum-of-a-lane": (PLAIN, SOURCE, "simd_sum(score)", "score"),
    "last-query-missing": (PLAIN, SOURCE, "q < n_queries", "q < n_queries - 1"),
    "first-query-again": (PLAIN, SOURCE, "queries[query * N", "queries[(query - q) * N"),
    "queries-of-the-first-head": (PLAIN, SOURCE, "queries[query * N", "queries[q * N"),
    "scores-of-the-first-head": (PLAIN, SOURCE, "out[query * n", "out[q * n"),
    "scores-of-the-first-tile": (PLAIN, SOURCE, "out[query * n + first", "out[query * n"),
    "scores-of-the-next-row": (PLAIN, SOURCE, "n + first + row]", "n + first + (row + 1) % end]"),
    "wrong-shift": (PACKED, LATENT, "codes >> shift", "codes >> (shift ^ 8)"),
    "second-word-missing": (PACKED, LATENT, "ulong(from[1]) << 32", "ulong(0)"),
    "bias-missing": (PACKED, LATENT, "scale, bias)", "scale, 0.0f)"),
    "scale-of-first-band": (PACKED, LATENT, "scales[row * n_bands + band", "scales[row * n_bands"),
    "words-of-the-first-band": (PACKED, LATENT, "bands[2 * band + 1]", "0"),
    "bits-of-the-first-band": (PACKED, LATENT, "bits = bands[2 * band]", "bits = bands[0]"),
    "words-of-another-batch": (PACKED, READ_PACKED, "words + first_stored * n_words", "words"),
    "scales-of-another-batch": (PACKED, READ_PACKED, "scales + first_stored * n_bands", "scales"),
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


@pytest.mark.parametrize("occurrence", range(common.PRODUCT_SOURCE.count(BARRIER)))
def test_missing_barrier_is_caught(emulated, plant, occurrence):
    assert BARRIER not in key_scores.SOURCE
    plant(PRODUCT, BARRIER, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        key_scores.KERNEL(*make_arguments(emulated, PLAIN, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize("fault", ["queries-of-the-first-head", "scores-of-the-first-tile"])
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    plant(*FAULTS[fault][1:])
    # one KV head, one tile, one query
    case = replace(PLAIN, n_rebuilt=9, n_heads=1, n_kv_heads=1)
    with pytest.raises(xkv.InputError, match=r"key_scores (disagrees|failed)"):
        emulated.key_scores(*make_arguments(emulated, case, "float16"))


def test_check_at_first_use_tries_other_bits_than_those_given(emulated, plant):
    plant(*FAULTS["second-word-missing"][1:])
    # no eight numbers of four bits are in two words
    arguments = make_arguments(emulated, replace(PACKED, bits=(4,)), "float16")
    with pytest.raises(xkv.InputError, match="key_scores disagrees with its plain twin"):
        emulated.key_scores(*arguments)
