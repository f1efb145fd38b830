"""The Metal kernel that rebuilds keys and scores them, against the reference, with planted faults.

What it has in common with the one that only rebuilds rows, is in test_metal_rebuild_rows.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, rebuild_rows
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, hide_rows, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.types import RopeRun, RopeSpec

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(136, 6, 2, 128, 37, 8, batch=2, n_recent=0, rope_scale=1.2)
"""Two tiles, two steps of the product, three queries, and a rotation that scales."""
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
MOST_THREADGROUP_BYTES = 25_000
"""Of the 32 KiB that a threadgroup may have."""


def make_arguments(metal: MLXBackend, case: DecodeCase, dtype: str) -> tuple[Any, ...]:
    """The kernel's, with NaN in all rows that are not taken."""
    x = make_inputs(metal, case, dtype)
    rows = metal.to_numpy(x.rows)
    is_taken = np.zeros(x.segment.keys.latent.shape[:2], bool)
    np.put_along_axis(is_taken, rows.reshape(len(rows), -1), True, axis=1)
    latent = hide_rows(metal, x.segment.keys.latent, is_taken)
    return x.segment.keys._replace(latent=latent), x.rows, x.queries


def kernel_error(
    metal: MLXBackend,
    reference: Backend,
    case: DecodeCase,
    dtype: str,
    runs: tuple[RopeRun, ...] | None = None,
) -> float:
    """The larger relative error of keys and scores, the path asserted.

    Args:
        runs: Of rotations, instead of the case's.
    """
    stored, rows, queries = make_arguments(metal, case, dtype)
    exact = make_inputs(reference, case, dtype, exact=True)
    of_case = exact.segment.keys
    if runs is not None:
        stored, of_case = (x._replace(rope_runs=runs) for x in (stored, of_case))
    found = metal.rebuild_keys(stored, rows, queries)
    assert metal.kernels.last_path["rebuild_keys"] == "rebuild_keys"
    assert [x.dtype for x in found] == [queries.dtype, mx.float32]
    wanted = reference.rebuild_keys(of_case, exact.rows, exact.queries)
    return max(
        relative_error(metal.to_numpy(got), reference.to_numpy(want))
        for got, want in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rebuild_keys_is_right(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_rebuild_keys_does_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert kernel_error(emulated, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 65])
def test_rebuild_keys_takes_any_number_of_rows(metal, reference, n):
    case = replace(PLAIN, n_rebuilt=n)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_queries"), [(1, 1, 1), (2, 2, 4), (7, 1, 1), (8, 8, 1), (32, 2, 3)]
)
def test_rebuild_keys_takes_any_queries(metal, reference, n_heads, n_kv_heads, n_queries):
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_queries": n_queries}
    case = replace(PACKED, n_rebuilt=21, **heads)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


