"""What one layer holds by itself: dense rows, and how many of its group's rows it uses."""

from __future__ import annotations

from typing import NamedTuple

from xkv.cache.row_buffer import RowBuffer
from xkv.ops.backend import Backend
from xkv.ops.recent import Recent
from xkv.ops.types import Array, RopeRun, RopeSpec


class LayerRows(NamedTuple):
    """One layer's rows. A value: what changes them returns another one.

    Before compression every row is dense. Afterwards the dense rows are the sinks, then window and
    tail; in position, the group's segment lies between sinks and window.
    """

    keys: RowBuffer = RowBuffer()
    values: RowBuffer = RowBuffer()
    start: int = 0
    """Position of the segment's first row."""
    n_segment: int = 0
    """Rows of the group's segment that this layer still uses; trimming lowers it."""
    recent: Recent | None = None
    """The last of these rows, as they were computed, in 8 bits; None for none."""
    rope_runs: tuple[RopeRun, ...] = ()
    """How the rows from position 0 on were rotated."""

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.n_segment + self.keys.n_rows

    @property
    def batch(self) -> int:
        """Sequences."""
        return 0 if self.keys.allocated is None else self.keys.allocated.shape[0]

    @property
    def is_compressed(self) -> bool:
        """Whether some of the rows are in the group's segment."""
        return self.n_segment > 0

    @property
    def n_sinks(self) -> int:
        """Dense rows before the segment."""
        return self.start if self.is_compressed else 0

    @property
    def n_tail(self) -> int:
        """Dense rows after the compressed ones: window and tail."""
        return self.keys.n_rows - self.n_sinks

    @property
    def row_bytes(self) -> int:
        """Dense bytes of one token, of all sequences."""
        return self.keys.row_bytes + self.values.row_bytes

    @property
    def n_recent(self) -> int:
        """Rows of the segment that are in 8 bits too."""
        return 0 if self.recent is None else self.recent.n_rows

    @property
    def arrays(self) -> list[Array]:
        """The arrays that no other layer has a part in."""
        held = self.keys.allocated, self.values.allocated, *(self.recent or ())
        return [x for x in held if x is not None]

    def appended(
        self, backend: Backend, keys: Array, values: Array, rope: RopeSpec | None
    ) -> LayerRows:
        """These rows, then new tokens' ``[B, n_kv_heads, L, dim]``, keys rotated by ``rope``."""
        return self._replace(
            keys=self.keys.appended(backend, keys), values=self.values.appended(backend, values)
        ).rotated(keys.shape[-2], rope)

    def rotated(self, n_rows: int, rope: RopeSpec | None) -> LayerRows:
        """Count on how ``n_rows`` more rows are rotated."""
        runs = self.rope_runs
        if runs and runs[-1].spec == rope:
            n_rows, runs = n_rows + runs[-1].n_rows, runs[:-1]
        return self._replace(rope_runs=(*runs, RopeRun(n_rows, rope)))

    def with_room(self, backend: Backend, n_rows: int) -> LayerRows:
        """Buffers in which ``n_rows`` more fit without a copy."""
        keys, values = (
            x.with_room(backend, x.n_rows + n_rows, x.rows) for x in (self.keys, self.values)
        )
        return self._replace(keys=keys, values=values)

    def reserving(self, n_rows: int) -> LayerRows:
        """The next growth makes room for ``n_rows`` more at once."""
        keys, values = (x._replace(reserved=x.n_rows + n_rows) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values)

    def without_last(self, n_rows: int) -> LayerRows:
        """Fewer dense rows."""
        keys, values = (x.first(x.n_rows - n_rows) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values)

    def runs_between(self, start: int, end: int) -> tuple[RopeRun, ...]:
        """How the rows from position ``start`` to ``end`` were rotated."""
        runs, row = [], 0
        for n_rows, spec in self.rope_runs:
            inside = min(row + n_rows, end) - max(row, start)
            if inside > 0:
                runs.append(RopeRun(inside, spec))
            row += n_rows
        return tuple(runs)
