"""How much queries want each row: the index's columns unpacked and scored in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.index import BLOCK, n_columns
from xkv.ops.sequences import AnyLatent
from xkv.ops.types import Array

ROWS, QUERIES = 128, 32
"""Of a threadgroup's tile; a block of rows is a whole number of tiles."""

HEADER = """
// What of a row is scored: the first band's columns, then the middle of each other band.
template <typename T>
struct index_columns {
  packed_rows<T> stored;
  int width;

  eight<T> load(int64_t row, int column) const {
    if (column < 64) return stored.load(row, column);
    return {middles(row, column - 63), middles(row, column - 59)};
  }

  // Of four bands. The square root of a band's 64 columns is 8.
  vec<T, 4> middles(int64_t row, int band) const {
    vec<T, 4> x = vec<T, 4>(T(0));
    for (int i = 0; i < min(4, stored.n_bands - band); i++) {
      const int64_t at = row * stored.n_bands + band + i;
      const float middle = float((1 << stored.bands[2 * (band + i)]) - 1) / 2;
      x[i] = T(fma(float(stored.scales[at]), middle, float(stored.biases[at])) * 8);
    }
    return x;
  }
};

template <typename T>
METAL_FUNC index_columns<T> columns_of(packed_rows<T> stored, int width) {
  return {stored, width};
}

template <typename T>
METAL_FUNC plain_rows<T> columns_of(plain_rows<T> stored, int width) {
  return {stored.numbers, stored.rank, width};
}
"""

# A threadgroup scores ROWS rows of one block for all queries, N of them at a time; a thread looks
# after the row of its number.
SOURCE = """
  using tiles = tiling<T, N, ROWS, DEPTH>;
  threadgroup float4 shared[tiles::shared_float4s];
  threadgroup int row_numbers[ROWS];
  const int batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_blocks = absorbed_shape[1], n = absorbed_shape[2], n_queries = absorbed_shape[3];
  const int first = threadgroup_position_in_grid.x * ROWS, row = first + thread_index;
  const int block = n_blocks == 1 ? 0 : first / BLOCK;
  const auto queries = absorbed + int64_t(batch * n_blocks + block) * n * n_queries;
  const int group = n_queries / n_kv_heads;
  device float* scores = out + int64_t(batch) * n_kv_heads * n_longest + row;

  row_numbers[thread_index] = row < n_rows ? row : -1;
  int n_seen = 0;
  float largest = -INFINITY;
  for (int query = 0; query < n_queries; query += N) {
    simdgroup_float8x8 product[4][4];
    multiply_rows<T, N, ROWS, DEPTH>(
        product, shared, row_numbers, columns_of(stored, n), queries + query, n_queries,
        n_queries - query, thread_index, sg);
#pragma clang loop unroll(full)
    for (int quarter = 0; quarter < 4; quarter++) {
      threadgroup const float* shown =
          share_quarter<T, N, ROWS, DEPTH>(product, quarter, shared, sg);
      const int i = thread_index / 32 * 8 + thread_index % 8;
      if (row >= n_longest || tile_row(quarter, i) != thread_index) continue;
      for (int q = 0; q < min(N, n_queries - query); q++) {
        const float offset = offsets[batch * n_queries + query + q];
        largest = max(largest, shown[i * tiles::quarter_stride + q] - offset);
        if (++n_seen < group) continue;
        *scores = row < n_rows ? largest : -INFINITY;
        scores += n_longest;
        largest = -INFINITY;
        n_seen = 0;
      }
    }
  }
"""


class IndexScores:
    """The kernel of :func:`xkv.ops.index.index_scores`.

    Limits: queries and a latent of one dtype, float32, float16 or bfloat16; offsets in float32. Any
    bits, any number of rows, columns and queries.

    For each row, with n columns, Q queries and b bands, in 16 bits: ``8 * bits`` bytes of the first
    band's words (plain, ``2 * n`` bytes) and ``4 * b`` of scales and biases, read once for each 32
    queries, the later times from cache; ``4 * n_kv_heads`` bytes written; ``2 * n * Q`` floating
    point operations. The queries, ``2 * n * Q`` bytes a block of 256 rows, are read by two tiles.
    With 12 bands, 8 bits in the first, 8 KV heads and 32 queries: 144 bytes a row, 19 for its share
    of the queries, and 4,800 operations, 29 a byte: memory takes about as long as arithmetic. The
    plain twin also writes and reads back the columns and all products, at least 428 bytes a row.

    The sources depend on dtype and whether the latent is packed.
    """

    name = "index_scores"

    def why_not(
        self, absorbed: Array, latent: AnyLatent, offsets: Array, n_kv_heads: int
    ) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        if common.dtype_name(offsets) != "float32":
            return f"the kernel takes offsets in float32, not {common.dtype_name(offsets)}"
        return (
            common.dtype_problem(absorbed=absorbed, latent=latent)
            or common.latent_problem(latent)
            or common.size_problem(absorbed)
        )

    def sample(self, backend: Backend, *args: Any) -> tuple[Any, ...]:
        """Two blocks, and KV heads whose queries are in two tiles."""
        absorbed, latent, _, _ = args
        small = common.sample_latent(backend, latent, BLOCK + ROWS + 5)
        batch, n, n_kv_heads, n_queries = len(small.parts), n_columns(small), 4, 40
        few = backend.normal((batch, 2, n, n_queries), 1) * n**-0.5
        offsets = backend.normal((batch, n_queries), 2)
        return few.astype(absorbed.dtype), small, offsets, n_kv_heads

    def check_key(self, absorbed: Array, latent: AnyLatent, *_: Any) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        return common.dtype_name(absorbed), latent.is_packed, common.are_several_of(latent)

    def __call__(
        self, absorbed: Array, latent: AnyLatent, offsets: Array, n_kv_heads: int
    ) -> Array:
        batch, n_rows = latent.shape[:2]
        return common.launch(
            self.name,
            HEADER,
            SOURCE,
            latent,
            {"absorbed": absorbed, "offsets": offsets, "n_kv_heads": n_kv_heads},
            {"N": QUERIES, "ROWS": ROWS, "BLOCK": BLOCK},
            n_tiles=(-(-n_rows // ROWS), 1, batch),
            shape=(batch, n_kv_heads, n_rows),
            dtype=mx.float32,
        )


KERNEL = IndexScores()
