"""Which rows a step rebuilds: the best that are not kept, found and sorted in one kernel."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.kernels import common, selection
from xkv.ops.backend import Backend
from xkv.ops.index import RUN
from xkv.ops.types import Array
from xkv.ops.working_set import Choice

THREADS = selection.THREADS
"""Of the threadgroup of a KV head, and rows that it can choose."""
SLOTS = 4096
"""Of the table of kept rows, which fill no more than half of it."""
MAX_KEPT = SLOTS // 2

HEADER = """
// A whole number with the order of a float; 0 is less than all of them. NaN is somewhere.
METAL_FUNC uint key_of(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  return clamp(bits >> 31 ? ~bits : bits | 1u << 31, 1u, ~1u);
}

// A set of row numbers in a table that is not full: no free slot is between a row and its own.
template <int SLOTS>
struct row_set {
  threadgroup int* slots;

  uint slot_of(int row) const { return uint(row) * 2654435769u / (~0u / SLOTS + 1); }

  // Threads may do so at once. What is pushed out of its slot moves on.
  void add(int row) const {
    for (uint at = slot_of(row); row >= 0; at = (at + 1) % SLOTS)
      row = atomic_exchange_explicit(
          (threadgroup atomic_int*)(slots + at), row, memory_order_relaxed);
  }

  bool has(int row) const {
    for (uint at = slot_of(row);; at = (at + 1) % SLOTS) {
      const int other = slots[at];
      if (other < 0 || other == row) return other == row;
    }
  }
};

struct run_keys {
  const device uint* maxima;

  uint key(int i) const { return maxima[i]; }
};

// Rows of some runs, that are not kept.
template <int RUN, int SLOTS>
struct row_keys {
  const device float* worth;
  row_set<SLOTS> kept;
  threadgroup const int* runs;
  int n_rows;

  int row(int i) const { return runs[i / RUN] * RUN + i % RUN; }
  uint key(int i) const {
    const int at = row(i);
    return at < n_rows && !kept.has(at) ? key_of(worth[at]) : 0;
  }
};

// The worst first.
template <typename Rows>
struct slot_keys {
  const device float* worth;
  Rows rows;

  uint key(int i) const { return ~key_of(worth[rows[i]]); }
};

template <typename Rows>
METAL_FUNC slot_keys<Rows> slot_keys_of(const device float* worth, Rows rows) {
  return {worth, rows};
}
"""

# A threadgroup chooses for one KV head of one batch: the best runs of rows by the largest of each,
# as a row among the best is in one of as many runs, and then the best rows of these runs.
SOURCE = """
  threadgroup int table[SLOTS], runs[THREADS], found[THREADS];
  threadgroup board<THREADS> shared;
  const int thread_index = thread_index_in_threadgroup;
  const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
  const int n_rows = worth_shape[2], n_runs = (n_rows + RUN - 1) / RUN;
  const int64_t kv_head = threadgroup_position_in_grid.x;
  const device float* scores = worth + kv_head * n_rows;
  device uint* largest_of = maxima + kv_head * n_runs;
  const auto slot_rows = kept_rows + kv_head * n_kept;
  const row_set<SLOTS> kept = {table};

  for (int i = thread_index; i < SLOTS; i += THREADS) table[i] = -1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < n_kept; i += THREADS) kept.add(slot_rows[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int first = 0; first < n_rows; first += 4 * THREADS) {
    const int row = first + 4 * thread_index;
    float4 x = load_four(scores + row, n_rows - row);
    uint largest = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
      const uint key = key_of(x[i]);
      if (row + i < n_rows && key > largest && !kept.has(row + i)) largest = key;
    }
    for (int n_lanes = 1; n_lanes < RUN / 4; n_lanes *= 2)
      largest = max(largest, simd_shuffle_xor(largest, n_lanes));
    if (row < n_rows && row % RUN == 0) largest_of[row / RUN] = largest;
  }
  threadgroup_barrier(mem_flags::mem_device);

  const int n_best = find_best<THREADS>(
      run_keys{largest_of}, n_runs, n_rebuilt, runs, shared, thread_index, lane, sg);
  const row_keys<RUN, SLOTS> rows = {scores, kept, runs, n_rows};
  find_best<THREADS>(rows, n_best * RUN, n_rebuilt, found, shared, thread_index, lane, sg);
  const int rank = rank_found<THREADS>(rows, found, n_rebuilt, shared, thread_index);
  if (rank < n_rebuilt) {
    const int row = rows.row(found[thread_index]);
    out[kv_head * n_rebuilt + rank] = row;
    if (rank < n_swapped) entering[kv_head * n_swapped + rank] = row;
  }
  if (n_swapped == 0) {
    // outputs of no numbers there are none
    if (thread_index == 0) entering[kv_head] = slots[kv_head] = 0;
    return;
  }

  const auto worst = slot_keys_of(scores, slot_rows);
  find_best<THREADS>(worst, n_kept, n_swapped, found, shared, thread_index, lane, sg);
  const int place = rank_found<THREADS>(worst, found, n_swapped, shared, thread_index);
  if (place >= n_swapped) return;
  slots[kv_head * n_swapped + place] = found[thread_index];
