"""The Metal kernel that scores every row by the index, against the reference and with faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, index_scores
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, hide_rows, make_inputs
from xkv.checks.operations import absorbed_of, offsets_of
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.index import BLOCK, absorbed_queries, n_columns
from xkv.ops.latent import Latent
from xkv.ops.types import RopeRun

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(300, 20, 2, 64, 70, 8, batch=2, n_recent=0, n_queries=2)
"""Two blocks, three tiles, and a KV head whose queries are in two tiles."""
PACKED = replace(PLAIN, bits=(5, 8, 4, 3, 2))
SHORT = replace(PLAIN, n_heads=2, n_queries=1, n_rows=9)
MOST_THREADGROUP_BYTES = 25_000


def make_arguments(metal: MLXBackend, case: DecodeCase, dtype: str) -> tuple[Any, ...]:
    """The kernel's, with NaN past the end of the latent."""
    x = make_inputs(metal, case, dtype)
    latent = hide_rows(metal, x.segment.keys.latent, np.ones((case.batch, case.n_rows), bool))
    return absorbed_of(metal, x), latent, offsets_of(metal, x), case.n_kv_heads


def expected(reference: Backend, case: DecodeCase, dtype: str, absorbed: Any, offsets: Any) -> Any:
    """In float64, of the same rounded inputs."""
    latent = make_inputs(reference, case, dtype, exact=True).segment.keys.latent
    exact = (reference.from_numpy(x.astype(np.float64)) for x in (absorbed, offsets))
    return reference.to_numpy(
        reference.index_scores(next(exact), latent, next(exact), case.n_kv_heads)
    )


def kernel_error(metal: MLXBackend, reference: Backend, case: DecodeCase, dtype: str) -> float:
    """Relative error of the kernel, the path asserted."""
    absorbed, latent, offsets, n_kv_heads = make_arguments(metal, case, dtype)
    got = metal.index_scores(absorbed, latent, offsets, n_kv_heads)
    assert metal.kernels.last_path["index_scores"] == "index_scores"
    assert got.dtype == mx.float32
    want = expected(reference, case, dtype, *map(metal.to_numpy, (absorbed, offsets)))
    return relative_error(metal.to_numpy(got), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_index_scores_are_right(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_index_scores_do_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert kernel_error(emulated, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("n_rows", [1, 127, 128, 129, 256, 257, 513])
def test_index_scores_take_any_number_of_rows(metal, reference, n_rows):
    # one row has too few scales for a packed latent of one band
    case = replace(PLAIN, n_rows=n_rows)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_queries"),
    [(1, 1, 1), (2, 2, 16), (33, 33, 1), (31, 1, 1), (8, 2, 8), (14, 2, 7), (64, 8, 3)],
)
def test_index_scores_take_any_queries(metal, reference, n_heads, n_kv_heads, n_queries):
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "n_queries": n_queries}
    assert kernel_error(metal, reference, replace(PACKED, **heads), "float32") < 1e-5


@pytest.mark.parametrize("rank", [4, 8, 33, 64, 65, 200])
def test_index_scores_take_any_rank(metal, reference, rank):
    case = replace(SHORT, rank_k=rank)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "bits", [(2,), (3, 3), (6, 2, 5), (8, *[2] * 8), (4, *[3] * 64), (6, *[2, 3] * 63, 8)], ids=len
)
def test_index_scores_take_any_bands(metal, reference, bits):
    case = replace(SHORT, bits=bits)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("start", [0, 100_000])
def test_index_scores_take_any_position(metal, reference, start):
    error = kernel_error(metal, reference, replace(PACKED, start=start), "float16")
    assert error < TOLERANCE["float16"]


def test_rows_that_nothing_rotates_are_one_block(metal):
    x = make_inputs(metal, PACKED, "float32")
    keys = x.segment.keys._replace(rope_runs=(RopeRun(PACKED.n_rows, None),))
    absorbed = absorbed_queries(metal, x.queries * x.scale, keys)
    given = absorbed, keys.latent, offsets_of(metal, x), PACKED.n_kv_heads
    assert absorbed.shape[1] == 1 < PACKED.n_rows / BLOCK
    got, want = (
        backend.to_numpy(backend.index_scores(*given))
        for backend in (metal, MLXBackend(kernels="off"))
    )
    assert relative_error(got, want) < TOLERANCE["float32"]


def test_words_of_later_bands_are_not_read(metal):
    absorbed, latent, offsets, n_kv_heads = make_arguments(metal, PACKED, "float16")
    words, *others = latent.arrays
    first = words[..., : 2 * PACKED.bits[0]]
    changed = mx.concatenate([first, words[..., first.shape[-1] :] ^ 0xFFFFFFFF], axis=-1)
    got, want = (
        index_scores.KERNEL(absorbed, Latent((x, *others), latent.bits), offsets, n_kv_heads)
        for x in (changed, words)
    )
    assert mx.array_equal(got, want)


