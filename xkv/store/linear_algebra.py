"""Small matrices and sums of squares, for factoring and for folding."""

from __future__ import annotations

import numpy as np

from xkv.ops.backend import Backend
from xkv.ops.types import Array


def inverse(backend: Backend, gram: Array) -> Array:
    """Of a positive semidefinite matrix; where it is singular, of one a little larger."""
    xp = backend.xp
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, **backend.placement)
    mean_diagonal = float(xp.sum(gram * eye)) / (gram.shape[0] * gram.shape[-1])
    shift = 4 * float(xp.finfo(gram.dtype).eps) * mean_diagonal
    while (factor := backend.cholesky(gram + shift * eye)) is None:
        shift *= 10
    root = backend.solve_triangular(factor, eye)
    return xp.matrix_transpose(root) @ root


def energy(backend: Backend, x: Array) -> float:
    """Sum of squares."""
    # in float64 from the last axis on: one float32 sum over a long prompt loses a fifth of it
    by_row = backend.to_numpy(backend.xp.sum(x * x, axis=-1))
    return float(by_row.sum(dtype=np.float64))
