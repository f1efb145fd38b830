"""Scores of queries over dense rows, and what keeps some rows from taking part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from xkv.ops.protocol import Operations
from xkv.ops.recent import Recent
from xkv.ops.types import Array


class Dense(NamedTuple):
    """A layer's rows that are not only in the store."""

    keys: Array
    """``[B, n_kv_heads, D, head_dim]``, rotated."""
    values: Array
    """``[B, n_kv_heads, D, value_dim]``"""
    n_used: Array | int | None = None
    """How many of them are in use, a number or an integer ``[1]`` on the device; None for all."""
    recent: Recent | None = None
    """Others in 8 bits, which come before them."""

    @property
    def n_rows(self) -> int:
        """Those in use, as far as the host knows."""
        return self.n_used if isinstance(self.n_used, int) else self.keys.shape[-2]


def grouped_scores(backend: Operations, queries: Array, key_parts: Sequence[Array]) -> Array:
    """Scores of scaled queries over several arrays of keys, side by side.

    Query heads that share a KV head are rows of one product: ``[B, n_kv_heads, n_heads //
    n_kv_heads * Lq, rows]``, in float32 or wider.
    """
    xp = backend.xp
    shape = queries.shape[0], key_parts[0].shape[1], -1, queries.shape[-1]
    grouped = xp.reshape(queries, shape)
    parts = [grouped @ xp.matrix_transpose(xp.astype(x, queries.dtype)) for x in key_parts]
    scores = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
    return xp.astype(scores, backend.accumulate_dtype(queries))


def is_past(backend: Operations, n_rows: int, n_queries: int) -> Array:
    """Boolean ``[Lq, rows]``: the last rows are the queries', and see those up to their own."""
    rows = backend.positions(n_rows - n_queries, n_queries)
    return rows[:, None] >= backend.positions(0, n_rows)


def masked(backend: Operations, queries: Array, scores: Array, mask: Array | None) -> Array:
    """:func:`grouped_scores` with no weight where a mask ``[..., Lq, rows]`` is False."""
    if mask is None:
        return scores
    xp = backend.xp
    per_head = xp.reshape(scores, (*queries.shape[:3], scores.shape[-1]))
    per_head = xp.where(mask, per_head, xp.finfo(scores.dtype).min)
    return xp.reshape(per_head, scores.shape)


def without_unused(backend: Operations, scores: Array, dense: Dense) -> Array:
    """Scores whose last columns are dense rows, with no weight on unused ones."""
    if dense.n_used is None:
        return scores
    xp, n_others = backend.xp, scores.shape[-1] - dense.keys.shape[-2]
    rows = xp.arange(scores.shape[-1], **backend.placement) - n_others
    return xp.where(rows < dense.n_used, scores, xp.finfo(scores.dtype).min)


def sink_scores(backend: Operations, sinks: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Scores ``[n_heads]`` of nothing, beside :func:`grouped_scores` of ``shape[:3]``."""
    xp = backend.xp
    n_queries = shape[1] * shape[2] // sinks.shape[0]
    each = xp.reshape(xp.astype(sinks, dtype), (shape[1], -1, 1))
    each = xp.broadcast_to(each, (*each.shape[:2], n_queries))
    return xp.broadcast_to(xp.reshape(each, (1, *shape[1:3])), shape[:3])
