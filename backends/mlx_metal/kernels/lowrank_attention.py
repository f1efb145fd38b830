"""Dense decode over a whole segment: scores in one kernel, keys only ever in threadgroup memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common, latents
from xkv.ops.attention import raised_weights
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.types import Array, Segment

HEADER = common.ROPE_SOURCE + common.PRODUCT_SOURCE

# A threadgroup scores ROWS rows for the query heads of one KV head: rows of the segment, whose keys
# it makes, or, in the last threadgroups, dense rows. A lane holds D / 64 pairs of a row's features.
SOURCE = """
  using tiles = tiling<T, D, ROWS, DEPTH>;
  constexpr int rows_per_simdgroup = 256 / D, pairs_per_lane = D / 64;
  threadgroup float4 shared[tiles::shared_float4s];
  threadgroup int row_numbers[ROWS];
  const int head = threadgroup_position_in_grid.x, batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_rows = $n_latent_rows, n_dense = keys_shape[2];
  const int64_t first_row = int64_t(batch) * n_rows;
  const auto latent_k = $latent;
  const int n_heads = queries_shape[1], n_kv_heads = threadgroups_per_grid.x;
  const int gqa = n_heads / n_kv_heads, n_pairs = rope_shape[0] - 1;
  const int tile = threadgroup_position_in_grid.y, n_lowrank_tiles = (n_rows + ROWS - 1) / ROWS;
  const bool is_dense = tile >= n_lowrank_tiles;
  const int first = (is_dense ? tile - n_lowrank_tiles : tile) * ROWS;
  const int end = min(ROWS, (is_dense ? n_dense : n_rows) - first);
  const int64_t query_head = int64_t(batch) * n_heads + head * gqa;
  const device T* query = queries + query_head * D;
  device float* to = scores + query_head * (n_rows + n_dense) + (is_dense ? n_rows : 0) + first;

  simdgroup_float8x8 product[4][4];
  if (!is_dense) {
    for (int i = thread_index; i < ROWS; i += tiles::n_threads)
      row_numbers[i] = i < end ? first + i : -1;
    multiply_rows<T, D, ROWS, DEPTH>(
        product, shared, row_numbers, latent_k,
        basis_k + (int64_t(batch) * latent_k.width * n_kv_heads + head) * D, n_kv_heads * D,
        thread_index, sg);
  }
#pragma clang loop unroll(full)
  for (int band = 0; band < 4; band++) {
    threadgroup const float* band_keys = (threadgroup const float*)shared;
    if (!is_dense)
      band_keys = share_band<T, D, ROWS, DEPTH>(product, band, shared, sg);
    for (int i = 0; i < rows_per_simdgroup; i++) {
      const int band_row = sg * rows_per_simdgroup + i;
      const int row = tile_row(band, band_row);
      if (row >= end) continue;
      float2 key[pairs_per_lane];
      for (int j = 0; j < pairs_per_lane; j++) {
        const int pair = lane + j * 32;
        const int2 at = pair_features(pair, n_pairs, TRADITIONAL);
        if (is_dense) {
          const int64_t dense_row = batch * keys_strides[0] + head * keys_strides[1] +
                                    (first + row) * keys_strides[2];
          key[j].x = float(keys[dense_row + at.x * keys_strides[3]]);
          key[j].y = float(keys[dense_row + at.y * keys_strides[3]]);
        } else {
          threadgroup const float* from = band_keys + band_row * tiles::band_stride;
          key[j] = float2(from[at.x], from[at.y]);
          if (pair < n_pairs)
            key[j] = turn_pair(key[j] * rope[0], float(start + first + row) * rope[1 + pair]);
        }
      }
      for (int g = 0; g < gqa; g++) {
        float score = 0;
        for (int j = 0; j < pairs_per_lane; j++) {
          const int2 at = pair_features(lane + j * 32, n_pairs, TRADITIONAL);
          score = fma(key[j].x, float(query[g * D + at.x]), score);
          score = fma(key[j].y, float(query[g * D + at.y]), score);
        }
        score = simd_sum(score);
        if (lane == 0) to[int64_t(g) * (n_rows + n_dense) + row] = score * scale;
      }
    }
  }
