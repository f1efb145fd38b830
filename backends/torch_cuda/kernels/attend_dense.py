"""Attention over dense and recent rows, and the logarithm of what they are given: two kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
from xkv.ops.backend import Backend
from xkv.ops.recent import packed
from xkv.ops.scores import Dense
from xkv.ops.sequences import AnyDense
from xkv.ops.types import Array

BLOCK_ROWS = 32
"""Rows that a program takes at a time, half as many in float32."""
WARPS = 4
"""Of a program, 32 threads each."""
PART = 64
"""Rows of a program: a step has few, which are to fill the device."""
COLUMNS = 16
"""Queries of a program, the least that ``tl.dot`` takes."""
PARTS = 16
"""Parts that are put together at a time."""


@triton.jit
def add_rows(best, total, sums, score, values):
    """Largest scores, sums of weights, and of values, with some rows' scores and values."""
    highest = tl.maximum(best, tl.max(score, axis=0))
    weights = tl.exp(score - highest[None, :])
    fade = tl.exp(best - highest)
    found = tl.dot(tl.trans(weights.to(values.dtype)), values, input_precision="ieee")
    return highest, total * fade + tl.sum(weights, axis=0), sums * fade[:, None] + found


@triton.jit(
    do_not_specialize=[
        *("n_used", "scales", "scales_batch", "scales_head", "sums", "totals"),
        *("n_rows", "n_recent", "n_kv_heads", "n_queries", "n_asking"),
    ]
)
def attend_parts_kernel(
    queries,
    keys,
    keys_batch,
    keys_head,
    keys_row,
    values,
    values_batch,
    values_head,
    values_row,
    n_used,
    numbers,
    numbers_batch,
    numbers_head,
    numbers_row,
    scales,
    scales_batch,
    scales_head,
    scales_row,
    sums,
    totals,
    n_rows,
    n_recent,
    n_kv_heads,
    n_queries,
    n_asking,
    HAS_USED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    N: tl.constexpr,
    N_PART: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    N_FEATURES: tl.constexpr,
    N_VALUES: tl.constexpr,
):
    dtype: tl.constexpr = queries.dtype.element_ty
    part, head_of_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head = head_of_batch // n_kv_heads, head_of_batch % n_kv_heads
    asking = tl.program_id(1) * N_COLUMNS + tl.arange(0, N_COLUMNS)
    is_asking = asking < n_asking
    places = head_of_batch * n_asking + asking
    features, of_values = tl.arange(0, N_FEATURES), tl.arange(0, N_VALUES)
    is_feature, is_value = (features < HEAD_DIM)[None, :], (of_values < VALUE_DIM)[None, :]
    asked = tl.load(
        queries + places[None, :] * HEAD_DIM + features[:, None],
        mask=is_asking[None, :] & (features < HEAD_DIM)[:, None],
        other=0.0,
    )
    keys += batch * keys_batch + head * keys_head
    values += batch * values_batch + head * values_head
    numbers += batch * numbers_batch + head * numbers_head
    scales += batch * scales_batch + head * scales_head
    # lower than any score, and finite: a part may have no row that a query sees
    best = tl.full((N_COLUMNS,), -1e38, tl.float32)
    total = tl.zeros((N_COLUMNS,), tl.float32)
    found = tl.zeros((N_COLUMNS, N_VALUES), tl.float32)
    # the first parts are of recent rows, the others of dense ones
    n_recent_parts = tl.cdiv(n_recent, N_PART)
    first = part * N_PART
    for start in range(first, tl.minimum(first + N_PART, n_recent), N):
        rows = (start + tl.arange(0, N)).to(tl.int64)
        is_row = rows < n_recent
        at = numbers + (rows * numbers_row)[:, None]
        x = tl.load(at + features[None, :], mask=is_row[:, None] & is_feature, other=0)
        of_key = tl.load(scales + rows * scales_row, mask=is_row, other=0.0)
        score = tl.dot(x.to(tl.float32).to(dtype), asked, input_precision="ieee")
        score = score * of_key[:, None]
        score = tl.where(is_row[:, None], score, float("-inf"))
        at += HEAD_DIM
        x = tl.load(at + of_values[None, :], mask=is_row[:, None] & is_value, other=0)
        of_value = tl.load(scales + rows * scales_row + 1, mask=is_row, other=0.0)
        x = x.to(tl.float32) * of_value[:, None]
        best, total, found = add_rows(best, total, found, score, x.to(dtype))
    n_in_use, n_seen = n_rows, n_rows - n_queries + asking % n_queries + 1
    if HAS_USED:
        n_in_use = tl.load(n_used).to(tl.int32)
        n_seen = n_seen * 0 + n_in_use
    first = (part - n_recent_parts) * N_PART
    end = tl.where(first < 0, first, tl.minimum(first + N_PART, n_in_use))
    for start in range(first, end, N):
        rows = (start + tl.arange(0, N)).to(tl.int64)
        is_row = (rows < n_in_use)[:, None]
        at = keys + (rows * keys_row)[:, None] + features[None, :]
        x = tl.load(at, mask=is_row & is_feature, other=0.0)
        score = tl.dot(x.to(dtype), asked, input_precision="ieee")
        score = tl.where(rows[:, None] < n_seen[None, :], score, float("-inf"))
        at = values + (rows * values_row)[:, None] + of_values[None, :]
        x = tl.load(at, mask=is_row & is_value, other=0.0)
        best, total, found = add_rows(best, total, found, score, x.to(dtype))
    at_part = places * tl.num_programs(0) + part
    tl.store(
        sums + at_part[:, None] * VALUE_DIM + of_values[None, :],
        found,
        mask=is_asking[:, None] & is_value,
    )
    tl.store(totals + 2 * at_part, best, mask=is_asking)
    tl.store(totals + 2 * at_part + 1, total, mask=is_asking)


