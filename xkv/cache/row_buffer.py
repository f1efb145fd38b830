"""Dense rows of keys or values, with room to grow."""

from __future__ import annotations

from typing import NamedTuple

from xkv.config import buffer_rows
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array


class RowBuffer(NamedTuple):
    """Dense rows ``[B, n_kv_heads, n_rows, dim]`` in a buffer with unused rows behind them.

    A value: what changes rows returns another one. Rows are written into the unused part of the
    buffer in place, which a value that does not count them never reads.
    """

    allocated: Array | None = None
    """The whole buffer, unused rows included."""
    n_rows: int = 0
    reserved: int = 0
    """Rows that the next growth makes room for, at least."""

    @property
    def rows(self) -> Array:
        """The rows in use."""
        if self.allocated is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self.allocated[..., : self.n_rows, :]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row, of all sequences."""
        return 0 if self.allocated is None else self.allocated.nbytes // self.allocated.shape[-2]

    def first(self, n_rows: int) -> RowBuffer:
        """Fewer rows."""
        return self._replace(n_rows=n_rows)

    def with_room(self, backend: Backend, n_rows: int, like: Array) -> RowBuffer:
        """The same rows in a buffer of at least ``n_rows``, shaped like other rows.

        Unused rows are zeros.
        """
        if self.allocated is not None and n_rows <= self.allocated.shape[-2]:
            return self
        xp = backend.xp
        size = max(buffer_rows(n_rows), buffer_rows(self.reserved) if self.reserved else 0)
        spare = (*like.shape[:2], size - self.n_rows, like.shape[-1])
        grown = xp.zeros(spare, dtype=like.dtype, **backend.placement)
        kept = [] if self.allocated is None else [self.rows]
        return self._replace(allocated=xp.concat([*kept, grown], axis=-2))

    def appended(self, backend: Backend, rows: Array) -> RowBuffer:
        """These rows, then others.

        Raises:
            InputError: If the others have another batch, heads or head size.
        """
        end = self.n_rows + rows.shape[-2]
        room = self.with_room(backend, end, rows)
        buffer = room.allocated
        assert buffer is not None
        mine, theirs = ((x.shape[0], x.shape[1], x.shape[-1]) for x in (buffer, rows))
        if mine != theirs:
            raise InputError(
                f"rows of batch, heads and head size {theirs} cannot follow those of {mine} that "
                "the cache holds: use a new cache"
            )
        buffer[..., self.n_rows : end, :] = rows
        return room._replace(n_rows=end)

    def without(self, backend: Backend, start: int, end: int) -> RowBuffer:
        """The rows but those from ``start`` to ``end``, in a buffer of their own."""
        parts = [self.rows[..., :start, :], self.rows[..., end:, :]]
        return RowBuffer().appended(backend, backend.xp.concat(parts, axis=-2))
