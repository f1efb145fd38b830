"""Attention over some rows of a latent, beside others: gather, unpack, softmax and sum in one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels.common import (
    LATENT_ARGUMENTS,
    ROWS_ARGUMENTS,
    band_columns,
    latent_arguments,
    latent_constants,
    latent_problem,
    plain_columns,
    rows_arguments,
    sample_latent,
)
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import Array

BLOCK_ROWS = 32
"""Rows of a product: with more, few programs would share a multiprocessor's registers."""
WARPS = 4
"""Of a program, 32 threads each."""
SUMS = 16
"""Sums of a program, the least that ``tl.dot`` takes."""


@triton.jit(
    do_not_specialize=[
        *LATENT_ARGUMENTS,
        *ROWS_ARGUMENTS,
        *("scores", "totals", "beside"),
        *("n_rows", "n_kv_heads", "n_sums", "value_dim"),
    ]
)
def weigh_rows_kernel(
    numbers,
    numbers_batch,
    numbers_row,
    scales,
    biases,
    scales_batch,
    scales_row,
    bands,
    rank,
    rows,
    rows_batch,
    rows_head,
    scores,
    totals,
    beside,
    output,
    rest,
    n_rows,
    n_kv_heads,
    n_sums,
    value_dim,
    IS_PACKED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    N_SUMS: tl.constexpr,
    BAND_WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = beside.dtype.element_ty
    band, head_of_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head = head_of_batch // n_kv_heads, head_of_batch % n_kv_heads
    sums = tl.program_id(1) * N_SUMS + tl.arange(0, N_SUMS)
    is_sum = sums < n_sums
    # of all sums of the batch
    places = head_of_batch * n_sums + sums
    numbers += batch * numbers_batch
    rows += batch * rows_batch + head * rows_head
    columns = tl.arange(0, BAND_WIDTH)
    # relative to the largest score so far: in few bits the weights of small ones keep theirs
    best = tl.full((N_SUMS,), float("-inf"), tl.float32)
    given = tl.zeros((N_SUMS,), tl.float32)
    total = tl.zeros((N_SUMS, BAND_WIDTH), tl.float32)
    for start in range(0, n_rows, N):
        wanted = start + tl.arange(0, N)
        is_inside = wanted < n_rows
        ids = tl.load(rows + wanted, mask=is_inside, other=0).to(tl.int64)
        row_numbers = numbers + ids * numbers_row
        if IS_PACKED:
            at_scales = batch * scales_batch + ids * scales_row
            tile = band_columns(
                row_numbers,
                scales + at_scales,
                biases + at_scales,
                bands,
                band,
                0,
                is_inside,
                BAND_WIDTH,
            )
        else:
            tile = plain_columns(
                row_numbers, band * BAND_WIDTH + columns, rank, is_inside, IS_ALIGNED
            )
        score = tl.load(
            scores + places[:, None] * n_rows + wanted[None, :],
            mask=is_sum[:, None] & is_inside[None, :],
            other=0.0,
        )
        score = tl.where(is_inside[None, :], score, float("-inf"))
        highest = tl.maximum(best, tl.max(score, axis=1))
        weights = tl.exp(score - highest[:, None])
        fade = tl.exp(best - highest)
        given = given * fade + tl.sum(weights, axis=1)
        total = total * fade[:, None]
        total = tl.dot(weights.to(dtype), tile.to(dtype), total, input_precision="ieee")
        best = highest
    to_others = tl.load(totals + places, mask=is_sum, other=0.0)
    highest = tl.maximum(best, to_others)
    on_rows, on_others = tl.exp(best - highest), tl.exp(to_others - highest)
    whole = given * on_rows + on_others
    total = total * (on_rows / whole)[:, None]
    at = band * BAND_WIDTH + columns
    pointers = output + places[:, None] * rank + at[None, :]
    tl.store(pointers, total.to(dtype), mask=is_sum[:, None] & (at < rank)[None, :])
    if band == 0:
        part = on_others / whole
        for start in range(0, value_dim, BAND_WIDTH):
            is_read = is_sum[:, None] & (start + columns < value_dim)[None, :]
            at_rest = places[:, None] * value_dim + (start + columns)[None, :]
            left = tl.load(beside + at_rest, mask=is_read, other=0.0).to(tl.float32)
            tl.store(rest + at_rest, (left * part[:, None]).to(dtype), mask=is_read)


class WeighRows:
    """:func:`xkv.ops.working_set.weigh_rows`

    A program takes a KV head, a band (of a matrix: as many columns) and 16 sums. It reads its
    columns of each row, ``8 * bits`` bytes with a scale and a bias where they are packed, and the
    sums' scores, 4 bytes each; it writes ``16 * 64`` numbers. Columns are read again, mostly out of
    the L2 cache, for each 16 sums, scores for each band. Of the first band it reads and writes
    ``value_dim`` numbers a sum of what is beside. ``2 * rank`` flops a row and sum, an exponential
    for each band of these, sums padded to 16 and rows to 32, and some 15 integer operations for
    each packed number. Values are widened in registers, weights made there; neither is written out.
    """

    name = "weigh_rows"

    def leading(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> Array:
        """What is beside."""
        return beside

    def why_not(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> str | None:
        """Any rank, bits and number of rows and sums; scores and totals in float32."""
        for name, x in (("scores", scores), ("totals", totals)):
            if x.dtype != torch.float32:
                return f"the {name} are {x.dtype}; the kernel takes float32"
        return latent_problem(latent)

    def sample(
        self,
        backend: Backend,
        latent: Latent,
        rows: Array,
        scores: Array,
        totals: Array,
        beside: Array,
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows, backwards, and as many of sums."""
        n_rows, shape = BLOCK_ROWS + 1, (2, 2, SUMS + 1)
        ids = torch.arange(n_rows - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        drawn = backend.normal((*shape, n_rows), 1), 4 + backend.normal(shape, 2)
        others = backend.normal((*shape, beside.shape[-1]), 3).to(beside.dtype)
        return sample_latent(backend, latent, n_rows), ids.expand(2, 2, n_rows), *drawn, others

    def check_key(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Any, ...]:
        """Dtypes, packed or not."""
        dtypes = str(beside.dtype).removeprefix("torch."), latent.dtype
        return *dtypes, *latent_constants(latent).values(), rows.dtype

    def __call__(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        """``[B, n_kv_heads, M, r]`` and ``[B, n_kv_heads, M, value_dim]``"""
        batch, n_kv_heads, n_sums, n_rows = scores.shape
        output, rest = (
            torch.empty((*scores.shape[:3], n), dtype=beside.dtype, device=beside.device)
            for n in (latent.rank, beside.shape[-1])
        )
        grid = triton.cdiv(latent.rank, BAND), triton.cdiv(n_sums, SUMS), batch * n_kv_heads
        weigh_rows_kernel[grid](
            **latent_arguments(latent),
            **rows_arguments(rows),
            scores=scores.contiguous(),
            totals=totals.contiguous(),
            beside=beside.contiguous(),
            output=output,
            rest=rest,
            n_rows=n_rows,
            n_kv_heads=n_kv_heads,
            n_sums=n_sums,
            value_dim=beside.shape[-1],
            N=BLOCK_ROWS,
            N_SUMS=SUMS,
            BAND_WIDTH=BAND,
            num_warps=WARPS,
            num_stages=1,
        )
        return output, rest


KERNEL = WeighRows()
