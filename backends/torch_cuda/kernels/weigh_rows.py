"""Weighted sums of some rows of a latent: gather, unpack and multiply in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels.common import (
    LATENT_ARGUMENTS,
    band_columns,
    latent_arguments,
    latent_constants,
    latent_problem,
    plain_columns,
    sample_latent,
)
from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.types import Array

BLOCK_ROWS = 64
"""Rows of a product: with fewer, a program would wait for memory more often."""
SUMS = 16
"""Sums of a program, the least that ``tl.dot`` takes."""


@triton.jit(
    do_not_specialize=[
        *LATENT_ARGUMENTS,
        "rows",
        "weights",
        "weights_batch",
        "weights_head",
        "weights_sum",
        "n_rows",
        "n_kv_heads",
        "n_sums",
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
    weights,
    weights_batch,
    weights_head,
    weights_sum,
    output,
    n_rows,
    n_kv_heads,
    n_sums,
    IS_PACKED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    N_SUMS: tl.constexpr,
    BAND_WIDTH: tl.constexpr,
):
    dtype: tl.constexpr = weights.dtype.element_ty
    band, head_of_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head = head_of_batch // n_kv_heads, head_of_batch % n_kv_heads
    sums = tl.program_id(1) * N_SUMS + tl.arange(0, N_SUMS)
    is_sum = sums < n_sums
    numbers += batch * numbers_batch
    rows += head_of_batch * n_rows
    weights += batch * weights_batch + head * weights_head
    columns = tl.arange(0, BAND_WIDTH)
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
                columns,
                is_inside,
            )
        else:
            tile = plain_columns(
                row_numbers, band * BAND_WIDTH + columns, rank, is_inside, IS_ALIGNED
            )
        given = tl.load(
            weights + sums.to(tl.int64)[:, None] * weights_sum + wanted[None, :],
            mask=is_sum[:, None] & is_inside[None, :],
            other=0.0,
        )
        total = tl.dot(given, tile.to(dtype), total, input_precision="ieee")
    at = band * BAND_WIDTH + columns
    pointers = output + (head_of_batch * n_sums + sums)[:, None] * rank + at[None, :]
    tl.store(pointers, total.to(dtype), mask=is_sum[:, None] & (at < rank)[None, :])


class WeighRows:
    """:func:`xkv.ops.attention.weigh_rows`

    A program takes a KV head, a band (of a matrix: as many columns) and 16 sums. It reads its
    columns of each row, ``8 * bits`` bytes with a scale and a bias where they are packed, and the
    sums' weights; it writes ``16 * 64`` numbers. Columns are read again, mostly out of the L2
    cache, for each 16 sums, weights for each band. ``2 * rank`` flops a row and sum, sums padded
    to 16 and rows to 64, and some 15 integer operations for each packed number. Values are
    widened in registers, never written out.
    """

    name = "weigh_rows"

    def why_not(self, latent: Latent, rows: Array, weights: Array) -> str | None:
        """Any rank, bits and number of rows and sums; the weights of a sum side by side."""
        if weights.stride(3) != 1 and weights.shape[3] > 1:
            return "a sum's weights are strided; the kernel reads them side by side"
        return latent_problem(latent)

    def sample(
        self, backend: Backend, latent: Latent, rows: Array, weights: Array
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows, backwards, and as many of sums."""
        n_rows = BLOCK_ROWS + 1
        ids = torch.arange(n_rows - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        numbers = backend.normal((2, 2, SUMS + 1, n_rows), 1).to(weights.dtype)
        return sample_latent(backend, latent, n_rows), ids.expand(2, 2, n_rows), numbers

    def check_key(self, latent: Latent, rows: Array, weights: Array) -> tuple[Any, ...]:
        """Dtypes, packed or not."""
        dtypes = str(weights.dtype).removeprefix("torch."), latent.dtype
        return *dtypes, *latent_constants(latent).values(), rows.dtype

    def __call__(self, latent: Latent, rows: Array, weights: Array) -> Array:
        """``[B, n_kv_heads, M, r]`` in the weights' dtype."""
        batch, n_kv_heads, n_sums, n_rows = weights.shape
        shape = batch, n_kv_heads, n_sums, latent.rank
        output = torch.empty(shape, dtype=weights.dtype, device=weights.device)
        grid = triton.cdiv(latent.rank, BAND), triton.cdiv(n_sums, SUMS), batch * n_kv_heads
        weigh_rows_kernel[grid](
            **latent_arguments(latent),
            rows=rows.contiguous(),
            weights=weights,
            weights_batch=weights.stride(0),
            weights_head=weights.stride(1),
            weights_sum=weights.stride(2),
            output=output,
            n_rows=n_rows,
            n_kv_heads=n_kv_heads,
            n_sums=n_sums,
            N=BLOCK_ROWS,
            N_SUMS=SUMS,
            BAND_WIDTH=BAND,
            num_warps=8 if latent.is_packed else 4,
            num_stages=2,
        )
        return output


KERNEL = WeighRows()
