"""Every operation of the backend protocol on small inputs, to be compared across backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from xkv.checks.decode_cases import CASES, DecodeInputs
from xkv.ops.attention import attend_all
from xkv.ops.backend import Backend
from xkv.ops.index import absorbed_queries, index_basis
from xkv.ops.types import Array
from xkv.ops.working_set import attend_set
from xkv.store.svd import factorize

PARITY_CASES = (CASES[0], CASES[1], CASES[4], CASES[6])
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
        packed = backend.to_numpy(_pack(backend, x.dense.keys, dtype, bits)[0])
        return np.ascontiguousarray(packed).view(np.uint8)

    return words


def _dequantize(bits: int) -> Operation:
    return lambda backend, x, dtype: backend.dequantize(
        _pack(backend, x.dense.keys, dtype, bits), QUANTIZATION_GROUP, bits
    )


def absorbed_of(backend: Backend, x: DecodeInputs) -> Array:
    """The queries of a case in its index."""
    return absorbed_queries(backend, x.queries * x.scale, x.segment.keys)


def offsets_of(backend: Backend, x: DecodeInputs) -> Array:
    """What a case's dense rows give, near enough: a number a query."""
    n_queries = x.queries.shape[1] * x.queries.shape[2]
    numbers = backend.positions(0, x.queries.shape[0] * n_queries) / 7.0
    dtype = backend.accumulate_dtype(x.queries)
    shape = (x.queries.shape[0], n_queries)
    return backend.xp.astype(backend.xp.reshape(numbers, shape), dtype)


def _index_scores(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    absorbed, latent = absorbed_of(backend, x), x.segment.keys.latent
    return backend.index_scores(absorbed, latent, offsets_of(backend, x), x.case.n_kv_heads)


def _together(backend: Backend, parts: tuple[Array, ...]) -> Array:
    """Several results as one."""
    xp = backend.xp
    wide = [xp.astype(x, backend.accumulate_dtype(x)) for x in parts]
    return xp.concat([xp.reshape(x, (-1,)) for x in wide])


def _attend_dense(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return _together(backend, backend.attend_dense(x.queries * x.scale, x.dense, None))


def _query_terms(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    basis = index_basis(backend, x.segment.keys)
    return backend.query_terms(x.queries * x.scale, basis, x.case.spec)


def choice_of(backend: Backend, x: DecodeInputs) -> tuple[Any, ...]:
    """Arguments of a choice of rows: scores that float32 holds."""
    case = x.case
    shape = (case.batch, case.n_kv_heads, case.n_rows)
    numbers = backend.positions(0, math.prod(shape)) * 7919 % 10007
    worth = backend.xp.astype(backend.xp.reshape(numbers, shape), backend.xp.float32) / 64 - 80
    return worth, min(case.n_rebuilt, case.n_rows)


def _choose_rows(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    # in any order
    chosen = backend.xp.sort(backend.choose_rows(*choice_of(backend, x)), axis=-1)
    return _together(backend, (chosen,))


def _key_scores(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return backend.key_scores(x.segment.keys, x.rows, x.queries * x.scale)


def weighing_of(backend: Backend, x: DecodeInputs) -> tuple[Array, ...]:
    """Arguments of a weighing: scores of some rows, beside the attention over dense ones."""
    queries = x.queries * x.scale
    beside, totals = backend.attend_dense(queries, x.dense, None)
    scores = backend.key_scores(x.segment.keys, x.rows, queries)
    return x.segment.values.latent, x.rows, scores, totals, beside


def _weigh_rows(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return _together(backend, backend.weigh_rows(*weighing_of(backend, x)))


def _attend_all(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return attend_all(backend, x.queries, x.segment, x.dense, x.scale)


def _attend_set(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """With all rows rebuilt: which ones matter is decided by near ties else."""
    return attend_set(backend, x.queries, x.segment, x.dense, x.scale, x.case.n_rows)


def _factorize(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """``latent @ bases`` of two layers whose columns fade."""
    xp = backend.xp
    fading = backend.constant([0.8**i for i in range(x.dense.keys.shape[-1])], x.dense.keys.dtype)
    layers = [
        xp.permute_dims(rows * fading, (0, 2, 1, 3)) for rows in (x.dense.keys, x.dense.values)
    ]
    latent, bases, _ = factorize(backend, layers, 12)
    return latent @ xp.concat([xp.reshape(x, (*x.shape[:2], -1)) for x in bases], axis=-1)


def _gram(backend: Backend, x: DecodeInputs) -> Array:
    """A positive definite matrix like those that the factorization meets."""
    xp = backend.xp
    rows = xp.astype(x.dense.keys[0, 0], backend.accumulate_dtype(x.dense.keys))
    eye = xp.eye(rows.shape[0], dtype=rows.dtype, **backend.placement)
    return rows @ xp.matrix_transpose(rows) / rows.shape[1] + eye


def _triangular_inverse(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    return backend.triangular_inverse(backend.cholesky(_gram(backend, x)))


def _eigh(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    """The matrix's square root: eigenvectors alone may have either sign."""
    values, vectors = backend.eigh(_gram(backend, x))
    return (vectors * values[..., None, :] ** 0.5) @ backend.xp.matrix_transpose(vectors)


def _rope(inverse: bool) -> Operation:
    return lambda backend, x, dtype: backend.rope(
        x.dense.keys, x.segment.keys.start, x.case.spec, inverse
    )


def _rope_at(backend: Backend, x: DecodeInputs, dtype: str) -> Array:
    rows = x.rows[..., : x.dense.keys.shape[2]]
    return backend.rope(x.dense.keys[..., : rows.shape[-1], :], rows, x.case.spec)


OPERATIONS: dict[str, Operation] = {
    "rope": _rope(False),
    "rope inverse": _rope(True),
    "rope at positions": _rope_at,
    "cholesky": lambda backend, x, dtype: backend.cholesky(_gram(backend, x)),
    "triangular_inverse": _triangular_inverse,
    "eigh": _eigh,
    "factorize": _factorize,
    **{f"quantize {bits} bits": _quantize(bits) for bits in BITS},
    **{f"dequantize {bits} bits": _dequantize(bits) for bits in BITS},
    "attention": lambda backend, x, dtype: backend.attention(
        x.queries, x.dense.keys, x.dense.values, x.scale, None
    ),
    "attend_dense": _attend_dense,
    "query_terms": _query_terms,
    "absorbed_queries": lambda backend, x, dtype: absorbed_of(backend, x),
    "index_scores": _index_scores,
    "choose_rows": _choose_rows,
    "key_scores": _key_scores,
    "weigh_rows": _weigh_rows,
    "attend_all": _attend_all,
    "attend_set": _attend_set,
}
"""By name; where there is a kernel, its own."""
