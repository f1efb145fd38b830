"""Dense rows of keys or values, with room to grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xkv.config import buffer_rows
from xkv.errors import InputError

if TYPE_CHECKING:
    from xkv.backend import Array
    from xkv.group_cache import GroupCache


class RowBuffer:
    """Dense rows ``[B, n_kv_heads, n_rows, dim]`` in a buffer that grows in place."""

    def __init__(self, group: GroupCache) -> None:
        self._group = group
        self.allocated: Array | None = None
        """The whole buffer, unused rows included."""
        self.n_rows = 0
        self.reserved = 0
        """Rows that the next growth makes room for, at least."""

    def append(self, rows: Array) -> None:
        """Add rows at the end."""
        end = self.n_rows + rows.shape[-2]
        buffer = self.make_room(end, rows)
        buffer[..., self.n_rows : end, :] = rows
        self.n_rows = end

    def make_room(self, n_rows: int, like: Array) -> Array:
        """A buffer of at least ``n_rows`` rows, in the shape of others but for their number.

        Unused rows are zeros.
        """
        if self.allocated is not None and n_rows <= self.allocated.shape[-2]:
            return self.allocated
        xp = self._group.backend.xp
        size = max(buffer_rows(n_rows), buffer_rows(self.reserved) if self.reserved else 0)
        spare = (*like.shape[:2], size - self.n_rows, like.shape[-1])
        grown = xp.zeros(spare, dtype=like.dtype, **self._group.backend.placement)
        kept = [] if self.allocated is None else [self.rows]
        self.allocated = xp.concat([*kept, grown], axis=-2)
        return self.allocated

    @property
    def rows(self) -> Array:
        """The rows in use."""
        if self.allocated is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self.allocated[..., : self.n_rows, :]

    def replace(self, start: int, end: int, by: Sequence[Array] = ()) -> None:
        """Put other rows in the place of those from ``start`` to ``end``, whose memory is freed."""
        parts = [self.rows[..., :start, :], *by, self.rows[..., end:, :]]
        kept = self._group.backend.xp.concat(parts, axis=-2)
        self.allocated, self.n_rows, self.reserved = None, 0, 0
        self.append(kept)
