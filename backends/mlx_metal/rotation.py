"""Rotary position embedding of rows at positions that only the device knows."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from xkv.ops.protocol import Operations
from xkv.ops.rope import turn
from xkv.ops.types import Array, RopeSpec

STEPS, LEVELS = 64, 4
"""A position is a sum of a few steps, each of one of 64 lengths: enough for 16 million."""


def rotation_at(backend: Operations, spec: RopeSpec) -> Callable[[Array, Array], Array]:
    """:func:`xkv.ops.rope.rotate` of rows ``[..., L, head_dim]`` by integers ``[..., L]``.

    The cosines and sines of each step are looked up and joined: on a CPU a sixth of the time of
    computing them, and exact where float32 angles are off by 1e-3 a few thousand positions away.
    """
    inverse_freqs, half = 1 / np.array(spec.freqs), spec.dims // 2
    tables = []
    for level in range(LEVELS):
        angles = (np.arange(STEPS) * float(STEPS**level))[:, None] * inverse_freqs
        numbers = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        tables.append(backend.from_numpy(numbers.astype(np.float32)))

    @mx.compile
    def rotate(rows: Array, positions: Array) -> Array:
        first, *others = (
            mx.take(table, positions // STEPS**level % STEPS, axis=0)
            for level, table in enumerate(tables)
        )
        cos, sin = first[..., :half], first[..., half:]
        for step in others:
            c, s = step[..., :half], step[..., half:]
            cos, sin = cos * c - sin * s, sin * c + cos * s
        return turn(backend, rows, cos, sin, spec)

    return rotate
