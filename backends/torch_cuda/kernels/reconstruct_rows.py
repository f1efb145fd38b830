"""Rotated keys of selected rows: gather, multiply and rotate in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels.common import (
    BLOCK_ROWS,
    block_rank,
    launch_options,
    pair_features,
    rope_arguments,
    rotated_keys,
    sample_segment,
    segment_key,
    why_not_segment,
)
from xkv.backends.torch_cuda.kernels.latents import latent_arguments, layout_of
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Segment


@triton.jit(do_not_specialize=["position"])
def reconstruct_rows_kernel(
    latent,
    latent_batch,
    latent_row,
    rows,
    basis,
    basis_batch,
    basis_row,
    basis_head,
    output,
    n_rows,
    rank,
    position,
    inverse_freqs,
    rope_scale,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = (batch * tl.num_programs(1) + head) * n_rows
    selected = tl.program_id(0) * N + tl.arange(0, N)
    is_inside = selected < n_rows
    ids = tl.load(rows + at + selected, mask=is_inside, other=0)
    x, y = rotated_keys(
        latent,
        batch * latent_batch,
        latent_row,
        ids,
        is_inside,
        basis + batch * basis_batch + head * basis_head,
        basis_row,
        rank,
        position + ids,
        inverse_freqs,
        rope_scale,
        HEAD_DIM,
        ROPE_DIMS,
        TRADITIONAL,
        N,
        BLOCK_RANK,
        LAYOUT,
    )
    first, second = pair_features(HEAD_DIM, ROPE_DIMS, TRADITIONAL)
    pointers = output + (at + selected)[:, None] * HEAD_DIM
    tl.store(pointers + first[None, :], x.to(output.dtype.element_ty), mask=is_inside[:, None])
    tl.store(pointers + second[None, :], y.to(output.dtype.element_ty), mask=is_inside[:, None])


class ReconstructRows:
    """:func:`xkv.ops.selection.reconstruct_rows`

    For each KV head and row it reads ``rank`` latent elements and writes ``head_dim``; each block
    of 64 rows reads the head's basis, out of the L2 cache. ``2 * rank * head_dim`` flops a row. A
    packed latent is read packed, ``bits / 8`` bytes a number and two scales a group, and widened in
    registers.
    """

    name = "reconstruct_rows"
    takes_packed = True

    def why_not(self, segment: Segment, rows: Array) -> str | None:
        """Any rank; one rotary embedding; head_dim a power of two."""
        return why_not_segment(segment)

    def sample(self, backend: Backend, segment: Segment, rows: Array) -> tuple[Any, ...]:
        """One and a bit blocks of rows, backwards."""
        n_rows = BLOCK_ROWS + 1
        ids = torch.arange(n_rows - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        return sample_segment(backend, segment, n_rows), ids.expand(1, 2, n_rows)

    def check_key(self, segment: Segment, rows: Array) -> tuple[Any, ...]:
        """Dtype, head_dim, rotation, divisibility of the ranks."""
        return (*segment_key(segment), rows.dtype)

    def __call__(self, segment: Segment, rows: Array) -> Array:
        """``[B, n_kv_heads, S, head_dim]``"""
        latent, basis = segment.latent_k, segment.basis_k
        head_dim = basis.shape[-1]
        frequencies, rope_scale, constants = rope_arguments(segment)
        output = torch.empty((*rows.shape, head_dim), dtype=latent.dtype, device=rows.device)
        batch, n_kv_heads, n_rows = rows.shape
        reconstruct_rows_kernel[(triton.cdiv(n_rows, BLOCK_ROWS), n_kv_heads, batch)](
            *latent_arguments(latent),
            rows.contiguous(),
            basis,
            *basis.stride()[:3],
            output,
            n_rows,
            basis.shape[1],
            segment.start,
            frequencies,
            rope_scale,
            HEAD_DIM=head_dim,
            N=BLOCK_ROWS,
            BLOCK_RANK=block_rank(latent.dtype),
            LAYOUT=layout_of(latent),
            **constants,
            **launch_options(head_dim),
        )
        return output


KERNEL = ReconstructRows()
