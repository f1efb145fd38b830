"""Decode attention over selected rows of a segment and over dense rows, as a Metal kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common, latents
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.selection import chunk_rows
from xkv.ops.types import Array, Factor, RopeRun, Segment
from xkv.store.codec import small_latent

ROWS = 128
"""Rows that a threadgroup attends to."""
MAX_GQA = 16

VALUES_SOURCE = """
// Values of one head in an array of any strides but the last.
template <typename T>
struct strided_values {
  const device T* rows;
  ulong row_stride;
  uint width;
  bool has_whole_rows;

  ulong start(uint row) const { return ulong(row) * row_stride; }

  template <int VEC>
  void load(ulong start, uint column, thread float (&value)[VEC]) const {
    for (uint i = 0; i < VEC; i++) value[i] = float(rows[start + column + i]);
  }
};

// Rows of a latent in parts, four columns at once.
template <typename Latent>
struct latent_values {
  Latent latent;
  uint width;
  bool has_whole_rows;

  ulong start(uint row) const { return row; }

  void load(ulong row, uint column, thread float (&value)[4]) const {
    const float4 x = latent.template load<float>(int(row), int(column));
    for (uint i = 0; i < 4; i++) value[i] = x[i];
  }
};

template <typename Latent>
METAL_FUNC latent_values<Latent> values_of(Latent latent) {
  return {latent, uint(latent.width), true};
}
"""

STRIDED_VALUES = """
    const strided_values<T> source = {
        values + batch * values_strides[0] + head * values_strides[1], ulong(values_strides[2]),
        uint(values_shape[3]), values_strides[3] == 1};
"""
LATENT_VALUES = """
    const int64_t first_row = int64_t(batch) * $n_latent_rows;
    const auto source = values_of($latent);
