"""A decode step over the rows of a segment that matter most, which it rebuilds, and over others."""

from __future__ import annotations

from xkv.config import OWN_QUERIES
from xkv.ops.attention import raised_weights, rebuild_rows, take_rows
from xkv.ops.index import absorbed_queries
from xkv.ops.protocol import Operations
from xkv.ops.scores import Dense, grouped_scores, is_past, masked, sink_scores, without_unused
from xkv.ops.sequences import AnyDense, AnyLatent, dense_together
from xkv.ops.types import Array, Segment, Stored


def attend_set(
    backend: Operations,
    queries: Array,
    segment: Segment,
    dense: AnyDense,
    scale: float,
    n_rebuilt: int,
    sinks: Array | None = None,
) -> Array:
    """Attend to the rows of a segment that matter most, and to those that are at hand.

    The index scores every row of the segment; the best are rebuilt, and gone after the step.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated, few. Up to ``OWN_QUERIES`` tokens attend
            each to the rows that it would alone, more of them to the same rows. The last Lq dense
            rows are theirs.
        segment: The layer's compressed rows but for recent ones, no fewer than ``n_rebuilt``; of
            several sequences in :class:`xkv.ops.sequences.Latents`, each has its own.
        dense: Those at hand, recent ones among them; each sequence's for a token of each.
        scale: Factor on the scores.
        n_rebuilt: Rows to rebuild for each KV head, and each token that has its own.
        sinks: ``[n_heads]``: scores of nothing, that take a part of each head's weights.

    Returns:
        ``[B, n_heads, Lq, value_dim]``
    """
    xp, n_kv_heads = backend.xp, segment.keys.basis.shape[2]
    queries = queries * scale
    # how much a head gives to rows that need no rebuilding: by less than that, others do not matter
    beside, totals = backend.attend_dense(queries, dense, sinks)
    worth = rows_worth(backend, queries, totals, segment.keys, n_kv_heads)
    rows = backend.choose_rows(worth, n_rebuilt)
    rows = xp.reshape(rows, (queries.shape[0], n_kv_heads, -1))
    scores = backend.key_scores(segment.keys, rows, queries)
    n_tokens = queries.shape[2]
    if n_sets_of(n_tokens) > 1:
        sets = backend.positions(0, rows.shape[-1]) // n_rebuilt
        is_own = backend.positions(0, n_tokens)[:, None] == sets
        scores = masked(backend, queries, scores, is_own)
    sums, rest = backend.weigh_rows(segment.values.latent, rows, scores, totals, beside)
    basis = xp.permute_dims(segment.values.basis, (0, 2, 1, 3))
    output = backend.add_product(rest, sums, basis)
    return xp.reshape(output, (*queries.shape[:3], output.shape[-1]))


def n_sets_of(n_tokens: int) -> int:
    """Sets of rows that a call's tokens attend to: one each for a few, otherwise one."""
    return n_tokens if n_tokens <= OWN_QUERIES else 1


def rows_worth(
    backend: Operations, queries: Array, totals: Array, stored: Stored, n_kv_heads: int
) -> Array:
    """How much a KV head's queries want each row, those of one token where each has its own rows.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled.
        totals: What they give to rows at hand, ``[B, n_heads, Lq]``: :func:`attend_dense`.
        stored: Keys.

    Returns:
        ``[B, n_kv_heads * n_sets, L]``: :func:`xkv.ops.index.index_scores`.
    """
    xp, (batch, n_heads, n_tokens, dim) = backend.xp, queries.shape
    n_sets = n_sets_of(n_tokens)
    if n_sets > 1:
        # the queries of a KV head and a token next to each other
        queries, totals = (
            xp.permute_dims(xp.reshape(x, (batch, n_kv_heads, -1, n_tokens, n)), (0, 1, 3, 2, 4))
            for x, n in ((queries, dim), (totals, 1))
        )
    asking = xp.reshape(queries, (batch, n_heads * n_tokens, 1, dim))
    absorbed = absorbed_queries(backend, asking, stored)
    offsets = xp.reshape(totals, (batch, -1))
    return backend.index_scores(absorbed, stored.latent, offsets, n_kv_heads * n_sets)


