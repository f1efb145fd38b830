"""What queries and a basis make of each pair of features, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from xkv.backends.torch_cuda.kernels import KERNEL_DTYPES
from xkv.ops.backend import Backend
from xkv.ops.types import Array, RopeSpec

PAIRS, COLUMNS = 16, 64
"""Of a program: runs of features for what it reads, of columns for what it writes."""


@triton.jit(
    do_not_specialize=[
        *("queries", "queries_batch", "basis", "basis_batch", "basis_row", "basis_head"),
        *("output_batch", "n_columns", "n_queries", "n_sharing", "n_pairs", "head_dim"),
    ]
)
def query_terms_kernel(
    queries,
    queries_batch,
    basis,
    basis_batch,
    basis_row,
    basis_head,
    output,
    output_batch,
    n_columns,
    n_queries,
    n_sharing,
    n_pairs,
    head_dim,
    rope_scale,
    TRADITIONAL: tl.constexpr,
    N_PAIRS: tl.constexpr,
    N_COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = output.dtype.element_ty
    batch = tl.program_id(2).to(tl.int64)
    first_pair = tl.program_id(1) * N_PAIRS
    columns = tl.program_id(0) * N_COLUMNS + tl.arange(0, N_COLUMNS)
    is_column = (columns < n_columns)[None, :]
    query = columns % n_queries
    queries += batch * queries_batch
    basis += batch * basis_batch
    q = queries + (query * head_dim)[None, :]
    b = basis + (columns // n_queries * basis_row + query // n_sharing * basis_head)[None, :]
    output += batch * output_batch + columns[None, :]
    if first_pair < n_pairs:
        pair = (first_pair + tl.arange(0, N_PAIRS))[:, None]
        is_inside = is_column & (pair < n_pairs)
        if TRADITIONAL:
            first, second = 2 * pair, 2 * pair + 1
        else:
            first, second = pair, pair + n_pairs
        q_1 = tl.load(q + first, mask=is_inside, other=0.0).to(tl.float32)
        q_2 = tl.load(q + second, mask=is_inside, other=0.0).to(tl.float32)
        b_1 = tl.load(b + first, mask=is_inside, other=0.0).to(tl.float32)
        b_2 = tl.load(b + second, mask=is_inside, other=0.0).to(tl.float32)
        of_cosine = (q_1 * b_1 + q_2 * b_2) * rope_scale
        of_sine = (q_2 * b_1 - q_1 * b_2) * rope_scale
        tl.store(output + pair * n_columns, of_cosine.to(dtype), mask=is_inside)
        tl.store(output + (n_pairs + pair) * n_columns, of_sine.to(dtype), mask=is_inside)
    else:
        products = tl.zeros((N_PAIRS, N_COLUMNS), tl.float32)
        for start in range(2 * n_pairs, head_dim, N_PAIRS):
            feature = (start + tl.arange(0, N_PAIRS))[:, None]
            is_inside = is_column & (feature < head_dim)
            x = tl.load(q + feature, mask=is_inside, other=0.0).to(tl.float32)
            products += x * tl.load(b + feature, mask=is_inside, other=0.0).to(tl.float32)
        total = tl.sum(products, axis=0)[None, :]
        tl.store(output + 2 * n_pairs * n_columns, total.to(dtype), mask=is_column)


class QueryTerms:
    """:func:`xkv.ops.index.query_terms`

    A program takes 16 pairs of features and 64 columns, or of 64 columns all features that are not
    rotated. It reads 32 features of its queries and of its rows of the basis, both for each other
    again out of the cache, and writes 2 numbers a pair and column: ``n * n_heads * Lq * dims`` in
    all, which is most of what is moved. 6 flops a pair and column, 8 with a scale.
    """

    name = "query_terms"

    def leading(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        """The queries."""
        return queries

    def why_not(self, queries: Array, basis: Array, spec: RopeSpec) -> str | None:
        """Any shape; the features of the basis side by side."""
        if basis.dtype not in KERNEL_DTYPES:
            return f"the basis is {basis.dtype}; Triton kernels take 16- and 32-bit floats"
        if basis.stride(3) != 1 and basis.shape[3] > 1:
            return "the basis is strided; the kernel reads its features side by side"
        return None

    def sample(
        self, backend: Backend, queries: Array, basis: Array, spec: RopeSpec
    ) -> tuple[Any, ...]:
        """Two sequences, some tiles of columns; the features are the same."""
        head_dim = queries.shape[-1]
        drawn = backend.normal((2, 6, 3, head_dim), 1) * head_dim**-0.5
        rows = backend.normal((1, 5, 2, head_dim), 2)
        return drawn.to(queries.dtype), rows.to(basis.dtype), spec

    def check_key(self, queries: Array, basis: Array, spec: RopeSpec) -> tuple[Any, ...]:
        """Dtypes, order of pairs, whether some features are not rotated."""
        has_rest = spec.dims < queries.shape[-1]
        name = str(queries.dtype).removeprefix("torch.")
        return name, basis.dtype, spec.traditional, has_rest

    def __call__(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        """``[B, 2 * pairs (+ 1), n * n_heads * Lq]`` in the wider dtype of both."""
        queries, n_pairs = queries.contiguous(), len(spec.freqs)
        n_index, n_kv_heads, head_dim = basis.shape[1:]
        n_queries = queries.shape[1] * queries.shape[2]
        batch, has_rest = max(len(basis), len(queries)), spec.dims < head_dim
        shape = batch, 2 * n_pairs + has_rest, n_index * n_queries
        dtype = torch.promote_types(queries.dtype, basis.dtype)
        output = torch.empty(shape, dtype=dtype, device=queries.device)
        n_tiles = triton.cdiv(n_pairs, PAIRS) + has_rest
        query_terms_kernel[(triton.cdiv(shape[2], COLUMNS), n_tiles, batch)](
            queries=queries,
            queries_batch=queries.stride(0) if len(queries) > 1 else 0,
            basis=basis,
            basis_batch=basis.stride(0) if len(basis) > 1 else 0,
            basis_row=basis.stride(1),
            basis_head=basis.stride(2),
            output=output,
            output_batch=output.stride(0),
            n_columns=shape[2],
            n_queries=n_queries,
            n_sharing=n_queries // n_kv_heads,
            n_pairs=n_pairs,
            head_dim=head_dim,
            rope_scale=float(spec.scale),
            TRADITIONAL=spec.traditional,
            N_PAIRS=PAIRS,
            N_COLUMNS=COLUMNS,
            num_warps=4,
        )
        return output


KERNEL = QueryTerms()
