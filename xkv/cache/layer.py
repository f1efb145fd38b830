"""Reading one layer: its dense rows and its part of what its group shares, as attention sees them.

Where keys are un-rotated: :meth:`LayerView.plain_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xkv.cache.rows import LayerRows
from xkv.errors import InputError
from xkv.ops.attention import reconstruct, rope_rows
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.selection import first_landmarks, joined_landmarks, make_landmarks
from xkv.ops.types import Array, Segment
from xkv.store.store import Store

FUSED_QUERIES = 32
"""From this many queries on (a later prompt), one fused attention runs over rebuilt rows."""


@dataclass(frozen=True)
class LayerView:
    """One layer at one moment."""

    backend: Backend
    rows: LayerRows
    keys: Store | None
    """What the group shares of keys; None before it is compressed."""
    values: Store | None
    """None where values are not factored, too."""
    index: int
    """Number of the layer in its group."""

    def _of(self, name: str) -> Store | None:
        return self.keys if name == "keys" else self.values

    def segment(self) -> Segment:
        """The compressed rows, as the backend's operations take them.

        Raises:
            InputError: If the group's values are not factored.
        """
        rows = self.rows
        if self.keys is None or self.values is None:
            raise InputError("values that stay dense have no segment")
        latents = (x.latent.rows(0, rows.n_segment) for x in (self.keys, self.values))
        bases = (self._basis(x) for x in (self.keys, self.values))
        latent_k, latent_v, basis_k, basis_v = (
            x if x.array is None else x.array for x in (*latents, *bases)
        )
        runs = rows.runs_between(rows.start, rows.start + rows.n_segment)
        return Segment(latent_k, latent_v, basis_k, basis_v, rows.start, runs)

    def _basis(self, store: Store) -> Packed:
        """The layer's part of a basis, once for each sequence."""
        basis, batch = store.basis.layers[self.index], self.rows.batch
        if basis.shape[0] == batch:
            return basis
        xp = self.backend.xp
        return basis.map(lambda x: xp.broadcast_to(x, (batch, *x.shape[1:])))

    def dense(self) -> tuple[Array, Array]:
        """All keys and values, ``[B, n_kv_heads, offset, dim]``, rebuilt for this call only."""
        return self._dense("keys"), self._dense("values")

    def _dense(self, name: str) -> Array:
        layer, store = self.rows, self._of(name)
        rows = getattr(layer, name).rows
        if not layer.is_compressed or store is None:
            return rows
        start = layer.start
        middle = self._rebuild(name, store, 0, layer.n_segment)
        rows = self._without_outliers(rows)
        return self.backend.xp.concat([rows[..., :start, :], middle, rows[..., start:, :]], axis=-2)

    def _rebuild(self, name: str, store: Store, start: int, end: int) -> Array:
        """Rows ``start`` to ``end`` of the segment, ``[B, n_kv_heads, L, dim]``, keys rotated."""
        rows = reconstruct(self.backend, store.latent.rows(start, end), self._basis(store))
        if name == "values" or start == end:
            return rows
        position = self.rows.start + start
        runs = self.rows.runs_between(position, position + end - start)
        return rope_rows(self.backend, rows, position, runs)

    def _without_outliers(self, rows: Array) -> Array:
        start, n_outlier_rows = self.rows.start, self.rows.n_outlier_rows
        if not n_outlier_rows:
            return rows
        parts = [rows[..., :start, :], rows[..., start + n_outlier_rows :, :]]
        return self.backend.xp.concat(parts, axis=-2)

    def plain_rows(self, name: str, start: int, end: int) -> Array:
        """Dense rows in float32, keys un-rotated: ``[B, L, n_kv_heads, dim]``.

        Args:
            name: "keys" or "values".
            start: Number of the first one among the dense rows, behind outliers if compressed.
            end: Number after the last one.
        """
        xp, layer = self.backend.xp, self.rows
        rows = getattr(layer, name).rows[..., start:end, :]
        # float32 before the inverse rotation: 16-bit keys would be rounded twice
        rows = xp.astype(rows, self.backend.accumulate_dtype(rows))
        if name == "keys":
            position = start - layer.n_outlier_rows + layer.n_segment
            runs = layer.runs_between(position, position + end - start)
            rows = rope_rows(self.backend, rows, position, runs, inverse=True)
        rows = self.backend.own(xp.permute_dims(rows, (0, 2, 1, 3)))
        self.backend.evaluate(rows)
        return rows

    def _rows_to_attend(self, name: str, with_outliers: bool, with_unused: bool = False) -> Array:
        """Dense rows: all that is not in the segment."""
        buffer = getattr(self.rows, name)
        rows = buffer.allocated if with_unused else buffer.rows
        return rows if with_outliers else self._without_outliers(rows)

    def attend(self, queries: Array, scale: float, mask: Array | None, budget: int) -> Array:
        """Attention of the newest tokens over the whole layer.

        Args:
            queries: ``[B, n_heads, Lq, head_dim]``, rotated; the last Lq tokens of the cache.
            scale: Factor on the scores.
            mask: Boolean ``[..., Lq, offset]`` by position, or None to attend to everything.
            budget: Tokens that a step selects, where it does.

        Returns:
            ``[B, n_heads, Lq, value_dim]``.
        """
        backend, layer = self.backend, self.rows
        if not layer.is_compressed or queries.shape[-2] >= FUSED_QUERIES:
            keys, values = self.dense()
            return backend.attention(queries, keys, values, scale, mask)
        if queries.shape[-2] == 1 and mask is None:
            return self.attend_step(queries, scale, budget)
        if mask is not None:
            start, end = layer.start, layer.start + layer.n_segment
            parts = [mask[..., start:end], mask[..., :start], mask[..., end:]]
            mask = backend.xp.concat(parts, axis=-1)
        keys, values = (self._rows_to_attend(name, False) for name in ("keys", "values"))
        return backend.lowrank_attention(queries, self.segment(), keys, values, scale, mask)

    def attend_step(
        self, queries: Array, scale: float, budget: int, n_new: Array | None = None
    ) -> Array:
        """Attention of one token over a compressed layer.

        Args:
            queries: ``[B, n_heads, 1, head_dim]``, rotated.
            scale: Factor on the scores.
            budget: Tokens that the step selects, where it does.
            n_new: Rows written behind those that are counted, an integer ``[1]`` on the device:
                then the whole buffers are read, so that every shape is the next step's too.

        Returns:
            ``[B, n_heads, 1, value_dim]``.
        """
        backend, layer = self.backend, self.rows
        landmarks, segment = layer.landmarks, self.segment()
        selects = landmarks is not None
        keys, values = (
            self._rows_to_attend(name, selects, n_new is not None) for name in ("keys", "values")
        )
        if n_new is not None:
            n_counted = layer.keys.n_rows - layer.n_outlier_rows * (not selects)
            segment = segment._replace(n_dense=n_new + n_counted)
        if landmarks is None:
            return backend.lowrank_attention(queries, segment, keys, values, scale)
        chunks = backend.select_chunks(queries, landmarks, budget, scale)
        return backend.selected_attention(
            queries, segment, chunks, landmarks.chunk_size, keys, values, scale
        )

    def trimmed(self, n_tokens: int, has_dense_values: bool) -> LayerRows:
        """The rows without the last ``n_tokens``, of which there are as many.

        Rows cut off a segment are no longer used; the group's latent keeps them. A chunk that is
        cut becomes dense, and outliers ordinary.
        """
        layer = self.rows
        from_tail = min(n_tokens, layer.n_tail)
        from_segment = min(n_tokens - from_tail, layer.n_segment)
        layer = layer.without_last(from_tail)
        if from_segment:
            layer = layer._replace(n_segment=layer.n_segment - from_segment)
            layer = replace(self, rows=layer)._with_whole_chunks()
        layer = layer.without_last(n_tokens - from_tail - from_segment)
        if has_dense_values:
            kept = layer.values.n_rows - from_segment
            layer = layer._replace(values=layer.values.first(kept))
        return layer._replace(rope_runs=layer.runs_between(0, layer.offset))

    def _with_whole_chunks(self) -> LayerRows:
        """The rows with landmarks that fit a segment which was just cut."""
        layer, landmarks = self.rows, self.rows.landmarks
        if landmarks is None:
            return layer
        n_chunks, n_left = divmod(layer.n_segment, landmarks.chunk_size)
        first, start = n_chunks * landmarks.chunk_size, layer.start
        buffers = {}
        for name in ("keys", "values"):
            store = self._of(name)
            assert store is not None
            rows = self._rebuild(name, store, first, first + n_left)
            buffers[name] = getattr(layer, name).replaced(
                self.backend, start, start + layer.n_outlier_rows, [rows]
            )
        kept = first_landmarks(self.backend, landmarks, n_chunks) if n_chunks else None
        return layer._replace(n_segment=first, n_outlier_rows=0, landmarks=kept, **buffers)

    def extended_landmarks(self, n_rows: int, chunk_size: int, bits: int) -> LayerRows:
        """The rows with landmarks of the first ``n_rows`` after the sinks, stored or not yet.

        Those without exact keys are summarized from rebuilt ones.
        """
        layer, n_done, keys = self.rows, 0, []
        if layer.landmarks is not None:
            n_done = layer.landmarks.n_chunks * layer.landmarks.chunk_size
        if n_done < layer.n_segment:
            assert self.keys is not None
            keys.append(self._rebuild("keys", self.keys, n_done, layer.n_segment))
        first = layer.n_sinks + layer.n_outlier_rows
        keys.append(layer.keys.rows[..., first : first + n_rows - layer.n_segment, :])
        joined = keys[0] if len(keys) == 1 else self.backend.xp.concat(keys, axis=-2)
        added, _ = make_landmarks(self.backend, joined, chunk_size, 0, bits)
        if layer.landmarks is not None:
            added = joined_landmarks(self.backend, layer.landmarks, added)
        self.backend.evaluate(*added.held)
        return layer._replace(landmarks=added)
