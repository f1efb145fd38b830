"""Attention over every row of a compressed segment, and what is rebuilt of stored rows."""

from __future__ import annotations

from typing import Any

from xkv.ops.latent import Latent
from xkv.ops.protocol import Operations
from xkv.ops.scores import Dense, grouped_scores, masked, sink_scores, without_unused
from xkv.ops.sequences import AnyLatent
from xkv.ops.types import Array, RopeRun, Segment, Stored

RAISED = 128.0
"""Weights of a million rows stay normal numbers, and sums finite for values up to 511."""


def rope_rows(
    backend: Operations, x: Array, start: int, runs: tuple[RopeRun, ...], inverse: bool = False
) -> Array:
    """Rotate consecutive rows ``[..., L, head_dim]`` from position ``start``, run by run."""
    rotated, row = [], 0
    for n_rows, spec in runs:
        rows = x[..., row : row + n_rows, :]
        rotated.append(rows if spec is None else backend.rope(rows, start + row, spec, inverse))
        row += n_rows
    return rotated[0] if len(rotated) == 1 else backend.xp.concat(rotated, axis=-2)


def wide_basis(backend: Operations, basis: Array, dtype: Any) -> Array:
    """A basis ``[B, r, n_kv_heads, dim]`` in a dtype; a copy is laid out as products take it."""
    if basis.dtype == dtype:
        return basis
    xp, order = backend.xp, (0, 2, 1, 3)
    return xp.permute_dims(xp.astype(xp.permute_dims(basis, order), dtype), order)


def rebuild_all(backend: Operations, stored: Stored) -> Array:
    """Every row of a segment, ``[B, n_kv_heads, L, dim]``, keys rotated."""
    xp = backend.xp
    latent = stored.latent.unpack(backend, stored.basis.dtype)
    _, rank, n_heads, dim = stored.basis.shape
    product = latent @ xp.reshape(stored.basis, (-1, rank, n_heads * dim))
    product = xp.reshape(product, (*latent.shape[:2], n_heads, dim))
    rows = xp.permute_dims(product, (0, 2, 1, 3))
    if not stored.rope_runs or not latent.shape[1]:
        return rows
    return rope_rows(backend, rows, stored.start, stored.rope_runs)


def take_rows(backend: Operations, latent: AnyLatent, rows: Array) -> Latent:
    """Rows of a latent for each KV head: ``[B, L, r]`` -> ``[B, n_kv_heads, n, r]``, packed."""
    xp = backend.xp

    def take(number: int, own: Latent) -> tuple[Array, ...]:
        numbers = xp.reshape(rows[number : number + 1], (-1,))
        return own.map(lambda x: xp.take(xp.reshape(x, x.shape[1:]), numbers, axis=0)).arrays

    # of each sequence by itself: a latent of several without its last rows is not one matrix
    taken = [take(*x) for x in enumerate(latent.sequences)]
    arrays = (x[0] if len(x) == 1 else xp.concat(list(x)) for x in zip(*taken, strict=True))
    return Latent(tuple(xp.reshape(x, (*rows.shape, -1)) for x in arrays), latent.bits)


def rebuild_rows(backend: Operations, stored: Stored, rows: Array) -> Array:
    """Some rows of a layer's keys, rotated, or values, for each KV head.

    Args:
        stored: Keys, whose ``rope_runs`` may hold several specs, or values.
        rows: Row numbers, ``[B, n_kv_heads, n]``.

    Returns:
        ``[B, n_kv_heads, n, dim]``
    """
    xp = backend.xp
    basis = stored.basis
    taken = take_rows(backend, stored.latent, rows).astype(backend, basis.dtype)
    by_head, rebuilt = xp.permute_dims(basis, (0, 2, 1, 3)), None
    for at, piece in taken.pieces(backend):
        rows_here, basis_here = piece.unpack(backend, basis.dtype), by_head[..., at, :]
        if rebuilt is None:
            rebuilt = rows_here @ basis_here
        else:
            rebuilt = backend.add_product(rebuilt, rows_here, basis_here)
    rotated, first = rebuilt, 0
    for n_rows, spec in stored.rope_runs:
        if spec is not None:
            turned = backend.rope(rebuilt, rows + stored.start, spec)
            is_inside = ((rows >= first) & (rows < first + n_rows))[..., None]
            is_alone = len(stored.rope_runs) == 1
            rotated = turned if is_alone else xp.where(is_inside, turned, rotated)
        first += n_rows
    return rotated