SPECS = {
    "no-rope": None,
    "partial-traditional": RopeSpec.standard(32, 10_000.0, traditional=True),
    "six-features": RopeSpec((1.0, 30.0, 900.0)),
    "traditional": RopeSpec.standard(128, 500_000.0, traditional=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rebuild_keys_rotates_like_the_reference(metal, reference, spec):
    runs = (RopeRun(PLAIN.n_rows, spec),)
    assert kernel_error(metal, reference, PLAIN, "float32", runs) < TOLERANCE["float32"]


def test_keys_are_those_of_rebuild_rows(metal):
    stored, rows, queries = make_arguments(metal, PLAIN, "float16")
    keys, _ = metal.rebuild_keys(stored, rows, queries)
    assert mx.array_equal(keys, metal.rebuild_rows(stored, rows))


def test_scores_are_of_keys_that_are_not_rounded(metal, reference):
    x = make_inputs(reference, PLAIN, "float16", exact=True)
    arguments = make_arguments(metal, PLAIN, "float16")
    _, scores = metal.rebuild_keys(*arguments)
    _, want = reference.rebuild_keys(x.segment.keys, x.rows, x.queries)
    # rounded keys make it 2e-4
    assert relative_error(metal.to_numpy(scores), reference.to_numpy(want)) < 1e-5


def test_rebuild_keys_takes_a_part_of_all_queries(metal):
    stored, rows, queries = make_arguments(metal, PLAIN, "float16")
    wider = mx.concatenate([queries, mx.full(queries.shape, mx.nan, mx.float16)], axis=-1)
    found = metal.rebuild_keys(stored, rows, wider[..., :128])
    assert all(map(mx.array_equal, found, rebuild_rows.KEYS(stored, rows, queries)))


REFUSED = {
    "head-dim": (lambda s, q: (s._replace(basis=s.basis[..., :48]), q), "128, 256, not 48"),
    "runs": (lambda s, q: (s._replace(rope_runs=s.rope_runs * 2), q), "have 2 different rotations"),
    "dtypes": (
        lambda s, q: (s, q.astype(mx.float32)),
        "not latent float16, basis float16, queries float32",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(metal, change, sentence):
    stored, rows, queries = make_arguments(metal, PLAIN, "float16")
    stored, queries = change(stored, queries)
    assert sentence in rebuild_rows.KEYS.why_not(stored, rows, queries)
    assert "no rows are to be" in rebuild_rows.KEYS.why_not(stored, rows[..., :0], queries)


def test_what_is_refused_here_may_run_in_the_kernel_that_only_rebuilds(emulated):
    stored, rows, queries = make_arguments(emulated, PLAIN, "float16")
    emulated.kernels.mode = "auto"
    emulated.rebuild_keys(stored, rows, queries.astype(mx.float32))
    assert emulated.kernels.last_path == {"rebuild_rows": "rebuild_rows", "rebuild_keys": "plain"}


def test_one_kernel_takes_all_bits(emulated):
    with emulator.settings() as launches:
        for bits in ((4, 4), (8, 6, 5, 4, 3, 2)):
            rebuild_rows.KEYS(*make_arguments(emulated, replace(PACKED, bits=bits), "float16"))
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", rebuild_rows.HEAD_DIMS)
def test_rebuild_keys_leaves_threadgroup_memory(emulated, head_dim, dtype):
    case = replace(PLAIN, n_rows=9, head_dim=head_dim)
    with emulator.settings() as launches:
        rebuild_rows.KEYS(*make_arguments(emulated, case, dtype))
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


SOURCE, LATENT = (rebuild_rows, "SOURCE"), (common, "LATENT_SOURCE")
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "position-off-by-one": (PLAIN, SOURCE, "start + row", "start + 1 + row"),
    "second-pair-of-a-lane-missing": (PLAIN, SOURCE, "k < N / 64", "k < 1"),
    "product-of-the-next-row": (PLAIN, SOURCE, "shown + i *", "shown + (i + 1) % 8 *"),
    "rotation-missing": (PLAIN, SOURCE, "pair < n_pairs)\n", "pair < 0)\n"),
    "last-simdgroup-missing": (PLAIN, SOURCE, "int i = sg;", "int i = sg == 3 ? N : sg;"),
    "scores-of-the-first-pairs": (
        PLAIN,
        SOURCE,
        "pair_features(32 * k + lane",
        "pair_features(lane",
    ),
    "scores-of-other-pairs": (PLAIN, SOURCE, "lane, n_pairs, T", "lane, 0, T"),
    "half-a-pair-missing": (PLAIN, SOURCE, "+ at.y]), x[k].y", "+ at.y]), 0.0f"),
    "half-a-pair-twice": (PLAIN, SOURCE, "N + at.y]", "N + at.x]"),
    "sum-of-a-lane": (PLAIN, SOURCE, "simd_sum(score)", "score"),
    "last-query-missing": (PLAIN, SOURCE, "q < n_queries", "q < n_queries - 1"),
    "first-query-again": (PLAIN, SOURCE, "queries[query * N", "queries[(query - q) * N"),
    "queries-of-the-first-head": (PLAIN, SOURCE, "queries[query * N", "queries[q * N"),
    "scores-of-the-first-head": (PLAIN, SOURCE, "scores[query * n", "scores[q * n"),
    "scores-of-the-first-tile": (PLAIN, SOURCE, "scores[query * n + first", "scores[query * n"),
    "scores-of-the-next-row": (PLAIN, SOURCE, "n + first + row]", "n + first + (row + 1) % end]"),
    "second-word-missing": (PACKED, LATENT, "ulong(from[1]) << 32", "ulong(0)"),
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
    plant((common, "PRODUCT_SOURCE"), BARRIER, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        rebuild_rows.KEYS(*make_arguments(emulated, PLAIN, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


@pytest.mark.parametrize("fault", ["queries-of-the-first-head", "scores-of-the-first-tile"])
def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant, fault):
    plant(*FAULTS[fault][1:])
    # one KV head, one tile, one query
    case = replace(PLAIN, n_rebuilt=9, n_heads=1, n_kv_heads=1)
    with pytest.raises(xkv.InputError, match=r"rebuild_keys (disagrees|failed)"):
        emulated.rebuild_keys(*make_arguments(emulated, case, "float16"))
