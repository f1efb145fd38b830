"""Reading one layer: its dense rows and its part of what its group shares, as attention sees them.

Where keys are un-rotated: :meth:`LayerView.plain_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xkv.cache.rows import LayerRows
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.attention import (
    attend_all,
    attend_latent,
    rebuild_all,
    rope_rows,
    wide_basis,
)
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.scores import Dense, is_past
from xkv.ops.sequences import MOST_TOGETHER, Latents
from xkv.ops.types import Array, Segment, Stored
from xkv.ops.working_set import attend_set
from xkv.store.store import Store

FUSED_QUERIES = 65
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

    def segment(self, dtype: Any, n_recent: int = 0) -> Segment:
        """The compressed rows, as the backend's operations take them.

        Args:
            dtype: Of the bases, and so of the arithmetic.
            n_recent: Last rows that are left out.

        Raises:
            InputError: If the group's values are not factored.
        """
        if self.keys is None or self.values is None:
            raise InputError("values that stay dense have no segment")
        keys, values = self._latents(n_recent)
        return Segment(
            self._stored("keys", self.keys, keys, 0, dtype),
            self._stored("values", self.values, values, 0, dtype),
        )

    def _latents(self, n_recent: int) -> tuple[Latent, Latent]:
        """The segment's of keys and values, without the last rows."""
        assert self.keys is not None and self.values is not None
        end = self.rows.n_segment - n_recent
        return self.keys.latent.rows(0, end), self.values.latent.rows(0, end)

    def _stored(self, name: str, store: Store, latent: Latent, start: int, dtype: Any) -> Stored:
        """Rows of the segment, from number ``start`` on."""
        basis = store.basis.layers[self.index].unpack(self.backend)
        basis = wide_basis(self.backend, basis, dtype)
        if name == "values":
            return Stored(latent, basis)
        position = self.rows.start + start
        runs = self.rows.runs_between(position, position + latent.shape[1])
        index_rows = None
        if store.basis.index_rows:
            index_rows = self.backend.xp.astype(store.basis.index_rows[self.index], dtype)
        return Stored(latent, basis, position, runs, index_rows)

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
        return self.backend.xp.concat([rows[..., :start, :], middle, rows[..., start:, :]], axis=-2)

    def _rebuild(self, name: str, store: Store, start: int, end: int) -> Array:
        """Rows ``start`` to ``end`` of the segment, ``[B, n_kv_heads, L, dim]``, keys rotated."""
        dtype = getattr(self.rows, name).rows.dtype
        latent = store.latent.rows(start, end)
        stored = self._stored(name, store, latent, start, self.backend.step_dtype(dtype))
        return self.backend.xp.astype(rebuild_all(self.backend, stored), dtype)

    def plain_rows(self, name: str, start: int, end: int) -> Array:
        """Dense rows of one layer, ``[B, L, n_kv_heads, dim]`` in float32 or wider, un-rotated.

        Args:
            name: "keys" or "values".
            start: Number of the first dense row.
            end: Number after the last one.
        """
        xp, layer = self.backend.xp, self.rows
        rows = getattr(layer, name).rows[..., start:end, :]
        # float32 before the inverse rotation: 16-bit keys would be rounded twice
        rows = xp.astype(rows, self.backend.accumulate_dtype(rows))
        if name == "keys":
            position = start + layer.n_segment
            runs = layer.runs_between(position, position + end - start)
            rows = rope_rows(self.backend, rows, position, runs, inverse=True)
        rows = self.backend.own(xp.permute_dims(rows, (0, 2, 1, 3)))
        self.backend.evaluate(rows)
        return rows

    def attend(
        self,
        queries: Array,
        scale: float,
        mask: Array | None,
        config: XKVConfig,
        sinks: Array | None = None,
        n_new: Array | None = None,
    ) -> Array:
        """Attention of the newest tokens over the whole layer.

        Args:
            queries: ``[B, n_heads, Lq, head_dim]``, rotated; the last Lq tokens of the cache.
            scale: Factor on the scores.
            mask: Boolean ``[..., Lq, offset]`` by position, or None for causal attention.
            config: Says how many rows a step rebuilds, where not all.
            sinks: ``[n_heads]``: scores of nothing, that take a part of each head's weights.
            n_new: Rows written behind those that are counted, an integer ``[1]`` on the device:
                then the whole buffers are read, so that every shape is the next step's too. For
                one query over a compressed layer.

        Returns:
            ``[B, n_heads, Lq, value_dim]``
        """
        backend, layer, xp = self.backend, self.rows, self.backend.xp
        n_queries = queries.shape[-2]
        is_long = n_queries >= FUSED_QUERIES
        if sinks is None and (is_long or not layer.is_compressed):
            keys, values = self.dense()
            if mask is None and n_queries > 1:
                mask = is_past(backend, layer.offset, n_queries)
            return backend.attention(queries, keys, values, scale, mask)
        wide = xp.astype(queries, backend.step_dtype(queries.dtype))
        n_rebuilt = self.n_rebuilt(config, n_queries) if mask is None and not is_long else None
        if n_rebuilt is not None:
            segment, dense = self.segment(wide.dtype, layer.n_recent), self._at_hand(n_new)
            dense = dense._replace(recent=layer.recent)
            output = attend_set(backend, wide, segment, dense, scale, n_rebuilt, sinks)
            return xp.astype(output, queries.dtype)
        segment, dense = self.segment(wide.dtype), self._at_hand(n_new)
        if mask is None and n_queries > 1:
            mask = is_past(backend, layer.offset, n_queries)
        if mask is not None:
            start, end = layer.start, layer.start + layer.n_segment
            parts = [mask[..., start:end], mask[..., :start], mask[..., end:]]
            mask = xp.concat(parts, axis=-1)
        output = attend_all(backend, wide, segment, dense, scale, mask, sinks)
        return xp.astype(output, queries.dtype)

    def n_rebuilt(self, config: XKVConfig, n_queries: int) -> int | None:
        """:meth:`XKVConfig.rebuilt_at` for a compressed layer."""
        return config.rebuilt_at(self.rows.n_segment, self.rows.n_recent, n_queries)

    def attend_latent(self, queries: Array, scale: float, bias: Array) -> Array:
        """:func:`xkv.ops.attention.attend_latent` over the keys of a compressed layer."""
        backend, layer, xp = self.backend, self.rows, self.backend.xp
        assert self.keys is not None
        wide = xp.astype(queries, backend.step_dtype(queries.dtype))
        latent = self.keys.latent.rows(0, layer.n_segment)
        stored = self._stored("keys", self.keys, latent, 0, wide.dtype)
        rows = layer.keys.rows
        beside = rows[..., : layer.start, :], rows[..., layer.start :, :]
        output = attend_latent(backend, wide, stored, beside, scale, bias)
        return xp.astype(output, queries.dtype)

    def _at_hand(self, n_new: Array | None) -> Dense:
        """All that is not in the segment."""
        keys, values = self.rows.keys, self.rows.values
        if n_new is None:
            return Dense(keys.rows, values.rows)
        return Dense(keys.allocated, values.allocated, n_new + keys.n_rows)

    def trimmed(self, n_tokens: int, has_dense_values: bool) -> LayerRows:
        """The rows without the last ``n_tokens``, of which there are as many.

        Rows cut off a segment are no longer used; the group's latent keeps them.
        """
        layer = self.rows
        from_tail = min(n_tokens, layer.n_tail)
        from_segment = min(n_tokens - from_tail, layer.n_segment)
        layer = layer.without_last(from_tail)
        if from_segment:
            recent = layer.recent and layer.recent.without_last(from_segment)
            layer = layer._replace(n_segment=layer.n_segment - from_segment, recent=recent)
        layer = layer.without_last(n_tokens - from_tail - from_segment)
        if has_dense_values:
            kept = layer.values.n_rows - from_segment
            layer = layer._replace(values=layer.values.first(kept))
        return layer._replace(rope_runs=layer.runs_between(0, layer.offset))


