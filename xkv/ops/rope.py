"""Rotary position embedding over array namespaces: the plain form of every fused rope."""

from __future__ import annotations

from typing import Any

from xkv.ops.protocol import Operations
from xkv.ops.types import Array, RopeSpec


def cos_sin(
    backend: Operations, positions: Array, spec: RopeSpec, dtype: Any
) -> tuple[Array, Array]:
    """Cosines and sines for integer ``positions`` ``[...]``: two of ``[..., dims // 2]``."""
    xp = backend.xp
    # float32: 16-bit angles drift past a few thousand positions
    inverse_freqs = 1.0 / backend.constant(spec.freqs, dtype)
    angles = xp.astype(positions, dtype)[..., None] * inverse_freqs
    return xp.cos(angles), xp.sin(angles)


def rotate(
    backend: Operations, x: Array, positions: Array, spec: RopeSpec, inverse: bool = False
) -> Array:
    """Rotate rows to their positions, or back; the plain twin of every fused rope.

    Args:
        x: ``[..., L, head_dim]``, any float dtype.
        positions: Integers that broadcast to ``[..., L]``.
        inverse: Undo the rotation and the spec's scale.

    Returns:
        ``[..., L, head_dim]`` in the dtype of ``x``; arithmetic is in float32 (float64 for
        float64).
    """
    cos, sin = cos_sin(backend, positions, spec, backend.accumulate_dtype(x))
    return turn(backend, x, cos, -sin if inverse else sin, spec, inverse)


def turn(
    backend: Operations, x: Array, cos: Array, sin: Array, spec: RopeSpec, inverse: bool = False
) -> Array:
    """:func:`rotate` by given cosines and sines, ``[..., L, dims // 2]``."""
    xp = backend.xp
    scale = 1 / spec.scale if inverse else spec.scale
    turned = xp.astype(x[..., : spec.dims], cos.dtype)
    turned = turned if scale == 1 else turned * scale
    half = spec.dims // 2
    if spec.traditional:
        pairs = xp.reshape(turned, (*turned.shape[:-1], half, 2))
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = turned[..., :half], turned[..., half:]
    first, second = first * cos - second * sin, second * cos + first * sin
    if spec.traditional:
        turned = xp.reshape(xp.stack([first, second], axis=-1), turned.shape)
    else:
        turned = xp.concat([first, second], axis=-1)
    turned = xp.astype(turned, x.dtype)
    if spec.dims == x.shape[-1]:
        return turned
    return xp.concat([turned, x[..., spec.dims :]], axis=-1)
