"""The Metal kernels of selected attention, their real source, against the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, selected_attention
from xkv.backends.mlx_metal.kernels.selected_attention import ROWS, SelectedAttention
from xkv.checks.decode_cases import CASES, CHUNK_SIZE, DTYPES, DecodeCase, DecodeInputs, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error

pytest_plugins = ["tests.metal_device"]

SPARE_ROWS = 11
BATCHES = next(case for case in CASES if case.batch > 1)


def arguments(inputs: DecodeInputs, chunk_size: int = CHUNK_SIZE) -> tuple[Any, ...]:
    return (
        *(inputs.queries, inputs.segment, inputs.chunks, chunk_size),
        *(inputs.keys, inputs.values, inputs.scale),
    )


def reconstruct_in_float32(segment: xkv.ops.types.Segment, rows: mx.array) -> mx.array:
    """Keys rounded once: the kernel that makes them has tests of its own."""
    latent, basis = (x.astype(mx.float32) for x in (segment.latent_k, segment.basis_k))
    wide = segment._replace(latent_k=latent, basis_k=basis)
    keys = MLXBackend(kernels="off").reconstruct_rows(wide, rows)
    return keys.astype(segment.latent_k.dtype)


def with_traps(inputs: DecodeInputs, chunk_size: int) -> DecodeInputs:
    """NaN in the latent rows that no chunk selects, and in the buffers past their last row."""
    n_rows = inputs.segment.latent_v.shape[1]
    is_selected = np.zeros((inputs.chunks.shape[0], n_rows, 1), dtype=bool)
    for batch, chunks in enumerate(np.array(inputs.chunks).reshape(len(is_selected), -1)):
        for chunk in chunks:
            is_selected[batch, chunk * chunk_size : (chunk + 1) * chunk_size] = True
    latent_v = mx.where(mx.array(is_selected), inputs.segment.latent_v, mx.nan)

    def in_buffer(rows: mx.array) -> mx.array:
        n = rows.shape[-2]
        spare = mx.full((*rows.shape[:2], SPARE_ROWS, rows.shape[-1]), mx.nan, rows.dtype)
        return mx.concatenate([rows, spare], axis=-2)[..., :n, :]

    return dataclasses.replace(
        inputs,
        segment=inputs.segment._replace(latent_v=latent_v.astype(inputs.segment.latent_v.dtype)),
        keys=in_buffer(inputs.keys),
        values=in_buffer(inputs.values),
    )


def kernel_error(
    backend: MLXBackend,
    reference: xkv.ops.backend.Backend,
    case: DecodeCase,
    dtype: str,
    chunk_size: int = CHUNK_SIZE,
) -> float:
    """Relative error of the kernel through the backend, the path asserted."""
    backend.reconstruct_rows = reconstruct_in_float32
    inputs = with_traps(make_inputs(backend, case, dtype), chunk_size)
    got = backend.to_numpy(backend.selected_attention(*arguments(inputs, chunk_size)))
    assert backend.kernels.last_path["selected_attention"] == SelectedAttention.name
    exact = make_inputs(reference, case, dtype, exact=True)
    return relative_error(
        got, reference.to_numpy(reference.selected_attention(*arguments(exact, chunk_size)))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selected_attention_matches_the_reference(metal, reference, case, dtype):
    assert kernel_error(metal, reference, case, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("n_selected", "n_dense"),
    [(1, ROWS + 1), (ROWS - 1, 1), (ROWS, ROWS - 1), (ROWS + 1, ROWS), (2 * ROWS + 1, 400)],
)
def test_selected_attention_at_the_edges_of_parts(metal, reference, n_selected, n_dense):
    case = DecodeCase(2400, 4, 2, 64, 8, 12, n_dense=n_dense, n_selected_chunks=n_selected)
    assert kernel_error(metal, reference, case, "float32", chunk_size=1) < TOLERANCE["float32"]


@pytest.mark.parametrize("rank_v", [1, 130, 258, 1028])
def test_selected_attention_takes_any_rank(metal, reference, rank_v):
    case = DecodeCase(64, 2, 1, 64, 8, rank_v)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("gqa", [1, 3, 16])
def test_selected_attention_takes_any_gqa_ratio(metal, reference, gqa):
    case = DecodeCase(64, 2 * gqa, 2, 256, 16, 24)
    assert kernel_error(metal, reference, case, "float32") < TOLERANCE["float32"]


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_selected_attention_does_not_depend_on_the_order_of_threads(emulated, reference, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=5):
        assert kernel_error(emulated, reference, BATCHES, "float32") < TOLERANCE["float32"]


def test_selected_attention_with_the_kernel_that_makes_its_keys(metal, reference):
    inputs = make_inputs(metal, BATCHES, "bfloat16")
    got = metal.to_numpy(metal.selected_attention(*arguments(inputs)))
    assert metal.kernels.last_path == {
        "selected_attention": "selected_attention",
        "reconstruct_rows": "reconstruct_rows",
    }
    exact = make_inputs(reference, BATCHES, "bfloat16", exact=True)
    want = reference.to_numpy(reference.selected_attention(*arguments(exact)))
    assert relative_error(got, want) < TOLERANCE["bfloat16"]


def swap_heads_and_rows(x: mx.array) -> mx.array:
    """The same values, rows before heads in memory."""
    return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)


def test_selected_attention_reads_rows_of_any_stride(metal):
    inputs = make_inputs(metal, BATCHES, "float32")
    kernel = SelectedAttention(MLXBackend(kernels="off"))
    every_second_row = mx.repeat(inputs.segment.latent_v, 2, axis=1)[:, ::2]
    strided = dataclasses.replace(
        inputs,
        segment=inputs.segment._replace(latent_v=every_second_row),
        keys=swap_heads_and_rows(inputs.keys),
        values=swap_heads_and_rows(inputs.values),
    )
    assert mx.array_equal(kernel(*arguments(strided)), kernel(*arguments(inputs)))


@pytest.mark.parametrize("name", ["keys", "values"])
def test_selected_attention_of_strided_features_is_nan(metal, name):
    inputs = make_inputs(metal, CASES[0], "float32")
    columns = mx.contiguous(getattr(inputs, name).swapaxes(2, 3)).swapaxes(2, 3)
    result = SelectedAttention(MLXBackend(kernels="off"))(
        *arguments(dataclasses.replace(inputs, **{name: columns}))
    )
    assert mx.isnan(result).all()


def test_selected_attention_fits_threadgroup_memory_at_its_limits(emulated):
    case = DecodeCase(256, 16, 1, 256, 8, 8, n_selected_chunks=16, n_dense=1)
    with emulator.settings(checked=False) as launches:
        SelectedAttention(MLXBackend(kernels="off"))(
            *arguments(make_inputs(emulated, case, "float32"))
        )
    assert [launch.threadgroup_bytes for launch in launches] == [25 * 1024, 25 * 1024, 0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda i: {"queries": i.queries.astype(mx.float32)}, "arrays of one dtype"),
        (lambda i: {"queries": mx.repeat(i.queries, 2, axis=2)}, "one token at a time, not 2"),
        (lambda i: {"queries": mx.repeat(i.queries, 20, axis=1)}, "up to 16 query heads .* not 20"),
        (lambda i: {"queries": i.queries[..., :32]}, "head_dim 64, 128, 256, not 32"),
        (lambda i: {"values": i.values[..., :0, :]}, "8 elements or more"),
    ],
)
def test_selected_attention_says_why_not(metal, change, sentence):
    inputs = make_inputs(metal, CASES[0], "float16")
    with pytest.raises(xkv.InputError, match=sentence):
        metal.selected_attention(*arguments(dataclasses.replace(inputs, **change(inputs))))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def without_barrier(source: str, number: int) -> str:
    parts = source.split(BARRIER)
    return BARRIER.join(parts[: number + 1]) + BARRIER.join(parts[number + 1 :])


# name: (which source, what is replaced, by what)
FAULTS = {
    "last-row-dropped": ("ATTEND", "n_rows - first)", "n_rows - first - 1)"),
    "scale-dropped": ("ATTEND", ") * scale;", ");"),
    "keys-of-another-head": ("ATTEND", "head * keys_strides[1]", "0"),
    "values-of-another-head": ("STRIDED_VALUES", "head * values_strides[1]", "0"),
    "keys-of-another-batch": ("ATTEND", "batch * keys_strides[0]", "0"),
    "queries-of-another-batch": ("ATTEND", "queries[pair *", "queries[head *"),
    "rows-of-another-part": ("ATTEND", "n_rows + first + r]", "n_rows + r]"),
    "rows-of-another-head": ("ATTEND", "rows[pair *", "rows[batch * n_heads *"),
    "buffer-taken-for-its-rows": ("ATTEND", "keys_strides[1]", "n_rows * D"),
    "last-column-dropped": ("ATTEND", "column < width;", "column + VEC < width;"),
    "maximum-left-out": ("MERGE", "exp(latent_tops[at] - top)", "1"),
    "last-part-dropped": ("MERGE", "s < n_latent; s++) {", "s < n_latent - 1; s++) {"),
    "other-query-head": ("MERGE", "h = head % GQA", "h = 0"),
}


@pytest.mark.parametrize("fault", [*FAULTS, *(f"barrier-{i}-deleted" for i in range(3))])
def test_planted_fault_is_found(emulated, reference, monkeypatch, fault):
    if fault in FAULTS:
        name, old, new = FAULTS[fault]
        source = getattr(selected_attention, name)
        assert old in source
        monkeypatch.setattr(selected_attention, name, source.replace(old, new))
    else:
        assert selected_attention.ATTEND.count(BARRIER) == 3
        edited = without_barrier(selected_attention.ATTEND, int(fault.split("-")[1]))
        monkeypatch.setattr(selected_attention, "ATTEND", edited)
    common.build.cache_clear()
    inputs = with_traps(make_inputs(emulated, BATCHES, "float32"), CHUNK_SIZE)
    exact = make_inputs(reference, BATCHES, "float32", exact=True)
    want = reference.to_numpy(reference.selected_attention(*arguments(exact)))
    try:
        got = np.array(SelectedAttention(MLXBackend(kernels="off"))(*arguments(inputs)))
    except emulator.MetalKernelError as error:
        assert error.kind != "compile"
        return
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert not error < 10 * TOLERANCE["float32"], f"{fault} gives an error of {error:.1e} only"
