"""Small matrices and sums of squares, for factoring and for later rows."""

from __future__ import annotations

import numpy as np

from xkv.ops.backend import Backend
from xkv.ops.types import Array


def triangular_root(backend: Backend, gram: Array) -> Array:
    """``R`` with ``R^T R`` the inverse of a positive semidefinite ``[..., k, k]``.

    Where it is singular, of one a little larger.
    """
    xp = backend.xp
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    mean_diagonal = xp.sum(gram * eye, axis=(-2, -1), keepdims=True) / gram.shape[-1]
    # the smallest normal number keeps an all-zero matrix from stopping the factorization
    shift = mean_diagonal * (4 * xp.finfo(gram.dtype).eps) + 1e-30
    while (factor := backend.cholesky(gram + shift * eye)) is None:
        shift = shift * 10
    return backend.triangular_inverse(factor)


def inverse(backend: Backend, gram: Array) -> Array:
    """Of a positive semidefinite matrix; where it is singular, of one a little larger."""
    root = triangular_root(backend, gram)
    return backend.xp.matrix_transpose(root) @ root


def energy(backend: Backend, x: Array) -> float:
    """Sum of squares."""
    # in float64 from the last axis on: one float32 sum over a long prompt loses a fifth of it
    by_row = backend.to_numpy(backend.xp.sum(x * x, axis=-1))
    return float(by_row.sum(dtype=np.float64))
