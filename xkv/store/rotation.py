"""A fixed rotation of each band of columns, before they are stored in few bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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


def _pad_to_bands(backend: Backend, x: Array, axis: int) -> Array:
    """Zeros behind the last column (or row) up to a whole number of bands."""
    missing = -x.shape[axis] % BAND
    if not missing:
        return x
    xp = backend.xp
    shape = [missing if i == axis % len(x.shape) else n for i, n in enumerate(x.shape)]
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, **backend.placement)], axis=axis)


def rotate_bands(
    backend: Backend, latent: Array, bases: Sequence[Array], dtype: Any
) -> tuple[Array, tuple[Array, ...]]:
    """Spread each band's columns evenly, which leaves the products as they are.

    A row's scale in a band is set by its largest number, so that a few strong columns cost all
    others their precision; a Hadamard matrix makes them alike.

    Args:
        latent: ``[B, L, r]`` in float32 or wider; r is filled up with zeros to whole bands.
        bases: One a layer, ``[B, r, n_kv_heads, dim]``.
        dtype: Of what is returned.

    Source: QuaRot, arXiv:2404.00456, for weights and activations.
    """
    xp = backend.xp
    turn = xp.astype(backend.from_numpy(_hadamard(BAND)), latent.dtype)
    latent = _pad_to_bands(backend, latent, -1)
    rank = latent.shape[-1]
    bands = []
    for start in range(0, rank, BAND):
        # one at a time: they are as long as the prompt
        bands.append(xp.astype(latent[..., start : start + BAND] @ turn, dtype))
        backend.evaluate(bands[-1])
    rotated = []
    for basis in bases:
        basis = _pad_to_bands(backend, basis, 1)
        flat = xp.reshape(basis, (basis.shape[0], rank // BAND, BAND, -1))
        turned = xp.matrix_transpose(turn) @ flat
        rotated.append(xp.astype(xp.reshape(turned, basis.shape), dtype))
    return xp.concat(bands, axis=-1), tuple(rotated)
