"""A decode step over the rows of a segment that matter most: some kept, others rebuilt in it."""

from __future__ import annotations

import math
from typing import NamedTuple

from xkv.ops.attention import raised_weights, take_rows
from xkv.ops.index import absorbed_queries
from xkv.ops.latent import Latent
from xkv.ops.protocol import Operations
from xkv.ops.scores import Dense, grouped_scores, is_past, masked, sink_scores, without_unused
from xkv.ops.slots import Slots
from xkv.ops.types import Array, Segment, Stored

SWAP_STEPS = 4
"""In one of so many steps a layer swaps: neighbouring ones in different steps, which so cost alike.
"""

MAX_SWAPS = 32
"""Kept rows, the worst, that a step replaces by the best of the others; a quarter of few.

The worst may have been better. It is then among the next step's best, and costs what they do.
"""


def n_swaps(n_kept: int, n_rebuilt: int) -> int:
    """Kept rows that a step replaces."""
    return min(MAX_SWAPS, n_kept // 4, n_rebuilt)


class Choice(NamedTuple):
    """What a step rebuilds, and what of it enters the working set: arrays of their own."""

    rows: Array
    """Row numbers of the segment, ``[B, n_kv_heads, n_rebuilt]``, those that enter first."""
    entering: Array | None = None
    """``[B, n_kv_heads, n_swapped]``; None where no row enters, as are the slots."""
    slots: Array | None = None
    """Which they enter, as many."""


def attend_set(
    backend: Operations,
    queries: Array,
    segment: Segment,
    dense: Dense,
    scale: float,
    n_rebuilt: int,
    sinks: Array | None = None,
    is_swapping: bool = True,
) -> tuple[Array, Slots | None]:
    """Attend to the rows of a segment that matter most, some of which are kept, and to dense rows.

    The index scores every row; the best that are not kept are rebuilt, and gone after the step but
    for the very best, which may take the place of the worst that are kept.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated, few; they all attend to the same rows of
            the segment. The last Lq dense rows are theirs.
        segment: The layer's compressed rows, more than ``n_rebuilt`` and those kept.
        dense: The others, and the working set's slots, which are not needed again.
        scale: Factor on the scores.
        n_rebuilt: Rows to rebuild for each KV head.
        sinks: ``[n_heads]``: scores of nothing, that take a part of each head's weights.
        is_swapping: The best of the rebuilt rows enter the slots.

    Returns:
        ``[B, n_heads, Lq, value_dim]``, and the slots after the step.
    """
    xp, n_kv_heads = backend.xp, dense.keys.shape[1]
    queries = queries * scale
    # how much a head gives to rows that need no rebuilding: by less than that, others do not matter
    beside, totals = backend.attend_dense(queries, dense, sinks)
    absorbed = absorbed_queries(backend, queries, segment.keys)
    offsets = xp.reshape(totals, (queries.shape[0], -1))
    worth = backend.index_scores(absorbed, segment.keys.latent, offsets, n_kv_heads)
    slots = dense.slots
    kept_rows = None if slots is None else slots.rows
    n_kept = 0 if kept_rows is None else kept_rows.shape[-1]
    n_swapped = n_swaps(n_kept, n_rebuilt) if is_swapping else 0
    chosen = backend.choose_rows(worth, kept_rows, n_rebuilt, n_swapped)
    keys, scores = backend.rebuild_keys(segment.keys, chosen.rows, queries)
    sums, rest = backend.weigh_rows(segment.values.latent, chosen.rows, scores, totals, beside)
    basis = xp.permute_dims(segment.values.basis, (0, 2, 1, 3))
    output = backend.add_product(rest, sums, basis)
    output = xp.reshape(output, (*queries.shape[:3], output.shape[-1]))
    if slots is not None and chosen.entering is not None:
        values = backend.rebuild_rows(segment.values, chosen.entering)
        packed = backend.pack_rows(keys[..., :n_swapped, :], values)
        slots = slots.swapped(backend, chosen.slots, Slots(*packed, chosen.entering))
    return output, slots


def attend_dense(
    backend: Operations, queries: Array, dense: Dense, sinks: Array | None
) -> tuple[Array, Array]:
    """Attention over dense rows and slots, and what a query gives to all of them together.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled; the last Lq rows are theirs.
        dense: All are in use where there are several queries.
        sinks: As in :func:`attend_set`.

    Returns:
        ``[B, n_heads, Lq, value_dim]`` in the queries' dtype, and the logarithms of the sums of
        exponentials of their scores, sinks among them, ``[B, n_heads, Lq]`` in float32 or wider.
    """
    xp, n_queries = backend.xp, queries.shape[2]
    parts, head_dim, n_kept = [dense.keys], dense.keys.shape[-1], 0
    if dense.slots is not None:
        parts.insert(0, dense.slots.keys(backend, head_dim, queries.dtype))
        n_kept = parts[0].shape[-2]
    scores = grouped_scores(backend, queries, parts)
    if n_queries > 1:
        mask = is_past(backend, scores.shape[-1], n_queries)
        scores = masked(backend, queries, scores, mask)
    scores = without_unused(backend, scores, dense)
    totals = backend.logsumexp(scores)
    if sinks is not None:
        each = sink_scores(backend, sinks, scores.shape[:3], totals.dtype)
        totals = xp.logaddexp(totals, each)
    weights, raised = raised_weights(backend, xp.exp(scores - totals[..., None]), queries.dtype)
    output = weights[..., n_kept:] @ xp.astype(dense.values, queries.dtype)
    if dense.slots is not None:
        values = dense.slots.values(backend, head_dim, queries.dtype)
        output = output + weights[..., :n_kept] @ values
    output = output if raised == 1 else output / raised
    shape = queries.shape[:3]
    return xp.reshape(output, (*shape, output.shape[-1])), xp.reshape(totals, shape)


def choose_rows(
    backend: Operations,
    worth: Array,
    kept_rows: Array | None,
    n_rebuilt: int,
    n_swapped: int,
) -> Choice:
    """Which rows a step rebuilds, and which slots the first of them enter.

    Args:
        worth: ``[B, n_kv_heads, L]``: :func:`xkv.ops.index.index_scores`.
        kept_rows: ``[B, n_kv_heads, K]``: rows that are not to be rebuilt, distinct; or None.
        n_rebuilt: How many are; no more than there are others.
        n_swapped: How many enter; none without ``kept_rows``.

    Returns:
        The rows that are worth most, from the best on where some enter; the slots of those that are
        worth least, from the worst on.
    """
    xp, missing = backend.xp, worth
    if kept_rows is not None:
        missing = backend.put_along(worth, kept_rows, backend.constant([-math.inf], worth.dtype))
    rows = backend.top_indices(missing, n_rebuilt)
    if not n_swapped:
        return Choice(rows)
    rows = backend.take_along(rows, xp.argsort(-backend.take_along(missing, rows), axis=-1))
    slots = xp.argsort(backend.take_along(worth, kept_rows), axis=-1)[..., :n_swapped]
    return Choice(rows, rows[..., :n_swapped], xp.astype(slots, rows.dtype))


def rebuild_keys(
    backend: Operations, stored: Stored, rows: Array, queries: Array
) -> tuple[Array, Array]:
    """Some rows of a layer's keys, rotated, and their scores.

    Args:
        stored: As in :func:`xkv.ops.attention.rebuild_rows`, as are the rows.
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled.

    Returns:
        ``[B, n_kv_heads, n, head_dim]``, and :func:`xkv.ops.scores.grouped_scores` of them.
    """
    keys = backend.rebuild_rows(stored, rows)
    return keys, grouped_scores(backend, queries, [keys])


def weigh_rows(
    backend: Operations, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
) -> tuple[Array, Array]:
    """Attention over some rows of a latent, beside other rows that were attended to before.

    Args:
        latent: ``[B, L, r]``
        rows: Row numbers, ``[B, n_kv_heads, n]``.
        scores: ``[B, n_kv_heads, M, n]``, as of :func:`xkv.ops.scores.grouped_scores`.
        totals: What the queries give to the others, as many as ``[B, n_kv_heads, M]``.
        beside: Attention over the others, as many as ``[B, n_kv_heads, M, value_dim]``.

    Returns:
        The rows' sums, ``[B, n_kv_heads, M, r]`` in the dtype of ``beside``, and what is left of
        ``beside``, ``[B, n_kv_heads, M, value_dim]``: each by its part of the softmax over both.
    """
    xp = backend.xp
    totals = xp.reshape(totals, (*scores.shape[:3], 1))
    weights = xp.softmax(xp.concat([scores, totals], axis=-1), -1)
    weights, raised = raised_weights(backend, weights, beside.dtype)
    taken, on_rows = take_rows(backend, latent, rows), weights[..., :-1]
    taken = taken.astype(backend, weights.dtype)
    sums = [on_rows @ piece.unpack(backend, weights.dtype) for _, piece in taken.pieces()]
    found = [sums[0] if len(sums) == 1 else xp.concat(sums, axis=-1)]
    found.append(xp.reshape(beside, (*scores.shape[:3], -1)) * weights[..., -1:])
    found = found if raised == 1 else [x / raised for x in found]
    return found[0], found[1]
