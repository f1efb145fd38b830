"""Decode attention over a low-rank segment and dense rows: the plain form of fused operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.ops.packed import Packed, unpacked
from xkv.ops.protocol import Operations
from xkv.ops.types import Array, Factor, RopeRun, Segment

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


def reconstruct(backend: Operations, latent: Factor, basis: Factor) -> Array:
    """``latent @ basis`` as ``[B, n_kv_heads, L, head_dim]``."""
    xp = backend.xp
    batch, rank, n_kv_heads, head_dim = basis.shape
    latent, basis = unpacked(backend, latent), unpacked(backend, basis)
    product = latent @ xp.reshape(basis, (batch, rank, n_kv_heads * head_dim))
    product = xp.reshape(product, (batch, latent.shape[-2], n_kv_heads, head_dim))
    return xp.permute_dims(product, (0, 2, 1, 3))


def reconstruct_keys(backend: Operations, segment: Segment) -> Array:
    """A segment's rotated keys, ``[B, n_kv_heads, L, head_dim]``."""
    keys = reconstruct(backend, segment.latent_k, segment.basis_k)
    return rope_rows(backend, keys, segment.start, segment.rope_runs)


def lowrank_attention(
    backend: Operations,
    queries: Array,
    segment: Segment,
    keys: Array,
    values: Array,
    scale: float,
    mask: Array | None = None,
) -> Array:
    """Attend to every row of a segment and to dense rows, values never reconstructed.

    ``(p A_v) B_v`` equals ``p V``: the weights are applied to the latent, then the basis once.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated.
        segment: The layer's compressed rows.
        keys: ``[B, n_kv_heads, D, head_dim]``, rotated dense rows.
        values: ``[B, n_kv_heads, D, value_dim]``.
        scale: Factor on the scores.
        mask: Boolean ``[..., Lq, L + D]`` over the segment's rows, then the dense ones; True
            attends. None attends to all.

    Returns:
        ``[B, n_heads, Lq, value_dim]`` in the queries' dtype; the softmax is in float32 or wider.
    """
    xp = backend.xp
    scores = grouped_scores(backend, queries, [backend.reconstruct_keys(segment), keys], scale)
    if mask is not None:
        per_head = xp.reshape(scores, (*queries.shape[:3], scores.shape[-1]))
        per_head = xp.where(mask, per_head, xp.finfo(scores.dtype).min)
        scores = xp.reshape(per_head, scores.shape)
    scores = without_unused(backend, scores, keys.shape[-2], segment.n_dense)
    latent_v = segment.latent_v
    if not isinstance(latent_v, Packed):
        latent_v = latent_v[:, None]
    return attend_parts(backend, queries, scores, latent_v, segment.basis_v, values)


def grouped_scores(
    backend: Operations, queries: Array, key_parts: Sequence[Array], scale: float
) -> Array:
    """Scores over several arrays of keys, side by side.

    Query heads that share a KV head are rows of one product: ``[B, n_kv_heads, n_heads //
    n_kv_heads * Lq, rows]``, in float32 or wider.
    """
    xp = backend.xp
    grouped = xp.reshape(
        queries * scale, (queries.shape[0], key_parts[0].shape[1], -1, queries.shape[-1])
    )
    scores = xp.concat([grouped @ xp.matrix_transpose(keys) for keys in key_parts], axis=-1)
    return xp.astype(scores, backend.accumulate_dtype(queries))


def without_unused(backend: Operations, scores: Array, n_rows: int, n_used: Array | None) -> Array:
    """Scores whose last ``n_rows`` columns are dense rows, with no weight on unused ones."""
    if n_used is None:
        return scores
    xp = backend.xp
    rows = xp.arange(scores.shape[-1], **backend.placement) - (scores.shape[-1] - n_rows)
    return xp.where(rows < n_used, scores, xp.finfo(scores.dtype).min)


def raised_weights(backend: Operations, weights: Array, dtype: Any) -> tuple[Array, float]:
    """Softmax weights in the dtype of products, and the factor by which they are too large.

    A flat softmax over a long prompt is below float16's smallest normal number, which a device may
    take for zero.
    """
    is_narrow = dtype == backend.xp.float16
    raised = RAISED if is_narrow else 1.0
    return backend.xp.astype(weights * raised if is_narrow else weights, dtype), raised


def attend_parts(
    backend: Operations,
    queries: Array,
    scores: Array,
    latent_v: Factor,
    basis_v: Factor,
    values: Array,
) -> Array:
    """Softmax over :func:`grouped_scores`; values in latent space first, then dense ones.

    Args:
        latent_v: ``[B, 1 or n_kv_heads, S, rank_v]``, or packed ``[B, S, rank_v]``: the first S
            columns of ``scores``.
        basis_v: ``[B, rank_v, n_kv_heads, value_dim]``.
        values: ``[B, n_kv_heads, D, value_dim]``, the other columns.
    """
    xp = backend.xp
    weights, raised = raised_weights(backend, xp.softmax(scores, -1), queries.dtype)
    n_latent = latent_v.shape[-2]
    on_latent = weights[..., :n_latent]
    if isinstance(latent_v, Packed):
        batch, n_kv_heads, n_rows, _ = on_latent.shape
        flat = xp.reshape(on_latent, (batch, n_kv_heads * n_rows, n_latent))
        summed = latent_v.weighted_sum(backend, flat)
        summed = xp.reshape(summed, (batch, n_kv_heads, n_rows, -1))
    else:
        summed = on_latent @ latent_v
    output = summed @ xp.permute_dims(unpacked(backend, basis_v), (0, 2, 1, 3))
    output = output + weights[..., n_latent:] @ values
    output = output if raised == 1 else output / raised
    return xp.reshape(output, (*queries.shape[:3], values.shape[-1]))