"""


class LowrankAttention:
    """The kernel of :func:`xkv.ops.attention.lowrank_attention`.

    Each tile of rows is multiplied out, rotated and scored against all query heads of its KV head
    in threadgroup memory, so keys never reach device memory; dense rows are further tiles. What
    reaches it are the scores, in float32. The rest is MLX's softmax and products: weights times
    ``latent_v`` for all heads at once, then ``basis_v``.

    An online softmax with the value side in the same kernel would read ``latent_v`` once for each
    KV head (here: once), keep ``n_heads / n_kv_heads * rank_v`` accumulators in every threadgroup,
    which limits the rank, and need a pass that merges them. The price of the scores is 20 bytes a
    head and row: written (4), normalized (4 + 4), rounded (4 + 2), applied (2).

    Limits: float32, float16 or bfloat16; head_dim 64, 128 or 256; one rotation for all rows; one
    query and no mask; at least one dense row. Any ranks, any value_dim, any GQA ratio.

    For each row of a segment: ``2 * n_kv_heads * rank_k * head_dim + 2 * n_heads * (head_dim +
    rank_v)`` floating point operations, and from device memory ``rank_k + rank_v`` elements and
    ``20 * n_heads`` bytes. With 32 heads, 8 KV heads, head_dim 128 and ranks 512 in float16 that is
    1.1 million operations on 2.7 kB: arithmetic bounds it, not memory.

    Packed latents are read packed, ``bits / 8`` bytes a number and two scales a group: ``latent_k``
    by the kernel, which widens it on its way to threadgroup memory, ``latent_v`` part by part by
    MLX's quantized product, which already is the one pass over it that is needed.

    Args:
        backend: Weights the rows of a packed ``latent_v``.
    """

    name = "lowrank_attention"
    takes_packed = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def why_not(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> str | None:
        if mask is not None:
            return "the kernel takes no mask"
        if queries.shape[-2] != 1:
            return f"the kernel takes one query, not {queries.shape[-2]}"
        if keys.shape[-2] == 0:
            return "there are no dense rows"
        return (
            common.device_problem()
            or common.dtype_problem(
                queries=queries, keys=keys, values=values, **_segment_arrays(segment)
            )
            or common.product_problem(segment)
        )

    def sample(
        self,
        backend: Backend,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> tuple[Any, ...]:
        small = common.sample_segment(backend, segment, 70)
        n_kv_heads, head_dim = small.basis_k.shape[2:]
        gqa = queries.shape[1] // keys.shape[1]
        shapes = [
            (1, n_kv_heads * gqa, 1, head_dim),
            (1, n_kv_heads, 5, head_dim),
            (1, n_kv_heads, 5, values.shape[-1]),
        ]
        small_queries, *dense = [
            backend.normal(shape, seed).astype(queries.dtype)
            for seed, shape in enumerate(shapes, start=4)
        ]
        return small_queries * 3, small, *dense, head_dim**-0.5

    def check_key(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> tuple[Any, ...]:
        return *common.product_key(segment), latents.layout_of(segment.latent_v)

    def __call__(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> Array:
        batch, n_heads, _, _ = queries.shape
        n_kv_heads, n_rows = keys.shape[1], segment.latent_k.shape[1]
        weights = mx.softmax(key_scores(queries, segment, keys, scale), axis=-1)
        weights, raised = raised_weights(self._backend, weights, queries.dtype)
        grouped = (batch, n_kv_heads, n_heads // n_kv_heads, -1)
        on_latent = weights[..., :n_rows]
        if isinstance(segment.latent_v, Packed):
            latent = segment.latent_v.weighted_sum(self._backend, on_latent)
        else:
            latent = on_latent @ segment.latent_v
        output = latent.reshape(grouped) @ segment.basis_v.transpose(0, 2, 1, 3)
        output = output + weights[..., n_rows:].reshape(grouped) @ values
        output = output if raised == 1 else output / raised
        return output.reshape(batch, n_heads, 1, values.shape[-1])


def key_scores(queries: Array, segment: Segment, keys: Array, scale: float) -> Array:
    """Scaled products of one query a head with a segment's keys, then the dense ones.

    Returns:
        ``[B, n_heads, L + D]`` float32.
    """
    batch, n_heads, _, head_dim = queries.shape
    n_kv_heads, n_dense = keys.shape[1:3]
    n_rows = segment.latent_k.shape[1]
    tile = common.tile_rows(head_dim)
    layout = latents.layout_of(segment.latent_k)
    kernel = common.build(
        LowrankAttention.name + latents.suffix(layout),
        (*latents.input_names(layout), "queries", "basis_k", "keys", "rope", "start", "scale"),
        ("scores",),
        latents.fill_in(SOURCE, layout),
        HEADER,
        copies_strided_inputs=False,  # dense keys are a part of a larger buffer
    )
    (scores,) = kernel(
        inputs=[
            *map(mx.contiguous, (*latents.inputs(segment.latent_k), queries, segment.basis_k)),
            keys,
            common.rope_numbers(segment),
            segment.start,
            scale,
        ],
        template=common.product_template(segment),
        # neighbouring threadgroups are the KV heads, which read the same latent rows
        grid=(
            n_kv_heads * common.n_threads(head_dim),
            -(-n_rows // tile) + -(-n_dense // tile),
            batch,
        ),
        threadgroup=(common.n_threads(head_dim), 1, 1),
        output_shapes=[(batch, n_heads, n_rows + n_dense)],
        output_dtypes=[mx.float32],
    )
    return scores


def _segment_arrays(segment: Segment) -> dict[str, Array]:
    names = ("latent_k", "latent_v", "basis_k", "basis_v")
    return {name: getattr(segment, name) for name in names}
