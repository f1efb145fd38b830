"""The Metal kernel that rebuilds selected keys, against the reference and with planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, reconstruct_rows
from xkv.checks.decode_cases import CASES, CHUNK_SIZE, DTYPES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops import selection
from xkv.ops.backend import Backend
from xkv.ops.types import RopeRun, RopeSpec, Segment

pytest_plugins = ["tests.metal_device"]

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
CASE = DecodeCase(136, 8, 2, 64, 37, 8, n_selected_chunks=9, batch=2, rope_scale=1.2)
"""Two tiles, two steps of the product, and a rotation that scales."""

Change = Callable[[Segment], Segment]


def keep(segment: Segment) -> Segment:
    return segment


def with_rope(spec: RopeSpec | None) -> Change:
    return lambda segment: segment._replace(rope_runs=(RopeRun(segment.rope_runs[0].n_rows, spec),))


def random_rows(case: DecodeCase, n_selected: int) -> np.ndarray:
    """Row numbers in no order, some of them twice."""
    shape = (case.batch, case.n_kv_heads, n_selected)
    return np.random.default_rng(1).integers(0, case.n_rows, shape)


def expected_keys(
    reference: Backend, case: DecodeCase, dtype: str, rows: np.ndarray, change: Change = keep
) -> np.ndarray:
    segment = change(make_inputs(reference, case, dtype, exact=True).segment)
    numbers = reference.from_numpy(rows.astype(np.int64))
    return reference.to_numpy(selection.reconstruct_rows(reference, segment, numbers))


def hide_unselected(segment: Segment, rows: np.ndarray) -> Segment:
    """NaN in the rows that no KV head selects, and in more rows past the segment's end."""
    batch, n_rows, rank = segment.latent_k.shape
    is_selected = np.zeros((batch, n_rows, 1), bool)
    for i in range(batch):
        is_selected[i, rows[i].reshape(-1)] = True
    longer = mx.full((batch, n_rows + 3, rank), mx.nan, dtype=segment.latent_k.dtype)
    longer[:, :n_rows] = mx.where(mx.array(is_selected), segment.latent_k, mx.nan)
    return segment._replace(latent_k=longer[:, :n_rows])


