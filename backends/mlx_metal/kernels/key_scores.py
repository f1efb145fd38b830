"""Scores of some rows' keys: gather, low-rank product, rotation and scores in one kernel."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.types import Array, RopeRun, RopeSpec, Stored

HEAD_DIMS = (64, 128, 256)
ROWS = 32
"""Rows that a threadgroup rebuilds: few, so that a step's few hundred rows reach all cores."""

HEADER = """
// The two features of a pair. Pairs past the rotated ones are neighbours, and pass through.
METAL_FUNC int2 pair_features(int pair, int n_pairs, bool is_traditional) {
  return is_traditional || pair >= n_pairs ? int2(2 * pair, 2 * pair + 1)
                                           : int2(pair, pair + n_pairs);
}

// precise: angles reach the context's length, and fast::cos holds up to pi only.
METAL_FUNC float2 turn_pair(float2 x, float angle) {
  const float c = precise::cos(angle), s = precise::sin(angle);
  return float2(x.x * c - x.y * s, x.y * c + x.x * s);
}
"""
"""Rotary pairs; angles are ``float(position) * inverse_freq``, as in ``xkv.ops.rope.cos_sin``."""

# A threadgroup rebuilds ROWS keys of one KV head, and scores them.
SOURCE = """
  using tiles = tiling<T, N, ROWS, DEPTH>;
  threadgroup float4 shared[tiles::shared_float4s];
  threadgroup int row_numbers[ROWS];
  const int head = threadgroup_position_in_grid.x, batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup, lane = thread_index % 32;
  const int n_kv_heads = basis_shape[2], n = rows_shape[2];
  const int first = threadgroup_position_in_grid.y * ROWS, end = min(ROWS, n - first);
  const int64_t kv_head = int64_t(batch) * n_kv_heads + head;
  const int64_t basis_batch = basis_shape[0] == 1 ? 0 : batch;

  for (int i = thread_index; i < ROWS; i += tiles::n_threads)
    row_numbers[i] = i < end ? rows[kv_head * n + first + i] : -1;
  simdgroup_float8x8 product[4][4];
  multiply_rows<T, N, ROWS, DEPTH>(
      product, shared, row_numbers, stored,
      basis + (basis_batch * stored.width * n_kv_heads + head) * N, n_kv_heads * N, N,
      thread_index, sg);
#pragma clang loop unroll(full)
  for (int quarter = 0; quarter < 4; quarter++) {
    threadgroup const float* shown =
        share_quarter<T, N, ROWS, DEPTH>(product, quarter, shared, sg);
    // a simdgroup rotates a row, a lane every 32nd pair of it
    for (int i = sg; i < tiles::quarter_rows; i += tiles::n_threads / 32) {
      const int row = tile_row(quarter, i);
      if (row >= end) continue;
      threadgroup const float* from = shown + i * tiles::quarter_stride;
      float2 x[N / 64];
#pragma clang loop unroll(full)
      for (int k = 0; k < N / 64; k++) {
        const int pair = 32 * k + lane;
        const int2 at = pair_features(pair, n_pairs, TRADITIONAL);
        x[k] = float2(from[at.x], from[at.y]);
        if (pair < n_pairs)
          x[k] = turn_pair(x[k] * rope[0], float(start + row_numbers[row]) * rope[1 + pair]);
      }
      for (int q = 0; q < n_queries; q++) {
        const int64_t query = kv_head * n_queries + q;
        float score = 0.0f;
#pragma clang loop unroll(full)
        for (int k = 0; k < N / 64; k++) {
          const int2 at = pair_features(32 * k + lane, n_pairs, TRADITIONAL);
          score = fma(float(queries[query * N + at.x]), x[k].x, score);
          score = fma(float(queries[query * N + at.y]), x[k].y, score);
        }
        score = simd_sum(score);
        if (lane == 0) out[query * n + first + row] = score;
      }
    }
  }
"""