def alike(views: Sequence[LayerView], configs: Sequence[XKVConfig]) -> list[list[int]]:
    """Numbers of sequences that one call of :func:`attend_together` takes; others are alone.

    Args:
        views: The same layer of each sequence, whose newest token is to attend.
        configs: Each one's.
    """
    groups: list[tuple[Any, list[int]]] = []
    for number, (view, config) in enumerate(zip(views, configs, strict=True)):
        rows, keys, values = view.rows, view.keys, view.values
        n_rebuilt = view.n_rebuilt(config, 1) if rows.is_compressed else None
        are_plain = rows.batch == 1 and len(rows.rope_runs) == 1
        if n_rebuilt is None or keys is None or values is None or not are_plain:
            groups.append((None, [number]))
            continue
        # bases by where they are: the model's is one for all, a prompt's is its own
        bases, has_recent = (id(keys.basis), id(values.basis)), rows.recent is not None
        key = bases, n_rebuilt, rows.start, has_recent, rows.rope_runs[0].spec
        group = next((x for known, x in groups if known == key and len(x) < MOST_TOGETHER), None)
        if group is None:
            groups.append((key, [number]))
        else:
            group.append(number)
    return [numbers for _, numbers in groups]


def attend_together(
    views: Sequence[LayerView],
    queries: Array,
    scale: float,
    config: XKVConfig,
    sinks: Array | None = None,
) -> Array:
    """:meth:`LayerView.attend` of one token each of several sequences that are :func:`alike`.

    Args:
        views: One sequence's each.
        queries: ``[B, n_heads, 1, head_dim]``, a sequence's each.
    """
    first = views[0]
    backend = first.backend
    wide = backend.xp.astype(queries, backend.step_dtype(queries.dtype))
    longest = max(views, key=lambda view: view.rows.n_segment - view.rows.n_recent)
    segment = longest.segment(wide.dtype, longest.rows.n_recent)
    keys, values = zip(*(view._latents(view.rows.n_recent) for view in views), strict=True)
    segment = Segment(
        segment.keys._replace(latent=Latents(keys)), segment.values._replace(latent=Latents(values))
    )
    # whole buffers: a kernel has too few arguments for where the rows of so many views are
    dense = [
        Dense(x.keys.allocated, x.values.allocated, x.keys.n_rows, x.recent)
        for x in (view.rows for view in views)
    ]
    n_rebuilt = first.n_rebuilt(config, 1)
    assert n_rebuilt is not None
    output = attend_set(backend, wide, segment, dense, scale, n_rebuilt, sinks)
    return backend.xp.astype(output, queries.dtype)
