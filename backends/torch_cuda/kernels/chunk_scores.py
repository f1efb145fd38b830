"""How much each chunk matters to its KV head's queries, from packed landmarks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels.common import MAX_SHARING, sharing_pad
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Landmarks

BLOCK_CHUNKS = 64
WIDE_BLOCK = 1024
"""Chunks of a program of the second launch, which only reads scores."""


@triton.jit
def products_kernel(
    queries,
    landmarks,
    scales,
    biases,
    products,
    maxima,
    sums,
    n_chunks,
    scale,
    BITS: tl.constexpr,
    QUANTIZED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
    N: tl.constexpr,
):
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    at = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    heads = tl.arange(0, SHARING_PAD)
    is_head = heads < SHARING
    chunks = block * N + tl.arange(0, N)
    is_inside = chunks < n_chunks
    rows = at * n_chunks + chunks
    dtype = queries.dtype.element_ty
    product = tl.zeros((N, SHARING_PAD), tl.float32)
    for group in tl.static_range(HEAD_DIM // QUANTIZED_GROUP):
        features = group * QUANTIZED_GROUP + tl.arange(0, QUANTIZED_GROUP)
        query = tl.load(
            queries + (at * SHARING + heads[None, :]) * HEAD_DIM + features[:, None],
            mask=is_head[None, :],
            other=0.0,
        )
        if BITS == 16:
            tile = tl.load(
                landmarks + rows[:, None] * HEAD_DIM + features[None, :],
                mask=is_inside[:, None],
                other=0.0,
            )
            product = tl.dot(tile, query, product, input_precision="ieee")
        else:
            packed = tl.load(
                landmarks
                + rows[:, None] * (HEAD_DIM * BITS // 8)
                + (features * BITS // 8)[None, :],
                mask=is_inside[:, None],
                other=0,
            )
            shift = (features * BITS % 8)[None, :]
            numbers = (packed.to(tl.int32) >> shift) & ((1 << BITS) - 1)
            # integers up to 255 are exact in 16 bits, so that scales apply to the float32 product
            tile = numbers.to(tl.float32).to(dtype)
            at_group = rows * (HEAD_DIM // QUANTIZED_GROUP) + group
            factor = tl.load(scales + at_group, mask=is_inside, other=0.0).to(tl.float32)
            bias = tl.load(biases + at_group, mask=is_inside, other=0.0).to(tl.float32)
            query_sum = tl.sum(query.to(tl.float32), axis=0)
            product += tl.dot(tile, query, input_precision="ieee") * factor[:, None]
            product += bias[:, None] * query_sum[None, :]
    product *= scale
    tl.store(
        products + (at * SHARING + heads[None, :]) * n_chunks + chunks[:, None],
        product,
        mask=is_inside[:, None] & is_head[None, :],
    )
    product = tl.where(is_inside[:, None], product, float("-inf"))
    largest = tl.max(product, axis=0)
    stats = (at * SHARING + heads) * n_blocks + block
    tl.store(maxima + stats, largest, mask=is_head)
    tl.store(sums + stats, tl.sum(tl.exp(product - largest[None, :]), axis=0), mask=is_head)


@triton.jit
def weights_kernel(
    products,
    maxima,
    sums,
    is_outlier,
    output,
    n_chunks,
    n_blocks,
    SHARING: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    N: tl.constexpr,
):
    at = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    chunks = tl.program_id(0) * N + tl.arange(0, N)
    is_inside = chunks < n_chunks
    blocks = tl.arange(0, BLOCKS_PAD)
    best = tl.zeros((N,), tl.float32)
    for head in range(SHARING):
        row = at * SHARING + head
        is_block = blocks < n_blocks
        largest = tl.load(maxima + row * n_blocks + blocks, mask=is_block, other=float("-inf"))
        mass = tl.load(sums + row * n_blocks + blocks, mask=is_block, other=0.0)
        peak = tl.max(largest, axis=0)
        total = tl.sum(mass * tl.exp(largest - peak), axis=0)
        product = tl.load(products + row * n_chunks + chunks, mask=is_inside, other=0.0)
        best = tl.maximum(best, tl.exp(product - peak) / total)
    outlier = tl.load(is_outlier + at * n_chunks + chunks, mask=is_inside, other=0)
    best = tl.where(outlier != 0, -1.0, best)
    tl.store(output + at * n_chunks + chunks, best, mask=is_inside)


class ChunkScores:
    """:func:`xkv.ops.selection.chunk_scores` in two launches: products, then weights.

    Reads each landmark once, ``head_dim * bits / 8`` bytes with scales and biases, and passes 4
    bytes a chunk and query head from one launch to the next, in the L2 cache. ``2 * head_dim``
    flops a chunk and query head.
    """

    name = "chunk_scores"

    def why_not(self, queries: Array, landmarks: Landmarks, scale: float) -> str | None:
        """Any number of chunks; head_dim a power of two; contiguous landmarks."""
        head_dim = queries.shape[-1]
        n_sharing = queries.shape[1] // landmarks.is_outlier.shape[1]
        if queries.shape[-2] != 1:
            return f"the kernel takes one query a head, not {queries.shape[-2]}"
        if head_dim < 16 or head_dim & (head_dim - 1):
            return f"head_dim={head_dim} is no power of two from 16 on"
        if n_sharing > MAX_SHARING:
            return f"{n_sharing} query heads share a KV head; the kernel takes up to {MAX_SHARING}"
        if landmarks.bits not in (4, 8, 16):
            return f"landmarks of {landmarks.bits} bits; the kernel takes 4, 8 or 16"
        if landmarks.arrays[-1].dtype != queries.dtype:
            return f"landmarks are {landmarks.arrays[-1].dtype}, queries {queries.dtype}"
        if not all(x.is_contiguous() for x in landmarks.held):
            return "the landmarks are not contiguous"
        return None

    def sample(
        self, backend: Backend, queries: Array, landmarks: Landmarks, scale: float
    ) -> tuple[Any, ...]:
        """One and a bit blocks of chunks, an outlier among them."""
        n_chunks, head_dim = BLOCK_CHUNKS + 1, queries.shape[-1]
        n_heads = 2 * queries.shape[1] // landmarks.is_outlier.shape[1]
        drawn = (backend.normal((1, n_heads, 1, head_dim), 0) * 3).to(queries.dtype)
        means = backend.normal((1, 2, n_chunks, head_dim), 1).to(queries.dtype)
        arrays: tuple[Array, ...] = (means,)
        if landmarks.bits != 16:
            arrays = backend.quantize(means, landmarks.group_size, landmarks.bits)
        is_outlier = torch.zeros((1, 2, n_chunks), dtype=torch.bool, device=queries.device)
        is_outlier[..., 3] = True
        return drawn, landmarks._replace(arrays=arrays, is_outlier=is_outlier), scale

    def check_key(self, queries: Array, landmarks: Landmarks, scale: float) -> tuple[Any, ...]:
        """Dtype, head_dim, packing, sharing query heads."""
        dtype = str(queries.dtype).removeprefix("torch.")
        n_sharing = queries.shape[1] // landmarks.is_outlier.shape[1]
        return dtype, queries.shape[-1], landmarks.bits, landmarks.group_size, n_sharing

    def __call__(self, queries: Array, landmarks: Landmarks, scale: float) -> Array:
        """``[B, n_kv_heads, C]`` float32"""
        batch, n_heads, _, head_dim = queries.shape
        n_kv_heads, n_chunks = landmarks.is_outlier.shape[1:]
        n_sharing = n_heads // n_kv_heads
        # float32 products take no matrix instructions: with 64 chunks the registers would spill
        block_chunks = BLOCK_CHUNKS if queries.dtype.itemsize == 2 else BLOCK_CHUNKS // 4
        n_blocks = triton.cdiv(n_chunks, block_chunks)

        def empty(*shape: int) -> Array:
            return torch.empty(shape, dtype=torch.float32, device=queries.device)

        products = empty(batch, n_heads, n_chunks)
        maxima, sums = empty(batch, n_heads, n_blocks), empty(batch, n_heads, n_blocks)
        output = empty(batch, n_kv_heads, n_chunks)
        packed = landmarks.arrays[0]
        products_kernel[(n_blocks, n_kv_heads, batch)](
            queries.contiguous(),
            packed if landmarks.bits == 16 else packed.view(torch.uint8),
            landmarks.arrays[-2 if landmarks.bits != 16 else 0],
            landmarks.arrays[-1],
            products,
            maxima,
            sums,
            n_chunks,
            scale,
            BITS=landmarks.bits,
            QUANTIZED_GROUP=landmarks.group_size or min(64, head_dim),
            HEAD_DIM=head_dim,
            SHARING=n_sharing,
            SHARING_PAD=sharing_pad(n_sharing),
            N=block_chunks,
            num_warps=4,
        )
        weights_kernel[(triton.cdiv(n_chunks, WIDE_BLOCK), n_kv_heads, batch)](
            products,
            maxima,
            sums,
            landmarks.is_outlier.view(torch.uint8),
            output,
            n_chunks,
            n_blocks,
            SHARING=n_sharing,
            BLOCKS_PAD=triton.next_power_of_2(n_blocks),
            N=WIDE_BLOCK,
            num_warps=4,
        )
        return output


KERNEL = ChunkScores()
