"""Attention over dense and recent rows, and the logarithm of what they are given, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common
from xkv.ops.backend import Backend
from xkv.ops.recent import packed
from xkv.ops.scores import Dense
from xkv.ops.sequences import AnyDense
from xkv.ops.types import Array

HEAD_DIMS = (64, 128, 256)
MOST_SIMDGROUPS = 32
MOST_PARTS = 4096
"""Sums of all simdgroups together, 16 KiB of threadgroup memory: half of the simdgroups at 256."""

HEADER = """
// Lower than any score, and finite: fast::exp need not know infinities.
constant constexpr float no_score = -1e38f;

// Neighbouring features of a row, which a compiler can load at once if they are so in memory.
template <typename T, int N>
METAL_FUNC void load_features(thread float (&x)[N], const device T* from, int64_t stride) {
  if (stride == 1) {
#pragma clang loop unroll(full)
    for (int i = 0; i < N; i++) x[i] = float(from[i]);
  } else {
#pragma clang loop unroll(full)
    for (int i = 0; i < N; i++) x[i] = float(from[i * stride]);
  }
}

template <int N>
METAL_FUNC float product(thread const float (&x)[N], thread const float (&y)[N]) {
  float sum = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < N; i++) sum = fma(x[i], y[i], sum);
  return simd_sum(sum);
}

// Sums of rows by the exponentials of their scores, relative to the largest one so far.
template <int N>
struct weighted_rows {
  float largest, total, sums[N];

  void add(float score, thread const float (&x)[N], float factor) {
    const float before = largest;
    largest = max(largest, score);
    const float shrink = fast::exp(before - largest), weight = fast::exp(score - largest);
    total = fma(total, shrink, weight);
#pragma clang loop unroll(full)
    for (int i = 0; i < N; i++) sums[i] = fma(sums[i], shrink, weight * factor * x[i]);
  }
};
"""

# A threadgroup attends for one query of one head. Each simdgroup takes every SIMDGROUPS-th row, a
# thread N / 32 features of it.
BEGIN = """
  constexpr int EACH = N / 32;
  threadgroup float all_largest[SIMDGROUPS];
  threadgroup float all_totals[SIMDGROUPS];
  threadgroup float parts[SIMDGROUPS][N];
  const int head = threadgroup_position_in_grid.x, query = threadgroup_position_in_grid.y;
  const int64_t batch = threadgroup_position_in_grid.z;
  const int thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int n_heads = queries_shape[1], n_queries = queries_shape[2];
  const int64_t feature = lane * EACH;
"""

# Views of one batch's rows are read where they are.
BATCH = """
  const int n_rows = keys_shape[2];
  const int64_t kv_head = head / (n_heads / keys_shape[1]);
  const int64_t query_next = queries_strides[3];
  const device T* asked = queries + batch * queries_strides[0] + head * queries_strides[1] +
                          query * queries_strides[2];
  const device T* key = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
  const device T* value = values + batch * values_strides[0] + kv_head * values_strides[1];
  const int64_t key_row = keys_strides[2], key_next = keys_strides[3];
  const int64_t value_row = values_strides[2], value_next = values_strides[3];
"""
BATCH_SINKS = """
  const int64_t sinks_next = sinks_strides[0];
"""
BATCH_RECENT = """
  const int n_recent = numbers_shape[2];
  const device int8_t* recent = numbers + batch * numbers_strides[0] + kv_head * numbers_strides[1];
  const int64_t recent_row = numbers_strides[2], recent_next = numbers_strides[3];
  const device float* factors = scales + batch * scales_strides[0] + kv_head * scales_strides[1];
  const int64_t factors_row = scales_strides[2], factors_next = scales_strides[3];
"""

# Of several sequences each one's buffers, of which not all rows are in use.
EACH = f"""
  const int n_rows = n_used[batch];
  const int64_t kv_head = head / (n_heads / keys_0_shape[1]), query_next = 1;
  const device T* asked = queries + (batch * n_heads + head) * N;
  const int64_t first = kv_head * ({common.chosen("keys", "_shape[2]")}) * N;
  const device T* key = ({common.chosen("keys")}) + first;
  const device T* value = ({common.chosen("values")}) + first;
  const int64_t key_row = N, key_next = 1, value_row = N, value_next = 1;
"""
EACH_SINKS = """
  const int64_t sinks_next = 1;
