"""One layer of the low-rank cache: rows that grow, and attention over them and the segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xkv.attention import RopeRun, Segment, reconstruct, rope_rows
from xkv.errors import InputError
from xkv.row_buffer import RowBuffer
from xkv.selection import make_landmarks
from xkv.weighting import head_energy

if TYPE_CHECKING:
    from xkv.backend import Array
    from xkv.codec import Packed
    from xkv.group_cache import GroupCache
    from xkv.rope import RopeSpec
    from xkv.selection import Landmarks

DECODE_TOKENS = 16
"""A call of at most this many tokens (one, or a draft to verify) means that the prompt is over."""

FUSED_QUERIES = 32
"""From this many queries on (a later prompt), one fused attention runs over rebuilt rows."""


class LayerCache:
    """One layer's part of a :class:`LowRankCache`.

    Before compression every row is dense. Afterwards the dense rows are the sinks, copies of the
    outlier chunks' rows in selective attention, then window and tail; in position, the group's
    segment lies between sinks and window.
    """

    def __init__(self, group: GroupCache, index: int) -> None:
        self.group = group
        self.index = index
        """Number of the layer in its group."""
        self.keys = RowBuffer(group)
        self.values = RowBuffer(group)
        self.n_segment = 0
        """Rows of the group's segment that this layer still uses; trimming lowers it."""
        self.n_recent = 0
        """Rows after the segment that were folded in later, those that this layer still uses."""
        self.landmarks: Landmarks | None = None
        """Set where decode selects chunks."""
        self.n_outlier_rows = 0
        self.rope_runs: list[RopeRun] = []
        """How the rows from position 0 on were rotated."""
        self.query_energy: Array | None = None
        """Squares of the prompt's queries, ``[n_kv_heads, head_dim]``, where they are watched."""
        self.output_energy: Array | None = None
        """The same of the output projection's weights, ``[n_kv_heads, value_dim]``."""

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.n_segment + self.n_recent + self.keys.n_rows - self.n_outlier_rows

    @property
    def is_compressed(self) -> bool:
        """Whether some of the rows are in the group's segment."""
        return self.n_segment > 0

    @property
    def n_sinks(self) -> int:
        """Dense rows before the segment."""
        return self.group.start if self.is_compressed else 0

    @property
    def n_tail(self) -> int:
        """Dense rows after the compressed ones: window and tail."""
        return self.keys.n_rows - self.n_outlier_rows - self.n_sinks

    def append(self, keys: Array, values: Array, rope: RopeSpec | None) -> None:
        """Take new tokens; the first few after a prompt (``DECODE_TOKENS``) compress the group.

        Args:
            keys: ``[B, n_kv_heads, L, head_dim]``, rotated.
            values: ``[B, n_kv_heads, L, value_dim]``.
            rope: What rotated the keys, None for no rotary embedding.

        Raises:
            InputError: If the rows are not like those that the cache holds, or a rank is too large.
        """
        n_tokens = keys.shape[-2]
        cache = self.group.cache
        if self is self.group.layers[0] and (n_tokens <= DECODE_TOKENS or cache.is_streaming):
            self.group.settle()
        is_first = self.keys.allocated is None
        self.keys.append(keys)
        self.values.append(values)
        if is_first:
            cache.observe(self)
        self._note_rotation(n_tokens, rope)

    def count_step(self, rope: RopeSpec | None) -> None:
        """Count one row that a step of constant shapes wrote behind the others."""
        self.keys.n_rows += 1
        self.values.n_rows += 1
        self._note_rotation(1, rope)

    def _note_rotation(self, n_rows: int, rope: RopeSpec | None) -> None:
        if self.rope_runs and self.rope_runs[-1].spec == rope:
            n_rows += self.rope_runs.pop().n_rows
        self.rope_runs.append(RopeRun(n_rows, rope))

    @property
    def is_watching(self) -> bool:
        """Whether the queries of a prompt take part in its factorization."""
        return self.group.cache.config.weighting == "attention" and not self.is_compressed

    def watch(self, queries: Array) -> None:
        """Take note of rotated queries ``[B, n_heads, L, head_dim]`` over this layer."""
        if not self.is_watching:
            return
        backend = self.group.backend
        energy = head_energy(backend, queries, self.keys.rows.shape[1])
        self.query_energy = energy if self.query_energy is None else self.query_energy + energy
        backend.evaluate(self.query_energy)

    def reserve(self, n_tokens: int) -> None:
        """Make room for ``n_tokens`` more, so that a long prompt does not grow in steps."""
        for buffer in (self.keys, self.values):
            buffer.reserved = buffer.n_rows + n_tokens

    def segment(self) -> Segment:
        """The compressed rows, as the backend's operations take them.

        Raises:
            InputError: If the group's values are not factored.
        """
        group, n_rows = self.group, self.n_segment
        if group.keys is None or group.values is None:
            raise InputError("values that stay dense have no segment")
        latents = (x.latent.rows(0, n_rows) for x in (group.keys, group.values))
        bases = (x.basis(self.index) for x in (group.keys, group.values))
        latent_k, latent_v, basis_k, basis_v = (
            x if x.array is None else x.array for x in (*latents, *bases)
        )
        runs = self.runs_between(group.start, group.start + n_rows)
        return Segment(latent_k, latent_v, basis_k, basis_v, group.start, runs)

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
            longer used; its latent keeps its size until less than half is left.
        """
        n_tokens = min(n_tokens, self.offset)
        from_tail = min(n_tokens, self.n_tail)
        from_recent = min(n_tokens - from_tail, self.n_recent)
        from_segment = min(n_tokens - from_tail - from_recent, self.n_segment)
        self._drop_dense(from_tail)
        self.n_recent -= from_recent
        if from_segment:
            self.n_segment -= from_segment
            self._trim_landmarks()
        self._drop_dense(n_tokens - from_tail - from_recent - from_segment)
        if self.group.has_dense_values:
            self.values.n_rows -= from_recent + from_segment
        self.rope_runs = list(self.runs_between(0, self.offset))
        return n_tokens

    def _drop_dense(self, n_rows: int) -> None:
        self.keys.n_rows -= n_rows
        self.values.n_rows -= n_rows

    def _trim_landmarks(self) -> None:
        """Fit the landmarks to a trimmed segment: outliers become ordinary, a cut chunk dense."""
        if self.landmarks is None:
            return
        chunk_size, start = self.landmarks.chunk_size, self.group.start
        n_chunks, n_left = divmod(self.n_segment, chunk_size)
        first = n_chunks * chunk_size
        for name in ("keys", "values"):
            factors = getattr(self.group, name)
            left = factors.latent.rows(first, first + n_left)
            rows = self._rebuild(name, left, factors.basis(self.index), start + first)
            getattr(self, name).replace(start, start + self.n_outlier_rows, [rows])
        self.n_segment, self.n_outlier_rows = first, 0
        self.landmarks = self.landmarks.first(self.group.backend, n_chunks) if n_chunks else None

    def extend_landmarks(self, n_rows: int) -> None:
        """Summarize the segment and recent rows up to ``n_rows``, those without exact keys too."""
        group = self.group
        config, n_done = group.cache.config, 0
        if self.landmarks is not None:
            n_done = self.landmarks.n_chunks * self.landmarks.chunk_size
        keys = self._dense("keys")[..., group.start + n_done : group.start + n_rows, :]
        added, _ = make_landmarks(group.backend, keys, config.chunk_size, 0, config.landmark_bits)
        if self.landmarks is not None:
            added = self.landmarks.followed_by(group.backend, added)
        group.backend.evaluate(*added.held)
        self.landmarks = added

    def dense(self) -> tuple[Array, Array]:
        """All keys and values, ``[B, n_kv_heads, offset, dim]``, rebuilt for this call only."""
        return self._dense("keys"), self._dense("values")

    def _dense(self, name: str) -> Array:
        rows, factors = getattr(self, name).rows, getattr(self.group, name)
        if not self.is_compressed or factors is None:
            return rows
        start = self.group.start
        latent = factors.latent.rows(0, self.n_segment)
        middle = self._rebuild(name, latent, factors.basis(self.index), start)
        rows, end = self._without_outliers(rows), start + self.n_segment
        parts = [rows[..., :start, :], middle, *self._recent(name, end), rows[..., start:, :]]
        return self.group.backend.xp.concat(parts, axis=-2)

    def _rebuild(self, name: str, latent: Packed, basis: Packed, position: int) -> Array:
        """Rows ``[B, n_kv_heads, L, dim]`` out of a latent ``[B, L, r]``, keys rotated."""
        rows = reconstruct(self.group.backend, latent, basis)
        if name == "values" or not latent.shape[1]:
            return rows
        runs = self.runs_between(position, position + latent.shape[1])
        return rope_rows(self.group.backend, rows, position, runs)

    def _recent(self, name: str, position: int) -> list[Array]:
        """The recent rows, rebuilt, if there are any."""
        if not self.n_recent:
            return []
        factors = getattr(self.group, name)
        latent = factors.recent.rows(0, self.n_recent)
        return [self._rebuild(name, latent, factors.bases[self.index], position)]

    def _without_outliers(self, rows: Array) -> Array:
        if not self.n_outlier_rows:
            return rows
        start, end = self.group.start, self.group.start + self.n_outlier_rows
        parts = [rows[..., :start, :], rows[..., end:, :]]
        return self.group.backend.xp.concat(parts, axis=-2)

    def _rows_to_attend(self, name: str, with_outliers: bool, with_unused: bool = False) -> Array:
        """Dense rows and recent ones, which are rebuilt: all that is not in the segment."""
        buffer = getattr(self, name)
        rows = buffer.allocated if with_unused else buffer.rows
        start = self.group.start + self.n_outlier_rows * with_outliers
        if not with_outliers:
            rows = self._without_outliers(rows)
        recent = self._recent(name, self.group.start + self.n_segment)
        if not recent:
            return rows
        return self.group.backend.xp.concat(
            [rows[..., :start, :], *recent, rows[..., start:, :]], axis=-2
        )

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
        if queries.shape[-2] == 1 and mask is None:
            return self.attend_step(queries, scale)
        if mask is not None:
            start, end = group.start, group.start + self.n_segment
            parts = [mask[..., start:end], mask[..., :start], mask[..., end:]]
            mask = group.backend.xp.concat(parts, axis=-1)
        keys, values = (self._rows_to_attend(name, False) for name in ("keys", "values"))
        return group.backend.lowrank_attention(queries, self.segment(), keys, values, scale, mask)

    def attend_step(self, queries: Array, scale: float, n_new: Array | None = None) -> Array:
        """Attention of one token over a compressed cache.

        Args:
            queries: ``[B, n_heads, 1, head_dim]``, rotated.
            scale: Factor on the scores.
            n_new: Rows written behind those that are counted, an integer ``[1]`` on the device:
                then the whole buffers are read, so that every shape is the next step's too.

        Returns:
            ``[B, n_heads, 1, value_dim]``.
        """
        group, landmarks, segment = self.group, self.landmarks, self.segment()
        selects = landmarks is not None
        keys, values = (
            self._rows_to_attend(name, selects, n_new is not None) for name in ("keys", "values")
        )
        if n_new is not None:
            n_counted = self.n_recent + self.keys.n_rows - self.n_outlier_rows * (not selects)
            segment = segment._replace(n_dense=n_new + n_counted)
        if landmarks is None:
            return group.backend.lowrank_attention(queries, segment, keys, values, scale)
        budget = group.cache.config.budget
        chunks = group.backend.select_chunks(queries, landmarks, budget, scale)
        return group.backend.selected_attention(
            queries, segment, chunks, landmarks.chunk_size, keys, values, scale
        )

    def arrays(self) -> list[Array]:
        """The arrays this layer holds, without the latents that its group shares."""
        held = [self.keys.allocated, self.values.allocated]
        for factors in (self.group.keys, self.group.values):
            held += factors.bases[self.index].arrays if factors else []
        held += self.landmarks.held if self.landmarks is not None else ()
        return [x for x in held if x is not None]

    @property
    def selection_bytes(self) -> int:
        """The part of the bytes held that selective attention needs: landmarks and outlier rows."""
        if self.landmarks is None:
            return 0
        outliers = self.n_outlier_rows * self._row_bytes
        return outliers + sum(x.nbytes for x in self.landmarks.held)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens in the full cache."""
        return self.offset and self.offset * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        """Dense bytes of one token."""
        rows = (self.keys.rows, self.values.rows)
        return sum(x.shape[1] * x.shape[-1] * x.itemsize for x in rows)

    @property
    def nbytes(self) -> int:
        """Bytes held; the group's latents count in its first layer."""
        shared = self.group.arrays() if self is self.group.layers[0] else []
        return sum(x.nbytes for x in (*self.arrays(), *shared))
