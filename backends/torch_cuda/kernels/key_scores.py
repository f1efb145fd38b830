"""Scores of some rows' keys: gather, unpack, multiply, rotate and score in one kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
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
from xkv.ops.types import Array, RopeRun, RopeSpec, Stored

HEAD_DIMS = (32, 64, 128, 256)
BLOCK_ROWS = 32
"""Rows of a program: a step rebuilds few, which are to fill the device."""
QUERIES = 16
"""Queries of a product, the least that ``tl.dot`` takes."""
PROGRAMS = 256
"""As many fill a device: where there are fewer, several share the columns of a block of rows."""
PAIR_RUN = 8
"""Rotated pairs come in runs of so many, which is what makes loads of a basis wide."""


@triton.jit
def sin_cos(angles):
    """Sine and cosine of float32 angles from 0 to 2^20, to 2e-7.

    Both from one reduction; ``tl.sin`` and ``tl.cos`` reduce twice, and branch above 1e5 radians.
    """
    turns = tl.floor(angles * 0.6366197723675814 + 0.5)
    # pi / 2 in parts of few bits: all products but the last are exact, fused or not
    rest = angles - turns * 1.5
    rest = rest - turns * 0.0703125
    rest = rest - turns * 0.00048828125
    rest = rest + turns * 4.4544551033807687e-6
    square = rest * rest
    sine = 8.3321608736e-3 - 1.9515295891e-4 * square
    sine = rest + rest * square * (sine * square - 1.6666654611e-1)
    cosine = 2.443315711809948e-5 * square - 1.388731625493765e-3
    cosine = 1.0 - 0.5 * square + square * square * (cosine * square + 4.166664568298827e-2)
    quarter = turns.to(tl.int32)
    is_odd = (quarter & 1) != 0
    turned_sine = tl.where(is_odd, cosine, sine)
    turned_cosine = tl.where(is_odd, sine, cosine)
    turned_sine = tl.where((quarter & 2) != 0, -turned_sine, turned_sine)
    turned_cosine = tl.where(((quarter + 1) & 2) != 0, -turned_cosine, turned_cosine)
    return turned_sine, turned_cosine


@triton.jit
def pair_features(n_pairs, HEAD_DIM: tl.constexpr, TRADITIONAL: tl.constexpr):
    """The two features of each pair that rotates together, then of pairs that do not rotate."""
    pair = tl.arange(0, HEAD_DIM // 2)
    if TRADITIONAL:
        return 2 * pair, 2 * pair + 1
    is_turned = pair < n_pairs
    first = tl.where(is_turned, pair, pair + n_pairs)
    second = pair + tl.where(is_turned, n_pairs, HEAD_DIM // 2)
    # PAIR_RUN
    first, second = tl.multiple_of(first, 8), tl.multiple_of(second, 8)
    return tl.max_contiguous(first, 8), tl.max_contiguous(second, 8)


@triton.jit(
    do_not_specialize=[
        *LATENT_ARGUMENTS,
        *ROWS_ARGUMENTS,
        "n_rows",
        "position",
        "n_pairs",
        "n_queries",
        "n_blocks",
        "n_columns",
    ]
)
def key_scores_kernel(
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
    basis,
    basis_batch,
    basis_row,
    basis_head,
    n_rows,
    position,
    inverse_freqs,
    n_pairs,
    rope_scale,
    queries,
    scores,
    n_queries,
    n_blocks,
    n_columns,
    HEAD_DIM: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BAND_WIDTH: tl.constexpr,
    N_QUERIES: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_of_batch = batch * tl.num_programs(1) + head
    part, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    wanted = block * N + tl.arange(0, N)
    is_inside = wanted < n_rows
    rows += batch * rows_batch + head * rows_head
    ids = tl.load(rows + wanted, mask=is_inside, other=0)
    row_numbers = numbers + batch * numbers_batch + ids.to(tl.int64) * numbers_row
    at_scales = batch * scales_batch + ids.to(tl.int64) * scales_row
    basis += batch * basis_batch + head * basis_head
    first, second = pair_features(n_pairs, HEAD_DIM, TRADITIONAL)
    columns = tl.arange(0, BLOCK_RANK)
    x = tl.zeros((N, HEAD_DIM // 2), tl.float32)
    y = tl.zeros((N, HEAD_DIM // 2), tl.float32)
    for start in range(part * n_columns, tl.minimum((part + 1) * n_columns, rank), BLOCK_RANK):
        is_column = start + columns < rank
        if IS_PACKED:
            tile = band_columns(
                row_numbers,
                scales + at_scales,
                biases + at_scales,
                bands,
                start // BAND_WIDTH,
                start % BAND_WIDTH,
                is_inside,
                BLOCK_RANK,
            )
        else:
            tile = plain_columns(row_numbers, start + columns, rank, is_inside, IS_ALIGNED)
        tile = tile.to(basis.dtype.element_ty)
        b = basis + (start + columns)[:, None] * basis_row
        b_x = tl.load(b + first[None, :], mask=is_column[:, None], other=0.0)
        b_y = tl.load(b + second[None, :], mask=is_column[:, None], other=0.0)
        x = tl.dot(tile, b_x, x, input_precision="ieee")
        y = tl.dot(tile, b_y, y, input_precision="ieee")
    if n_pairs > 0:
        pair = tl.arange(0, HEAD_DIM // 2)
        is_turned = pair < n_pairs
        # no pair turns where the frequency is zero: sine 0, cosine 1
        per_position = tl.load(inverse_freqs + pair, mask=is_turned, other=0.0)
        angles = (position + ids).to(tl.float32)[:, None] * per_position[None, :]
        sine, cosine = sin_cos(angles)
        factor = tl.where(is_turned, rope_scale, 1.0)[None, :]
        sine, cosine = sine * factor, cosine * factor
        x, y = x * cosine - y * sine, y * cosine + x * sine
    keys_x, keys_y = x.to(queries.dtype.element_ty), y.to(queries.dtype.element_ty)
    queries += head_of_batch * n_queries * HEAD_DIM
    # a score is a sum over columns, of which each part writes its own
    n_heads = tl.num_programs(1) * tl.num_programs(2).to(tl.int64)
    scores += (part * n_heads + head_of_batch) * n_queries * n_rows
    # the keys on the left: there a product takes them as they lie in registers
    for start in range(0, n_queries, N_QUERIES):
        query = start + tl.arange(0, N_QUERIES)
        is_query = (query < n_queries)[None, :]
        q = queries + query[None, :] * HEAD_DIM
        q_x = tl.load(q + first[:, None], mask=is_query, other=0.0)
        q_y = tl.load(q + second[:, None], mask=is_query, other=0.0)
        found = tl.dot(keys_x, q_x, input_precision="ieee")
        found = tl.dot(keys_y, q_y, found, input_precision="ieee")
        at = query[None, :] * n_rows + wanted[:, None]
        tl.store(scores + at, found, mask=is_inside[:, None] & is_query)


@lru_cache(maxsize=256)
def inverse_freqs(freqs: tuple[float, ...], device: torch.device) -> Array:
    """Radians per position of each pair; kept, since a copy to the device would stall a step."""
    # divided in float32 as the plain rotation does, so that the angles agree to the bit
    return (1.0 / torch.tensor(freqs or (1.0,), dtype=torch.float32)).to(device)


def _spec(stored: Stored) -> RopeSpec:
    """What rotates the rows; one of no pairs where nothing does."""
    spec = stored.rope_runs[0].spec if stored.rope_runs else None
    return spec or RopeSpec(())


def _block_rank(stored: Stored) -> int:
    """Columns of a tile: 128 bytes of a row of the basis' dtype; a band or a half."""
    return min(128 // stored.basis.itemsize, BAND)


class KeyScores:
    """:func:`xkv.ops.working_set.key_scores`

    For each KV head and row it reads the latent's row, ``rank * bits / 8`` bytes with scales and
    biases where it is packed, and writes ``4 * M`` bytes of scores: where there are few rows, as
    often as their columns have parts, which a sum puts together. Each block of 32 rows reads the
    head's basis and queries, ``M * dim`` numbers, out of the L2 cache. ``2 * (rank + M) * dim``
    flops a row, queries padded to 16, and some 15 integer operations for each packed number. A
    packed latent is widened in registers; keys never leave them, rounded to the queries' dtype.
    """

    name = "key_scores"

    def leading(self, stored: Stored, rows: Array, queries: Array) -> Array:
        """The basis."""
        return stored.basis

    def why_not(self, stored: Stored, rows: Array, queries: Array) -> str | None:
        """Any rank, bits and queries; one rotation or none; dim a power of two from 32 to 256."""
        if queries.dtype not in KERNEL_DTYPES:
            return f"the queries are {queries.dtype}; Triton kernels take 16- and 32-bit floats"
        basis, n_runs = stored.basis, len(stored.rope_runs)
        if n_runs > 1:
            return f"the rows have {n_runs} rotary embeddings; the kernel takes 1"
        if basis.shape[-1] not in HEAD_DIMS:
            return f"head_dim={basis.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}"
        spec = _spec(stored)
        if not spec.traditional and len(spec.freqs) % PAIR_RUN:
            return f"{len(spec.freqs)} pairs are rotated; the kernel takes multiples of {PAIR_RUN}"
        strides = (basis.storage_offset(), *basis.stride()[:3])
        if basis.stride(3) != 1 or any(n % 16 for n in strides):
            return "the basis is strided; the kernel reads its rows side by side"
        return latent_problem(stored.latent)

    def sample(
        self, backend: Backend, stored: Stored, rows: Array, queries: Array
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows, backwards, and as many of queries."""
        n_rows, head_dim = BLOCK_ROWS + 1, stored.basis.shape[-1]
        latent, dtype = sample_latent(backend, stored.latent, n_rows), stored.basis.dtype
        basis = backend.normal((1, latent.rank, 2, head_dim), 1) * latent.rank**-0.5
        runs = tuple(RopeRun(n_rows, run.spec) for run in stored.rope_runs)
        ids = torch.arange(n_rows - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        drawn = backend.normal((2, 2, QUERIES + 1, head_dim), 2) * head_dim**-0.5
        small = Stored(latent, basis.to(dtype), stored.start, runs)
        return small, ids.expand(2, 2, n_rows), drawn.to(queries.dtype)

    def check_key(self, stored: Stored, rows: Array, queries: Array) -> tuple[Any, ...]:
        """Dtypes, head_dim, order of pairs, packed or not."""
        dtypes = str(stored.basis.dtype).removeprefix("torch."), stored.latent.dtype
        constants = latent_constants(stored.latent).values()
        head_dim, is_traditional = stored.basis.shape[-1], _spec(stored).traditional
        return *dtypes, head_dim, is_traditional, *constants, rows.dtype, queries.dtype

    def __call__(self, stored: Stored, rows: Array, queries: Array) -> Array:
        """``[B, n_kv_heads, M, n]`` float32"""
        basis, spec = stored.basis, _spec(stored)
        batch, n_kv_heads, n_rows = rows.shape
        head_dim, n_queries = basis.shape[-1], queries.shape[1] // n_kv_heads * queries.shape[2]
        n_blocks, width = triton.cdiv(n_rows, BLOCK_ROWS), _block_rank(stored)
        n_tiles = max(triton.cdiv(stored.latent.rank, width), 1)
        n_parts = min(triton.cdiv(PROGRAMS, n_blocks * n_kv_heads * batch), n_tiles)
        n_columns = triton.cdiv(n_tiles, n_parts) * width
        n_parts = max(triton.cdiv(stored.latent.rank, n_columns), 1)
        shape = n_parts, batch, n_kv_heads, n_queries, n_rows
        scores = torch.empty(shape, dtype=torch.float32, device=rows.device)
        key_scores_kernel[(n_blocks * n_parts, n_kv_heads, batch)](
            **latent_arguments(stored.latent),
            **rows_arguments(rows),
            basis=basis,
            basis_batch=basis.stride(0) if basis.shape[0] > 1 else 0,
            basis_row=basis.stride(1),
            basis_head=basis.stride(2),
            n_rows=n_rows,
            position=stored.start,
            inverse_freqs=inverse_freqs(spec.freqs, rows.device),
            n_pairs=len(spec.freqs),
            rope_scale=float(spec.scale),
            queries=queries.contiguous(),
            scores=scores,
            n_queries=n_queries,
            n_blocks=n_blocks,
            n_columns=n_columns,
            HEAD_DIM=head_dim,
            TRADITIONAL=spec.traditional,
            N=BLOCK_ROWS,
            BLOCK_RANK=width,
            BAND_WIDTH=BAND,
            N_QUERIES=QUERIES,
            num_warps=8 if head_dim > 128 else 4,
            num_stages=1,
        )
        return scores[0] if n_parts == 1 else scores.sum(0)


KERNEL = KeyScores()
