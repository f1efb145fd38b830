"""Every operation of the backend protocol on small inputs, to be compared across backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xkv.checks.decode_cases import CASES, CHUNK_SIZE, DecodeInputs
from xkv.ops.backend import Backend
from xkv.ops.selection import chunk_rows, make_landmarks
from xkv.ops.types import Array, Landmarks, RopeSpec
from xkv.store.svd import factorize

PARITY_CASES = (CASES[0], CASES[1], CASES[4])
"""Those with enough dense rows to quantize and to factor."""

BITS = (2, 3, 4, 5, 6, 8)
"""Bits of MLX's affine layout that every backend takes."""

QUANTIZATION_GROUP = 64

Operation = Callable[[Backend, DecodeInputs, str], Any]
"""Called with a backend, inputs, and the dtype that these were rounded to."""


def _pack(backend: Backend, x: Array, dtype: str, bits: int) -> tuple[Array, ...]:
    """``x`` quantized in ``dtype``; scales and biases in the dtype that holds it."""
    xp = backend.xp
    words, *parameters = backend.quantize(
        xp.astype(x, getattr(xp, dtype)), QUANTIZATION_GROUP, bits
    )
    return words, *(xp.astype(parameter, x.dtype) for parameter in parameters)


def _quantize(bits: int) -> Operation:
    # as bytes: the same 32 bits are an int32 here and a uint32 there
    def words(backend: Backend, x: DecodeInputs, dtype: str) -> np.ndarray:
        packed = backend.to_numpy(_pack(backend, x.keys, dtype, bits)[0])
        return np.ascontiguousarray(packed).view(np.uint8)

    return words


def _dequantize(bits: int) -> Operation:
    return lambda backend, x, dtype: backend.dequantize(
        _pack(backend, x.keys, dtype, bits), QUANTIZATION_GROUP, bits
    )


def _quantized_matmul(bits: int) -> Operation:
    return lambda backend, x, dtype: backend.quantized_matmul(
        x.values, _pack(backend, x.keys, dtype, bits), QUANTIZATION_GROUP, bits
    )


def _landmarks(backend: Backend, x: DecodeInputs, dtype: str, bits: int) -> Landmarks:
    """The dense keys as if each were a chunk's summary; the third is an outlier."""
    xp = backend.xp
    ids = xp.broadcast_to(backend.positions(0, x.keys.shape[2]), x.keys.shape[:3])
    arrays = (x.keys,) if bits == 16 else _pack(backend, x.keys, dtype, bits)
    return Landmarks(arrays, bits, QUANTIZATION_GROUP, ids == 2, CHUNK_SIZE)


def _chunk_scores(bits: int) -> Operation:
    return lambda backend, x, dtype: backend.chunk_scores(
        x.queries, _landmarks(backend, x, dtype, bits), x.scale
    )


def _select_chunks(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """The scores of the chosen chunks in order: near ties may be chosen either way."""
    xp, landmarks = backend.xp, _landmarks(backend, x, dtype, 8)
    chunks = backend.select_chunks(x.queries, landmarks, 7 * CHUNK_SIZE, x.scale)
    scores = backend.chunk_scores(x.queries, landmarks, x.scale)
    return xp.sort(xp.take_along_axis(scores, xp.astype(chunks, xp.int64), axis=-1), axis=-1)


def _make_landmarks(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    keys = x.keys[..., : x.keys.shape[2] // CHUNK_SIZE * CHUNK_SIZE, :]
    return make_landmarks(backend, keys, CHUNK_SIZE, 1, 16)[0].arrays[0]


def _factorize(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """``latent @ bases`` of two layers whose columns fade."""
    xp = backend.xp
    fading = backend.constant([0.8**i for i in range(x.keys.shape[-1])], x.keys.dtype)
    layers = [xp.permute_dims(rows * fading, (0, 2, 1, 3)) for rows in (x.keys, x.values)]
    latent, bases, _ = factorize(backend, layers, 12)
    return latent @ xp.concat([xp.reshape(x, (*x.shape[:2], -1)) for x in bases], axis=-1)


def _gram(backend: Backend, x: DecodeInputs) -> Array:
    """A positive definite matrix like those that the factorization meets."""
    xp = backend.xp
    rows = xp.astype(x.keys[0, 0], backend.accumulate_dtype(x.keys))
    eye = xp.eye(rows.shape[0], dtype=rows.dtype, **backend.placement)
    return rows @ xp.matrix_transpose(rows) / rows.shape[1] + eye


def _triangular_inverse(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return backend.triangular_inverse(backend.cholesky(_gram(backend, x)))


def _eigh(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """The matrix's square root: eigenvectors alone may have either sign."""
    values, vectors = backend.eigh(_gram(backend, x))
    return (vectors * values[..., None, :] ** 0.5) @ backend.xp.matrix_transpose(vectors)


def _spec(x: DecodeInputs) -> RopeSpec:
    spec = x.segment.rope_runs[0].spec
    assert spec is not None
    return spec


def _rope(inverse: bool) -> Operation:
    return lambda backend, x, dtype: backend.rope(x.keys, x.segment.start, _spec(x), inverse)


def _rotate_runs(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    rows = backend.xp.concat([x.queries] * 6, axis=-2)
    return backend.rotate_runs(rows, backend.positions(5, 3), 2, _spec(x))


def _lowrank_attention(is_masked: bool) -> Operation:
    def attention(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
        n_rows = x.segment.latent_k.shape[1] + x.keys.shape[2]
        mask = backend.positions(0, n_rows)[None] % 3 > 0 if is_masked else None
        return backend.lowrank_attention(x.queries, x.segment, x.keys, x.values, x.scale, mask)

    return attention


OPERATIONS: dict[str, Operation] = {
    "rope": _rope(False),
    "rope inverse": _rope(True),
    "rotate_runs": _rotate_runs,
    "cholesky": lambda backend, x, dtype: backend.cholesky(_gram(backend, x)),
    "triangular_inverse": _triangular_inverse,
    "eigh": _eigh,
    "factorize": _factorize,
    **{f"quantize {bits} bits": _quantize(bits) for bits in BITS},
    **{f"dequantize {bits} bits": _dequantize(bits) for bits in BITS},
    **{f"quantized_matmul {bits} bits": _quantized_matmul(bits) for bits in BITS},
    "attention": lambda backend, x, dtype: backend.attention(
        x.queries, x.keys, x.values, x.scale, None
    ),
    "reconstruct_keys": lambda backend, x, dtype: backend.reconstruct_keys(x.segment),
    "reconstruct_rows": lambda backend, x, dtype: backend.reconstruct_rows(
        x.segment, chunk_rows(backend, x.chunks, CHUNK_SIZE)
    ),
    "lowrank_attention": _lowrank_attention(False),
    "lowrank_attention masked": _lowrank_attention(True),
    "make_landmarks": _make_landmarks,
    **{f"chunk_scores {bits} bits": _chunk_scores(bits) for bits in (4, 8, 16)},
    "select_chunks": _select_chunks,
    "selected_attention": lambda backend, x, dtype: backend.selected_attention(
        x.queries, x.segment, x.chunks, CHUNK_SIZE, x.keys, x.values, x.scale
    ),
}
"""By name; the first word is the operation's, as kernels know it."""
