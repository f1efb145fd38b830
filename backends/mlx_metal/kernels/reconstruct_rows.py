"""Rotated keys of selected rows: gather, low-rank product and RoPE in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common, latents
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Segment

HEADER = common.ROPE_SOURCE + common.PRODUCT_SOURCE

# A threadgroup makes ROWS selected rows of one KV head.
SOURCE = """
  using tiles = tiling<T, D, ROWS, DEPTH>;
  threadgroup float4 shared[tiles::shared_float4s];
  threadgroup int row_numbers[ROWS];
  const int head = threadgroup_position_in_grid.x, batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_rows = $n_latent_rows, n_kv_heads = threadgroups_per_grid.x;
  const int64_t first_row = int64_t(batch) * n_rows;
  const auto latent_k = $latent;
  const int n_selected = rows_shape[2], n_pairs = rope_shape[0] - 1;
  const int first = threadgroup_position_in_grid.y * ROWS;
  const int end = min(ROWS, n_selected - first);
  const int64_t selected = int64_t(batch * n_kv_heads + head) * n_selected + first;

  for (int i = thread_index; i < ROWS; i += tiles::n_threads)
    row_numbers[i] = i < end ? int(rows[selected + i]) : -1;
  simdgroup_float8x8 product[4][4];
  multiply_rows<T, D, ROWS, DEPTH>(
      product, shared, row_numbers, latent_k,
      basis_k + (int64_t(batch) * latent_k.width * n_kv_heads + head) * D, n_kv_heads * D,
      thread_index, sg);
#pragma clang loop unroll(full)
  for (int band = 0; band < 4; band++) {
    threadgroup const float* keys =
        share_band<T, D, ROWS, DEPTH>(product, band, shared, sg);
    for (int e = thread_index; e < tiles::band_rows * D / 2; e += tiles::n_threads) {
      const int band_row = e / (D / 2), pair = e % (D / 2);
      const int row = tile_row(band, band_row);
      if (row >= end) continue;
      const int2 at = pair_features(pair, n_pairs, TRADITIONAL);
      threadgroup const float* from = keys + band_row * tiles::band_stride;
      float2 x = float2(from[at.x], from[at.y]);
      if (pair < n_pairs)
        x = turn_pair(x * rope[0], float(start + row_numbers[row]) * rope[1 + pair]);
      device T* to = out + (selected + row) * D;
      to[at.x] = T(x.x);
      to[at.y] = T(x.y);
    }
  }
"""


class ReconstructRows:
    """The kernel of :func:`xkv.ops.selection.reconstruct_rows`.

    Limits: float32, float16 or bfloat16; head_dim 64, 128 or 256; one rotation for all rows. Any
    rank, any number of rows.

    For each selected row and KV head: ``2 * rank_k * head_dim`` floating point operations, and from
    device memory ``rank_k + head_dim`` elements; every tile of 64 rows (32 at head_dim 256) also
    reads the head's basis, ``rank_k * head_dim`` elements, from cache. The plain twin also writes
    and reads back the gathered rows and the product: ``2 * rank_k + 2 * head_dim`` elements more.
    At rank 384 and head_dim 128 that is 96 operations a byte of float16: arithmetic bounds it, not
    memory.

    A packed latent is read packed, ``bits / 8`` bytes a number and two scales a group, and widened
    on its way to threadgroup memory.
    """

    name = "reconstruct_rows"
    takes_packed = True

    def why_not(self, segment: Segment, rows: Array) -> str | None:
        if rows.shape[-1] == 0:
            return "no rows are selected"
        return (
            common.device_problem()
            or common.dtype_problem(latent_k=segment.latent_k, basis_k=segment.basis_k)
            or common.product_problem(segment)
        )

    def sample(self, backend: Backend, segment: Segment, rows: Array) -> tuple[Any, ...]:
        small = common.sample_segment(backend, segment, 80)
        numbers = mx.array([[[(7 * i) % 80 for i in range(70)], [*range(69, -1, -1)]]])
        return small, numbers.astype(rows.dtype)

    def check_key(self, segment: Segment, rows: Array) -> tuple[Any, ...]:
        return (*common.product_key(segment), rows.dtype)

    def __call__(self, segment: Segment, rows: Array) -> Array:
        batch, n_kv_heads, n_selected = rows.shape
        head_dim = segment.basis_k.shape[-1]
        layout = latents.layout_of(segment.latent_k)
        kernel = common.build(
            self.name + latents.suffix(layout),
            (*latents.input_names(layout), "basis_k", "rows", "rope", "start"),
            ("out",),
            latents.fill_in(SOURCE, layout),
            HEADER,
        )
        (keys,) = kernel(
            inputs=[
                *latents.inputs(segment.latent_k),
                segment.basis_k,
                rows,
                common.rope_numbers(segment),
                segment.start,
            ],
            template=common.product_template(segment),
            # neighbouring threadgroups are the KV heads, whose selected rows overlap
            grid=(
                n_kv_heads * common.n_threads(head_dim),
                -(-n_selected // common.tile_rows(head_dim)),
                batch,
            ),
            threadgroup=(common.n_threads(head_dim), 1, 1),
            output_shapes=[(batch, n_kv_heads, n_selected, head_dim)],
            output_dtypes=[segment.latent_k.dtype],
        )
        return keys


KERNEL = ReconstructRows()
