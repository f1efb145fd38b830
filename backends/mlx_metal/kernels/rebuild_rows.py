"""Keys or values of some rows: gather, low-rank product and rotation in one kernel."""

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
"""Rows that a threadgroup makes: few, so that a step's few hundred rows reach all cores."""

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

# A threadgroup makes ROWS rows of one KV head.
SOURCE = """
  using tiles = tiling<T, N, ROWS, DEPTH>;
  threadgroup float4 shared[tiles::shared_float4s];
  threadgroup int row_numbers[ROWS];
  const int head = threadgroup_position_in_grid.x, batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_kv_heads = basis_shape[2], n = rows_shape[2];
  const int first = threadgroup_position_in_grid.y * ROWS, end = min(ROWS, n - first);
  const int64_t taken = int64_t(batch * n_kv_heads + head) * n + first;
  const int64_t basis_batch = basis_shape[0] == 1 ? 0 : batch;

  for (int i = thread_index; i < ROWS; i += tiles::n_threads)
    row_numbers[i] = i < end ? rows[taken + i] : -1;
  simdgroup_float8x8 product[4][4];
  multiply_rows<T, N, ROWS, DEPTH>(
      product, shared, row_numbers, stored,
      basis + (basis_batch * stored.width * n_kv_heads + head) * N, n_kv_heads * N, N,
      thread_index, sg);
#pragma clang loop unroll(full)
  for (int quarter = 0; quarter < 4; quarter++) {
    threadgroup const float* shown =
        share_quarter<T, N, ROWS, DEPTH>(product, quarter, shared, sg);
    for (int e = thread_index; e < tiles::quarter_rows * N / 2; e += tiles::n_threads) {
      const int i = e / (N / 2), pair = e % (N / 2), row = tile_row(quarter, i);
      if (row >= end) continue;
      const int2 at = pair_features(pair, n_pairs, TRADITIONAL);
      threadgroup const float* from = shown + i * tiles::quarter_stride;
      float2 x = float2(from[at.x], from[at.y]);
      if (pair < n_pairs)
        x = turn_pair(x * rope[0], float(start + row_numbers[row]) * rope[1 + pair]);
      device T* to = out + (taken + row) * N;
      to[at.x] = T(x.x);
      to[at.y] = T(x.y);
    }
  }
"""


class RebuildRows:
    """The kernel of :func:`xkv.ops.attention.rebuild_rows`.

    Limits: a latent and a basis of one dtype, float32, float16 or bfloat16; dim 64, 128 or 256; one
    rotation for all rows, or none. Any rank, any bits, any number of rows.

    For each row and KV head: ``2 * rank * dim`` floating point operations; from device memory the
    row, ``rank`` elements, or packed ``bits / 8`` bytes a number and two elements a band, each word
    read once (one that eight numbers end in, twice), and ``dim`` elements written. Every tile of 32
    rows also reads the head's basis, ``rank * dim`` elements, from cache. The plain twin also
    writes and reads back the gathered rows, packed and widened, and the product. At rank 384 and
    dim 128 in float16 that is 96 operations a byte: arithmetic bounds it, not memory.

    The sources depend on dtype, dim, whether the latent is packed, and the pairs of the rotation.
    """

    name = "rebuild_rows"

    def why_not(self, stored: Stored, rows: Array) -> str | None:
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
            latent=stored.latent, basis=stored.basis
        ) or common.size_problem(*stored.latent.arrays)

    def sample(self, backend: Backend, stored: Stored, rows: Array) -> tuple[Any, ...]:
        """Two KV heads, and a tile and some rows more."""
        latent = common.sample_latent(backend, stored.latent, 80)
        basis = backend.normal((1, latent.rank, 2, stored.basis.shape[-1]), 1)
        basis = (basis * latent.rank**-0.5).astype(stored.basis.dtype)
        runs = tuple(RopeRun(80, run.spec) for run in stored.rope_runs)
        numbers = mx.array([[[7 * i % 80 for i in range(40)], [*range(39, -1, -1)]]])
        return Stored(latent, basis, stored.start, runs), numbers

    def check_key(self, stored: Stored, rows: Array) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        dim, is_packed = stored.basis.shape[-1], stored.latent.is_packed
        return common.dtype_name(stored.basis), dim, is_packed, _is_traditional(stored)

    def __call__(self, stored: Stored, rows: Array) -> Array:
        batch, n_kv_heads, n = rows.shape
        dim, spec = stored.basis.shape[-1], _spec(stored)
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
            },
            {"N": dim, "ROWS": ROWS, "TRADITIONAL": _is_traditional(stored)},
            # neighbouring threadgroups are the KV heads, whose rows overlap
            n_tiles=(n_kv_heads, -(-n // ROWS), batch),
            shape=(batch, n_kv_heads, n, dim),
            dtype=stored.basis.dtype,
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
    # keys and values by one signature
    n_spare = max(common.SMALL - len(numbers), 0)
    return mx.array(np.pad(numbers, (0, n_spare)).astype(np.float32))


KERNEL = RebuildRows()
