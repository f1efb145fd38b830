"""Latents and bases in few bits: parts of neighbouring columns, each in MLX's affine layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.packed import Packed, Part, group_size_of
from xkv.ops.types import Array

BASIS_GROUP = 128
"""Numbers of a basis, at most, that share a scale; at short prompts its bytes dominate."""

BITS = (2, 3, 4, 5, 6, 8)
"""What a band of a latent can be stored in."""

BASIS_BITS = (*BITS, 16)
"""What rows of a prompt's own basis can; 16 stands for the KV dtype itself."""


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
    ``[B, n, n_kv_heads, D]``, in ``bits`` bits; 16 leaves a basis as it is."""
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


def pack_latent(backend: Backend, x: Array, bits: Sequence[int]) -> Latent:
    """A latent ``[B, L, r]`` with each band of columns in its bits; none leave it as it is."""
    if not bits:
        return Latent((x,))
    parts, start = [], 0
    for n_bits, run in itertools.groupby(bits):
        end = start + BAND * len(list(run))
        parts.append(pack_part(backend, x[..., start:end], n_bits).arrays)
        start = end
    arrays = (backend.xp.concat(list(each), axis=-1) for each in zip(*parts, strict=True))
    return Latent(tuple(arrays), tuple(bits))


def pack_basis(backend: Backend, x: Array, widths: Sequence[int], bits: Sequence[int]) -> Packed:
    """A basis ``[B, r, n_kv_heads, dim]`` in parts of some rows each."""
    ends = np.cumsum(widths).tolist()
    parts = [
        pack_part(backend, backend.own(x[:, end - width : end]), n_bits, BASIS_GROUP)
        for end, width, n_bits in zip(ends, widths, bits, strict=True)
    ]
    return Packed(tuple(parts))
