"""One layer of the low-rank cache: rows that grow, and attention over them and the segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xkv.attention import RopeRun, Segment, reconstruct
from xkv.errors import InputError
from xkv.ranks import buffer_rows, check_ranks

if TYPE_CHECKING:
    from xkv.backend import Array, Backend
    from xkv.lowrank_cache import GroupCache
    from xkv.rope import RopeSpec
    from xkv.selection import Landmarks

DECODE_TOKENS = 16
"""A call of at most this many tokens (one, or a draft to verify) means that the prompt is over."""

FUSED_QUERIES = 32
"""From this many queries on (a later prompt), one fused attention runs over rebuilt rows."""


class RowBuffer:
    """Dense rows ``[B, n_kv_heads, n_rows, dim]`` in a buffer that grows in place."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.allocated: Array | None = None
        """The whole buffer, unused rows included."""
        self.n_rows = 0

    def append(self, rows: Array) -> None:
        """Add rows at the end."""
        end = self.n_rows + rows.shape[-2]
        if self.allocated is None or end > self.allocated.shape[-2]:
            xp = self._backend.xp
            spare = (*rows.shape[:2], buffer_rows(end) - self.n_rows, rows.shape[-1])
            grown = xp.zeros(spare, dtype=rows.dtype, **self._backend.placement)
            kept = [] if self.allocated is None else [self.rows]
            self.allocated = xp.concat([*kept, grown], axis=-2)
        self.allocated[..., self.n_rows : end, :] = rows
        self.n_rows = end

    @property
    def rows(self) -> Array:
        """The rows in use."""
        if self.allocated is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self.allocated[..., : self.n_rows, :]

    def replace(self, start: int, end: int, by: Sequence[Array] = ()) -> None:
        """Put other rows in the place of those from ``start`` to ``end``, whose memory is freed."""
        parts = [self.rows[..., :start, :], *by, self.rows[..., end:, :]]
        kept = self._backend.xp.concat(parts, axis=-2)
        self.allocated, self.n_rows = None, 0
        self.append(kept)