@triton.jit(do_not_specialize=["sums", "part_totals", "sinks", "n_parts", "n_heads", "n_queries"])
def add_parts_kernel(
    sums,
    part_totals,
    sinks,
    output,
    totals,
    n_parts,
    n_heads,
    n_queries,
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    N_PARTS: tl.constexpr,
    N_VALUES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    of_values = tl.arange(0, N_VALUES)
    if HAS_SINKS:
        # a score whose row is nothing
        best = tl.load(sinks + place // n_queries % n_heads).to(tl.float32)
        total = best * 0 + 1.0
    else:
        best = tl.full((), -1e38, tl.float32)
        total = tl.zeros((), tl.float32)
    found = tl.zeros((N_VALUES,), tl.float32)
    for start in range(0, n_parts, N_PARTS):
        part = start + tl.arange(0, N_PARTS)
        at = place * n_parts + part
        is_part = part < n_parts
        highest = tl.load(part_totals + 2 * at, mask=is_part, other=-1e38)
        given = tl.load(part_totals + 2 * at + 1, mask=is_part, other=0.0)
        x = tl.load(
            sums + at[:, None] * VALUE_DIM + of_values[None, :],
            mask=is_part[:, None] & (of_values < VALUE_DIM)[None, :],
            other=0.0,
        )
        before = best
        best = tl.maximum(best, tl.max(highest, axis=0))
        weights, fade = tl.exp(highest - best), tl.exp(before - best)
        total = total * fade + tl.sum(given * weights, axis=0)
        found = found * fade + tl.sum(x * weights[:, None], axis=0)
    found = (found / total).to(output.dtype.element_ty)
    tl.store(output + place * VALUE_DIM + of_values, found, mask=of_values < VALUE_DIM)
    tl.store(totals + place, best + tl.log(total))


class AttendDense:
    """:func:`xkv.ops.working_set.attend_dense`

    A program takes a KV head, 16 of its queries and 64 recent or dense rows: their keys and
    values, ``head_dim + value_dim`` elements, and of recent ones as many bytes and 8. It writes
    ``value_dim + 2`` numbers a query in float32, which a second kernel puts together with those of
    the other parts. ``2 * (head_dim + value_dim)`` flops a row and query, queries padded to 16, an
    exponential and some conversions; weights are rounded to the queries' dtype.
    """

    name = "attend_dense"

    def leading(self, queries: Array, dense: Dense, sinks: Array | None) -> Array:
        """The queries."""
        return queries

    def why_not(self, queries: Array, dense: AnyDense, sinks: Array | None) -> str | None:
        """Any dims and numbers; the features side by side, one query where not all are in use."""
        if not isinstance(dense, Dense):
            return "Triton kernels take the rows of one batch, not several sequences' own"
        for name in ("keys", "values"):
            x = getattr(dense, name)
            if x.dtype not in KERNEL_DTYPES:
                return f"the {name} are {x.dtype}; Triton kernels take 16- and 32-bit floats"
            if x.stride(3) != 1 and x.shape[3] > 1:
                return f"the {name} are strided; the kernel reads their features side by side"
        if dense.n_used is not None and queries.shape[2] > 1:
            return "several queries of rows that are not all in use"
        return None

    def sample(
        self, backend: Backend, queries: Array, dense: Dense, sinks: Array | None
    ) -> tuple[Any, ...]:
        """Several of everything, one and a bit blocks of rows and of recent ones."""
        n_queries = 1 if dense.n_used is not None else 3
        dims = dense.keys.shape[-1], dense.values.shape[-1]
        drawn = backend.normal((2, 4, n_queries, dims[0]), 0) * (3 * dims[0] ** -0.5)
        keys, values, *others = (
            backend.normal((2, 2, PART + 5, dim), seed) for seed, dim in enumerate(2 * dims)
        )
        held = keys.to(dense.keys.dtype), values.to(dense.values.dtype)
        recent = dense.recent
        if recent is not None:
            recent = packed(backend, *others)
        n_used = None if dense.n_used is None else dense.n_used * 0 + PART + 2
        if sinks is not None:
            sinks = drawn[0, :, 0, 0].to(sinks.dtype)
        return drawn.to(queries.dtype), Dense(*held, n_used, recent), sinks

    def check_key(self, queries: Array, dense: Dense, sinks: Array | None) -> tuple[Any, ...]:
        """Dtypes, dims, and whether there are recent rows, sinks, and rows out of use."""
        dtypes = str(queries.dtype).removeprefix("torch."), dense.keys.dtype
        of_sinks = None if sinks is None else sinks.dtype
        of_used = getattr(dense.n_used, "dtype", None)
        dims = dense.keys.shape[-1], dense.values.shape[-1]
        return *dtypes, *dims, of_sinks, of_used, dense.recent is not None

    def __call__(self, queries: Array, dense: Dense, sinks: Array | None) -> tuple[Array, Array]:
        """``[B, n_heads, Lq, value_dim]`` as the queries are, ``[B, n_heads, Lq]`` in float32."""
        batch, n_heads, n_queries, head_dim = queries.shape
        _, n_kv_heads, n_rows, value_dim = dense.values.shape
        output, totals = (
            torch.empty((*queries.shape[:3], *last), dtype=dtype, device=queries.device)
            for last, dtype in (((value_dim,), queries.dtype), ((), torch.float32))
        )
        numbers, scales, n_recent = dense.keys, totals, 0
        if dense.recent is not None:
            numbers, scales = dense.recent.numbers.contiguous(), dense.recent.scales.contiguous()
            n_recent = numbers.shape[2]
        n_asking = n_heads // n_kv_heads * n_queries
        n_parts = triton.cdiv(n_recent, PART) + triton.cdiv(n_rows, PART)
        places = batch * n_heads * n_queries, n_parts
        sums, part_totals = (
            torch.empty((*places, n), dtype=torch.float32, device=queries.device)
            for n in (value_dim, 2)
        )
        attend_parts_kernel[(n_parts, triton.cdiv(n_asking, COLUMNS), batch * n_kv_heads)](
            queries=queries.contiguous(),
            keys=dense.keys,
            keys_batch=dense.keys.stride(0),
            keys_head=dense.keys.stride(1),
            keys_row=dense.keys.stride(2),
            values=dense.values,
            values_batch=dense.values.stride(0),
            values_head=dense.values.stride(1),
            values_row=dense.values.stride(2),
            n_used=totals if dense.n_used is None else dense.n_used,
            numbers=numbers,
            numbers_batch=numbers.stride(0),
            numbers_head=numbers.stride(1),
            numbers_row=numbers.stride(2),
            scales=scales,
            scales_batch=scales.stride(0),
            scales_head=scales.stride(1),
            scales_row=2,
            sums=sums,
            totals=part_totals,
            n_rows=n_rows,
            n_recent=n_recent,
            n_kv_heads=n_kv_heads,
            n_queries=n_queries,
            n_asking=n_asking,
            HAS_USED=dense.n_used is not None,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            N=BLOCK_ROWS * 2 // max(queries.itemsize, 2),
            N_PART=PART,
            N_COLUMNS=COLUMNS,
            N_FEATURES=max(triton.next_power_of_2(head_dim), 16),
            N_VALUES=max(triton.next_power_of_2(value_dim), 16),
            num_warps=WARPS,
            num_stages=1,
        )
        add_parts_kernel[(places[0],)](
            sums=sums,
            part_totals=part_totals,
            sinks=totals if sinks is None else sinks.contiguous(),
            output=output,
            totals=totals,
            n_parts=n_parts,
            n_heads=n_heads,
            n_queries=n_queries,
            HAS_SINKS=sinks is not None,
            VALUE_DIM=value_dim,
            N_PARTS=PARTS,
            N_VALUES=triton.next_power_of_2(value_dim),
            num_warps=1,
        )
        return output, totals


KERNEL = AttendDense()
