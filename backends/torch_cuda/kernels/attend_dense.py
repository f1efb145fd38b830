"""Attention over dense and recent rows, and the logarithm of what they are given, in one kernel."""

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
"""Rows that a program takes at a time."""


@triton.jit
def add_rows(best, total, sums, score, values):
    """A softmax's largest score, sum, and sums of values, with some rows' scores and values."""
    highest = tl.maximum(best, tl.max(score, axis=0))
    weights = tl.exp(score - highest)
    fade = tl.exp(best - highest)
    return (
        highest,
        total * fade + tl.sum(weights, axis=0),
        sums * fade + tl.sum(weights[:, None] * values, axis=0),
    )


@triton.jit(
    do_not_specialize=[
        *("queries", "keys", "values", "keys_batch", "keys_head", "keys_row"),
        *("values_batch", "values_head", "values_row", "n_used", "numbers", "numbers_batch"),
        *("numbers_head", "numbers_row", "scales", "scales_batch", "scales_head", "scales_row"),
        *("sinks", "n_rows", "n_recent", "n_heads", "n_queries", "n_sharing"),
    ]
)
def attend_dense_kernel(
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
    sinks,
    output,
    totals,
    n_rows,
    n_recent,
    n_heads,
    n_queries,
    n_sharing,
    HAS_USED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    N: tl.constexpr,
    N_FEATURES: tl.constexpr,
    N_VALUES: tl.constexpr,
):
    head, query, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // n_sharing
    place = (batch * n_heads + head) * n_queries + query
    features, of_values = tl.arange(0, N_FEATURES), tl.arange(0, N_VALUES)
    is_feature, is_value = (features < HEAD_DIM)[None, :], (of_values < VALUE_DIM)[None, :]
    asked = tl.load(queries + place * HEAD_DIM + features, mask=features < HEAD_DIM, other=0.0)
    asked = asked.to(tl.float32)[None, :]
    keys += batch * keys_batch + kv_head * keys_head
    values += batch * values_batch + kv_head * values_head
    numbers += batch * numbers_batch + kv_head * numbers_head
    scales += batch * scales_batch + kv_head * scales_head
    if HAS_SINKS:
        # a score whose row is nothing
        best = tl.load(sinks + head).to(tl.float32)
        total = best * 0 + 1.0
    else:
        # lower than any score, and finite: nothing is divided by zero
        best = tl.full((), -1e38, tl.float32)
        total = tl.zeros((), tl.float32)
    sums = tl.zeros((N_VALUES,), tl.float32)
    for start in range(0, n_recent, N):
        rows = (start + tl.arange(0, N)).to(tl.int64)
        is_row = rows < n_recent
        at = numbers + (rows * numbers_row)[:, None]
        x = tl.load(at + features[None, :], mask=is_row[:, None] & is_feature, other=0)
        of_key = tl.load(scales + rows * scales_row, mask=is_row, other=0.0)
        score = tl.sum(x.to(tl.float32) * asked, axis=1) * of_key
        score = tl.where(is_row, score, float("-inf"))
        at += HEAD_DIM
        x = tl.load(at + of_values[None, :], mask=is_row[:, None] & is_value, other=0)
        of_value = tl.load(scales + rows * scales_row + 1, mask=is_row, other=0.0)
        x = x.to(tl.float32) * of_value[:, None]
        best, total, sums = add_rows(best, total, sums, score, x)
    n_seen = n_rows - n_queries + query + 1
    if HAS_USED:
        n_seen = tl.load(n_used).to(tl.int32)
    for start in range(0, n_seen, N):
        rows = (start + tl.arange(0, N)).to(tl.int64)
        is_row = rows < n_seen
        at = keys + (rows * keys_row)[:, None] + features[None, :]
        x = tl.load(at, mask=is_row[:, None] & is_feature, other=0.0).to(tl.float32)
        score = tl.where(is_row, tl.sum(x * asked, axis=1), float("-inf"))
        at = values + (rows * values_row)[:, None] + of_values[None, :]
        x = tl.load(at, mask=is_row[:, None] & is_value, other=0.0).to(tl.float32)
        best, total, sums = add_rows(best, total, sums, score, x)
    found = (sums / total).to(output.dtype.element_ty)
    tl.store(output + place * VALUE_DIM + of_values, found, mask=of_values < VALUE_DIM)
    tl.store(totals + place, best + tl.log(total))


class AttendDense:
    """:func:`xkv.ops.working_set.attend_dense`

    A program takes a query of a query head, and all rows, 32 at a time: their keys and values,
    ``head_dim + value_dim`` elements, and of recent ones as many bytes and 8, which the other
    queries of the KV head read out of the L2 cache. ``2 * (head_dim + value_dim)`` flops a row, an
    exponential and some conversions. It writes an output and a number.
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
            backend.normal((2, 2, BLOCK_ROWS + 5, dim), seed) for seed, dim in enumerate(2 * dims)
        )
        held = keys.to(dense.keys.dtype), values.to(dense.values.dtype)
        recent = dense.recent
        if recent is not None:
            recent = packed(backend, *others)
        n_used = None if dense.n_used is None else dense.n_used * 0 + BLOCK_ROWS + 2
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
        attend_dense_kernel[(n_heads, n_queries, batch)](
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
            sinks=totals if sinks is None else sinks.contiguous(),
            output=output,
            totals=totals,
            n_rows=n_rows,
            n_recent=n_recent,
            n_heads=n_heads,
            n_queries=n_queries,
            n_sharing=n_heads // n_kv_heads,
            HAS_USED=dense.n_used is not None,
            HAS_SINKS=sinks is not None,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            N=BLOCK_ROWS,
            N_FEATURES=triton.next_power_of_2(head_dim),
            N_VALUES=triton.next_power_of_2(value_dim),
            num_warps=4,
        )
        return output, totals


KERNEL = AttendDense()
