"""Rows that a working set keeps between steps, in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from xkv.ops.protocol import Operations
from xkv.ops.types import Array

LARGEST = 127
"""Of the whole numbers that stand for a row: 8 bits, symmetric about zero."""

SCALE_BYTES = 8
SLOT_NUMBERS = SCALE_BYTES + 4
"""Bytes of a slot beside its features: two scales, and which row it holds."""


class Slots(NamedTuple):
    """Copies of some stored rows, of which each KV head has its own. A value."""

    numbers: Array
    """``[B, n_kv_heads, K, head_dim + value_dim]`` int8: rotated keys, then values."""
    scales: Array
    """``[B, n_kv_heads, K, 2]`` float32: the factors of a row's key and of its value."""
    rows: Array
    """Their row numbers in the segment, distinct, ``[B, n_kv_heads, K]`` int32."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)

    def map(self, function: Callable[[Array], Array]) -> Slots:
        """With each array changed along the axes before the features."""
        return Slots(*(function(x) for x in self))

    def keys(self, backend: Operations, head_dim: int, dtype: Any) -> Array:
        """``[B, n_kv_heads, K, head_dim]``"""
        return self._widened(backend, self.numbers[..., :head_dim], 0, dtype)

    def values(self, backend: Operations, head_dim: int, dtype: Any) -> Array:
        """``[B, n_kv_heads, K, value_dim]``"""
        return self._widened(backend, self.numbers[..., head_dim:], 1, dtype)

    def _widened(self, backend: Operations, numbers: Array, which: int, dtype: Any) -> Array:
        xp = backend.xp
        return xp.astype(numbers, dtype) * xp.astype(self.scales[..., which, None], dtype)

    def joined(self, backend: Operations, others: Slots) -> Slots:
        """These, then others."""
        pairs = zip(self, others, strict=True)
        return Slots(*(backend.xp.concat(list(pair), axis=2) for pair in pairs))

    def swapped(self, backend: Operations, at: Array, entering: Slots) -> Slots:
        """With others in some slots, ``[B, n_kv_heads, n]``; what was there is not needed again."""
        pairs = zip(self, entering, strict=True)
        return Slots(*(backend.put_along(x, at, y, in_place=True) for x, y in pairs))


def pack_rows(backend: Operations, keys: Array, values: Array) -> tuple[Array, Array]:
    """Rows as slots hold them.

    Args:
        keys: ``[B, n_kv_heads, n, head_dim]``, rotated.
        values: ``[B, n_kv_heads, n, value_dim]``

    Returns:
        ``numbers`` and ``scales`` of :class:`Slots`.
    """
    xp, parts, scales = backend.xp, [], []
    for x in (keys, values):
        wide = xp.astype(x, xp.float32)
        scale = xp.max(xp.abs(wide), axis=-1, keepdims=True) / LARGEST
        # a row of zeros is divided by 1
        divisor = scale + xp.astype(scale == 0, xp.float32)
        parts.append(xp.astype(xp.round(wide / divisor), xp.int8))
        scales.append(scale)
    return xp.concat(parts, axis=-1), xp.concat(scales, axis=-1)
