"""Which rows of many are worth most: the best of runs of them, then in the best of these."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.ops.backend import Backend
from xkv.ops.types import Array

RUNS = 4096
"""Of neighbouring rows, a power of two: as many as there are at most."""
RUN = 8
"""Rows of a run, at least."""
ROWS = 16384
"""Rows in the best runs, at most; fewer than 2^20."""
WARPS = 16
"""Of a program of the second kernel."""
LOADED = 2048
"""Rows of a program of the first kernel."""


@triton.jit
def ordered(x):
    """Integers in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def n_reaching(numbers, least):
    """How many of some integers are no less than another."""
    return (numbers >= least).to(tl.int64)


@triton.jit
def places_of_largest(numbers, count):
    """Of ``[N]`` integers, which are the ``count`` largest, and the place of each among these.

    Of equal ones the first; places are in the order of the integers in memory.
    """
    # the largest number that so many reach, found by two bits at a time, the sign's first
    n_positive = tl.sum((numbers >= 0).to(tl.int32), axis=0)
    least = tl.where(n_positive < count, -2147483648, 0).to(tl.int32)
    for n in range(0, 16):
        # the lowest bit twice in the end: 31 are left
        shift = tl.maximum(29 - 2 * n, 0)
        one, two = least | (1 << shift), least | (2 << shift)
        three = one | two
        reached = n_reaching(numbers, one) + (n_reaching(numbers, two) << 20)
        total = tl.sum(reached + (n_reaching(numbers, three) << 40), axis=0)
        least = tl.where((total & 0xFFFFF) >= count, one, least)
        least = tl.where(((total >> 20) & 0xFFFFF) >= count, two, least)
        least = tl.where((total >> 40) >= count, three, least)
    is_more, is_equal = numbers > least, numbers == least
    n_equal = count - tl.sum(is_more.to(tl.int32), axis=0)
    # how many of each there are so far, in one sum
    so_far = tl.cumsum(is_more.to(tl.int64) + (is_equal.to(tl.int64) << 20), 0)
    more, equal = (so_far & 0xFFFFF).to(tl.int32), (so_far >> 20).to(tl.int32)
    is_chosen = is_more | (is_equal & (equal <= n_equal))
    return is_chosen, more + tl.minimum(equal, n_equal) - 1


@triton.jit(do_not_specialize=["n_rows", "n_runs"])
def best_of_runs_kernel(worth, best, n_rows, n_runs, N_RUN: tl.constexpr, N: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * N + tl.arange(0, N)
    at = run[:, None] * N_RUN + tl.arange(0, N_RUN)[None, :]
    x = tl.load(worth + place * n_rows + at, mask=at < n_rows, other=float("-inf"))
    tl.store(best + place * n_runs + run, tl.max(x, axis=1), mask=run < n_runs)


@triton.jit(do_not_specialize=["worth", "best", "runs", "rows", "n_rows", "count", "n_runs"])
def choose_rows_kernel(
    worth,
    best,
    runs,
    rows,
    n_rows,
    count,
    n_runs,
    N_RUNS: tl.constexpr,
    N_RUN: tl.constexpr,
    N_COUNT: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    worth += place * n_rows
    runs += place * count
    run = tl.arange(0, N_RUNS)
    numbers = ordered(tl.load(best + place * n_runs + run, mask=run < n_runs, other=0.0))
    # less than any number
    numbers = tl.where(run < n_runs, numbers, -2147483648)
    n_wanted = tl.minimum(count, n_runs)
    is_chosen, at = places_of_largest(numbers, n_wanted)
    tl.store(runs + at, run, mask=is_chosen)
    # what other threads of the program wrote
    tl.debug_barrier()
    element = tl.arange(0, N_COUNT * N_RUN)
    wanted = element // N_RUN
    row = tl.load(runs + wanted, mask=wanted < n_wanted, other=0) * N_RUN + element % N_RUN
    is_there = (wanted < n_wanted) & (row < n_rows)
    numbers = ordered(tl.load(worth + row, mask=is_there, other=0.0))
    numbers = tl.where(is_there, numbers, -2147483648)
    is_chosen, at = places_of_largest(numbers, count)
    tl.store(rows + place * count + at, row.to(tl.int64), mask=is_chosen)


class ChooseRows:
    """:func:`xkv.ops.working_set.choose_rows`, rows in their own order.

    The largest ``count`` numbers are in the ``count`` runs whose largest are largest. A first
    kernel reads 4 bytes a row and writes 4 a run. A program of the second takes a KV head: it reads
    those of the runs and, of the chosen ones, of the rows again, and searches each time for the
    number that just so many reach, two of its bits at a time: 48 comparisons of each of up to 4,096
    runs, then of each row of the chosen ones.
    """

    name = "choose_rows"

    def leading(self, worth: Array, count: int) -> Array:
        """The worth."""
        return worth

    def why_not(self, worth: Array, count: int) -> str | None:
        """Float32; so few rows that those of the best runs fit into registers."""
        if worth.dtype != torch.float32:
            return f"the rows' worth is {worth.dtype}; the kernel takes float32"
        if triton.next_power_of_2(count) * _run(worth) > ROWS:
            return f"{count} of {worth.shape[-1]} rows are more than the kernel takes"
        return None

    def sample(self, backend: Backend, worth: Array, count: int) -> tuple[Any, ...]:
        """So many rows that runs are as long."""
        run = _run(worth)
        return backend.normal((2, 2, RUNS // 2 * run + max(count, 5)), 1), count

    def check_key(self, worth: Array, count: int) -> tuple[Any, ...]:
        """The length of a run, the number of runs chosen."""
        return "float32", _run(worth), triton.next_power_of_2(count)

    def __call__(self, worth: Array, count: int) -> Array:
        """``[B, n_kv_heads, count]`` int64"""
        worth, run, n_rows = worth.contiguous(), _run(worth), worth.shape[-1]
        n_runs, n_places = triton.cdiv(n_rows, run), worth.numel() // n_rows
        best, runs, rows = (
            torch.empty((n_places, n), dtype=dtype, device=worth.device)
            for n, dtype in ((n_runs, torch.float32), (count, torch.int32), (count, torch.int64))
        )
        runs_at_once = max(LOADED // run, 1)
        best_of_runs_kernel[(triton.cdiv(n_runs, runs_at_once), n_places)](
            worth=worth,
            best=best,
            n_rows=n_rows,
            n_runs=n_runs,
            N_RUN=run,
            N=runs_at_once,
            num_warps=4,
        )
        choose_rows_kernel[(n_places,)](
            worth=worth,
            best=best,
            runs=runs,
            rows=rows,
            n_rows=n_rows,
            count=count,
            n_runs=n_runs,
            N_RUNS=RUNS,
            N_RUN=run,
            N_COUNT=triton.next_power_of_2(count),
            num_warps=WARPS,
        )
        return rows.view(*worth.shape[:-1], count)


def _run(worth: Array) -> int:
    """Rows of a run: a power of two."""
    return max(triton.next_power_of_2(triton.cdiv(worth.shape[-1], RUNS)), RUN)


KERNEL = ChooseRows()
