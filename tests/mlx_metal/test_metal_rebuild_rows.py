"""The Metal kernel that rebuilds rows, against the reference and with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, rebuild_rows
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, hide_rows, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops import attention
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import RopeRun, RopeSpec, Stored

pytest_plugins = ["tests.metal_device"]

PLAIN = DecodeCase(136, 8, 2, 64, 37, 8, batch=2, n_recent=0, rope_scale=1.2)
"""Two tiles, two steps of the product, and a rotation that scales."""
PACKED = replace(PLAIN, bits=(8, 6, 5, 4, 3, 2))
MOST_THREADGROUP_BYTES = 25_000
"""Of the 32 KiB that a threadgroup may have."""

Change = Callable[[Stored], Stored]


def keep(stored: Stored) -> Stored:
    return stored


def with_rope(spec: RopeSpec | None) -> Change:
    return lambda stored: stored._replace(rope_runs=(RopeRun(PLAIN.n_rows, spec),))


def with_arrays(*arrays: mx.array, bits: tuple[int, ...] = ()) -> Change:
    return lambda stored: stored._replace(latent=Latent(arrays, bits))


def draw_rows(case: DecodeCase, n: int) -> np.ndarray:
    """Row numbers in no order, some of them twice."""
    shape = (case.batch, case.n_kv_heads, n)
    return np.random.default_rng(1).integers(0, case.n_rows, shape)


def kernel_error(
    metal: MLXBackend,
    reference: Backend,
    case: DecodeCase,
    dtype: str,
    rows: np.ndarray | None = None,
    change: Change = keep,
    name: str = "keys",
) -> float:
    """Relative error of the kernel, the path asserted, with NaN in all rows that are not taken."""
    inputs = make_inputs(metal, case, dtype)
    rows = metal.to_numpy(inputs.rows) if rows is None else rows
    stored = change(getattr(inputs.segment, name))
    is_taken = np.zeros(stored.latent.shape[:2], bool)
    np.put_along_axis(is_taken, rows.reshape(len(rows), -1), True, axis=1)
    hidden = stored._replace(latent=hide_rows(metal, stored.latent, is_taken))
    got = metal.rebuild_rows(hidden, mx.array(rows))
    assert metal.kernels.last_path["rebuild_rows"] == "rebuild_rows"
    assert got.dtype == stored.basis.dtype
    exact = change(getattr(make_inputs(reference, case, dtype, exact=True).segment, name))
    want = reference.rebuild_rows(exact, reference.from_numpy(rows.astype(np.int64)))
    return relative_error(metal.to_numpy(got), reference.to_numpy(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rebuild_rows_is_right(metal, reference, case, dtype):
    for name in ("keys", "values"):
        assert kernel_error(metal, reference, case, dtype, name=name) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_rebuild_rows_does_not_depend_on_the_schedule(emulated, reference, schedule, case):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert kernel_error(emulated, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 65])
def test_rebuild_rows_takes_any_number_of_rows(metal, reference, n):
    rows = draw_rows(PLAIN, n)
    assert kernel_error(metal, reference, PLAIN, "float16", rows) < TOLERANCE["float16"]


@pytest.mark.parametrize("rank", [1, 7, 8, 31, 32, 33, 100])
def test_rebuild_rows_takes_any_rank(metal, reference, rank):
    case = replace(PLAIN, rank_k=rank)
    assert kernel_error(metal, reference, case, "float16") < TOLERANCE["float16"]


@pytest.mark.parametrize("bits", [(2,), (3, 3), (5, 2, 6), (6, 8, 5, 3)], ids=str)
def test_rebuild_rows_takes_any_bits(metal, reference, bits):
    case = replace(PACKED, bits=bits)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_rebuild_rows_takes_any_row_numbers(metal, reference, dtype):
    rows = draw_rows(PLAIN, 9).astype(dtype)
    assert kernel_error(metal, reference, PLAIN, "float16", rows) < TOLERANCE["float16"]


def test_rebuild_rows_takes_one_basis_for_all_batches(metal, reference):
    def share(stored: Stored) -> Stored:
        return stored._replace(basis=stored.basis[:1])

    assert kernel_error(metal, reference, PLAIN, "float32", change=share) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "spec",
    [
        None,
        RopeSpec.standard(32, 10_000.0, traditional=True),
        RopeSpec((1.0, 30.0, 900.0)),
        RopeSpec(RopeSpec.standard(64, 500_000.0, position_scale=0.25).freqs, scale=0.7),
    ],
    ids=["no-rope", "partial-traditional", "six-features", "scaled"],
)
def test_rebuild_rows_rotates_like_the_reference(metal, reference, spec):
    error = kernel_error(metal, reference, PLAIN, "float32", change=with_rope(spec))
    assert error < TOLERANCE["float32"]


def test_angles_of_far_positions_are_those_of_the_plain_twin(metal):
    keys = make_inputs(metal, replace(PLAIN, start=100_000), "float32").segment.keys
    rows = mx.array(draw_rows(PLAIN, 40))
    want = metal.to_numpy(attention.rebuild_rows(metal, keys, rows))
    metal.kernels.check = lambda *args: None
    # a float32 angle there is known to 4e-3; the twin looks its angles up
    assert relative_error(metal.to_numpy(metal.rebuild_rows(keys, rows)), want) < 2e-3


REFUSED = {
    "head-dim": (lambda s: s._replace(basis=s.basis[..., :48]), 3, "head_dim 64, 128, 256, not 48"),
    "runs": (lambda s: s._replace(rope_runs=s.rope_runs * 2), 3, "have 2 different rotations"),
    "dtypes": (
        lambda s: s._replace(basis=s.basis.astype(mx.float32)),
        3,
        "arrays of one dtype, not latent float16, basis float32",
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
    stored = change(make_inputs(metal, PLAIN, "float16").segment.keys)
    assert sentence in rebuild_rows.KERNEL.why_not(stored, mx.array(draw_rows(PLAIN, n)))


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
def test_why_not_says_that_there_is_no_device():
    assert "this machine has none" in common.device_problem()


def test_one_kernel_takes_all_bits_keys_and_values(emulated):
    with emulator.settings() as launches:
        for bits in ((4, 4), (8, 6, 5, 4, 3, 2)):
            x = make_inputs(emulated, replace(PACKED, bits=bits), "float16")
            for stored in (x.segment.keys, x.segment.values):
                rebuild_rows.KERNEL(stored, x.rows)
    assert len(launches) == 4
    assert len({(launch.name, launch.text) for launch in launches}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", rebuild_rows.HEAD_DIMS)
def test_rebuild_rows_leaves_threadgroup_memory(emulated, head_dim, dtype):
    x = make_inputs(emulated, replace(PLAIN, n_rows=9, head_dim=head_dim), dtype)
    with emulator.settings() as launches:
        rebuild_rows.KERNEL(x.segment.keys, x.rows)
    assert launches[0].threadgroup_bytes < MOST_THREADGROUP_BYTES


SOURCE, LATENT = (rebuild_rows, "SOURCE"), (common, "LATENT_SOURCE")
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
    "last-depth-missing": (
        PLAIN,
        PRODUCT,
        "first < left.width; first",
        "first + 8 < left.width; first",
    ),
    "wrong-shift": (PACKED, LATENT, "codes >> shift", "codes >> (shift ^ 8)"),
    "second-word-missing": (PACKED, LATENT, "ulong(from[1]) << 32", "ulong(0)"),
    "bias-missing": (PACKED, LATENT, "scale, bias)", "scale, 0.0f)"),
    "scale-of-the-first-band": (
        PACKED,
        LATENT,
        "scales[row * n_bands + band]",
        "scales[row * n_bands]",
    ),
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
        error = kernel_error(metal, reference, case, "float16")
    except (ValueError, emulator.MetalKernelError) as found:
        assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
        return
    assert error > 10 * TOLERANCE["float16"], f"an error of {error:.1e} only"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("occurrence", range(common.PRODUCT_SOURCE.count(BARRIER)))
def test_missing_barrier_is_caught(emulated, plant, occurrence):
    assert BARRIER not in rebuild_rows.SOURCE
    plant(PRODUCT, BARRIER, "", occurrence)
    x = make_inputs(emulated, PLAIN, "float16")
    with pytest.raises(emulator.MetalKernelError) as caught:
        rebuild_rows.KERNEL(x.segment.keys, x.rows)
    assert caught.value.kind in ("data-race", "uninitialised")


def test_check_at_first_use_tries_other_bits_than_those_given(emulated, plant):
    plant(*FAULTS["second-word-missing"][1:])
    # no eight numbers of four bits are in two words
    x = make_inputs(emulated, replace(PACKED, bits=(4,)), "float16")
    with pytest.raises(xkv.InputError, match="rebuild_rows disagrees with its plain twin"):
        emulated.rebuild_rows(x.segment.keys, x.rows)
