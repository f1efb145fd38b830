"""Latents and bases in few bits: parts of neighbouring columns, each in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed, Part, group_size_of
from xkv.ops.types import Array

BASIS_GROUP = 128
"""Numbers of a basis, at most, that share a scale; at short prompts its bytes dominate."""

BITS = (2, 3, 4, 5, 6, 8, 16)
"""What a band can be stored in; 16 stands for the KV dtype itself."""


CLIPPED_SHARE = {2: 21 / 32, 3: 55 / 64, 4: 61 / 64}
"""Share of a group's range that so few bits cover; its largest numbers are cut to the edge.

For a normal distribution in groups of 64, mean squared errors fall from MLX's 0.155, 0.0362 and
0.0083 of the variance to 0.113, 0.0308 and 0.0077. The fractions are exact in bfloat16.
"""

ROUNDING = {2: 0.1131, 3: 0.0308, 4: 0.00767, 5: 0.00192, 6: 0.000466, 8: 2.85e-5, 16: 0.0}
"""Share of normal numbers' energy that is lost in groups of 64."""


def row_bytes(width: int, bits: int, item_bytes: int, largest_group: int = BAND) -> int:
    """Bytes of ``width`` numbers that are quantized together."""
    if bits == 16:
        return width * item_bytes
    return width * bits // 8 + width // group_size_of(width, largest_group) * 2 * item_bytes


def basis_row_bytes(head_dim: int, bits: int, item_bytes: int) -> int:
    """Bytes of a basis' row in one head."""
    return row_bytes(head_dim, bits, item_bytes, BASIS_GROUP)


def pack_part(backend: Backend, x: Array, bits: int, largest_group: int = BAND) -> Part:
    """Columns of a latent ``[B, L, D]``, or with groups of up to ``BASIS_GROUP`` rows of a basis
    ``[B, n, n_kv_heads, D]``, in ``bits`` bits; 16 leaves them as they are."""
    if bits == 16:
        return Part((x,), 16, 0)
    group_size = group_size_of(x.shape[-1], largest_group)
    if bits not in CLIPPED_SHARE:
        return Part(backend.quantize(x, group_size, bits), bits, group_size)
    low, high = _clipped_range(backend, x, group_size, CLIPPED_SHARE[bits])
    xp = backend.xp
    groups = xp.reshape(x, (*low.shape[:-1], group_size))
    # MLX puts a code on zero, which costs range, but not where zero is an edge
    shifted = xp.reshape(xp.minimum(xp.clip(groups - low, 0, None), high - low), x.shape)
    words, scales, biases = backend.quantize(shifted, group_size, bits)
    return Part((words, scales, biases + low[..., 0]), bits, group_size)


def _clipped_range(
    backend: Backend, x: Array, group_size: int, share: float
) -> tuple[Array, Array]:
    """``[..., groups, 1]``: each group's range, drawn in towards its mean."""
    xp = backend.xp
    groups = xp.reshape(x, (*x.shape[:-1], -1, group_size))
    low = xp.min(groups, axis=-1, keepdims=True)
    high = xp.max(groups, axis=-1, keepdims=True)
    wide = xp.astype(groups, backend.accumulate_dtype(x))
    center = xp.astype(xp.mean(wide, axis=-1, keepdims=True), x.dtype)
    return center + share * (low - center), center + share * (high - center)


def pack_latent(backend: Backend, x: Array, widths: Sequence[int], bits: Sequence[int]) -> Packed:
    """A latent ``[B, L, r]`` in parts of some columns each."""
    ends, parts = np.cumsum(widths).tolist(), []
    for end, width, n_bits in zip(ends, widths, bits, strict=True):
        columns = x[..., end - width : end]
        # a part of an array would keep all of it
        is_part = n_bits == 16 and width < x.shape[-1]
        parts.append(pack_part(backend, backend.own(columns) if is_part else columns, n_bits))
    return Packed(tuple(parts), 2)


def pack_basis(backend: Backend, x: Array, widths: Sequence[int], bits: Sequence[int]) -> Packed:
    """A basis ``[B, r, n_kv_heads, dim]`` in parts of some rows each."""
    ends = np.cumsum(widths).tolist()
    parts = [
        pack_part(backend, backend.own(x[:, end - width : end]), n_bits, BASIS_GROUP)
        for end, width, n_bits in zip(ends, widths, bits, strict=True)
    ]
    return Packed(tuple(parts), 1)


def small_latent(
    backend: Backend, like: Array | Packed, n_rows: int, rank: int, seed: int
) -> Array | Packed:
    """Random rows in a latent's form, for a check: ``rank`` columns, or a few in each part."""
    if isinstance(like, Packed):
        widths = [96 if part.group_size == 32 else 2 * BAND for part in like.parts]
        rank = sum(widths)
    drawn = backend.xp.astype(backend.normal((1, n_rows, rank), seed), like.dtype)
    return pack_latent(backend, drawn, widths, like.bits) if isinstance(like, Packed) else drawn
