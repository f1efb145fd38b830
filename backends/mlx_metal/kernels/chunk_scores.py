"""Scores of a segment's chunks from their landmarks, as Metal kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Landmarks

TILE = 128
"""Chunks that a threadgroup scores."""
MAX_GQA = 16

# Products of TILE landmarks with all query heads of their KV head. A lane holds 16 features of a
# landmark, so D / 16 lanes share one and a simdgroup takes several in one step.
PRODUCTS = """
    constexpr uint LANES = D / 16, AT_ONCE = 32 / LANES;
    constexpr uint PART_BYTES = BITS == 16 ? 16 * sizeof(T) : 2 * BITS;
    threadgroup float query[GQA][D];
    threadgroup float product[GQA][TILE];
    const uint tile = threadgroup_position_in_grid.x, n_tiles = threadgroups_per_grid.x;
    const uint pair = threadgroup_position_in_grid.z * threadgroups_per_grid.y
        + threadgroup_position_in_grid.y;
    const uint index = thread_index_in_threadgroup, n_threads = threads_per_threadgroup.x;
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const uint n_sg = simdgroups_per_threadgroup, part = lane % LANES;
    const uint n_chunks = landmarks_shape[2], first = tile * TILE;
    const uint n = min(uint(TILE), n_chunks - first);

    // In an order in which the lanes of a landmark read neighbours.
    for (uint i = index; i < GQA * D; i += n_threads) {
        const uint feature = i % D, four = feature % 16 / 4 * LANES + feature / 16;
        query[i / D][four * 4 + feature % 4] = float(queries[pair * GQA * D + i]) * scale;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint c0 = sg * AT_ONCE; c0 < n; c0 += n_sg * AT_ONCE) {
        const uint c = c0 + lane / LANES;
        const ulong row = ulong(pair) * n_chunks + first + min(c, n - 1);
        const device uchar* bytes =
            (const device uchar*)landmarks + (row * LANES + part) * PART_BYTES;
        float x[16];
        if (BITS == 16) {
            for (uint i = 0; i < 16; i++) x[i] = float(((const device T*)bytes)[i]);
        } else {
            uint words[BITS / 2];
            for (uint i = 0; i < BITS / 2; i++) words[i] = ((const device uint*)bytes)[i];
            const ulong group = row * (D / GROUP) + part * 16 / GROUP;
            const float step = float(scales[group]), bias = float(biases[group]);
            for (uint i = 0; i < 16; i++) {
                const uint number = words[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1);
                x[i] = fma(float(number), step, bias);
            }
        }
        for (uint h = 0; h < GQA; h++) {
            float sum = 0;
            for (uint j = 0; j < 4; j++)
                for (uint i = 0; i < 4; i++)
                    sum = fma(x[j * 4 + i], query[h][(j * LANES + part) * 4 + i], sum);
            for (ushort step = LANES / 2; step > 0; step /= 2) sum += simd_shuffle_xor(sum, step);
            if (part == 0 && c < n) product[h][c] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint h = sg; h < GQA; h += n_sg) {
        float top = -INFINITY, total = 0;
        for (uint c = lane; c < n; c += 32) {
            top = max(top, product[h][c]);
            products[ulong(pair * GQA + h) * n_chunks + first + c] = product[h][c];
        }
        top = simd_max(top);
        for (uint c = lane; c < n; c += 32) total += exp(product[h][c] - top);
        total = simd_sum(total);
        if (lane == 0) {
            tops[(pair * n_tiles + tile) * GQA + h] = top;
            totals[(pair * n_tiles + tile) * GQA + h] = total;
        }
    }
"""

# One thread a chunk: each head's softmax, and the largest of them.
SCORES = """
    threadgroup float highest[GQA], factor[GQA];
    const uint c = thread_position_in_grid.x, n_chunks = products_shape[3];
    const uint pair = thread_position_in_grid.z * threads_per_grid.y + thread_position_in_grid.y;
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const uint n_sg = simdgroups_per_threadgroup, n_tiles = tops_shape[2];

    for (uint h = sg; h < GQA; h += n_sg) {
        float top = -INFINITY, total = 0;
        for (uint t = lane; t < n_tiles; t += 32)
            top = max(top, tops[(pair * n_tiles + t) * GQA + h]);
        top = simd_max(top);
        for (uint t = lane; t < n_tiles; t += 32) {
            const uint at = (pair * n_tiles + t) * GQA + h;
            total = fma(totals[at], exp(tops[at] - top), total);
        }
        total = simd_sum(total);
        if (lane == 0) {
            highest[h] = top;
            factor[h] = 1 / total;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (c >= n_chunks) return;
    float best = 0;
    for (uint h = 0; h < GQA; h++) {
        const float product = products[ulong(pair * GQA + h) * n_chunks + c];
        best = max(best, exp(product - highest[h]) * factor[h]);
    }
    scores[pair * n_chunks + c] = is_outlier[pair * n_chunks + c] ? -1.0f : best;
"""


class ChunkScores:
    """:func:`xkv.ops.selection.chunk_scores` in two kernels.

    The first multiplies and leaves, for each 128 chunks, a softmax's maximum and sum; the second
    puts those together and takes the largest weight over the query heads.

    Limits: float32, float16 or bfloat16; one query; head_dim 64, 128 or 256; up to 16 query heads
    to a KV head; landmarks of 16 bits (the queries' dtype), or of 8 or 4 in groups of 64 or 32.

    For each token, KV head and chunk: ``head_dim * bits / 8`` bytes of landmarks and two scales a
    group, read once, ``8 * gqa + 5`` bytes for products and scores, and ``2 * gqa * head_dim``
    floating point operations, ``gqa`` query heads to a KV head. With 8 bits, head_dim 128, float16
    and gqa 4 that is 173 bytes and 1,024 operations; the plain twin moves over 100 bytes more.
    """

    name = "chunk_scores"

    def why_not(self, queries: Array, landmarks: Landmarks, scale: float) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        # the last array holds the biases of quantized landmarks, else the landmarks
        problem = common.dtype_problem(queries=queries, landmarks=landmarks.arrays[-1])
        if problem:
            return problem
        n_heads, n_queries, head_dim = queries.shape[1:]
        gqa = n_heads // landmarks.is_outlier.shape[1]
        if n_queries != 1:
            return f"the kernel takes one token at a time, not {n_queries}"
        if head_dim not in common.HEAD_DIMS:
            allowed = ", ".join(map(str, common.HEAD_DIMS))
            return f"the kernel takes head_dim {allowed}, not {head_dim}"
        if gqa > MAX_GQA:
            return f"the kernel takes up to {MAX_GQA} query heads to a KV head, not {gqa}"
        if landmarks.bits not in (4, 8, 16):
            return f"the kernel reads landmarks of 4, 8 or 16 bits, not {landmarks.bits}"
        if landmarks.bits != 16 and landmarks.group_size not in (32, 64):
            return f"the kernel reads groups of 32 or 64 features, not {landmarks.group_size}"
        return None

    def sample(self, backend: Backend, *args: Any) -> tuple[Any, ...]:
        """Two tiles and one chunk more.

        No outliers: their -1 would outweigh every score. A flat softmax: where scores are large,
        the 16-bit products of the plain operations are off by more than the check allows.
        """
        queries, landmarks, _ = args
        n_kv_heads, n_chunks = landmarks.is_outlier.shape[1], 2 * TILE + 1
        n_heads, head_dim = queries.shape[1], queries.shape[-1]
        bits, group_size = landmarks.bits, landmarks.group_size
        means = backend.normal((1, n_kv_heads, n_chunks, head_dim), 0).astype(queries.dtype)
        few = (backend.normal((1, n_heads, 1, head_dim), 1) * 0.4).astype(queries.dtype)
        arrays = (means,) if bits == 16 else backend.quantize(means, group_size, bits)
        is_outlier = mx.zeros((1, n_kv_heads, n_chunks), mx.bool_)
        small = Landmarks(arrays, bits, group_size, is_outlier, landmarks.chunk_size)
        return few, small, head_dim**-0.5

    def check_key(self, *args: Any) -> tuple[Any, ...]:
        """The dtype's name and the template's values."""
        queries, landmarks, _ = args
        gqa = queries.shape[1] // landmarks.is_outlier.shape[1]
        kind = queries.shape[-1], gqa, landmarks.bits, landmarks.group_size
        return (common.dtype_name(queries), *kind)

    def __call__(self, queries: Array, landmarks: Landmarks, scale: float) -> Array:
        batch, n_kv_heads, n_chunks = landmarks.is_outlier.shape
        head_dim, gqa = queries.shape[-1], queries.shape[1] // n_kv_heads
        # where nothing is packed, the scales' places are filled and never read
        arrays = landmarks.arrays if landmarks.bits != 16 else landmarks.arrays * 3
        n_tiles = -(-n_chunks // TILE)
        shape = (batch, n_kv_heads, n_tiles, gqa)
        products = common.build(
            "chunk_products",
            ("queries", "landmarks", "scales", "biases", "scale"),
            ("products", "tops", "totals"),
            PRODUCTS,
            header="",
        )(
            inputs=[queries, *arrays, scale],
            template=[
                ("T", queries.dtype),
                ("D", head_dim),
                ("GQA", gqa),
                ("BITS", landmarks.bits),
                ("GROUP", landmarks.group_size or head_dim),
                ("TILE", TILE),
            ],
            grid=(n_tiles * 256, n_kv_heads, batch),
            threadgroup=(256, 1, 1),
            output_shapes=[(batch, n_kv_heads, gqa, n_chunks), shape, shape],
            output_dtypes=[mx.float32] * 3,
        )
        (scores,) = common.build(
            "chunk_scores",
            ("products", "tops", "totals", "is_outlier"),
            ("scores",),
            SCORES,
            header="",
        )(
            inputs=[*products, landmarks.is_outlier],
            template=[("GQA", gqa)],
            grid=(-(-n_chunks // 256) * 256, n_kv_heads, batch),
            threadgroup=(256, 1, 1),
            output_shapes=[(batch, n_kv_heads, n_chunks)],
            output_dtypes=[mx.float32],
        )
        return scores


KERNEL = ChunkScores()
