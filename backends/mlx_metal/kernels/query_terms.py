"""What queries and an index's basis make of each pair of features, in one kernel."""

from __future__ import annotations

from typing import Any

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.types import Array, RopeSpec

TILE = 32
"""Columns, and pairs of features, of a threadgroup: a lane has one or the other."""
SIMDGROUPS = 8

# A threadgroup makes the terms of TILE pairs for TILE columns, a column being a row of the basis
# and a query. Pairs are neighbours in what is read and columns in what is written, so the terms
# change lanes in threadgroup memory. Threadgroups past the pairs' multiply what is not rotated.
SOURCE = """
  threadgroup float terms[2][TILE][TILE + 1];
  const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
  const int64_t batch = threadgroup_position_in_grid.z;
  const int first_column = threadgroup_position_in_grid.x * TILE;
  const int first_pair = threadgroup_position_in_grid.y * TILE;
  const int n_heads = queries_shape[1], n_queries = queries_shape[2], head_dim = queries_shape[3];
  const int group = n_heads / basis_shape[2];
  const int n_columns = basis_shape[1] * n_heads * n_queries;
  const int n_terms = 2 * n_pairs + int(2 * n_pairs < head_dim);
  const int64_t queries_batch = queries_shape[0] == 1 ? 0 : batch;
  const int64_t basis_batch = basis_shape[0] == 1 ? 0 : batch;
  device T* to = out + batch * n_terms * n_columns + first_column;
  const bool is_rest = first_pair >= n_pairs;

  for (int c = sg; c < min(TILE, n_columns - first_column); c += SIMDGROUPS) {
    const int column = first_column + c, row = column / (n_heads * n_queries);
    const int head = column / n_queries % n_heads, query = column % n_queries;
    const int64_t q = queries_batch * queries_strides[0] + head * queries_strides[1] +
                      query * queries_strides[2];
    const int64_t b = basis_batch * basis_strides[0] + row * basis_strides[1] +
                      head / group * basis_strides[2];
    if (is_rest) {
      float sum = 0.0f;
      for (int i = 2 * n_pairs + lane; i < head_dim; i += 32)
        sum = fma(float(queries[q + i * queries_strides[3]]),
                  float(basis[b + i * basis_strides[3]]), sum);
      sum = simd_sum(sum);
      if (lane == 0) to[int64_t(n_terms - 1) * n_columns + c] = T(sum);
      continue;
    }
    const int pair = first_pair + lane;
    if (pair >= n_pairs) continue;
    const int one = TRADITIONAL ? 2 * pair : pair;
    const int two = TRADITIONAL ? 2 * pair + 1 : pair + n_pairs;
    const float q1 = float(queries[q + one * queries_strides[3]]);
    const float q2 = float(queries[q + two * queries_strides[3]]);
    const float b1 = float(basis[b + one * basis_strides[3]]);
    const float b2 = float(basis[b + two * basis_strides[3]]);
    terms[0][lane][c] = (q1 * b1 + q2 * b2) * scale;
    terms[1][lane][c] = (q2 * b1 - q1 * b2) * scale;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (is_rest || first_column + lane >= n_columns) return;
  for (int p = sg; p < min(TILE, n_pairs - first_pair); p += SIMDGROUPS) {
    const int64_t pair = first_pair + p;
    to[pair * n_columns + lane] = T(terms[0][p][lane]);
    to[(n_pairs + pair) * n_columns + lane] = T(terms[1][p][lane]);
  }
"""


class QueryTerms:
    """The kernel of :func:`xkv.ops.index.query_terms`.

    Limits: queries and a basis of one dtype, float32, float16 or bfloat16. Any strides, so that a
    part of a basis is read where it is; any number of pairs, rotated or not, and of queries.
    Arithmetic is in float32.

    For each row of the basis, query and pair: 6 floating point operations (8 with a scale), two
    elements written, and four read, the basis' by all its queries from cache: each element comes
    from device memory once. With 75 rows, 32 heads and 8 KV heads of dim 128 in 16 bits a launch
    writes 614 KB, reads 162 KB and does 1.2 million operations, 1.6 a byte: memory bounds it. The
    plain twin writes and reads back four products, and copies the terms once more.

    The sources depend on dtype and which features are a pair.
    """

    name = "query_terms"

    def why_not(self, queries: Array, basis: Array, spec: RopeSpec) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        return common.dtype_problem(queries=queries, basis=basis)

    def sample(
        self, backend: Backend, queries: Array, basis: Array, spec: RopeSpec
    ) -> tuple[Any, ...]:
        """Several of everything but a basis for each batch; two tiles of columns and some more."""
        dim = basis.shape[-1]
        few, rows = backend.normal((2, 4, 3, dim), 0), backend.normal((1, 6, 2, dim), 1)
        return few.astype(queries.dtype), rows.astype(basis.dtype), spec

    def check_key(self, queries: Array, basis: Array, spec: RopeSpec) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        return common.dtype_name(queries), spec.traditional

    def __call__(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        n_columns = basis.shape[1] * queries.shape[1] * queries.shape[2]
        n_pairs, has_rest = len(spec.freqs), spec.dims < queries.shape[-1]
        batch = max(basis.shape[0], queries.shape[0])
        named = {"queries": queries, "basis": basis, "n_pairs": n_pairs, "scale": float(spec.scale)}
        kernel = common.build(self.name, tuple(named), (SOURCE,), reads_strides=True)
        n_threads = SIMDGROUPS * common.SIMDGROUP
        (terms,) = kernel(
            inputs=list(named.values()),
            template=[
                *(("T", queries.dtype), ("TRADITIONAL", spec.traditional)),
                *(("TILE", TILE), ("SIMDGROUPS", SIMDGROUPS)),
            ],
            grid=(-(-n_columns // TILE) * n_threads, -(-n_pairs // TILE) + has_rest, batch),
            threadgroup=(n_threads, 1, 1),
            output_shapes=[(batch, 2 * n_pairs + has_rest, n_columns)],
            output_dtypes=[queries.dtype],
        )
        return terms


KERNEL = QueryTerms()
