"""How much a KV head's queries want each stored row, read off the first band and the scales."""

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
from xkv.ops.index import BLOCK, n_columns
from xkv.ops.latent import Latent
from xkv.ops.types import Array

TILE = 128
"""Rows of a program, a divisor of ``BLOCK``."""
QUERIES = 32
"""Queries of a product, of as many KV heads as fit: a tile's codes and means are read once."""
SHARING = 16
"""Of these, a KV head's at a time."""
BANDS = 16
"""Bands of a product, the least that ``tl.dot`` takes."""
WARPS = 4
"""Of a program, 32 threads each."""


@triton.jit(
    do_not_specialize=[
        *LATENT_ARGUMENTS,
        "absorbed_batch",
        "absorbed_block",
        "n_rows",
        "n_kv_heads",
        "n_sharing",
    ]
)
def index_scores_kernel(
    numbers,
    numbers_batch,
    numbers_row,
    scales,
    biases,
    scales_batch,
    scales_row,
    bands,
    rank,
    absorbed,
    absorbed_batch,
    absorbed_block,
    offsets,
    output,
    n_rows,
    n_kv_heads,
    n_sharing,
    n_all,
    IS_PACKED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BAND_WIDTH: tl.constexpr,
    N_BANDS: tl.constexpr,
    N_HEADS: tl.constexpr,
    N_SHARING: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    dtype: tl.constexpr = absorbed.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * N + tl.arange(0, N)
    is_inside = rows < n_rows
    row_numbers = numbers + batch * numbers_batch + rows.to(tl.int64) * numbers_row
    at_scales = batch * scales_batch + rows.to(tl.int64) * scales_row
    columns = tl.arange(0, BAND_WIDTH)
    is_column = columns < rank
    if IS_PACKED:
        tile = band_columns(
            row_numbers,
            scales + at_scales,
            biases + at_scales,
            bands,
            0,
            0,
            is_inside,
            BAND_WIDTH,
        )
    else:
        tile = plain_columns(row_numbers, columns, rank, is_inside, IS_ALIGNED)
    tile = tile.to(dtype)
    # all rows of a tile are of one block
    block = (tl.program_id(0) * N // BLOCK_SIZE).to(tl.int64)
    absorbed += batch * absorbed_batch + block * absorbed_block
    asking = tl.arange(0, N_HEADS * N_SHARING)
    for first_head in range(0, n_kv_heads, N_HEADS):
        best = tl.full((N, N_HEADS), float("-inf"), tl.float32)
        for start in range(0, n_sharing, N_SHARING):
            head, sharing = first_head + asking // N_SHARING, start + asking % N_SHARING
            is_query = (head < n_kv_heads) & (sharing < n_sharing)
            queries = head * n_sharing + sharing
            if IS_WHOLE:
                # told so, the compiler loads 16 bytes at a time
                is_query = tl.full((N_HEADS * N_SHARING,), 1, tl.int1)
                queries = first_head * N_SHARING + asking
            wanted = tl.load(
                absorbed + columns[:, None] * n_all + queries[None, :],
                mask=is_column[:, None] & is_query[None, :],
                other=0.0,
            )
            scores = tl.dot(tile, wanted, input_precision="ieee")
            if IS_PACKED:
                for first in range(1, rank // BAND_WIDTH, N_BANDS):
                    band = first + tl.arange(0, N_BANDS)
                    is_band = band < rank // BAND_WIDTH
                    is_read = is_inside[:, None] & is_band[None, :]
                    at = at_scales[:, None] + band[None, :]
                    scale = tl.load(scales + at, mask=is_read, other=0.0).to(tl.float32)
                    bias = tl.load(biases + at, mask=is_read, other=0.0).to(tl.float32)
                    bits = tl.load(bands + 2 * band, mask=is_band, other=0)
                    middle = ((1 << bits) - 1).to(tl.float32) * 0.5
                    # the root of BAND_WIDTH
                    means = (scale * middle[None, :] + bias) * 8.0
                    weights = tl.load(
                        absorbed + (BAND_WIDTH - 1 + band)[:, None] * n_all + queries[None, :],
                        mask=is_band[:, None] & is_query[None, :],
                        other=0.0,
                    )
                    scores = tl.dot(means.to(dtype), weights, scores, input_precision="ieee")
            offset = tl.load(offsets + batch * n_all + queries, mask=is_query, other=float("inf"))
            by_head = tl.reshape(scores - offset[None, :], (N, N_HEADS, N_SHARING))
            best = tl.maximum(best, tl.max(by_head, axis=2))
        heads = first_head + tl.arange(0, N_HEADS)
        tl.store(
            output + (batch * n_kv_heads + heads)[None, :] * n_rows + rows[:, None],
            best,
            mask=is_inside[:, None] & (heads < n_kv_heads)[None, :],
        )


class IndexScores:
    """:func:`xkv.ops.index.index_scores`

    Reads each row's first band, ``8 * bits`` bytes, and all its scales and biases once for 32
    queries, of as many KV heads as these are, and writes 4 bytes a row and KV head. ``2 * n`` flops
    a row and query for ``n`` columns of the index, both padded to 16.
    """

    name = "index_scores"

    def leading(self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int) -> Array:
        """The queries."""
        return absorbed

    def why_not(
        self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int
    ) -> str | None:
        """Any rank, bits and number of queries; offsets in float32."""
        if offsets.dtype != torch.float32:
            return f"the offsets are {offsets.dtype}; the kernel takes float32"
        return latent_problem(latent)

    def sample(
        self, backend: Backend, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows, two and a bit tiles of queries."""
        n_rows, n_queries = BLOCK + 1, 2 * (SHARING + 1)
        sample = sample_latent(backend, latent, n_rows)
        shape = (2, 2 if absorbed.shape[1] > 1 else 1, n_columns(sample), n_queries)
        queries = backend.normal(shape, 1).to(absorbed.dtype)
        return queries, sample, backend.normal((2, n_queries), 2), 2

    def check_key(
        self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int
    ) -> tuple[Any, ...]:
        """Dtypes, packed or not."""
        dtypes = str(absorbed.dtype).removeprefix("torch."), latent.dtype
        return *dtypes, *latent_constants(latent).values()

    def __call__(self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int) -> Array:
        """``[B, n_kv_heads, L]`` float32"""
        batch, n_rows, _ = latent.shape
        absorbed = absorbed.contiguous()
        output = torch.empty(
            (batch, n_kv_heads, n_rows), dtype=torch.float32, device=absorbed.device
        )
        n_sharing = absorbed.shape[-1] // n_kv_heads
        at_once = min(triton.next_power_of_2(n_sharing), SHARING)
        index_scores_kernel[(triton.cdiv(n_rows, TILE), batch)](
            **latent_arguments(latent),
            absorbed=absorbed,
            absorbed_batch=absorbed.stride(0) if absorbed.shape[0] > 1 else 0,
            absorbed_block=absorbed.stride(1) if absorbed.shape[1] > 1 else 0,
            offsets=offsets.contiguous(),
            output=output,
            n_rows=n_rows,
            n_kv_heads=n_kv_heads,
            n_sharing=n_sharing,
            # given, not multiplied: the compiler is told whether it is a multiple of 16
            n_all=absorbed.shape[-1],
            N=TILE,
            BLOCK_SIZE=BLOCK,
            BAND_WIDTH=BAND,
            N_BANDS=BANDS,
            N_HEADS=QUERIES // at_once,
            N_SHARING=at_once,
            IS_WHOLE=n_sharing == at_once and n_kv_heads % (QUERIES // at_once) == 0,
            num_warps=WARPS,
            num_stages=1,
        )
        return output


KERNEL = IndexScores()