class LayerCache:
    """One layer's part of a :class:`LowRankCache`.

    Before compression every row is dense. Afterwards the dense rows are the sinks, copies of the
    outlier chunks' rows in selective attention, then window and tail; in position, the group's
    segment lies between sinks and window.
    """

    def __init__(self, group: GroupCache) -> None:
        self.group = group
        self.keys = RowBuffer(group.backend)
        self.values = RowBuffer(group.backend)
        self.basis_k: Array | None = None
        self.basis_v: Array | None = None
        self.n_segment = 0
        """Rows of the group's segment that this layer still uses; trimming lowers it."""
        self.landmarks: Landmarks | None = None
        """Set where decode selects chunks."""
        self.n_outlier_rows = 0
        self.rope_runs: list[RopeRun] = []
        """How the rows from position 0 on were rotated."""

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.n_segment + self.keys.n_rows - self.n_outlier_rows

    @property
    def is_compressed(self) -> bool:
        """Whether some of the rows are in the group's segment."""
        return self.n_segment > 0

    def append(self, keys: Array, values: Array, rope: RopeSpec | None) -> None:
        """Take new tokens; the first few after a prompt (``DECODE_TOKENS``) compress the group.

        Args:
            keys: ``[B, n_kv_heads, L, head_dim]``, rotated.
            values: ``[B, n_kv_heads, L, value_dim]``.
            rope: What rotated the keys, None for no rotary embedding.
        """
        n_tokens = keys.shape[-2]
        is_first = self.keys.allocated is None
        if n_tokens <= DECODE_TOKENS:
            self.group.settle()
        else:
            self.group.is_settled = False
        self.keys.append(keys)
        self.values.append(values)
        if is_first:
            check_ranks(self.group.cache.shape(self), self.group.cache.config)
        if self.rope_runs and self.rope_runs[-1].spec == rope:
            n_tokens += self.rope_runs.pop().n_rows
        self.rope_runs.append(RopeRun(n_tokens, rope))

    def segment(self) -> Segment:
        """The compressed rows, as the backend's operations take them."""
        group, n_rows = self.group, self.n_segment
        latent_k, latent_v = group.latent_k, group.latent_v
        assert latent_k is not None and latent_v is not None
        if n_rows < latent_k.shape[1]:
            latent_k, latent_v = latent_k[:, :n_rows], latent_v[:, :n_rows]
        return Segment(
            latent_k,
            latent_v,
            self.basis_k,
            self.basis_v,
            group.start,
            self.runs_between(group.start, group.start + n_rows),
        )

    def runs_between(self, start: int, end: int) -> tuple[RopeRun, ...]:
        """How the rows from position ``start`` to ``end`` were rotated."""
        runs, row = [], 0
        for n_rows, spec in self.rope_runs:
            inside = min(row + n_rows, end) - max(row, start)
            if inside > 0:
                runs.append(RopeRun(inside, spec))
            row += n_rows
        return tuple(runs)

    def trim(self, n_tokens: int) -> int:
        """Forget the last ``n_tokens`` tokens.

        Returns:
            How many were forgotten: all there are if there are fewer. Rows cut off a segment are no
            longer used, but its latent keeps its size.
        """
        n_tokens = min(n_tokens, self.offset)
        n_sinks = self.group.start if self.is_compressed else 0
        from_tail = min(n_tokens, self.keys.n_rows - self.n_outlier_rows - n_sinks)
        from_segment = min(n_tokens - from_tail, self.n_segment)
        if from_segment:
            self._stop_selecting()
        self.n_segment -= from_segment
        for buffer in (self.keys, self.values):
            buffer.n_rows -= n_tokens - from_segment
        self.rope_runs = list(self.runs_between(0, self.offset))
        return n_tokens

    def dense(self) -> tuple[Array, Array]:
        """All keys and values, ``[B, n_kv_heads, offset, dim]``, rebuilt for this call only."""
        keys, values = self.exact_rows()
        if not self.is_compressed:
            return keys, values
        start, segment = self.group.start, self.segment()

        def join(rows: Array, middle: Array) -> Array:
            parts = [rows[..., :start, :], middle, rows[..., start:, :]]
            return self.group.backend.xp.concat(parts, axis=-2)

        return (
            join(keys, self.group.backend.reconstruct_keys(segment)),
            join(values, reconstruct(self.group.backend, segment.latent_v, segment.basis_v)),
        )

    def exact_rows(self) -> tuple[Array, Array]:
        """Dense keys and values that stand for no row of the segment."""
        keys, values = self.keys.rows, self.values.rows
        if not self.n_outlier_rows:
            return keys, values
        start, end = self.group.start, self.group.start + self.n_outlier_rows

        def leave_out(rows: Array) -> Array:
            return self.group.backend.xp.concat([rows[..., :start, :], rows[..., end:, :]], axis=-2)

        return leave_out(keys), leave_out(values)

    def _stop_selecting(self) -> None:
        """Attend to the whole segment from now on: its landmarks no longer fit a trimmed one."""
        if self.landmarks is not None:
            start, end = self.group.start, self.group.start + self.n_outlier_rows
            for buffer in (self.keys, self.values):
                buffer.replace(start, end)
            self.landmarks, self.n_outlier_rows = None, 0

    def attend(self, queries: Array, scale: float, mask: Array | None) -> Array:
        """Attention of the newest tokens over the whole cache.

        Args:
            queries: ``[B, n_heads, Lq, head_dim]``, rotated; the last Lq tokens of the cache.
            scale: Factor on the scores.
            mask: Boolean ``[..., Lq, offset]`` by position, or None to attend to everything.

        Returns:
            ``[B, n_heads, Lq, value_dim]``.
        """
        group = self.group
        if not self.is_compressed or queries.shape[-2] >= FUSED_QUERIES:
            keys, values = self.dense()
            return group.backend.attention(queries, keys, values, scale, mask)
        if self.landmarks is not None and queries.shape[-2] == 1 and mask is None:
            budget, chunk_size = group.cache.config.budget, self.landmarks.chunk_size
            chunks = group.backend.select_chunks(queries, self.landmarks, budget, scale)
            return group.backend.selected_attention(
                queries,
                self.segment(),
                chunks,
                chunk_size,
                self.keys.rows,
                self.values.rows,
                scale,
            )
        if mask is not None:
            start, end = group.start, group.start + self.n_segment
            parts = [mask[..., start:end], mask[..., :start], mask[..., end:]]
            mask = group.backend.xp.concat(parts, axis=-1)
        keys, values = self.exact_rows()
        return group.backend.lowrank_attention(queries, self.segment(), keys, values, scale, mask)

    def arrays(self) -> list[Array]:
        """The arrays this layer holds, without the latents that its group shares."""
        held = [self.keys.allocated, self.values.allocated, self.basis_k, self.basis_v]
        held += self.landmarks.held if self.landmarks is not None else ()
        return [x for x in held if x is not None]

    @property
    def selection_bytes(self) -> int:
        """The part of the bytes held that selective attention needs: landmarks and outlier rows."""
        if self.landmarks is None:
            return 0
        outliers = self.n_outlier_rows * self.group.cache.shape(self).row_bytes
        return outliers + sum(x.nbytes for x in self.landmarks.held)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens in the full cache."""
        return self.offset and self.offset * self.group.cache.shape(self).row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held; the group's latents count in its first layer."""
        shared = self.group.arrays() if self is self.group.layers[0] else []
        return sum(x.nbytes for x in (*self.arrays(), *shared))
