"""What the Triton kernels share: rotated keys, weighted rows and the merge of splits.

A KV head's query heads are columns of a tile, padded to 16, the least that ``tl.dot`` takes. Keys
come in two half tiles, the first and the second features of the pairs that rotate together, so that
rotation never leaves the registers; queries and dense keys are read in the same order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import latents
from xkv.backends.torch_cuda.kernels.latents import part_tile
from xkv.ops.backend import Backend
from xkv.ops.packed import Packed
from xkv.ops.types import Array, Factor, RopeRun, RopeSpec, Segment
from xkv.store.codec import small_latent

HEAD_DIMS = (32, 64, 128, 256)
BLOCK_ROWS = 64
"""Rows of a program: the least that fills Hopper's matrix instructions."""
MAX_SHARING = 64
"""Query heads that share a KV head: more would not fit the registers."""


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
def pair_features(HEAD_DIM: tl.constexpr, ROPE_DIMS: tl.constexpr, TRADITIONAL: tl.constexpr):
    """The two features of each pair that rotates together, then of pairs that do not rotate."""
    pair = tl.arange(0, HEAD_DIM // 2)
    if TRADITIONAL:
        first = 2 * pair
        second = first + 1
    elif ROPE_DIMS == HEAD_DIM:
        first = pair
        second = pair + HEAD_DIM // 2
    else:
        first = tl.where(pair < ROPE_DIMS // 2, pair, pair + ROPE_DIMS // 2)
        second = pair + tl.where(pair < ROPE_DIMS // 2, ROPE_DIMS // 2, HEAD_DIM // 2)
    return first, second


@triton.jit
def add_products(x, y, tile, basis, basis_row, ranks, is_rank, first, second):
    """``tile @ basis`` added to both halves of the features."""
    b = basis + ranks[:, None] * basis_row
    b_x = tl.load(b + first[None, :], mask=is_rank[:, None], other=0.0)
    b_y = tl.load(b + second[None, :], mask=is_rank[:, None], other=0.0)
    x = tl.dot(tile, b_x, x, input_precision="ieee")
    y = tl.dot(tile, b_y, y, input_precision="ieee")
    return x, y


@triton.jit
def rotated_keys(
    latent,
    latent_start,
    latent_row,
    rows,
    is_inside,
    basis,
    basis_row,
    rank,
    positions,
    inverse_freqs,
    rope_scale,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Rotated keys of N rows: two float32 ``[N, HEAD_DIM // 2]`` as :func:`pair_features` says."""
    first, second = pair_features(HEAD_DIM, ROPE_DIMS, TRADITIONAL)
    columns = tl.arange(0, BLOCK_RANK)
    x = tl.zeros((N, HEAD_DIM // 2), tl.float32)
    y = tl.zeros((N, HEAD_DIM // 2), tl.float32)
    if LAYOUT is None:
        latent_rows = latent + latent_start + rows.to(tl.int64)[:, None] * latent_row
        for start in range(0, rank, BLOCK_RANK):
            ids = start + columns
            is_column = ids < rank
            tile = tl.load(
                latent_rows + ids[None, :], mask=is_inside[:, None] & is_column[None, :], other=0.0
            )
            x, y = add_products(x, y, tile, basis, basis_row, ids, is_column, first, second)
    else:
        for part in tl.static_range(len(LAYOUT)):
            width = latent_row[part]
            for start in range(0, width, BLOCK_RANK):
                ids = start + columns
                tile = part_tile(
                    latent[3 * part],
                    latent[3 * part + 1],
                    latent[3 * part + 2],
                    width,
                    latent_start + rows.to(tl.int64),
                    is_inside,
                    ids,
                    LAYOUT[part][0],
                    LAYOUT[part][1],
                )
                x, y = add_products(x, y, tile, basis, basis_row, ids, ids < width, first, second)
            basis += width * basis_row
    if ROPE_DIMS > 0:
        pair = tl.arange(0, HEAD_DIM // 2)
        is_turned = pair < ROPE_DIMS // 2
        # no pair turns where the frequency is zero: sine 0, cosine 1
        per_position = tl.load(inverse_freqs + pair, mask=is_turned, other=0.0)
        sine, cosine = sin_cos(positions.to(tl.float32)[:, None] * per_position[None, :])
        factor = tl.where(is_turned, rope_scale, 1.0)[None, :]
        sine, cosine = sine * factor, cosine * factor
        x, y = x * cosine - y * sine, y * cosine + x * sine
    return x, y


@triton.jit
def load_queries(
    queries,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
):
    """A KV head's queries as two ``[HEAD_DIM // 2, SHARING_PAD]`` in the order of the keys."""
    first, second = pair_features(HEAD_DIM, ROPE_DIMS, TRADITIONAL)
    heads = tl.arange(0, SHARING_PAD)
    is_head = (heads < SHARING)[None, :]
    pointers = queries + heads[None, :] * HEAD_DIM
    x = tl.load(pointers + first[:, None], mask=is_head, other=0.0)
    y = tl.load(pointers + second[:, None], mask=is_head, other=0.0)
    return x, y


@triton.jit
def block_weights(
    q_x,
    q_y,
    k_x,
    k_y,
    is_inside,
    scale,
    maxima,
    sums,
    stat_head,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
):
    """A block's weights, ``[SHARING_PAD, N]`` in the queries' dtype; maximum and sum are stored."""
    scores = tl.dot(k_x, q_x, input_precision="ieee")
    scores = tl.dot(k_y, q_y, scores, input_precision="ieee") * scale
    scores = tl.where(is_inside[:, None], scores, float("-inf"))
    largest = tl.max(scores, axis=0)
    # a block without any row has no largest score: its weights are zeros
    weights = tl.exp(scores - tl.where(largest > float("-inf"), largest, 0.0)[None, :])
    heads = tl.arange(0, SHARING_PAD)
    is_head = heads < SHARING
    tl.store(maxima + heads * stat_head, largest, mask=is_head)
    tl.store(sums + heads * stat_head, tl.sum(weights, axis=0), mask=is_head)
    return tl.trans(weights).to(q_x.dtype)


@triton.jit
def weigh_rows(
    weights,
    is_inside,
    rows,
    rows_start,
    rows_stride,
    numbers,
    width,
    output,
    output_head,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """A block's weighted rows, number ``numbers`` of an array or of a packed latent, by head."""
    heads = tl.arange(0, SHARING_PAD)
    is_head = heads < SHARING
    columns = tl.arange(0, BLOCK_WIDTH)
    if LAYOUT is None:
        row_offsets = numbers.to(tl.int64) * rows_stride
        for start in range(0, width, BLOCK_WIDTH):
            ids = start + columns
            is_column = ids < width
            tile = tl.load(
                rows + rows_start + row_offsets[:, None] + ids[None, :],
                mask=is_inside[:, None] & is_column[None, :],
                other=0.0,
            )
            product = tl.dot(weights, tile, input_precision="ieee")
            tl.store(
                output + heads[:, None] * output_head + ids[None, :],
                product,
                mask=is_head[:, None] & is_column[None, :],
            )
    else:
        for part in tl.static_range(len(LAYOUT)):
            part_width = rows_stride[part]
            for start in range(0, part_width, BLOCK_WIDTH):
                ids = start + columns
                tile = part_tile(
                    rows[3 * part],
                    rows[3 * part + 1],
                    rows[3 * part + 2],
                    part_width,
                    rows_start + numbers.to(tl.int64),
                    is_inside,
                    ids,
                    LAYOUT[part][0],
                    LAYOUT[part][1],
                )
                product = tl.dot(weights, tile, input_precision="ieee")
                tl.store(
                    output + heads[:, None] * output_head + ids[None, :],
                    product,
                    mask=is_head[:, None] & (ids < part_width)[None, :],
                )
            output += part_width


@triton.jit
def attend_dense_block(
    block,
    q_x,
    q_y,
    keys,
    keys_row,
    values,
    values_row,
    n_dense,
    scale,
    value_dim,
    output,
    output_head,
    maxima,
    sums,
    stat_head,
    HEAD_DIM: tl.constexpr,
    ROPE_DIMS: tl.constexpr,
    TRADITIONAL: tl.constexpr,
    SHARING: tl.constexpr,
    SHARING_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    """A block's part of the softmax over dense rows ``block * N`` and following, by query head.

    With IS_COUNTED ``n_dense`` points to the number of rows.
    """
    rows = block * N + tl.arange(0, N)
    is_inside = rows < (tl.load(n_dense) if IS_COUNTED else n_dense)
    first, second = pair_features(HEAD_DIM, ROPE_DIMS, TRADITIONAL)
    pointers = keys + rows.to(tl.int64)[:, None] * keys_row
    k_x = tl.load(pointers + first[None, :], mask=is_inside[:, None], other=0.0)
    k_y = tl.load(pointers + second[None, :], mask=is_inside[:, None], other=0.0)
    weights = block_weights(
        q_x, q_y, k_x, k_y, is_inside, scale, maxima, sums, stat_head, SHARING, SHARING_PAD
    )
    weigh_rows(
        weights,
        is_inside,
        values,
        0,
        values_row,
        rows,
        value_dim,
        output,
        output_head,
        SHARING,
        SHARING_PAD,
        BLOCK_WIDTH,
        None,
    )


@triton.jit(do_not_specialize=["n_dense_splits"])
def merge_kernel(
    maxima,
    sums,
    latent_parts,
    dense_parts,
    basis,
    basis_batch,
    basis_row,
    basis_head,
    output,
    n_latent_splits,
    n_dense_splits,
    rank,
    value_dim,
    SHARING: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(2)
    at = batch.to(tl.int64) * tl.num_programs(0) + head
    n_splits = n_latent_splits + n_dense_splits
    maxima += at * n_splits
    sums += at * n_splits
    splits = tl.arange(0, BLOCK_SPLITS)
    values = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    is_value = values < value_dim

    peak = float("-inf")
    total = 0.0
    for start in range(0, n_splits, BLOCK_SPLITS):
        is_split = start + splits < n_splits
        largest = tl.load(maxima + start + splits, mask=is_split, other=float("-inf"))
        mass = tl.load(sums + start + splits, mask=is_split, other=0.0)
        risen = tl.maximum(peak, tl.max(largest, axis=0))
        total = total * tl.exp(peak - risen) + tl.sum(mass * tl.exp(largest - risen), axis=0)
        peak = risen

    result = tl.zeros((BLOCK_VALUES,), tl.float32)
    parts = latent_parts + at * n_latent_splits * rank
    basis += batch.to(tl.int64) * basis_batch + (head // SHARING) * basis_head
    columns = tl.arange(0, BLOCK_RANK)
    for first in range(0, rank, BLOCK_RANK):
        ids = first + columns
        is_column = ids < rank
        merged = tl.zeros((BLOCK_RANK,), tl.float32)
        for start in range(0, n_latent_splits, BLOCK_SPLITS):
            is_split = start + splits < n_latent_splits
            largest = tl.load(maxima + start + splits, mask=is_split, other=float("-inf"))
            part = tl.load(
                parts + (start + splits)[:, None] * rank + ids[None, :],
                mask=is_split[:, None] & is_column[None, :],
                other=0.0,
            )
            merged += tl.sum(part * tl.exp(largest - peak)[:, None], axis=0)
        tile = tl.load(
            basis + ids[:, None] * basis_row + values[None, :],
            mask=is_column[:, None] & is_value[None, :],
            other=0.0,
        )
        result += tl.sum(merged[:, None] * tile.to(tl.float32), axis=0)

    parts = dense_parts + at * n_dense_splits * value_dim
    maxima += n_latent_splits
    for start in range(0, n_dense_splits, BLOCK_SPLITS):
        is_split = start + splits < n_dense_splits
        largest = tl.load(maxima + start + splits, mask=is_split, other=float("-inf"))
        part = tl.load(
            parts + (start + splits)[:, None] * value_dim + values[None, :],
            mask=is_split[:, None] & is_value[None, :],
            other=0.0,
        )
        result += tl.sum(part * tl.exp(largest - peak)[:, None], axis=0)
    result = (result / total).to(output.dtype.element_ty)
    tl.store(output + at * value_dim + values, result, mask=is_value)


class Splits:
    """What the programs of a split attention leave for the merge, float32.

    Latent parts ``[B, n_heads, n_latent, rank_v]``, dense parts ``[B, n_heads, n_dense,
    value_dim]``, and the largest score and the sum of weights of each, latent splits first.
    """

    def __init__(self, queries: Array, segment: Segment, values: Array, n_latent: int) -> None:
        batch, n_heads = queries.shape[:2]
        self.n_latent, self.n_dense = n_latent, triton.cdiv(values.shape[-2], BLOCK_ROWS)
        self.n_values = values.shape[-1]

        def empty(*shape: int) -> Array:
            return torch.empty((batch, n_heads, *shape), dtype=torch.float32, device=queries.device)

        self.latent = empty(n_latent, segment.latent_v.shape[-1])
        self.dense = empty(self.n_dense, self.n_values)
        self.maxima = empty(n_latent + self.n_dense)
        self.sums = empty(n_latent + self.n_dense)

    def merge(self, queries: Array, segment: Segment) -> Array:
        """One softmax of all splits, and the basis applied: ``[B, n_heads, 1, value_dim]``.

        Reads the parts ``value_dim / 32`` times and the basis once a query head, from the L2 cache.
        """
        batch, n_heads = queries.shape[:2]
        basis = segment.basis_v
        output = torch.empty(
            (batch, n_heads, 1, self.n_values), dtype=queries.dtype, device=queries.device
        )
        block_values = 32
        merge_kernel[(n_heads, triton.cdiv(self.n_values, block_values), batch)](
            self.maxima,
            self.sums,
            self.latent,
            self.dense,
            basis,
            *basis.stride()[:3],
            output,
            self.n_latent,
            self.n_dense,
            basis.shape[1],
            self.n_values,
            SHARING=n_heads // basis.shape[2],
            BLOCK_SPLITS=32,
            BLOCK_RANK=128,
            BLOCK_VALUES=block_values,
            num_warps=4,
        )
        return output


@lru_cache(maxsize=256)
def inverse_freqs(freqs: tuple[float, ...], device: torch.device) -> Array:
    """Radians per position of each pair; kept, since a copy to the device would stall a step."""
    # divided in float32 as the plain rotation does, so that the angles agree to the bit
    return (1.0 / torch.tensor(freqs, dtype=torch.float32)).to(device)


def rope_arguments(segment: Segment) -> tuple[Array, float, dict[str, Any]]:
    """A segment's rotation: inverse frequencies, scale and the compile-time arguments."""
    spec = segment.rope_runs[0].spec
    if spec is None:
        return segment.basis_k, 1.0, {"ROPE_DIMS": 0, "TRADITIONAL": False}
    constants = {"ROPE_DIMS": spec.dims, "TRADITIONAL": spec.traditional}
    return inverse_freqs(spec.freqs, segment.basis_k.device), float(spec.scale), constants


def block_rank(dtype: torch.dtype) -> int:
    """Latent columns of a tile: 128 bytes a row, one cache line."""
    return 128 // dtype.itemsize


def launch_options(head_dim: int) -> dict[str, int]:
    """Warps and pipeline stages: with 2 stages four programs of head_dim 128 fit one Hopper SM."""
    return {"num_warps": 8 if head_dim > 128 else 4, "num_stages": 2}


def sharing_pad(n_sharing: int) -> int:
    """Columns of the tile of a KV head's query heads."""
    return max(16, triton.next_power_of_2(n_sharing))


def why_not_segment(segment: Segment) -> str | None:
    """What the kernels cannot take of a segment."""
    head_dim = segment.basis_k.shape[-1]
    if len(segment.rope_runs) != 1:
        return f"the segment's rows have {len(segment.rope_runs)} rotary embeddings; kernels take 1"
    if head_dim not in HEAD_DIMS:
        return f"head_dim={head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
    return (
        why_not_arrays(segment.latent_k, segment.latent_v, segment.basis_k, segment.basis_v)
        or latents.problem(segment.latent_k)
        or latents.problem(segment.latent_v)
    )


def why_not_arrays(*arrays: Factor) -> str | None:
    """What the kernels cannot take of arrays that meet in one product."""
    if len({x.dtype for x in arrays}) > 1:
        return "the arrays differ in dtype: " + ", ".join(str(x.dtype) for x in arrays)
    plain = [x for x in arrays if not isinstance(x, Packed)]
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in plain):
        return "an array's last axis is strided; kernels read it as contiguous"
    return None


def why_not_attention(queries: Array, segment: Segment, keys: Array, values: Array) -> str | None:
    """What the attention kernels cannot take."""
    n_sharing = queries.shape[1] // keys.shape[1]
    if queries.shape[-2] != 1:
        return f"the kernel takes one query a head, not {queries.shape[-2]}"
    if n_sharing > MAX_SHARING:
        return f"{n_sharing} query heads share a KV head; the kernel takes up to {MAX_SHARING}"
    return why_not_segment(segment) or why_not_arrays(
        queries.contiguous(), segment.latent_k, keys, values
    )


def attention_key(queries: Array, segment: Segment, values: Array) -> tuple[Any, ...]:
    """What makes a new compilation of the attention kernels, dtype name first."""
    n_sharing = queries.shape[1] // segment.basis_k.shape[2]
    return (*segment_key(segment), n_sharing, values.shape[-1])


def segment_key(segment: Segment) -> tuple[Any, ...]:
    """What makes a new compilation for a segment, dtype name first."""
    spec = segment.rope_runs[0].spec
    rope = None if spec is None else (spec.dims, spec.traditional)
    # Triton compiles anew for sizes that are multiples of 16
    both = segment.latent_k, segment.latent_v
    is_round = [x.shape[-1] % 16 == 0 for x in both]
    dtype = str(segment.latent_k.dtype).removeprefix("torch.")
    is_counted = segment.n_dense is not None
    layouts = map(latents.layout_of, both)
    return (dtype, segment.basis_k.shape[-1], rope, *is_round, *layouts, is_counted)


def sample_segment(backend: Backend, segment: Segment, n_rows: int) -> Segment:
    """A small segment of the same ranks or layouts, head_dim, dtype and rotation."""

    def basis(latent: Factor, head_dim: int, seed: int) -> Array:
        rank = latent.shape[-1]
        return (backend.normal((1, rank, 2, head_dim), seed) * rank**-0.5).to(latent.dtype)

    rank_k, rank_v = segment.latent_k.shape[-1], segment.latent_v.shape[-1]
    latent_k = small_latent(backend, segment.latent_k, n_rows, rank_k, 0)
    latent_v = small_latent(backend, segment.latent_v, n_rows, rank_v, 1)
    spec: RopeSpec | None = segment.rope_runs[0].spec
    n_dense = None
    if segment.n_dense is not None:
        # the last of the rows of :func:`sample_dense` is not in use, nor is then any of its block
        n_dense = torch.full_like(segment.n_dense, BLOCK_ROWS)
    return Segment(
        latent_k,
        latent_v,
        basis(latent_k, segment.basis_k.shape[-1], 2),
        basis(latent_v, segment.basis_v.shape[-1], 3),
        segment.start,
        (RopeRun(n_rows, spec),),
        n_dense,
    )


def sample_dense(
    backend: Backend, queries: Array, segment: Segment, values: Array
) -> tuple[Array, Array, Array]:
    """Small queries, dense keys and dense values for the segment of :func:`sample_segment`."""
    n_sharing = queries.shape[1] // segment.basis_k.shape[2]
    head_dim, n_rows = queries.shape[-1], BLOCK_ROWS + 1
    return (
        (backend.normal((1, 2 * n_sharing, 1, head_dim), 4) * 2).to(queries.dtype),
        backend.normal((1, 2, n_rows, head_dim), 5).to(queries.dtype),
        backend.normal((1, 2, n_rows, values.shape[-1]), 6).to(queries.dtype),
    )
