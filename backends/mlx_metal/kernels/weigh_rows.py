"""Attention over some rows of a latent: softmax, gather, unpack and sum in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.sequences import AnyLatent
from xkv.ops.types import Array

QUERIES = 8
"""Of a threadgroup, one a simdgroup; a thread holds their sums in registers."""
ROWS = 128
"""That a threadgroup sums at a time, four a thread."""

# A threadgroup makes N columns of one KV head's sums for QUERIES queries; that of the first columns
# also makes what is left of the attention beside. A simdgroup looks after one query's softmax: its
# weights are shared a piece of the rows at a time, and divided by their sum at the end. A thread
# adds up eight columns of every ROWS-th four rows, whose weights are neighbours.
SOURCE = """
  using tiles = tiling<T, N, ROWS, DEPTH>;
  constexpr int n_simdgroups = tiles::n_threads / 32, piece = n_simdgroups * N;
  threadgroup float4 fours[QUERIES][piece / 4];
  threadgroup float divisors[QUERIES], left[QUERIES];
  threadgroup float* shared = (threadgroup float*)fours;
  const int batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup, lane = thread_index % 32;
  const int n_kv_heads = rows_shape[1], n = rows_shape[2];
  const int n_queries = beside_shape[2], value_dim = beside_shape[3];
  const int n_tiles = (n_queries + QUERIES - 1) / QUERIES;
  const int head = threadgroup_position_in_grid.x / n_tiles;
  const int query = threadgroup_position_in_grid.x % n_tiles * QUERIES;
  const int n_summed = min(QUERIES, n_queries - query);
  const int first_column = threadgroup_position_in_grid.y * N;
  const int64_t kv_head = int64_t(batch) * n_kv_heads + head;
  const int64_t first_query = kv_head * n_queries + query;

  const bool is_asked = sg < n_summed;
  const auto of_query = scores + (first_query + sg) * n;
  const float total = is_asked ? totals[first_query + sg] : 0.0f;
  float largest = total, divisor = 0.0f;
  for (int i = lane; is_asked && i < n; i += 32) largest = max(largest, of_query[i]);
  largest = simd_max(largest);
  float sums[QUERIES][8];
