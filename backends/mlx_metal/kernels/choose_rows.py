"""Which rows a step rebuilds: the best, found in one kernel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common, selection
from xkv.ops.backend import Backend
from xkv.ops.index import RUN
from xkv.ops.types import Array

THREADS = selection.THREADS
"""Of the threadgroup of a KV head, and rows that it can choose."""

HEADER = """
// A whole number with the order of a float; 0 is less than all of them. NaN is somewhere.
METAL_FUNC uint key_of(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  return clamp(bits >> 31 ? ~bits : bits | 1u << 31, 1u, ~1u);
}

struct run_keys {
  const device uint* maxima;

  uint key(int i) const { return maxima[i]; }
};

// Rows of some runs, in rising order if the runs are.
template <int RUN>
struct row_keys {
  const device float* worth;
  threadgroup const int* runs;
  int n_rows;

  int row(int i) const { return runs[i / RUN] * RUN + i % RUN; }
  uint key(int i) const {
    const int at = row(i);
    return at < n_rows ? key_of(worth[at]) : 0;
  }
};
"""

# A threadgroup chooses for one KV head of one batch: the best runs of rows by the largest of each,
# as a row among the best is in one of as many runs, and then the best rows of these runs.
SOURCE = """
  threadgroup int runs[THREADS], found[THREADS];
  threadgroup board<THREADS> shared;
  const int thread_index = thread_index_in_threadgroup;
  const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
  const int n_rows = worth_shape[2], n_runs = (n_rows + RUN - 1) / RUN;
  const int64_t kv_head = threadgroup_position_in_grid.x;
  const device float* scores = worth + kv_head * n_rows;
  device uint* largest_of = maxima + kv_head * n_runs;

  for (int first = 0; first < n_rows; first += 4 * THREADS) {
    const int row = first + 4 * thread_index;
    float4 x = load_four(scores + row, n_rows - row);
    uint largest = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
      if (row + i < n_rows) largest = max(largest, key_of(x[i]));
    }
    for (int n_lanes = 1; n_lanes < RUN / 4; n_lanes *= 2)
      largest = max(largest, simd_shuffle_xor(largest, n_lanes));
    if (row < n_rows && row % RUN == 0) largest_of[row / RUN] = largest;
  }
  threadgroup_barrier(mem_flags::mem_device);

  const int n_best = find_best<THREADS>(
      run_keys{largest_of}, n_runs, count, runs, shared, thread_index, lane, sg);
  const row_keys<RUN> rows = {scores, runs, n_rows};
  find_best<THREADS>(rows, n_best * RUN, count, found, shared, thread_index, lane, sg);
  if (thread_index < count) out[kv_head * count + thread_index] = rows.row(found[thread_index]);
"""


class ChooseRows:
    """The kernel of :func:`xkv.ops.working_set.choose_rows`, whose rows it gives in rising order.

    Limits: float32 scores of 8 rows or more, of which it chooses 1 to 1,024. Any number of rows. Of
    rows worth the same the first are chosen. NaN counts as very large or very small.

    A threadgroup chooses for one KV head: ``4 * L`` bytes of scores are read once and ``L / 4`` of
    the maxima of 16 rows written. The search reads these maxima about 4 times, then the scores of
    the 16 rows of each of the ``count`` best runs about 4 times, all from cache. A search counts
    numbers in 1,024 bins of a range, then in the bins of the one that matters, at most 4 times. It
    finds the best in the order of their numbers: nothing is sorted. A row costs about 12 integer
    operations, a maximum about 60, one of 16 rows in the best runs about 80. At 131,072 rows, of
    which 512 are chosen, with 8 KV heads: 4.2 MB read, 0.3 written and 22 million operations, 5 a
    byte: 8 threadgroups use few of a GPU's cores, and what one core reads and does bounds it. The
    plain twin copies the scores to pad them and reduces the copy, at least ``12 * L`` bytes, and
    sorts the maxima and the rows of the best runs, in about 15 launches.

    One source for all arguments.
    """

    name = "choose_rows"

    def why_not(self, worth: Array, count: int) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        n_rows = worth.shape[-1]
        if common.dtype_name(worth) != "float32":
            return f"the kernel takes scores in float32, not {common.dtype_name(worth)}"
        if not 0 < count <= THREADS:
            return f"the kernel chooses 1 to {THREADS} rows, not {count}"
        if count > n_rows:
            return f"the kernel cannot choose {count} of {n_rows} rows"
        return common.size_problem(worth)

    def sample(self, backend: Backend, worth: Array, *_: Any) -> tuple[Any, ...]:
        """Two batches and KV heads, and more runs than are chosen."""
        n_rows, count = 1203, 50
        # distinct: which of equal ones are chosen is free
        numbers = mx.arange(4 * n_rows).reshape(2, 2, n_rows) * 7919 % 10007
        return (numbers.astype(mx.float32) - 8000) / 64, count

    def check_key(self, worth: Array, *_: Any) -> tuple[Any, ...]:
        """The dtype's name."""
        return (common.dtype_name(worth),)

    def __call__(self, worth: Array, count: int) -> Array:
        batch, n_kv_heads, n_rows = worth.shape
        header = common.LATENT_SOURCE, selection.SELECTION_SOURCE, HEADER
        kernel = common.build(self.name, ("worth", "count"), (SOURCE,), header, ("out", "maxima"))
        rows, _ = kernel(
            inputs=[worth, count],
            template=[("THREADS", THREADS), ("RUN", RUN)],
            grid=(batch * n_kv_heads * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(batch, n_kv_heads, count), (batch, n_kv_heads, -(-n_rows // RUN))],
            output_dtypes=[mx.int32, mx.uint32],
        )
        return rows


KERNEL = ChooseRows()