"""


class ChooseRows:
    """The kernel of :func:`xkv.ops.working_set.choose_rows`.

    Limits: float32 scores of 8 rows or more, up to 1,024 rows to rebuild and 2,048 kept. Any number
    of rows. Rows are sorted whether any enters or not; of rows or slots worth the same the first
    comes first. NaN counts as very large or very small.

    A threadgroup chooses for one KV head: ``4 * L`` bytes of scores are read once and ``L / 4`` of
    the maxima of 16 rows written. The search reads these maxima about 4 times, then the scores of
    the 16 rows of each of the ``n_rebuilt`` best runs about 4 times, all from cache. A search
    counts numbers in 1,024 bins of a range, then in the bins of the one that matters, at most 4
    times. A row costs about 20 integer operations, one of 16 in the best runs about 100, sorting
    ``3 * n_rebuilt ** 2``. At 131,072 rows, of which 512 are rebuilt, with 8 KV heads: 4.2 MB read,
    0.3 written and 36 million operations, 8 a byte: 8 threadgroups use few of a GPU's cores, and
    what one core reads and does bounds it. The plain twin copies the scores, pads and reduces them,
    at least ``20 * L`` bytes, and sorts maxima and the rows of the best runs, in about 20 launches.

    One source for all arguments.
    """

    name = "choose_rows"

    def why_not(
        self,
        worth: Array,
        kept_rows: Array | None,
        n_rebuilt: int,
        n_swapped: int,
    ) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""
        n_kept = 0 if kept_rows is None else kept_rows.shape[-1]
        n_others = worth.shape[-1] - n_kept
        if common.dtype_name(worth) != "float32":
            return f"the kernel takes scores in float32, not {common.dtype_name(worth)}"
        if not 0 < n_rebuilt <= THREADS:
            return f"the kernel chooses 1 to {THREADS} rows, not {n_rebuilt}"
        if n_kept > MAX_KEPT:
            return f"the kernel takes up to {MAX_KEPT} kept rows, not {n_kept}"
        if n_rebuilt > n_others:
            return f"the kernel cannot choose {n_rebuilt} of {n_others} rows that are not kept"
        if n_swapped > n_kept:
            return f"the kernel cannot choose {n_swapped} of {n_kept} kept rows"
        if n_swapped > n_rebuilt:
            return f"{n_swapped} of {n_rebuilt} rows cannot enter"
        return common.size_problem(worth)

    def sample(self, backend: Backend, worth: Array, *_: Any) -> tuple[Any, ...]:
        """Two batches and KV heads, more runs than are chosen, and the best kept."""
        n_rows, n_kept, n_rebuilt = 1203, 65, 50
        shape = (2, 2, n_rows)
        # distinct: the order of equal ones is free
        numbers = mx.arange(4 * n_rows).reshape(shape) * 7919 % 10007
        drawn = (numbers.astype(mx.float32) - 8000) / 64
        kept = mx.argsort(-drawn, axis=-1)[..., ::3][..., :n_kept].astype(mx.int32)
        return drawn, kept, n_rebuilt, 12

    def check_key(self, worth: Array, *_: Any) -> tuple[Any, ...]:
        """The dtype's name."""
        return (common.dtype_name(worth),)

    def __call__(
        self,
        worth: Array,
        kept_rows: Array | None,
        n_rebuilt: int,
        n_swapped: int,
    ) -> Choice:
        batch, n_kv_heads, n_rows = worth.shape
        n_kept = 0 if kept_rows is None else kept_rows.shape[-1]
        # the kernel reads none of the rows that stand for none
        kept = kept_rows.astype(mx.int32) if kept_rows is not None and n_kept else _no_rows()
        inputs = {
            "worth": worth,
            "kept_rows": kept,
            "n_kept": n_kept,
            "n_rebuilt": n_rebuilt,
            "n_swapped": n_swapped,
        }
        header = common.LATENT_SOURCE + selection.SELECTION_SOURCE + HEADER
        outputs = "out", "entering", "slots", "maxima"
        kernel = common.build(self.name, tuple(inputs), SOURCE, header, outputs)
        of_swaps = (batch, n_kv_heads, max(n_swapped, 1))
        rows, *swaps, _ = kernel(
            inputs=list(inputs.values()),
            template=[("THREADS", THREADS), ("SLOTS", SLOTS), ("RUN", RUN)],
            grid=(batch * n_kv_heads * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[
                (batch, n_kv_heads, n_rebuilt),
                *[of_swaps] * 2,
                (batch, n_kv_heads, -(-n_rows // RUN)),
            ],
            output_dtypes=[*[mx.int32] * 3, mx.uint32],
        )
        return Choice(rows, *swaps) if n_swapped else Choice(rows)


@functools.cache
def _no_rows() -> Array:
    return mx.array([0] * common.SMALL, mx.int32)


KERNEL = ChooseRows()
