"""The last rows of a segment as they were computed, in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xkv.ops.protocol import Operations
from xkv.ops.types import Array

LARGEST = 127
"""Of the whole numbers that stand for a row: 8 bits, symmetric about zero."""

SCALE_BYTES = 8
"""Of a row, beside its features."""


class Recent(NamedTuple):
    """Rows that every step attends to, with a scale for each key and each value. A value."""

    numbers: Array
    """``[B, n_kv_heads, K, head_dim + value_dim]`` int8: rotated keys, then values."""
    scales: Array
    """``[B, n_kv_heads, K, 2]`` float32: the factors of a row's key and of its value."""

    @property
    def n_rows(self) -> int:
        return self.numbers.shape[2]

    def map(self, function: Callable[[Array], Array]) -> Recent:
        """With each array changed along the axes before the features."""
        return Recent(function(self.numbers), function(self.scales))

    def keys(self, backend: Operations, head_dim: int, dtype: Any) -> Array:
        """``[B, n_kv_heads, K, head_dim]``"""
        return self._widened(backend, self.numbers[..., :head_dim], 0, dtype)

    def values(self, backend: Operations, head_dim: int, dtype: Any) -> Array:
        """``[B, n_kv_heads, K, value_dim]``"""
        return self._widened(backend, self.numbers[..., head_dim:], 1, dtype)

    def _widened(self, backend: Operations, numbers: Array, which: int, dtype: Any) -> Array:
        xp = backend.xp
        return xp.astype(numbers, dtype) * xp.astype(self.scales[..., which, None], dtype)

    def followed(self, backend: Operations, others: Recent, n_rows: int) -> Recent:
        """The last ``n_rows``, at most, of these and then others, in arrays of their own."""
        pairs = zip(self, others, strict=True)
        joined = Recent(*(backend.xp.concat(list(pair), axis=2) for pair in pairs))
        return joined.map(lambda x: backend.own(x[:, :, -n_rows:]))

    def without_last(self, n_rows: int) -> Recent | None:
        """Fewer rows; None for none."""
        n_left = self.n_rows - n_rows
        return self.map(lambda x: x[:, :, :n_left]) if n_left > 0 else None


def packed(backend: Operations, keys: Array, values: Array) -> Recent:
    """Rows in 8 bits.

    Args:
        keys: ``[B, n_kv_heads, n, head_dim]``, rotated.
        values: ``[B, n_kv_heads, n, value_dim]``
    """
    xp, parts, scales = backend.xp, [], []
    for x in (keys, values):
        wide = xp.astype(x, xp.float32)
        scale = xp.max(xp.abs(wide), axis=-1, keepdims=True) / LARGEST
        # a row of zeros is divided by 1
        divisor = scale + xp.astype(scale == 0, xp.float32)
        parts.append(xp.astype(xp.round(wide / divisor), xp.int8))
        scales.append(scale)
    return Recent(xp.concat(parts, axis=-1), xp.concat(scales, axis=-1))
