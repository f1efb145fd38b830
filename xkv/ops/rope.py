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


def run_cos_sin(
    backend: Operations, starts: Array, run_length: int, spec: RopeSpec, dtype: Any
) -> tuple[Array, Array]:
    """:func:`cos_sin` of ``n * run_length`` rows: runs of consecutive positions from ``starts``.

    One cosine and sine a run instead of a row, by the angle sum: plain operations spend most of a
    rotation on them. It differs from the direct form by the rounding of an angle.
    """
    xp = backend.xp
    cos, sin = (x[..., None, :] for x in cos_sin(backend, starts, spec, dtype))
    step_cos, step_sin = cos_sin(backend, backend.positions(0, run_length), spec, dtype)
    shape = (*starts.shape[:-1], starts.shape[-1] * run_length, len(spec.freqs))
    return (
        xp.reshape(cos * step_cos - sin * step_sin, shape),
        xp.reshape(sin * step_cos + cos * step_sin, shape),
    )


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


def rotate_runs(
    backend: Operations, x: Array, starts: Array, run_length: int, spec: RopeSpec
) -> Array:
    """:func:`rotate` for rows ``[..., n * run_length, head_dim]`` that are runs from ``starts``."""
    cos, sin = run_cos_sin(backend, starts, run_length, spec, backend.accumulate_dtype(x))
    return turn(backend, x, cos, sin, spec)


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
