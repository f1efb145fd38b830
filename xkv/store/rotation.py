"""A fixed rotation of each band of columns, before they are stored in few bits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.types import Array


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Sylvester's orthogonal matrix of a power of two."""
    if size == 1:
        return np.ones((1, 1), dtype=np.float32)
    half = _hadamard(size // 2)
    return np.block([[half, half], [half, -half]]) / np.float32(2**0.5)


def rotate_bands(backend: Backend, basis: Array, dtype: Any) -> Array:
    """Spread each band's directions evenly; products of rows projected on them stay the same.

    A row's scale in a band is set by its largest number, so that a few strong columns cost all
    others their precision; a Hadamard matrix makes them alike.

    Args:
        basis: ``[B, r, n_kv_heads, dim]`` in float32 or wider, r a multiple of ``BAND``.
        dtype: Of what is returned.

    Source: QuaRot, arXiv:2404.00456, for weights and activations.
    """
    xp = backend.xp
    turn = xp.astype(backend.from_numpy(_hadamard(BAND)), basis.dtype)
    flat = xp.reshape(basis, (basis.shape[0], -1, BAND, basis.shape[2] * basis.shape[3]))
    return xp.astype(xp.reshape(turn @ flat, basis.shape), dtype)
