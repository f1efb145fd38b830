"""Weighted sums of some rows of a latent: gather, unpack and sum in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import Array

QUERIES = 8
"""Of a threadgroup, whose sums a thread holds in registers: the usual queries of a KV head."""
ROWS = 128
"""That a threadgroup sums at a time, four a thread."""

# A threadgroup makes N columns of one KV head's sums for QUERIES queries. A thread adds up eight
# columns of every ROWS-th four rows, whose weights are neighbours.
SOURCE = """
  using tiles = tiling<T, N, ROWS, DEPTH>;
  constexpr int n_simdgroups = tiles::n_threads / 32;
  threadgroup float shared[n_simdgroups][QUERIES][N];
  const int batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_kv_heads = rows_shape[1], n = rows_shape[2], n_queries = weights_shape[2];
  const int n_tiles = (n_queries + QUERIES - 1) / QUERIES;
  const int head = threadgroup_position_in_grid.x / n_tiles;
  const int query = threadgroup_position_in_grid.x % n_tiles * QUERIES;
  const int n_summed = min(QUERIES, n_queries - query);
  const int first_column = threadgroup_position_in_grid.y * N;
  const int64_t kv_head = int64_t(batch) * n_kv_heads + head;
  const int64_t first_query = kv_head * n_queries + query;
  const device T* from = weights + first_query * n;

  float sums[QUERIES][8];
#pragma clang loop unroll(full)
  for (int q = 0; q < QUERIES; q++) {
#pragma clang loop unroll(full)
    for (int c = 0; c < 8; c++) sums[q][c] = 0.0f;
  }
  const int column = first_column + thread_index % 8 * 8;
  for (int first = thread_index / 8 * 4; first < n; first += ROWS) {
    eight<T> x[4];
#pragma clang loop unroll(full)
    for (int k = 0; k < 4; k++) {
      x[k] = {vec<T, 4>(T(0)), vec<T, 4>(T(0))};
      if (first + k < n) x[k] = stored.load(rows[kv_head * n + first + k], column);
    }
#pragma clang loop unroll(full)
    for (int q = 0; q < QUERIES; q++) {
      if (q >= n_summed) continue;
      vec<T, 4> weight = load_four(from + q * n + first, n - first);
#pragma clang loop unroll(full)
      for (int k = 0; k < 4; k++) {
#pragma clang loop unroll(full)
        for (int c = 0; c < 4; c++) {
          sums[q][c] = fma(float(weight[k]), float(x[k].low[c]), sums[q][c]);
          sums[q][c + 4] = fma(float(weight[k]), float(x[k].high[c]), sums[q][c + 4]);
        }
      }
    }
  }
  // of a simdgroup's threads, every eighth has the same columns
#pragma clang loop unroll(full)
  for (int q = 0; q < QUERIES; q++) {
    if (q >= n_summed) continue;
#pragma clang loop unroll(full)
    for (int c = 0; c < 8; c++) {
      float sum = sums[q][c] + simd_shuffle_xor(sums[q][c], 8);
      sum += simd_shuffle_xor(sum, 16);
      if (thread_index % 32 < 8) shared[sg][q][thread_index % 8 * 8 + c] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_index; e < n_summed * N; e += tiles::n_threads) {
    const int q = e / N, c = e % N;
    if (first_column + c >= stored.width) continue;
    float sum = 0.0f;
    for (int i = 0; i < n_simdgroups; i++) sum += shared[i][q][c];
    out[(first_query + q) * stored.width + first_column + c] = T(sum);
  }
"""


class WeighRows:
    """The kernel of :func:`xkv.ops.attention.weigh_rows`.

    Limits: a latent and weights of one dtype, float32, float16 or bfloat16; 8 weights or more. Any
    rank, any bits, any number of rows and queries. Sums are in float32.

    A threadgroup of 256 threads makes 64 columns of one KV head's sums for 8 queries, all rows in
    it: rows need no splitting, as ranks of 500 to 2,500 and 8 KV heads are 64 to 320 threadgroups.

    For each row and KV head, with M queries: ``2 * M * rank`` floating point operations and one
    conversion a number; from device memory the row, ``rank`` elements, or packed ``bits / 8`` bytes
    a number and two elements a band, read once for each 8 queries, the later times from cache.
    Each band also reads the head's weights, M elements a row, from cache; ``M * rank`` elements a
    KV head are written. At 4 queries in 16 bits that is 4 operations a byte, packed in 3 bits 18:
    memory bounds it, not arithmetic. The plain twin also writes and reads back the gathered rows,
    packed and widened: 3 times the bytes of a plain latent, 12 times of one in 3 bits.

    The sources depend on dtype and whether the latent is packed.
    """

    name = "weigh_rows"

    def why_not(self, latent: Latent, rows: Array, weights: Array) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        if rows.shape[-1] == 0:
            return "no rows are to be weighed"
        return common.dtype_problem(latent=latent, weights=weights) or common.size_problem(
            weights, *latent.arrays
        )

    def sample(
        self, backend: Backend, latent: Latent, rows: Array, weights: Array
    ) -> tuple[Any, ...]:
        """Two KV heads; rows and queries a tile and some more."""
        small = common.sample_latent(backend, latent, 160)
        numbers = mx.array([[[7 * i % 160 for i in range(ROWS + 13)], [*range(ROWS + 12, -1, -1)]]])
        drawn = backend.normal((1, 2, QUERIES + 3, ROWS + 13), 1)
        return small, numbers, drawn.astype(weights.dtype)

    def check_key(self, latent: Latent, rows: Array, weights: Array) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        return common.dtype_name(weights), latent.is_packed

    def __call__(self, latent: Latent, rows: Array, weights: Array) -> Array:
        batch, n_kv_heads, n_queries, _ = weights.shape
        return common.launch(
            self.name,
            "",
            SOURCE,
            latent,
            {"rows": rows.astype(mx.int32), "weights": weights},
            {"N": BAND, "ROWS": ROWS, "QUERIES": QUERIES},
            # neighbouring threadgroups read the same rows or, of other KV heads, some of them
            n_tiles=(n_kv_heads * -(-n_queries // QUERIES), -(-latent.rank // BAND), batch),
            shape=(batch, n_kv_heads, n_queries, latent.rank),
            dtype=weights.dtype,
        )


KERNEL = WeighRows()
