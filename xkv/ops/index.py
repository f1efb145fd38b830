"""The latent index: which rows of a store a query wants, read off the packed keys themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xkv.config import BAND
from xkv.ops.latent import Latent
from xkv.ops.protocol import Operations
from xkv.ops.sequences import AnyLatent, Latents, are_there, side_by_side
from xkv.ops.types import Array, RopeSpec, Stored

BLOCKS = 64
"""Blocks whose columns are widened at once."""

RUN = 16
"""Neighbouring rows of which the best is looked at first, where the best of many are searched."""

BLOCK = 256
"""Rows that share one rotation of a query.

Measured on SmolLM2, 7,680 tokens of prose, 64 + 0 columns, KL at 512 and 1,024 rows: blocks of 64
0.0038 and 0.0013, of 256 0.0040 and 0.0014 (0.0045 and 0.0015 without the mean over the block).
"""


def n_columns(latent: AnyLatent) -> int:
    """Columns of :func:`index_columns`."""
    return min(BAND, latent.rank) + max(len(latent.bits) - 1, 0)


def index_columns(
    backend: Operations, latent: AnyLatent, dtype: Any, n_missing: int = 0
) -> list[Array]:
    """What of each row is scored: ``[B, L, n]`` in a dtype, in one or two parts.

    The first band's columns and, of each other band, the direction that is the mean of its columns:
    the plan puts the strongest directions there. The middle of a row's codes stands for their mean,
    so that no words of these bands are read.

    Args:
        n_missing: Rows of zeros that follow them; also where a sequence has fewer than another.
    """
    xp, n_rows = backend.xp, latent.shape[1] + n_missing

    def filled(arrays: Sequence[Array]) -> Array:
        return side_by_side(backend, arrays, n_rows)

    if not latent.is_packed:
        return [xp.astype(filled([x.arrays[0][..., :BAND] for x in latent.parts]), dtype)]
    # codes are filled up, as they are smaller than what they stand for
    words = filled([x.bands(0, 1).arrays[0] for x in latent.parts])
    scales, biases = (xp.astype(filled([x.arrays[i] for x in latent.parts]), dtype) for i in (1, 2))
    first = Latent((words, scales[..., :1], biases[..., :1]), latent.bits[:1])
    columns = [first.unpack(backend, dtype)]
    if len(latent.bits) > 1:
        middles = backend.constant([(2**bits - 1) / 2 for bits in latent.bits[1:]], dtype)
        columns.append((scales[..., 1:] * middles + biases[..., 1:]) * BAND**0.5)
    return columns


def index_basis(backend: Operations, stored: Stored) -> Array:
    """The rows of a layer's basis that belong to :func:`index_columns`, ``[B, n, heads, dim]``."""
    if stored.index_rows is not None:
        return stored.index_rows
    return rows_of_index(backend, stored.basis, stored.latent.is_packed)


def rows_of_index(backend: Operations, basis: Array, is_packed: bool) -> Array:
    """:func:`index_basis` of a basis ``[B, r, heads, dim]``."""
    xp, first, rest = backend.xp, basis[:, :BAND], basis[:, BAND:]
    if not is_packed or not rest.shape[1]:
        return first
    bands = xp.reshape(rest, (rest.shape[0], -1, BAND, *rest.shape[2:]))
    return xp.concat([first, xp.sum(bands, axis=2) / BAND**0.5], axis=1)


def absorbed_queries(backend: Operations, queries: Array, stored: Stored) -> Array:
    """Queries rotated back by the mean rotation of each block, in the columns of the index.

    A query's product with a key that is rotated to position p is a sum over the pairs of features
    of ``cos(p / f) c + sin(p / f) s``, so all blocks together are one product.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled.
        stored: Keys.

    Returns:
        ``[B, n_blocks, n, n_heads * Lq]``, in the queries' dtype; one block where nothing rotates.
    """
    xp = backend.xp
    basis = index_basis(backend, stored)
    batch, n_index, n_kv_heads, head_dim = basis.shape
    batch = max(batch, queries.shape[0])
    n_queries = queries.shape[1] * queries.shape[2]
    spec = next((run.spec for run in stored.rope_runs if run.spec is not None), None)
    if spec is None:
        grouped = xp.reshape(queries, (queries.shape[0], n_kv_heads, -1, head_dim))
        summed = xp.permute_dims(basis, (0, 2, 1, 3)) @ xp.matrix_transpose(grouped)
        summed = xp.permute_dims(summed, (0, 2, 1, 3))
        return xp.reshape(summed, (batch, 1, n_index, n_queries))
    terms = backend.query_terms(queries, basis, spec)
    table = block_table(backend, stored, spec.dims < head_dim, queries.dtype)
    return xp.reshape(table @ terms, (batch, table.shape[0], n_index, n_queries))


