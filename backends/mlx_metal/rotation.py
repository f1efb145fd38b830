"""Rotary position embedding of rows at positions that only the device knows."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from xkv.ops.protocol import Operations
from xkv.ops.rope import turn
from xkv.ops.types import Array, RopeSpec

STEPS = 2048
"""Positions up to the square of it are two steps, a large and a small one."""


def rotation_at(backend: Operations, spec: RopeSpec) -> Callable[[Array, Array], Array]:
    """:func:`xkv.ops.rope.rotate` of rows ``[..., L, head_dim]`` by integers ``[..., L]``.

    The cosines and sines of both steps are looked up and joined: on a CPU a tenth of the time of
    computing them, and exact where float32 angles are off by 1e-3 a few thousand positions away.
    """
    inverse_freqs = 1 / np.array(spec.freqs)

    def table(positions: np.ndarray) -> Array:
        angles = positions[:, None] * inverse_freqs
        numbers = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return backend.from_numpy(numbers.astype(np.float32))

    steps = np.arange(STEPS, dtype=np.float64)
    large, small, half = table(steps * STEPS), table(steps), spec.dims // 2

    @mx.compile
    def rotate(rows: Array, positions: Array) -> Array:
        first = mx.take(large, positions // STEPS, axis=0)
        second = mx.take(small, positions % STEPS, axis=0)
        (c1, s1), (c2, s2) = ((x[..., :half], x[..., half:]) for x in (first, second))
        return turn(backend, rows, c1 * c2 - s1 * s2, s1 * c2 + c1 * s2, spec)

    return rotate