#pragma clang loop unroll(full)
  for (int q = 0; q < QUERIES; q++) {
#pragma clang loop unroll(full)
    for (int c = 0; c < 8; c++) sums[q][c] = 0.0f;
  }
  const int column = first_column + thread_index % 8 * 8;
  for (int start = 0; start < n; start += piece) {
    const int n_here = min(piece, n - start);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // up to a whole number of fours
    for (int i = lane; is_asked && i < (n_here + 3) / 4 * 4; i += 32) {
      const float weight = i < n_here ? exp(of_query[start + i] - largest) : 0.0f;
      divisor += weight;
      shared[sg * piece + i] = weight;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int first = thread_index / 8 * 4; first < n_here; first += ROWS) {
      eight<T> x[4];
#pragma clang loop unroll(full)
      for (int k = 0; k < 4; k++) {
        x[k] = {vec<T, 4>(T(0)), vec<T, 4>(T(0))};
        if (first + k < n_here)
          x[k] = stored.load(rows[kv_head * n + start + first + k], column);
      }
#pragma clang loop unroll(full)
      for (int q = 0; q < QUERIES; q++) {
        if (q >= n_summed) continue;
        float4 weights = fours[q][first / 4];
#pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
#pragma clang loop unroll(full)
          for (int c = 0; c < 4; c++) {
            sums[q][c] = fma(weights[k], float(x[k].low[c]), sums[q][c]);
            sums[q][c + 4] = fma(weights[k], float(x[k].high[c]), sums[q][c + 4]);
          }
        }
      }
    }
  }
  divisor = simd_sum(divisor) + exp(total - largest);
  if (lane == 0) {
    divisors[sg] = divisor;
    left[sg] = exp(total - largest) / divisor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // of a simdgroup's threads, every eighth has the same columns
#pragma clang loop unroll(full)
  for (int q = 0; q < QUERIES; q++) {
    if (q >= n_summed) continue;
#pragma clang loop unroll(full)
    for (int c = 0; c < 8; c++) {
      float sum = sums[q][c] + simd_shuffle_xor(sums[q][c], 8);
      sum += simd_shuffle_xor(sum, 16);
      if (lane < 8) shared[q * piece + sg * N + lane * 8 + c] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_index; e < n_summed * N; e += tiles::n_threads) {
    const int q = e / N, c = e % N;
    if (first_column + c >= stored.width) continue;
    float sum = 0.0f;
    for (int i = 0; i < n_simdgroups; i++) sum += shared[q * piece + i * N + c];
    out[(first_query + q) * stored.width + first_column + c] = T(sum / divisors[q]);
  }
  if (first_column > 0) return;
  for (int e = thread_index; e < n_summed * value_dim; e += tiles::n_threads) {
    const int64_t at = first_query * value_dim + e;
    rest[at] = T(float(beside[at]) * left[e / value_dim]);
  }
"""


class WeighRows:
    """The kernel of :func:`xkv.ops.working_set.weigh_rows`.

    Limits: a latent and attention beside it of one dtype, float32, float16 or bfloat16; scores and
    totals in float32. Any rank, any bits, any number of rows and queries. The softmax and the sums
    are in float32.

    A threadgroup of 256 threads makes 64 columns of one KV head's sums for 8 queries, all rows in
    it: rows need no splitting, as ranks of 500 to 2,500 and 8 KV heads are 64 to 320 threadgroups.

    For each row and KV head, with M queries: ``2 * M * rank`` floating point operations and one
    conversion a number; from device memory the row, ``rank`` elements, or packed ``bits / 8`` bytes
    a number and two elements a band, read once for each 8 queries, the later times from cache.
    Each band also reads the head's scores, ``4 * M`` bytes a row, twice from cache, and makes M
    exponentials of them, one for each 128 operations; ``M * rank`` elements a KV head are written,
    and ``M * value_dim`` read and written. At 4 queries in 16 bits that is 4 operations a byte,
    packed in 3 bits 18: memory bounds it, not arithmetic. The plain twin also writes and reads back
    the weights and the gathered rows, packed and widened: 3 times the bytes of a plain latent, 12
    times of one in 3 bits.

    The sources depend on dtype and whether the latent is packed.
    """

    name = "weigh_rows"

    def why_not(
        self, latent: AnyLatent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        if rows.shape[-1] == 0:
            return "no rows are to be weighed"
        for name, x in (("scores", scores), ("totals", totals)):
            if common.dtype_name(x) != "float32":
                return f"the kernel takes {name} in float32, not {common.dtype_name(x)}"
        return common.dtype_problem(latent=latent, beside=beside) or common.latent_problem(latent)

    def sample(self, backend: Backend, *args: Any) -> tuple[Any, ...]:
        """Two KV heads; rows and queries a tile and some more."""
        latent, *_, beside = args
        small = common.sample_latent(backend, latent, 160)
        batch, n = len(small.parts), ROWS + 13
        numbers = mx.array([[[7 * i % 160 for i in range(n)], [*range(n - 1, -1, -1)]]] * batch)
        scores = backend.normal((batch, 2, QUERIES + 3, n), 1)
        # as much as all the rows
        totals = backend.normal((batch, 2, QUERIES + 3), 2) + 5
        others = backend.normal((batch, 2, QUERIES + 3, 24), 3)
        return small, numbers, scores, totals, others.astype(beside.dtype)

    def check_key(self, latent: AnyLatent, *args: Any) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        return common.dtype_name(latent), latent.is_packed, common.are_several_of(latent)

    def __call__(
        self, latent: AnyLatent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        batch, n_kv_heads, n_queries, _ = scores.shape
        others = beside.reshape(batch, n_kv_heads, n_queries, -1)
        sums, rest = common.launch(
            self.name,
            "",
            SOURCE,
            latent,
            {"rows": rows.astype(mx.int32), "scores": scores, "totals": totals, "beside": others},
            {"N": BAND, "ROWS": ROWS, "QUERIES": QUERIES},
            # neighbouring threadgroups read the same rows or, of other KV heads, some of them
            n_tiles=(n_kv_heads * -(-n_queries // QUERIES), -(-latent.rank // BAND), batch),
            shape=(batch, n_kv_heads, n_queries, latent.rank),
            dtype=beside.dtype,
            others={"rest": (others.shape, beside.dtype)},
        )
        return sums, rest


KERNEL = WeighRows()
