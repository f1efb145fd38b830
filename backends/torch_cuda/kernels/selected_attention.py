"""One decode step over selected rows and dense rows, in two launches."""

from __future__ import annotations

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
    block_weights,
    launch_options,
    load_queries,
    rope_arguments,
    rotated_keys,
    sample_dense,
    sample_segment,
    sharing_pad,
    weigh_rows,
    why_not_attention,
)
from xkv.backends.torch_cuda.kernels.latents import latent_arguments, layout_of
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Segment


@triton.jit(do_not_specialize=["position", "n_dense", "n_splits"])
def selected_attention_kernel(
    queries,
    chunks,
    latent_k,
    latent_k_batch,
    latent_k_row,
    latent_v,
    latent_v_batch,
    latent_v_row,
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
    latent_parts,
    dense_parts,
    maxima,
    sums,
    n_chunks,
    n_dense,
    n_latent_splits,
    n_splits,
    rank_k,
    rank_v,
    value_dim,
    position,
    scale,
    inverse_freqs,
    rope_scale,
    CHUNK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    LAYOUT_K: tl.constexpr,
    LAYOUT_V: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    split, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = batch * tl.num_programs(1) + head
    first_query = at * SHARING
    q_x, q_y = load_queries(
        queries + first_query * HEAD_DIM, HEAD_DIM, ROPE_DIMS, TRADITIONAL, SHARING, SHARING_PAD
    )
    maxima += first_query * n_splits + split
    sums += first_query * n_splits + split
    if split < n_latent_splits:
        selected = split * N + tl.arange(0, N)
        is_inside = selected < n_chunks * CHUNK_SIZE
        chunk = tl.load(chunks + at * n_chunks + selected // CHUNK_SIZE, mask=is_inside, other=0)
        rows = chunk * CHUNK_SIZE + selected % CHUNK_SIZE
        k_x, k_y = rotated_keys(
            latent_k,
            batch * latent_k_batch,
            latent_k_row,
            rows,
            is_inside,
            basis + batch * basis_batch + head * basis_head,
            basis_row,
            rank_k,
            position + rows,
            inverse_freqs,
            rope_scale,
            HEAD_DIM,
            ROPE_DIMS,
            TRADITIONAL,
            N,
            BLOCK_RANK,
            LAYOUT_K,
        )
        weights = block_weights(
            q_x,
            q_y,
            k_x.to(q_x.dtype),
            k_y.to(q_x.dtype),
            is_inside,
            scale,
            maxima,
            sums,
            n_splits,
            SHARING,
            SHARING_PAD,
        )
        weigh_rows(
            weights,
            is_inside,
            latent_v,
            batch * latent_v_batch,
            latent_v_row,
            rows,
            rank_v,
            latent_parts + (first_query * n_latent_splits + split) * rank_v,
            n_latent_splits * rank_v,
            SHARING,
            SHARING_PAD,
            BLOCK_RANK,
            LAYOUT_V,
        )
    else:
        n_dense_splits = n_splits - n_latent_splits
        block = split - n_latent_splits
        attend_dense_block(
            block,
            q_x,
            q_y,
            keys + batch * keys_batch + head * keys_head,
            keys_row,
            values + batch * values_batch + head * values_head,
            values_row,
            n_dense,
            scale,
            value_dim,
            dense_parts + (first_query * n_dense_splits + block) * value_dim,
            n_dense_splits * value_dim,
            maxima,
            sums,
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


class SelectedAttention:
    """:func:`xkv.ops.selection.selected_attention`, keys rebuilt in registers.

    A program takes 64 selected rows (or 64 dense ones) of a KV head: keys, scores, their softmax
    and the weighted latent rows; a second launch merges the splits and applies the values' basis.

    For each KV head and selected row it reads ``rank_k + rank_v`` latent elements, and ``head_dim +
    value_dim`` for a dense row; each block of 64 rows reads the head's key basis, out of the L2
    cache. The parts are ``4 * rank_v / 64`` bytes a row and query head, written once. ``2 *
    rank_k * head_dim`` flops a row for the keys, ``2 * (head_dim + rank_v)`` a row and query head.
    Packed latents are read packed, ``bits / 8`` bytes a number and two scales a group, and widened
    in registers.
    """

    name = "selected_attention"
    takes_packed = True

    def why_not(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> str | None:
        """Any ranks, chunk size and row counts; one rotary embedding; head_dim a power of two."""
        return why_not_attention(queries, segment, keys, values)

    def sample(
        self,
        backend: Backend,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> tuple[Any, ...]:
        """One and a bit blocks of rows: all chunks but the last, backwards."""
        n_chunks = BLOCK_ROWS // chunk_size + 2
        ids = torch.arange(n_chunks - 2, -1, -1, dtype=chunks.dtype, device=chunks.device)
        sample = sample_segment(backend, segment, n_chunks * chunk_size)
        drawn_queries, drawn_keys, drawn_values = sample_dense(backend, queries, segment, values)
        ids = ids.expand(1, 2, -1)
        return drawn_queries, sample, ids, chunk_size, drawn_keys, drawn_values, scale

    def check_key(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> tuple[Any, ...]:
        """Dtype, head_dim, rotation, divisibility of the ranks, sharing query heads, chunk size."""
        return (*attention_key(queries, segment, values), chunk_size, chunks.dtype)

    def __call__(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> Array:
        """``[B, n_heads, 1, value_dim]``"""
        batch, n_heads, _, head_dim = queries.shape
        n_kv_heads, n_chunks = chunks.shape[1:]
        n_sharing = n_heads // n_kv_heads
        frequencies, rope_scale, constants = rope_arguments(segment)
        splits = Splits(queries, segment, values, triton.cdiv(n_chunks * chunk_size, BLOCK_ROWS))
        n_splits = splits.n_latent + splits.n_dense
        selected_attention_kernel[(n_splits, n_kv_heads, batch)](
            queries.contiguous(),
            chunks.contiguous(),
            *latent_arguments(segment.latent_k),
            *latent_arguments(segment.latent_v),
            segment.basis_k,
            *segment.basis_k.stride()[:3],
            keys,
            *keys.stride()[:3],
            values,
            *values.stride()[:3],
            splits.latent,
            splits.dense,
            splits.maxima,
            splits.sums,
            n_chunks,
            keys.shape[-2] if segment.n_dense is None else segment.n_dense,
            splits.n_latent,
            n_splits,
            segment.latent_k.shape[-1],
            segment.latent_v.shape[-1],
            values.shape[-1],
            segment.start,
            scale,
            frequencies,
            rope_scale,
            CHUNK_SIZE=chunk_size,
            HEAD_DIM=head_dim,
            SHARING=n_sharing,
            SHARING_PAD=sharing_pad(n_sharing),
            N=BLOCK_ROWS,
            BLOCK_RANK=block_rank(queries.dtype),
            LAYOUT_K=layout_of(segment.latent_k),
            LAYOUT_V=layout_of(segment.latent_v),
            IS_COUNTED=segment.n_dense is not None,
            **constants,
            **launch_options(head_dim),
        )
        return splits.merge(queries, segment)


KERNEL = SelectedAttention()