def attend_dense(
    backend: Operations, queries: Array, dense: AnyDense, sinks: Array | None
) -> tuple[Array, Array]:
    """Attention over rows at hand, and what a query gives to all of them together.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled; the last Lq rows are theirs.
        dense: All are in use where there are several queries; or each sequence's, for one query.
        sinks: As in :func:`attend_set`.

    Returns:
        ``[B, n_heads, Lq, value_dim]`` in the queries' dtype, and the logarithms of the sums of
        exponentials of their scores, sinks among them, ``[B, n_heads, Lq]`` in float32 or wider.
    """
    xp, n_queries, are_own = backend.xp, queries.shape[2], None
    if not isinstance(dense, Dense):
        dense, are_own = dense_together(backend, dense)
    parts, head_dim, n_recent = [dense.keys], dense.keys.shape[-1], 0
    if dense.recent is not None:
        parts.insert(0, dense.recent.keys(backend, head_dim, queries.dtype))
        n_recent = parts[0].shape[-2]
    scores = grouped_scores(backend, queries, parts)
    if n_queries > 1:
        mask = is_past(backend, scores.shape[-1], n_queries)
        scores = masked(backend, queries, scores, mask)
    scores = without_unused(backend, scores, dense)
    if are_own is not None:
        scores = masked(backend, queries, scores, are_own[:, None, None])
    totals = backend.logsumexp(scores)
    if sinks is not None:
        each = sink_scores(backend, sinks, scores.shape[:3], totals.dtype)
        totals = xp.logaddexp(totals, each)
    weights, raised = raised_weights(backend, xp.exp(scores - totals[..., None]), queries.dtype)
    output = weights[..., n_recent:] @ xp.astype(dense.values, queries.dtype)
    if dense.recent is not None:
        values = dense.recent.values(backend, head_dim, queries.dtype)
        output = output + weights[..., :n_recent] @ values
    output = output if raised == 1 else output / raised
    shape = queries.shape[:3]
    return xp.reshape(output, (*shape, output.shape[-1])), xp.reshape(totals, shape)


def choose_rows(backend: Operations, worth: Array, count: int) -> Array:
    """Which rows a step rebuilds: those that are worth most, rising, as neighbours lie in memory.

    Args:
        worth: ``[B, n_kv_heads, L]``: :func:`xkv.ops.index.index_scores`.
        count: How many; no more than there are.

    Returns:
        ``[B, n_kv_heads, count]``
    """
    return backend.xp.sort(backend.top_indices(worth, count), axis=-1)


def key_scores(backend: Operations, stored: Stored, rows: Array, queries: Array) -> Array:
    """Scores of some rows of a layer's keys, which are rebuilt and rotated.

    Args:
        stored: As in :func:`xkv.ops.attention.rebuild_rows`, as are the rows.
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled.

    Returns:
        :func:`xkv.ops.scores.grouped_scores` of them: ``[B, n_kv_heads, M, n]``.
    """
    return grouped_scores(backend, queries, [rebuild_rows(backend, stored, rows)])


def weigh_rows(
    backend: Operations, latent: AnyLatent, rows: Array, scores: Array, totals: Array, beside: Array
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
    pieces = [piece.unpack(backend, weights.dtype) for _, piece in taken.pieces(backend)]
    sums = [on_rows @ piece for piece in pieces]
    found = [sums[0] if len(sums) == 1 else xp.concat(sums, axis=-1)]
    found.append(xp.reshape(beside, (*scores.shape[:3], -1)) * weights[..., -1:])
    found = found if raised == 1 else [x / raised for x in found]
    return found[0], found[1]