class KeyScores:
    """The kernel of :func:`xkv.ops.working_set.key_scores`.

    Limits: a latent, a basis and queries of one dtype, float32, float16 or bfloat16; dim 64, 128 or
    256; one rotation for all rows, or none. Any rank, any bits, any number of rows and of queries.
    Scores are of the rotated keys before these would be rounded, in float32.

    For each row and KV head, with M queries: ``2 * (rank + M) * dim`` floating point operations;
    from device memory the row, ``rank`` elements, or packed ``bits / 8`` bytes a number and two
    elements a band, each word read once (one that eight numbers end in, twice), and ``4 * M`` bytes
    written. Every tile of 32 rows also reads the head's basis, ``rank * dim`` elements, and each
    row the queries, ``M * dim``, from cache. The plain twin also writes and reads back the gathered
    rows, packed and widened, the product and the keys, and writes the scores twice. At 4 queries,
    rank 384 and dim 128 in float16 that is 127 operations a byte: arithmetic bounds it, not memory.

    The sources depend on dtype, dim, whether the latent is packed, and the pairs of the rotation.
    """

    name = "key_scores"

    def why_not(self, stored: Stored, rows: Array, queries: Array) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        if rows.shape[-1] == 0:
            return "no rows are to be rebuilt"
        dim = stored.basis.shape[-1]
        if dim not in HEAD_DIMS:
            return f"the kernel takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {dim}"
        if len(stored.rope_runs) > 1:
            return (
                f"the kernel rotates all rows alike, and these have {len(stored.rope_runs)} "
                "different rotations"
            )
        return common.dtype_problem(
            latent=stored.latent, basis=stored.basis, queries=queries
        ) or common.latent_problem(stored.latent)

    def sample(
        self, backend: Backend, stored: Stored, rows: Array, queries: Array
    ) -> tuple[Any, ...]:
        """Two KV heads, of three queries each, and a tile and some rows more."""
        latent = common.sample_latent(backend, stored.latent, 80)
        dim, dtype = stored.basis.shape[-1], stored.basis.dtype
        basis = backend.normal((1, latent.rank, 2, dim), 1) * latent.rank**-0.5
        runs = tuple(RopeRun(80, run.spec) for run in stored.rope_runs)
        batch = len(latent.parts)
        numbers = mx.array([[[7 * i % 80 for i in range(40)], [*range(39, -1, -1)]]] * batch)
        few = backend.normal((batch, 6, 1, dim), 2) * dim**-0.5
        small = Stored(latent, basis.astype(dtype), stored.start, runs)
        return small, numbers, few.astype(dtype)

    def check_key(self, stored: Stored, rows: Array, queries: Array) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        dim, latent = stored.basis.shape[-1], stored.latent
        form = latent.is_packed, common.are_several_of(latent)
        return common.dtype_name(stored.basis), dim, *form, _is_traditional(stored)

    def __call__(self, stored: Stored, rows: Array, queries: Array) -> Array:
        batch, n_kv_heads, n = rows.shape
        dim, spec = stored.basis.shape[-1], _spec(stored)
        grouped = queries.reshape(batch, n_kv_heads, -1, dim)
        return common.launch(
            self.name,
            HEADER,
            SOURCE,
            stored.latent,
            {
                "basis": stored.basis,
                "rows": rows.astype(mx.int32),
                "rope": _rope_numbers(spec),
                "n_pairs": len(spec.freqs) if spec else 0,
                "start": stored.start,
                "queries": grouped,
                "n_queries": grouped.shape[2],
            },
            {"N": dim, "ROWS": ROWS, "TRADITIONAL": _is_traditional(stored)},
            # neighbouring threadgroups are the KV heads, whose rows overlap
            n_tiles=(n_kv_heads, -(-n // ROWS), batch),
            shape=(*grouped.shape[:3], n),
            dtype=mx.float32,
        )


def _spec(stored: Stored) -> RopeSpec | None:
    return stored.rope_runs[0].spec if stored.rope_runs else None


def _is_traditional(stored: Stored) -> bool:
    spec = _spec(stored)
    return spec is not None and spec.traditional


@functools.lru_cache(maxsize=64)
def _rope_numbers(spec: RopeSpec | None) -> Array:
    """The rotation's scale, then the inverse frequency of each pair, float32."""
    numbers = np.ones(1)
    if spec is not None:
        numbers = np.array([spec.scale, *(np.float32(1) / np.array(spec.freqs, np.float32))])
    # few pairs by the signature of many
    n_spare = max(common.SMALL - len(numbers), 0)
    return mx.array(np.pad(numbers, (0, n_spare)).astype(np.float32))


KERNEL = KeyScores()
