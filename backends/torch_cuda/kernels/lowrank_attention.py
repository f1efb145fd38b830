"""One decode step over every row of a segment and dense rows, keys only in registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels.common import (
    BLOCK_ROWS,
    Splits,
    attend_dense_block,
    attention_key,
    block_rank,
    launch_options,
    load_queries,
    rope_arguments,
    rotated_keys,
    sample_dense,
    sample_segment,
    sharing_pad,
    why_not_attention,
)
from xkv.backends.torch_cuda.kernels.latents import latent_arguments, layout_of, part_tile
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.types import Array, Factor, Segment

MAX_SPLITS = 64
"""Parts of the weighted rows: with the column blocks enough programs to fill a large GPU."""


@triton.jit(do_not_specialize=["position", "n_dense", "n_splits"])
def scores_kernel(
    queries,
    latent,
    latent_batch,
    latent_row,
    basis,
    basis_batch,
    basis_row,
    basis_head,
    keys,
    keys_batch,
    keys_head,
    keys_row,
    values,
    values_batch,
    values_head,
    values_row,
    scores,
    dense_parts,
    maxima,
    sums,
    n_rows,
    n_dense,
    n_latent_blocks,
    n_latent_splits,
    n_splits,
    rank,
    value_dim,
    position,
    scale,
    inverse_freqs,
    rope_scale,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    LAYOUT: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    # KV heads run side by side, so that a latent row is read from memory once
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_query = (batch * tl.num_programs(0) + head) * SHARING
    q_x, q_y = load_queries(
        queries + first_query * HEAD_DIM, HEAD_DIM, ROPE_DIMS, TRADITIONAL, SHARING, SHARING_PAD
    )
    if block < n_latent_blocks:
        rows = block * N + tl.arange(0, N)
        is_inside = rows < n_rows
        k_x, k_y = rotated_keys(
            latent,
            batch * latent_batch,
            latent_row,
            rows,
            is_inside,
            basis + batch * basis_batch + head * basis_head,
            basis_row,
            rank,
            position + rows,
            inverse_freqs,
            rope_scale,
            HEAD_DIM,
            ROPE_DIMS,
            TRADITIONAL,
            N,
            BLOCK_RANK,
            LAYOUT,
        )
        products = tl.dot(k_x.to(q_x.dtype), q_x, input_precision="ieee")
        products = tl.dot(k_y.to(q_x.dtype), q_y, products, input_precision="ieee")
        heads = tl.arange(0, SHARING_PAD)
        tl.store(
            scores + (first_query + heads[None, :]) * n_rows + rows[:, None],
            products * scale,
            mask=is_inside[:, None] & (heads < SHARING)[None, :],
        )
    else:
        n_dense_splits = n_splits - n_latent_splits
        dense_block = block - n_latent_blocks
        attend_dense_block(
            dense_block,
            q_x,
            q_y,
            keys + batch * keys_batch + head * keys_head,
            keys_row,
            values + batch * values_batch + head * values_head,
            values_row,
            n_dense,
            scale,
            value_dim,
            dense_parts + (first_query * n_dense_splits + dense_block) * value_dim,
            n_dense_splits * value_dim,
            maxima + first_query * n_splits + n_latent_splits + dense_block,
            sums + first_query * n_splits + n_latent_splits + dense_block,
            n_splits,
            HEAD_DIM,
            ROPE_DIMS,
            TRADITIONAL,
            SHARING,
            SHARING_PAD,
            N,
            BLOCK_RANK,
            IS_COUNTED,
        )


@triton.jit(do_not_specialize=["n_splits"])
def weighted_rows_kernel(
    scores,
    latent,
    scales,
    biases,
    latent_batch,
    latent_row,
    latent_parts,
    maxima,
    sums,
    n_heads,
    n_rows,
    rows_per_split,
    n_latent_splits,
    n_splits,
    rank,
    first_column,
    width,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PART: tl.constexpr,
):
    split = tl.program_id(1)
    n_head_blocks = tl.cdiv(n_heads, HEADS)
    batch = (tl.program_id(2) // n_head_blocks).to(tl.int64)
    heads = tl.program_id(2) % n_head_blocks * HEADS + tl.arange(0, HEADS)
    is_head = heads < n_heads
    at = batch * n_heads + heads
    columns = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    is_column = columns < width
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    part = tl.zeros((HEADS, BLOCK_RANK), tl.float32)
    end = tl.minimum((split + 1) * rows_per_split, n_rows)
    for start in range(split * rows_per_split, end, N):
        rows = start + tl.arange(0, N)
        is_inside = rows < end
        score = tl.load(
            scores + at[:, None] * n_rows + rows[None, :],
            mask=is_head[:, None] & is_inside[None, :],
            other=0.0,
        )
        score = tl.where(is_inside[None, :], score, float("-inf"))
        risen = tl.maximum(peak, tl.max(score, axis=1))
        weights = tl.exp(score - risen[:, None])
        shrunk = tl.exp(peak - risen)
        total = total * shrunk + tl.sum(weights, axis=1)
        at_rows = batch * latent_batch + rows.to(tl.int64) * latent_row
        if PART is None:
            tile = tl.load(
                latent + at_rows[:, None] + columns[None, :],
                mask=is_inside[:, None] & is_column[None, :],
                other=0.0,
            )
        else:
            tile = part_tile(
                latent, scales, biases, width, at_rows, is_inside, columns, PART[0], PART[1]
            )
        part = tl.dot(weights.to(tile.dtype), tile, part * shrunk[:, None], input_precision="ieee")
        peak = risen
    latent_parts += first_column
    tl.store(
        latent_parts + (at * n_latent_splits + split)[:, None] * rank + columns[None, :],
        part,
        mask=is_head[:, None] & is_column[None, :],
    )
    if tl.program_id(0) == 0:
        tl.store(maxima + at * n_splits + split, peak, mask=is_head)
        tl.store(sums + at * n_splits + split, total, mask=is_head)


class LowrankAttention:
    """:func:`xkv.ops.attention.lowrank_attention` of one query a head, no mask, in 3 launches.

    Scores first, a program for each KV head and 64 rows, keys in registers; then the latent values,
    weighted for all query heads at once, since these share them; then the merge and the basis. Keys
    never lie in memory; scores do, 4 bytes a row and query head.

    Reads ``rank_k + rank_v`` latent elements a row once. ``2 * rank_k * n_kv_heads * head_dim``
    flops a row for the keys, which bound it: 0.8 MFLOP at rank 384 and 8 heads of 128 features.

    Packed latents are read packed, ``bits / 8`` bytes a number and two scales a group, and widened
    in registers; the second launch is one for each part of the values.
    """

    name = "lowrank_attention"
    takes_packed = True

    def why_not(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> str | None:
        """Any ranks and row counts; no mask; one rotary embedding; head_dim a power of two."""
        if mask is not None:
            return "the kernel takes no mask"
        return why_not_attention(queries, segment, keys, values)

    def sample(
        self,
        backend: Backend,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> tuple[Any, ...]:
        """Two and a bit blocks of rows."""
        sample = sample_segment(backend, segment, 2 * BLOCK_ROWS + 1)
        drawn_queries, drawn_keys, drawn_values = sample_dense(backend, queries, segment, values)
        return drawn_queries, sample, drawn_keys, drawn_values, scale

    def check_key(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> tuple[Any, ...]:
        """Dtype, head_dim, rotation, divisibility of the ranks, sharing query heads."""
        return attention_key(queries, segment, values)

    def __call__(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> Array:
        """``[B, n_heads, 1, value_dim]``"""
        batch, n_heads, _, head_dim = queries.shape
        n_kv_heads, n_rows = keys.shape[1], segment.latent_k.shape[1]
        n_sharing = n_heads // n_kv_heads
        n_blocks = triton.cdiv(n_rows, BLOCK_ROWS)
        blocks_per_split = triton.cdiv(n_blocks, MAX_SPLITS)
        splits = Splits(queries, segment, values, triton.cdiv(n_blocks, blocks_per_split))
        n_splits = splits.n_latent + splits.n_dense
        scores = torch.empty((batch, n_heads, n_rows), dtype=torch.float32, device=queries.device)
        frequencies, rope_scale, constants = rope_arguments(segment)
        scores_kernel[(n_kv_heads, n_blocks + splits.n_dense, batch)](
            queries.contiguous(),
            *latent_arguments(segment.latent_k),
            segment.basis_k,
            *segment.basis_k.stride()[:3],
            keys,
            *keys.stride()[:3],
            values,
            *values.stride()[:3],
            scores,
            splits.dense,
            splits.maxima,
            splits.sums,
            n_rows,
            keys.shape[-2] if segment.n_dense is None else segment.n_dense,
            n_blocks,
            splits.n_latent,
            n_splits,
            segment.latent_k.shape[-1],
            values.shape[-1],
            segment.start,
            scale,
            frequencies,
            rope_scale,
            HEAD_DIM=head_dim,
            SHARING=n_sharing,
            SHARING_PAD=sharing_pad(n_sharing),
            N=BLOCK_ROWS,
            BLOCK_RANK=block_rank(queries.dtype),
            LAYOUT=layout_of(segment.latent_k),
            IS_COUNTED=segment.n_dense is not None,
            **constants,
            **launch_options(head_dim),
        )
        heads = min(64, sharing_pad(n_heads))
        # parts may be as narrow as 64 columns, and take more shared memory: words, scales, biases
        is_packed = isinstance(segment.latent_v, Packed)
        block_width = block_rank(queries.dtype) * (1 if is_packed else 2)
        first_column = 0
        for arrays, strides, width, part in _parts(segment.latent_v):
            grid = (
                triton.cdiv(width, block_width),
                splits.n_latent,
                batch * triton.cdiv(n_heads, heads),
            )
            weighted_rows_kernel[grid](
                scores,
                *arrays,
                *strides,
                splits.latent,
                splits.maxima,
                splits.sums,
                n_heads,
                n_rows,
                blocks_per_split * BLOCK_ROWS,
                splits.n_latent,
                n_splits,
                segment.latent_v.shape[-1],
                first_column,
                width,
                HEADS=heads,
                N=BLOCK_ROWS,
                BLOCK_RANK=block_width,
                PART=part,
                num_warps=4,
                num_stages=2 if is_packed else 3,
            )
            first_column += width
        return splits.merge(queries, segment)


def _parts(latent: Factor) -> Iterator[tuple[tuple[Array, ...], tuple[int, int], int, Any]]:
    """Arrays, strides, columns and form of each part of a latent."""
    arrays, batch_stride, row_stride = latent_arguments(latent)
    layout = layout_of(latent)
    if layout is None:
        yield (arrays,) * 3, (batch_stride, row_stride), latent.shape[-1], None
        return
    for i, (width, part) in enumerate(zip(row_stride, layout, strict=True)):
        yield arrays[3 * i : 3 * i + 3], (batch_stride, 1), width, part


KERNEL = LowrankAttention()