def query_terms(backend: Operations, queries: Array, basis: Array, spec: RopeSpec) -> Array:
    """What queries and a basis make of each pair of features, by which a block turns them back.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]``, rotated and scaled.
        basis: :func:`index_basis`, ``[B or 1, n, n_kv_heads, head_dim]``.
        spec: How the queries are rotated.

    Returns:
        ``[B, 2 * pairs (+ 1), n * n_heads * Lq]``: of each pair of features the factor of its
        cosine, then of each that of its sine; last, where features are not rotated, their product.
    """
    xp = backend.xp
    batch, n_index, n_kv_heads, head_dim = basis.shape
    batch = max(batch, queries.shape[0])
    n_queries = queries.shape[1] // n_kv_heads * queries.shape[2]
    # [B, features, 1, heads, queries] and [B, features, n, heads, 1]
    turned = xp.reshape(queries, (queries.shape[0], n_kv_heads, n_queries, head_dim))
    turned = xp.permute_dims(turned, (0, 3, 1, 2))[:, :, None]
    rows = xp.permute_dims(basis, (0, 3, 1, 2))[..., None]
    half, dims = spec.dims // 2, spec.dims
    one, two = slice(0, half), slice(half, dims)
    if spec.traditional:
        one, two = slice(0, dims, 2), slice(1, dims, 2)
    (q1, q2), (b1, b2) = ((x[:, one], x[:, two]) for x in (turned, rows))
    parts = [q1 * b1 + q2 * b2, q2 * b1 - q1 * b2]
    parts = [part * spec.scale for part in parts] if spec.scale != 1 else parts
    if dims < head_dim:
        parts.append(xp.sum(turned[:, dims:] * rows[:, dims:], axis=1, keepdims=True))
    return xp.reshape(xp.concat(parts, axis=1), (batch, -1, n_index * n_kv_heads * n_queries))


def block_table(backend: Operations, stored: Stored, has_rest: bool, dtype: Any) -> Array:
    """Mean cosines and sines of each block, ``[n_blocks, 2 * pairs (+ 1)]``."""
    xp = backend.xp
    n_rows, tables, row = stored.latent.shape[1], [], 0
    n_blocks = -(-n_rows // BLOCK)
    for n_run, spec in stored.rope_runs:
        assert spec is not None
        # a block goes by the rotation of the row in its middle
        first, end = (-(-max(x - BLOCK // 2, 0) // BLOCK) for x in (row, row + n_run))
        row += n_run
        end = n_blocks if row >= n_rows else end
        if first < end:
            angles = backend.block_angles(spec, stored.start, n_blocks, has_rest, dtype)
            tables.append(angles[first:end])
    return tables[0] if len(tables) == 1 else xp.concat(tables, axis=0)


def block_numbers(spec: RopeSpec, start: int, n_blocks: int, has_rest: bool) -> np.ndarray:
    """:func:`block_table` of blocks from position ``start`` on, in float32."""
    middles = start + BLOCK * np.arange(n_blocks) + (BLOCK - 1) / 2
    steps = 1 / np.array(spec.freqs)
    # the mean over a block: what turns faster than that says nothing about a row
    damping = np.sin(BLOCK * steps / 2) / (BLOCK * np.sin(steps / 2))
    angles = middles[:, None] * steps
    rest = [np.ones((n_blocks, 1))] if has_rest else []
    parts = [damping * np.cos(angles), damping * np.sin(angles), *rest]
    return np.concatenate(parts, axis=1).astype(np.float32)


def index_scores(
    backend: Operations, absorbed: Array, latent: AnyLatent, offsets: Array, n_kv_heads: int
) -> Array:
    """How much a KV head's queries want each row.

    Args:
        absorbed: :func:`absorbed_queries`
        latent: Of the keys.
        offsets: ``[B, n_heads * Lq]``: taken off each query's scores, in float32 or wider.

    Returns:
        ``[B, n_kv_heads, L]`` in float32 or wider: the largest over the KV head's queries; minus
        infinity where a sequence has no row.
    """
    xp = backend.xp
    batch, n_rows = latent.shape[:2]
    n_blocks, found = absorbed.shape[1], []
    # pieces of whole blocks, that fit into a CPU's cache; the last one is filled up
    step = BLOCK * BLOCKS
    for first in range(0, n_rows, step):
        n_here, row, products = min(step, n_rows - first), 0, None
        here = absorbed[:, first // BLOCK : (first + step) // BLOCK] if n_blocks > 1 else absorbed
        n_missing = -n_here % BLOCK if n_blocks > 1 else 0
        rows = latent.rows(first, first + n_here)
        for columns in index_columns(backend, rows, absorbed.dtype, n_missing):
            width = columns.shape[-1]
            by_block = xp.reshape(columns, (batch, here.shape[1], -1, width))
            part = by_block @ here[:, :, row : row + width]
            products = part if products is None else products + part
            row += width
        products = xp.reshape(products, (absorbed.shape[0], n_here + n_missing, -1))[:, :n_here]
        scores = xp.astype(products, offsets.dtype)
        scores = xp.reshape(scores - offsets[:, None], (*scores.shape[:2], n_kv_heads, -1))
        found.append(xp.max(scores, axis=-1))
    together = found[0] if len(found) == 1 else xp.concat(found, axis=1)
    worth = xp.permute_dims(together, (0, 2, 1))
    if isinstance(latent, Latents) and len(set(latent.lengths)) > 1:
        worth = xp.where(are_there(backend, latent.lengths)[:, None], worth, -xp.inf)
    return worth