"""
EACH_RECENT = f"""
  const int n_recent = {common.chosen("numbers", "_shape[2]")};
  const device int8_t* recent = ({common.chosen("numbers")}) + kv_head * n_recent * (2 * N);
  const device float* factors = ({common.chosen("scales")}) + kv_head * n_recent * 2;
  const int64_t recent_row = 2 * N, recent_next = 1, factors_row = 2, factors_next = 1;
"""

ASK = """
  const int n_seen = n_rows - n_queries + query + 1;
  float q[EACH], x[EACH];
  weighted_rows<EACH> mine;
  mine.largest = no_score;
  mine.total = 0.0f;
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) mine.sums[i] = 0.0f;
  load_features(q, asked + feature * query_next, query_next);
"""

# A score whose row is nothing.
SINKS = """
  if (sg == 0) {
    mine.largest = float(sinks[head * sinks_next]);
    mine.total = 1.0f;
  }
"""

# Whole numbers, and factors of a key and of a value.
RECENT = """
  for (int row = sg; row < n_recent; row += SIMDGROUPS) {
    const device int8_t* from = recent + row * recent_row + feature * recent_next;
    const device float* factor = factors + row * factors_row;
    load_features(x, from, recent_next);
    const float score = product(q, x) * factor[0];
    load_features(x, from + N * recent_next, recent_next);
    mine.add(score, x, factor[factors_next]);
  }
