"""The plain decode operations of MLX against the float64 reference, and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xkv import load_backend
from xkv.checks.decode_cases import CASES, CHUNK_SIZE, DTYPES, DecodeInputs, make_inputs
from xkv.checks.tolerances import PLAIN_TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.selection import chunk_rows, make_landmarks
from xkv.ops.types import RopeRun, RopeSpec


def dense(backend: Backend, x: DecodeInputs) -> Any:
    return backend.lowrank_attention(x.queries, x.segment, x.keys, x.values, x.scale)


def selected(backend: Backend, x: DecodeInputs) -> Any:
    return backend.selected_attention(
        x.queries, x.segment, x.chunks, CHUNK_SIZE, x.keys, x.values, x.scale
    )


def rows(backend: Backend, x: DecodeInputs) -> Any:
    return backend.reconstruct_rows(x.segment, chunk_rows(backend, x.chunks, CHUNK_SIZE))


OPERATIONS = {
    "reconstruct_keys": lambda backend, x: backend.reconstruct_keys(x.segment),
    "reconstruct_rows": rows,
    "lowrank_attention": dense,
    "selected_attention": selected,
}


@pytest.fixture(scope="module")
def plain_mlx() -> Backend:
    return load_backend("mlx", kernels="off")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_parity(plain_mlx, reference, case, dtype, operation):
    run = OPERATIONS[operation]
    got = run(plain_mlx, make_inputs(plain_mlx, case, dtype))
    want = run(reference, make_inputs(reference, case, dtype, exact=True))
    error = relative_error(plain_mlx.to_numpy(got), reference.to_numpy(want))
    assert error < PLAIN_TOLERANCE[dtype]


def shift_position(x: DecodeInputs) -> DecodeInputs:
    return replace(x, segment=x.segment._replace(start=x.segment.start + 1))


def drop_last_dense_row(x: DecodeInputs) -> DecodeInputs:
    return replace(x, keys=x.keys[..., :-1, :], values=x.values[..., :-1, :])


def use_wrong_kv_head(x: DecodeInputs) -> DecodeInputs:
    order = [1, 0]
    return replace(x, segment=x.segment._replace(basis_k=x.segment.basis_k[:, :, order]))


def forget_scale(x: DecodeInputs) -> DecodeInputs:
    return replace(x, scale=1.0)


def forget_rotation(x: DecodeInputs) -> DecodeInputs:
    runs = tuple(RopeRun(run.n_rows, None) for run in x.segment.rope_runs)
    return replace(x, segment=x.segment._replace(rope_runs=runs))


def replace(x: DecodeInputs, **changes: Any) -> DecodeInputs:
    from dataclasses import replace as replace_fields

    return replace_fields(x, **changes)


@pytest.mark.parametrize("run", [dense, selected])
@pytest.mark.parametrize(
    "fault",
    [shift_position, drop_last_dense_row, use_wrong_kv_head, forget_scale, forget_rotation],
)
def test_planted_fault_exceeds_the_bound_tenfold(
    plain_mlx, reference, run: Callable[..., Any], fault: Callable[..., DecodeInputs]
):
    case = CASES[0]
    got = run(plain_mlx, fault(make_inputs(plain_mlx, case, "float32")))
    want = run(reference, make_inputs(reference, case, "float32", exact=True))
    error = relative_error(plain_mlx.to_numpy(got), reference.to_numpy(want))
    assert error > 10 * PLAIN_TOLERANCE["float32"]


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_lowrank_attention_is_attention_over_the_product(reference, case):
    x = make_inputs(reference, case, "float32", exact=True)
    segment = x.segment
    values = reference.xp.einsum("blr,brhd->bhld", segment.latent_v, segment.basis_v)
    concat = reference.xp.concat
    keys = concat([reference.reconstruct_keys(segment), x.keys], axis=-2)
    values = concat([values, x.values], axis=-2)
    want = reference.attention(x.queries, keys, values, x.scale, None)
    assert relative_error(dense(reference, x).numpy(), want.numpy()) < 1e-12


def test_lowrank_attention_ignores_masked_rows(plain_mlx):
    x = make_inputs(plain_mlx, CASES[0], "float32")
    n_rows = x.segment.latent_k.shape[1]
    is_seen = plain_mlx.xp.arange(n_rows + x.keys.shape[-2]) < n_rows - 3
    segment = x.segment._replace(
        latent_k=x.segment.latent_k[:, :-3],
        latent_v=x.segment.latent_v[:, :-3],
        rope_runs=(RopeRun(n_rows - 3, x.segment.rope_runs[0].spec),),
    )
    got = plain_mlx.lowrank_attention(
        x.queries, x.segment, x.keys, x.values, x.scale, is_seen[None]
    )
    want = plain_mlx.lowrank_attention(
        x.queries, segment, x.keys[..., :0, :], x.values[..., :0, :], x.scale
    )
    assert relative_error(np.array(got), np.array(want)) < 1e-5


@pytest.mark.parametrize("backend_name", ["mlx", "torch"])
def test_rows_of_several_rope_runs_are_each_rotated_by_their_own(backend_name):
    backend = load_backend(backend_name, kernels="off")
    x = make_inputs(backend, CASES[0], "float32")
    n_rows = CASES[0].n_rows
    runs = (RopeRun(20, None), RopeRun(n_rows - 20, RopeSpec.standard(32, 99.0, True)))
    segment = x.segment._replace(rope_runs=runs)
    every_row = backend.xp.broadcast_to(backend.positions(0, n_rows), (1, 2, n_rows))
    got = backend.to_numpy(backend.reconstruct_rows(segment, every_row))
    want = backend.to_numpy(backend.reconstruct_keys(segment))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_selected_chunks_agree_across_backends(plain_mlx, reference, bits):
    found = []
    for backend in (plain_mlx, load_backend("torch", device="cpu", kernels="off")):
        x = make_inputs(backend, CASES[4], "float32")
        keys = backend.reconstruct_keys(x.segment)
        landmarks, outliers = make_landmarks(backend, keys, CHUNK_SIZE, 3, bits)
        chunks = backend.select_chunks(x.queries, landmarks, 10 * CHUNK_SIZE, x.scale)
        found.append([np.sort(backend.to_numpy(ids)) for ids in (chunks, outliers)])
        overlap = backend.to_numpy(chunks)[..., None] == backend.to_numpy(outliers)[..., None, :]
        assert not overlap.any()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_select_chunks_finds_the_chunk_that_holds_the_peak(plain_mlx):
    x = make_inputs(plain_mlx, CASES[4], "float32")
    keys = np.array(plain_mlx.reconstruct_keys(x.segment))
    queries = np.zeros(x.queries.shape, dtype=np.float32)
    queries[0, 0, 0] = 10 * keys[0, 0, 77]  # query head 0 belongs to KV head 0
    landmarks, _ = make_landmarks(plain_mlx, plain_mlx.from_numpy(keys), 1, 0, 8)
    chunks = plain_mlx.select_chunks(plain_mlx.from_numpy(queries), landmarks, 4, x.scale)
    assert 77 in np.array(chunks)[0, 0]


def test_outlier_is_the_chunk_whose_keys_resemble_their_mean_least(plain_mlx):
    keys = np.ones((1, 2, 64, 32), dtype=np.float32)
    keys[0, 0, 21] = -1  # chunk 2 of KV head 0
    keys[0, 1, 56] = -1  # chunk 7 of KV head 1
    landmarks, outliers = make_landmarks(plain_mlx, plain_mlx.from_numpy(keys), CHUNK_SIZE, 1, 8)
    assert np.array(outliers).ravel().tolist() == [2, 7]
    assert np.argwhere(np.array(landmarks.is_outlier[0])).tolist() == [[0, 2], [1, 7]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_words_are_the_same_bits_on_both_backends(plain_mlx, reference, bits, dtype):
    random = np.random.default_rng(0).standard_normal((3, 5, 128)).astype(np.float32)
    random[0, 0] = 0
    random[0, 1] = 7
    packed = []
    for backend in (plain_mlx, reference):
        x = backend.xp.astype(backend.from_numpy(random), getattr(backend.xp, dtype))
        parts = backend.quantize(x, 64, bits)
        packed.append([backend.to_numpy(part) for part in parts])
        error = backend.to_numpy(backend.dequantize(parts, 64, bits)) - backend.to_numpy(x)
        # half a step of the widest group, and the rounding of its scale
        assert np.abs(error).max() < 8 / (2**bits - 1) / 2 + 0.05
    for ours, reference_part in zip(*packed, strict=True):
        assert ours.tobytes() == reference_part.tobytes()
