"""Selective reconstruction: which chunks of a segment a decode step attends to, and how."""

from __future__ import annotations

from xkv.ops.attention import attend_parts, grouped_scores, without_unused
from xkv.ops.packed import Packed, group_size_of, unpacked
from xkv.ops.protocol import Operations
from xkv.ops.types import Array, Factor, Landmarks, Segment


def make_landmarks(
    backend: Operations, keys: Array, chunk_size: int, n_outliers: int, bits: int
) -> tuple[Landmarks, Array]:
    """Summarize exact keys chunk by chunk.

    Args:
        keys: ``[B, n_kv_heads, L, head_dim]``, rotated; L is a multiple of ``chunk_size``.
        chunk_size: Tokens of a chunk.
        n_outliers: Chunks a KV head to keep dense: those whose keys resemble their mean least.
        bits: 4, 8 or 16; 16 is also taken where head_dim is no multiple of 32.

    Returns:
        The landmarks and the outliers' chunk ids, ``[B, n_kv_heads, n_outliers]``.

    Source: xKV, arXiv:2503.18893, section 4.3, after ShadowKV, arXiv:2410.21465.
    """
    xp = backend.xp
    batch, n_kv_heads, n_rows, head_dim = keys.shape
    n_chunks = n_rows // chunk_size
    chunks = xp.reshape(keys, (batch, n_kv_heads, n_chunks, chunk_size, head_dim))
    chunks = xp.astype(chunks, backend.accumulate_dtype(keys))
    means = xp.mean(chunks, axis=-2, keepdims=True)
    norms = xp.sqrt(xp.sum(chunks * chunks, axis=-1) * xp.sum(means * means, axis=-1))
    cosines = xp.sum(chunks * means, axis=-1) / (norms + 1e-30)
    outliers = backend.top_indices(-xp.min(cosines, axis=-1), n_outliers)
    ids = xp.arange(n_chunks, **backend.placement)
    is_outlier = xp.any(outliers[..., None] == ids, axis=-2)
    means = xp.astype(means[..., 0, :], keys.dtype)
    group_size = group_size_of(head_dim)
    if bits == 16 or not group_size:
        return Landmarks((means,), 16, 0, is_outlier, chunk_size), outliers
    arrays = backend.quantize(means, group_size, bits)
    return Landmarks(arrays, bits, group_size, is_outlier, chunk_size), outliers


def first_landmarks(backend: Operations, landmarks: Landmarks, n_chunks: int) -> Landmarks:
    """Those of the first chunks, none of which is an outlier any more."""
    arrays = tuple(backend.own(x[:, :, :n_chunks]) for x in landmarks.arrays)
    is_outlier = backend.xp.zeros_like(landmarks.is_outlier[:, :, :n_chunks])
    return landmarks._replace(arrays=arrays, is_outlier=is_outlier)


def joined_landmarks(backend: Operations, first: Landmarks, later: Landmarks) -> Landmarks:
    """Landmarks of some chunks, then those of later ones."""
    joined = [
        backend.xp.concat([mine, more], axis=2)
        for mine, more in zip(first.held, later.held, strict=True)
    ]
    return first._replace(arrays=tuple(joined[:-1]), is_outlier=joined[-1])


def chunk_rows(backend: Operations, chunks: Array, chunk_size: int) -> Array:
    """Row numbers of chunks: ``[B, n_kv_heads, n]`` -> ``[B, n_kv_heads, n * chunk_size]``."""
    xp = backend.xp
    rows = chunks[..., None] * chunk_size + xp.arange(chunk_size, **backend.placement)
    return xp.reshape(rows, (*chunks.shape[:-1], -1))