def assert_right(
    metal: MLXBackend,
    reference: Backend,
    case: DecodeCase,
    dtype: str,
    rows: np.ndarray | None = None,
    change: Change = keep,
) -> None:
    """Run the kernel on a case, and compare with the reference."""
    inputs = make_inputs(metal, case, dtype)
    if rows is None:
        rows = metal.to_numpy(selection.chunk_rows(metal, inputs.chunks, CHUNK_SIZE))
    segment = hide_unselected(change(inputs.segment), rows)
    keys = metal.reconstruct_rows(segment, mx.array(rows))
    assert metal.kernels.last_path["reconstruct_rows"] == "reconstruct_rows"
    assert keys.dtype == segment.latent_k.dtype
    want = expected_keys(reference, case, dtype, rows, change)
    assert relative_error(metal.to_numpy(keys), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reconstruct_rows_is_right(metal, reference, case, dtype):
    assert_right(metal, reference, case, dtype)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_reconstruct_rows_does_not_depend_on_the_schedule(emulated, reference, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert_right(emulated, reference, CASE, "float16")


@pytest.mark.parametrize("n_selected", [1, 63, 64, 65, 129])
def test_reconstruct_rows_takes_any_number_of_rows(metal, reference, n_selected):
    assert_right(metal, reference, CASE, "float16", random_rows(CASE, n_selected))


@pytest.mark.parametrize("n_selected", [31, 32, 33])
def test_reconstruct_rows_takes_any_number_of_wide_rows(metal, reference, n_selected):
    case = replace(CASE, head_dim=256)
    assert_right(metal, reference, case, "float16", random_rows(case, n_selected))


@pytest.mark.parametrize("rank", [1, 7, 8, 31, 32, 33, 100])
def test_reconstruct_rows_takes_any_rank(metal, reference, rank):
    assert_right(metal, reference, replace(CASE, rank_k=rank), "float16")


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_reconstruct_rows_takes_any_row_numbers(metal, reference, dtype):
    assert_right(metal, reference, CASE, "float16", random_rows(CASE, 9).astype(dtype))


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
def test_reconstruct_rows_rotates_like_the_reference(metal, reference, spec):
    assert_right(metal, reference, CASE, "float32", change=with_rope(spec))


def test_reconstruct_rows_of_one_row(metal, reference):
    case = replace(CASE, n_rows=1, n_selected_chunks=0, batch=1)
    assert_right(metal, reference, case, "float32", random_rows(case, 1))


def test_angles_of_far_positions_are_those_of_the_plain_twin(metal):
    inputs = make_inputs(metal, replace(CASE, start=100_000), "float32")
    rows = mx.array(random_rows(CASE, 40))
    want = metal.to_numpy(selection.reconstruct_rows(metal, inputs.segment, rows))
    got = metal.to_numpy(metal.reconstruct_rows(inputs.segment, rows))
    # a float32 angle there is known to 4e-3, so other arithmetic than the twin's would show
    assert relative_error(got, want) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("change", "n_selected", "sentence"),
    [
        (lambda s: s._replace(basis_k=s.basis_k[..., :48]), 3, "head_dim 64, 128, 256, not 48"),
        (lambda s: s._replace(rope_runs=s.rope_runs * 2), 3, "has 2 different rotations"),
        (lambda s: s._replace(basis_k=s.basis_k.astype(mx.float32)), 3, "basis_k float32"),
        (
            lambda s: s._replace(
                latent_k=s.latent_k.astype(mx.float64, stream=mx.cpu),
                basis_k=s.basis_k.astype(mx.float64, stream=mx.cpu),
            ),
            3,
            "not float64",
        ),
        (
            lambda s: s._replace(latent_k=s.latent_k[:1, :1, :7], basis_k=s.basis_k[:1, :7]),
            1,
            "8 elements or more, not 7",
        ),
        (keep, 0, "no rows are selected"),
    ],
    ids=["head-dim", "runs", "dtypes", "float64", "tiny", "no-rows"],
)
def test_why_not_says_what_the_kernel_does_not_take(metal, change, n_selected, sentence):
    segment = change(make_inputs(metal, CASE, "float16").segment)
    why_not = reconstruct_rows.KERNEL.why_not(segment, mx.array(random_rows(CASE, n_selected)))
    assert sentence in why_not


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a device")
def test_why_not_says_that_there_is_no_device():
    assert "this machine has none" in common.device_problem()


# Name: part of the kernel, the text that is replaced, by what.
FAULTS = {
    "position-shifted": ("SOURCE", "float(start + row", "float(start + 1 + row"),
    "last-row-dropped": ("SOURCE", "i < end ?", "i < end - 1 ?"),
    "last-row-unwritten": ("SOURCE", "row >= end", "row >= end - 1"),
    "last-rank-dropped": ("HEADER", "width - column)", "width - 1 - column)"),
    "scale-dropped": ("SOURCE", "x * rope[0]", "x"),
    "wrong-kv-head": ("SOURCE", "n_kv_heads + head) * D, n", "n_kv_heads + 1 - head) * D, n"),
    "wrong-batch": ("SOURCE", "int64_t(batch) * n_rows", "int64_t(0) * n_rows"),
}


def plant(monkeypatch, part: str, old: str, new: str, occurrence: int = 0) -> None:
    """Replace one occurrence of a text in the kernel's source."""
    pieces = getattr(reconstruct_rows, part).split(old)
    assert occurrence + 1 < len(pieces), f"{old!r} is not in the source"
    before, after = pieces[: occurrence + 1], pieces[occurrence + 1 :]
    monkeypatch.setattr(reconstruct_rows, part, old.join(before) + new + old.join(after))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, reference, monkeypatch, name):
    plant(monkeypatch, *FAULTS[name])
    rows = random_rows(CASE, 72)
    segment = make_inputs(metal, CASE, "float16").segment
    try:
        keys = metal.to_numpy(reconstruct_rows.KERNEL(segment, mx.array(rows)))
    except emulator.MetalKernelError:
        return
    want = expected_keys(reference, CASE, "float16", rows)
    error = np.linalg.norm(keys.astype(np.float64) - want) / np.linalg.norm(want)
    assert not error <= 10 * TOLERANCE["float16"]


@pytest.mark.parametrize("occurrence", range(reconstruct_rows.HEADER.count(BARRIER)))
def test_deleted_barrier_is_caught(emulated, monkeypatch, occurrence):
    assert BARRIER not in reconstruct_rows.SOURCE
    plant(monkeypatch, "HEADER", BARRIER, "", occurrence)
    segment = make_inputs(emulated, CASE, "float16").segment
    with pytest.raises(emulator.MetalKernelError) as caught:
        reconstruct_rows.KERNEL(segment, mx.array(random_rows(CASE, 72)))
    assert caught.value.kind in ("data-race", "uninitialised")
