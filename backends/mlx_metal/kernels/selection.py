"""Search for the largest of many keys, by one threadgroup."""

from __future__ import annotations

from xkv.backends.mlx_metal.kernels import common

THREADS = common.SIMDGROUP**2
"""Of a threadgroup that searches: each simdgroup looks at a number of all simdgroups."""

SELECTION_SOURCE = """
// What the threads of a threadgroup tell each other.
template <int THREADS>
struct board {
  uint bins[THREADS];
  uint lowest[32], highest[32];
  int totals[32];
  int bin, n_before, n_in_bin;
};

struct sums {
  int before, all;
};

// The sum of a number over the threads before this one, and over all.
template <int THREADS>
METAL_FUNC sums sum_before(int n, threadgroup board<THREADS>& shared, int lane, int sg) {
  const int before = simd_prefix_exclusive_sum(n);
  if (lane == 31) shared.totals[sg] = before + n;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int total = shared.totals[lane];
  const int earlier = simd_shuffle(simd_prefix_exclusive_sum(total), sg);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return {earlier + before, simd_sum(total)};
}

// Numbers i of the `n_wanted` largest keys.key(i), of equal ones the first, in order of i; and how
// many these are: with no more keys than are wanted, all. A key of 0 is none; where there are more
// keys than are wanted, at least as many are others. All threads of the threadgroup call this.
template <int THREADS, typename Keys>
METAL_FUNC int find_best(Keys keys,
                         int n_keys,
                         int n_wanted,
                         threadgroup int* found,
                         threadgroup board<THREADS>& shared,
                         int thread_index,
                         int lane,
                         int sg) {
  uint low = ~0u, high = 0;
  for (int i = thread_index; i < n_keys; i += THREADS) {
    const uint key = keys.key(i);
    if (key) low = min(low, key);
    high = max(high, key);
  }
  low = simd_min(low);
  high = simd_max(high);
  if (lane == 0) {
    shared.lowest[sg] = low;
    shared.highest[sg] = high;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  low = simd_min(shared.lowest[lane]);
  high = simd_max(shared.highest[lane]);

  // keys above `high` are all wanted, and `n_left` of the `n_within` from `low` to `high`: these
  // are counted by bins, from the highest on, and the bin that the last is in is the next range
  int n_left = n_wanted, n_within = n_keys;
  while (low < high && n_within > n_left) {
    const int shift = max(0, 1 + int(clz(uint(THREADS))) - int(clz(high - low)));
    shared.bins[thread_index] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < n_keys; i += THREADS) {
      const uint key = keys.key(i);
      if (key < low || key > high) continue;
      threadgroup uint* counted = shared.bins + ((key - low) >> shift);
      atomic_fetch_add_explicit((threadgroup atomic_uint*)counted, 1u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int bin = THREADS - 1 - thread_index, n_in_bin = shared.bins[bin];
    const int n_before = sum_before(n_in_bin, shared, lane, sg).before;
    if (n_before < n_left && n_before + n_in_bin >= n_left) {
      shared.bin = bin;
      shared.n_before = n_before;
      shared.n_in_bin = n_in_bin;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    low += uint(shared.bin) << shift;
    high = low + min(high - low, (1u << shift) - 1);
    n_left -= shared.n_before;
    n_within = shared.n_in_bin;
  }

  int n_above = 0, n_ties = 0;
  for (int first = 0; first < n_keys; first += THREADS) {
    const int i = first + thread_index;
    const uint key = i < n_keys ? keys.key(i) : 0;
    const bool is_above = key > high, is_tie = key >= low && key <= high;
    // two counts in one number
    const sums n = sum_before(int(is_above) | int(is_tie) << 16, shared, lane, sg);
    const int ties_before = n_ties + (n.before >> 16);
    if (is_above || (is_tie && ties_before < n_left))
      found[n_above + (n.before & 0xffff) + min(ties_before, n_left)] = i;
    n_above += n.all & 0xffff;
    n_ties += n.all >> 16;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return n_above + min(n_ties, n_left);
}
"""
"""``find_best``. Keys are unsigned numbers that a functor gives by number."""