"""

HEADER = latents.LATENT_SOURCE + VALUES_SOURCE

# Softmax and weighted sum over ROWS rows, for all query heads of a KV head: every key and value is
# loaded once. A key belongs to D / 16 lanes, so a simdgroup takes several rows in one step.
ATTEND = """
    constexpr uint LANES = D / 16, AT_ONCE = 32 / LANES;
    threadgroup float query[GQA][D];
    threadgroup float weights[ROWS][GQA];
    threadgroup ulong starts[ROWS];
    const uint split = threadgroup_position_in_grid.x, n_splits = threadgroups_per_grid.x;
    const uint head = threadgroup_position_in_grid.y, n_heads = threadgroups_per_grid.y;
    const uint batch = threadgroup_position_in_grid.z, pair = batch * n_heads + head;
    const uint index = thread_index_in_threadgroup, n_threads = threads_per_threadgroup.x;
    const uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const uint n_sg = simdgroups_per_threadgroup;
    const uint n_rows = keys_shape[2], first = split * ROWS, n = min(uint(ROWS), n_rows - first);
    $values

    for (uint i = index; i < GQA * D; i += n_threads)
        query[i / D][i % D] = float(queries[pair * GQA * D + i]) * scale;
    for (uint r = index; r < n; r += n_threads) {
        const uint row = GATHER ? uint(rows[pair * n_rows + first + r]) : first + r;
        starts[r] = source.start(row);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint part = lane % LANES;
    const device T* key0 = keys + batch * keys_strides[0] + head * keys_strides[1];
    for (uint r0 = sg * AT_ONCE; r0 < n; r0 += n_sg * AT_ONCE) {
        const uint r = r0 + lane / LANES;
        const device T* key = key0 + (first + min(r, n - 1)) * keys_strides[2];
        float x[16];
        for (uint j = 0; j < 4; j++)
            for (uint i = 0; i < 4; i++) x[j * 4 + i] = float(key[(j * LANES + part) * 4 + i]);
        for (uint h = 0; h < GQA; h++) {
            float score = 0;
            for (uint j = 0; j < 4; j++)
                for (uint i = 0; i < 4; i++)
                    score = fma(x[j * 4 + i], query[h][(j * LANES + part) * 4 + i], score);
            for (ushort step = LANES / 2; step > 0; step /= 2)
                score += simd_shuffle_xor(score, step);
            if (part == 0 && r < n) weights[r][h] = score;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // Other layouts would be read wrongly: they come out as NaN.
    const bool is_readable = keys_strides[3] == 1 && source.has_whole_rows;
    for (uint h = sg; h < GQA; h += n_sg) {
        float top = -INFINITY, total = 0;
        for (uint r = lane; r < n; r += 32) top = max(top, weights[r][h]);
        top = simd_max(top);
        for (uint r = lane; r < n; r += 32) {
            weights[r][h] = exp(weights[r][h] - top);
            total += weights[r][h];
        }
        total = simd_sum(total);
        if (lane == 0) {
            tops[(pair * n_splits + split) * GQA + h] = top;
            totals[(pair * n_splits + split) * GQA + h] = is_readable ? total : NAN;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const uint width = source.width;
    device float* sum0 = sums + ulong(pair * n_splits + split) * GQA * width;
    for (uint column = index * VEC; column < width; column += n_threads * VEC) {
        float sum[GQA][VEC] = {};
        // eight rows in flight hide the latency of their loads
        #pragma clang loop unroll_count(8)
        for (uint r = 0; r < n; r++) {
            float value[VEC];
            source.load(starts[r], column, value);
            for (uint h = 0; h < GQA; h++)
                for (uint i = 0; i < VEC; i++) sum[h][i] = fma(weights[r][h], value[i], sum[h][i]);
        }
        for (uint h = 0; h < GQA; h++)
            for (uint i = 0; i < VEC; i++) sum0[h * width + column + i] = sum[h][i];
    }
"""

# One thread a column of a query head: first the latent's columns, then the dense values'.
MERGE = """
    const uint column = thread_position_in_grid.x, head = thread_position_in_grid.y;
    const uint pair = head / GQA, h = head % GQA;
    const uint n_latent = latent_tops_shape[2], n_dense = dense_tops_shape[2];
    const uint rank = latent_sums_shape[4], value_dim = dense_sums_shape[4];
    if (column >= rank + value_dim) return;

    float top = -INFINITY, total = 0, sum = 0;
    for (uint s = 0; s < n_latent; s++)
        top = max(top, latent_tops[(pair * n_latent + s) * GQA + h]);
    for (uint s = 0; s < n_dense; s++)
        top = max(top, dense_tops[(pair * n_dense + s) * GQA + h]);
    for (uint s = 0; s < n_latent; s++) {
        const uint at = (pair * n_latent + s) * GQA + h;
        const float weight = exp(latent_tops[at] - top);
        total = fma(weight, latent_totals[at], total);
        if (column < rank) sum = fma(weight, latent_sums[ulong(at) * rank + column], sum);
    }
    for (uint s = 0; s < n_dense; s++) {
        const uint at = (pair * n_dense + s) * GQA + h;
        const float weight = exp(dense_tops[at] - top);
        total = fma(weight, dense_totals[at], total);
        if (column >= rank)
            sum = fma(weight, dense_sums[ulong(at) * value_dim + column - rank], sum);
    }
    if (column < rank) latent[head * rank + column] = T(sum / total);
    else dense[head * value_dim + column - rank] = T(sum / total);
"""


def columns_per_thread(values: Factor) -> int:
    """Neighbouring columns that a thread loads at once: they divide the width and leave work for
    128 threads. The columns of a packed latent come in fours."""
    if isinstance(values, Packed):
        return 4
    width = values.shape[-1]
    return next((n for n in (4, 2) if width % n == 0 and width // n >= 128), 1)


def attend(
    queries: Array, rows: Array, keys: Array, values: Factor, scale: float, *, is_gathered: bool
) -> list[Array]:
    """Attention over parts of ROWS rows.

    Args:
        queries: ``[B, n_heads, 1, head_dim]``, row contiguous.
        rows: Row numbers in ``values``, ``[B, n_kv_heads, n_rows]``, row contiguous.
        keys: ``[B, n_kv_heads, n_rows, head_dim]``; any strides but the last, which is 1.
        values: ``[B, n_kv_heads, L, width]``, likewise, or packed ``[B, L, width]`` for all heads.
        scale: Factor on the scores.
        is_gathered: Whether values are those of ``rows``; otherwise they lie beside their keys.

    Returns:
        The parts' largest scores and sums of weights, ``[B, n_kv_heads, n_parts, GQA]``, and
        weighted sums ``[B, n_kv_heads, n_parts, GQA, width]``, float32.
    """
    batch, n_kv_heads, n_rows, head_dim = keys.shape
    width, gqa = values.shape[-1], queries.shape[1] // n_kv_heads
    vec, n_parts = columns_per_thread(values), -(-n_rows // ROWS)
    n_threads = min(256, max(128, -(-width // (32 * vec)) * 32))
    layout = latents.layout_of(values)
    kernel = common.build(
        "attend_rows" + latents.suffix(layout),
        (
            *(latents.input_names(layout) if layout else ("values",)),
            *("queries", "rows", "keys", "scale"),
        ),
        ("tops", "totals", "sums"),
        latents.fill_in(
            ATTEND.replace("$values", LATENT_VALUES if layout else STRIDED_VALUES), layout
        ),
        header=HEADER,
        copies_strided_inputs=bool(layout),
    )
    shape = (batch, n_kv_heads, n_parts, gqa)
    return kernel(
        inputs=[*latents.inputs(values), queries, rows, keys, scale],
        template=[
            ("T", queries.dtype),
            ("D", head_dim),
            ("GQA", gqa),
            ("VEC", vec),
            ("ROWS", ROWS),
            ("GATHER", is_gathered),
        ],
        grid=(n_parts * n_threads, n_kv_heads, batch),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[shape, shape, (*shape, width)],
        output_dtypes=[mx.float32] * 3,
    )


def merge(parts: list[Array], dense_parts: list[Array], dtype: mx.Dtype) -> list[Array]:
    """Put the parts of :func:`attend` together.

    Returns:
        Weighted sums of latent rows ``[B, n_kv_heads, GQA, rank_v]`` and of dense values
        ``[B, n_kv_heads, GQA, value_dim]``; the weights of both together add up to 1.
    """
    batch, n_kv_heads, _, gqa, rank = parts[2].shape
    value_dim = dense_parts[2].shape[-1]
    kernel = common.build(
        "merge_parts",
        (
            *("latent_tops", "latent_totals", "latent_sums"),
            *("dense_tops", "dense_totals", "dense_sums"),
        ),
        ("latent", "dense"),
        MERGE,
        header="",
    )
    return kernel(
        inputs=[*parts, *dense_parts],
        template=[("T", dtype), ("GQA", gqa)],
        grid=(-(-(rank + value_dim) // 128) * 128, batch * n_kv_heads * gqa, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(batch, n_kv_heads, gqa, rank), (batch, n_kv_heads, gqa, value_dim)],
        output_dtypes=[dtype] * 2,
    )


class SelectedAttention:
    """:func:`xkv.ops.selection.selected_attention` in two kernels and one product.

    ``attend`` runs twice, over the selected rows (keys from the backend's ``reconstruct_rows``,
    values gathered in the latent) and over the dense rows, and leaves a softmax of its own for each
    128 rows; ``merge`` puts those together. The latent sums then take one product with ``basis_v``.

    Limits: float32, float16 or bfloat16; one query; head_dim 64, 128 or 256; up to 16 query heads
    to a KV head. Any ranks, value_dim and numbers of rows; ranks that are multiples of 4, or of 2
    from 256 on, are loaded fastest. Keys, values and the latent may have any strides, but features
    must lie side by side: otherwise the result is NaN.

    For each token, KV head and row: ``head_dim + rank_v`` elements read once (dense rows
    ``head_dim + value_dim``) and ``2 * gqa`` times as many floating point operations, ``gqa`` query
    heads to a KV head. The parts' sums add ``8 * gqa / 128`` bytes to an element of the values.
    With head_dim 128, rank_v 384, float16 and gqa 4 that is 1,120 bytes and 4,096 operations a row,
    so memory bounds it. The plain twin also writes and reads back the gathered latent, ``4 *
    rank_v`` bytes a row more. A packed latent is read packed, ``bits / 8`` bytes a number and two
    scales a group, and widened in registers.

    Args:
        backend: Reconstructs the selected rows' keys.
    """

    name = "selected_attention"
    takes_packed = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def why_not(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        problem = common.dtype_problem(
            queries=queries,
            keys=keys,
            values=values,
            latent_k=segment.latent_k,
            latent_v=segment.latent_v,
            basis_v=segment.basis_v,
        )
        if problem:
            return problem
        n_heads, n_queries, head_dim = queries.shape[1:]
        gqa = n_heads // keys.shape[1]
        if n_queries != 1:
            return f"the kernel takes one token at a time, not {n_queries}"
        if head_dim not in common.HEAD_DIMS:
            allowed = ", ".join(map(str, common.HEAD_DIMS))
            return f"the kernel takes head_dim {allowed}, not {head_dim}"
        if gqa > MAX_GQA:
            return f"the kernel takes up to {MAX_GQA} query heads to a KV head, not {gqa}"
        if values.size < 8:
            # MLX passes smaller arrays in another address space
            return f"the kernel takes dense values of 8 elements or more, not {values.size}"
        return latents.problem(segment.latent_v)

    def sample(self, backend: Backend, *args: Any) -> tuple[Any, ...]:
        """Both kernels' parts: several of ROWS rows, the last one not full."""
        queries, segment, _, chunk_size, keys, values, _ = args
        n_kv_heads, head_dim = keys.shape[1], keys.shape[-1]
        n_chunks, n_dense = -(-ROWS // chunk_size) + 1, ROWS + 3
        n_rows, value_dim = 2 * n_chunks * chunk_size, values.shape[-1]
        rank_k, rank_v = min(segment.latent_k.shape[-1], 32), segment.latent_v.shape[-1]
        latent_k = small_latent(backend, segment.latent_k, n_rows, rank_k, 0)
        latent_v = small_latent(backend, segment.latent_v, n_rows, rank_v, 1)
        rank_k, rank_v = latent_k.shape[-1], latent_v.shape[-1]
        seeds = iter(range(2, 7))

        def array(*shape: int, size: float = 1.0) -> Array:
            return (backend.normal(shape, next(seeds)) * size).astype(queries.dtype)

        small = Segment(
            latent_k,
            latent_v,
            array(1, rank_k, n_kv_heads, head_dim, size=rank_k**-0.5),
            array(1, rank_v, n_kv_heads, value_dim, size=rank_v**-0.5),
            segment.start,
            (RopeRun(n_rows, segment.rope_runs[0].spec),),
        )
        chunks = mx.broadcast_to(mx.arange(n_chunks) * 2 + 1, (1, n_kv_heads, n_chunks))
        return (
            array(1, queries.shape[1], 1, head_dim, size=3.0),
            small,
            chunks,
            chunk_size,
            array(1, n_kv_heads, n_dense, head_dim),
            array(1, n_kv_heads, n_dense, value_dim),
            head_dim**-0.5,
        )

    def check_key(self, *args: Any) -> tuple[Any, ...]:
        """The dtype's name and the template's values."""
        queries, segment, _, _, keys, values, _ = args
        return (
            common.dtype_name(queries),
            keys.shape[-1],
            queries.shape[1] // keys.shape[1],
            *map(columns_per_thread, (segment.latent_v, values)),
            latents.layout_of(segment.latent_k),
            latents.layout_of(segment.latent_v),
        )

    def __call__(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> Array:
        queries = mx.contiguous(queries)
        # an element-wise result keeps the strides of its inputs: broadcast chunks make such rows
        rows = mx.contiguous(chunk_rows(self._backend, chunks.astype(mx.int32), chunk_size))
        selected = self._backend.reconstruct_rows(segment, rows)
        latent_v = segment.latent_v
        if not isinstance(latent_v, Packed):
            # one latent serves all KV heads: stride 0 instead of a copy for each
            shape = (*keys.shape[:2], *latent_v.shape[1:])
            latent_v = mx.broadcast_to(latent_v[:, None], shape)
        parts = attend(queries, rows, selected, latent_v, scale, is_gathered=True)
        dense_parts = attend(queries, rows, keys, values, scale, is_gathered=False)
        latent, dense = merge(parts, dense_parts, queries.dtype)
        output = mx.addmm(dense, latent, segment.basis_v.transpose(0, 2, 1, 3))
        return output.reshape(*queries.shape[:3], values.shape[-1])