"""

ROWS = """
  for (int row = sg; row < n_seen; row += SIMDGROUPS) {
    load_features(x, key + row * key_row + feature * key_next, key_next);
    const float score = product(q, x);
    load_features(x, value + row * value_row + feature * value_next, value_next);
    mine.add(score, x, 1.0f);
  }
  if (lane == 0) {
    all_largest[sg] = mine.largest;
    all_totals[sg] = mine.total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // a lane looks after the simdgroup of its number
  const bool is_one = lane < SIMDGROUPS;
  const float one_largest = is_one ? all_largest[lane] : no_score;
  const float most = simd_max(one_largest);
  const float one_total = is_one ? all_totals[lane] * fast::exp(one_largest - most) : 0.0f;
  const float sum = simd_sum(one_total);
  const float part = fast::exp(mine.largest - most) / sum;
#pragma clang loop unroll(full)
  for (int i = 0; i < EACH; i++) parts[sg][feature + i] = mine.sums[i] * part;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int64_t number = (batch * n_heads + head) * n_queries + query;
  if (thread_index < N) {
    float output = 0.0f;
    for (int i = 0; i < SIMDGROUPS; i++) output += parts[i][thread_index];
    out[number * N + thread_index] = T(output);
  }
  if (thread_index == 0) totals[number] = most + log(sum);
"""


class AttendDense:
    """The kernel of :func:`xkv.ops.working_set.attend_dense`.

    Limits: queries, keys and values of one dtype, float32, float16 or bfloat16; keys and values of
    one dim, 64, 128 or 256; all rows in use. Any strides: views of larger buffers are read where
    they are. Any number of dense and recent rows and of queries; sinks of any of the dtypes. Sums
    are in float32. Of several sequences, one query each, whole buffers, whose strides follow from
    their shapes, as there are no more than 31 arguments; views of them would be copied.

    A threadgroup of 32 simdgroups (16 at dim 256) for each query of each head, like the
    ``sdpa_vector`` of MLX: at 2,300 rows a simdgroup takes 72 of them.

    For each row and query head: ``4 * dim`` floating point operations. From device memory, for each
    KV head, a row's key and value, ``2 * dim`` elements (of a recent one as many bytes, and 8),
    which its other query heads and queries read from cache; queries read and outputs written, ``2 *
    dim`` elements each, are little beside that. At 4 query heads a KV head in 16 bits that is 4
    operations a byte: memory bounds it, not arithmetic. With 8 KV heads of dim 128 a thousand rows
    are 4 MB and 16 million operations. The plain twin also writes and reads back all scores and
    weights, in six operations or more.

    The sources depend on dtype, dim, whether there are recent rows and several sequences, and the
    dtype of sinks.
    """

    name = "attend_dense"

    def why_not(self, queries: Array, dense: AnyDense, sinks: Array | None) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        problems = [self._rows_problem(queries, x) for x in _parts(dense)]
        if not isinstance(dense, Dense):
            problems.append(common.together_problem(len(dense)))
        if sinks is not None:
            problems.append(common.dtype_problem(sinks=sinks))
        return next(filter(None, problems), None)

    def _rows_problem(self, queries: Array, dense: Dense) -> str | None:
        if dense.n_used is not None and not isinstance(dense.n_used, int):
            return "the kernel takes dense rows whose number the host knows"
        dim, value_dim = dense.keys.shape[-1], dense.values.shape[-1]
        if dim not in HEAD_DIMS:
            return f"the kernel takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {dim}"
        if value_dim != dim:
            return f"the kernel takes values as wide as keys, {dim}, not {value_dim}"
        recent = dense.recent
        if recent is not None and recent.numbers.dtype != mx.int8:
            return f"the kernel takes recent rows in int8, not {common.dtype_name(recent.numbers)}"
        if recent is not None and common.size_problem(*recent):
            return common.size_problem(*recent)
        n_rows, n_queries = dense.n_rows, queries.shape[2]
        if n_rows < max(n_queries, 1):
            return f"the kernel takes as many dense rows as queries or more, not {n_rows}"
        return common.dtype_problem(queries=queries, keys=dense.keys, values=dense.values)

    def sample(
        self, backend: Backend, queries: Array, dense: AnyDense, sinks: Array | None
    ) -> tuple[Any, ...]:
        """Several of everything; unused rows, and more rows than simdgroups."""
        first = _parts(dense)[0]
        dim, dtype, are_several = first.keys.shape[-1], queries.dtype, dense is not first
        few = backend.normal((2, 4, 1 if are_several else 3, dim), 0) * (3 * dim**-0.5)
        keys, values = (backend.normal((2, 2, 85, dim), seed).astype(dtype) for seed in (1, 2))
        recent = first.recent
        if recent is not None:
            recent = packed(backend, *(backend.normal((2, 2, 45, dim), x) for x in (3, 4)))
        made: AnyDense = Dense(keys[..., :77, :], values[..., :77, :], None, recent)
        if are_several:
            made = [
                Dense(keys[i:][:1], values[i:][:1], 77 - i, recent and recent.map(of_one))
                for i, of_one in enumerate((lambda x: x[:1], lambda x: x[1:]))
            ]
        return (
            few.astype(dtype),
            made,
            None if sinks is None else few[0, :, 0, 0].astype(sinks.dtype),
        )

    def check_key(self, queries: Array, dense: AnyDense, sinks: Array | None) -> tuple[Any, ...]:
        """The dtype's name, and what else the source depends on."""
        form = isinstance(dense, Dense), _parts(dense)[0].recent is not None
        of_sinks = None if sinks is None else common.dtype_name(sinks)
        return common.dtype_name(queries), queries.shape[-1], of_sinks, *form

    def __call__(self, queries: Array, dense: AnyDense, sinks: Array | None) -> tuple[Array, Array]:
        batch, n_heads, n_queries, dim = queries.shape
        is_batch, parts = isinstance(dense, Dense), _parts(dense)
        arrays = {"keys": [x.keys for x in parts], "values": [x.values for x in parts]}
        begin, rest, name = [BEGIN, BATCH if is_batch else EACH], [ASK], self.name
        others = {}
        if not is_batch:
            name, others["n_used"] = f"{name}_each", mx.array([x.n_rows for x in parts])
        if sinks is not None:
            name, others["sinks"] = f"{name}_sinks", sinks
            begin.append(BATCH_SINKS if is_batch else EACH_SINKS)
            rest.append(SINKS)
        recents = [x.recent for x in parts if x.recent is not None]
        if recents:
            name = f"{name}_recent"
            arrays |= {
                "numbers": [x.numbers for x in recents],
                "scales": [x.scales for x in recents],
            }
            begin.append(BATCH_RECENT if is_batch else EACH_RECENT)
            rest.append(RECENT)
        named = {"queries": queries} | common.named_each(arrays, not is_batch) | others
        kernel = common.build(
            name,
            tuple(named),
            (*begin, *rest, ROWS),
            (HEADER,),
            outputs=("out", "totals"),
            reads_strides=is_batch,
        )
        n_simdgroups = min(MOST_SIMDGROUPS, MOST_PARTS // dim)
        n_threads = n_simdgroups * common.SIMDGROUP
        output, totals = kernel(
            inputs=list(named.values()),
            template=[("T", queries.dtype), ("N", dim), ("SIMDGROUPS", n_simdgroups)],
            # neighbouring threadgroups are the heads that share a KV head
            grid=(n_heads * n_threads, n_queries, batch),
            threadgroup=(n_threads, 1, 1),
            output_shapes=[queries.shape, queries.shape[:3]],
            output_dtypes=[queries.dtype, mx.float32],
        )
        return output, totals


def _parts(dense: AnyDense) -> Sequence[Dense]:
    return [dense] if isinstance(dense, Dense) else dense


KERNEL = AttendDense()