def chunk_scores(backend: Operations, queries: Array, landmarks: Landmarks, scale: float) -> Array:
    """How much each chunk matters to its KV head's queries.

    Args:
        queries: ``[B, n_heads, 1, head_dim]``, rotated.
        landmarks: Of the layer's segment.
        scale: Factor on the products.

    Returns:
        ``[B, n_kv_heads, C]`` float32 or wider: the largest softmax over the KV head's query heads,
        and -1 for outlier chunks.
    """
    xp = backend.xp
    batch, n_heads, _, head_dim = queries.shape
    n_kv_heads = landmarks.is_outlier.shape[1]
    grouped = xp.reshape(queries * scale, (batch, n_kv_heads, n_heads // n_kv_heads, head_dim))
    if landmarks.bits == 16:
        products = grouped @ xp.matrix_transpose(landmarks.arrays[0])
    else:
        products = backend.quantized_matmul(
            grouped, landmarks.arrays, landmarks.group_size, landmarks.bits
        )
    products = xp.astype(products, backend.accumulate_dtype(queries))
    weights = xp.softmax(products, -1)
    return xp.where(landmarks.is_outlier, -1.0, xp.max(weights, axis=-2))


def select_chunks(
    backend: Operations, queries: Array, landmarks: Landmarks, budget: int, scale: float
) -> Array:
    """The chunks that matter most to each KV head, ``[B, n_kv_heads, budget // chunk_size]``."""
    scores = backend.chunk_scores(queries, landmarks, scale)
    return backend.top_indices(scores, budget // landmarks.chunk_size)


def take_rows(backend: Operations, latent: Factor, rows: Array) -> Array:
    """Rows of a latent for each KV head: ``[B, L, r]`` -> ``[B, n_kv_heads, S, r]``."""
    xp = backend.xp
    if isinstance(latent, Packed):
        # few rows are gathered while they are packed, and only those are widened
        return latent.map(lambda x: take_rows(backend, x, rows)).unpack(backend)
    batch, n_rows, rank = latent.shape
    if batch > 1:
        first = xp.arange(batch, **backend.placement)[:, None, None] * n_rows
        rows = xp.astype(rows, first.dtype) + first
    flat = xp.reshape(latent, (batch * n_rows, rank))
    taken = xp.take(flat, xp.reshape(rows, (-1,)), axis=0)
    return xp.reshape(taken, (*rows.shape, rank))


def reconstruct_rows(backend: Operations, segment: Segment, rows: Array) -> Array:
    """Rotated keys of selected rows.

    Args:
        segment: The layer's compressed run; ``rope_runs`` may hold several specs.
        rows: Row numbers in the segment, ``[B, n_kv_heads, S]``.

    Returns:
        ``[B, n_kv_heads, S, head_dim]``.
    """
    return reconstruct_chunks(backend, segment, rows, 1)


def reconstruct_chunks(
    backend: Operations, segment: Segment, chunks: Array, chunk_size: int
) -> Array:
    """:func:`reconstruct_rows` for all rows of chunks, ids ``[B, n_kv_heads, n]``."""
    xp = backend.xp
    rows = chunk_rows(backend, chunks, chunk_size)
    taken = take_rows(backend, segment.latent_k, rows)
    basis = unpacked(backend, segment.basis_k)
    keys = taken @ xp.permute_dims(basis, (0, 2, 1, 3))
    starts = chunks * chunk_size + segment.start
    rotated, first = keys, 0
    for n_rows, spec in segment.rope_runs:
        if spec is not None:
            turned = backend.rotate_runs(keys, starts, chunk_size, spec)
            is_inside = ((rows >= first) & (rows < first + n_rows))[..., None]
            is_alone = len(segment.rope_runs) == 1
            rotated = turned if is_alone else xp.where(is_inside, turned, rotated)
        first += n_rows
    return rotated


def selected_attention(
    backend: Operations,
    queries: Array,
    segment: Segment,
    chunks: Array,
    chunk_size: int,
    keys: Array,
    values: Array,
    scale: float,
) -> Array:
    """Attend to selected rows of a segment and to dense rows; values are never reconstructed.

    Args:
        queries: ``[B, n_heads, 1, head_dim]``, rotated.
        segment: The layer's compressed rows.
        chunks: Chunk ids, ``[B, n_kv_heads, n]``.
        chunk_size: Tokens of a chunk.
        keys: Dense rows, ``[B, n_kv_heads, D, head_dim]``.
        values: ``[B, n_kv_heads, D, value_dim]``.
        scale: Factor on the scores.

    Returns:
        ``[B, n_heads, 1, value_dim]``.
    """
    rows = chunk_rows(backend, chunks, chunk_size)
    selected = reconstruct_chunks(backend, segment, chunks, chunk_size)
    scores = grouped_scores(backend, queries, [selected, keys], scale)
    scores = without_unused(backend, scores, keys.shape[-2], segment.n_dense)
    latent_v = take_rows(backend, segment.latent_v, rows)
    return attend_parts(backend, queries, scores, latent_v, segment.basis_v, values)