def attend_all(
    backend: Operations,
    queries: Array,
    segment: Segment,
    dense: Dense,
    scale: float,
    mask: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attend to every row of a segment and to dense rows, values never rebuilt.

    ``(p A_v) B_v`` equals ``p V``: the weights are applied to the latent, then the basis once.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated.
        segment: The layer's compressed rows.
        dense: The others.
        scale: Factor on the scores.
        mask: Boolean ``[..., Lq, L + D]`` over the segment's rows, then the dense ones; True
            attends. None attends to all.
        sinks: ``[n_heads]``: scores of nothing, that take a part of each head's weights.

    Returns:
        ``[B, n_heads, Lq, value_dim]`` in the queries' dtype; the softmax is in float32 or wider.
    """
    xp = backend.xp
    queries, keys = queries * scale, rebuild_all(backend, segment.keys)
    scores = grouped_scores(backend, queries, [keys, dense.keys])
    scores = without_unused(backend, masked(backend, queries, scores, mask), dense)
    latent = segment.values.latent.unpack(backend, segment.values.basis.dtype)[:, None]
    n_stored, n_rows = latent.shape[-2], scores.shape[-1]
    if sinks is not None:
        each = sink_scores(backend, sinks, scores.shape[:3], scores.dtype)
        scores = xp.concat([scores, each[..., None]], axis=-1)
    weights, raised = raised_weights(backend, xp.softmax(scores, -1), queries.dtype)
    basis = xp.permute_dims(segment.values.basis, (0, 2, 1, 3))
    output = weights[..., :n_stored] @ latent @ basis
    output = output + weights[..., n_stored:n_rows] @ xp.astype(dense.values, queries.dtype)
    output = output if raised == 1 else output / raised
    return xp.reshape(output, (*queries.shape[:3], dense.values.shape[-1]))


def attend_latent(
    backend: Operations,
    queries: Array,
    stored: Stored,
    rows: tuple[Array, Array],
    scale: float,
    bias: Array,
) -> Array:
    """Attention whose keys are its values and are not rotated, as those of an MLA model's latent.

    The basis is multiplied into queries and outputs, so that no row is rebuilt; exact over what is
    stored.

    Args:
        queries: ``[B, n_heads, 1, dim]``
        stored: The segment, of one KV head.
        rows: Dense ones before and after it, ``[B, 1, n, dim]``.
        scale: Factor on the scores.
        bias: ``[B, n_heads, 1, offset]``: added to them, by position.
    """
    xp = backend.xp
    basis = stored.basis[:, None, :, 0]
    latent = stored.latent.unpack(backend, basis.dtype)[:, None]
    parts = [xp.astype(rows[0], queries.dtype), latent, xp.astype(rows[1], queries.dtype)]
    queries = queries * scale
    absorbed = [queries, queries @ xp.matrix_transpose(basis), queries]
    scores = xp.concat(
        [q @ xp.matrix_transpose(part) for q, part in zip(absorbed, parts, strict=True)], axis=-1
    )
    scores = xp.astype(scores, backend.accumulate_dtype(queries)) + bias
    weights, raised = raised_weights(backend, xp.softmax(scores, -1), queries.dtype)
    first, last = parts[0].shape[-2], parts[0].shape[-2] + latent.shape[-2]
    output = weights[..., first:last] @ latent @ basis
    output = output + weights[..., :first] @ parts[0] + weights[..., last:] @ parts[2]
    return output if raised == 1 else output / raised


def raised_weights(backend: Operations, weights: Array, dtype: Any) -> tuple[Array, float]:
    """Softmax weights in the dtype of products, and the factor by which they are too large.

    A flat softmax over a long prompt is below float16's smallest normal number, which a device may
    take for zero.
    """
    is_narrow = dtype == backend.xp.float16
    raised = RAISED if is_narrow else 1.0
    return backend.xp.astype(weights * raised if is_narrow else weights, dtype), raised