REFUSED = {
    "dtypes": ((mx.float32, mx.float16, mx.float32), 9, "absorbed float32, latent float16"),
    "offsets": ((mx.float16, mx.float16, mx.float16), 9, "offsets in float32, not float16"),
    "few-numbers": ((mx.float16, mx.float16, mx.float32), 7, "8 elements or more, not 7"),
}


@pytest.mark.parametrize(("dtypes", "n_rows", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(dtypes, n_rows, sentence):
    of_queries, of_latent, of_offsets = dtypes
    latent = Latent((mx.zeros((1, n_rows, 1), of_latent),))
    arguments = mx.zeros((1, 1, 1, 8), of_queries), latent, mx.zeros((1, 8), of_offsets), 2
    assert sentence in index_scores.KERNEL.why_not(*arguments)


def test_one_kernel_takes_all_bits(emulated):
    cases = [replace(PACKED, bits=bits) for bits in ((4, 4), (8, 6, 5, 4, 3, 2))]
    given = [make_arguments(emulated, case, "float16") for case in cases]
    with emulator.settings() as launches:
        for arguments in given:
            index_scores.KERNEL(*arguments)
    assert len(launches) == 2
    assert len({(launch.name, launch.text) for launch in launches}) == 1
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


def test_a_block_is_whole_tiles():
    assert BLOCK % index_scores.ROWS == 0


SOURCE, HEADER = (index_scores, "SOURCE"), (index_scores, "HEADER")
LATENT, PRODUCT = (common, "LATENT_SOURCE"), (common, "PRODUCT_SOURCE")
READ_PLAIN, READ_PACKED = (common, "_READ_PLAIN"), (common, "_READ_PACKED")
# Name: a case, the source, the text of it that is replaced, by what.
FAULTS = {
    "last-row-not-scored": (PLAIN, SOURCE, "row < n_rows ? row", "row < n_rows - 1 ? row"),
    "last-row-unwritten": (PLAIN, SOURCE, "row >= n_longest ||", "row >= n_longest - 1 ||"),
    "next-block": (PLAIN, SOURCE, "first / BLOCK;", "(first / BLOCK + 1) % n_blocks;"),
    "block-of-the-next-tile": (PLAIN, SOURCE, "first / BLOCK;", "min(1, (first + ROWS) / BLOCK);"),
    "queries-of-another-batch": (PLAIN, SOURCE, "batch * n_blocks + block", "block"),
    "offsets-of-another-batch": (PLAIN, SOURCE, "batch * n_queries + query", "query"),
    "offset-missing": (PLAIN, SOURCE, "] - offset", "]"),
    "last-query-missing": (PLAIN, SOURCE, "++n_seen < group", "++n_seen < group - 1"),
    "tile-of-queries-twice": (PLAIN, SOURCE, "queries + query,", "queries,"),
    "maximum-of-the-head-before": (PLAIN, SOURCE, "largest = -INFINITY;\n        n_seen", "n_seen"),
    "sum-of-queries": (PLAIN, SOURCE, "max(largest, shown", "(n_seen ? largest : 0) + (shown"),
    "column-past-the-index": (PLAIN, HEADER, "stored.rank, width}", "stored.rank, width - 1}"),
    "stride-of-the-index": (PLAIN, HEADER, "stored.rank, width}", "width, width}"),
    "rows-of-another-batch": (PLAIN, READ_PLAIN, ".z) * n_rows", ".z) * 0"),
    "wrong-shift": (PACKED, LATENT, "codes >> shift", "codes >> (shift ^ 8)"),
    "scales-of-another-batch": (PACKED, READ_PACKED, "biases + first_stored * n_bands", "biases"),
    "next-band": (PACKED, HEADER, "column - 63", "column - 64"),
    "second-four-bands-missing": (
        replace(PACKED, bits=(4,) * 9),
        HEADER,
        "column - 59",
        "column + 59",
    ),
    "bits-of-the-first-band": (PACKED, HEADER, "bands[2 * (band + i)]", "bands[0]"),
    "half-a-code-off": (PACKED, HEADER, "]) - 1) / 2", "])) / 2"),
    "root-of-the-band-missing": (PACKED, HEADER, ") * 8)", "))"),
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
    assert BARRIER not in index_scores.SOURCE
    plant(PRODUCT, BARRIER, "", occurrence)
    with pytest.raises(emulator.MetalKernelError) as caught:
        index_scores.KERNEL(*make_arguments(emulated, PLAIN, "float16"))
    assert caught.value.kind in ("data-race", "uninitialised")


def test_check_at_first_use_tries_more_than_what_is_given(emulated, plant):
    plant(*FAULTS["next-block"][1:])
    # one block is its own next
    arguments = make_arguments(emulated, replace(PACKED, n_rows=60), "float16")
    assert n_columns(arguments[1]) == arguments[0].shape[2]
    with pytest.raises(xkv.InputError, match="index_scores disagrees with its plain twin"):
        emulated.index_scores(*arguments)
